"""Kinds of folders, tables and files that people describe in bug reports of imaging tools: the right cohort, or one
sentence. Each kind names the report that it follows, where there is one."""

import gzip
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from test_cohort import MM, bone, brought_in, nii
from test_volumes import XCT2, convert, write_dicom

from bonelib import InputError
from bonelib.scans import identity
from bonelib.scans.cohort import import_scans
from bonelib.scans.listing import listed, summary
from bonelib.scans.tables import read_table
from bonelib.scans.volumes import Volume, read_volume

UNSURE = "scans.tsv"  # what every refusal to guess names
NAMES = {  # files: patients, or what the refusal says
    "a code, a hyphen and a number": (["BE-07", "BE-08"], "could be the patient or a visit"),
    "a code and a number, with visits": (["BE-07_V1", "BE-07_V2", "BE-08_V1"], {"BE-07", "BE-08"}),
    "a code in a folder of a visit": (["V1/BE_07", "V2/BE_07", "V1/BE_08"], {"BE_07", "BE_08"}),
    "with and without a hyphen": (["BE-07_V1", "BE07_V2"], "'BE-07' and 'BE07' differ"),
    "with and without a space": (["AB 12_v1", "AB12_v2"], "'AB 12' and 'AB12' differ"),
    "sub- and subject": (["sub-007_ses-1", "subject7_v2"], "'007' and 'subject7' differ"),  # mne-bids#1065
    "an invisible character": (["P001", "P001\u200b_v2"], {"P001"}),
    "a dash for a hyphen": (["P-001_v1", "P\u2013001_v2"], {"P-001"}),
    "sides as a last letter": (["1012L", "1012R"], "last letter could be a patient, a side or a visit"),
    "visits as a last letter": (["P01a", "P01b", "P02a"], "last letter could be a patient, a side or a visit"),
    "copies that a system named": (["P001_v1", "P001_v1 - Copy", "P001_v1 (1)"], {"P001"}),  # dcm2niix#837
    "one name in two centres": (["center1/P01", "center2/P01"], "in 'center1' and 'center2'"),
    "one BIDS name in two groups": (["controls/sub-01", "cases/sub-01"], "in 'cases' and 'controls'"),
    "other names in two centres": (["center1/P01", "center2/P02"], {"P01", "P02"}),
    "measurements of a Scanco archive": (["00001234/00005678/C0001111", "00001234/00005679/C0001112"], {"00001234"}),
    "BIDS with a data type": (["sub-01/ses-1/anat/sub-01_ses-1_ct", "sub-02/anat/sub-02_ct"], {"01", "02"}),
    "dates of two notations": (["anna_20200131", "anna_31.01.2021", "bert_2020-01-31"], {"anna", "bert"}),
    "sides of two languages": (["anna_links", "anna_right"], {"anna"}),
    "spaces about a folder": (["anna /v1", "anna/v2"], {"anna"}),
    "visits from the middle of a name": (["0042_XCTII_R_FU1", "0042_XCTII_R_FU2"], {"0042_XCTII"}),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files(tmp_path, name):
    files, expected = NAMES[name]
    for i, file in enumerate(files):
        nii(tmp_path / f"{file}.nii", bone(i))
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected) as error:
            listed(tmp_path)
        assert UNSURE in str(error.value) or "participants.tsv" in str(error.value)
    else:
        assert {row["patient"] for row in listed(tmp_path).rows} == expected


def table(name, text, encoding="utf-8"):
    return lambda folder: (folder / name).write_bytes(text.encode(encoding))


def links(folder):
    (folder / "c.nii").symlink_to(folder / "annex/object")


def derived(folder):
    (folder / "dataset_description.json").write_text("{}")
    nii(folder / "derivatives/smooth/a.nii", bone(5))


def labels(folder):
    nii(folder / "labelsTr/a.nii", np.arange(6 * 44 * 40).reshape(6, 44, 40).astype(np.int16) % 3)


def outputs(folder):
    shutil.copytree(folder, folder.parent / "x")
    (folder / "c.hdr").touch()
    (folder / "c.img").touch()


