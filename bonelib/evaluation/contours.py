"""Contours of the distal radius in a calibrated scan: its outer surface, and the border of cortex and trabeculae.

Every size is in mm, so that one rule holds from the scanner's own grid (0.0607 mm) to a fourfold coarser one;
the numbers are the voxel counts of Buie et al. 2007 (Bone 41:505) at their spacing of 0.082 mm.
"""

import numpy as np
from scipy import ndimage

from bonelib import InputError
from bonelib.scans.volumes import Volume

SMOOTHING_MM = 0.0486  # 0.8 voxels at 0.0607 mm, before every threshold
BONE = 320.0  # mg HA/cm3: outer contour, and trabecular bone
CORTEX = 500.0  # mg HA/cm3: inner contour
BODY_MM = 1.5  # the radius is thicker than twice this, the rim of a cut ulna is not
CORNER_MM = 0.3  # how far a corner of the radius stands out of the discs of `BODY_MM` within it
CLOSING_MM = (0.6, 1.2, 2.4)  # outer contour: 15 voxels across, and wider where a gap lets the outside in
LEAK = 1.15  # a slice whose area grows by more under the wider closing was open
MARROW_MM = 0.41  # inner contour: closing and opening, 10 voxels across
CONTOUR_SMOOTHING_MM = 0.246  # inner contour: 3 voxels
LEAST_CORTEX_MM = 0.18  # peeled off the inside of the outer contour, so that the cortex never vanishes
RING = 0.9  # share of the outer contour that a closed ring of bone encloses
OPEN_SLICES = 0.1  # share of slices without enclosed marrow above which there is no closed cortex
CORTEX_OF_BONE = 0.5  # share of the cortical compartment above `BONE` under which it is no cortex


