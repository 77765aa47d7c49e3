"""`make repro` on folders of one's own scans: without a table, as DICOM with grades, and with too few patients."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from test_pipeline import copy_of_the_repository, edited, environment, repro, set_value
from test_volumes import dicom_file

from bonelib.scans.tables import read_table

CROP = Path(__file__).parents[2] / "shared/data"
SMALLEST = {  # of what the tiny profile takes longest for, and as few patients held out as can be
    "phantom__visits": 1,
    "phantom__scans": None,
    "preprocess__held_out": 0.2,
    "train__progan__schedule": {"samples": [16, 16], "fade": [0, 8], "batch": [8, 8]},
    "train__progan__snapshots": {"number": 2, "validation": 0.25, "samples": 4, "draws": 10},
}
# What looks at grades, ages or sexes, and all that these need; the others see such a cohort through the same stacks
NEEDED = [
    "attribute_editing@progan",
    "style_mixing",
    "image_quality",
    "expert_validation",
    "metric_sensitivity",
]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A copy of the repository for cohorts of one's own, and the scans that the tiny profile draws."""
    folder, drawn = (tmp_path_factory.mktemp(name) for name in ("own", "drawn"))
    copy_of_the_repository(folder)
    params = folder / "params.yaml"
    set_value(params, "models", ["progan"])
    for key, value in SMALLEST.items():
        set_value(params, f"profiles__tiny__{key}", value)
    done = run(folder, "cohort")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    shutil.copytree(folder / "out/tiny/cohort", drawn / "cohort")
    rows = read_table(drawn / "cohort/scans.tsv")
    return folder, [row | {"path": drawn / "cohort" / row["file"]} for row in rows]


def run(folder, *targets):
    command = [sys.executable, "-m", "bonelib.repro", *targets]
    return subprocess.run(command, cwd=folder, env=environment(folder), text=True, capture_output=True)


@pytest.mark.pipeline
def test_eight_scans_without_any_table_go_through_all_stages(own, tmp_path):
    folder, scans = own
    assert len(scans) == 8
    for i, row in enumerate(scans):
        shutil.copy(row["path"], tmp_path / f"P{i:03d}.nii.gz")
    with edited(folder, cohort__source=str(tmp_path)):
        done = run(folder, *NEEDED)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "8 scans of 8 patients" in done.stdout and "no grader was trained" in done.stdout
    metrics = {p.stem: json.loads(p.read_text()) for p in (folder / "out/tiny/metrics").glob("*.json")}
    assert metrics["02_motion_grading"]["trained"] is False
    quality = metrics["04_image_quality"]
    assert not any(".vgs." in key for key in quality) and any(".random3d.FD.value" in key for key in quality)
    assert quality["progan 1.8.random3d.FD.low"] is None  # two patients are held out, too few for an interval
    for stage in (
        "05_inversion_progan",
        "07_style_mixing",
        "09_expert_validation",
        "S4_metric_sensitivity",
    ):
        assert metrics[stage]
    assert "(no interval)" in done.stdout


@pytest.mark.pipeline
def test_six_series_of_dicom_with_grades_are_taken_in_as_they_are(own, tmp_path):
    folder, scans = own
    rows = ["file,patient,grade"]
    for i, row in enumerate(scans[:6]):
        image = nib.load(row["path"])
        write_series(tmp_path / f"s/P{i:03d}/DICOM", np.asarray(image.dataobj).T, image.header.get_zooms()[0], i)
        rows.append(f"P{i:03d}/DICOM,P{i:03d},{row['grade']}")
    (tmp_path / "s/scans.csv").write_text("\n".join(rows) + "\n")
    with edited(folder, cohort__source=str(tmp_path / "s")):
        done = run(folder, "cohort")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "6 scans of 6 patients" in done.stdout
    written = read_table(folder / "out/tiny/cohort/scans.tsv")
    assert [row["grade"] for row in written] == [row["grade"] for row in scans[:6]]
    for row, scan in zip(written, scans, strict=False):
        kept, given = (nib.load(path) for path in (folder / "out/tiny/cohort" / row["file"], scan["path"]))
        assert np.array_equal(np.asarray(kept.dataobj), np.asarray(given.dataobj))


def write_series(folder, voxels, mm, number):
    """Slices (z, y, x) in mg HA/cm3 whose rows run to the left and to the back, as a scanner has them."""
    folder.mkdir(parents=True)
    for k, pixels in enumerate(voxels[:, ::-1, ::-1]):
        fields = dict(SeriesInstanceUID=f"1.2.{number}", PatientID=str(number), PixelSpacing=[mm, mm])
        fields |= dict(ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[0, 0, round(k * mm, 4)])
        dicom_file(folder / f"{k:03d}", pixels, RescaleSlope=1, RescaleIntercept=0, RescaleType="MGHA", **fields)


@pytest.mark.pipeline
@pytest.mark.skipif(not CROP.is_dir(), reason="the genuine crop is not here")
def test_a_folder_of_one_crop_is_refused_at_once(own):
    folder, _ = own
    with edited(folder, cohort__source=str(CROP)):
        done = repro(folder)
    assert done.returncode == 2 and "at least 6 patients are needed" in done.stderr
    assert "Traceback" not in done.stderr and "Running stage" not in done.stdout
