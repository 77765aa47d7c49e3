import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bonelib import InputError
from bonelib.evaluation.cohort_morphometry import by_patient
from bonelib.scans.phantom.scanner import NATIVE_MM, noise_kernel
from bonelib.scans.volumes import Volume, read_volume
from bonelib.studies import crops
from bonelib.studies import phantom_survey as phantoms
from bonelib.studies import phantom_validation as check
from bonelib.views import figures

CROP = Path(__file__).parents[2] / "shared/data/trab_1237_mgHAccm.nii.gz"


def white(shape, sd=105.0, seed=1):
    return np.random.default_rng(seed).normal(0, sd, shape).astype(np.float32)


@pytest.fixture(scope="module")
def rows():
    return phantoms.survey(4, 0.2428, 1)


def test_an_interrupted_survey_goes_on_where_it_stopped(tmp_path, monkeypatch):
    drawn = []

    def one(seed, patient, voxel_mm):
        if patient == 3 and 3 not in drawn:
            drawn.append(3)
            raise KeyboardInterrupt
        drawn.append(patient)
        return [{"patient": patient, "measured": np.float32(0.5)}]

    monkeypatch.setattr(phantoms, "_one", one)
    monkeypatch.setattr(phantoms, "workers", lambda: ThreadPoolExecutor(1))
    with pytest.raises(KeyboardInterrupt):
        phantoms.survey(4, 0.2428, 1, keep=tmp_path)
    drawn.clear()
    drawn.append(3)
    rows = phantoms.survey(4, 0.2428, 1, keep=tmp_path)
    assert [row["patient"] for row in rows] == [1, 2, 3, 4] and not {1, 2} & set(drawn)
    drawn.clear()
    assert phantoms.survey(4, 0.2428, 1, keep=tmp_path) == rows and not drawn
    monkeypatch.setattr(phantoms, "CODE", "another")
    phantoms.survey(2, 0.2428, 1, keep=tmp_path)
    phantoms.survey(1, 0.2428, 2, keep=tmp_path)
    assert drawn == [1, 2, 1]  # other code, another seed


def test_the_true_cortex_depends_on_its_grid_by_half_a_voxel():
    for row in phantoms.truth_survey(2, 0.2428, 1):
        assert 0.93 < row["truth_by_finer"] < 1 and 0.93 < row["found_by_finer"] < 1
        assert abs(row["volume_by_finer"]) < 0.01


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
    assert bias["Tb.BMD", "measured against noise-free"]["off, %"] == pytest.approx(100 * wanted)
    assert len(check.agreement(sets)) == len(check.PAIRS) and len(check.age_panels(rows, check.AGED_TRAITS)) == 4
    pairs = check.correlations(rows)
    assert all(p["low"] <= p["measured"] <= p["high"] for p in pairs) and len(pairs) == len(check.POOLED)
    assert {r["N"] for r in check.against_reference(rows, ("Tt.Ar",))} == {
        sum(r["sex"] == s for r in rows) for s in "FM"
    }
    assert not any("Dice" in row["compared"] or "compartment" in row["trait"] for row in check.biases(sets))


def test_overlaps_have_a_table_of_their_own():
    rows = [{"dice_total": 0.99 - i / 100, "dice_trabecular": 0.98, "dice_cortical": 0.95} for i in range(4)]
    table = {row["compartment"]: row for row in check.overlaps({"coarse": rows})}
    assert list(table) == ["total", "trabecular", "cortical"] and all(row["all met"] == "yes" for row in table.values())
    assert table["total"]["mean"] == pytest.approx(0.975) and table["total"]["lowest"] == pytest.approx(0.96)
    assert table["total"]["N"] == 4 and table["total"]["voxel size"] == "coarse"
    worse = [rows[0] | {"dice_cortical": 0.94}, *rows[1:], {"refused": "no contour"}]
    table = {row["compartment"]: row for row in check.overlaps({"coarse": worse})}
    assert table["cortical"]["all met"] == "no" and table["total"]["all met"] == "yes"


