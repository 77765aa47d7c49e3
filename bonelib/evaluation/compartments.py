"""What the contours alone tell of a bone: its outline, its area, and the densities of its two compartments."""

from typing import NamedTuple

import numpy as np

from bonelib import InputError
from bonelib.evaluation.contours import closed_slices, contours
from bonelib.scans.volumes import Volume

CLOSED = "closed slices"
TRAITS = ("Tt.Ar", "Tb.BMD", "Ct.BMD", CLOSED)


class Reading(NamedTuple):
    """The mask (z, y, x) within the outer contour, and `TRAITS` by name in mm2 and mg HA/cm3 (NaN: no contours).

    The share of closed slices tells how far the densities can be trusted: contours bridge the gaps of an open cortex
    by force, and may count cortex as marrow.
    """

    outline: np.ndarray
    traits: dict[str, float]


def read(volume: Volume) -> Reading:
    """The reading of one bone; where no contours are found, its outline is empty and its traits are NaN.

    By the contours and definitions of `morphometry.measure`, without the thicknesses that take most of its time.
    """
    try:
        outer, inner = contours(volume)
    except InputError:
        return Reading(np.zeros(volume.shape, bool), dict.fromkeys(TRAITS, float("nan")))
    _, y, x = volume.spacing
    found = (
        outer.sum() / len(outer) * y * x,
        volume.voxels[inner].mean(dtype=np.float64) if inner.any() else np.nan,
        volume.voxels[outer & ~inner].mean(dtype=np.float64),
        closed_slices(volume, outer),
    )
    return Reading(outer, dict(zip(TRAITS, map(float, found), strict=True)))


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Voxels in both masks over those in either, of two masks of one shape; NaN where one of them is empty."""
    return float((a & b).sum() / (a | b).sum()) if a.any() and b.any() else float("nan")
