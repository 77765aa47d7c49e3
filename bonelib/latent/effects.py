"""What directions of a latent space do to attributes, and how far they do it evenly.

`read`, codes, shifts and `AttributeModel` are those of `attribute_model`. Intervals are of 95 %, by resampling
patients (or, of samples, the samples).
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from bonelib.core.random import numpy_rng
from bonelib.evaluation.differentiable import UNITS
from bonelib.evaluation.statistics import of_rows, patient_draws, patient_interval, quantiles
from bonelib.latent.attribute_model import AttributeModel, jacobian, readings, shifted
from bonelib.latent.directions import Direction

EVEN = 0.1  # deviation from a straight line, as a share of the response, that still counts as linear


class Subjects(NamedTuple):
    """Bones to edit: codes (n, ...), the patient (or sample) of each, and whether it is of a "scan" or a "sample"."""

    codes: Tensor
    groups: list[str]
    sources: list[str]


def subjects(tool: AttributeModel, inverted: Tensor, patients: list[str], samples: Tensor, n: int) -> Subjects:
    """Up to `n` inverted codes and as many samples, those that can be read; inverted ones first.

    Where none can be read, the first ones are taken: they can be drawn, and whatever is read on them is NaN.
    """
    kept = {}
    for name, codes in (("scan", inverted), ("sample", samples)):
        fit = readings(tool.read, codes).isfinite().all(1)
        kept[name] = (fit if fit.any() else ~fit).nonzero()[:n, 0]
    drawn = samples[kept["sample"]]
    if inverted.dim() > samples.dim():
        drawn = drawn[:, None].expand(-1, inverted.shape[1], -1)
    groups = [patients[i] for i in kept["scan"].tolist()] + [f"sample {i}" for i in kept["sample"].tolist()]
    sources = ["scan"] * len(kept["scan"]) + ["sample"] * len(drawn)
    return Subjects(torch.cat([inverted[kept["scan"]], drawn]), groups, sources)


def effect_matrix(
    tool: AttributeModel, codes: Tensor, vectors: dict[str, Tensor], groups, *, step: float, seed: int, draws: int
) -> list[dict]:
    """The effect of every direction on every attribute, per unit of the code, by central differences over +-`step`: a
    row each, with its interval, the share of the calibrated range, and cross-talk, the direction's largest share on
    another attribute over that on this one."""
    rows = []
    for name, vector in vectors.items():
        ahead, behind = (readings(tool.read, shifted(codes, way * vector)) for way in (step, -step))
        change, rng = ((ahead - behind) / (2 * step)).double().numpy(), numpy_rng(seed, "effects", name)
        mean, low, high, *_ = patient_interval(of_rows(_mean, change), groups, rng=rng, draws=draws)
        shares = np.abs(mean) / tool.span.numpy()
        for k, attribute in enumerate(tool.names):
            row = dict(direction=name, attribute=attribute, N=int(np.isfinite(change[:, k]).sum()))
            values = {
                "effect": mean[k],
                "low": low[k],
                "high": high[k],
                "share of range": mean[k] / float(tool.span[k]),
            }
            values["cross-talk"] = np.delete(shares, k).max() / max(shares[k], 1e-9)
            rows.append(row | {key: float(v) for key, v in values.items()})
    return rows


def scaled(straight: dict[str, Direction], matrix: list[dict]) -> dict[str, Direction]:
    """Ridge directions with their measured effect as slope, for those named "ridge ATTRIBUTE" in `effect_matrix`.

    The slope of a ridge is shrunk by its penalty. A direction without a measured effect is left out.
    """
    found = {r["attribute"]: r["effect"] for r in matrix if r["direction"] == f"ridge {r['attribute']}"}
    return {n: straight[n]._replace(slope=effect) for n, effect in found.items() if np.isfinite(effect) and effect}


def responses(tool: AttributeModel, codes: Tensor, vector: Tensor, alphas) -> np.ndarray:
    """Mean change of the attributes (alphas, k) over codes that are moved by alpha along a direction."""
    start = readings(tool.read, codes)
    return np.stack([_mean((readings(tool.read, shifted(codes, float(a) * vector)) - start).numpy()) for a in alphas])


def linear_range(alphas, response: np.ndarray) -> float:
    """The largest alpha up to which a response (alphas,), symmetric about 0, stays within 10 % of the line through its
    smallest steps on both sides; 0 where already the second step is off, or cannot be read (NaN)."""
    alphas, response = np.asarray(alphas, float), np.asarray(response, float)
    least = np.abs(alphas[alphas != 0]).min()
    near = np.isclose(np.abs(alphas), least)
    slope = float((alphas[near] * response[near]).sum() / (alphas[near] ** 2).sum())
    even = 0.0
    for size in sorted({abs(a) for a in alphas if a}):
        at = np.isclose(np.abs(alphas), size)
        if not np.abs(response[at] - slope * alphas[at]).max() <= EVEN * abs(slope) * size:
            break
        even = size
    return even


def reaches(tool: AttributeModel, codes: Tensor, vectors: dict[str, Tensor], matrix: list[dict], alphas) -> list[dict]:
    """Of every direction: the attribute it moves most, its row of `effect_matrix`, and how far it does so evenly.

    `alphas` are the steps, mirrored about 0, at which responses are read.
    """
    steps, rows = [*(-a for a in reversed(alphas)), 0.0, *alphas], []
    for name, vector in vectors.items():
        mine = [row for row in matrix if row["direction"] == name]
        row = max(mine, key=lambda r: abs(r["share of range"]))
        response = responses(tool, codes, vector, steps)[:, tool.index(row["attribute"])]
        rows.append(row | {"linear up to": linear_range(steps, response)})
    return rows


def by_rank(
    tool: AttributeModel, codes: Tensor, vectors: Tensor, groups, *, seed: int, draws: int
) -> tuple[np.ndarray, list[dict]]:
    """Effects (directions, k) of all directions (d, d), strongest eigenvalue first, and what goes with their rank.

    The effect is the root mean square over codes of the derivative per unit of the code, in shares of the range. Rows:
    Spearman's correlation of effect and rank with its interval, and the same for the attribute's part in all effects of
    a direction: positive if small eigenvalues carry it.
    """
    _, slopes = jacobian(tool.read, codes)
    kept = slopes.isfinite().all(-1).all(-1)
    squares = ((slopes[kept] / tool.span[:, None]) @ vectors.T).square().double().numpy()  # (codes, k, directions)
    rank, groups = np.arange(1, len(vectors) + 1), [g for g, k in zip(groups, kept.tolist(), strict=True) if k]

    def found(codes):
        effect = np.sqrt(_mean(squares[codes]))
        part = effect / effect.sum(0)
        return np.array([[stats.spearmanr(rank, row).statistic for row in table] for table in (effect, part)]).T

    some = patient_draws(found, groups, rng=numpy_rng(seed, "ranks"), draws=draws)
    value, rows = found(np.arange(len(squares))), []
    # Fewer different codes blur the ranks of every draw: deviations from the draws' own mean are laid about the value
    ends = value + quantiles(some) - some.mean(0)
    numbers = zip(("rank", "low", "high"), (value, *ends), strict=True)
    named = {
        f"{key}, {what}": v[:, j] for what, v in numbers for j, key in enumerate(("effect", "part of all effects"))
    }
    for k, attribute in enumerate(tool.names):
        row = dict(attribute=attribute, N=len(squares), directions=len(rank))
        rows.append(row | {name: float(values[k]) for name, values in named.items()})
    return np.sqrt(_mean(squares)).T, rows


def sliders(
    tool: AttributeModel, straight: dict[str, Direction], others: dict[str, Tensor], most: float
) -> dict[str, tuple]:
    """{label: (direction (d,), low, high)} for editing by hand: attributes in their units, over half a range each way.

    `others` {label: direction} follow, over +-`most`.
    """
    found = {}
    for name, direction in straight.items() if tool.calibrated else ():
        half = float(tool.span[tool.index(name)]) / 2
        found[f"{name}, {UNITS.get(name, '')}"] = (direction.vector / direction.slope, -half, half)
    return found | {label: (vector, -most, most) for label, vector in others.items()}


def _mean(values):
    """Over the first axis, of what is not NaN; NaN of nothing."""
    known = np.isfinite(values)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, values, 0).sum(0) / np.maximum(count, 1), np.nan)
