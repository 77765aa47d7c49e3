"""DICOM: a folder of slices, or a multi-frame file."""

from pathlib import Path

import numpy as np

from bonelib import InputError
from bonelib.scans.grids import LPS, RUNS, Found, check_grid, grid, guarded, hashed, is_mgha, plain_name, version

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
    *("Modality", "BodyPartExamined", "PatientID"),
]
BONES = {"RADIUS": "radius", "WRIST": "radius", "FOREARM": "radius"}
BONES |= {"TIBIA": "tibia", "ANKLE": "tibia", "LOWERLEG": "tibia", "LOWER LEG": "tibia"}
NO_BONE = ("", "ARM", "LEG", "EXTREMITY")  # words that leave it open
NO_DICOM = (".nii", ".gz", ".mha", ".mhd", ".raw", ".nrrd", ".aim", ".isq", ".tsv", ".csv", ".json", ".txt")
UNEVEN = 0.2  # of a step between slices: positions are often rounded to 10 um, a missing slice is off by a whole step
TILT = 0.02  # of the length of a stack, how far it may lean


def is_dicom(path: Path) -> bool:
    """Whether the content of a file is that of DICOM; an index of a medium (DICOMDIR) is none."""
    if not path.is_file() or plain_name(path).upper() == "DICOMDIR":
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files in a folder, by their ending (.dcm, .ima) or else their content, each in its newest version."""
    found = {}
    for path in folder.iterdir():
        name = plain_name(path)
        ending = Path(name).suffix.lower()
        if name[0] == "." or not path.is_file():
            continue
        if ending in (".dcm", ".ima") or ending not in NO_DICOM and is_dicom(path):
            found[name] = max(found.get(name, path), path, key=version)
    return sorted(found.values())


def frames(path: Path) -> int:
    """The number of frames in a DICOM file; 0 for one that cannot be read."""
    import pydicom

    try:
        head = guarded(path, "DICOM", pydicom.dcmread, path, stop_before_pixels=True, specific_tags=["NumberOfFrames"])
        return int(head.get("NumberOfFrames") or 1)
    except (InputError, ValueError):
        return 0


def read_dicom(path: Path) -> Found:
    """A DICOM series (a folder of .dcm) or a multi-frame file: float32, in the unit that RescaleType names.

    Slices are sorted by their position. Raises `InputError` for slices of several series or grids, a slice that
    is missing or there twice, and compressions other than run lengths.
    """
    from pydicom.pixels import pixel_array

    planes = []
    for file in dicom_files(path) if path.is_dir() else [path]:
        planes += guarded(file, "DICOM", _planes, file)
    if len(planes) < 2:
        raise InputError(f"{path}: one DICOM slice is no scan; give the folder of the whole series")
    first = planes[0]
    if any(plane["same"] != first["same"] for plane in planes):
        says = "the DICOM slices are of more than one series, grid or unit"
        raise InputError(f"{path}: {says}; give every series a folder of its own, and take out localizers")
    normal = np.cross(first["axes"][:, 0], first["axes"][:, 1])
    planes.sort(key=lambda plane: float(normal @ plane["place"]))
    moves = np.diff([plane["place"] for plane in planes], axis=0)
    steps = moves @ normal
    lean = np.linalg.norm((moves - steps[:, None] * normal).sum(axis=0))
    if not np.all(np.abs(steps - np.median(steps)) < UNEVEN * np.median(steps)) or lean > TILT * steps.sum():
        says = f"not evenly spaced (steps of {steps.min():.4f} to {steps.max():.4f} mm)"
        raise InputError(f"{path}: the DICOM slices are {says}; one is missing, there twice or out of line")
    series, rows, columns, unit, side, site, owner, *_ = first["same"]
    shape = (columns, rows, len(planes))
    spacing = (*first["size"][::-1], float(steps.mean()))
    affine = LPS @ grid(np.column_stack([first["axes"], normal]), spacing, planes[0]["place"])
    check_grid(path, shape, spacing, affine, sum(plane["stored"] for plane in planes))
    voxels = np.empty(shape[::-1], np.float32)
    for target, plane in zip(voxels, planes, strict=True):
        stored = guarded(plane["file"], "DICOM", pixel_array, plane["file"], index=plane["frame"], raw=True)
        np.multiply(stored, np.float32(plane["slope"]), out=target, casting="unsafe")
        target += np.float32(plane["intercept"])
    said = (unit, None, side, site, owner, hashed(series))
    return Found(voxels, tuple(float(s) for s in spacing[::-1]), affine, *said)


def _planes(file: Path) -> list[dict]:
    """The planes of one DICOM file, without their pixels."""
    import pydicom

    uid, syntax = pydicom.uid, pydicom.filereader.read_file_meta_info(file).TransferSyntaxUID
    deflated = syntax == uid.DeflatedExplicitVRLittleEndian
    if deflated or syntax.is_compressed and syntax != uid.RLELossless:
        raise InputError(f"{file}: this compression of DICOM is not read; accepted are none and run lengths")
    head = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=DICOM_TAGS)
    if head.SamplesPerPixel != 1:
        raise InputError(f"{file}: a scan has one number a voxel, but this DICOM file has {head.SamplesPerPixel}")
    count = int(head.get("NumberOfFrames") or 1)
    pixels, stored = int(head.Rows) * int(head.Columns), file.stat().st_size * 8 / head.BitsAllocated
    if count < 1 or count * pixels > stored * (RUNS if syntax.is_compressed else 1):
        raise InputError(f"{file}: not a readable DICOM file; it is cut off")
    side = {"L": "left", "R": "right"}.get(head.get("ImageLaterality") or head.get("Laterality"))
    part = str(head.get("BodyPartExamined") or "").strip().upper()
    site = None if part in NO_BONE else BONES.get(part, part.lower())
    owner = hashed(head.get("PatientID"))
    planes = []
    for frame in range(count):

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
        unit = "HU" if kind == "HU" or not kind and head.get("Modality") == "CT" else "mgHA" if is_mgha(kind) else None
        if unit is None and kind not in ("", "US", "MGML"):  # mg/ml of what?
            raise InputError(f"{file}: RescaleType {kind!r:.20} is not known; accepted are HU, mgHA, MGML, US and none")
        same = (head.SeriesInstanceUID, int(head.Rows), int(head.Columns), unit, side, site, owner)
        same += (tuple(np.round(axes.ravel(), 4)), tuple(np.round(size, 6)))
        plane = dict(file=file, frame=frame if count > 1 else None, axes=axes.T, size=size, stored=pixels, same=same)
        plane |= dict(slope=float(value("RescaleSlope", 1.0)), intercept=float(value("RescaleIntercept", 0.0)))
        planes.append(plane | dict(place=np.array(value("ImagePositionPatient"), float).reshape(3)))
    return planes
