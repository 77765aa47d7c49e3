"""Scanner files of every format: grid, unit, calibration and side as the header has them; what bad files are told."""

import gzip
import struct
import zlib

import nibabel as nib
import nrrd
import numpy as np
import py_aimio
import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

from bonelib import InputError
from bonelib.core.config import section
from bonelib.scans.cohort import import_scans
from bonelib.scans.config import Cohort
from bonelib.scans.tables import read_table, write_table
from bonelib.scans.volumes import (
    Calibration,
    Volume,
    convert,
    mirrored,
    oriented,
    read_volume,
    regrid,
    upside_down,
    write_volume,
)

XCT2 = Calibration(mu_scaling=8192, mu_water=0.2366, slope=1662.524, intercept=-398.609)
SHAPE, SPACING, ORIGIN = (4, 5, 6), (0.0607, 0.05, 0.04), (3.0, -7.0, 1.5)  # z y x, z y x, x y z
SPOT = (1, 3, 4)  # of the one bright voxel, which is in no symmetric place
QUIET = dict(say=lambda *a, **k: None)


def counts(shape=SHAPE):
    voxels = np.random.default_rng(0).integers(-300, 300, shape).astype(np.int16)
    voxels[SPOT] = 8000
    return voxels


def place(volume):
    """Where the brightest voxel lies, in mm to the right, to the front and up."""
    index = np.unravel_index(np.argmax(volume.voxels), volume.shape)
    return (volume.affine @ [*index[::-1], 1])[:3]


def expected(lps: bool):
    """Where the spot lies by ORIGIN and SPACING in a file whose axes are left, posterior, superior, or not."""
    x, y, z = np.add(ORIGIN, np.multiply(SPOT[::-1], SPACING[::-1]))
    return (-x, -y, z) if lps else (x, y, z)


def write_nifti(path, voxels):
    affine = np.diag([*SPACING[::-1], 1.0])
    affine[:3, 3] = ORIGIN
    nib.save(nib.Nifti1Image(voxels.T, affine), path)


def meta_header(voxels, **changes):
    fields = dict(
        ObjectType="Image",
        NDims=3,
        BinaryData="True",
        BinaryDataByteOrderMSB="False",
        CompressedData="False",
        TransformMatrix="1 0 0 0 1 0 0 0 1",
        Offset="{} {} {}".format(*ORIGIN),
        ElementSpacing="{} {} {}".format(*SPACING[::-1]),
        DimSize="{} {} {}".format(*voxels.shape[::-1]),
        ElementType="MET_SHORT",
        ElementDataFile="LOCAL",
    )
    fields.update(changes)
    fields["ElementDataFile"] = fields.pop("ElementDataFile")  # always the last
    return "".join(f"{k} = {v}\n" for k, v in fields.items() if v is not None).encode()


def write_mha(path, voxels, **changes):
    path.write_bytes(meta_header(voxels, **changes) + voxels.astype("<i2").tobytes())


def write_zipped_mha(path, voxels):
    path.write_bytes(meta_header(voxels, CompressedData="True") + zlib.compress(voxels.astype("<i2").tobytes()))


def write_mhd(path, voxels):
    path.write_bytes(meta_header(voxels, ElementDataFile="scan.raw", BinaryDataByteOrderMSB="True"))
    (path.parent / "scan.raw").write_bytes(voxels.astype(">i2").tobytes())


def write_nrrd(path, voxels, encoding="gzip", **changes):
    header = {
        "space": "left-posterior-superior",
        "space directions": np.diag(SPACING[::-1]),
        "space origin": np.array(ORIGIN),
        "encoding": encoding,
        **changes,
    }
    nrrd.write(str(path), voxels.T, {k: v for k, v in header.items() if v is not None})


def aim_log(site=21, mu_water=0.2366, extra=""):
    return (
        "! Processing Log\nPatient Name                  DOE^JANE\nOriginal Creation-Date        1-JAN-1950 08:00\n"
        f"Site                                               {site}\n"
        "Mu_Scaling                                       8192\n"
        "Density: unit                 mg HA/ccm            \n"
        "Density: slope                         1.66252400e+03\n"
        "Density: intercept                    -3.98609000e+02\n"
        f"HU: mu water                                  {mu_water}\n{extra}"
    )


def write_aim(path, voxels, log=None, spacing=0.0607, position=(50, -30, 20)):
    meta = dict(element_size=(spacing,) * 3, position=position, processing_log=aim_log() if log is None else log)
    py_aimio.write_aim(str(path), voxels, meta)


