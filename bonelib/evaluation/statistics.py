"""Estimates with intervals by patient: a patient's scans are not independent, nor are pairs that share a patient.

`patient_interval` resamples whole patients with replacement; statistics that duplicates distort, such as distances to
nearest neighbours, take `half_interval`. Both call `statistic(*rows)`, see `of_rows`.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from bonelib import InputError
from bonelib.core.random import numpy_rng

FEWEST = 4  # patients; with fewer there is no interval by halves


class Interval(NamedTuple):
    """An estimate, a number or an array, the ends of its interval, and what it is of; None where a number does not
    exist."""

    value: Any
    low: Any
    high: Any
    N: int
    patients: int

    def parts(self) -> list[tuple[float, float | None, float | None]]:
        """(value, low, high) of each number of the estimate."""
        values = np.ravel(self.value).tolist()
        ends = ([None] * len(values) if end is None else np.ravel(end).tolist() for end in (self.low, self.high))
        return list(zip(values, *ends, strict=True))

    def columns(self, *names: str, sep: str = " ") -> dict[str, float | None]:
        """Each number of the estimate under its name, its ends under "name low" and "name high"."""
        parts = zip(names, self.parts(), strict=True)
        return {
            f"{name}{end}": v for name, of in parts for end, v in zip(("", f"{sep}low", f"{sep}high"), of, strict=True)
        }


def of_rows(statistic: Callable, *values) -> Callable:
    """`statistic` of arrays (n, ...) as a function of rows of each, or of the same rows of all."""

    def found(*rows):
        return statistic(*(v[i] for v, i in zip(values, rows * len(values) if len(rows) == 1 else rows, strict=True)))

    return found


def patient_draws(statistic: Callable, *groups, rng: np.random.Generator, draws: int) -> np.ndarray:
    """`statistic(*rows)` of every draw, (draws, ...): rows of as many patients as there are, drawn with replacement.

    Each of `groups` names the patients of the rows of one independent set; rows are numbers from 0.
    """
    places = [_places(names) for names in groups]
    return np.array([statistic(*(_some(of_set, rng) for of_set in places)) for _ in range(draws)], float)


def patient_interval(
    statistic: Callable, *groups, rng: np.random.Generator, draws: int = 1000, level: float = 0.95
) -> Interval:
    """`statistic(*rows)` of all rows, a number or an array, with its interval by `patient_draws`.

    Draws without a value (NaN) are left out; the ends are NaN if there is none.
    """
    low, high = quantiles(patient_draws(statistic, *groups, rng=rng, draws=draws), level)
    value = statistic(*(np.arange(len(names)) for names in groups))
    return Interval(*(float(v) if np.ndim(v) == 0 else v for v in (value, low, high)), *_counts(groups[0]))


def quantiles(values: np.ndarray, level: float = 0.95) -> np.ndarray:
    """The ends (2, ...) of the interval that holds a share `level` of draws (draws, ...); NaN is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, that there is nothing
        return np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)


