"""A scan as voxels with spacing, affine and unit; reading and writing of NIfTI files.

Axes are (z, y, x) throughout, z the long axis of the bone; NIfTI files keep (x, y, z) on disk.
"""

import gzip
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from bonelib import InputError

UNITS = ("mgHA", "native", "mu", "HU")
ENDINGS = (".nii", ".nii.gz")
SPACING_MM = (0.01, 2.0)  # outside of this a header is wrong, or the scan is of another kind
MAX_VOXELS = 2_304 * 2_304 * 400  # a full double-stack reconstruction; more is a damaged header


@dataclass(frozen=True)
class Volume:
    """A scan: `voxels` (z, y, x), `spacing` in mm (z, y, x), `affine` (4, 4) of the (x, y, z) file grid, `unit`."""

    voxels: np.ndarray
    spacing: tuple[float, float, float]
    unit: str = "mgHA"
    affine: np.ndarray | None = None

    def __post_init__(self):
        if self.voxels.ndim != 3:
            raise InputError(f"a volume has 3 axes (z, y, x), but these voxels have shape {self.voxels.shape}")
        if self.unit not in UNITS:
            raise InputError(f"unit {self.unit!r} is not known; accepted are {', '.join(UNITS)}")
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
    return Volume(voxels, spacing, volume.unit, volume.affine @ moved)


def is_scan(path: Path) -> bool:
    """Whether the name is one that `read_volume` takes."""
    return path.name.lower().endswith(ENDINGS)


def read_volume(path: str | Path, *, unit: str | None = None) -> Volume:
    """Read a NIfTI scan. The format carries no density unit, so `unit` must be given (one of `UNITS`).

    Raises `InputError`, naming the file, for a missing or damaged file, a grid that is not three-dimensional,
    a spacing outside of 0.01-2 mm, and voxels that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if not is_scan(path):
        raise InputError(f"{path}: this kind of file is not read; accepted are {', '.join(ENDINGS)}")
    if unit not in UNITS:
        raise InputError(
            f"{path}: NIfTI carries no density unit, and {unit!r} was given; accepted are {', '.join(UNITS)}"
        )
    try:
        image = nib.load(path)
        shape = tuple(n for n in image.shape if n != 1) if len(image.shape) > 3 else image.shape
        if len(shape) != 3 or min(shape) < 1:
            raise InputError(f"{path}: a scan has three axes, but the file has shape {image.shape}")
        if np.prod(shape, dtype=float) > MAX_VOXELS:
            raise InputError(f"{path}: the header announces {shape} voxels, more than any scan of this kind holds")
        spacing = tuple(float(s) for s in image.header.get_zooms()[:3][::-1])
        raw_spacing = [float(abs(s)) for s in image.header["pixdim"][1:4]]
        if not all(SPACING_MM[0] <= s <= SPACING_MM[1] for s in raw_spacing):
            raise InputError(f"{path}: voxel spacing {raw_spacing} mm is outside of {SPACING_MM[0]}-{SPACING_MM[1]} mm")
        if not np.isfinite(image.affine).all():
            raise InputError(f"{path}: the affine in the header is not finite")
        voxels = np.asarray(image.dataobj, dtype=np.float32).reshape(shape).T
        _check_gzip(path)
    except InputError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        OverflowError,
        MemoryError,
        zlib.error,
        nib.filebasedimages.ImageFileError,
        nib.spatialimages.HeaderDataError,
    ) as error:
        raise InputError(
            f"{path}: not a readable NIfTI file ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from None
    bad = int(np.size(voxels) - np.isfinite(voxels).sum())
    if bad:
        raise InputError(f"{path}: {bad} of {voxels.size} voxels are NaN or infinite; every voxel must be a number")
    return Volume(np.ascontiguousarray(voxels), spacing, unit, np.array(image.affine, float))


def _check_gzip(path: Path) -> None:
    """Read a compressed file to its end, so that its checksum is looked at (nibabel stops before it)."""
    if path.name.lower().endswith(".gz"):
        with gzip.open(path) as stream:
            while stream.read(1 << 24):
                pass


def write_volume(volume: Volume, path: str | Path) -> Path:
    """Write a NIfTI file (int16 steps of one unit for densities, float32 otherwise) with sform, qform and mm.

    The file appears whole or not at all.
    """
    path = Path(path)
    if not is_scan(path):
        raise InputError(f"{path}: this kind of file is not written; accepted are {', '.join(ENDINGS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.int16 if volume.unit in ("mgHA", "HU", "native") else np.float32
    voxels = np.rint(volume.voxels).clip(-32768, 32767) if dtype == np.int16 else volume.voxels
    image = nib.Nifti1Image(voxels.astype(dtype).T, volume.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.affine, 2)
    image.set_qform(volume.affine, 2)
    part = path.with_name(f".part-{path.name}")
    nib.save(image, part)
    os.replace(part, path)
    return path
