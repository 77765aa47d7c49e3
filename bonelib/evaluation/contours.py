"""Contours of the distal radius in a calibrated scan: its outer surface, and the border of cortex and trabeculae.

Every size is in mm, so that one rule holds from the scanner's own grid (0.0607 mm) to a fourfold coarser one;
the numbers are the voxel counts of Buie et al. 2007 (Bone 41:505) at their spacing of 0.082 mm.
"""

import numpy as np
from scipy import ndimage

from bonelib import InputError
from bonelib.scans.plausibility import filled, largest
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

    Dual threshold after Buie et al. 2007: the largest component of smoothed density above `BONE`, without an ulna in
    contact with it, is closed and filled slice by slice; in it, the largest component below `CORTEX` is closed, opened
    and smoothed. Raises `InputError` if the unit is not mg HA/cm3, if nothing is as dense as bone, and if no closed
    cortex is found.
    """
    return contours_in(smoothed(volume), volume.spacing)


def contours_in(density: np.ndarray, spacing) -> tuple[np.ndarray, np.ndarray]:
    """`contours` from density in mg HA/cm3 (z, y, x) that is `smoothed` already."""
    bone = _radius(density > BONE, spacing)
    if not bone.any():
        raise InputError(f"the volume holds no bone: nothing in it is denser than {BONE:g} mg HA/cm3")
    box = bounding_box(bone)
    outer = _outer_contour(bone[box], spacing[1:])
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
    area = periosteal.sum(axis=(1, 2))
    closed = filled(_padded(bone, 1)).sum(axis=(1, 2)) >= RING * area
    return float(closed[area > 0].mean()) if area.any() else 0.0


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
    part = bone[bounding_box(bone)]
    cores = eroded(filled(_padded(part, 1)), BODY_MM, plane)[:, 1:-1, 1:-1]
    area = cores.sum(axis=(1, 2))
    open_ones = area < area.max() / 2  # an open cortex was not filled
    if open_ones.any():
        outer = _padded(_outer_contour(part[open_ones], plane), 1)
        cores[open_ones] = eroded(outer, BODY_MM, plane)[:, 1:-1, 1:-1]
    cores = largest(cores)
    part &= dilated(cores, BODY_MM + CORNER_MM, plane) | ~cores.any(axis=(1, 2), keepdims=True)
    return bone


def _outer_contour(bone, spacing):
    """Slices, each closed by the narrowest radius that keeps the outside out of the marrow, and filled."""
    margin = int(np.ceil(CLOSING_MM[-1] / min(spacing))) + 1
    bone = _padded(bone, margin)
    closings = np.stack([eroded(filled(dilated(bone, r, spacing)), r, spacing) for r in CLOSING_MM])
    areas = closings.sum(axis=(2, 3))
    narrowest = np.argmax(areas[-1] <= LEAK * areas, axis=0)
    return closings[narrowest, np.arange(len(bone)), margin:-margin, margin:-margin]


def _inner_contour(marrow, outer, spacing):
    """The marrow within the outer contour, trabeculae closed, cortical pores opened, its border smooth."""
    plane = spacing[1:]
    margin = int(np.ceil(MARROW_MM / min(plane))) + 1
    half_voxel = min(plane) / 2  # distances reach to the centre of the first voxel outside
    deep = eroded(_padded(outer, 1), LEAST_CORTEX_MM + half_voxel, plane)[:, 1:-1, 1:-1]
    marrow = _padded(largest(marrow & deep), margin)
    closed = eroded(dilated(marrow, MARROW_MM, plane), MARROW_MM, plane)
    opened = dilated(eroded(closed, MARROW_MM, plane), MARROW_MM, plane)
    inner = largest(filled(opened)[:, margin:-margin, margin:-margin]).astype(np.float32)
    smooth = ndimage.gaussian_filter(inner, [CONTOUR_SMOOTHING_MM / s for s in spacing], mode="nearest")
    return (smooth > 0.5) & deep


def dilated(mask, radius, spacing):
    """Every slice of a mask (z, y, x) grown by a disc of `radius` mm, with `spacing` that within the slices.

    Where the distance to the mask is at most the radius; eight slices, the bits of one byte, grow at once.
    """
    down, across = (np.arange(int(radius / s) + 2) * s for s in spacing)
    widths = (np.sqrt(down[:, None] ** 2 + across**2) <= radius).sum(1) - 1  # of the disc, to either side, by row
    rows, wide, width = mask.shape[1], np.packbits(mask, axis=0), 0
    grown = np.zeros_like(wide)
    for row in np.flatnonzero(widths[:rows] >= 0)[::-1]:  # from the disc's end to its middle, where it is widest
        for _ in range(widths[row] - width):
            wide[..., 1:] |= wide[..., :-1]
            wide[..., :-1] |= wide[..., 1:]
        width = widths[row]
        grown[:, row:] |= wide[:, : rows - row]
        grown[:, : rows - row] |= wide[:, row:]
    return np.unpackbits(grown, axis=0, count=len(mask)).view(bool)


def eroded(mask, radius, spacing):
    """Every slice less what lies within `radius` mm of its outside."""
    return ~dilated(~mask, radius, spacing)


def _padded(sections, margin):
    return np.pad(sections, ((0, 0), (margin, margin), (margin, margin)))


def bounding_box(mask):
    """Slices about a mask that is not empty."""
    return ndimage.find_objects(mask.astype(np.int8))[0]
