"""What a scan file says, in its own terms: one function per format, all with the same answer.

Read are NIfTI, MetaImage, NRRD, Scanco AIM and ISQ, and DICOM. Nothing is guessed: what a header does not say is
None. Of a header, only the grid, the unit, the calibration and the side of the body are taken; names, dates and
numbers of patients are neither kept nor repeated in an error.
"""

import gzip
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from bonelib import InputError

SPACING_MM = (0.01, 2.0)  # outside of this a header is wrong, or the scan is of another kind
MAX_VOXELS = 2_304 * 2_304 * 400  # a full double-stack reconstruction; more is a damaged header
DEFLATE, RUNS = 1032, 64  # what deflate and run lengths can compress at most: a file that promises more is damaged
WATER_MGHA = 100  # water is at -5 in any right calibration; beyond this its numbers do not belong together
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # between the axes of DICOM and ITK, and the (right, anterior, superior) of NIfTI
SITES = {20: "left", 21: "right", 38: "left", 39: "right"}  # Scanco: radius, tibia


@dataclass(frozen=True)
class Calibration:
    """Of one scanner, with mu in 1/cm: native = mu_scaling * mu, mgHA = slope * mu + intercept; mu_water for HU.

    What is not known is None. Raises `InputError` where water would not lie near 0 mgHA, as with a slope that is
    meant per native count.
    """

    mu_scaling: float | None = None
    mu_water: float | None = None
    slope: float | None = None
    intercept: float | None = None

    def __post_init__(self):
        if None not in (self.mu_water, self.slope, self.intercept):
            water = self.slope * self.mu_water + self.intercept
            if not abs(water) <= WATER_MGHA:
                raise InputError(f"the calibration puts water at {water:.0f} mgHA; slope is in mgHA per 1/cm of mu")


class Found(NamedTuple):
    """`voxels` (z, y, x); `spacing` in mm (z, y, x); `affine` (4, 4) from (x, y, z) to (right, anterior, superior)."""

    voxels: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    unit: str | None = None
    calibration: Calibration | None = None
    side: str | None = None


def format_of(path: Path) -> str | None:
    """NIfTI, MetaImage, NRRD, AIM, ISQ or DICOM by the name of the file (or the content of a folder); else None."""
    if path.is_dir():
        return "DICOM" if _slices(path) else None
    name = re.sub(r";\d+$", "", path.name.lower())  # VMS file versions
    return next((kind for ending, kind in ENDINGS.items() if name.endswith(ending)), None)


