"""Intervals by patient: patients are drawn whole, and an interval is as wide as theory says."""

import math

import numpy as np
import pytest

from bonelib.core.random import numpy_rng
from bonelib.evaluation.statistics import (
    auc,
    bounded,
    half_interval,
    pair_mean,
    patient_draws,
    patient_interval,
    patient_mean,
    tpr_at,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_patients_are_drawn_whole():
    rows = patient_draws(lambda i: np.bincount(i, minlength=5), ["b", "a", "b", "c", "b"], rng=rng(), draws=50)
    assert (rows[:, 0] == rows[:, 2]).all() and (rows[:, 0] == rows[:, 4]).all()
    assert (rows[:, 0] + rows[:, 1] + rows[:, 3] == 3).all() and len({tuple(row) for row in rows}) > 5


def test_the_ends_of_an_interval_are_no_further_than_a_measure_can_be():
    assert bounded(-0.04, 0.3, (0.0, 1.0)) == (0.0, 0.3) and bounded(0.2, 1.3, (0.0, math.inf)) == (0.2, 1.3)
    assert bounded(None, None, (0.0, 1.0)) == (None, None)


def test_an_interval_is_as_wide_as_patients_differ():
    values = np.repeat(rng(1).normal(size=40), 5)
    found = patient_interval(lambda i: values[i].mean(), np.repeat(np.arange(40), 5), rng=rng(2), draws=2000)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values[::5].std() / 40**0.5, rel=0.1)
    assert (found.N, found.patients) == (200, 40)
    assert np.isnan(patient_interval(lambda i: np.nan, range(4), rng=rng(), draws=4)[:3]).all()


def test_halves_have_the_width_of_the_standard_error_and_no_sample_twice():
    patients, visits, fakes = 30, 4, 50
    real = np.repeat(rng(1).normal(size=patients), visits) + 0.1 * rng(2).normal(size=patients * visits)
    fake, groups, seen = rng(3).normal(size=fakes), np.repeat([f"P{i:02}" for i in range(patients)], visits), []

    def difference(i, j):
        seen.append((i, j))
        return real[i].mean() - fake[j].mean()

    _, low, high, n, _ = half_interval(difference, groups, range(fakes), rng=rng(4), draws=600)
    means = real.reshape(patients, visits).mean(axis=1)
    error = math.sqrt(means.var(ddof=1) / patients + fake.var(ddof=1) / fakes)
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.12) and n == 120
    for i, j in seen[1:]:
        assert len(np.unique(i)) == len(i) == 60 and len(np.unique(j)) == len(j) == 25
        assert set(np.unique(groups[i], return_counts=True)[1]) == {visits}
    assert half_interval(difference, groups[:12], range(fakes), rng=rng(4)).low is None  # three patients


def test_the_mean_over_patients_does_not_count_visits():
    values, patients = [0.0] * 8 + [3.0, np.nan], ["a"] * 8 + ["b", "c"]
    assert patient_mean(values, patients, rng=numpy_rng(0, "x"), draws=400)[:3] == (1.5, 0.0, 3.0)
    assert np.isnan(patient_mean([np.nan], ["a"], rng=rng(), draws=4)[:3]).all()


def test_intervals_of_pairs_follow_the_patients():
    level = rng(1).normal(0, 1, 12)  # of a patient, so that pairs who share one are alike
    pairs = [(i, j) for i in range(12) for j in range(i)]
    values = [level[i] + level[j] for i, j in pairs]
    found = pair_mean(values, pairs, rng=rng(2), draws=2000)
    assert found.value == pytest.approx(np.mean(values)) and (found.N, found.patients) == (66, 12)
    known = 2 * level.std(ddof=1) / 12**0.5  # of the mean of a sum of two, over twelve patients
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(known, rel=0.15)
    assert pair_mean([2.0, 4.0], pairs[:2], over=[1.0, 3.0], rng=rng(), draws=9).value == 1.5
    assert pair_mean([np.nan], pairs[:1], rng=rng(), draws=9).value is None


def test_auc_counts_pairs():
    positives, negatives = np.array([3, 1, 2, 2]), np.array([2, 0, 1])
    wins = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert auc(positives, negatives) == pytest.approx(np.mean(wins))
    assert auc([1, 2], [-1, 0]) == 1 and auc([0], [0]) == 0.5


def test_true_positives_at_a_false_positive_rate():
    negatives = np.arange(100)
    assert tpr_at([98.5, 99.5, 97.5, 3], negatives, 0.01) == 0.5  # one of 100 negatives may exceed
    assert tpr_at([98.5, 99.5], negatives[:50], 0.01) == 1
    assert tpr_at(negatives, negatives, 0.01) <= 0.01