KINDS = {  # what is added to two scans, a.nii of anna and b.nii of bert: patients, or what is said or refused
    "only carriage returns": (table("scans.csv", "file,patient\ra.nii,anna\rb.nii,bert\r"), {"anna", "bert"}),
    "a spreadsheet's first line": (
        table("scans.csv", "sep=;\nfile;patient\na.nii;anna\nb.nii;bert\n"),
        {"anna", "bert"},
    ),
    "UTF-16 with a mark": (table("scans.tsv", "file\tpatient\na.nii\tM\xfc\nb.nii\tMu\n", "utf-16"), {"M\xfc", "Mu"}),
    "UTF-16 without a mark": (table("scans.tsv", "file\tpatient\na.nii\ta\n", "utf-16-le"), InputError("no text")),
    "Latin 1": (table("participants.csv", "patient;sex\nM\xfcller;F\n", "latin-1"), InputError("not UTF-8")),
    "only a first row": (table("scans.tsv", "file\tpatient\n"), InputError("lists no scan")),
    "an empty table": (table("scans.tsv", ""), InputError("lists no scan")),
    "spaces for tabs": (table("scans.tsv", "file patient\na.nii anna\n"), InputError("column 'file patient' is not")),
    "one patient in two rows": (  # legacy-validator#820
        table("participants.tsv", "participant_id\tage\na\t61\na\t63\nb\t50\n"),
        InputError("'a' is there twice, with other values"),
    ),
    "a row twice": (table("participants.tsv", "participant_id\tage\na\t61\na\t61\nb\t50\n"), {"a", "b"}),
    "ages above 89": (table("participants.tsv", "participant_id\tage\tsex\na\t89+\tother\nb\tn/a\tF\n"), {"a", "b"}),
    "a file listed in two ways": (
        table("scans.tsv", "file\tpatient\na.nii\tanna\nx/../a.nii\tbert\n"),
        InputError("twice"),
    ),
    "a listed slice or folder": (table("scans.tsv", "file\tpatient\n.\tanna\nb.nii\tbert\n"), {"anna", "bert"}),
    "numbers in two parts": (table("scans.tsv", "file\tpatient\na.nii\t1-2\nb.nii\t12\n"), {"1-2", "12"}),
    "a link to nothing": (links, "not read: 1 links to nothing"),  # datalad#6973
    "BIDS derivatives": (derived, "1 BIDS folder derivatives"),
    "labels in a folder of their own": (labels, "masks of no scan, left out: 1"),  # nnUNet
    "pairs of header and image": (outputs, "not read: 1 .hdr, 1 .img"),  # niivue#1430
}


@pytest.mark.parametrize("name", KINDS)
def test_tables_and_folders(tmp_path, name):
    make, expected = KINDS[name]
    folder = tmp_path / "s"
    for i, file in enumerate("ab"):
        nii(folder / f"{file}.nii", bone(i))
    make(folder)
    if isinstance(expected, InputError):
        with pytest.raises(InputError, match=str(expected)) as error:
            listed(folder)
        assert "\n" not in str(error.value)
        return
    found = listed(folder)
    if isinstance(expected, str):
        assert expected in summary(found) and len(found.rows) == 2
    else:
        assert {row["patient"] for row in found.rows} == expected
        if (folder / "participants.tsv").exists():
            assert set(found.people) == expected


def test_a_path_names_the_bone(tmp_path):
    for i, file in enumerate(("P01/radius/scan", "P01/tibia/scan", "P02_Radius_L", "P02_ankle")):
        nii(tmp_path / f"s/{file}.nii", bone(i))
    assert [row["site"] for row in listed(tmp_path / "s").rows] == ["radius", "tibia", "radius", "tibia"]
    with pytest.raises(InputError, match="scan.nii: the bone is tibia, but the cohort is of the radius"):
        brought_in(tmp_path / "s", tmp_path / "o")
    assert identity.site_of(("radius_and_tibia", "P01")) == ""


def test_masks_stay_with_the_scan_of_their_folder(tmp_path):
    for i, person in enumerate(("anna", "bert")):
        nii(tmp_path / f"s/{person}/scan.nii", bone(i))
    for kind in ("TRAB", "CORT"):
        nii(tmp_path / f"s/anna/scan_{kind}_MASK.nii", np.ones((6, 44, 40), np.uint8))
    nii(tmp_path / "s/masks/scan_TRAB_MASK.nii", np.ones((6, 44, 40), np.uint8))
    found = listed(tmp_path / "s")
    assert {file: len(paths) for file, paths in found.masks.items()} == {"anna/scan.nii": 2}
    assert "masks of no scan, left out: 1" in summary(found)
    nii(tmp_path / "t/sub-7.nii", bone())
    nii(tmp_path / "t/masks/sub-7_TRAB_MASK.nii", np.ones((6, 44, 40), np.uint8))
    assert set(listed(tmp_path / "t").masks) == {"sub-7.nii"}


@pytest.mark.parametrize("way", ["another unit", "floats", "compressed"])
def test_one_scan_in_another_form_under_two_patients(tmp_path, way):
    nii(tmp_path / "s/sub-01.nii", bone(1))
    if way == "another unit":  # DICOM in HU, whose whole numbers are other ones
        known = Volume(bone(1)[:, ::-1, ::-1].astype(np.float32), (MM,) * 3, calibration=XCT2)
        voxels = np.rint(convert(known, "HU").voxels).astype(np.int16)
        write_dicom(tmp_path / "s/sub-02", voxels, PixelSpacing=[MM, MM])
        for k, file in enumerate(sorted((tmp_path / "s/sub-02").iterdir())):
            _placed(file, k * MM)
    elif way == "floats":
        nii(tmp_path / "s/sub-02.nii.gz", bone(1) + np.float32(0.2))
    else:
        (tmp_path / "s/sub-02.nii.gz").write_bytes(gzip.compress((tmp_path / "s/sub-01.nii").read_bytes()))
    with pytest.raises(InputError, match="sub-02.*same voxels as sub-01.nii, but of '02'"):
        import_scans(tmp_path / "s", tmp_path / "o", "mgHA", calibration=XCT2, say=lambda *a, **k: None)


