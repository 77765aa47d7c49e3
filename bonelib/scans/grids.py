"""What every reader of scan files answers with, and the checks that a grid must pass before voxels are read."""

import hashlib
import re
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import nibabel as nib
import numpy as np

from bonelib import InputError

SPACING_MM = (0.01, 2.0)  # outside of this a header is wrong, or the scan is of another kind
MAX_VOXELS = 2_304 * 2_304 * 400  # a full double-stack reconstruction; more is a damaged header
DEFLATE, RUNS = 1032, 64  # what deflate and run lengths can compress at most: a file that promises more is damaged
WATER_MGHA = 100  # water is at -5 in any right calibration; beyond this its numbers do not belong together
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # between the axes of DICOM and ITK, and the (right, anterior, superior) of NIfTI


@dataclass(frozen=True)
class Calibration:
    """Of one scanner, with mu in 1/cm: native = mu_scaling * mu, mgHA = slope * mu + intercept; mu_water for HU.

    Raises `InputError` where water would not lie near 0 mgHA, as with a slope that is meant per native count.
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
    """What a file says, as in `volumes.Volume`: `spacing` (z, y, x) in mm, `affine` from (x, y, z) to (right, anterior,
    superior); what it does not say is None.
    """

    voxels: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    unit: str | None = None
    calibration: Calibration | None = None
    side: str | None = None
    site: str | None = None
    owner: str | None = None
    series: str | None = None


def plain_name(path) -> str:
    """The name of a file without the version that VMS adds, as in SCAN.AIM;1."""
    return re.sub(r";\d+$", "", path.name)


def version(path) -> int:
    """The number of that version; 0 where there is none."""
    found = re.search(r";(\d+)$", path.name)
    return int(found[1]) if found else 0


def is_mgha(text: str) -> bool:
    """Whether a unit in a header is mg of hydroxyapatite in some spelling, as "mg HA/ccm"."""
    return re.sub("[^A-Z]", "", text.upper()).startswith("MGHA")


def hashed(number) -> str | None:
    """A patient's number from a header as a hash; None where there is none."""
    text = str(number or "").strip()
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text.strip("0") else None


def guarded(path, kind, function, *args, **options):
    """`function(...)`; its failures and warnings are not repeated, as they may quote names from a header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **options)
    except InputError:
        raise
    except Exception:
        raise InputError(f"{path}: not a readable {kind} file; it is damaged, cut off or of another kind") from None


def check_grid(path, shape, spacing, affine, stored: float) -> None:
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


def grid(axes, spacing, origin) -> np.ndarray:
    """Affine of voxels (x, y, z) whose axes are the columns of `axes`, `spacing` apart; `origin` is voxel 0."""
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(axes, float) * np.asarray(spacing, float)
    affine[:3, 3] = origin
    return affine


def canonical(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (z, y, x) and their affine with x to the right, y forwards, z upwards; none is moved or interpolated."""
    turns = nib.io_orientation(affine)
    turned = nib.apply_orientation(voxels.T, turns).T
    return turned, affine @ nib.orientations.inv_ornt_aff(turns, voxels.shape[::-1])


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Spacing in mm (z, y, x) of the grid of an affine."""
    return tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0)[::-1])