def test_what_gives_the_phantom_away_is_what_is_surely_off():
    rng, rows = np.random.default_rng(0), []
    for i in range(40):
        sex, age = "FM"[i % 2], 20 + 1.5 * i
        row = {"sex": sex, "age": age}
        for trait in check.TRABECULAR_TRAITS:
            mean, sd = check.expected_at(sex, trait, age), check.REFERENCE[sex][trait][1]
            far = -1.5 if trait == "Tb.N" else 0.0
            row["measured_" + trait] = float(mean + sd * (far + 0.1 * rng.standard_normal()))
            row["sharpened_" + trait] = float(mean)
        rows.append(row)
    lines = check.by_segmentation(rows)
    assert {r["segmentation"] for r in lines} == {"Gaussian", "Laplace-Hamming"} and len(lines) == 20
    pairs = [{"pair": "a, b", "expected": 0.5, "measured": 0.9, "low": 0.8, "high": 0.95}]
    pairs += [{"pair": "c, d", "expected": 0.5, "measured": 0.7, "low": 0.6, "high": 0.8}]
    found = check.discrepancies(lines, pairs)
    assert {row["what"] for row in found} == {"Tb.N of F, SDs off", "Tb.N of M, SDs off", "correlation of a, b"}
    assert {row["by"] for row in found} == {"Gaussian"} and found[-1]["measured"] == 0.9
    assert found[0]["measured"] == pytest.approx(-1.5, abs=0.1) and check.discrepancies([], []) == []
    plain = [{k: v for k, v in row.items() if "sharpened" not in k} for row in rows]
    assert {r["segmentation"] for r in check.by_segmentation(plain)} == {"Gaussian"}


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
    for row in phantoms.plates((0.10, 0.14, 0.20)):
        assert row["measured mm"] > row["true mm"] and abs(row["off mm"]) < 0.04  # about half a voxel
    expected = {r["true mm"]: r["expected mm"] for r in phantoms.plates((0.10, 0.14, 0.20))}
    assert expected == pytest.approx({0.10: 0.165, 0.14: 0.223, 0.20: 0.288}, abs=0.003)


def test_overlap_of_masks():
    a, b = np.zeros(8, bool), np.zeros(8, bool)
    a[:4], b[2:6] = True, True
    assert phantoms.dice(a, a) == 1 and phantoms.dice(a, ~a) == 0 and phantoms.dice(a, b) == 0.5


def test_statistics_of_a_crop_are_those_of_its_noise():
    noise = white((40, 40, 40))
    noise[:, :, 18:22] += 900
    found = crops.crop_statistics(Volume(noise, (0.0607,) * 3))
    assert found["marrow_sd"] == pytest.approx(105, rel=0.03) and found["marrow_mean"] == pytest.approx(0, abs=2)
    assert np.abs(found["noise"]).max() < 0.03 and sum(found["histogram"]) == pytest.approx(1, abs=1e-3)
    assert found["autocorrelation"][0][8] > 0.5 > abs(found["autocorrelation"][2][8])  # a plate along z and y
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(InputError, match="500 voxels at least 5 voxels from bone"):
        crops.crop_statistics(Volume(noise[:, :, 16:24], (0.0607,) * 3))


def test_marrow_is_read_far_from_bone_of_the_scan_itself():
    voxels = white((60, 40, 40))
    for axis in (0, 1):  # the noise is correlated along z and y, and white along x
        voxels = np.apply_along_axis(np.convolve, axis, voxels, noise_kernel(NATIVE_MM), mode="same")
    voxels *= 105 / voxels.std()
    voxels[40:] *= 1.2
    voxels -= 20
    voxels[:, :8] += 600  # bone
    inside = np.zeros(voxels.shape, bool)
    inside[:, :36] = True
    found = crops.marrow(Volume(voxels.astype(np.float32), (NATIVE_MM,) * 3), inside)
    assert found["thirds"][2] / found["thirds"][0] == pytest.approx(1.2, rel=0.05)
    (z1, z2, z3), (y1, *_), (x1, *_) = found["noise"]
    assert z1 == pytest.approx(0.70, abs=0.04) and z2 == pytest.approx(0.24, abs=0.05) and abs(z3) < 0.12
    assert y1 == pytest.approx(0.70, abs=0.04) and abs(x1) < 0.06
    assert found["mean"] == pytest.approx(-20, abs=5)
    voxels[:, 25:] += 60  # too faint to be segmented: no injected noise, but the scan has it
    assert crops.marrow(Volume(voxels.astype(np.float32), (NATIVE_MM,) * 3), inside)["mean"] > 0
    assert crops.marrow(Volume(voxels.astype(np.float32), (NATIVE_MM,) * 3), inside & ~inside[:, ::-1]) is None