def read_file(path: Path) -> Found:
    """Read a scan of any format. Raises `InputError`, naming the file, for whatever is wrong with it."""
    kind = format_of(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if kind is None:
        accepted = ", ".join(ENDINGS)
        raise InputError(f"{path}: this kind of file is not read; accepted are {accepted}, and folders of .dcm")
    found = _guarded(path, kind, READERS[kind], path)
    bad = 0
    if found.voxels.dtype.kind == "f":
        bad = sum(int(part.size - np.isfinite(part).sum()) for part in found.voxels)
    if bad:
        raise InputError(
            f"{path}: {bad} of {found.voxels.size} voxels are NaN or infinite; every voxel must be a number"
        )
    return found


def _guarded(path, kind, function, *args, **options):
    """`function(...)`; its failures and warnings are not repeated, as they may quote names from a header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **options)
    except InputError:
        raise
    except Exception:
        raise InputError(f"{path}: not a readable {kind} file; it is damaged, cut off or of another kind") from None


def _check_grid(path, shape, spacing, affine, stored: float) -> None:
    """Refuse a grid (x, y, z) that no scan has, before anything is allocated. `stored`: values the file can hold."""
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"{path}: a scan has three axes, but the file has shape {tuple(shape)}")
    if np.prod(shape, dtype=float) > MAX_VOXELS:
        raise InputError(f"{path}: the header announces {tuple(shape)} voxels, more than any scan of this kind holds")
    if not all(SPACING_MM[0] <= s <= SPACING_MM[1] for s in spacing):
        found = [round(float(s), 6) for s in spacing]
        raise InputError(f"{path}: voxel spacing {found} mm is outside of {SPACING_MM[0]}-{SPACING_MM[1]} mm")
    axes = affine[:3, :3] / np.asarray(spacing, float)
    if not np.isfinite(affine).all() or not np.allclose(axes.T @ axes, np.eye(3), atol=0.01):
        raise InputError(f"{path}: the axes in the header are not at right angles, or not finite")
    if np.prod(shape, dtype=float) > stored:
        raise InputError(f"{path}: not a readable file; it is cut off, as {tuple(shape)} voxels need more bytes")


def _grid(axes, spacing, origin) -> np.ndarray:
    """Affine of voxels (x, y, z) whose axes are the columns of `axes`, `spacing` apart; `origin` is voxel 0."""
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(axes, float) * np.asarray(spacing, float)
    affine[:3, 3] = origin
    return affine


def _values(path, file, dtype, shape, deflated: bool) -> np.ndarray:
    """float32 (z, y, x) from the `shape` (x, y, z) values of `dtype` that follow in `file`, raw or by zlib or gzip."""
    count = int(np.prod(shape))
    if not deflated:
        voxels = np.fromfile(file, dtype, count)
    else:
        voxels, stream, at = np.empty(count, dtype), zlib.decompressobj(47), 0  # 47: either header
        content = voxels.view(np.uint8)
        while not stream.eof:
            chunk = stream.unconsumed_tail or file.read(1 << 20)
            part = stream.decompress(chunk, 1 << 24)
            if not (chunk or part):
                break
            if at + len(part) > content.size:
                raise InputError(f"{path}: not a readable file; it holds more than {tuple(shape)} voxels")
            content[at : at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)
        if at < content.size or not stream.eof:
            voxels = voxels[:0]
    if voxels.size < count:
        raise InputError(f"{path}: not a readable file; it is cut off")
    return voxels.astype(np.float32).reshape(shape[::-1])


def read_nifti(path: Path) -> Found:
    """NIfTI carries spacing and affine, and neither unit nor calibration. Voxels are float32."""
    image = nib.load(path)
    shape = tuple(n for n in image.shape if n != 1) if len(image.shape) > 3 else image.shape
    raw_spacing = [float(abs(s)) for s in image.header["pixdim"][1:4]]
    gz = path.name.lower().endswith(".gz")
    stored = path.stat().st_size * (DEFLATE if gz else 1) / image.get_data_dtype().itemsize
    _check_grid(path, shape, raw_spacing, np.diag([*raw_spacing, 1.0]), stored)
    if not np.isfinite(image.affine).all():
        raise InputError(f"{path}: the affine in the header is not finite")
    voxels = np.asarray(image.dataobj, dtype=np.float32).reshape(shape).T
    if gz:  # nibabel stops before the checksum
        with gzip.open(path) as stream:
            while stream.read(1 << 24):
                pass
    spacing = tuple(float(s) for s in image.header.get_zooms()[:3][::-1])
    return Found(np.ascontiguousarray(voxels), spacing, np.array(image.affine, float))


META_TYPES = {
    f"MET_{name}": code
    for name, code in dict(
        CHAR="i1", UCHAR="u1", SHORT="i2", USHORT="u2", INT="i4", UINT="u4", FLOAT="f4", DOUBLE="f8"
    ).items()
}


def read_metaimage(path: Path) -> Found:
    """MetaImage (.mha, or .mhd with its data in the same folder) carries a grid, neither unit nor calibration."""
    header, size = {}, 0
    with open(path, "rb") as file:
        while "ElementDataFile" not in header:
            line = file.readline(4096)
            size += len(line)
            if not line or size > 1 << 16:
                raise InputError(f"{path}: not a readable MetaImage file; its header has no ElementDataFile")
            key, _, value = line.decode("latin-1").partition("=")
            header[key.strip()] = value.strip()
        start = file.tell()

    def numbers(*names, otherwise=None):
        found = next((header[name] for name in names if name in header), otherwise)
        if found is None:
            raise InputError(f"{path}: the MetaImage header has no {names[0]}")
        return [float(part) for part in found.split()]

    def says(*names):
        return any(header.get(name, "").lower() == "true" for name in names)

    if header.get("ElementType") not in META_TYPES or numbers("ElementNumberOfChannels", otherwise="1") != [1]:
        raise InputError(f"{path}: one number a voxel is needed; accepted ElementTypes are {', '.join(META_TYPES)}")
    if not says("BinaryData") or numbers("HeaderSize", otherwise="0") != [0]:
        raise InputError(f"{path}: MetaImage data must be binary, with a HeaderSize of 0")
    name = header["ElementDataFile"]
    data = path if name == "LOCAL" else path.parent / name
    if name != "LOCAL" and (Path(name).name != name or "\\" in name or not data.is_file()):
        raise InputError(f"{path}: ElementDataFile must be LOCAL or name one file in the same folder")
    big = says("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
    dtype = np.dtype(META_TYPES[header["ElementType"]]).newbyteorder(">" if big else "<")
    shape, spacing = tuple(int(n) for n in numbers("DimSize")), numbers("ElementSpacing")
    axes = np.reshape(numbers("TransformMatrix", "Rotation", "Orientation", otherwise="1 0 0 0 1 0 0 0 1"), (3, 3)).T
    affine = LPS @ _grid(axes, spacing, numbers("Offset", "Position", "Origin", otherwise="0 0 0"))
    deflated = says("CompressedData")
    with open(data, "rb") as file:
        file.seek(start if data == path else 0)
        stored = (data.stat().st_size - file.tell()) * (DEFLATE if deflated else 1) / dtype.itemsize
        _check_grid(path, shape, spacing, affine, stored)
        return Found(_values(path, file, dtype, shape, deflated), tuple(spacing[::-1]), affine)


NRRD_SPACES = {
    "left-posterior-superior": LPS,
    "lps": LPS,
    "right-anterior-superior": np.eye(4),
    "ras": np.eye(4),
    "left-anterior-superior": np.diag([-1.0, 1.0, 1.0, 1.0]),
    "las": np.diag([-1.0, 1.0, 1.0, 1.0]),
    "": np.eye(4),  # without a space there is spacing alone
}
NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    "float": "f4",
    "double": "f8",
}


def read_nrrd(path: Path) -> Found:
    """NRRD (one file, raw or gzip) carries a grid, neither unit nor calibration. The header is read by pynrrd."""
    import nrrd

    with open(path, "rb") as file:
        header = nrrd.read_header(file)
        if "data file" in header or "datafile" in header or header.get("type") not in NRRD_TYPES:
            raise InputError(f"{path}: a NRRD scan must be one file, and hold one number a voxel")
        if header["encoding"] not in ("raw", "gzip", "gz") or any(
            header.get(skip) for skip in ("line skip", "lineskip", "byte skip", "byteskip")
        ):
            raise InputError(f"{path}: accepted NRRD encodings are raw and gzip, without line or byte skip")
        units = [*header.get("space units", []), *header.get("units", [])]
        if any(u not in ("mm", "millimeter", "") for u in units):
            raise InputError(f"{path}: accepted NRRD units of length are mm")
        space = str(header.get("space", "")).lower()
        if space not in NRRD_SPACES:
            raise InputError(f"{path}: NRRD space {space!r:.40} is not known; accepted are RAS, LPS, LAS")
        if "space directions" in header:
            axes = np.asarray(header["space directions"], float).T
            spacing = np.linalg.norm(axes, axis=0)
            affine = NRRD_SPACES[space] @ _grid(axes, 1.0, header.get("space origin", np.zeros(3)))
        elif "spacings" in header:
            spacing = np.asarray(header["spacings"], float)
            affine = np.diag([*spacing, 1.0])
        else:
            raise InputError(f"{path}: the NRRD header has neither space directions nor spacings")
        dtype = np.dtype(NRRD_TYPES[header["type"]]).newbyteorder(">" if header.get("endian") == "big" else "<")
        deflated, shape = header["encoding"] != "raw", tuple(int(n) for n in header["sizes"])
        stored = (path.stat().st_size - file.tell()) * (DEFLATE if deflated else 1) / dtype.itemsize
        _check_grid(path, shape, spacing, affine, stored)
        return Found(_values(path, file, dtype, shape, deflated), tuple(map(float, spacing[::-1])), affine)


def _scanco(path, shape, spacing, origin, offset, calibration, site) -> Found:
    """int16 counts, read once and straight into place: the peak is the voxels themselves, 1.8 GB for a full ISQ.

    Scanco files do not say how the patient lay; the axes of the grid are taken as ITK takes them.
    """
    affine = LPS @ _grid(np.eye(3), spacing, origin)
    _check_grid(path, shape, spacing, affine, (path.stat().st_size - offset) // 2)
    voxels = np.fromfile(path, "<i2", int(np.prod(shape)), offset=offset).reshape(shape[::-1])
    return Found(voxels, tuple(spacing[::-1]), affine, "native", calibration, SITES.get(site))


def read_aim(path: Path) -> Found:
    """Grey Scanco AIM: int16 counts, calibration and site from its processing log. The header is read by py_aimio."""
    import py_aimio

    # aimio trusts the block sizes, and reads beyond the file where they are wrong
    with open(path, "rb") as file:
        head = file.read(64)
    start, word = (16, "q") if head.startswith(b"AIMDATA_V030   \0") else (0, "i")
    (first,) = struct.unpack_from(f"<{word}", head, start)
    blocks = first // struct.calcsize(f"<{word}")
    if not 4 <= blocks <= 5:
        raise InputError(f"{path}: not a readable AIM file; its header has no list of blocks")
    sizes = struct.unpack_from(f"<{blocks}{word}", head, start)
    if min(sizes[:4]) < 0 or sizes[2] > 1 << 24 or start + sum(sizes[:4]) > path.stat().st_size:
        raise InputError(f"{path}: not a readable AIM file; it is cut off")
    info = py_aimio.aim_info(str(path))
    if info["aim_type"] != 0x20002:
        raise InputError(f"{path}: a grey AIM has 16-bit counts, but this one is of another type, as masks are")
    shape = tuple(int(n) for n in info["dimensions"])
    if sizes[3] != 2 * np.prod(shape, dtype=float):
        raise InputError(f"{path}: not a readable AIM file; {shape} voxels do not fit its {sizes[3]} bytes of data")

    def number(key):
        found = re.search(rf"^{re.escape(key)}\s+([-+.\deE]+)\s*$", info["processing_log"], re.MULTILINE)
        return float(found[1]) if found else None

    unit = re.search(r"^Density: unit[^\S\n]+(\S.*)$", info["processing_log"], re.MULTILINE)
    density = (number("Density: slope"), number("Density: intercept")) if not unit or _is_mgha(unit[1]) else (None,) * 2
    calibration = _calibration(path, number("Mu_Scaling"), number("HU: mu water"), *density)
    spacing = [round(float(s), 6) for s in info["element_size"]]  # stored in nm, or as float32
    origin = (np.add(info["position"], info["offset"])) * spacing
    return _scanco(path, shape, spacing, origin, info["byte_offset"], calibration, number("Site"))


def read_isq(path: Path) -> Found:
    """Scanco ISQ: int16 counts, mu_scaling, and the rest of the calibration where the header is extended."""
    import py_aimio

    with open(path, "rb") as file:
        head = file.read(512)
    kind, blocks = struct.unpack_from("<i", head, 16)[0], struct.unpack_from("<i", head, 508)[0]
    if not head.startswith(b"CTDATA-HEADER_V1") or kind != 3:
        raise InputError(f"{path}: not a readable ISQ file; its header is of another kind")
    if not 0 <= blocks <= 4096 or 512 * (blocks + 1) > path.stat().st_size:
        raise InputError(f"{path}: not a readable ISQ file; it is cut off")
    info = py_aimio.isq_info(str(path))
    # As ITK and the AIM log have it, the slope is per mu; aimio's own conversion takes it per count
    unit = info.get("rescale_units")
    density = (info.get("rescale_slope"), info.get("rescale_intercept")) if not unit or _is_mgha(unit) else (None,) * 2
    calibration = _calibration(path, info["mu_scaling"], info.get("mu_water"), *density)
    shape, size_um = info["dimensions"], info["dimensions_um"]
    spacing = [um / n / 1000 if n > 0 else 0.0 for um, n in zip(size_um, shape, strict=True)]
    return _scanco(path, shape, spacing, np.zeros(3), 512 * (blocks + 1), calibration, info["site"])


def _is_mgha(text: str) -> bool:
    """Whether a unit in a header is mg of hydroxyapatite in some spelling, as "mg HA/ccm"."""
    return re.sub("[^A-Z]", "", text.upper()).startswith("MGHA")


def _calibration(path, mu_scaling, mu_water, slope, intercept) -> Calibration:
    """Of a Scanco header, in which 0 stands for a number that is not there."""
    if not slope:
        slope = intercept = None
    values = [v if v and np.isfinite(v) else None for v in (mu_scaling, mu_water, slope)]
    try:
        return Calibration(*values, intercept if intercept is not None and np.isfinite(intercept) else None)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


DICOM_GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
}
DICOM_TAGS = [
    *DICOM_GROUPS,
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "NumberOfFrames", "SeriesInstanceUID"),
    *("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "Laterality", "ImageLaterality"),
]
UNEVEN = 0.2  # of a step between slices: positions are often rounded to 10 um, a missing slice is off by a whole step
TILT = 0.02  # of the length of a stack, how far it may lean


def _slices(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() == ".dcm" and p.is_file() and p.name[0] != ".")


def read_dicom(path: Path) -> Found:
    """A DICOM series (a folder of .dcm) or a multi-frame file: float32, in the unit that RescaleType names.

    Slices are sorted by their position. Raises `InputError` for slices of several series or grids, a slice that
    is missing or there twice, and compressions other than run lengths.
    """
    from pydicom.pixels import pixel_array

    planes = []
    for file in _slices(path) if path.is_dir() else [path]:
        planes += _guarded(file, "DICOM", _planes, file)
    if len(planes) < 2:
        raise InputError(f"{path}: one DICOM slice is no scan; give the folder of the whole series")
    first = planes[0]
    if any(plane["same"] != first["same"] for plane in planes):
        raise InputError(f"{path}: the DICOM slices are of more than one series, grid or unit")
    normal = np.cross(first["axes"][:, 0], first["axes"][:, 1])
    planes.sort(key=lambda plane: float(normal @ plane["place"]))
    moves = np.diff([plane["place"] for plane in planes], axis=0)
    steps = moves @ normal
    lean = np.linalg.norm((moves - steps[:, None] * normal).sum(axis=0))
    if not np.all(np.abs(steps - np.median(steps)) < UNEVEN * np.median(steps)) or lean > TILT * steps.sum():
        raise InputError(
            f"{path}: the DICOM slices are not evenly spaced (steps of {steps.min():.4f} to {steps.max():.4f} mm); "
            "one is missing, there twice or out of line"
        )
    rows, columns = first["same"][1:3]
    shape = (columns, rows, len(planes))
    spacing = (*first["size"][::-1], float(steps.mean()))
    affine = LPS @ _grid(np.column_stack([first["axes"], normal]), spacing, planes[0]["place"])
    _check_grid(path, shape, spacing, affine, sum(plane["stored"] for plane in planes))
    voxels = np.empty(shape[::-1], np.float32)
    for target, plane in zip(voxels, planes, strict=True):
        stored = _guarded(plane["file"], "DICOM", pixel_array, plane["file"], index=plane["frame"], raw=True)
        np.multiply(stored, np.float32(plane["slope"]), out=target, casting="unsafe")
        target += np.float32(plane["intercept"])
    return Found(voxels, tuple(float(s) for s in spacing[::-1]), affine, first["unit"], None, first["side"])


def _planes(file: Path) -> list[dict]:
    """The planes of one DICOM file, without their pixels."""
    import pydicom

    if pydicom.filereader.read_file_meta_info(file).TransferSyntaxUID == pydicom.uid.DeflatedExplicitVRLittleEndian:
        raise InputError(f"{file}: this compression of DICOM is not read; accepted are none and run lengths")
    head = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=DICOM_TAGS)
    syntax = head.file_meta.TransferSyntaxUID
    if syntax.is_compressed and syntax != pydicom.uid.RLELossless:
        raise InputError(f"{file}: this compression of DICOM is not read; accepted are none and run lengths")
    if head.SamplesPerPixel != 1:
        raise InputError(f"{file}: a scan has one number a voxel, but this DICOM file has {head.SamplesPerPixel}")
    frames = int(head.get("NumberOfFrames") or 1)
    pixels, stored = int(head.Rows) * int(head.Columns), file.stat().st_size * 8 / head.BitsAllocated
    if frames < 1 or frames * pixels > stored * (RUNS if syntax.is_compressed else 1):
        raise InputError(f"{file}: not a readable DICOM file; it is cut off")
    side = {"L": "left", "R": "right"}.get(head.get("ImageLaterality") or head.get("Laterality"))
    planes = []
    for frame in range(frames):

        def value(key, otherwise=None, frame=frame):
            for groups, i in ("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0):
                if groups in head and DICOM_GROUPS[key] in (group := head[groups][i]):
                    found = group[DICOM_GROUPS[key]][0].get(key)
                    if found is not None:
                        return found
            found = head.get(key)
            if found in (None, "") and otherwise is None:
                raise InputError(f"{file}: the DICOM header has no {key}")
            return otherwise if found in (None, "") else found

        axes = np.array(value("ImageOrientationPatient"), float).reshape(2, 3)
        size = tuple(float(s) for s in value("PixelSpacing"))
        kind = str(value("RescaleType", "")).upper()
        unit = "HU" if kind == "HU" else "mgHA" if _is_mgha(kind) else None
        if unit is None and kind not in ("", "US", "MGML"):  # mg/ml of what?
            raise InputError(f"{file}: RescaleType {kind!r:.20} is not known; accepted are HU, mgHA, MGML, US and none")
        same = (head.SeriesInstanceUID, int(head.Rows), int(head.Columns), unit, side)
        planes.append(
            dict(
                file=file,
                frame=frame if frames > 1 else None,
                place=np.array(value("ImagePositionPatient"), float).reshape(3),
                axes=axes.T,
                size=size,
                slope=float(value("RescaleSlope", 1.0)),
                intercept=float(value("RescaleIntercept", 0.0)),
                unit=unit,
                side=side,
                stored=pixels,
                same=(*same, tuple(np.round(axes.ravel(), 4)), tuple(np.round(size, 6))),
            )
        )
    return planes


ENDINGS = {
    ".nii": "NIfTI",
    ".nii.gz": "NIfTI",
    ".mha": "MetaImage",
    ".mhd": "MetaImage",
    ".nrrd": "NRRD",
    ".aim": "AIM",
    ".isq": "ISQ",
    ".dcm": "DICOM",
}
READERS = {
    "NIfTI": read_nifti,
    "MetaImage": read_metaimage,
    "NRRD": read_nrrd,
    "AIM": read_aim,
    "ISQ": read_isq,
    "DICOM": read_dicom,
}
