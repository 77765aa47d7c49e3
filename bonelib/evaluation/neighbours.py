"""Neighbours of voxels by flat index, in parts that stay near the processor."""

from itertools import product

import numpy as np

CHUNK = 1 << 16  # voxels looked at, or painted, at a time: their numbers stay near the processor
DIRECTIONS = np.array([d for d in product((-1, 0, 1), repeat=3) if d > (0, 0, 0)])
DIRECTIONS = DIRECTIONS[np.argsort(np.abs(DIRECTIONS).sum(1), kind="stable")]  # axes first: they sort out most


def gradient_at(values: np.ndarray, voxels: np.ndarray, spacing) -> np.ndarray:
    """Direction (n, 3) in which `values` (z, y, x) rise at voxels (flat indices) off the border, after Sobel."""
    flat, steps = values.ravel(), steps_of(values.shape)
    gradient = np.zeros((len(voxels), 3), np.float32)
    for part in parts_of(voxels):
        for direction in DIRECTIONS:
            step, weight = int(direction @ steps), 2.0 ** -np.abs(direction).sum()
            difference = flat[voxels[part] + step] - flat[voxels[part] - step]
            gradient[part] += difference[:, None] * (weight * direction / spacing).astype(np.float32)
    return gradient


def steps_of(shape) -> np.ndarray:
    """Steps in the flat index along each axis."""
    return np.array([shape[1] * shape[2], shape[2], 1])


def parts_of(voxels) -> list[slice]:
    """Slices of `CHUNK` voxels."""
    return [slice(start, start + CHUNK) for start in range(0, max(1, len(voxels)), CHUNK)]