def scanco_float(value):
    """The VMS float of Scanco headers."""
    bits = struct.pack("<f", value * 4)
    return bits[2:] + bits[:2]


def write_old_aim(path, voxels, position=(50, -30, 20)):
    """AIM version 020, which most scanners write and aimio only reads."""
    log = aim_log().encode()
    grid = (*position, *voxels.shape[::-1], *[0] * 15)
    head = struct.pack("<6i21i", 16, 0, 0, 0, 0, 0x20002, *grid) + scanco_float(0.0607) * 3 + bytes(20)
    sizes = struct.pack("<5i", 20, len(head), len(log), 2 * voxels.size, 0)
    path.write_bytes(sizes + head + log + voxels.astype("<i2").tobytes())


def scanco_double(value):
    """The VMS double of Scanco headers."""
    bits = struct.unpack("<Q", struct.pack("<d", value * 4))[0]
    return b"".join(
        struct.pack("<I", word)[2:] + struct.pack("<I", word)[:2] for word in (bits >> 32, bits & (2**32 - 1))
    )


def write_isq(path, voxels, site=21, calibrated=True, um=60, **numbers):
    header = bytearray(2048 if calibrated else 512)
    fields = {16: 3, 20: 0, 28: 4711, 32: 3401, 88: 8192, 116: site, 508: len(header) // 512 - 1}
    fields |= {44 + 4 * i: n for i, n in enumerate(voxels.shape[::-1])}
    fields |= {56 + 4 * i: n * um for i, n in enumerate(voxels.shape[::-1])}
    fields |= {int(k[1:]): v for k, v in numbers.items()}
    for at, value in fields.items():
        struct.pack_into("<i", header, at, value)
    header[:16], header[128:136] = b"CTDATA-HEADER_V1", b"DOE^JANE"
    if calibrated:
        header[520:536], header[536:540] = b"Calibration     ", struct.pack("<i", 2)
        header[1672:1681] = b"mg HA/ccm"
        header[1688:1704] = scanco_double(XCT2.slope) + scanco_double(XCT2.intercept)
        header[1712:1720] = scanco_double(XCT2.mu_water)
    path.write_bytes(bytes(header) + voxels.astype("<i2").tobytes())


def dicom_file(path, pixels, **fields):
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = fields.pop("syntax", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = pydicom.Dataset()
    data.file_meta = meta
    data.PatientName, data.PatientID, data.StudyDate = "DOE^JANE", "4711", "19500101"
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 1
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit = 15
    data.Rows, data.Columns = pixels.shape[-2:]
    for key, value in fields.items():
        if value is not None:
            setattr(data, key, value)
    if meta.TransferSyntaxUID == RLELossless:
        data.compress(RLELossless, pixels)
    elif meta.TransferSyntaxUID == JPEG2000Lossless:
        data.PixelData = pydicom.encaps.encapsulate([b"no picture"])
    else:
        data.PixelData = pixels.astype("<i2").tobytes()
    data["PixelData"].VR = "OW"
    data.save_as(path, enforce_file_format=True)


def write_dicom(folder, voxels, order=None, drop=(), **fields):
    """A series whose names are in another order than its slices."""
    folder.mkdir(parents=True, exist_ok=True)
    every = dict(
        SeriesInstanceUID="1.2.3",
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        PixelSpacing=[SPACING[1], SPACING[2]],
        RescaleSlope=1,
        RescaleIntercept=0,
        RescaleType="HU",
    )
    for k, z in enumerate(order or range(len(voxels))):
        if z not in drop:
            at = [ORIGIN[0], ORIGIN[1], round(ORIGIN[2] + z * SPACING[0], 5)]
            dicom_file(folder / f"{k:03d}.dcm", voxels[z], **{**every, "ImagePositionPatient": at, **fields})


@pytest.mark.parametrize(
    ("name", "write", "lps"),
    [
        ("a.nii", write_nifti, False),
        ("a.nii.gz", write_nifti, False),
        ("a.mha", write_mha, True),
        ("b.MHA", write_zipped_mha, True),
        ("a.mhd", write_mhd, True),
        ("a.nrrd", write_nrrd, True),
        ("b.nrrd", lambda p, v: write_nrrd(p, v, "raw", space="right-anterior-superior"), False),
    ],
)
def test_formats_without_a_unit(tmp_path, name, write, lps):
    write(tmp_path / name, counts())
    volume = read_volume(tmp_path / name, unit="native", calibration=XCT2)
    assert np.array_equal(volume.voxels, counts()) and volume.voxels.dtype == np.float32
    assert volume.spacing == pytest.approx(SPACING) and place(volume) == pytest.approx(expected(lps))
    assert volume.unit == "native" and volume.calibration == XCT2 and volume.side is None
    with pytest.raises(InputError, match="carries no density unit here, and none was given; accepted are mgHA"):
        read_volume(tmp_path / name)
    with pytest.raises(InputError, match="'grams' was given"):
        read_volume(tmp_path / name, unit="grams")


@pytest.mark.parametrize(("name", "write"), [("a.AIM", write_aim), ("a.aim", write_old_aim), ("a.AIM;1", write_aim)])
def test_aim(tmp_path, name, write):
    write(tmp_path / name, counts())
    volume = read_volume(tmp_path / name)
    assert np.array_equal(volume.voxels, counts()) and volume.voxels.dtype == np.int16
    assert volume.spacing == (0.0607,) * 3 and volume.unit == "native" and volume.side == "right"
    assert volume.calibration == XCT2
    x, y, z = (np.array(SPOT[::-1]) + (50, -30, 20)) * 0.0607
    assert place(volume) == pytest.approx((-x, -y, z))
    assert read_volume(tmp_path / name, unit="native").unit == "native"
    with pytest.raises(InputError, match="the header says that the unit is native, but 'mgHA' was given"):
        read_volume(tmp_path / name, unit="mgHA")
    assert read_volume(tmp_path / name, unit="mgHA", fallback=True).unit == "native"
    with pytest.raises(InputError, match="calibration of its own"):
        read_volume(tmp_path / name, calibration=Calibration(mu_scaling=4096))


@pytest.mark.parametrize("name", ["a.ISQ", "a.isq;12"])
def test_isq(tmp_path, name):
    write_isq(tmp_path / name, counts(), site=38)
    volume = read_volume(tmp_path / name)
    assert np.array_equal(volume.voxels, counts()) and volume.voxels.dtype == np.int16
    assert volume.spacing == (0.06,) * 3 and volume.unit == "native" and volume.side == "left"
    assert [getattr(volume.calibration, k) for k in ("mu_scaling", "mu_water", "slope", "intercept")] == pytest.approx(
        [8192, 0.2366, 1662.524, -398.609]
    )
    assert place(volume) == pytest.approx(np.multiply((-4, -3, 1), 0.06))


def test_isq_without_an_extended_header_says_what_is_missing(tmp_path):
    write_isq(tmp_path / "a.isq", counts(), calibrated=False, site=4)
    volume = read_volume(tmp_path / "a.isq")
    assert volume.calibration == Calibration(mu_scaling=8192) and volume.side is None
    assert convert(volume, "mu").voxels.max() == pytest.approx(8000 / 8192)
    with pytest.raises(InputError, match="from native to mgHA needs the scanner's slope, intercept, which"):
        convert(volume, "mgHA")
    with pytest.raises(InputError, match="needs the scanner's mu_water"):
        convert(volume, "HU")


def test_dicom_is_sorted_by_position_and_in_the_unit_of_its_rescale_type(tmp_path):
    write_dicom(tmp_path / "s", counts(), order=[2, 0, 3, 1], RescaleSlope=0.5, RescaleIntercept=-10, Laterality="L")
    volume = read_volume(tmp_path / "s")
    assert np.allclose(volume.voxels, counts() * 0.5 - 10) and volume.unit == "HU" and volume.side == "left"
    assert volume.spacing == pytest.approx(SPACING) and place(volume) == pytest.approx(expected(lps=True))
    assert np.linalg.det(volume.affine[:3, :3]) > 0
    with pytest.raises(InputError, match="header says that the unit is HU, but 'mgHA'"):
        read_volume(tmp_path / "s", unit="mgHA")


def test_dicom_with_a_turned_table_keeps_its_world(tmp_path):
    write_dicom(tmp_path / "s", counts(), order=[3, 2, 1, 0], ImageOrientationPatient=[1, 0, 0, 0, -1, 0])
    volume = read_volume(tmp_path / "s")  # rows run upwards, so that a right-handed stack runs downwards
    assert np.array_equal(volume.voxels, counts()[::-1]) and np.linalg.det(volume.affine[:3, :3]) > 0
    x, y, z = ORIGIN[0] + 4 * SPACING[2], ORIGIN[1] - 3 * SPACING[1], ORIGIN[2] + SPACING[0]
    assert place(volume) == pytest.approx((-x, -y, z))


def test_dicom_positions_may_be_rounded(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 9, (40, 3, 3)).astype(np.int16)
    write_dicom(tmp_path / "s", voxels)
    for path in (tmp_path / "s").iterdir():
        data = pydicom.dcmread(path)
        data.ImagePositionPatient = [*ORIGIN[:2], round(float(data.ImagePositionPatient[2]), 2)]
        data.save_as(path)
    volume = read_volume(tmp_path / "s")
    assert np.array_equal(volume.voxels, voxels) and volume.spacing[0] == pytest.approx(SPACING[0], rel=0.005)


@pytest.mark.parametrize(("kind", "unit"), [("mg HA/ccm", "mgHA"), ("mgHA/cm3", "mgHA"), ("HU", "HU")])
def test_dicom_rescale_types(tmp_path, kind, unit):
    write_dicom(tmp_path / "s", counts(), RescaleType=kind, syntax=RLELossless)
    assert read_volume(tmp_path / "s").unit == unit


def test_ct_without_a_rescale_type_is_hu_by_the_standard(tmp_path):
    write_dicom(tmp_path / "s", counts(), RescaleType=None, Modality="CT")
    assert read_volume(tmp_path / "s", unit="mgHA", fallback=True).unit == "HU"


@pytest.mark.parametrize("kind", [None, "US"])
def test_dicom_without_a_unit_asks_for_it(tmp_path, kind):
    write_dicom(tmp_path / "s", counts(), RescaleType=kind)
    with pytest.raises(InputError, match="DICOM carries no density unit here, and none was given"):
        read_volume(tmp_path / "s")
    assert read_volume(tmp_path / "s", unit="native").unit == "native"


def enhanced(path, voxels):
    def group(**fields):
        item = pydicom.Dataset()
        for key, value in fields.items():
            setattr(item, key, value)
        return pydicom.Sequence([item])

    frames = [
        group(PlanePositionSequence=group(ImagePositionPatient=[*ORIGIN[:2], round(ORIGIN[2] + z * SPACING[0], 5)]))[0]
        for z in range(len(voxels))
    ]
    common = group(
        PlaneOrientationSequence=group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelMeasuresSequence=group(PixelSpacing=[SPACING[1], SPACING[2]]),
        PixelValueTransformationSequence=group(RescaleSlope=1, RescaleIntercept=0, RescaleType="HU"),
    )
    dicom_file(
        path,
        voxels,
        SeriesInstanceUID="1.2.3",
        NumberOfFrames=len(voxels),
        PerFrameFunctionalGroupsSequence=pydicom.Sequence(frames),
        SharedFunctionalGroupsSequence=common,
        ImageLaterality="R",
    )


def test_a_multi_frame_dicom_is_one_scan(tmp_path):
    enhanced(tmp_path / "a.dcm", counts())
    volume = read_volume(tmp_path / "a.dcm")
    assert np.array_equal(volume.voxels, counts()) and volume.unit == "HU" and volume.side == "right"
    assert place(volume) == pytest.approx(expected(lps=True)) and volume.spacing == pytest.approx(SPACING)


def of_value(value, unit, calibration=XCT2):
    return Volume(np.full((1, 1, 1), value, np.float32), (0.1,) * 3, unit, calibration=calibration)


@pytest.mark.parametrize(
    ("density", "native", "hu"), [(-5.25, 0.2366 * 8192, 0), (-398.609, 0, -1000), (1000, 6891.5, 2555.5)]
)
def test_calibration_of_an_xtremect_2(density, native, hu):
    assert convert(of_value(hu, "HU"), "mgHA").voxels.item() == pytest.approx(density, abs=0.3)
    assert convert(of_value(native, "native"), "HU").voxels.item() == pytest.approx(hu, abs=0.3)
    assert convert(of_value(density, "mgHA"), "native").voxels.item() == pytest.approx(native, abs=0.5)
    assert convert(of_value(native, "native"), "mu").voxels.item() == pytest.approx(native / 8192)


def test_conversion_round_trip_is_within_a_count():
    every = np.arange(-32768, 32768, dtype=np.int16).reshape(16, 64, 64)
    volume = Volume(every, (0.1,) * 3, "native", calibration=XCT2)
    back = volume
    for unit in ("mgHA", "HU", "mu", "native"):
        back = convert(back, unit)
    assert np.abs(back.voxels - every).max() < 0.05 and volume.voxels is every
    assert convert(volume, "native") is volume


def test_a_calibration_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="water at -399 mgHA; slope is in mgHA per 1/cm"):
        Calibration(8192, 0.2366, 0.202945, -398.609)  # a slope per native count
    Calibration(8192, 0.2409, 1603.519, -391.209)  # another scanner


def test_calibration_and_side_follow_the_volume():
    volume = Volume(counts(), SPACING, "native", calibration=XCT2, side="left")
    for other in (volume.with_voxels(volume.voxels), regrid(volume, volume.voxels[1:], (1, 0, 0))):
        assert other.calibration == XCT2 and other.side == "left" and other.unit == "native"
    with pytest.raises(InputError, match="side 'L' is not known"):
        Volume(counts(), SPACING, side="L")


def test_a_left_bone_becomes_a_right_one():
    affine = np.diag([*SPACING[::-1], 1.0])
    affine[:3, 3] = ORIGIN
    left = Volume(counts(), SPACING, affine=affine, side="left")
    right = mirrored(left)
    assert right.side == "right" and np.array_equal(right.voxels, left.voxels[:, :, ::-1])
    assert place(right) == pytest.approx(np.multiply(place(left), (-1, 1, 1)))  # the other side of the body
    assert np.linalg.det(right.affine[:3, :3]) > 0
    again = mirrored(right)
    assert again.side == "left" and np.array_equal(again.voxels, left.voxels) and np.allclose(again.affine, left.affine)


def test_a_volume_is_brought_to_one_orientation_in_place():
    for affine in (np.diag([-0.1, 0.1, 0.1, 1.0]), np.eye(4)[[2, 0, 1, 3]] @ np.diag([0.1, -0.1, 0.1, 1.0])):
        volume = Volume(counts(), (0.1,) * 3, affine=affine, side="right")
        turned = oriented(volume)
        assert np.allclose(turned.affine[:3, :3], np.eye(3) * 0.1) and place(turned) == pytest.approx(place(volume))
        assert turned.side == "right" and np.array_equal(oriented(turned).voxels, turned.voxels)


def test_an_arm_that_lay_the_other_way_is_turned_about_the_vertical():
    volume = Volume(counts(), (0.1,) * 3)
    turned = upside_down(volume)
    assert np.array_equal(turned.voxels, volume.voxels[::-1, :, ::-1])
    assert place(turned) == pytest.approx(np.multiply(place(volume), (-1, 1, -1)))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "SPL", "IRA"])
