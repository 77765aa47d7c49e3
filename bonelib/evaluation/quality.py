"""Image quality of one model against held-out bones: rows of a table, each with N, an interval and its reference."""

import numpy as np
from scipy import ndimage

from bonelib import InputError
from bonelib.evaluation.features import random3d, spectrum
from bonelib.evaluation.metrics import (
    bootstrap_interval,
    density_coverage,
    kernel_distance,
    precision_recall,
    stamp,
)
from bonelib.evaluation.morphometry import closed_slices, contours, measure
from bonelib.randomness import numpy_rng
from bonelib.scans.volumes import Volume

FAMILIES = {"random3d": random3d, "spectrum": spectrum}
METRICS = {
    "kernel distance": kernel_distance,
    "precision": lambda real, fake: precision_recall(real, fake)[0],
    "recall": lambda real, fake: precision_recall(real, fake)[1],
    "density": lambda real, fake: density_coverage(real, fake)[0],
    "coverage": lambda real, fake: density_coverage(real, fake)[1],
}
CLOSED = "closed slices"
SHOWN_TRAITS = (CLOSED, "Tt.Ar", "Tb.BMD", "Ct.BMD", "Ct.Th")
DEPTH_MM = 0.5  # from the endosteal contour inwards, where the interior counts as trabecular texture


def standardised(reference: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Features of every set (n, d), brought to mean 0 and SD 1 of `reference`, so that no feature rules by its unit."""
    mean, sd = reference.mean(axis=0), reference.std(axis=0) + 1e-9
    return [(features - mean) / sd for features in (reference, *others)]


def table(
    real: np.ndarray, fake: np.ndarray, other: np.ndarray, patients: list[str], *, seed: int, draws: int
) -> list[dict]:
    """Metrics of `fake` against `real`, and of `other` real bones against the same, for each feature family.

    Volumes are (n, z, y, x) in [0, 1]; `patients` names the patient of each volume of `real`, whose patients are
    resampled for the 95 % interval. `other` are real bones of further patients: what a perfect generator would get
    at this N. Rows: metric, features, value, low, high, real_against_real, n_real, n_fake, n_other, d.
    """
    rows = []
    for family, extract in FAMILIES.items():
        a, b, c = standardised(extract(real), extract(fake), extract(other))
        for name, metric in METRICS.items():
            rng = numpy_rng(seed, "interval", family, name)
            low, high = bootstrap_interval(metric, a, b, patients, rng=rng, draws=draws)
            rows.append(
                dict(
                    metric=name,
                    features=family,
                    value=metric(a, b),
                    low=low,
                    high=high,
                    real_against_real=metric(a, c),
                    n_real=len(a),
                    n_fake=len(b),
                    n_other=len(c),
                    d=a.shape[1],
                )
            )
    return rows


def measured(volumes: list[Volume]) -> list[tuple[dict, np.ndarray] | None]:
    """Of each volume, its morphometry and its trabecular interior as a mask; None where no contours are found."""
    found = []
    for volume in volumes:
        try:
            periosteal, endosteal = contours(volume)
        except InputError:
            found.append(None)
            continue
        traits = measure(volume, compartments=(periosteal, endosteal))
        interior = ndimage.distance_transform_edt(endosteal, volume.spacing) > DEPTH_MM
        found.append((traits | {CLOSED: closed_slices(volume, periosteal)}, interior))
    return found


def summary(volumes: list[Volume], seed: int) -> dict[str, float | int | None]:
    """What the ruler says of a group: N, the share with contours, of them the mean traits, and the group's stamp.

    `closed slices` is the share of slices with a closed cortical ring. The stamp (`metrics.stamp`) is None where no
    two interiors share voxels, and so are the traits where nothing could be measured.
    """
    found = measured(volumes)
    kept = [(volume.voxels, result[1]) for volume, result in zip(volumes, found, strict=True) if result]
    traits = [result[0] for result in found if result]
    try:
        value = stamp(np.stack([v for v, _ in kept]), np.stack([m for _, m in kept]), sigma=1.5, seed=seed)
    except (InputError, ValueError):  # no two interiors to compare
        value = None
    return {
        "N": len(volumes),
        "contours found": len(kept) / len(volumes),
        "stamp": value,
        **{key: float(np.mean([t[key] for t in traits])) if traits else None for key in SHOWN_TRAITS},
    }
