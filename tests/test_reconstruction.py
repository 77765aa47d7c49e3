"""Measures of a reconstruction against values known by hand."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from bonelib.core.random import numpy_rng
from bonelib.evaluation.similarity import psnr, ssim
from bonelib.studies import reconstruction
from bonelib.studies.reconstruction import (
    attribute_errors,
    compare,
    random3d_distance,
    recognised,
)

BONES = numpy_rng(0, "bones").random((6, 4, 24, 20))


def test_psnr_of_a_known_error():
    assert psnr(BONES, BONES + 0.1) == pytest.approx([20] * 6)
    assert psnr(BONES[:1], 1 - BONES[:1]) < psnr(BONES[:1], BONES[:1] + 0.01)


def test_ssim_is_one_for_itself_and_known_for_flat_volumes():
    assert ssim(BONES, BONES) == pytest.approx([1] * 6)
    flat = np.full((1, 4, 24, 20), 0.5)
    assert ssim(flat, flat + 0.25) == pytest.approx([(2 * 0.5 * 0.75 + 1e-4) / (0.5**2 + 0.75**2 + 1e-4)])
    noise = numpy_rng(0, "noise").normal(size=BONES.shape)
    values = [ssim(BONES, BONES + sd * noise).mean() for sd in (0.05, 0.2, 0.5)]
    assert 1 > values[0] > values[1] > values[2] > -1


def test_random3d_distance_grows_with_the_error():
    noise = numpy_rng(0, "noise").normal(size=BONES.shape)
    values = [random3d_distance(BONES, np.clip(BONES + sd * noise, 0, 1)).mean() for sd in (0, 0.1, 0.3)]
    assert values[0] == 0 and values[1] < values[2]


def test_a_patient_is_recognised_by_the_bone_or_by_another_of_the_same():
    patients = ["a", "a", "b", "b", "c", "d"]
    bones = BONES.copy()
    bones[1], bones[3] = bones[0] + 0.01, bones[2] + 0.01
    assert recognised(bones, bones + 0.001, patients).tolist() == [1] * 6
    assert recognised(bones, bones + 0.001, patients, own=False).tolist() == [1, 1, 1, 1, 0, 0]
    assert recognised(bones, np.roll(bones, 2, axis=0), patients).sum() == 0


def test_the_better_reconstruction_has_the_better_row():
    noise, patients = numpy_rng(0, "noise").normal(size=BONES.shape), list("aabbcd")
    drawn = {name: np.clip(BONES + sd * noise, 0, 1) for name, sd in (("good", 0.05), ("bad", 0.4))}
    rows = compare(BONES, drawn, patients, {"good": {"time": np.ones(6)}}, seed=1, draws=50)
    found = {(r["method"], r["measure"]): r for r in rows}
    assert found["good", "PSNR, dB"]["low"] > found["bad", "PSNR, dB"]["high"]
    assert found["good", "SSIM"]["value"] > found["bad", "SSIM"]["value"]
    assert found["good", "time"]["value"] == 1 and ("bad", "time") not in found
    assert found["good", "SSIM"]["N"] == 6 and found["good", "SSIM"]["patients"] == 4


def test_errors_of_attributes_are_by_method_and_missing_ones_are_none(monkeypatch):
    """The ruler is a stand-in: a volume is its own table of traits."""

    @contextmanager
    def here():
        yield SimpleNamespace(map=map)

    monkeypatch.setattr(reconstruction, "workers", here)
    monkeypatch.setattr(reconstruction, "_measured", lambda volume: volume)
    real = [{"Tb.BMD": 100.0, "Ct.Th": 1.0}, {"Tb.BMD": 200.0}, {"Tb.BMD": 300.0}]
    drawn = [{"Tb.BMD": 110.0, "Ct.Th": np.nan}, {"Tb.BMD": 190.0}, {}]
    rows = attribute_errors(real, {"hybrid": drawn}, ["a", "b", "c"], seed=1, draws=50)
    found = {row["attribute"]: row for row in rows}
    density = found["Tb.BMD"]
    assert (density["N"], density["mean error"], density["absolute error"], density["SD of real"]) == (2, 0, 10, 50)
    assert found["Ct.Th"]["N"] == 0 and found["Ct.Th"]["absolute error"] is None