def test_nifti_of_any_orientation_gives_the_same_voxels(tmp_path, axes):
    write_nifti(tmp_path / "a.nii.gz", counts())
    image = nib.load(tmp_path / "a.nii.gz")
    wanted = nib.orientations.axcodes2ornt(axes)
    other = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted))
    assert nib.aff2axcodes(other.affine) == tuple(axes)
    nib.save(other, tmp_path / "b.nii")
    volume = read_volume(tmp_path / "b.nii", unit="native")
    assert np.array_equal(volume.voxels, counts()) and place(volume) == pytest.approx(expected(lps=False))
    assert volume.spacing == pytest.approx(SPACING)


def scan_counts():
    """A bone in native counts, (4, 60, 60): soft tissue, cortex, marrow, and one bright voxel."""
    y, x = np.mgrid[:60, :60]
    r = np.hypot(y - 31, x - 27)
    density = np.where(r < 26, np.where(r < 18, 100.0, 1000.0), 0.0)
    density = density + np.random.default_rng(0).normal(0, 40, (4, 60, 60))
    density[1, 33, 41] = 1250
    return np.rint((density + 398.609) * 8192 / 1662.524).astype(np.int16)


@pytest.fixture
def scanner_files(tmp_path):
    """One bone in five formats, two of them left, and names in the headers that can carry them."""
    folder = tmp_path / "mine"
    folder.mkdir()
    every = [scan_counts() + np.int16(10 * i) for i in range(5)]  # one scan under five names would be refused
    write_aim(folder / "sub-a.AIM;1", every[0], aim_log(20))
    write_isq(folder / "sub-b.isq", every[1])
    hu = np.rint(every[2] * (1000 / 8192 / 0.2366) - 1000)
    write_dicom(folder / "sub-c_ses-2", hu, Laterality="R", PatientID="5")
    density = [np.rint(voxels * 1662.524 / 8192 - 398.609).astype(np.int16) for voxels in every]
    write_nrrd(folder / "sub-e.nrrd", density[4])
    write_nifti(folder / "sub-d.nii.gz", density[3][:, ::-1, ::-1])  # the axes of the others are left, posterior
    image = nib.load(folder / "sub-d.nii.gz")
    image.header["descrip"] = b"DOE^JANE 1950-01-01"
    nib.save(image, folder / "sub-d.nii.gz")
    return folder