def test_directions_of_tilted_plates():
    z, y, x = np.meshgrid(*[np.arange(n) * NATIVE_MM for n in (40, 50, 60)], indexing="ij")
    angle = np.radians(20)
    across = x * np.cos(angle) - z * np.sin(angle)  # thin plates, 20 degrees off z, and thinner gaps along y
    voxels = 900.0 * ((across % 0.8 < 0.2) & (y % 1.2 < 0.8))
    volume = Volume(voxels.astype(np.float32), (NATIVE_MM,) * 3)
    found = phantoms.directions(volume, np.ones(volume.shape, bool))
    assert found["axis_off_z_deg"] == pytest.approx(20, abs=2)
    assert found["tensor_off_z_deg"] == pytest.approx(20, abs=2)
    values = [found[f"tensor_{i}"] for i in (1, 2, 3)]
    assert values == sorted(values) and sum(values) == pytest.approx(1) and values[0] < 0.05


def test_motion_is_seen_in_the_scan_and_grows_with_the_grade():
    rows = phantoms.motion_survey(4, 0.2428, 1)
    assert [(r["patient"], r["grade"]) for r in rows] == [(p, g) for p in (1, 2, 3, 4) for g in (1, 2, 3, 4, 5)]
    medians = [np.median([r["motion"] for r in rows if r["grade"] == g]) for g in (1, 2, 3, 4, 5)]
    assert medians == sorted(medians) and medians[0] > 0.005  # noise alone is no perfect agreement


def test_grades_of_a_cohort_without_drawing_it():
    rows = phantoms.graded(1, 50, 3, 100, (0.02, 0.36, 0.42, 0.18, 0.02))
    assert len(rows) == 100 and {r["patient"] for r in rows} == set(range(1, 51))
    assert {r["grade"] for r in rows} <= {1, 2, 3, 4, 5}


def judged(values, low=-np.inf, high=np.inf, of=np.mean, patients=None):
    """The line of a check of `values`, of as many patients where none are named."""
    table = pd.DataFrame({"patient": range(len(values)) if patients is None else patients, "a": values})
    return check.judged(check.Check(7, "a", "", "full", "a", low, high, of), table)


def test_a_check_is_met_where_it_falls_within():
    values = np.random.default_rng(0).normal(1.0, 0.1, 50)
    met = judged(values, 0.9, 1.1)
    assert met["met"] == "yes" and met["N"] == 50 and met["must fall in"] == "0.9 to 1.1"
    assert met["low"] == pytest.approx(1 - 1.96 * 0.1 / 50**0.5, abs=0.02) and met["low"] < 1 < met["high"]
    assert judged(values, 1.1)["met"] == "no" and judged(values[:2])["met"] == ""
    worst = judged([1, 2, 9], high=5, of=max)
    assert (worst["measured"], worst["low"], worst["met"], worst["must fall in"]) == (9, "", "no", "at most 5")
    assert judged([1, np.nan, 2])["N"] == 2 and judged([])["met"] == ""
    steps = np.repeat([1.0, 2, 3, 4], 25)
    wide, narrow = judged(steps, patients=np.repeat(range(4), 25)), judged(steps)
    assert wide["N"] == 4 and wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])


def accepted(rows, moved, grades):
    pairs = check.correlations(rows)
    tables = {"reference": [], "pairs": pairs, "plates": [{"off mm": 0.002}, {"off mm": -0.02}]}
    return check.acceptance(rows, rows, moved, grades, tables)