def contours(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Boolean masks (z, y, x) of what the periosteal and what the endosteal contour of the radius encloses.

    Dual threshold after Buie et al. 2007: the largest component of smoothed density above `BONE`, without an
    ulna in contact with it, is closed and filled slice by slice from the outside; in it, the largest
    component below `CORTEX` is closed, opened and smoothed. The cortex is the difference of the two. Raises
    `InputError` if the unit is not mg HA/cm3, if nothing is as dense as bone, and if no closed cortex is
    found.
    """
    return contours_in(smoothed(volume), volume.spacing)


def contours_in(density: np.ndarray, spacing) -> tuple[np.ndarray, np.ndarray]:
    """`contours` from density in mg HA/cm3 (z, y, x) that is `smoothed` already."""
    bone = _radius(density > BONE, spacing)
    if not bone.any():
        raise InputError(f"the volume holds no bone: nothing in it is denser than {BONE:g} mg HA/cm3")
    box = bounding_box(bone)
    outer = np.stack([_outer_contour(s, spacing[1:]) for s in bone[box]])
    inner = _inner_contour(density[box] < CORTEX, outer, spacing)
    open_slices = np.mean(~inner.any(axis=(1, 2)))
    of_bone = np.mean(bone[box][outer & ~inner])
    if open_slices > OPEN_SLICES or of_bone < CORTEX_OF_BONE:
        raise InputError(
            f"no closed cortex was found ({open_slices:.0%} of the slices enclose no marrow, {of_bone:.0%} "
            "of the would-be cortex is bone); a volume wholly inside trabecular bone is measured with "
            "compartments='trabecular'"
        )
    periosteal, endosteal = np.zeros((2, *density.shape), bool)
    periosteal[box], endosteal[box] = outer, inner
    return periosteal, endosteal


def closed_slices(volume: Volume, periosteal: np.ndarray) -> float:
    """Share of slices in which the cortex is a closed ring: bone above `BONE`, filled, makes up 90 % of the contour.

    Nothing is closed here, unlike in `contours`, which bridges gaps of some millimetres. `periosteal` is the outer
    mask (z, y, x).
    """
    bone = (smoothed(volume) > BONE) & periosteal
    closed = [
        _filled(np.pad(section, 1)).sum() >= RING * within.sum()
        for section, within in zip(bone, periosteal, strict=True)
        if within.any()
    ]
    return float(np.mean(closed)) if closed else 0.0


def smoothed(volume: Volume) -> np.ndarray:
    """Density (z, y, x) as every threshold wants it; `InputError` if it is not mg HA/cm3, or not finite."""
    if volume.unit != "mgHA":
        raise InputError(f"the volume is in {volume.unit}; morphometry needs calibrated density, unit mgHA")
    if not np.isfinite(volume.voxels).all():
        raise InputError("the volume holds NaN or infinite voxels; every voxel must be a number")
    return ndimage.gaussian_filter(
        volume.voxels.astype(np.float32, copy=False), [SMOOTHING_MM / s for s in volume.spacing], mode="nearest"
    )


def _radius(bone, spacing):
    """The largest component, without what only touches it, such as the ulna."""
    bone, plane = largest(bone), spacing[1:]
    if not bone.any():
        return bone
    box = bounding_box(bone)
    part = bone[box]
    cores = np.stack([_eroded(_filled(np.pad(s, 1)), BODY_MM, plane)[1:-1, 1:-1] for s in part])
    area = cores.sum(axis=(1, 2))
    for i in np.flatnonzero(area < area.max() / 2):  # an open cortex was not filled
        cores[i] = _eroded(np.pad(_outer_contour(part[i], plane), 1), BODY_MM, plane)[1:-1, 1:-1]
    for section, core in zip(part, largest(cores), strict=True):
        if core.any():
            section &= _distance_to(core, plane) <= BODY_MM + CORNER_MM
    return bone


def _outer_contour(bone, spacing):
    """One slice closed by the narrowest radius that keeps the outside out of the marrow, and filled."""
    margin = int(np.ceil(CLOSING_MM[-1] / min(spacing))) + 1
    bone = np.pad(bone, margin)
    away = _distance_to(bone, spacing)
    closings = {radius: _filled(away <= radius) for radius in CLOSING_MM}
    closings = {radius: _eroded(filled, radius, spacing) for radius, filled in closings.items()}
    widest = closings[CLOSING_MM[-1]].sum()
    closed = next(c for c in closings.values() if widest <= LEAK * c.sum())
    return closed[margin:-margin, margin:-margin]


def _inner_contour(marrow, outer, spacing):
    """The marrow within the outer contour, trabeculae closed, cortical pores opened, its border smooth."""
    plane = spacing[1:]
    margin = int(np.ceil(MARROW_MM / min(plane))) + 1
    half_voxel = min(plane) / 2  # distances reach to the centre of the first voxel outside
    deep = np.stack([_eroded(np.pad(s, 1), LEAST_CORTEX_MM + half_voxel, plane)[1:-1, 1:-1] for s in outer])
    inner = np.empty_like(outer)
    for i, section in enumerate(largest(marrow & deep)):
        section = np.pad(section, margin)
        closed = _eroded(_distance_to(section, plane) <= MARROW_MM, MARROW_MM, plane)
        opened = _distance_to(_eroded(closed, MARROW_MM, plane), plane) <= MARROW_MM
        inner[i] = _filled(opened)[margin:-margin, margin:-margin]
    inner = largest(inner).astype(np.float32)
    smooth = ndimage.gaussian_filter(inner, [CONTOUR_SMOOTHING_MM / s for s in spacing], mode="nearest")
    return (smooth > 0.5) & deep


def _distance_to(mask, spacing):
    """Distance in mm of every voxel to the mask; infinite when the mask is empty."""
    return ndimage.distance_transform_edt(~mask, spacing) if mask.any() else np.full(mask.shape, np.inf)


def _eroded(mask, radius, spacing):
    return ndimage.distance_transform_edt(mask, spacing) > radius


def _filled(section):
    """A slice without its holes; its corner lies outside."""
    outside, _ = ndimage.label(~section)
    return outside != outside[0, 0]


def largest(mask, structure=None):
    """The largest component of a mask; faces join voxels, or what `structure` says."""
    labels, _ = ndimage.label(mask, structure)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (labels == sizes.argmax()) & mask


def bounding_box(mask):
    """Slices about a mask that is not empty."""
    return ndimage.find_objects(mask.astype(np.int8))[0]