def test_every_format_is_imported_as_density_without_names(scanner_files, tmp_path):
    import_scans(scanner_files, tmp_path / "cohort", "mgHA", calibration=XCT2, **QUIET)
    scans = read_table(tmp_path / "cohort/scans.tsv")
    assert [s["side"] for s in scans] == ["left", "right", "right", "", ""] and scans[2]["visit"] == "2"
    assert {s["mirrored"] for s in scans} == {"no"}
    for i, scan in enumerate(scans):
        volume = read_volume(tmp_path / "cohort" / scan["file"], unit="mgHA")
        density = (scan_counts() + 10 * i)[:, ::-1, ::-1] * 1662.524 / 8192 - 398.609
        assert np.abs(volume.voxels - density).max() <= 1.5  # rounded once in the file, and once in HU
        assert np.allclose(volume.affine[:3, :3], np.diag(volume.spacing[::-1]))
    for path in (tmp_path / "cohort").rglob("*.*"):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for secret in (b"DOE", b"JANE", b"1950", b"JAN-", b"4711"):
            assert secret not in content


def test_left_bones_are_mirrored_on_import(scanner_files, tmp_path):
    def run(**sides):
        rows = [
            dict(file=f, patient=f[4], side=sides.get(f[4], "")) for f in ("sub-a.AIM;1", "sub-b.isq", "sub-e.nrrd")
        ]
        write_table(scanner_files / "scans.tsv", rows)
        import_scans(scanner_files, tmp_path / "cohort", "mgHA", mirror_left=True, **QUIET)
        return read_table(tmp_path / "cohort/scans.tsv")

    with pytest.raises(InputError, match=r"sub-e.nrrd: mirror_left needs .* column side"):
        run()
    said = []
    write_table(scanner_files / "scans.tsv", [dict(file="sub-e.nrrd", patient="e")])
    import_scans(scanner_files, tmp_path / "plain", "mgHA", say=lambda line, **_: said.append(line), mirror_left=True)
    assert "none of 1 scans tells the side of the body; none is mirrored" in said
    with pytest.raises(InputError, match=r"sub-b.isq: the header says that the side is right, but .* says left"):
        run(b="L", e="R")
    with pytest.raises(InputError, match=r"scans.tsv: side 'both' of sub-e.nrrd"):
        run(e="both")
    assert not (tmp_path / "cohort").exists()
    scans = run(b="r", e="Left")
    assert [(s["side"], s["mirrored"]) for s in scans] == [("right", "yes"), ("right", "no"), ("right", "yes")]
    a, b, e = (read_volume(tmp_path / "cohort" / s["file"], unit="mgHA").voxels for s in scans)
    assert np.abs(a - b[:, :, ::-1] + 2).max() <= 1.5 and np.abs(e - a - 8).max() <= 1.5  # of 10 and 40 counts


