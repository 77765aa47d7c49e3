"""Crops from inside trabecular bone: what can be said of a genuine one without showing it, and a phantom's beside it.

Genuine crop: a human distal radius in vivo, XtremeCT II, 0.0607 mm (vtkbone tutorials, TRAB_1237). Its statistics are
recorded in genuine_crop.json; the crop itself is no part of this repository.
"""

import json
from importlib import resources

import numpy as np
from scipy import ndimage

from bonelib import InputError
from bonelib.core.random import numpy_rng
from bonelib.evaluation.contours import bounding_box
from bonelib.evaluation.morphometry import measure, segment
from bonelib.scans.phantom.rendering import TRABECULAR, draw_visit
from bonelib.scans.phantom.scanner import NATIVE_MM, scan
from bonelib.scans.volumes import Volume

QUIET_VOXELS = 5  # from the nearest segmented bone, where marrow and its noise are read
LEAST_QUIET = 500  # voxels; of fewer nothing is said
LAGS = (1, 2, 3)  # voxels, at which noise is compared with itself
HISTOGRAM = np.arange(-500.0, 1201.0, 50.0)  # mg HA/cm3
NOISE_SD = 105.0  # mg HA/cm3, as in the genuine crops
SEARCH_STEP = 12  # voxels between the places that are tried for a phantom's crop


def marrow(volume: Volume, inside: np.ndarray | None = None) -> dict | None:
    """Density in mg HA/cm3 of voxels at least `QUIET_VOXELS` from segmented bone, within the mask `inside` (z, y, x).

    `mean` and `sd`; `thirds`, the SDs of three equal parts along z, NaN where one has no voxel; and `noise`, the
    autocorrelation along z, y and x (3) at `LAGS` (3) over pairs of such voxels. None where they are too few to say.
    """
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
        "noise": [[_masked_correlation(voxels, quiet, axis, lag) for lag in LAGS] for axis in range(3)],
    }


def crop_statistics(volume: Volume) -> dict:
    """What can be said of a crop inside trabecular bone (mg HA/cm3) without showing it: plain numbers and lists.

    Morphometry (`traits`, and by Laplace-Hamming `sharpened`), density histogram over `HISTOGRAM` (share per bin),
    autocorrelation of the density along z, y, x at lags 0-8 voxels, and mean, SD and autocorrelation of the `marrow`.
    Raises `InputError` for a crop without marrow.
    """
    quiet = marrow(volume)
    if quiet is None:
        raise InputError(f"the crop has no {LEAST_QUIET} voxels at least {QUIET_VOXELS} voxels from bone")
    counts, _ = np.histogram(volume.voxels, HISTOGRAM)
    centred = volume.voxels - volume.voxels.mean(dtype=float)
    return {
        "shape": list(volume.shape),
        "traits": measure(volume, compartments="trabecular"),
        "sharpened": measure(volume, compartments="trabecular", segmentation="laplace-hamming"),
        "histogram": (counts / volume.voxels.size).tolist(),
        "autocorrelation": [[_correlation(centred, axis, lag) for lag in range(9)] for axis in range(3)],
        "marrow_mean": quiet["mean"],
        "marrow_sd": quiet["sd"],
        "noise": quiet["noise"],
    }


def genuine_statistics() -> dict:
    """`crop_statistics` of the genuine crop, as recorded."""
    return json.loads(resources.files(__package__).joinpath("genuine_crop.json").read_text(encoding="utf-8"))


def phantom_crop(seed: int, density: float, shape: tuple[int, int, int]) -> Volume:
    """A crop of `shape` voxels from inside the trabecular bone of a full-size phantom of mean density `density`.

    Of the places that lie wholly inside, the one whose mean density is nearest to that wanted.
    """
    drawn = draw_visit(seed, 1, 1, NATIVE_MM, sex="F", age=60.0, tb_bmd=density, side="right")
    seen = scan(drawn.volume, numpy_rng(seed, "noise", 1, 1), noise_sd=NOISE_SD)
    inside = ndimage.minimum_filter(drawn.compartments == TRABECULAR, 3)
    places = []
    for start in np.ndindex(*[max(1, (n - m) // SEARCH_STEP + 1) for n, m in zip(seen.shape, shape, strict=True)]):
        part = tuple(slice(SEARCH_STEP * s, SEARCH_STEP * s + m) for s, m in zip(start, shape, strict=True))
        if inside[part].shape == tuple(shape) and inside[part].all():
            places.append((abs(float(seen.voxels[part].mean(dtype=float)) - density), start, part))
    if not places:
        raise InputError(f"no place of {tuple(shape)} voxels lies wholly inside trabecular bone")
    *_, part = min(places, key=lambda place: place[:2])
    return Volume(np.ascontiguousarray(seen.voxels[part]), seen.spacing)


def compare(genuine: dict, phantom: dict) -> list[dict]:
    """Panels for `figures.scatter` of two `crop_statistics`: histograms, and autocorrelations along z, y and x."""
    middle = (HISTOGRAM[1:] + HISTOGRAM[:-1]) / 2
    both = {"genuine": genuine, "phantom": phantom}
    panels = [
        {"title": "density", "x": "mg HA/cm3", "y": "share of voxels", "sets": {}}
        | {"lines": {name: (middle, of["histogram"]) for name, of in both.items()}}
    ]
    for axis, name in enumerate("zyx"):
        lines = {of: (range(9), both[of]["autocorrelation"][axis]) for of in both}
        panels.append({"title": f"autocorrelation along {name}", "x": "voxels", "y": "", "sets": {}, "lines": lines})
    return panels


def table(genuine: dict, phantom: dict) -> list[dict]:
    """One row a statistic of two `crop_statistics`: its name, and its value in the genuine crop and in the phantom."""
    rows = {name: (genuine["traits"][name], phantom["traits"][name]) for name in genuine["traits"]}
    rows["marrow mean, mg HA/cm3"], rows["marrow SD, mg HA/cm3"] = (
        (genuine[key], phantom[key]) for key in ("marrow_mean", "marrow_sd")
    )
    for axis, name in enumerate("zyx"):
        for place, lag in enumerate(LAGS):
            rows[f"noise along {name}, lag {lag}"] = tuple(of["noise"][axis][place] for of in (genuine, phantom))
    return [{"statistic": name, "genuine": a, "phantom": b} for name, (a, b) in rows.items()]


def _correlation(centred: np.ndarray, axis: int, lag: int) -> float:
    """Autocorrelation of voxels (z, y, x) of mean 0 at `lag` voxels along `axis`."""
    ahead, behind = _apart(centred, axis, lag)
    return float((ahead * behind).mean(dtype=float) / (centred**2).mean(dtype=float))


def _masked_correlation(voxels: np.ndarray, mask: np.ndarray, axis: int, lag: int) -> float:
    """The same over the pairs of voxels of which both lie in the mask, about the mean of each side."""
    both = np.logical_and(*_apart(mask, axis, lag))
    if both.sum() < 2:
        return float("nan")
    return float(np.corrcoef(*(side[both] for side in _apart(voxels, axis, lag)))[0, 1])


def _apart(array: np.ndarray, axis: int, lag: int) -> tuple[np.ndarray, np.ndarray]:
    """Two views of an array, `lag` voxels apart along `axis`."""
    along = np.moveaxis(array, axis, 0)
    return along[lag:], along[: len(along) - lag]