def _placed(file, z):
    import pydicom

    data = pydicom.dcmread(file)
    data.ImagePositionPatient = [0, 0, z]
    data.save_as(file)


def test_files_of_one_person_by_their_headers_are_not_two_patients(tmp_path):
    for k, (person, number) in enumerate({"anna": "1", "bert": "1", "carl": "2"}.items()):
        write_dicom(tmp_path / f"s/{person}", bone(k), PixelSpacing=[MM, MM], PatientID=number, RescaleType="mgHA")
    how = dict(say=lambda *a, **k: None)
    with pytest.raises(InputError, match="anna and bert have one patient's number in their headers"):
        import_scans(tmp_path / "s", tmp_path / "o", **how)
    (tmp_path / "s/participants.tsv").write_text("patient\nanna\nbert\ncarl\n")
    import_scans(tmp_path / "s", tmp_path / "o", **how)
    assert len(read_table(tmp_path / "o/scans.tsv")) == 3
    (tmp_path / "s/participants.tsv").unlink()
    shutil.rmtree(tmp_path / "s/carl")
    import_scans(tmp_path / "s", tmp_path / "o", **how)  # a placeholder, the same in every file


def test_a_series_in_two_folders_is_refused(tmp_path):
    for name, z in (("anna/part1", 0), ("anna/part2", 6)):
        write_dicom(tmp_path / "s" / name, bone(z), PixelSpacing=[MM, MM], RescaleType="mgHA", SeriesInstanceUID="1.7")
        for k, file in enumerate(sorted((tmp_path / "s" / name).iterdir())):
            _placed(file, (z + k) * MM)
    with pytest.raises(InputError, match="part2: goes on the series of .*part1; put the slices .* into one folder"):
        brought_in(tmp_path / "s", tmp_path / "o")


def image(voxels, **fields):
    """A NIfTI image with other values in its header."""
    made = nib.Nifti1Image(voxels.T, np.diag([MM, MM, MM, 1.0]))
    for key, value in fields.items():
        made.header[key] = value
    return made


def in_units(scale, code):
    made = nib.Nifti1Image(bone().T, np.diag([MM * scale] * 3 + [1.0]))
    made.header.set_xyzt_units(code)
    return made


def raw(folder, made, name="a.nii", edit=None):
    """The bytes of an image as they are; nibabel would write its own slope."""
    content = bytearray(made.to_bytes())
    for at, value in (edit or {}).items():
        content[at : at + len(value)] = value
    (folder / name).write_bytes(content)
    return folder / name


def saved(make, name="a.nii"):
    return lambda folder: [nib.save(make(), folder / name), folder / name][1]


def nii2():
    return nib.Nifti2Image(bone().T, np.diag([MM, MM, MM, 1.0]))


def big_endian():
    header = nib.Nifti1Header(endianness=">")
    return nib.Nifti1Image(bone().T, np.diag([MM, MM, MM, 1.0]), header)


def colours():
    return np.zeros((6, 44, 40), [("R", "u1"), ("G", "u1"), ("B", "u1")])


