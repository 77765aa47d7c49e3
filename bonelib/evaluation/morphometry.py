"""Contours of the distal radius in a calibrated scan, and what is measured within them.

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
    density = _smoothed(volume)
    bone = _radius(density > BONE, volume.spacing)
    if not bone.any():
        raise InputError(f"the volume holds no bone: nothing in it is denser than {BONE:g} mg HA/cm3")
    box = _bounding_box(bone)
    spacing = volume.spacing
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
    periosteal, endosteal = np.zeros((2, *volume.shape), bool)
    periosteal[box], endosteal[box] = outer, inner
    return periosteal, endosteal


def measure(volume: Volume, *, compartments=None) -> dict[str, float]:
    """Areas (mm2), densities (mg HA/cm3), BV/TV and thickness (mm) of one scan, by their usual names.

    `compartments` is None for `contours`, a pair of such masks, or 'trabecular' for a volume wholly inside
    trabecular bone, which has 'Tb.BMD' and 'BV/TV' alone. Tt.Ar is the mean area within the outer contour;
    BMD the mean unsmoothed density of a compartment, pores included; BV/TV the share above `BONE` of the
    trabecular one. Ct.Th is the mean over the cortical compartment of the distance to its inner plus that to
    its outer surface. Raises `InputError` as `contours`, and for masks that do not fit.
    """
    if isinstance(compartments, str):
        if compartments != "trabecular":
            raise InputError(f"compartments is {compartments!r}; accepted is 'trabecular', or two masks")
        return _trabecular(volume, np.ones(volume.shape, bool))
    outer, inner = contours(volume) if compartments is None else _fitting(compartments, volume)
    box = _bounding_box(outer)
    outer, inner = outer[box], inner[box]
    bone, cortex = Volume(volume.voxels[box], volume.spacing, volume.unit), outer & ~inner
    return {
        "Tt.Ar": float(outer.sum() / volume.shape[0] * volume.spacing[1] * volume.spacing[2]),
        "Tt.BMD": _mean(bone.voxels, outer),
        **_trabecular(bone, inner),
        "Ct.BMD": _mean(bone.voxels, cortex),
        "Ct.Th": _cortical_thickness(outer, inner, cortex, volume.spacing),
    }


def closed_slices(volume: Volume, periosteal: np.ndarray) -> float:
    """Share of slices in which the cortex is a closed ring: bone above `BONE`, filled, makes up 90 % of the contour.

    Nothing is closed here, unlike in `contours`, which bridges gaps of some millimetres. `periosteal` is the outer
    mask (z, y, x).
    """
    bone = (_smoothed(volume) > BONE) & periosteal
    closed = [
        _filled(np.pad(section, 1)).sum() >= RING * within.sum()
        for section, within in zip(bone, periosteal, strict=True)
        if within.any()
    ]
    return float(np.mean(closed)) if closed else 0.0


def _trabecular(volume, mask):
    return {"Tb.BMD": _mean(volume.voxels, mask), "BV/TV": float(np.mean(_smoothed(volume)[mask] > BONE))}


def _cortical_thickness(outer, inner, cortex, spacing):
    to_outer = ndimage.distance_transform_edt(np.pad(outer, ((0, 0), (1, 1), (1, 1))), spacing)[:, 1:-1, 1:-1]
    to_inner = ndimage.distance_transform_edt(~inner, spacing)
    # both distances end at the centre of the first voxel beyond its surface, half a voxel too far
    return float(np.mean((to_outer + to_inner)[cortex]) - (spacing[1] + spacing[2]) / 2)


def _mean(voxels, mask):
    return float(voxels[mask].mean(dtype=np.float64))


def _smoothed(volume):
    if volume.unit != "mgHA":
        raise InputError(f"the volume is in {volume.unit}; morphometry needs calibrated density, unit mgHA")
    if not np.isfinite(volume.voxels).all():
        raise InputError("the volume holds NaN or infinite voxels; every voxel must be a number")
    return ndimage.gaussian_filter(
        volume.voxels.astype(np.float32, copy=False), [SMOOTHING_MM / s for s in volume.spacing], mode="nearest"
    )


def _fitting(masks, volume):
    outer, inner = (np.asarray(m) for m in masks)
    for name, mask in (("periosteal", outer), ("endosteal", inner)):
        if mask.shape != volume.shape or mask.dtype != bool:
            raise InputError(f"the {name} mask is {mask.dtype} {mask.shape}; accepted is bool {volume.shape}")
    if (inner & ~outer).any() or not inner.any() or not (outer & ~inner).any():
        raise InputError("the endosteal mask must lie in the periosteal one, and both hold voxels")
    return outer, inner


def _radius(bone, spacing):
    """The largest component, without what only touches it, such as the ulna."""
    bone, plane = _largest(bone), spacing[1:]
    if not bone.any():
        return bone
    box = _bounding_box(bone)
    part = bone[box]
    cores = np.stack([_eroded(_filled(np.pad(s, 1)), BODY_MM, plane)[1:-1, 1:-1] for s in part])
    area = cores.sum(axis=(1, 2))
    for i in np.flatnonzero(area < area.max() / 2):  # an open cortex was not filled
        cores[i] = _eroded(np.pad(_outer_contour(part[i], plane), 1), BODY_MM, plane)[1:-1, 1:-1]
    for section, core in zip(part, _largest(cores), strict=True):
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
    for i, section in enumerate(_largest(marrow & deep)):
        section = np.pad(section, margin)
        closed = _eroded(_distance_to(section, plane) <= MARROW_MM, MARROW_MM, plane)
        opened = _distance_to(_eroded(closed, MARROW_MM, plane), plane) <= MARROW_MM
        inner[i] = _filled(opened)[margin:-margin, margin:-margin]
    inner = _largest(inner).astype(np.float32)
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


def _largest(mask):
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (labels == sizes.argmax()) & mask


def _bounding_box(mask):
    return ndimage.find_objects(mask.astype(np.int8))[0]
