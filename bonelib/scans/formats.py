"""What a scan file says, in its own terms: one function per format, all with the same answer.

Read are NIfTI, MetaImage, NRRD, Scanco AIM and ISQ, and DICOM. Nothing is guessed: what a header does not say is
None. Of a header, only the grid, the unit, the calibration, the bone and the side of the body are taken, and whether
two files are of one patient; names, dates and numbers of patients are neither kept nor repeated in an error.
"""

import gzip
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

from bonelib import InputError
from bonelib.scans.dicom import dicom_files, is_dicom, read_dicom
from bonelib.scans.grids import DEFLATE, LPS, Found, canonical, check_grid, grid, guarded, plain_name, spacing_of
from bonelib.scans.scanco import read_aim, read_aim_mask, read_isq

UNITS_MM = {"meter": 1e3, "micron": 1e-3}  # of NIfTI; none and mm are mm
SAME_LENGTH = 0.01  # by which the spacings of a header may differ


def format_of(path: Path) -> str | None:
    """NIfTI, MetaImage, NRRD, AIM, ISQ or DICOM by the name of the file, else DICOM by its content; or None.

    A folder is DICOM if there are DICOM files in it.
    """
    if path.is_dir():
        return "DICOM" if dicom_files(path) else None
    name = plain_name(path).lower()
    known = next((kind for ending, kind in ENDINGS.items() if name.endswith(ending)), None)
    return known or ("DICOM" if is_dicom(path) else None)


