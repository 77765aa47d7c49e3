"""Slice stacks of phantoms straight on the grid of a network, without a cohort on disk."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bonelib.core.parallel import workers
from bonelib.core.pyramid import downsample
from bonelib.core.random import numpy_rng
from bonelib.scans.config import Preprocess
from bonelib.scans.phantom.cohort import make_radius
from bonelib.scans.phantom.population import Course
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


def draw_visits(
    patients: Sequence[int],
    visits: Sequence[int],
    course: Course,
    how: Preprocess,
    spacing_mm: float,
    halvings: int,
    voxel_mm: float,
    seed: int,
) -> tuple[Tensor, list[list[dict]]]:
    """Middle stacks of `visits` of `patients`, by number, as `course` says: (patient, visit, 1, z, y, x) in [0, 1].

    They are preprocessed as `how` says, on the grid of stacks of `spacing_mm` averaged over blocks of 2^`halvings`
    voxels a side, and drawn on voxels of `voxel_mm` at most where that is coarser. Also the truth of each. Pose, field
    of view and noise are every visit's own.
    """
    coarse, drawn_mm, left = coarsened(how, spacing_mm, halvings, voxel_mm)
    with workers() as pool:
        jobs = [pool.submit(_visits_of, patient, visits, course, coarse, drawn_mm, seed) for patient in patients]
        found = [job.result() for job in jobs]
    stacks = downsample(torch.from_numpy(np.concatenate([stacks for stacks, _ in found]))[:, None], left)
    return stacks.unflatten(0, (len(patients), len(visits))), [truths for _, truths in found]


def _visits_of(patient, visits, course, how, voxel_mm, seed) -> tuple[np.ndarray, list[dict]]:
    """The stacks of a patient (visit, z, y, x), and their truths."""
    stacks, truths = [], []
    for visit in visits:
        bone, truth = make_radius(seed, voxel_mm=voxel_mm, patient=patient, visit=visit, course=course)
        stacks.append(middle_stack(bone, truth["noise_sd"], how, seed, "noise of visits", patient, visit))
        truths.append(truth)
    return np.stack(stacks), truths
