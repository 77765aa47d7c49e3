"""Codes of slices moved: from one contrast to the other, along the bone, by injection, and to a volume."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bonelib.core.random import numpy_rng
from bonelib.evaluation.statistics import patient_mean
from bonelib.latent.directions import Way, formula3
from bonelib.latent.mixing import crossed
from bonelib.scans.phantom.contrasts import CONTRASTS

FACTORS = np.logspace(0, 2, 31)  # of formula (3), from 1 to 100
UNIT = 20  # factors from the mean code of one side to that of the other
STEPS = 17  # of a walk along the bone

Draw = Callable[[Tensor], Tensor]
Error = Callable[[Tensor, Tensor, str], Tensor]  # of drawn and real slices (n, 1, 1, y, x) of a contrast, (n,)
BOTH = (CONTRASTS, CONTRASTS[::-1])  # from and to
MEAN, BEST = "mean slice", "code of the true slice"


def interval(values, patients, *key, seed: int, draws: int) -> dict:
    """The mean over patients of values (n,), as a part of a row."""
    return patient_mean(values, patients, rng=numpy_rng(seed, *key), draws=draws)._asdict()


def grouped(rows: list[dict], outer: str, inner: str) -> dict[str, dict[str, list[dict]]]:
    """Rows by their value of one column, then of another."""
    found = {}
    for row in rows:
        found.setdefault(row[outer], {}).setdefault(row[inner], []).append(row)
    return found


# From one contrast to the other


def unit_to(way: Way, source: Tensor, target: Tensor) -> float:
    """What one factor of formula (3) is worth: a twentieth of the way between the means of codes, with its sign."""
    centres = [float((way.forward(codes) @ way.normal).mean()) for codes in (source, target)]
    return (centres[1] - centres[0]) / UNIT


def transferred(way: Way, codes: Tensor, mean: Tensor, tau: float, unit: float, draw: Draw) -> Tensor:
    """Slices of codes (n, d) at every factor, (factors, n, 1, 1, y, x)."""
    return torch.stack([draw(formula3(way, codes, mean, tau, unit * float(f))) for f in FACTORS])


class Transfer(NamedTuple):
    """How codes went from one contrast to the other: along `way`, with the `factor` (its place) that training patients
    liked best; `lines` are errors by factor."""

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
        unit = unit_to(way, before, aim)

        def errors(codes, images, unit=unit, target=target):
            drawn = transferred(way, codes, mean, tau, unit, draw)
            return np.stack([error(slices, images, target).numpy() for slices in drawn], 1)

        best, over = int(errors(before, truth).mean(0).argmin()), errors(start, real)
        lines = along_factors(over, other.patients, **numbers)
        found.append(Transfer(source, target, way, unit, best, lines))
        average = truth.mean(0, keepdim=True).expand_as(real)
        ways = {"moved": over[:, best], MEAN: error(average, real, target), BEST: error(draw(own), real, target)}
        for name, values in ways.items():
            row = {"transfer": found[-1].name, "": name, "factor": float(FACTORS[best]) if name == "moved" else ""}
            rows.append(row | interval(values, other.patients, "transfer", **numbers))
    return found, rows


def along_factors(errors: np.ndarray, patients, *, seed: int, draws: int) -> list[dict]:
    """A row a factor of errors (n, factors): the mean over patients with its interval."""
    how = dict(seed=seed, draws=draws)
    return [
        {"factor": float(f), "log10 factor": float(np.log10(f))} | interval(v, patients, "factor", **how)
        for f, v in zip(FACTORS, errors.T, strict=True)
    ]


# Along the bone


class Walk(NamedTuple):
    """Errors of drawn slices: (main, sought, step) means over patients at each of `steps` slices along the way, and
    (patient, sought) of walks from the central slice at its own best step; `still` are those that did not move."""

    errors: np.ndarray
    steps: np.ndarray
    centre: np.ndarray
    still: np.ndarray


def slope_of(way: Way, codes: Tensor, starts: np.ndarray) -> np.ndarray:
    """How far the codes of a patient (patients, slices, d) move along the normal from one slice to the next: the
    least-squares slope over the numbers of their slices, (patients,)."""
    along = (way.forward(codes.flatten(0, 1)) @ way.normal).reshape(codes.shape[:2]).double().numpy()
    t = starts - starts.mean()
    return (along * t).sum(1) / (t**2).sum()


def walk(way: Way, codes: Tensor, images: Tensor, starts: np.ndarray, step: float, draw: Draw, error) -> Walk:
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
    slice by mm, and rows with the length of a step along the normal from one slice to the next.

    `other` has `positions` slices a patient, `mm` apart is one slice from the next.
    """
    starts = np.array([row["start"] for row in other.rows[: 2 * positions : 2]])
    place = (starts - starts.min()) / np.ptp(starts) - 0.5
    kept = np.flatnonzero(np.abs(place) <= share / 2 + 1e-9)
    people, found, rows, steps = np.unique(other.patients), {}, [], []
    for contrast in CONTRASTS:
        codes, images = (t.unflatten(0, (-1, positions))[:, kept] for t in other.of(contrast))
        slopes = slope_of(way, codes, starts[kept])
        spread = float((way.forward(codes.flatten(0, 1)) @ way.normal).std())
        steps.append({"contrast": contrast} | interval(slopes, people, "step", **numbers) | {"SD of codes": spread})
        one = walk(
            way, codes, images, starts[kept], float(slopes.mean()), draw, lambda a, b, c=contrast: error(a, b, c)
        )
        for j, z in enumerate(starts[kept] - starts[kept][len(kept) // 2]):
            for what, values in (("moved", one.centre[:, j]), ("not moved", one.still[:, j])):
                row = {"contrast": contrast, "": what, "mm": round(float(z * mm), 2)}
                rows.append(row | interval(values, people, "walk", **numbers))
        found[contrast] = one
    return found, rows, steps, [f"{z * mm:.1f}" for z in starts[kept]]


# Injection


def injection(source: Tensor, target: Tensor, real: Tensor, draw: Draw, error) -> np.ndarray:
    """Errors (n, styles + 1) of slices whose styles are the target's from the a-th layer on, against true slices.

    `source` and `target` are (n, styles, d). Column 0 is the target alone, the last the source alone.
    """
    return np.stack([error(draw(crossed(source, target, a)), real).numpy() for a in range(source.shape[1] + 1)], 1)


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
        given = {"paired": styles(own), "unpaired": shuffled(styles(own), other.patients)}
        for what, aim in given.items():
            curve = injection(start, aim, real, draw, lambda a, b, c=target: error(a, b, c))
            of = {"transfer": f"{source} to {target}", "": what}
            place, rise = cliff(curve.mean(0))
            cliffs.append(of | {"last layer that matters": place, "rise": rise, "N": len(curve)})
            layers = enumerate(curve.T)
            rows += [of | {"layer": a} | interval(v, other.patients, "injected", **numbers) for a, v in layers]
    return rows, cliffs


def shuffled(codes: Tensor, patients: np.ndarray) -> Tensor:
    """Codes (n, ...) of other patients at the same height, whose rows come patient by patient, equally many."""
    return codes.roll(int((patients == patients[0]).sum()), 0)


# Volumes


def continuity(volume: np.ndarray) -> dict[str, float]:
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
    """The `continuity` of volumes (z, y, x) of every patient, by what they are: rows with intervals."""
    rows = []
    for what, volumes in bodies.items():
        found = [continuity(volume) for volume in volumes]
        for name in found[0]:
            values = [one[name] for one in found]
            rows.append({"volume": what, "": name} | interval(values, patients, "volume", **numbers))
    return rows
