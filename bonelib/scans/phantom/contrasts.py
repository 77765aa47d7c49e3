"""Slices of phantoms in two contrasts: mineral as the scanner shows it, and the soft tissue of the same anatomy.

The second one stands for T2-weighted magnetic resonance: fat and yellow marrow are bright, muscle is dark, bone and
tendon are black. It has its own blur, noise and smooth bias field; no scan of a person was looked at.
"""

import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from bonelib import InputError
from bonelib.core.config import fingerprint
from bonelib.core.parallel import workers
from bonelib.core.random import numpy_rng
from bonelib.scans.dataset import Stacks
from bonelib.scans.phantom.anatomy import BOX, HEIGHT_MM
from bonelib.scans.phantom.random_fields import sample, smooth_noise
from bonelib.scans.phantom.rendering import OUTSIDE, draw_centred
from bonelib.scans.phantom.scanner import scan
from bonelib.scans.preprocessing import block_means, slice_stacks, to_unit
from bonelib.scans.volumes import Volume, read_volume

FIRST = 300_000  # patients are the phantom's from this number on, whom no cohort holds
CONTRASTS = ("mineral", "soft tissue")
FIELD_MM = (HEIGHT_MM, 35.47, 28.38)  # (z, y, x), 23 x 80 x 64 voxels of .443 mm; the wrist's coordinates end there
INTENSITY = (-500.0, 1500.0)  # mg HA/cm3 at 0 and 1
BRIGHTEST = 1.25  # signal of the second contrast at 1; that of fat is 1
# Signal of what surrounds the bones, by its density in mg HA/cm3 (`anatomy`): air, fat, septa, muscle, tendon, bone
SOFT = ((-398.6, -60.0, -50.0, -35.0, 5.0, 12.0, 15.0, 20.0, 150.0), (0.0, 1.0, 1.0, 0.8, 0.36, 0.34, 0.22, 0.1, 0.03))
MARROW = (0.65, 0.95)  # signal of marrow, from patient to patient: X-rays do not tell it
BONE = 0.03
BLUR_MM, NOISE = 0.25, 0.035  # Gaussian SD, and SD of either channel of the noise
BIAS, BIAS_MM = 0.15, 25.0  # SD of the logarithm of the field, and its length


class Slices(NamedTuple):
    """Both contrasts of patients, as stacks of one slice: row 2 k is mineral, row 2 k + 1 soft tissue of the same
    anatomy. Beside scan, patient and split, rows have contrast, sex, and position, from 0 (distal) to 1."""

    stacks: Stacks
    people: list[dict]