def test_a_conversion_that_lacks_its_calibration_names_the_file(scanner_files, tmp_path):
    with pytest.raises(InputError, match=r"sub-c_ses-2: from HU to mgHA needs the scanner's .*; cohort.calibration in"):
        import_scans(scanner_files, tmp_path / "cohort", "mgHA", **QUIET)
    with pytest.raises(InputError, match="cohort.unit: .*needs cohort.calibration"):
        section(Cohort, dict(source="s", unit="HU"), "cohort")
    known = dict(mu_scaling=8192, mu_water=0.2366, slope=1662.524, intercept=-398.609)
    assert section(Cohort, dict(source="s", unit="HU", calibration=known), "cohort").calibration.slope == 1662.524


def test_slices_of_dicom_count_as_one_scan_also_at_the_top(tmp_path):
    write_dicom(tmp_path / "s", np.rint(scan_counts() * 1662.524 / 8192 - 398.609), RescaleType="mgHA")
    import_scans(tmp_path / "s", tmp_path / "cohort", **QUIET)
    assert len(read_table(tmp_path / "cohort/scans.tsv")) == 1


def cut(name, write, keep=0.6):
    def make(folder):
        write(folder / name, counts())
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])
        return folder / name

    return make


def patched(name, write, *edits):
    """A file with (place, format, value) written over it."""

    def make(folder):
        write(folder / name, counts())
        content = bytearray((folder / name).read_bytes())
        for at, form, value in edits:
            struct.pack_into(form, content, at, value)
        (folder / name).write_bytes(content)
        return folder / name

    return make


