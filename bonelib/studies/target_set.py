"""A set of bones whose densities have a histogram that was asked for."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from bonelib.core.random import numpy_rng
from bonelib.evaluation.statistics import bounded, half_interval, mean_rows, of_rows
from bonelib.latent.attribute_model import AttributeModel, readings
from bonelib.latent.target_optimisation import optimise_to_target

NEAR = 0.5  # of the distance of two wanted values: a sample that is nearer is taken as it is


class Histogram(NamedTuple):
    """Shares of the values between edges that rise, evenly spread within each; the shares need not add up to 1."""

    edges: Sequence[float]
    shares: Sequence[float]

    @property
    def cumulated(self) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(self.shares) / np.sum(self.shares)])

    @property
    def line(self) -> tuple[Sequence[float], np.ndarray]:
        """Its distribution function, by its corners."""
        return self.edges, self.cumulated

    def quantiles(self, n: int) -> np.ndarray:
        """The middles of `n` parts of equal weight, (n,)."""
        return np.interp((np.arange(n) + 0.5) / n, self.cumulated, self.edges)

    def distance(self, values: np.ndarray) -> float:
        """The Kolmogorov-Smirnov distance of values (n,) from it; NaN, of a bone that cannot be read, lies beyond all
        others."""
        values = np.sort(np.asarray(values, float))  # NaN last
        below = np.interp(values, self.edges, self.cumulated)
        below[np.isnan(values)] = 1.0
        steps = np.arange(len(values) + 1) / len(values)
        ends = np.abs(below - steps[1:]) * np.isfinite(values), np.abs(below - steps[:-1])
        return float(np.maximum(*ends).max())


class Drawn(NamedTuple):
    """Codes (n, *code) of a set, the values wanted of them (n,), and which of them had to be moved (n,)."""

    codes: Tensor
    wanted: np.ndarray
    moved: np.ndarray


def draw_set(tool: AttributeModel, samples: Tensor, found: Tensor, trait: str, to: Histogram, n: int) -> Drawn:
    """`n` bones whose `trait` has the histogram, from `samples` (m, *code) with the attributes `found` (m, k); fewer
    where fewer can be read.

    Each quantile gets a sample of its own, so that the distances are the least in all; those that are not near enough
    are moved to their value by `optimise_to_target`, with all other attributes left free.
    """
    k, known = tool.index(trait), torch.arange(len(samples))[found.isfinite().all(1)]
    n = min(n, len(known))
    wanted, values = to.quantiles(n), found[known, k].double().numpy()
    rows, columns = linear_sum_assignment(np.abs(wanted[:, None] - values))
    codes, off = samples[known[columns]], np.abs(wanted[rows] - values[columns])
    far = np.flatnonzero(off > NEAR * np.ptp(wanted) / max(n - 1, 1))
    if len(far) and tool.calibrated:
        asked = torch.full((len(far), len(tool.names)), torch.nan)
        asked[:, k] = torch.from_numpy(wanted[far]).float()
        codes = codes.clone()
        codes[far] = optimise_to_target(tool, codes[far], asked, seeds=[int(i) for i in far]).codes
    return Drawn(codes, wanted, np.isin(np.arange(n), far))


def compared(to: Histogram, sets: dict[str, np.ndarray], *, seed: int, draws: int) -> list[dict]:
    """The distance of each of `sets` (values (n,)) from the histogram, with its interval by halves: a row each."""
    rows = []
    for name, values in sets.items():
        distance, rng = of_rows(to.distance, values), numpy_rng(seed, "histogram", name)
        value, *ends, n, _ = half_interval(distance, range(len(values)), rng=rng, draws=draws)
        low, high = bounded(*ends, (0.0, 1.0))
        rows.append({"": name, "value": value, "low": low, "high": high, "N": n})
    return rows


def checked(wanted: np.ndarray, seen: np.ndarray, *, seed: int, draws: int) -> list[dict]:
    """How far what another instrument sees of a set (n,) lies from what was wanted (n,): two rows, with intervals."""
    off, bones = np.asarray(seen, float) - wanted, range(len(wanted))
    ways = {"mean difference from what was asked": off, "mean absolute difference": np.abs(off)}
    rows = mean_rows(ways, bones, "checked", seed=seed, draws=draws, column="")
    return [{key: value for key, value in row.items() if key != "patients"} for row in rows]


def curves(sets: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The distribution functions of sets (n,), for `figures.scatter`."""
    return {name: (np.sort(v), (np.arange(len(v)) + 0.5) / len(v)) for name, v in sets.items()}


def read_of(tool: AttributeModel, codes: Tensor, trait: str) -> np.ndarray:
    """What is read of the trait of codes (n, *code), (n,)."""
    return readings(tool.read, codes)[:, tool.index(trait)].double().numpy()