def test_the_acceptance_judges_what_was_measured(rows):
    moved = [{"patient": p, "grade": g, "motion": 0.1 * g + 0.001 * p} for p in range(9) for g in (1, 2, 3, 4, 5)]
    grades = [{"patient": p, "age": 20 + p % 68, "grade": 2 + p % 2} for p in range(200)]
    table = accepted([r | {"voxel_mm": NATIVE_MM, "acf_z1": 0.7, "acf_y1": 0.5} for r in rows], moved, grades)
    found = {r["quantity"]: r for r in table}
    assert [r["row"] for r in table] == sorted(r["row"] for r in table)
    assert {r["row"] for r in table} == set(range(2, 16)) - {13}
    assert found["noise, autocorrelation along z at 1"]["met"] == "yes"
    assert found["noise, autocorrelation along y at 1"]["met"] == "no"
    assert found["noise, autocorrelation along x at 1"]["met"] == ""  # nothing was read there
    assert found["plates, largest error in mm"]["measured"] == 0.02
    assert found["plates, largest error in mm"]["met"] == "no"
    assert {r["row"] for r in table if "Laplace-Hamming" in r["quantity"]} == {6, 7, 8}
    assert found["BV/TV by Tb.BMD/1200, Laplace-Hamming"]["met"] == ""  # read on the scanner's own grid alone
    ratio = np.mean([r["measured_BV/TV"] / r["measured_Tb.BMD"] * 1200 for r in rows])
    assert found["BV/TV by Tb.BMD/1200, Gaussian"]["measured"] == pytest.approx(ratio)
    assert all(r["met"] == "yes" for r in table if r["row"] == 14)
    assert found["grades, mean"]["measured"] == 2.5 and found["grades, mean"]["met"] == "no"
    assert found["fabric, worst angle of its axis to z"]["measured"] == max(r["axis_off_z_deg"] for r in rows)
    mixed = [r | {"grade": {2: 3, 3: 2}.get(r["grade"], r["grade"])} for r in moved]
    found = {r["quantity"]: r for r in accepted(rows, mixed, grades)}
    assert found["motion, median of grade 3 less that of 2"]["met"] == "no"
    assert found["motion, chance that a grade 3 shows more than a grade 2"]["met"] == "no"
    assert found["BV/TV by Tb.BMD/1200, Gaussian"]["met"] == ""  # a coarse grid says nothing of trabeculae


def test_a_trait_of_zero_counts_and_a_missing_one_does_not():
    rows = [{"patient": "a", "Ct.Po": 0.0}, {"patient": "a", "Ct.Po": "0.02"}, {"patient": "b", "Ct.Po": ""}]
    assert by_patient([*rows, {"patient": "c"}], "Ct.Po") == pytest.approx([0.01])


def test_slices_of_crops_have_one_window_and_a_bar_in_mm():
    a, b = white((20, 30, 40)), white((20, 30, 40), seed=2)
    panels = [{"title": "density", "x": "mg HA/cm3", "y": "", "lines": {"": ([0, 1], [0, 1])}}]
    for pictures in ({"genuine": a, "phantom": b}, {"phantom": b}):
        fig = figures.crops(pictures, (0.1,) * 3, panels)
        images = [axis.images[0] for axis in fig.axes if axis.images]
        assert len(images) == 4 * len(pictures) and {i.get_clim() for i in images} == {figures.WINDOW}
        assert images[0].get_extent() == [0, 4, 3, 0] and images[3].get_extent() == [0, 4, 2, 0]
        assert all(np.ptp(axis.lines[0].get_xdata()) == 1 for axis in fig.axes if axis.images)
        figures.plt.close(fig)


@pytest.mark.skipif(not CROP.exists(), reason="the genuine scanner crop is not here")
def test_the_recorded_statistics_are_those_of_the_genuine_crop():
    found, recorded = crops.crop_statistics(read_volume(CROP, unit="mgHA")), crops.genuine_statistics()
    for name in ("traits", "sharpened"):
        assert found[name] == pytest.approx(recorded[name], rel=1e-3)
    assert found["histogram"] == pytest.approx(recorded["histogram"], abs=1e-4)
    assert 105 < recorded["marrow_sd"] < 112 and 0.65 < np.mean([axis[0] for axis in recorded["noise"]]) < 0.72