def draw_pair(seed: int, number: int, sex: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Both contrasts (2, z, y, x) of a patient in [0, 1] on a grid of `shape` over `FIELD_MM`, float32.

    They are drawn on half the voxels, blurred there, and averaged.
    """
    drawn = draw_centred(seed, number, HEIGHT_MM / shape[0] / 2, [2 * n for n in shape], sex=sex)
    mineral = scan(drawn.volume, numpy_rng(seed, "noise of slices", number), noise_sd=drawn.truth["noise_sd"])
    soft = soft_tissue(drawn.volume, drawn.compartments, drawn.bone, seed, number)
    signal = _noisy(block_means(soft, 2), numpy_rng(seed, "noise of soft tissue", number)) / BRIGHTEST
    return np.stack([to_unit(block_means(mineral.voxels, 2), INTENSITY), signal.clip(0, 1)]).astype(np.float32)


def soft_tissue(density: Volume, compartments: np.ndarray, bone: np.ndarray, seed: int, number: int) -> np.ndarray:
    """Signal (z, y, x) of the second contrast without noise, fat at 1; `bone` is the bone fraction of voxels."""
    rng = numpy_rng(seed, "soft tissue", number)
    marrow = rng.uniform(*MARROW)
    within = marrow + (BONE - marrow) * bone
    signal = np.where(compartments == OUTSIDE, np.interp(density.voxels, *SOFT), within)
    signal = gaussian_filter(signal, [BLUR_MM / mm for mm in density.spacing], mode="nearest")
    field = smooth_noise(rng, BOX, BIAS_MM)
    axes = [torch.linspace(low, high, n) for low, high, n in zip(*BOX, signal.shape, strict=True)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    return signal * np.exp(BIAS * sample(field, points)[0].numpy())


def draw_slices(
    seed: int, patients: int, shape: tuple[int, int, int], women: float, trained: int | None = None
) -> Slices:
    """Paired slices of `patients`, the share `women` of them women; every fourth one is held out. With `trained`, no
    more than so many of the others are drawn, evenly spaced."""
    sexes = ["F" if int(women * (i + 1) + 1e-9) > int(women * i + 1e-9) else "M" for i in range(patients)]
    known = [i for i in range(patients) if i % 4 != 3]
    if trained and trained < len(known):
        known = [known[k] for k in np.linspace(0, len(known) - 1, trained).round().astype(int)]
    drawn = sorted({*known, *range(3, patients, 4)})
    with workers() as pool:
        jobs = [pool.submit(draw_pair, seed, FIRST + i, sexes[i], shape) for i in drawn]
        volumes = np.concatenate([job.result() for job in jobs]).astype(np.float16)
    rows, people = [], []
    for k, i in enumerate(drawn):
        person = {"patient": f"phantom {FIRST + i}", "sex": sexes[i]}
        person["split"] = "held-out" if i % 4 == 3 else "train"
        people.append(person)
        for z in range(shape[0]):
            for c, contrast in enumerate(CONTRASTS):
                place = {"scan": f"{person['patient']} {contrast}", "volume": 2 * k + c, "start": z}
                rows.append(person | place | {"contrast": contrast, "position": z / (shape[0] - 1)})
    meta = {
        "spacing_mm": [mm / n for mm, n in zip(FIELD_MM, shape, strict=True)],
        "intensity": list(INTENSITY), "shape": list(shape), "stack_slices": 1, "unit": "mgHA", "phantoms": True,
        "data_hash": hashlib.sha256(volumes.tobytes()).hexdigest()[:16],
    }  # fmt: skip
    return Slices(Stacks(volumes, rows, meta), people)


def grid_over_field(height: int, width: int) -> tuple[int, int, int]:
    """The grid (z, y, x) over `FIELD_MM` that has these voxels in plane, of voxels as high as they are wide."""
    return math.ceil(FIELD_MM[0] / min(FIELD_MM[1] / height, FIELD_MM[2] / width)), height, width


def stacks_of(slices: Slices, contrast: str, depth: int, count: int) -> Stacks:
    """One contrast as volumes: `count` overlapping stacks of `depth` slices of every patient. Raises `InputError` where
    these do not cover the volumes."""
    number = CONTRASTS.index(contrast)
    volumes, meta = slices.stacks.volumes[number :: len(CONTRASTS)], slices.stacks.meta
    rows = [
        person | {"scan": f"{person['patient']} {contrast}", "volume": k, "start": start}
        for k, person in enumerate(slices.people)
        for start in slice_stacks(volumes.shape[1], depth, count)
    ]
    found = fingerprint(meta["data_hash"], number, depth, count)
    return Stacks(volumes, rows, meta | {"stack_slices": depth, "data_hash": found})


def given_pair(files: tuple[str, str], shape: tuple[int, int, int]) -> tuple[Stacks, list[dict]]:
    """Two registered scans of one person as paired slices: mineral, read in mg HA/cm3 where the file does not say
    otherwise, and soft tissue, of which the brightest voxels (1 %) become 1. Both are read about their middles, on the
    field and grid of the phantom's slices. Raises `InputError` for scans that are not there, or of two grids."""
    scans = [read_volume(file, unit=unit) for file, unit in zip(files, ("mgHA", "native"), strict=True)]
    if scans[0].shape != scans[1].shape:
        says = f"{files[1]} has the grid {scans[1].shape}; accepted is that of {files[0]}, {scans[0].shape}"
        raise InputError(f"two_contrasts.pair: {says}")
    mm = [length / n for length, n in zip(FIELD_MM, shape, strict=True)]
    fields = []
    for scanned in scans:
        ratio = [new / old for new, old in zip(mm, scanned.spacing, strict=True)]
        smooth = gaussian_filter(np.asarray(scanned.voxels, np.float32), [max(0.0, (r - 1) / 2) for r in ratio])
        each = zip(shape, ratio, smooth.shape, strict=True)
        places = [(np.arange(n) - (n - 1) / 2) * r + (m - 1) / 2 for n, r, m in each]
        fields.append(map_coordinates(smooth, np.meshgrid(*places, indexing="ij"), order=1, mode="nearest"))
    brightest = max(float(np.quantile(fields[1], 0.99)), 1e-9)
    volumes = np.stack([to_unit(fields[0], INTENSITY), (fields[1] / brightest).clip(0, 1)]).astype(np.float16)
    rows = [
        {"patient": "own", "scan": files[c], "volume": c, "start": z, "split": "own", "contrast": contrast}
        for z in range(shape[0])
        for c, contrast in enumerate(CONTRASTS)
    ]
    return Stacks(volumes, rows, {"spacing_mm": mm, "intensity": list(INTENSITY), "stack_slices": 1}), rows


def _noisy(signal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The magnitude of a complex signal with Gaussian noise in both channels (Rice)."""
    noise = NOISE * rng.standard_normal((2, *signal.shape))
    return np.hypot(signal + noise[0], noise[1])