def made(name, write, *args, **options):
    def make(folder):
        write(folder / name, options.pop("voxels", counts()), *args, **options)
        return folder / name

    return make


def dicom(edit=None, **options):
    def make(folder):
        write_dicom(folder / "s", counts(), **options)
        if edit:
            edit(folder / "s")
        return folder / "s"

    return make


def nan_mha(folder):
    voxels = counts().astype("<f4")
    voxels[0, 0, 0] = np.nan
    (folder / "a.mha").write_bytes(meta_header(voxels, ElementType="MET_FLOAT") + voxels.tobytes())
    return folder / "a.mha"


def bomb(folder):
    """A few bytes that announce, and inflate to, far more voxels than the header has."""
    packed = zlib.compress(bytes(20_000_000), 9)
    (folder / "a.mha").write_bytes(meta_header(counts(), CompressedData="True") + packed)
    return folder / "a.mha"


HUGE = "2304 2304 399"
BAD = {
    "mha cut off": (cut("a.mha", write_mha), "cut off"),
    "mha packed and cut off": (cut("a.mha", write_zipped_mha, 0.9), "cut off"),
    "mha of zero bytes": (cut("a.mha", write_mha, 0), "no ElementDataFile"),
    "mha too large": (made("a.mha", write_mha, DimSize="9999 9999 9999"), "more than any scan"),
    "mha larger than its file": (made("a.mha", write_mha, DimSize=HUGE), "cut off"),
    "mha packed larger than its file": (made("a.mha", write_mha, DimSize=HUGE, CompressedData="True"), "cut off"),
    "mha that inflates": (bomb, "more than"),
    "mha of negative size": (made("a.mha", write_mha, DimSize="-4 5 6"), "three axes"),
    "mha flat": (made("a.mha", write_mha, DimSize="4 5"), "three axes"),
    "mha without spacing": (made("a.mha", write_mha, ElementSpacing=None), "has no ElementSpacing"),
    "mha in micrometres": (made("a.mha", write_mha, ElementSpacing="60 60 60"), "outside of 0.01-2.0 mm"),
    "mha with nan spacing": (made("a.mha", write_mha, ElementSpacing="nan 1 1"), "outside of 0.01-2.0 mm"),
    "mha skewed": (made("a.mha", write_mha, TransformMatrix="1 0 0 0.7 0.7 0 0 0 1"), "right angles"),
    "mha of colours": (made("a.mha", write_mha, ElementNumberOfChannels=3), "one number a voxel"),
    "mha elsewhere": (made("a.mhd", write_mha, ElementDataFile="../a.raw"), "same folder"),
    "mha of words": (made("a.mha", write_mha, Offset="left of it"), "not a readable MetaImage"),
    "mha with nan": (nan_mha, "1 of 120 voxels are NaN"),
    "nrrd cut off": (cut("a.nrrd", write_nrrd, 0.9), "cut off"),
    "nrrd of zero bytes": (cut("a.nrrd", write_nrrd, 0), "not a readable NRRD"),
    "nrrd in ascii": (made("a.nrrd", write_nrrd, "ascii"), "encodings are raw and gzip"),
    "nrrd in micrometres": (made("a.nrrd", write_nrrd, **{"space units": ["um"] * 3}), "units of length are mm"),
    "nrrd in no known space": (made("a.nrrd", write_nrrd, space="scanner-xyz"), "space 'scanner-xyz' is not known"),
    "nrrd flat": (made("a.nrrd", lambda p, v: nrrd.write(str(p), v[0])), "spac"),
    "aim cut off": (cut("a.aim", write_aim, 0.95), "cut off"),
    "aim without data": (cut("a.aim", write_aim, 0.3), "cut off"),
    "aim of zero bytes": (cut("a.aim", write_aim, 0), "not a readable AIM"),
    "aim of another kind": (lambda f: [(f / "a.aim").write_bytes(b"not a scan" * 99), f / "a.aim"][1], "AIM file"),
    "aim with absurd blocks": (patched("a.aim", write_aim, (16, "<q", 2**62)), "no list of blocks"),
    "aim with few blocks": (patched("a.aim", write_aim, (16, "<q", 24)), "no list of blocks"),
    "aim with a negative block": (patched("a.aim", write_aim, (32, "<q", -5)), "cut off"),
    "aim with a huge log": (patched("a.aim", write_aim, (32, "<q", 2**40)), "cut off"),
    "aim larger than its file": (patched("a.aim", write_aim, (96, "<q", 2304)), "do not fit"),
    "aim mask": (made("a.aim", write_aim, voxels=np.ones(SHAPE, np.int8)), "masks"),
    "aim of floats": (made("a.aim", write_aim, voxels=np.ones(SHAPE, np.float32)), "another type"),
    "aim in micrometres": (made("a.aim", write_aim, spacing=60.7), "outside of 0.01-2.0 mm"),
    "aim with water in bone": (made("a.aim", write_aim, log=aim_log(mu_water=0.7)), "puts water at 765"),
    "isq cut off": (cut("a.isq", write_isq, 0.99), "cut off"),
    "isq without header": (cut("a.isq", write_isq, 0.1), "not a readable ISQ"),
    "isq of zero bytes": (cut("a.isq", write_isq, 0), "not a readable ISQ"),
    "isq of zero slices": (made("a.isq", write_isq, _52=0), "outside of|three axes"),
    "isq of negative size": (made("a.isq", write_isq, _44=-6), "outside of|three axes"),
    "isq too large": (made("a.isq", write_isq, _44=2**31 - 1), "more than any scan"),
    "isq larger than its file": (made("a.isq", write_isq, _44=2304, _56=139852), "cut off"),
    "isq in metres": (made("a.isq", write_isq, um=60_000), "outside of 0.01-2.0 mm"),
    "isq with far data": (made("a.isq", write_isq, _508=2**31 - 1), "cut off"),
    "isq of raw projections": (made("a.isq", write_isq, _16=1), "another kind"),
    "dicom with a missing slice": (dicom(drop=[1]), "not evenly spaced"),
    "dicom with a slice twice": (dicom(order=[0, 1, 1, 2, 3]), "there twice"),
    "dicom of one slice": (dicom(drop=[1, 2, 3]), "one DICOM slice is no scan"),
    "dicom without position": (dicom(ImagePositionPatient=None), "no ImagePositionPatient"),
    "dicom without spacing": (dicom(PixelSpacing=None), "no PixelSpacing"),
    "dicom out of line": (dicom(ImageOrientationPatient=[1, 0, 0, 0, 0.8, 0.6]), "not evenly spaced"),
    "dicom of an unknown unit": (dicom(RescaleType="OD"), "RescaleType 'OD' is not known"),
    "dicom with nan": (dicom(RescaleIntercept="nan"), "not a readable DICOM|NaN"),
    "dicom of two series": (
        dicom(lambda f: write_dicom(f, counts(), [0], SeriesInstanceUID="9")),
        "more than one series",
    ),
    "dicom in two units": (dicom(lambda f: write_dicom(f, counts(), [0], RescaleType="mgHA")), "more than one series"),
    "dicom with noise": (
        dicom(lambda f: (f / "x.dcm").write_bytes(b"no DICOM at all")),
        r"x\.dcm: not a readable DICOM",
    ),
    "dicom cut off": (
        dicom(lambda f: (f / "001.dcm").write_bytes((f / "001.dcm").read_bytes()[:-20])),
        r"001\.dcm: not a readable DICOM",
    ),
    "dicom of absurd size": (dicom(Rows=60000, Columns=60000), "cut off"),
    "dicom packed otherwise": (dicom(syntax=JPEG2000Lossless), "compression of DICOM is not read"),
    "no such file": (lambda f: f / "a.isq", "no such file"),
    "another kind": (lambda f: [(f / "a.png").touch(), f / "a.png"][1], "accepted are .nii"),
    "empty folder": (lambda f: f, "folders of .dcm"),
}


