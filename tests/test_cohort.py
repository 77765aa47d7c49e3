"""Own scans, whatever they look like: who is who, what is in the picture, and one sentence for what cannot be used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bonelib import InputError
from bonelib.evaluation import cohort_morphometry as attributes
from bonelib.scans import cohort, identity, plausibility
from bonelib.scans.cohort import import_scans
from bonelib.scans.config import Preprocess
from bonelib.scans.dataset import load_stacks
from bonelib.scans.listing import listed, summary
from bonelib.scans.preprocessing import place, preprocess, preprocess_cohort
from bonelib.scans.tables import read_table
from bonelib.scans.volumes import Volume, read_volume

MM = 0.25
HOW = dict(dct_clip=1000, subsample=1, stack_slices=4, stacks_per_scan=2, held_out=0.3, intensity=(-500, 1500))
QUIET = dict(say=lambda *a, **k: None)


def bone(seed=0, shape=(6, 44, 40), radius=12.0, middle=None, narrowing=0.0):
    """Soft tissue, a cortical ring and marrow in mg HA/cm3 (z, y, x) int16; the ring narrows along z and thickens."""
    z, y, x = np.indices(shape)
    middle = middle or (shape[1] / 2, shape[2] / 2)
    outer = radius * (1 - narrowing * z / shape[0])
    r = np.hypot(y - middle[0], x - middle[1])
    density = np.where(r < outer, np.where(r < outer - 3 * (1 + 2 * narrowing * z / shape[0]), 130, 950), 0)
    return (density + np.random.default_rng(seed).normal(0, 40, shape)).astype(np.int16)


def nii(path, voxels, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels.T, np.diag([MM, MM, MM, 1.0]) if affine is None else affine), path)
    return path


def brought_in(source, folder, **how):
    """Rows of the imported cohort, and what was said."""
    said = []
    import_scans(source, folder, "mgHA", say=lambda *a, **k: said.append(" ".join(map(str, a))), **how)
    return read_table(Path(folder) / "scans.tsv"), "\n".join(said)


@pytest.mark.parametrize(
    ("path", "found"),
    {
        "sub-07_ses-2": ("07", "2", None),
        "sub-07": ("07", "", None),
        "sub-07/ses-2/scan": ("07", "2", None),
        "sub-07/ses-2/sub-07_ses-2_hemi-L": ("07", "2", "left"),
        "sub-07-ses-2": ("07", "2", None),
        "anna/visit1": ("anna", "visit1", None),
        "visit1/anna": ("anna", "visit1", None),
        "anna/2020-01-31/DICOM": ("anna", "2020-01-31", None),
        "controls/anna/radius_L": ("anna", "controls", "left"),
        "anna_v1": ("anna", "v1", None),
        "anna_1": ("anna", "1", None),
        "P001_T12": ("P001", "T12", None),
        "07/1": ("07", "1", None),
        "7_v2": ("7", "v2", None),
        "case_01_2": ("case_01", "2", None),
        "A/1": ("A", "1", None),
        "scan1": ("scan1", "", None),
        "007": ("007", "", None),
    }.items(),
)
def test_patient_visit_and_side_are_read_from_the_path(path, found):
    assert tuple(identity.who(tuple(path.split("/"))))[:3] == found


@pytest.mark.parametrize(
    "path",
    ["sub-case_1_ses-2", "sub-x_1", "1/2", "1/07", "1_2", "T1_v1", "M12", "left", "sub-01/sub-02_ses-1", "anna_L/r"],
)
def test_a_path_that_does_not_tell_the_patient_is_refused(path):
    with pytest.raises(InputError, match="patient|must name one"):
        identity.who(tuple(path.split("/")))


def test_folders_and_files_that_could_both_be_patients_are_refused(tmp_path):
    for i, path in enumerate(("left_arm_study/anna", "left_arm_study/bert", "second/anna", "second/bert")):
        nii(tmp_path / f"s/{path.replace('left_arm_study', 'first')}.nii", bone(i))
    with pytest.raises(InputError, match="'anna' lies in the folders of first, second.*scans.tsv"):
        listed(tmp_path / "s")
    for i in range(8):
        nii(tmp_path / f"t/P{i}/distal_hr.nii", bone(i))
    assert len({row["patient"] for row in listed(tmp_path / "t").rows}) == 8


@pytest.mark.parametrize("ids", [("007", "7"), ("AB12", "ab12"), ("P-3", "P_03"), ("7", "7.0")])
def test_names_that_mean_the_same_are_two_patients_only_if_participants_says_so(tmp_path, ids):
    for i in (0, 1):
        nii(tmp_path / f"s/{i}.nii", bone(i))
    rows = "".join(f"{i}.nii\t{name}\n" for i, name in enumerate(ids))
    (tmp_path / "s/scans.tsv").write_text("file\tpatient\n" + rows, encoding="utf-8")
    with pytest.raises(InputError, match=f"'{ids[0]}' and '{ids[1]}'"):
        listed(tmp_path / "s")
    (tmp_path / "s/participants.csv").write_text("Participant ID;Sex\n" + "".join(f"{n};f\n" for n in ids))
    found = listed(tmp_path / "s")
    assert {row["patient"] for row in found.rows} == set(ids) and found.people[ids[0]] == {"sex": "F"}


TABLES = {
    "csv": ("scans.csv", "file,patient,grade\na.nii,anna,3.0\nb.nii,anna,n/a\n", None),
    "semicolons and a BOM": ("Scans.csv", "\ufeffFile; Patient ;Grade\na.nii;anna;3\nb.nii; anna;\n", None),
    "empty rows": ("scans.tsv", "file\tpatient\r\na.nii\tanna\r\n\t\r\n\r\nb.nii\tanna\r\n", None),
    "quotes": ("scans.tsv", 'file\tpatient\na.nii\t"anna\nb.nii\t"anna\n', None),
    "dots and slashes": ("scans.tsv", "file\tpatient\n./a.nii\tanna\n.\\b.nii\tanna\n", None),
    "not listed": ("scans.tsv", "file\tpatient\na.nii\tanna\n", "1 scans are not listed and left out: b.nii"),
    "other columns": ("scans.tsv", "file\tpatient\tnote\na.nii\tanna\tx\nb.nii\tanna\t\n", "not used: note"),
    "grades": ("scans.tsv", "file\tpatient\tgrades\na.nii\tanna\t3\n", InputError("'grades'.* mean 'grade'")),
    "motion grade": ("scans.tsv", "file\tpatient\tMotion grade\na.nii\tanna\t3\n", InputError("mean 'grade'")),
    "short row": ("scans.tsv", "file\tpatient\na.nii\tanna\nb.nii\n", InputError(r"row 3 \(b.nii\) has 1 cells")),
    "long row": ("scans.tsv", "file\tpatient\na.nii\tanna\tx\n", InputError("row 2 .*has 3 cells")),
    "no patient": ("scans.tsv", "file\tpatient\na.nii\t\n", InputError("'a.nii' has no patient")),
    "no such file": ("scans.tsv", "file\tpatient\nc.nii\tanna\n", InputError("c.nii: no such file")),
    "twice": ("scans.tsv", "file\tpatient\na.nii\tanna\n./a.nii\tbert\n", InputError("listed twice for patients")),
    "half a grade": ("scans.tsv", "file\tpatient\tgrade\na.nii\tanna\t3.5\n", InputError("grade '3.5'")),
    "latin 1": ("scans.tsv", "file\tpatient\na.nii\tM\xfcller\n".encode("latin-1"), InputError("not UTF-8")),
    "spreadsheet": ("scans.xlsx", b"PK", InputError("save it as scans.csv")),
    "two tables": ("scans.txt", "file\tpatient\na.nii\tanna\n", InputError("both scans.tsv and scans.txt")),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read_as_people_write_them(tmp_path, name):
    file, text, says = TABLES[name]
    for n in "ab":
        nii(tmp_path / f"{n}.nii", bone(ord(n)))
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    if name == "two tables":
        (tmp_path / "scans.tsv").write_text("file\tpatient\na.nii\tanna\n")
    if isinstance(says, InputError):
        with pytest.raises(InputError, match=str(says)) as error:
            listed(tmp_path)
        assert "\n" not in str(error.value)
        return
    found = listed(tmp_path)
    assert len({row["patient"] for row in found.rows}) == 1 and len(found.rows) == (
        1 if says and "listed" in says else 2
    )
    assert (says or "") in summary(found)
    if "grade" in str(text).lower():
        assert [row["grade"] for row in found.rows] == ["3", ""]


def test_participants_that_match_no_scan_are_told(tmp_path):
    nii(tmp_path / "sub-07_ses-1.nii", bone())
    nii(tmp_path / "sub-08_ses-1.nii", bone(1))
    (tmp_path / "participants.tsv").write_text("patient\tSex\tage\n7\tF\t61\n99\tM\tn/a\n")
    found = listed(tmp_path)
    assert found.people == {"07": {"sex": "F", "age": "61"}}
    says = summary(found)
    assert "'7' is taken for patient '07'" in says and "1 match no scan: '99'" in says and "'08'" in says
    (tmp_path / "participants.tsv").write_text("patient\tage\n7\told\n")
    with pytest.raises(InputError, match="age 'old' of 7"):
        listed(tmp_path)


@pytest.mark.parametrize("way", ["copied", "linked", "another format", "another orientation"])
def test_one_scan_under_two_patients_is_refused(tmp_path, way):
    first, second = nii(tmp_path / "s/sub-01.nii.gz", bone(1)), tmp_path / "s/sub-02.nii.gz"
    if way == "copied":
        shutil.copy(first, second)
    elif way == "linked":
        os.symlink(first, second)
    elif way == "another format":
        image = nib.load(first)
        nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32), image.affine), second.with_suffix(""))
    else:
        image = nib.load(first)
        nib.save(image.as_reoriented([[2, -1], [0, 1], [1, 1]]), second)
    with pytest.raises(InputError, match="sub-02.nii.*same voxels as sub-01.nii.gz, but of '02'"):
        brought_in(tmp_path / "s", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_bone_of_another_site_is_refused(tmp_path):
    nii(tmp_path / "s/a.nii", bone())
    (tmp_path / "s/scans.tsv").write_text("file\tpatient\tsite\na.nii\tanna\ttibia\n")
    with pytest.raises(InputError, match="a.nii: the bone is tibia, .* set cohort.site to tibia"):
        brought_in(tmp_path / "s", tmp_path / "o")
    assert brought_in(tmp_path / "s", tmp_path / "o", site="tibia")[0][0]["site"] == "tibia"


HU = np.where(bone() < -80, -1000, (bone() + 398.609) / 1662.524 / 0.2366 * 1000 - 1000)
IMPLAUSIBLE = {
    "HU": (HU, "dense bone has 2[0-9]{3}; accepted are 500 to 1400"),
    "native": ((bone() + 398.609) / 1662.524 * 8192, "dense bone has [2-6]"),
    "g/cm3": (bone() / 1000, "whole values"),
    "[0, 1]": (((bone() + 500) / 2000).clip(0, 1), "whole values, from 0"),
    "8 bits": (((bone() + 300) / 8).clip(0, 255), "nothing in it is as dense as bone"),
    "shifted": (bone() + 400, "what is not bone|nothing|dense bone has"),
}


@pytest.mark.parametrize("name", IMPLAUSIBLE)
def test_numbers_that_cannot_be_densities_are_refused(tmp_path, name):
    voxels, says = IMPLAUSIBLE[name]
    nii(tmp_path / "s/a.nii", voxels.astype(np.float32))
    with pytest.raises(InputError, match=f"a.nii: as mg HA/cm3, .*({says})"):
        brought_in(tmp_path / "s", tmp_path / "o")


def test_an_upside_down_bone_is_refused_or_turned(tmp_path):
    right = bone(1, (24, 44, 40), narrowing=0.3)
    nii(tmp_path / "s/a.nii", right)
    assert "does not tell" not in brought_in(tmp_path / "s", tmp_path / "o")[1]
    good = read_volume(tmp_path / "o/scans/sub-001_scan-001.nii.gz", unit="mgHA").voxels
    nii(tmp_path / "s/a.nii", right[::-1, :, ::-1])
    with pytest.raises(InputError, match="a.nii: the bone is wider .* column distal"):
        brought_in(tmp_path / "s", tmp_path / "o")
    (tmp_path / "s/scans.tsv").write_text("file\tpatient\tdistal\na.nii\tanna\tlast\n")
    brought_in(tmp_path / "s", tmp_path / "o")
    assert np.array_equal(read_volume(tmp_path / "o/scans/sub-001_scan-001.nii.gz", unit="mgHA").voxels, good)
    nii(tmp_path / "t/b.nii", bone(1))
    assert "does not tell which end of z is distal" in brought_in(tmp_path / "t", tmp_path / "o")[1]
    nii(tmp_path / "u/c.nii", np.tile(bone(3, (1, 44, 40)), (30, 1, 1)).transpose(1, 0, 2))
    with pytest.raises(InputError, match="c.nii: the bone runs along y"):
        brought_in(tmp_path / "u", tmp_path / "o")


def flagged(name):
    y, x = np.indices((100, 90))
    voxels = bone(1, (6, 100, 90), 24).astype(np.int32)
    if name == "cut":
        return voxels[:, :, 30:]
    if name == "cast":
        return np.where((np.hypot(y - 50, x - 45) > 36) & (np.hypot(y - 50, x - 45) < 42), 600, voxels)
    return np.where((abs(y - 24) < 3) & (abs(x - 45) < 12), 8000, voxels)


@pytest.mark.parametrize("name", plausibility.FLAGS)
def test_what_hides_the_bone_is_flagged_and_left_out_of_training(tmp_path, name):
    nii(tmp_path / "s/sub-0.nii", flagged(name).astype(np.int16))
    for i in range(1, 5):
        nii(tmp_path / f"s/sub-{i}.nii", bone(i, (6, 100, 90), 24))
    rows, said = brought_in(tmp_path / "s", tmp_path / "o")
    assert [row["flags"] for row in rows] == [name, "", "", "", ""]
    assert f"sub-0.nii: {plausibility.FLAGS[name]}; left out of training" in said
    how = Preprocess(shape=(6, 36, 28), **HOW)
    with pytest.raises(InputError, match="cuts off .* of the bone, at most 2%"):
        preprocess(read_volume(tmp_path / "o" / rows[1]["file"], unit="mgHA"), how)


def test_the_crop_is_centred_on_the_bone_and_flags_are_in_no_split(tmp_path):
    wide = [bone(i, (6, 72, 70), 9, middle=(50 if i else 14, 52)) for i in range(5)]
    for i, voxels in enumerate(wide):
        nii(tmp_path / f"s/sub-{i}.nii", voxels)
    brought_in(tmp_path / "s", tmp_path / "o")
    text = (tmp_path / "o/scans.tsv").read_text().splitlines()
    (tmp_path / "o/scans.tsv").write_text("\n".join([*text[:-1], text[-1] + "cut"]) + "\n")
    how = Preprocess(shape=(6, 36, 28), **HOW)
    starts, cut = place(Volume(wide[1].astype(np.float32), (MM,) * 3), how.shape)
    assert cut == 0 and abs(starts[1] + 18 - 50) <= 1 and abs(starts[2] + 14 - 52) <= 1
    preprocess_cohort(tmp_path / "o", tmp_path / "stacks", how, MM, 1, **QUIET)
    stacks = load_stacks(tmp_path / "stacks")
    assert [r["scan"] for r in stacks.rows if r["split"] == "left out"] == ["sub-005_scan-005"] * 2
    assert {len(stacks.of(split)) for split in ("train", "held-out")} == {4}


def test_masks_and_traits_of_the_users_own_are_used(tmp_path):
    y, x = np.indices((36, 28))
    r = np.hypot(y - 18, x - 14)
    for i in range(4):
        voxels = bone(i, (6, 36, 28), 11)
        nii(tmp_path / f"s/sub-{i}_ses-1.nii", voxels)
        masks = {"TRAB_MASK": r < 6, "CORT_MASK": (r >= 6) & (r < 9), "SEG": voxels[0] > 320}
        for name, mask in masks.items():
            nii(tmp_path / f"s/sub-{i}_ses-1_{name}.nii", np.tile(mask, (6, 1, 1)).astype(np.uint8) * 127)
    nii(tmp_path / "s/sub-9_ses-1_trab.nii", np.tile(r < 6, (6, 1, 1)).astype(np.uint8))
    (tmp_path / "s/attributes.tsv").write_text("file\tTb.BMD\tCt.Th\nsub-0_ses-1.nii\t123.5\t\n")
    rows, said = brought_in(tmp_path / "s", tmp_path / "o")
    assert len(rows) == 4 and "sub-9_ses-1_trab.nii: holds two values" in said and "SEG.nii: taken for a mask" in said
    preprocess_cohort(tmp_path / "o", tmp_path / "k", Preprocess(shape=(6, 36, 28), **HOW), MM, 1, **QUIET)
    labels = np.load(tmp_path / "k/contours.npy")
    assert labels.shape == (4, 6, 36, 28) and np.array_equal(labels[0, 3] == 2, r < 6)
    found = attributes._measured(1, tmp_path / "k/volumes.npy", [MM] * 3, (-500, 1500))
    assert found["Tt.Ar"] == pytest.approx((r < 9).sum() * MM**2)
    stacks = load_stacks(tmp_path / "k")
    table = attributes.measure_scans(stacks, tmp_path / "k", path=tmp_path / "a.csv", own=tmp_path / "o/attributes.tsv")
    assert table[0]["Tb.BMD"] == 123.5 and table[1]["Tb.BMD"] != 123.5 and table[0]["Ct.Th"] > 0


def test_files_that_are_no_scans_are_passed_over_and_counted(tmp_path):
    nii(tmp_path / "s/sub-07_ses-1.nii.gz", bone(1))
    (tmp_path / "s/._sub-07_ses-1.nii.gz").write_bytes(bytes(4000))
    (tmp_path / "s/.cache").mkdir()
    (tmp_path / "s/sub-07_ses-1.json").write_text("{}")
    (tmp_path / "s/link").symlink_to(tmp_path / "s")
    found = listed(tmp_path / "s")
    assert len(found.rows) == 1 and "2 hidden" in summary(found)
    assert "not read: 1 .json, 1 folder that is a link to another one (link)" in summary(found)


def test_too_few_patients_and_a_wrong_source_are_told_at_once(tmp_path, monkeypatch, capsys):
    for i in range(5):
        nii(tmp_path / f"s/sub-{i}_ses-1.nii", bone(i))
    with pytest.raises(InputError, match="5 scans of 5 patients, but at least 6 patients"):
        import_scans(tmp_path / "s", tmp_path / "o", "mgHA", least=cohort.LEAST_PATIENTS, **QUIET)
    (tmp_path / "my.zip").touch()
    for source, says in ((tmp_path / "my.zip", "is a file"), (tmp_path / "none", "is not there")):
        with pytest.raises(InputError, match=f"cohort.source: .* {says}"):
            cohort.check_source(str(source))
    assert not cohort.check_source(cohort.PHANTOM)
    monkeypatch.setattr(sys, "argv", ["cohort", str(tmp_path / "s"), "--dry-run"])
    assert cohort.main() == 0 and "5 scans of 5 patients" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my.zip", "s"]


CASES = Path(__file__).parents[2] / "shared/cases"


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases of other people's folders are not here")
@pytest.mark.parametrize("name", ["one_scan_under_two_patients", "mask_beside_the_scan", "scans_csv_is_ignored"])
def test_cases_that_people_have_reported_pass(name):
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, CASES / f"{name}.py"], env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_bone_too_large_for_the_shape_is_left_out_and_many_are_refused(tmp_path):
    sizes = [9] * 11 + [20]
    for i, radius in enumerate(sizes):
        nii(tmp_path / f"s/sub-{i:02}.nii", bone(i, (6, 72, 70), radius))
    brought_in(tmp_path / "s", tmp_path / "o")
    how, said = Preprocess(shape=(6, 36, 28), **HOW), []
    preprocess_cohort(tmp_path / "o", tmp_path / "stacks", how, MM, 1, say=lambda line, **_: said.append(line))
    rows = load_stacks(tmp_path / "stacks").rows
    assert len({r["scan"] for r in rows if r["split"] == "left out"}) == 1
    assert any("of the bone; left out of training" in line for line in said)
    for i in (0, 1):
        nii(tmp_path / f"s/sub-{i:02}.nii", bone(i, (6, 72, 70), 20))
    brought_in(tmp_path / "s", tmp_path / "p")
    with pytest.raises(InputError, match="cuts off .* and 3 of 12 scans have more; enlarge preprocess.shape"):
        preprocess_cohort(tmp_path / "p", tmp_path / "more", how, MM, 1, **QUIET)
