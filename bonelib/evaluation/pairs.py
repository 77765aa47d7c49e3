"""Means over pairs of bones, with intervals that resample patients: pairs that share a patient are not independent."""

import numpy as np

from bonelib import InputError


def pair_mean(values, pairs, *, rng: np.random.Generator, draws: int, over=None, level=0.95) -> dict[str, float | int]:
    """Mean of `values` (n,) over `pairs` (n, 2) of patients' names, divided by that of `over` (n,) where given.

    Patients are drawn with replacement; a pair counts as often as both its patients together, the product of how often
    each was drawn. NaN values are left out, with their part of `over`. Returns value, low, high (the interval at
    `level`), N (pairs) and patients; numbers that do not exist, as of no pair, are None.
    """
    values, pairs = np.asarray(values, float), np.asarray(pairs).reshape(-1, 2)
    if values.shape != (len(pairs),):
        raise InputError(f"values has shape {values.shape}, but there are {len(pairs)} pairs")
    over = np.ones(len(values)) if over is None else np.asarray(over, float)
    known = np.isfinite(values) & np.isfinite(over)
    values, over, pairs = values[known], over[known], pairs[known]
    names, index = np.unique(pairs, return_inverse=True)
    counts = {"N": len(values), "patients": len(names)}
    if not len(values) or over.sum() == 0:
        return {"value": None, "low": None, "high": None} | counts
    index = index.reshape(-1, 2)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    weight = drawn[:, index[:, 0]] * drawn[:, index[:, 1]]
    below = weight @ over
    means = (weight @ values)[below > 0] / below[below > 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) if len(means) else (None, None)
    ends = {"low": None if low is None else float(low), "high": None if high is None else float(high)}
    return {"value": float(values.sum() / over.sum())} | ends | counts
