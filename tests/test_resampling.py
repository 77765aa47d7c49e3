"""Intervals by resampling patients: whole patients are drawn, and the interval is that of their mean."""

import numpy as np
import pytest

from bonelib.evaluation.resampling import by_patient, drawn, interval


def test_patients_are_drawn_whole():
    places = by_patient(["b", "a", "b", "c", "b"])
    assert [p.tolist() for p in places] == [[1], [0, 2, 4], [3]]
    rng, seen = np.random.default_rng(0), set()
    for _ in range(50):
        counts = np.bincount(drawn(places, rng), minlength=5)
        assert counts[0] == counts[2] == counts[4] and counts[0] + counts[1] + counts[3] == 3
        seen.add(tuple(counts))
    assert len(seen) > 5 and len(drawn([], rng)) == 0


def test_an_interval_is_as_wide_as_patients_differ():
    values, rng = np.repeat(np.random.default_rng(1).normal(size=40), 5), np.random.default_rng(2)
    places = by_patient(np.repeat(np.arange(40), 5))
    low, high = interval(np.array([values[drawn(places, rng)].mean() for _ in range(2000)]))
    assert (high - low) / 2 == pytest.approx(1.96 * values[::5].std() / 40**0.5, rel=0.1)
    assert np.isnan(interval(np.full((4, 2), np.nan))).all()