def read_file(path: Path) -> Found:
    """Read a scan of any format. Raises `InputError`, naming the file, for whatever is wrong with it."""
    kind = format_of(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if kind is None:
        accepted = ", ".join(ENDINGS)
        raise InputError(f"{path}: this kind of file is not read; accepted are {accepted}, and folders of .dcm")
    found = guarded(path, kind, FORMATS[kind][0], path)
    parts = found.voxels if found.voxels.dtype.kind == "f" else ()
    if bad := sum(int(part.size - np.isfinite(part).sum()) for part in parts):
        says = f"{bad} of {found.voxels.size} voxels are NaN or infinite"
        raise InputError(f"{path}: {says}; every voxel must be a number")
    return found


def read_mask(path: Path) -> Found:
    """A file of any format that holds two values, of which the higher one is the mask: voxels are 0 and 1."""
    found = guarded(path, "AIM", read_aim_mask, path) if format_of(path) == "AIM" else read_file(path)
    low, high = found.voxels.min(), found.voxels.max()
    if low == high or not np.isin(found.voxels, (low, high)).all():
        raise InputError(f"{path}: named as a mask, but it holds other than two values; rename it, or take it out")
    return found._replace(voxels=(found.voxels == high).astype(np.int8))


def _values(path, file, dtype, shape, deflated: bool) -> np.ndarray:
    """float32 (z, y, x) from the `shape` (x, y, z) values of `dtype` that follow in `file`, raw or by zlib or gzip."""
    count = int(np.prod(shape))
    if not deflated:
        voxels = np.fromfile(file, dtype, count)
    else:
        voxels, at = np.empty(count, dtype), 0
        content = voxels.view(np.uint8)
        for part in _inflated(file):
            if at + len(part) > content.size:
                raise InputError(f"{path}: not a readable file; it holds more than {tuple(shape)} voxels")
            content[at : at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)
        voxels = voxels[: at // dtype.itemsize]
    if voxels.size < count:
        raise InputError(f"{path}: not a readable file; it is cut off")
    return voxels.astype(np.float32).reshape(shape[::-1])


def _inflated(file):
    """The content of a zlib or gzip stream in parts; gzip may have several members, one behind the other."""
    stream = zlib.decompressobj(47)  # 47: either header
    while True:
        chunk = stream.unconsumed_tail or stream.unused_data or file.read(1 << 20)
        if stream.eof:
            if not chunk.startswith(b"\x1f\x8b"):
                return
            stream = zlib.decompressobj(47)
        part = stream.decompress(chunk, 1 << 24)
        if not (chunk or part):
            raise EOFError
        yield part


def read_nifti(path: Path) -> Found:
    """NIfTI carries spacing and affine, and neither unit nor calibration. Voxels are float32, in canonical orientation.

    Raises `InputError` for an affine that does not say how the scan lies: both codes 0, two that disagree, singular,
    sheared, or in conflict with the spacing.
    """
    image = nib.load(path)
    shape, header = image.shape[:3], image.header
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: a scan has one number a voxel, but the file has {image.get_data_dtype()}")
    if max(image.shape[3:], default=1) > 1:
        raise InputError(f"{path}: a scan has three axes, but the file has shape {image.shape}")
    scale = UNITS_MM.get(header.get_xyzt_units()[0], 1.0)
    spacing = [float(abs(s)) * scale for s in header["pixdim"][1:4]]
    gz = path.name.lower().endswith(".gz")
    stored = path.stat().st_size * (DEFLATE if gz else 1) / image.get_data_dtype().itemsize
    check_grid(path, shape, spacing, np.diag([*spacing, 1.0]), stored)
    (qform, qcode), (sform, scode) = image.get_qform(coded=True), image.get_sform(coded=True)
    if not (qcode or scode):
        raise InputError(f"{path}: the header does not say how the scan lies; qform_code or sform_code must be above 0")
    affine = np.diag([scale] * 3 + [1.0]) @ image.affine
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.allclose(lengths, spacing, rtol=SAME_LENGTH):
        found = f"{np.round(spacing, 4).tolist()} mm in pixdim, {np.round(lengths, 4).tolist()} mm in the affine"
        raise InputError(f"{path}: the header gives two voxel spacings, {found}; they must agree")
    check_grid(path, shape, spacing, affine, stored)
    if qcode and scode and nib.aff2axcodes(qform) != nib.aff2axcodes(sform):
        raise InputError(f"{path}: sform and qform give two orientations; they must agree")
    voxels = np.asarray(image.dataobj, dtype=np.float32).reshape(shape).T
    if gz:  # nibabel stops before the checksum
        with gzip.open(path) as stream:
            while stream.read(1 << 24):
                pass
    voxels, affine = canonical(voxels, affine)
    return Found(np.ascontiguousarray(voxels), spacing_of(affine), affine)


META_TYPES = dict(CHAR="i1", UCHAR="u1", SHORT="i2", USHORT="u2", INT="i4", UINT="u4", FLOAT="f4", DOUBLE="f8")
META_TYPES = {f"MET_{name}": code for name, code in META_TYPES.items()}


def read_metaimage(path: Path) -> Found:
    """MetaImage (.mha, or .mhd with its data in the same folder) carries a grid, neither unit nor calibration."""
    header, size = {}, 0
    with open(path, "rb") as file:
        while "ElementDataFile" not in header:
            line = file.readline(4096)
            size += len(line)
            if not line or size > 1 << 16:
                raise InputError(f"{path}: not a readable MetaImage file; its header has no ElementDataFile")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                text = line.decode("latin-1")
            key, _, value = text.partition("=")
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
    affine = LPS @ grid(axes, spacing, numbers("Offset", "Position", "Origin", otherwise="0 0 0"))
    deflated = says("CompressedData")
    with open(data, "rb") as file:
        file.seek(start if data == path else 0)
        size = data.stat().st_size - file.tell()
        check_grid(path, shape, spacing, affine, size * (DEFLATE if deflated else 1) / dtype.itemsize)
        if not deflated and size != (needed := int(np.prod(shape)) * dtype.itemsize):
            says = f"the data are {size} bytes, but {shape} voxels are {needed}"
            raise InputError(f"{path}: {says}; no header is skipped")
        return Found(_values(path, file, dtype, shape, deflated), tuple(spacing[::-1]), affine)


NRRD_SPACES = {
    **dict.fromkeys(("left-posterior-superior", "lps"), LPS),
    **dict.fromkeys(("left-anterior-superior", "las"), np.diag([-1.0, 1.0, 1.0, 1.0])),
    **dict.fromkeys(("right-anterior-superior", "ras", ""), np.eye(4)),  # without a space there is spacing alone
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
        skips = any(header.get(skip) for skip in ("line skip", "lineskip", "byte skip", "byteskip"))
        if header["encoding"] not in ("raw", "gzip", "gz") or skips:
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
            affine = NRRD_SPACES[space] @ grid(axes, 1.0, header.get("space origin", np.zeros(3)))
        elif "spacings" in header:
            spacing = np.asarray(header["spacings"], float)
            affine = np.diag([*spacing, 1.0])
        else:
            raise InputError(f"{path}: the NRRD header has neither space directions nor spacings")
        dtype = np.dtype(NRRD_TYPES[header["type"]]).newbyteorder(">" if header.get("endian") == "big" else "<")
        deflated, shape = header["encoding"] != "raw", tuple(int(n) for n in header["sizes"])
        stored = (path.stat().st_size - file.tell()) * (DEFLATE if deflated else 1) / dtype.itemsize
        check_grid(path, shape, spacing, affine, stored)
        return Found(_values(path, file, dtype, shape, deflated), tuple(map(float, spacing[::-1])), affine)


FORMATS = {
    "NIfTI": (read_nifti, (".nii", ".nii.gz")),
    "MetaImage": (read_metaimage, (".mha", ".mhd")),
    "NRRD": (read_nrrd, (".nrrd",)),
    "AIM": (read_aim, (".aim",)),
    "ISQ": (read_isq, (".isq",)),
    "DICOM": (read_dicom, (".dcm",)),
}
ENDINGS = {ending: kind for kind, (_, endings) in FORMATS.items() for ending in endings}