def half_interval(statistic: Callable, *groups, rng: np.random.Generator, draws: int = 200) -> Interval:
    """`statistic(*rows)` with its 95 % interval by random halves of the patients of each set, without replacement.

    Duplicates of a draw with replacement collapse k-NN radii to zero and lift FD and KID. The deviations of the draws
    from their mean are laid about the value of all rows, scaled by sqrt(m / (n - m)) for m of n patients of the first
    set (Shao and Wu 1989); an interval of a share may therefore end beyond 0 or 1. No interval for fewer than 4
    patients.
    """
    value = statistic(*(np.arange(len(names)) for names in groups))
    known = [np.unique(np.asarray(names), return_inverse=True) for names in groups]
    none = Interval(float(value) if np.ndim(value) == 0 else value, None, None, *_counts(groups[0]))
    if min(len(names) for names, _ in known) < FEWEST or not np.isfinite(value).all():
        return none
    values = []
    for _ in range(draws):
        chosen = [rng.choice(len(names), len(names) // 2, replace=False) for names, _ in known]
        rows = (np.flatnonzero(np.isin(place, half)) for (_, place), half in zip(known, chosen, strict=True))
        try:
            values.append(statistic(*rows))
        except InputError:  # half of them are too few
            return none
    values = np.array(values, float)
    values = values[np.isfinite(values.reshape(draws, -1)).all(1)]
    if len(values) < 2:
        return none
    n, half = len(known[0][0]), len(known[0][0]) // 2
    low, high = np.asarray(value, float) + np.sqrt(half / (n - half)) * quantiles(values - values.mean(axis=0))
    return none._replace(**dict(low=float(low), high=float(high)) if low.ndim == 0 else dict(low=low, high=high))


def against_real(
    statistic: Callable, sets: dict[str, np.ndarray], patients, *key, seed: int, draws: int
) -> Iterator[tuple[str, int, dict]]:
    """`statistic(real, set, patients)`, one number or several, of each of `sets` (n, ...) but "real" and "other real".

    Yields the name of the set, the place of the number, and it with its interval by halves of `patients`, those of
    "real", which are the same for all sets: value, low, high, real_against_real, n_real, n_fake, n_other.
    """
    real, other, patients = sets["real"], sets["other real"], np.asarray(patients)
    reference = np.ravel(statistic(real, other, patients)).tolist()
    for name in [name for name in sets if name not in ("real", "other real")]:
        fake = sets[name]
        of_halves = of_rows(statistic, real, fake, patients)
        found = half_interval(
            lambda i, j, of=of_halves: of(i, j, i), patients, range(len(fake)), rng=numpy_rng(seed, *key), draws=draws
        )
        counts = dict(n_real=len(real), n_fake=len(fake), n_other=len(other))
        for k, (value, low, high) in enumerate(found.parts()):
            yield name, k, dict(value=value, low=low, high=high, real_against_real=reference[k]) | counts


def bounded(low: float | None, high: float | None, limits: tuple[float, float]) -> tuple[float | None, float | None]:
    """The ends of an interval, no further than what a measure can be; None stays None."""
    return tuple(None if end is None else float(np.clip(end, *limits)) for end in (low, high))


def patient_means(values, patients) -> np.ndarray:
    """The mean of each patient's values, in the order of the patients' names; NaN is left out."""
    values, names = np.asarray(values, float), np.asarray(patients)
    known = np.isfinite(values)
    return np.array([values[(names == name) & known].mean() for name in np.unique(names[known])])


def patient_mean(values, patients, *, rng: np.random.Generator, draws: int) -> Interval:
    """The mean over patients of their means, with its interval by patient. NaN is left out; NaN of nothing."""
    means = patient_means(values, patients)
    if not len(means):
        return Interval(np.nan, np.nan, np.nan, 0, 0)
    found = patient_interval(of_rows(np.mean, means), range(len(means)), rng=rng, draws=draws)
    return found._replace(N=int(np.isfinite(values).sum()))


def mean_rows(measures: dict[str, Any], patients, *key, seed: int, draws: int, column: str = "measure") -> list[dict]:
    """`patient_mean` of every one of `measures` {name: values (n,)} as a row; draws are the same for the same key."""
    how = {name: dict(rng=numpy_rng(seed, *key, name), draws=draws) for name in measures}
    return [{column: name} | patient_mean(v, patients, **how[name])._asdict() for name, v in measures.items()]


def pivoted(rows: list[dict], line: str, column: str) -> list[dict]:
    """Rows with intervals as a table to be read: a line, and a column, for each value of the columns of these names."""
    lines = {}
    for r in rows:
        text = f"{r['value']:.3g} ({r['low']:.3g} to {r['high']:.3g})" if r["N"] else "none can be read"
        lines.setdefault(r[line], {})[r[column]] = text
    columns = dict.fromkeys(r[column] for r in rows)
    return [{"": name} | {key: cells.get(key, "") for key in columns} for name, cells in lines.items()]


def pair_mean(values, pairs, *, rng: np.random.Generator, draws: int, over=None) -> Interval:
    """Mean of `values` (n,) over `pairs` (n, 2) of patients' names, divided by that of `over` (n,) where given.

    Patients are drawn with replacement; a pair counts as often as both its patients together, the product of how often
    each was drawn. NaN values are left out, with their part of `over`. N counts pairs.
    """
    values, pairs = np.asarray(values, float), np.asarray(pairs).reshape(-1, 2)
    if values.shape != (len(pairs),):
        raise InputError(f"values has shape {values.shape}, but there are {len(pairs)} pairs")
    over = np.ones(len(values)) if over is None else np.asarray(over, float)
    known = np.isfinite(values) & np.isfinite(over)
    values, over, pairs = values[known], over[known], pairs[known]
    names, index = np.unique(pairs, return_inverse=True)
    counts = len(values), len(names)
    if not len(values) or over.sum() == 0:
        return Interval(None, None, None, *counts)
    index = index.reshape(-1, 2)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    weight = times[:, index[:, 0]] * times[:, index[:, 1]]
    below = weight @ over
    means = (weight @ values)[below > 0] / below[below > 0]
    low, high = map(float, quantiles(means)) if len(means) else (None, None)
    return Interval(float(values.sum() / over.sum()), low, high, *counts)


def pairs_between(groups, most: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` random pairs (first, second) of samples of different `groups` (n,)."""
    names = np.asarray(groups)
    pairs = np.stack(np.triu_indices(len(names), 1))
    pairs = pairs[:, names[pairs[0]] != names[pairs[1]]]
    first, second = pairs[:, rng.permutation(pairs.shape[1])[:most]]
    return first, second


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counted half."""
    ranks = stats.rankdata(np.concatenate([positives, negatives]))[: len(positives)]
    return float((ranks.mean() - (len(positives) + 1) / 2) / len(negatives))


def tpr_at(positives: np.ndarray, negatives: np.ndarray, fpr: float) -> float:
    """Share of positives above the threshold that at most a share `fpr` of the negatives exceeds."""
    negatives = np.sort(np.asarray(negatives, float))[::-1]
    threshold = negatives[min(int(fpr * len(negatives)), len(negatives) - 1)]
    return float(np.mean(np.asarray(positives) > threshold))


def _places(groups) -> list[np.ndarray]:
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    return [np.flatnonzero(group == i) for i in range(len(names))]


def _some(places: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    if not places:
        return np.zeros(0, int)
    return np.concatenate([places[i] for i in rng.integers(len(places), size=len(places))])


def _counts(groups) -> tuple[int, int]:
    return len(groups), len(np.unique(np.asarray(groups)))
