"""A scan as voxels with spacing, affine, unit and calibration; reading, converting, mirroring and writing.

Axes are (z, y, x) throughout, z the long axis of the bone; files keep (x, y, z) on disk. Readers are in `formats`.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from bonelib import InputError
from bonelib.core.files import write_whole
from bonelib.scans.formats import format_of, read_file
from bonelib.scans.grids import Calibration, canonical, spacing_of

UNITS = ("mgHA", "native", "mu", "HU")
SIDES = ("left", "right")
WRITTEN = (".nii", ".nii.gz")
NEEDS = {"mgHA": ("slope", "intercept"), "native": ("mu_scaling",), "mu": (), "HU": ("mu_water",)}


@dataclass(frozen=True)
class Volume:
    """A scan: `voxels` (z, y, x), `spacing` in mm (z, y, x), `unit`, and what else is known of it.

    `affine` (4, 4) takes the (x, y, z) file grid to mm in (right, anterior, superior), as in NIfTI. `calibration` is
    of the scanner; `side` is left or right; `site` is the bone that the header names, `owner` and `series` hashes of
    the numbers of patient and series there. Each is None where it is not known.
    """

    voxels: np.ndarray
    spacing: tuple[float, float, float]
    unit: str = "mgHA"
    affine: np.ndarray | None = None
    calibration: Calibration | None = None
    side: str | None = None
    site: str | None = None
    owner: str | None = None
    series: str | None = None

    def __post_init__(self):
        if self.voxels.ndim != 3:
            raise InputError(f"a volume has 3 axes (z, y, x), but these voxels have shape {self.voxels.shape}")
        if self.unit not in UNITS:
            raise InputError(f"unit {self.unit!r} is not known; accepted are {', '.join(UNITS)}")
        if self.side not in (None, *SIDES):
            raise InputError(f"side {self.side!r} is not known; accepted are {', '.join(SIDES)}")
        if self.affine is None:
            object.__setattr__(self, "affine", np.diag([*self.spacing[::-1], 1.0]))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.voxels.shape

    @property
    def extent_mm(self) -> tuple[float, float, float]:
        """Edge lengths in mm (z, y, x)."""
        return tuple(n * s for n, s in zip(self.shape, self.spacing, strict=True))

    def with_voxels(self, voxels: np.ndarray) -> "Volume":
        """The same place and unit with other values of the same shape."""
        if voxels.shape != self.shape:
            raise InputError(f"voxels of shape {voxels.shape} do not fit the grid {self.shape}")
        return replace(self, voxels=voxels)


def regrid(volume: Volume, voxels: np.ndarray, start: tuple[float, ...], step: int = 1) -> Volume:
    """`voxels` laid on the grid that begins at voxel `start` (z, y, x) of `volume` and is `step` times coarser.

    The affine follows: voxel 0 of a coarser grid sits at the mean position of the `step` voxels it averages.
    """
    offset = np.asarray(start[::-1], float) + (step - 1) / 2
    moved = np.eye(4)
    moved[:3, :3] *= step
    moved[:3, 3] = offset
    spacing = tuple(s * step for s in volume.spacing)
    return replace(volume, voxels=voxels, spacing=spacing, affine=volume.affine @ moved)


def read_volume(
    path: str | Path, *, unit: str | None = None, calibration: Calibration | None = None, fallback: bool = False
) -> Volume:
    """Read NIfTI, MetaImage, NRRD, AIM, ISQ or DICOM (a folder of slices, or one multi-frame file).

    Unit and calibration come from the header. Where it has none, `unit` (one of `UNITS`) must be given, and
    `calibration` may be; where it has one, another one given is an error, unless they are a mere `fallback` for a
    folder of mixed files. NIfTI is brought to its canonical orientation, others are as they lie in the file (see
    `oriented`). Voxels are float32, or the int16 counts of AIM and ISQ (1.8 GB of a full one; `convert` adds 3.6).

    Raises `InputError`, one sentence naming the file: it is missing, damaged or of another kind, the unit is unknown
    or contradicts the header, the spacing is outside of 0.01-2 mm, or voxels are not finite.
    """
    path = Path(path)
    found = read_file(path)
    if found.unit is None and unit not in UNITS:
        given = "none" if unit is None else repr(unit)
        says = f"{format_of(path)} carries no density unit here, and {given} was given"
        raise InputError(f"{path}: {says}; accepted are {', '.join(UNITS)}")
    if found.unit and unit and unit != found.unit and not fallback:
        raise InputError(f"{path}: the header says that the unit is {found.unit}, but {unit!r} was given")
    if found.calibration and calibration and calibration != found.calibration and not fallback:
        raise InputError(f"{path}: the header has a calibration of its own, but another one was given")
    known = (found.unit or unit, found.affine, found.calibration or calibration)
    return Volume(found.voxels, found.spacing, *known, found.side, found.site, found.owner, found.series)


def convert(volume: Volume, unit: str) -> Volume:
    """The same scan in another unit, as float32; each is a line in mu (1/cm) that the scanner's calibration gives.

    Raises `InputError` naming what of the calibration is missing.
    """
    if unit not in UNITS:
        raise InputError(f"unit {unit!r} is not known; accepted are {', '.join(UNITS)}")
    if unit == volume.unit:
        return volume
    known = volume.calibration or Calibration()
    missing = [name for name in (*NEEDS[volume.unit], *NEEDS[unit]) if getattr(known, name) is None]
    if missing:
        raise InputError(f"from {volume.unit} to {unit} needs the scanner's {', '.join(missing)}, which is not known")
    (gain, offset), (new_gain, new_offset) = _line(volume.unit, known), _line(unit, known)
    voxels = volume.voxels.astype(np.float32)
    voxels *= np.float32(new_gain / gain)
    voxels += np.float32(new_offset - offset * new_gain / gain)
    return replace(volume, voxels=voxels, unit=unit)


def _line(unit: str, known: Calibration) -> tuple[float, float]:
    """Gain and offset of `unit` over mu in 1/cm."""
    if unit == "HU":
        return 1000 / known.mu_water, -1000.0
    if unit == "mgHA":
        return known.slope, known.intercept
    return (known.mu_scaling if unit == "native" else 1.0), 0.0


def oriented(volume: Volume) -> Volume:
    """The same scan in the same place with x to the right, y forwards and z upwards (the closest canonical axes), so
    that voxels of scans can be compared. None is interpolated.
    """
    voxels, affine = canonical(volume.voxels, volume.affine)
    return replace(volume, voxels=voxels, affine=affine, spacing=spacing_of(affine))


def mirrored(volume: Volume) -> Volume:
    """A left bone as a right one, or the reverse: the grid is mirrored along x, the patient's left to right.

    What was at (r, a, s) mm is now at (-r, a, s), and a right-handed grid stays right-handed.
    """
    world = np.diag([-1.0, 1.0, 1.0, 1.0])
    side = {"left": "right", "right": "left"}.get(volume.side)
    return replace(volume, voxels=volume.voxels[:, :, ::-1], affine=world @ volume.affine @ _turn(volume, 0), side=side)


def upside_down(volume: Volume) -> Volume:
    """The scan of an arm that lay the other way: half a turn about the vertical, y, so that z and x run back."""
    world = np.diag([-1.0, 1.0, -1.0, 1.0])
    affine = world @ volume.affine @ _turn(volume, 0) @ _turn(volume, 2)
    return replace(volume, voxels=volume.voxels[::-1, :, ::-1], affine=affine)


def _turn(volume: Volume, axis: int) -> np.ndarray:
    """From the (x, y, z) grid turned round along `axis` to the grid of `volume`."""
    turn = np.eye(4)
    turn[axis, axis] = -1
    turn[axis, 3] = volume.shape[::-1][axis] - 1
    return turn


def write_volume(volume: Volume, path: str | Path) -> Path:
    """Write a NIfTI file (int16 steps of one unit for densities, float32 otherwise) with sform, qform and mm.

    The file appears whole or not at all. Raises `InputError` for voxels that are no numbers.
    """
    path = Path(path)
    if not path.name.lower().endswith(WRITTEN):
        raise InputError(f"{path}: this kind of file is not written; accepted are {', '.join(WRITTEN)}")
    dtype = np.int16 if volume.unit in ("mgHA", "HU", "native") else np.float32
    voxels = np.empty(volume.shape, dtype)
    for target, part in zip(voxels, volume.voxels, strict=True):  # slice by slice: a native scan is large
        if not np.isfinite(part).all():
            raise InputError(f"{path}: not written, as voxels are NaN or infinite; every voxel must be a number")
        target[:] = np.rint(part).clip(-32768, 32767) if dtype == np.int16 else part
    image = nib.Nifti1Image(voxels.T, volume.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.affine, 2)
    image.set_qform(volume.affine, 2)
    write_whole(path, lambda part: nib.save(image, part))
    return path
