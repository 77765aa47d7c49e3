"""Mean bones of a cohort: whether an atlas has what its condition says, how sharp it is, and which mean is meant."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bonelib.core.random import numpy_rng
from bonelib.evaluation.statistics import half_interval, patient_interval
from bonelib.latent.atlas import IntrinsicMean, atlas, distances
from bonelib.latent.transition import line

QUANTILES = (0.1, 0.9)  # of a condition that is a number
FEW = 3  # a condition with no more values than these has an atlas of each

Draw = Callable[[Tensor], Tensor]  # of codes (n, *code) volumes (n, 1, z, y, x)
Read = Callable[[Tensor], Tensor]  # of volumes (n, 1, z, y, x) an attribute (n,)


def one_a_patient(rows: list[dict], count: int) -> list[dict]:
    """Of rows of stacks the one in the middle of the first scan of every patient, of `count` at most: all of one
    height."""
    first = {}
    for row in rows:
        first.setdefault(row["patient"], []).append(row)
    scans = [[row for row in of if row["scan"] == of[0]["scan"]] for of in first.values()]
    return [of[len(of) // 2] for of in scans][:count]


def places(values: np.ndarray, points: int) -> np.ndarray:
    """Where atlases of a condition are drawn: at each of few values, or at `points` between two of `QUANTILES`."""
    known = np.unique(values[np.isfinite(values)])
    return known if len(known) <= FEW else np.linspace(*np.quantile(values[np.isfinite(values)], QUANTILES), points)


def follows(
    codes: Tensor, condition: np.ndarray, value: np.ndarray, patients: Sequence[str], draw: Draw, read: Read, **how
) -> tuple[list[dict], dict]:
    """Whether atlases under a condition (n,) have the attribute `value` (n,) that bones under it have.

    Rows: where an atlas of `codes` (n, *code) is drawn (`at`), what the line of the attribute over the condition says
    (`asked`), what is read on the atlas (`measured`). And the slope of measured over asked with its interval by
    patient: 1 where an atlas has what is asked. `how` are points, seed and draws. Bones without condition or attribute
    are left out.
    """
    kept = np.flatnonzero(np.isfinite(condition) & np.isfinite(value))
    at = places(condition[kept], how["points"])

    def pairs(rows):
        rows = kept[rows]
        line = np.polynomial.Polynomial.fit(condition[rows], value[rows], 1) if np.ptp(condition[rows]) else None
        asked = line(at) if line else np.full(len(at), np.nan)
        return asked, read(draw(atlas(codes[rows], condition[rows][:, None], at[:, None]))).double().numpy()

    def slope(rows):
        asked, measured = pairs(rows)
        x = asked - asked.mean()
        return float((x * measured).sum() / (x * x).sum()) if np.isfinite(x).all() and x.any() else np.nan

    names = np.asarray(patients)[kept]
    found = patient_interval(slope, names, rng=numpy_rng(how["seed"], "atlas slope"), draws=how["draws"])
    asked, measured = pairs(np.arange(len(kept)))
    rows = [dict(at=float(a), asked=float(b), measured=float(c)) for a, b, c in zip(at, asked, measured, strict=True)]
    return rows, found._asdict()


def all_follow(
    codes: Tensor, asked: dict[str, tuple[np.ndarray, np.ndarray]], patients, draw: Draw, read: Read, **how
) -> tuple[list[dict], list[dict]]:
    """`follows` for every condition of `asked` {name: (condition, attribute)}: the rows of all, and a row a slope."""
    rows, found = [], []
    for name, (condition, value) in asked.items():
        mine, slope = follows(codes, condition, value, patients, draw, read, **how)
        rows += [dict(condition=name) | row for row in mine]
        found.append({"slope of": name} | slope)
    return rows, found


def extremes(codes: Tensor, known: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Atlases of codes (n, *code) at both ends of the conditions `known` {name: (n,)}: (2, *code) by what they are."""
    found = {}
    for name, values in known.items():
        has = np.isfinite(values)
        at = places(values, 2)[[0, -1]]
        means = atlas(codes[torch.from_numpy(has)], values[has][:, None], at[:, None])
        found[f"{name}: {at[0]:.3g} and {at[1]:.3g}"] = means
    return found


def sharpness(volumes: Tensor) -> np.ndarray:
    """Root mean square of the differences of neighbouring voxels of volumes (n, 1, z, y, x), (n,)."""
    total = sum(volumes.diff(dim=axis).square().flatten(1).sum(1) for axis in (2, 3, 4))
    return (total / volumes[0].numel()).sqrt().double().numpy()


def sharp(real: Tensor, codes: Tensor, patients: Sequence[str], draw: Draw, *, seed: int, draws: int) -> list[dict]:
    """How sharp the mean of voxels, the bone of the mean code, and the bones of single codes are, over the mean
    sharpness of the bones (n, 1, z, y, x) they are of: a row each. By halves of the patients, as a mean with duplicates
    is one of fewer bones, and sharper."""
    own, of_codes = sharpness(real), sharpness(draw(codes))
    ways = {
        "mean of the voxels": lambda i: sharpness(real[i].mean(0, keepdim=True))[0],
        "mean of the codes": lambda i: sharpness(draw(codes[i].mean(0, keepdim=True)))[0],
        "a single code": lambda i: of_codes[i].mean(),
    }
    rows = []
    for name, way in ways.items():
        rng = numpy_rng(seed, "sharpness")  # the same patients for every mean
        found = half_interval(lambda i, way=way: float(way(i) / own[i].mean()), patients, rng=rng, draws=draws)
        rows.append({"": name} | found._asdict())
    return rows


def straight_and_geodesic(
    found: IntrinsicMean, codes: Tensor, patients: Sequence[str], draw: Draw, *, seed: int, draws: int
) -> list[dict]:
    """How long the geodesics from the intrinsic mean to the bones of `codes` (n, *code) are over the straight ways, and
    its squared distances over those from the straight mean along straight ways: a row each, by patient."""
    steps = np.linspace(0, 1, found.paths.shape[1])
    short = distances(draw, found.paths)
    straight = distances(draw, torch.stack([line(found.code, code, steps) for code in codes]))
    centre = distances(draw, torch.stack([line(codes.mean(0), code, steps) for code in codes]))
    squares = "squared distances, intrinsic mean over straight mean"
    ways = {
        "geodesic over straight, length": lambda i: (short[i] / straight[i]).mean(),
        squares: lambda i: (short[i] ** 2).sum() / (centre[i] ** 2).sum(),
    }
    rows = []
    for name, way in ways.items():
        rng = numpy_rng(seed, "geodesics", name)
        rows.append({"": name} | patient_interval(way, patients, rng=rng, draws=draws)._asdict())
    return rows