SLOPE = 112  # where scl_slope and scl_inter are in a header
SAME = {  # forms of one bone that must give the same voxels
    "in micrometres": saved(lambda: in_units(1000, "micron")),  # ITK#4595
    "in metres": saved(lambda: in_units(1e-3, "meter")),
    "one frame of four axes": saved(lambda: nib.Nifti1Image(bone().T[..., None], np.diag([MM, MM, MM, 1.0]))),
    "another endianness": saved(big_endian),
    "version 2": saved(nii2),
    "capital letters": saved(lambda: image(bone()), "A.NII.GZ"),
    "slope 0": lambda f: raw(f, image(bone()), edit={SLOPE: np.float32([0, 0]).tobytes()}),  # LAYNII#88
    "slope NaN": lambda f: raw(f, image(bone()), edit={SLOPE: np.float32([np.nan, np.nan]).tobytes()}),
    "slope 2": lambda f: raw(f, image(bone() // 2 * 2 // 2), edit={SLOPE: np.float32([2, 0]).tobytes()}),
    "flipped on disk": saved(lambda: image(bone()).as_reoriented([[0, -1], [1, -1], [2, 1]])),
    "unsigned, with an offset": lambda f: raw(
        f, image((bone() + 500).astype(np.uint16)), edit={SLOPE: np.float32([1, -500]).tobytes()}
    ),
    "doubles": saved(lambda: image(bone().astype(np.float64))),
    "several gzip members": lambda f: [
        (f / "a.nii.gz").write_bytes(
            gzip.compress(image(bone()).to_bytes()[:999]) + gzip.compress(image(bone()).to_bytes()[999:])
        ),
        f / "a.nii.gz",
    ][1],
}


@pytest.mark.parametrize("name", SAME)
def test_nifti_of_any_form_is_the_same_bone(tmp_path, name):
    volume = read_volume(SAME[name](tmp_path), unit="mgHA")
    assert volume.spacing == pytest.approx((MM,) * 3, rel=1e-5)
    expected = bone() // 2 * 2 if name == "slope 2" else bone()
    assert np.array_equal(volume.voxels, expected)


def slice_of(name, edit):
    """A DICOM series, of which `edit` changes the folder."""

    def make(folder):
        write_dicom(folder / "d", bone(), PixelSpacing=[MM, MM])
        edit(folder / "d")
        return folder / "d"

    return make


def once_more(folder):  # monai-deploy-app-sdk#535
    shutil.copy(folder / "001.dcm", folder / "001(1).dcm")


def localizer(folder):
    write_dicom(folder / "x", bone(shape=(1, 20, 20), radius=5), SeriesInstanceUID="9", PixelSpacing=[1, 1])
    (folder / "x/000.dcm").rename(folder / "localizer.dcm")


WRONG = {
    "four frames": (
        saved(lambda: nib.Nifti1Image(np.stack([bone().T] * 4, -1), np.diag([MM, MM, MM, 1]))),
        "three axes",
    ),
    "one slice": (saved(lambda: nib.Nifti1Image(bone()[0].T, np.diag([MM, MM, MM, 1]))), "three axes"),
    "colours": (saved(lambda: nib.Nifti1Image(colours().T, np.diag([MM, MM, MM, 1]))), "one number a voxel"),
    "complex": (saved(lambda: image(bone().astype(np.complex64))), "one number a voxel"),
    "gz in name alone": (lambda f: raw(f, image(bone()), "a.nii.gz"), "not a readable NIfTI"),  # nibabel#898
    "gz without the name": (
        lambda f: [(f / "a.nii").write_bytes(gzip.compress(image(bone()).to_bytes())), f / "a.nii"][1],
        "not a readable NIfTI",
    ),
    "a pointer of Git LFS": (
        lambda f: [(f / "a.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\n"), f / "a.nii.gz"][1],
        "not a readable NIfTI",
    ),
    "zero bytes": (lambda f: [(f / "a.nii").touch(), f / "a.nii"][1], "not a readable NIfTI"),
    "wrong offset of the data": (
        lambda f: raw(f, image(bone()), edit={108: np.float32([9e6]).tobytes()}),
        "cut off|not a read",
    ),
    "metres that are millimetres": (saved(lambda: in_units(1, "meter")), "outside of 0.01-2.0 mm"),
    "a slice twice": (slice_of("twice", once_more), "there twice"),
    "a localizer among slices": (slice_of("localizer", localizer), "every series a folder of its own"),
    "a slice lost": (slice_of("lost", lambda f: (f / "003.dcm").unlink()), "one is missing"),
    "a slice of noise": (slice_of("noise", lambda f: (f / "003.dcm").write_bytes(bytes(500))), "not a readable DICOM"),
}


@pytest.mark.filterwarnings("ignore")  # of writing them
@pytest.mark.parametrize("name", WRONG)
def test_files_that_cannot_be_a_scan_are_named_in_one_sentence(tmp_path, name):
    make, says = WRONG[name]
    path = make(tmp_path)
    with pytest.raises(InputError, match=says) as error:
        read_volume(path, unit=None if Path(path).is_dir() else "mgHA")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


CONTENT = {
    "one byte that ran over": (bone().astype(np.int8).astype(np.int16), "dense"),
    "a field filled with -3024 HU": (np.where(np.indices((6, 44, 40))[2] < 8, -1200, bone()), "lowest values"),
    "constant": (np.full((6, 44, 40), 100), "whole value"),
    "no bone": (np.random.default_rng(0).normal(50, 40, (6, 44, 40)), "nothing in it is as dense as bone"),
}


@pytest.mark.parametrize("name", CONTENT)
def test_contents_that_are_no_bone_are_refused(tmp_path, name):
    voxels, says = CONTENT[name]
    nii(tmp_path / "s/a.nii", voxels.astype(np.int16))
    with pytest.raises(InputError, match=f"a.nii: as mg HA/cm3, .*({says})"):
        brought_in(tmp_path / "s", tmp_path / "o")
