"""Reading, preprocessing and importing of scans; what bad input is answered with."""

import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from bonelib import InputError
from bonelib.scans import preprocessing as pre
from bonelib.scans.cohort import import_scans
from bonelib.scans.config import Preprocess
from bonelib.scans.dataset import load_stacks
from bonelib.scans.tables import read_table, write_table
from bonelib.scans.volumes import Volume, read_volume, regrid, write_volume

HOW = Preprocess(
    shape=(8, 36, 28),
    subsample=2,
    dct_clip=1000,
    stack_slices=2,
    stacks_per_scan=3,
    held_out=0.3,
    intensity=(-500, 1500),
)


def some_volume(shape=(8, 30, 40), spacing=(0.2, 0.1, 0.05)):
    voxels = np.round(np.random.default_rng(0).normal(0, 100, shape)).astype(np.float32)
    affine = np.diag([*spacing[::-1], 1.0])
    affine[:3, 3] = 3.0, -7.0, 1.5
    return Volume(voxels, spacing, "mgHA", affine)


def a_bone(seed=0, shape=(8, 36, 28), mm=0.2):
    """A cortical ring about marrow in soft tissue, mg HA/cm3, with noise of its own."""
    y, x = np.mgrid[: shape[1], : shape[2]]
    r = np.hypot(y - shape[1] / 2, x - shape[2] / 2)
    density = np.where(r < 11, np.where(r < 8, 120.0, 950.0), 0.0)
    voxels = np.round(density + np.random.default_rng(seed).normal(0, 60, shape)).astype(np.float32)
    return Volume(voxels, (mm,) * 3, "mgHA")


def test_round_trip_keeps_voxels_spacing_and_affine(tmp_path):
    volume = some_volume()
    back = read_volume(write_volume(volume, tmp_path / "a.nii.gz"), unit="mgHA")
    assert np.array_equal(back.voxels, volume.voxels)
    assert np.allclose(back.spacing, volume.spacing) and np.allclose(back.affine, volume.affine)
    assert nib.load(tmp_path / "a.nii.gz").shape == (40, 30, 8)  # x, y, z on disk


def place(volume, index):
    """Where voxel `index` (z, y, x) lies in mm."""
    return (volume.affine @ [*index[::-1], 1])[:3]


def test_regridding_moves_the_affine_with_the_voxels():
    volume = some_volume()
    part = regrid(volume, volume.voxels[2:, 5:, 7:], (2, 5, 7))
    assert np.allclose(place(part, (0, 0, 0)), place(volume, (2, 5, 7)))
    halved = pre.subsample(volume, 2)
    assert np.allclose(place(halved, (1, 1, 1)), (place(volume, (2, 2, 2)) + place(volume, (3, 3, 3))) / 2)
    assert np.allclose(halved.spacing, np.multiply(volume.spacing, 2))
    assert halved.voxels.mean() == pytest.approx(volume.voxels.mean(), abs=1e-4)


def test_crop_and_mirror_pad():
    volume = some_volume((8, 30, 40))
    padded, mask = pre.crop_or_mirror_pad(volume, (8, 36, 28))
    assert padded.shape == (8, 36, 28)
    assert mask[:, :3].all() and mask[:, 33:].all() and not mask[:, 3:33].any()
    assert np.array_equal(padded.voxels[:, 3:33], volume.voxels[:, :, 6:34])
    assert np.array_equal(padded.voxels[:, 2], padded.voxels[:, 3]) and np.array_equal(
        padded.voxels[:, 0], padded.voxels[:, 5]
    )
    assert np.allclose(place(padded, (0, 3, 0)), place(volume, (0, 0, 6)))


def test_dct_noise_keeps_noise_and_takes_bone_away():
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 100, (16, 60, 60)).astype(np.float32)
    bone = noise.copy()
    bone[:, 20:40, 20:40] += 900
    result = pre.dct_noise(bone, 250)
    assert result[:, 20:40, 20:40].mean() < 0.25 * 900
    assert result[:, :15].std() == pytest.approx(100, rel=0.2)
    assert np.allclose(pre.dct_noise(noise, 1e9), noise, atol=1e-2)


def test_dct_threshold_follows_the_voxel_size():
    assert pre.clip_for(0.0607, 1000) == pytest.approx(1000)
    assert pre.clip_for(0.1214, 1000) == pytest.approx(1000 / 8**0.5)


