"""What a scan shows, whoever took it: whether its numbers can be densities, where the bone lies, and what is wrong.

All is read on means over about a quarter of a millimetre, which takes a second for a full scan. Lengths are in mm,
densities in mg HA/cm3.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from bonelib import InputError
from bonelib.scans.volumes import Volume

COARSE_MM = 0.25
SMOOTH_MM = 0.12
GREY_VALUES = 50  # fewer are those of a mask, or of densities that were rounded away
SOFT = (-250.0, 320.0)  # fat, water, muscle and marrow, with their noise; air is at -400
SOFT_MEDIAN = (-200.0, 250.0)
DENSE = 450.0  # what is denser is bone
CORTEX = (500.0, 1400.0)  # the upper quartile of dense bone; pure cortex has 900
LEAST_DENSE_MM2 = 1.0  # of dense bone in a mean slice
IMPOSSIBLE = -600.0  # less than air
BONE = 320.0
GAP_MM = 0.6  # half the width of a gap in the cortex that is bridged
BODY_MM = 1.5  # the radius is thicker than twice this, its contact with an ulna is not
CUT_MM = 1.0  # of the edge of the field, in a mean slice, that a bone may touch
CAST_MM2 = 30.0  # of a bone that lies apart within a ring
METAL, METAL_MM3 = 2000.0, 1.0
LONG_MM, WIDER, THINNER = 5.0, 1.1, 0.9  # how much an end must be wider, and its cortex thinner, to be the distal one
FLAGS = {"cut": "bone is cut by the field", "cast": "a cast is about the bone", "metal": "metal is in the field"}


class Picture(NamedTuple):
    """Density (z, y, x) over blocks of `step` voxels, spacing in mm, and the mask of the bone without an ulna."""

    density: np.ndarray
    spacing: tuple[float, float, float]
    step: tuple[int, int, int]
    bone: np.ndarray


def picture(volume: Volume) -> Picture:
    """The coarse view of a volume in mg HA/cm3 that the functions of this module look at."""
    step = tuple(min(n, max(1, int(COARSE_MM / s))) for n, s in zip(volume.shape, volume.spacing, strict=True))
    counts = [n // k for n, k in zip(volume.shape, step, strict=True)]
    density = np.empty(counts, np.float32)
    for i in range(counts[0]):  # in parts: a native scan is large
        part = volume.voxels[i * step[0] : (i + 1) * step[0], : counts[1] * step[1], : counts[2] * step[2]]
        blocks = part.reshape(step[0], counts[1], step[1], counts[2], step[2])
        density[i] = blocks.mean(axis=(0, 2, 4), dtype=np.float32)
    spacing = tuple(s * k for s, k in zip(volume.spacing, step, strict=True))
    density = ndimage.gaussian_filter(density, [SMOOTH_MM / s for s in spacing], mode="nearest")
    bone = _body(density > BONE, spacing)
    if _touches(bone, spacing):  # perhaps an ulna, where motion has opened the cortex of the radius
        other = _body(density > BONE, spacing, GAP_MM)
        bone = bone if _touches(other, spacing) else other
    return Picture(density, spacing, step, bone)


def is_mask(volume: Volume) -> bool:
    """Whether all voxels have one of two values."""
    low, high = volume.voxels.min(), volume.voxels.max()
    return low < high and all(((part == low) | (part == high)).all() for part in volume.voxels)


def check_densities(volume: Volume, seen: Picture) -> None:
    """Refuse numbers that cannot be mg HA/cm3; raises `InputError` with what was observed and what is accepted."""
    if says := _no_densities(volume, seen):
        raise InputError(f"as mg HA/cm3, {says} (see cohort.unit)")


def _no_densities(volume: Volume, seen: Picture) -> str | None:
    part = np.rint(volume.voxels[:: max(1, len(volume.voxels) // 16)]).clip(-32768, 32767).astype(np.int32)
    if (count := np.count_nonzero(np.bincount(part.ravel() + 32768))) < GREY_VALUES:
        low, high = float(volume.voxels.min()), float(volume.voxels.max())
        return f"its voxels have {count} whole values, from {low:g} to {high:g}; a scan has at least {GREY_VALUES}"
    density = seen.density
    dense = density[density > DENSE]
    if dense.size * seen.spacing[1] * seen.spacing[2] / len(density) < LEAST_DENSE_MM2:
        return f"nothing in it is as dense as bone, above {DENSE:g}; the highest has {density.max():.0f}"
    cortex = float(np.quantile(dense, 0.75))
    if not CORTEX[0] <= cortex <= CORTEX[1]:
        return f"dense bone has {cortex:.0f}; accepted are {CORTEX[0]:g} to {CORTEX[1]:g}"
    if (low := float(np.quantile(density, 0.01))) < IMPOSSIBLE:
        return f"its lowest values are {low:.0f}, but air has -400"
    soft = density[(density > SOFT[0]) & (density < SOFT[1])]
    middle = float(np.median(soft if soft.size else density))
    if soft.size < 0.05 * density.size or not SOFT_MEDIAN[0] <= middle <= SOFT_MEDIAN[1]:
        return f"what is not bone has {middle:.0f}; soft tissue has 0 to 150"
    return None


def flags(density: np.ndarray, bone: np.ndarray, spacing) -> list[str]:
    """What of `FLAGS` is true, so that a bone cannot be measured; `density` and the solid mask `bone` are (z, y, x)."""
    found = ["cut"] if _touches(bone, spacing) else []
    dense = (density > BONE) & bone
    if (rest := dense & ~largest(dense)).any():
        apart = _filled(largest(rest))
        if apart.sum() * spacing[1] * spacing[2] / len(bone) > CAST_MM2:
            found.append("cast")
    if (density > METAL).sum() * np.prod(spacing) > METAL_MM3:
        found.append("metal")
    return found


def check_axis(seen: Picture) -> None:
    """Refuse a bone that runs along y or x; raises `InputError`."""
    bone = largest(seen.density > BONE)
    through = [bool(bone.take(0, axis).any() and bone.take(-1, axis).any()) for axis in range(3)]
    if not through[0] and any(through[1:]):
        raise InputError(f"the bone runs along {'yx'[through[1:].index(True)]}, not along z (feet to head)")


def distal_end(seen: Picture) -> str | None:
    """Which end of z is wider with a thinner cortex, "first" or "last"; None where the shape does not tell."""
    n = len(seen.bone) // 3
    area = seen.bone.sum(axis=(1, 2)).astype(float)
    if n * seen.spacing[0] * 3 < LONG_MM or not (area > 0).all():
        return None
    cortex = ((seen.density > DENSE) & seen.bone).sum(axis=(1, 2)) / np.sqrt(area)
    wide, thick = (np.median(v[:n]) / max(np.median(v[-n:]), 1e-9) for v in (area, cortex))
    if wide > WIDER and thick < THINNER:
        return "first"
    return "last" if wide < 1 / WIDER and thick > 1 / THINNER else None


def bone_box(seen: Picture) -> tuple[slice, slice] | None:
    """Where the bone lies in the plane (y, x), in voxels of the volume; None where there is none."""
    found = ndimage.find_objects(seen.bone.any(axis=0).astype(np.int8))
    if not found:
        return None
    return tuple(slice(s.start * k, s.stop * k) for s, k in zip(found[0], seen.step[1:], strict=True))


def cut_off(seen: Picture, kept: tuple[slice, slice]) -> float:
    """The share of the bone outside of `kept`, a rectangle (y, x) in voxels of the volume."""
    inside = np.zeros(seen.bone.shape[1:], bool)
    inside[tuple(slice(round(s.start / k), round(s.stop / k)) for s, k in zip(kept, seen.step[1:], strict=True))] = True
    total = seen.bone.sum()
    return float((seen.bone & ~inside).sum() / total) if total else 0.0


def _touches(bone: np.ndarray, spacing) -> bool:
    """Whether a bone lies at the edge of the field in the plane."""
    _, y, x = spacing
    return bool((bone[:, :, [0, -1]].sum() * y + bone[:, [0, -1]].sum() * x) / len(bone) > CUT_MM)


def _body(bone: np.ndarray, spacing, gap: float = 0.0) -> np.ndarray:
    """The largest solid object: rings filled, also those that the field cuts open, and thin contacts severed.

    Gaps in a ring of up to twice `gap` mm are bridged.
    """
    bone = _dilated(bone, gap, spacing) if gap else bone
    solid = _filled(bone)
    for sides in ((0, 0), (0, 1), (1, 0), (1, 1)):
        walls = np.pad(bone, ((0, 0), (1, 1), (1, 1)))
        walls[:, -sides[0], :], walls[:, :, -sides[1]] = True, True
        solid |= _filled(walls)[:, 1:-1, 1:-1]
    cores = ~_dilated(~solid, BODY_MM + gap, spacing)
    return _dilated(largest(cores), BODY_MM, spacing) & solid if cores.any() else solid


def _filled(sections: np.ndarray) -> np.ndarray:
    return filled(np.pad(sections, ((0, 0), (1, 1), (1, 1))))[:, 1:-1, 1:-1]


def filled(sections: np.ndarray) -> np.ndarray:
    """Slices (z, y, x) without their holes; the corner of each lies outside."""
    in_slice = np.zeros((3, 3, 3), bool)
    in_slice[1] = ndimage.generate_binary_structure(2, 1)
    labels, _ = ndimage.label(~sections, in_slice)
    return labels != labels[:, :1, :1]


def largest(mask: np.ndarray, structure=None) -> np.ndarray:
    """The largest component of a mask, nothing of nothing; faces join voxels, or what `structure` says."""
    labels, _ = ndimage.label(mask, structure)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (labels == sizes.argmax()) & mask


def _dilated(sections: np.ndarray, radius: float, spacing) -> np.ndarray:
    """Slices grown by `radius` mm within themselves; beyond the field there is nothing."""
    near = [ndimage.distance_transform_edt(~s, spacing[1:]) <= radius if s.any() else s for s in sections]
    return np.stack(near)
