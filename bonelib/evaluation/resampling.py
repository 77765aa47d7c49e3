"""Intervals of 95 % by resampling whole patients, of numbers that several measurements of each go into."""

import warnings

import numpy as np


def by_patient(groups) -> list[np.ndarray]:
    """Places of what belongs to each of the `groups` (n,): a list, one array a patient."""
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    return [np.flatnonzero(group == i) for i in range(len(names))]


def drawn(places: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Places of as many patients as there are, drawn with repetition."""
    if not places:
        return np.zeros(0, int)
    return np.concatenate([places[i] for i in rng.integers(len(places), size=len(places))])


def interval(some: np.ndarray) -> np.ndarray:
    """The ends of intervals of 95 % from draws (draws, ...); NaN where no draw has a value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, that there is nothing
        return np.nanquantile(some, [0.025, 0.975], 0)
