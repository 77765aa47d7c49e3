import json
from pathlib import Path

import numpy as np
import pytest

from bonelib.evaluation import phantom_check as check
from bonelib.scans.volumes import Volume, read_volume

CROP = Path(__file__).parents[2] / "shared/data/trab_1237_mgHAccm.nii.gz"


@pytest.fixture(scope="module")
def rows():
    return check.survey(4, 0.2428, 1)


def test_measurements_agree_with_the_truth_of_every_phantom(rows):
    assert [row["patient"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["measured_Tt.Ar"] == pytest.approx(row["true_Tt.Ar"], rel=0.03)
        assert row["measured_Tb.BMD"] == pytest.approx(row["seen_Tb.BMD"], rel=0.05)
        assert row["measured_Ct.BMD"] == pytest.approx(row["seen_Ct.BMD"], rel=0.08)
        assert min(row["dice_total"], row["dice_trabecular"]) > 0.97 and row["dice_cortical"] > 0.9
        assert row["seen_Tb.BMD"] > row["true_Tb.BMD"] and row["seen_Ct.BMD"] < row["true_Ct.BMD"]  # blur carries over
        assert row["axis_off_z_deg"] < 5 and -0.3 < row["area_change"] < -0.2


def test_tables_have_what_the_notebook_shows(rows):
    sets = {"coarse": rows}
    bias = {(r["trait"], r["compared"]): r for r in check.biases(sets)}
    wanted = np.mean([r["measured_Tb.BMD"] / r["seen_Tb.BMD"] - 1 for r in rows])
    assert bias["Tb.BMD", "measured against seen"]["off, %"] == pytest.approx(100 * wanted)
    assert len(check.agreement(sets)) == len(check.PAIRS) and len(check.age_panels(rows, check.AGED_TRAITS)) == 4
    pairs = check.correlations(rows)
    assert all(p["low"] <= p["measured"] <= p["high"] for p in pairs) and len(pairs) == len(check.POOLED)
    assert {r["N"] for r in check.against_reference(rows, ("Tt.Ar",))} == {
        sum(r["sex"] == s for r in rows) for s in "FM"
    }
    assert check.shape_table(rows) and check.ratios(sets)


def test_a_cohort_that_is_off_is_found_off():
    rng = np.random.default_rng(0)
    rows = []
    for sex in "FM":
        mean, sd = check.REFERENCE[sex]["Tb.BMD"]
        for age in rng.uniform(20, 88, 2000):
            value = check.expected_at(sex, "Tb.BMD", age) + sd * rng.standard_normal()
            rows.append({"sex": sex, "age": age, "measured_Tb.BMD": float(value) + 0.5 * sd})
    for row in check.against_reference(rows, ("Tb.BMD",)):
        assert row["off by SDs"] == pytest.approx(0.5, abs=0.25) and row["SD ratio"] == pytest.approx(1, abs=0.2)
        assert row["off at all ages"] == pytest.approx(0.5, abs=0.1) and row["N"] == 2000


def test_published_age_curves():
    assert check.expected_at("F", "Ct.BMD", 30) == 926
    assert check.expected_at("F", "Ct.BMD", 70) == pytest.approx(852, abs=1)
    assert check.expected_at("F", "Tt.BMD", 70) == pytest.approx(250, abs=1)
    assert check.expected_at("F", "BV/TV", 70) == pytest.approx(0.180, abs=0.001)
    assert check.expected_at("F", "Rel.Ct.Th", 70) == pytest.approx(0.0995, abs=0.001)
    assert check.expected_at("M", "Tb.BMD", 68.5) == pytest.approx(199 * (1 - 0.0052 * 40))


def test_plates_look_as_thick_as_blur_makes_them():
    for row in check.plates((0.10, 0.14, 0.20)):
        assert row["measured mm"] > row["true mm"] and abs(row["off mm"]) < 0.04  # about half a voxel
    expected = {r["true mm"]: r["expected mm"] for r in check.plates((0.10, 0.14, 0.20))}
    assert expected == pytest.approx({0.10: 0.165, 0.14: 0.223, 0.20: 0.288}, abs=0.003)


def test_overlap_of_masks():
    a, b = np.zeros(8, bool), np.zeros(8, bool)
    a[:4], b[2:6] = True, True
    assert check.dice(a, a) == 1 and check.dice(a, ~a) == 0 and check.dice(a, b) == 0.5


def test_statistics_of_a_crop_are_those_of_its_noise():
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 105, (40, 40, 40)).astype(np.float32)
    noise[:, :, 18:22] += 900
    found = check.crop_statistics(Volume(noise, (0.0607,) * 3))
    assert found["marrow_sd"] == pytest.approx(105, rel=0.03) and found["marrow_mean"] == pytest.approx(0, abs=2)
    assert np.abs(found["noise"]).max() < 0.03 and sum(found["histogram"]) == pytest.approx(1, abs=1e-3)
    assert found["autocorrelation"][0][8] > 0.5 > abs(found["autocorrelation"][2][8])  # a plate along z and y
    assert json.loads(json.dumps(found)) == found


@pytest.mark.skipif(not CROP.exists(), reason="the genuine scanner crop is not here")
def test_the_recorded_statistics_are_those_of_the_genuine_crop():
    found, recorded = check.crop_statistics(read_volume(CROP, unit="mgHA")), check.genuine_statistics()
    assert found["traits"] == pytest.approx(recorded["traits"], rel=1e-3)
    assert found["histogram"] == pytest.approx(recorded["histogram"], abs=1e-4)
    assert 105 < recorded["marrow_sd"] < 112 and 0.65 < np.mean([axis[0] for axis in recorded["noise"]]) < 0.72
