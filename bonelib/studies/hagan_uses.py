"""What the codes of HA-GAN's encoder are good for: attributes read off them, and walks to a value that is asked."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bonelib.core.parallel import workers
from bonelib.core.pyramid import downsample
from bonelib.core.random import numpy_rng
from bonelib.evaluation.cohort_morphometry import COARSE_MM
from bonelib.evaluation.morphometry import measure_or_none
from bonelib.evaluation.statistics import of_rows, patient_interval
from bonelib.latent.directions import Direction, ridge_left_out
from bonelib.scans.config import Preprocess
from bonelib.scans.phantom.cohort import make_radius
from bonelib.scans.phantom.stacks import coarsened, middle_stack
from bonelib.scans.preprocessing import to_density
from bonelib.scans.volumes import Volume

FIRST = 300_000  # patients are the phantom's from this number on, whom no cohort holds and no network has seen
ATTRIBUTES = ("Tt.Ar", "Tt.BMD", "Tb.BMD", "BV/TV", "Tb.N", "Tb.Sp", "Ct.BMD", "Ct.Th")
FEWEST = 8  # patients, of which folds within folds can be made
PUBLISHED = {"log FEV1pp": 0.555, "FEV1/FVC": 0.657, "log %emphysema": 0.746}  # R2, Table VI of Sun et al. 2022


class Bones(NamedTuple):
    """Stacks on the grid of a generator (n, 1, z, y, x) in [0, 1], their `ATTRIBUTES` (n, 8), NaN where a bone could
    not be measured, and the names of their patients."""

    stacks: Tensor
    values: np.ndarray
    patients: list[str]


def draw_bones(count: int, given: Preprocess, spacing_mm: float, halvings: int, seed: int) -> Bones:
    """The middle stacks of phantoms of `count` patients, preprocessed as `given` says, on the grid of stacks of
    `spacing_mm` after so many halvings; and what morphometry measures in them, on voxels of `COARSE_MM` at most, on
    which they are drawn."""
    coarse, drawn_mm, left = coarsened(given, spacing_mm, halvings, COARSE_MM)
    numbers = range(FIRST, FIRST + count)
    with workers() as pool:
        jobs = [pool.submit(_drawn_and_measured, number, coarse, drawn_mm, seed) for number in numbers]
        found = [job.result() for job in jobs]
    stacks = torch.from_numpy(np.stack([stack for stack, _ in found]))[:, None]
    for _ in range(left):
        stacks = downsample(stacks)
    values = [[(traits or {}).get(name, np.nan) for name in ATTRIBUTES] for _, traits in found]
    return Bones(stacks, np.array(values, float), [f"phantom {number}" for number in numbers])


def _drawn_and_measured(patient: int, how: Preprocess, voxel_mm: float, seed: int) -> tuple[np.ndarray, dict | None]:
    bone, truth = make_radius(seed, voxel_mm=voxel_mm, patient=patient)
    stack = middle_stack(bone, truth["noise_sd"], how, seed, "noise of uses", patient)
    return stack, measure_or_none(Volume(to_density(stack, how.intensity), (voxel_mm,) * 3), anisotropy=False)


def explained(codes: Tensor, bones: Bones, *, seed: int, draws: int) -> tuple[list[dict], np.ndarray]:
    """How much of every attribute a ridge reads off codes (n, d) of patients that it was not fitted to.

    Rows: attribute, N, patients, R2 with its interval by patient; and the predictions (n, 8), NaN where a bone has no
    value. Of fewer bones than folds need, R2 is None.
    """
    rows, predicted = [], np.full(bones.values.shape, np.nan)
    for k, name in enumerate(ATTRIBUTES):
        known = np.isfinite(bones.values[:, k])
        values, patients = bones.values[known, k], [p for p, has in zip(bones.patients, known, strict=True) if has]
        row = {"attribute": name, "N": int(known.sum()), "patients": len(set(patients))}
        row |= {"R2": None, "R2 low": None, "R2 high": None}
        if len(set(patients)) >= FEWEST and np.ptp(values) > 0:
            kept = torch.from_numpy(known)
            guess = ridge_left_out(codes[kept], torch.from_numpy(values), patients).numpy()
            predicted[known, k] = guess
            rng = numpy_rng(seed, "explained", name)
            found = patient_interval(of_rows(share, values, guess), patients, rng=rng, draws=draws)
            row |= found.columns("R2")
        rows.append(row)
    return rows, predicted


def share(values: np.ndarray, predicted: np.ndarray) -> float:
    """R2: the share of the variance of values (n,) that predictions explain; NaN where all values are the same."""
    off = np.square(values - values.mean()).sum()
    return float(1 - np.square(predicted - values).sum() / off) if off > 0 else float("nan")


def walks(codes: Tensor, direction: Direction, targets: Tensor) -> Tensor:
    """Codes (n, m, d): each of `codes` (n, d) moved along a direction until it predicts each of `targets` (m,)."""
    room = (targets[None] - direction.value(codes)[:, None]) / direction.slope
    return codes[:, None] + room[..., None] * direction.vector


def dose_response(asked: np.ndarray, measured: np.ndarray, patients: list[str], *, seed: int, draws: int) -> dict:
    """What morphometry `measured` (n, m), NaN where it found no bone, where `asked` (m,) was predicted of n bones.

    The slope of measured over asked within bones, 1 if every bone obeys; the correlation within bones, 1 if they differ
    in their level alone; the mean distance of measured from asked, in SDs of what was asked; each with its interval by
    patient.
    """

    def found(rows):
        y = measured[rows]
        known = np.isfinite(y)
        x = np.where(known, np.broadcast_to(asked, y.shape), np.nan)
        a, b = (v - np.nanmean(v, 1, keepdims=True) for v in (x, y))
        square, other, both = np.nansum(a * a), np.nansum(b * b), np.nansum(a * b)
        apart = np.nanmean(np.abs(y - x)) / np.std(asked)
        return np.array([both / square, both / np.sqrt(square * other), apart]) if other > 0 else np.full(3, np.nan)

    seen = np.isfinite(measured).sum(1) > 1
    measured, patients = measured[seen], [p for p, has in zip(patients, seen, strict=True) if has]
    row = {"N": len(measured), "bones measured": int(np.isfinite(measured).sum())}
    names = ("slope", "correlation within bones", "distance in SDs")
    if not len(measured):
        return row | {f"{name}{end}": None for name in names for end in ("", " low", " high")}
    ends = patient_interval(found, patients, rng=numpy_rng(seed, "dose and response"), draws=draws)
    return row | ends.columns(*names)