@pytest.mark.parametrize(("slices", "depth", "count"), [(84, 32, 4), (42, 16, 4), (21, 8, 3), (16, 16, 1)])
def test_stacks_cover_all_slices_and_overlap(slices, depth, count):
    starts = pre.slice_stacks(slices, depth, count)
    assert starts[0] == 0 and starts[-1] + depth == slices and len(starts) == count
    assert all(b - a <= depth for a, b in zip(starts, starts[1:], strict=False))


def test_intensity_map_is_invertible():
    density = np.linspace(-500, 1500, 9)
    assert np.allclose(pre.to_density(pre.to_unit(density, (-500, 1500)), (-500, 1500)), density)


def test_no_patient_is_on_both_sides():
    split = pre.split_patients([f"p{i % 20}" for i in range(100)], 0.1, seed=1)
    assert sum(v == "held-out" for v in split.values()) == 2
    assert split == pre.split_patients([f"p{i}" for i in reversed(range(20))], 0.1, seed=1)


@pytest.fixture
def own_scans(tmp_path):
    folder = tmp_path / "mine"
    for i, patient in enumerate(("anna", "bert", "cleo", "dora")):
        for visit in (1, 2):
            write_volume(a_bone(2 * i + visit), folder / f"sub-{patient}_ses-{visit}.nii.gz")
    return folder


def test_own_scans_go_through_import_and_preprocessing(own_scans, tmp_path):
    image = nib.load(own_scans / "sub-anna_ses-1.nii.gz")
    image.header["descrip"] = b"Anna Somebody 1950-01-01"
    nib.save(image, own_scans / "sub-anna_ses-1.nii.gz")
    write_table(own_scans / "participants.tsv", [dict(patient="anna", sex="F", age=70)])
    import_scans(own_scans, tmp_path / "cohort", "mgHA")
    scans = read_table(tmp_path / "cohort/scans.tsv")
    assert [s["patient"] for s in scans] == [f"sub-{i:03d}" for i in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert read_table(tmp_path / "cohort/participants.tsv")[0] == dict(sex="F", age="70", patient="sub-001")
    for scan in scans:
        assert b"Somebody" not in bytes(nib.load(tmp_path / "cohort" / scan["file"]).header["descrip"])
    meta = pre.preprocess_cohort(tmp_path / "cohort", tmp_path / "stacks", HOW, 0.2, seed=1, say=lambda *a, **k: None)
    stacks = load_stacks(tmp_path / "stacks")
    assert meta["shape"] == [2, 18, 14] and stacks.volumes.shape == (8, 4, 18, 14) and len(stacks.rows) == 24
    patients = {split: {r["patient"] for r in stacks.of(split)} for split in ("train", "held-out")}
    assert not patients["train"] & patients["held-out"] and len(patients["held-out"]) == 2


def test_motion_grades_4_and_5_are_left_out(own_scans, tmp_path):
    rows = [
        dict(file=p.name, patient=p.name[4:8], grade=5 if i == 0 else "")
        for i, p in enumerate(sorted(own_scans.glob("*.gz")))
    ]
    write_table(own_scans / "scans.tsv", rows)
    import_scans(own_scans, tmp_path / "cohort", "mgHA")
    pre.preprocess_cohort(tmp_path / "cohort", tmp_path / "stacks", HOW, 0.2, seed=1, say=lambda *a, **k: None)
    every = load_stacks(tmp_path / "stacks")
    scans = sorted({r["scan"] for r in every.rows})
    assert len(scans) == 8 and {r["grade"] for r in every.rows if r["scan"] == scans[0]} == {"5"}
    write_table(
        tmp_path / "grades.csv", [dict(scan=s, grade={0: "5", 1: "4", 2: "3"}.get(i, "")) for i, s in enumerate(scans)]
    )
    kept = load_stacks(tmp_path / "stacks", tmp_path / "grades.csv")
    assert {r["scan"] for r in kept.rows} == set(scans[2:])
    assert kept.meta["data_hash"] != every.meta["data_hash"]  # training on other scans is another training
    write_table(tmp_path / "grades.csv", [dict(scan=s, grade="4") for s in scans])
    with pytest.raises(InputError, match="grades.csv: every scan"):
        load_stacks(tmp_path / "stacks", tmp_path / "grades.csv")


def broken(path, kind):
    image = nib.load(path)
    data, header = np.asarray(image.dataobj).astype(np.float32), image.header
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut off":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "checksum":
        content = bytearray(path.read_bytes())
        content[-6] ^= 0xFF
        path.write_bytes(content)
    elif kind == "nan":
        data[3, 4, 5] = np.nan
        nib.save(nib.Nifti1Image(data, image.affine), path)
    elif kind == "flat":
        nib.save(nib.Nifti1Image(data[0], image.affine), path)
    elif kind == "spacing":
        nib.save(nib.Nifti1Image(data, np.diag([60.7, 60.7, 60.7, 1])), path)
    elif kind == "small":
        nib.save(nib.Nifti1Image(data, image.affine, header).slicer[:, :, :1], path)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "no such file"),
        ("empty", "not a readable"),
        ("cut off", "not a readable"),
        ("checksum", "not a readable"),
        ("nan", "1 of 8064 voxels are NaN"),
        ("flat", "three axes"),
        ("spacing", "outside of 0.01-2.0 mm"),
    ],
)
def test_a_bad_scan_is_named_in_one_sentence(own_scans, kind, says, tmp_path):
    bad = own_scans / "sub-bert_ses-2.nii.gz"
    rows = [dict(file=p.name, patient=p.name[4:8]) for p in sorted(own_scans.glob("*.gz"))]
    write_table(own_scans / "scans.tsv", rows)
    broken(bad, kind)
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort/earlier").touch()
    with pytest.raises(InputError, match=says) as error:
        import_scans(own_scans, tmp_path / "cohort", "mgHA")
    assert str(bad) in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in (tmp_path / "cohort").iterdir()] == ["earlier"]
    assert not list(tmp_path.glob(".part*"))


