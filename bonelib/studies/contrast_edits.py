"""Codes of slices moved: from one contrast to the other, along the bone, by injection, and to a volume."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bonelib.core.random import numpy_rng
from bonelib.evaluation.statistics import patient_mean
from bonelib.latent.directions import Way, formula3
from bonelib.latent.mixing import injected
from bonelib.scans.phantom.contrasts import CONTRASTS

FACTORS = np.logspace(0, 2, 31)  # of formula (3), from 1 to 100
UNIT = 20  # factors from the mean code of one side to that of the other
STEPS = 17  # of a walk along the bone

Draw = Callable[[Tensor], Tensor]
Error = Callable[[Tensor, Tensor, str], Tensor]  # of drawn and real slices (n, 1, 1, y, x) of a contrast, (n,)
BOTH = (CONTRASTS, CONTRASTS[::-1])  # from and to
MEAN, BEST = "mean slice", "code of the true slice"


def _interval(values, patients, *key, seed: int, draws: int) -> dict:
    return patient_mean(values, patients, rng=numpy_rng(seed, *key), draws=draws)._asdict()


def grouped(rows: list[dict], column: str) -> dict[str, dict[str, list[dict]]]:
    """Rows by their value of a column, then of the column without a name."""
    found = {}
    for row in rows:
        found.setdefault(row[column], {}).setdefault(row[""], []).append(row)
    return found


# From one contrast to the other


def transferred(way: Way, codes: Tensor, mean: Tensor, tau: float, unit: float, draw: Draw) -> Tensor:
    """Slices of codes (n, d) at every factor, (factors, n, 1, 1, y, x)."""
    return torch.stack([draw(formula3(way, codes, mean, tau, unit * float(f))) for f in FACTORS])


class Transfer(NamedTuple):
    """How codes went from one contrast to the other: along `way`, on which one factor is worth `unit`, with the
    `factor` (its place) that training patients liked best; `lines` are errors by factor."""

    source: str
    target: str
    way: Way
    unit: float
    factor: int
    lines: list[dict]

    @property
    def name(self) -> str:
        return f"{self.source} to {self.target}"


def transfers(known, other, way: Way, mean: Tensor, tau: float, draw: Draw, error: Error, **numbers):
    """Both transfers of the codes of unknown patients, `other`, and rows with their errors against true slices.

    The factor is chosen on `known` patients (both are `two_contrasts.Coded`). Beside it: the mean slice of these, and
    what the code of the true slice draws.
    """
    found, rows = [], []
    for source, target in BOTH:
        (start, _), (own, real), (before, _), (aim, truth) = (c.of(s) for c in (other, known) for s in (source, target))
        centres = [float((way.forward(codes) @ way.normal).mean()) for codes in (before, aim)]
        unit = (centres[1] - centres[0]) / UNIT

        def errors(codes, images, unit=unit, target=target):
            drawn = transferred(way, codes, mean, tau, unit, draw)
            return np.stack([error(slices, images, target).numpy() for slices in drawn], 1)

        best, over = int(errors(before, truth).mean(0).argmin()), errors(start, real)
        factors = [{"factor": float(f), "log10 factor": float(np.log10(f))} for f in FACTORS]
        of_all = (_interval(v, other.patients, "factor", **numbers) for v in over.T)
        lines = [row | of for row, of in zip(factors, of_all, strict=True)]
        found.append(Transfer(source, target, way, unit, best, lines))
        average = truth.mean(0, keepdim=True).expand_as(real)
        ways = {"moved": over[:, best], MEAN: error(average, real, target), BEST: error(draw(own), real, target)}
        for name, values in ways.items():
            row = {"transfer": found[-1].name, "": name, "factor": float(FACTORS[best]) if name == "moved" else ""}
            rows.append(row | _interval(values, other.patients, "transfer", **numbers))
    return found, rows


# Along the bone


class Walk(NamedTuple):
    """Errors of drawn slices: (main, sought, step) means over patients at each of `steps` slices along the way;
    (patient, sought) of walks from the central slice at its own best step, and `still` those that did not move."""

    errors: np.ndarray
    steps: np.ndarray
    centre: np.ndarray
    still: np.ndarray


def _walk(way: Way, codes: Tensor, images: Tensor, starts: np.ndarray, step: float, draw: Draw, error) -> Walk:
    """From every slice of every patient (patients, slices, d) to every other one: `step` is the length along the normal
    from one slice to the next, `images` (patients, slices, 1, 1, y, x) the true slices, `starts` their numbers."""
    patients, count, _ = codes.shape
    far = float(starts.max() - starts.min())
    steps = np.linspace(-far, far, STEPS)
    errors = np.empty((patients, count, count, STEPS))
    mean = codes.flatten(0, 1).mean(0)
    for k, length in enumerate(steps):
        drawn = draw(formula3(way, codes.flatten(0, 1), mean, 1.0, step * float(length)))
        drawn = drawn.unflatten(0, (patients, count))
        for j in range(count):
            sought = images[:, j : j + 1].expand_as(drawn)
            errors[:, :, j, k] = error(drawn.flatten(0, 1), sought.flatten(0, 1)).reshape(patients, count).numpy()
    middle, over = count // 2, errors.mean(0)
    best = over[middle].argmin(1)
    centre = np.stack([errors[:, middle, j, best[j]] for j in range(count)], 1)
    return Walk(over, steps, centre, errors[:, middle, :, STEPS // 2])


def walks(other, way: Way, positions: int, mm: float, share: float, draw: Draw, error: Error, **numbers):
    """Walks of both contrasts between the slices of the middle `share` of the bone, rows with errors from the central
    slice by mm, and rows with the length of a step: the slope of a patient's codes along the normal over the numbers of
    their slices. `other` has `positions` slices a patient, `mm` apart is one slice from the next."""
    starts = np.array([row["start"] for row in other.rows[: 2 * positions : 2]])
    place = (starts - starts.min()) / np.ptp(starts) - 0.5
    kept = np.flatnonzero(np.abs(place) <= share / 2 + 1e-9)
    starts, people, found, rows, steps = starts[kept], np.unique(other.patients), {}, [], []
    offsets = starts - starts.mean()
    for contrast in CONTRASTS:
        codes, images = (t.unflatten(0, (-1, positions))[:, kept] for t in other.of(contrast))
        along = (way.forward(codes.flatten(0, 1)) @ way.normal).reshape(codes.shape[:2])
        slopes = (along.double().numpy() * offsets).sum(1) / (offsets**2).sum()
        spread = {"SD of codes": float(along.std())}
        steps.append({"contrast": contrast} | _interval(slopes, people, "step", **numbers) | spread)
        one = _walk(way, codes, images, starts, float(slopes.mean()), draw, partial(error, contrast=contrast))
        for j, z in enumerate(starts - starts[len(starts) // 2]):
            for what, values in (("moved", one.centre[:, j]), ("not moved", one.still[:, j])):
                row = {"contrast": contrast, "": what, "mm": round(float(z * mm), 2)}
                rows.append(row | _interval(values, people, "walk", **numbers))
        found[contrast] = one
    return found, rows, steps, [f"{z * mm:.1f}" for z in starts]


# Injection


def cliff(curve: np.ndarray) -> tuple[int, float]:
    """The layer whose injection is the last to matter, counted from 0, and how many times larger the error is behind it
    than before: the largest rise of an error curve (layers + 1,)."""
    place = int(np.diff(curve).argmax())
    with np.errstate(divide="ignore"):  # of a code that draws the true slice itself
        return place, float(np.divide(curve[place + 1], curve[place]))


def injections(other, styles: Callable[[Tensor], Tensor], draw: Draw, error: Error, **numbers):
    """Both transfers by injection of the code of the same slice, "paired", and of another patient's at the same height:
    rows by layer, and rows with the cliffs. `styles` gives codes a style a layer."""
    rows, cliffs = [], []
    for source, target in BOTH:
        start, (own, real) = styles(other.of(source)[0]), other.of(target)
        # Rows come patient by patient, equally many
        given = {
            "paired": styles(own),
            "unpaired": styles(own).roll(int((other.patients == other.patients[0]).sum()), 0),
        }
        for what, aim in given.items():
            curve = injected(draw, start, aim, real, partial(error, contrast=target))
            of = {"transfer": f"{source} to {target}", "": what}
            place, rise = cliff(curve.mean(0))
            cliffs.append(of | {"last layer that matters": place, "rise": rise, "N": len(curve)})
            layers = enumerate(curve.T)
            rows += [of | {"layer": a} | _interval(v, other.patients, "injected", **numbers) for a, v in layers]
    return rows, cliffs


# Volumes


def _continuity(volume: np.ndarray) -> dict[str, float]:
    """Of slices put together (z, y, x): mean absolute difference of neighbours, and their correlation less each slice's
    mean over all (1 where nothing changes from slice to slice)."""
    v = np.asarray(volume, float)
    a, b = v[:-1].reshape(len(v) - 1, -1), v[1:].reshape(len(v) - 1, -1)
    r = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]
    return {"difference of neighbours": float(np.abs(a - b).mean()), "correlation of neighbours": float(np.mean(r))}


def volumes(way: Way, codes: Tensor, start: int, slices: int, step: float, draw: Draw) -> Tensor:
    """A volume (n, z, y, x) of each code (n, d) of the slice number `start`, moved along the bone."""
    mean = codes.mean(0)
    drawn = [draw(formula3(way, codes, mean, 1.0, step * (z - start)))[:, 0, 0] for z in range(slices)]
    return torch.stack(drawn, 1)


def joined(bodies: dict[str, list[np.ndarray]], patients, **numbers) -> list[dict]:
    """How alike neighbouring slices of volumes (z, y, x) of patients are, by what they are: rows with intervals."""
    rows = []
    for what, volumes in bodies.items():
        found = [_continuity(volume) for volume in volumes]
        for name in found[0]:
            values = [one[name] for one in found]
            rows.append({"volume": what, "": name} | _interval(values, patients, "volume", **numbers))
    return rows