@pytest.mark.filterwarnings("ignore:Invalid value for VR")  # from writing them
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_in_one_sentence(tmp_path, name, monkeypatch):
    make, says = BAD[name]
    path = make(tmp_path)
    monkeypatch.setattr(np, "empty", lambda *a, **k: pytest.fail("allocated") if np.prod(a[0]) > 1e7 else np.zeros(*a))
    with pytest.raises(InputError, match=says) as error:
        read_volume(path, unit=None if path.suffix in (".aim", ".isq") or path.is_dir() else "mgHA")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "DOE" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.aim", write_aim),
        ("a.isq", write_isq),
        ("a.mha", write_mha),
        ("a.nrrd", write_nrrd),
        ("a.nii.gz", write_nifti),
    ],
)
def test_noise_in_a_header_never_ends_otherwise(tmp_path, name, write):
    write(tmp_path / name, counts())
    content, rng = (tmp_path / name).read_bytes(), np.random.default_rng(1)
    for _ in range(60):
        noisy = bytearray(content)
        for at in rng.integers(0, len(noisy) // 2, rng.integers(1, 8)):
            noisy[at] = rng.integers(256)
        (tmp_path / name).write_bytes(noisy)
        try:
            volume = read_volume(tmp_path / name, unit="native", fallback=True)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert volume.voxels.ndim == 3


def test_only_nifti_is_written(tmp_path):
    with pytest.raises(InputError, match=r"not written; accepted are \.nii, \.nii\.gz"):
        write_volume(Volume(counts(), SPACING), tmp_path / "a.mha")