def test_a_scan_that_is_too_small_is_named(own_scans, tmp_path):
    broken(own_scans / "sub-bert_ses-2.nii.gz", "small")
    import_scans(own_scans, tmp_path / "cohort", "mgHA")
    with pytest.raises(InputError, match=r"sub-002_scan-004.nii.gz: a scan of \(1, 36, 28\) voxels is too small"):
        pre.preprocess_cohort(tmp_path / "cohort", tmp_path / "stacks", HOW, 0.2, seed=1, say=lambda *a, **k: None)


def test_a_scan_of_another_voxel_size_is_named(own_scans, tmp_path):
    other = replace(a_bone(), spacing=(0.2, 0.2, 0.3), affine=np.diag([0.3, 0.2, 0.2, 1]))
    write_volume(other, own_scans / "sub-bert_ses-2.nii.gz")
    import_scans(own_scans, tmp_path / "cohort", "mgHA")
    with pytest.raises(InputError, match=r"scan-004.nii.gz: voxels of 0.2000 x 0.2000 x 0.3000 mm, .* voxel_mm 0.2"):
        pre.preprocess_cohort(tmp_path / "cohort", tmp_path / "stacks", HOW, 0.2, seed=1, say=lambda *a, **k: None)


def test_units_are_never_guessed(own_scans):
    with pytest.raises(InputError, match="accepted are mgHA"):
        read_volume(own_scans / "sub-anna_ses-1.nii.gz")
    with pytest.raises(InputError, match="unit 'grams' is not known"):
        Volume(np.zeros((2, 2, 2)), (1, 1, 1), "grams")


def test_a_folder_without_scans_is_refused(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no scans found"):
        import_scans(tmp_path / "none", tmp_path / "cohort", "mgHA")
    assert not (tmp_path / "cohort").exists()


def test_genuine_crop_is_read_and_measured(request):
    crop = request.config.rootpath.parent / "shared/data/trab_1237_mgHAccm.nii.gz"
    if not crop.exists():
        pytest.skip("the genuine scanner crop is not here")
    from bonelib.evaluation.morphometry import measure

    volume = read_volume(crop, unit="mgHA")
    assert volume.shape == (49, 58, 108) and volume.spacing == pytest.approx((0.0607,) * 3, abs=1e-4)
    found = measure(volume, compartments="trabecular")
    assert found["Tb.BMD"] == pytest.approx(112.1, abs=0.1) and found["BV/TV"] == pytest.approx(0.125, abs=0.005)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory as Linux counts it")
def test_a_full_size_scan_is_preprocessed_in_little_memory():
    code = """
import resource
import numpy as np
from bonelib.scans.config import Preprocess
from bonelib.scans.preprocessing import preprocess
from bonelib.scans.volumes import Volume
how = Preprocess(shape=(168, 576, 448), subsample=2, dct_clip=1000, stack_slices=32, stacks_per_scan=4,
                 held_out=0.1, intensity=(-500, 1500))
voxels = np.random.default_rng(0).normal(0, 105, (168, 560, 470)).astype(np.float32)
print(preprocess(Volume(voxels, (0.0607,) * 3), how).shape, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shape, peak = done.stdout.rsplit(" ", 1)
    assert shape == "(84, 288, 224)" and float(peak) < 1.8  # GiB; two workers stay under 4
