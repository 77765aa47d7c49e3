"""Slice stacks of phantoms straight on the grid of a network, without a cohort on disk."""

import math

import numpy as np

from bonelib.core.random import numpy_rng
from bonelib.scans.config import Preprocess
from bonelib.scans.phantom.scanner import scan
from bonelib.scans.preprocessing import preprocess, to_unit
from bonelib.scans.volumes import Volume, mirrored


def coarsened(how: Preprocess, spacing_mm: float, halvings: int, voxel_mm: float) -> tuple[Preprocess, float, int]:
    """`how`, for scans whose voxels are as long as those of stacks averaged by up to `halvings`, `voxel_mm` at most.

    `spacing_mm` is that of the stacks. Also the length of these voxels in mm, and the halvings that are left.
    """
    drawn = min(halvings, int(math.log2(max(1.0, voxel_mm / spacing_mm))))
    shape = tuple(n // (how.subsample * 2**drawn) for n in how.shape)
    coarse = how.model_copy(update=dict(shape=shape, subsample=1, stack_slices=how.stack_slices // 2**drawn))
    return coarse, spacing_mm * 2**drawn, halvings - drawn


def middle_stack(bone: Volume, noise_sd: float, how: Preprocess, *key) -> np.ndarray:
    """The middle stack of a scan of a phantom (z, y, x) in [0, 1], as a right bone; `key` is that of its noise."""
    seen = scan(bone, numpy_rng(*key), noise_sd=noise_sd)
    voxels = preprocess(mirrored(seen) if seen.side == "left" else seen, how).voxels
    start = (len(voxels) - how.stack_slices) // 2
    return to_unit(voxels[start : start + how.stack_slices], how.intensity).astype(np.float32)
