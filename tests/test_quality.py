"""The quality table: a generator that copies the real distribution scores as real bones do, a bad one does not."""

import numpy as np
import pytest

from bonelib.evaluation import quality as iq
from bonelib.scans.tables import as_markdown
from bonelib.scans.volumes import Volume


def textures(n, seed, smooth=False):
    rng = np.random.default_rng(seed)
    values = rng.normal(0.4, 0.1, (n, 8, 36, 28)) + rng.normal(0, 0.05, (n, 1, 1, 1))
    if smooth:
        values = values.mean(axis=1, keepdims=True).repeat(8, axis=1)
    return values.clip(0, 1).astype(np.float32)


def test_a_perfect_generator_scores_as_real_bones_do():
    patients = [f"p{i // 2}" for i in range(24)]
    real, other = textures(24, 0), textures(24, 1)
    good = {
        (r["features"], r["metric"]): r
        for r in iq.table(real, {"good": textures(24, 2)}, other, patients, seed=1, draws=20)
    }
    bad = {
        (r["features"], r["metric"]): r
        for r in iq.table(real, {"bad": textures(24, 3, True)}, other, patients, seed=1, draws=20)
    }
    for family in iq.FAMILIES:
        assert good[family, "kernel distance"]["value"] < 0.2 * bad[family, "kernel distance"]["value"]
        assert good[family, "coverage"]["value"] > 0.5 > bad[family, "coverage"]["value"]
        row = good[family, "kernel distance"]
        assert row["low"] <= row["value"] <= row["high"]
        assert row["low"] <= row["real_against_real"] <= row["high"]
        assert (row["n_real"], row["n_fake"], row["n_other"]) == (24, 24, 24)


def ring(hole=True, gap=0, seed=0):
    z, y, x = np.indices((8, 80, 60))
    radius = np.hypot(y - 40, x - 30)
    bone = (radius < 22) & ((radius > 17) if hole else True) & ~((x > 30) & (abs(y - 40) < gap))
    density = 50.0 * (radius < 22) + 900.0 * bone + np.random.default_rng(seed).normal(0, 40, radius.shape)
    return Volume(density.astype(np.float32), (0.3, 0.3, 0.3), "mgHA")


def test_bones_without_contours_are_counted_not_measured():
    found = iq.summary([ring(), ring(hole=False), ring(seed=1)], seed=1)
    assert found["N"] == 3 and found["contours found"] == pytest.approx(2 / 3) and abs(found["stamp"]) < 0.1
    assert found["Tt.Ar"] == pytest.approx(np.pi * (22 * 0.3) ** 2, rel=0.05) and found["closed slices"] == 1
    assert iq.summary([ring(), ring()], seed=1)["stamp"] > 0.99
    nothing = iq.summary([ring(hole=False)], seed=1)
    assert nothing["contours found"] == 0 and nothing["stamp"] is None and nothing["Tt.Ar"] is None


def test_an_open_ring_has_contours_but_no_closed_slices():
    found = iq.summary([ring(gap=3), ring()], seed=1)
    assert found["contours found"] == 1 and found["closed slices"] == 0.5


def test_markdown_has_a_line_a_row():
    assert as_markdown([{"a": 0.12345, "b": 3}]).splitlines() == ["| a | b |", "| --- | --- |", "| 0.123 | 3 |"]
