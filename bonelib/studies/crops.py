"""Crops inside trabecular bone: what a genuine one and a phantom's tell of themselves, and of the marrow in between.

The genuine crop is of a human distal radius in vivo, XtremeCT II, 0.0607 mm (vtkbone tutorials, TRAB_1237). Its
statistics are recorded in genuine_crop.json; the crop itself is not part of this repository.
"""

import json
from importlib import resources

import numpy as np
from scipy import ndimage

from bonelib import InputError
from bonelib.core.random import numpy_rng
from bonelib.evaluation.contours import bounding_box
from bonelib.evaluation.morphometry import measure, segment
from bonelib.scans.phantom import population
from bonelib.scans.phantom.rendering import TRABECULAR, draw_visit, draw_window
from bonelib.scans.phantom.scanner import NATIVE_MM, scan, spread_kernel
from bonelib.scans.volumes import Volume

QUIET_VOXELS = 5  # from the nearest segmented bone, where marrow and its noise are read
LEAST_QUIET = 500  # voxels; of fewer nothing is said
LAGS = (1, 2, 3)  # voxels, at which noise is compared with itself
HISTOGRAM = np.arange(-500.0, 1201.0, 50.0)  # mg HA/cm3
SEARCH_STEP = 6  # how much coarser the grid is on which a place for the crop of a phantom is searched


def marrow(volume: Volume, inside: np.ndarray | None = None) -> dict | None:
    """Density in mg HA/cm3 of voxels at least `QUIET_VOXELS` from segmented bone, within the mask `inside` (z, y, x):
    `mean`, `sd`, `thirds`, the SDs of three equal parts along z, and `noise`, the autocorrelation along z, y and x (3)
    at `LAGS` (3). None where they are too few."""
    bone = segment(volume)
    inside = np.ones(volume.shape, bool) if inside is None else inside
    # Bone further away than this from the mask cannot matter
    box = tuple(slice(max(s.start - QUIET_VOXELS, 0), s.stop + QUIET_VOXELS) for s in bounding_box(inside))
    voxels, quiet = volume.voxels[box], inside[box] & (ndimage.distance_transform_edt(~bone[box]) >= QUIET_VOXELS)
    if quiet.sum() < LEAST_QUIET:
        return None
    values = voxels[quiet]
    parts = zip(np.array_split(voxels, 3), np.array_split(quiet, 3), strict=True)
    return {
        "mean": float(values.mean(dtype=float)),
        "sd": float(values.std(dtype=float)),
        "thirds": [float(v[q].std(dtype=float)) if q.any() else float("nan") for v, q in parts],
        "noise": [[_noise_correlation(voxels, quiet, axis, lag) for lag in LAGS] for axis in range(3)],
    }


def _noise_correlation(voxels, mask, axis, lag):
    """Autocorrelation over the pairs of voxels that both lie in the mask, about the mean of each side."""
    both = np.logical_and(*_apart(mask, axis, lag))
    if both.sum() < 2:
        return float("nan")
    return float(np.corrcoef(*(side[both] for side in _apart(voxels, axis, lag)))[0, 1])


def _apart(array, axis, lag):
    """Two views of an array, `lag` voxels apart along `axis`."""
    along = np.moveaxis(array, axis, 0)
    return along[lag:], along[: len(along) - lag]


def crop_statistics(volume: Volume) -> dict:
    """Statistics of a crop inside trabecular bone (mg HA/cm3) that do not show it, plain numbers and lists:
    morphometry, share of voxels a bin of `HISTOGRAM`, autocorrelation along z, y, x at lags 0-8, and the `marrow`.
    Raises `InputError` for a crop without marrow."""
    quiet = marrow(volume)
    if quiet is None:
        raise InputError(f"the crop has no {LEAST_QUIET} voxels at least {QUIET_VOXELS} voxels from bone")
    counts, _ = np.histogram(volume.voxels, HISTOGRAM)
    centred = volume.voxels - volume.voxels.mean(dtype=float)
    lagged = [[np.multiply(*_apart(centred, axis, lag)).mean(dtype=float) for lag in range(9)] for axis in range(3)]
    return {
        "shape": list(volume.shape),
        "traits": measure(volume, compartments="trabecular"),
        "sharpened": measure(volume, compartments="trabecular", segmentation="laplace-hamming"),
        "histogram": (counts / volume.voxels.size).tolist(),
        "autocorrelation": (np.array(lagged) / (centred**2).mean(dtype=float)).tolist(),
        "marrow_mean": quiet["mean"],
        "marrow_sd": quiet["sd"],
        "noise": quiet["noise"],
    }


def genuine_statistics() -> dict:
    """`crop_statistics` of the genuine crop, as recorded."""
    return json.loads(resources.files(__package__).joinpath("genuine_crop.json").read_text(encoding="utf-8"))


def phantom_crop(seed: int, density: float, shape: tuple[int, int, int]) -> Volume:
    """A crop of `shape` voxels from inside the trabecular bone of a full-size phantom of mean density `density`: of the
    places that lie wholly inside, the one nearest to that, searched on a grid `SEARCH_STEP` times as coarse, and drawn
    alone."""
    traits = dict(sex="F", age=60.0, tb_bmd=density, side="right")
    coarse = draw_visit(seed, 1, 1, SEARCH_STEP * NATIVE_MM, **traits)
    inside = ndimage.minimum_filter(coarse.compartments == TRABECULAR, 3)
    size, places = [-(-n // SEARCH_STEP) for n in shape], []
    for start in np.ndindex(*np.maximum(0, np.array(inside.shape) - size + 1)):
        part = tuple(slice(s, s + m) for s, m in zip(start, size, strict=True))
        if inside[part].all():
            places.append((abs(float(coarse.volume.voxels[part].mean(dtype=float)) - density), start))
    if not places:
        raise InputError(f"no place of {tuple(shape)} voxels lies wholly inside trabecular bone")
    _, start = min(places)
    margin = len(spread_kernel(NATIVE_MM)) // 2
    wide = SEARCH_STEP * np.array(start) - margin, np.array(shape) + 2 * margin
    drawn = draw_window(seed, 1, 1, NATIVE_MM, *wide, **traits)
    seen = scan(drawn, numpy_rng(seed, "noise", 1, 1), noise_sd=population.NOISE[0])
    core = tuple(slice(margin, margin + n) for n in shape)
    return Volume(np.ascontiguousarray(seen.voxels[core]), seen.spacing)
