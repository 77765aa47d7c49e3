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
from bonelib.processes import workers
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
SHOWN_TRAITS = (CLOSED, "Tt.Ar", "Tb.BMD", "Tb.Th", "Tb.Sp", "Tb.N", "Ct.BMD", "Ct.Th")
DEPTH_MM = 0.5  # from the endosteal contour inwards, where the interior counts as trabecular texture


def standardised(reference: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Features of every set (n, d), brought to mean 0 and SD 1 of `reference`, so that no feature rules by its unit."""
    mean, sd = reference.mean(axis=0), reference.std(axis=0) + 1e-9
    return [(features - mean) / sd for features in (reference, *others)]


def table(
    real: np.ndarray, fake: dict[str, np.ndarray], other: np.ndarray, patients: list[str], *, seed: int, draws: int
) -> list[dict]:
    """Metrics of every model's samples against `real`, and of `other` real bones against the same, by feature family.

    Volumes are (n, z, y, x) in [0, 1]; `fake` is {model: volumes}; `patients` names the patient of each volume of
    `real`, whose patients are resampled for the 95 % interval. `other` are real bones of further patients: what a
    perfect generator would get at this N. Rows: model, metric, features, value, low, high, real_against_real, n_real,
    n_fake, n_other, d.
    """
    rows = []
    for family, extract in FAMILIES.items():
        sets = standardised(extract(real), extract(other), *(extract(volumes) for volumes in fake.values()))
        a, c, found = sets[0], sets[1], dict(zip(fake, sets[2:], strict=True))
        for name, metric in METRICS.items():
            reference = metric(a, c)
            for model, b in found.items():
                rng = numpy_rng(seed, "interval", family, name)
                low, high = bootstrap_interval(metric, a, b, patients, rng=rng, draws=draws)
                values = dict(value=metric(a, b), low=low, high=high, real_against_real=reference)
                counts = dict(n_real=len(a), n_fake=len(b), n_other=len(c), d=a.shape[1])
                rows.append(dict(model=model, metric=name, features=family) | values | counts)
    return rows


def measured(volume: Volume) -> tuple[dict, np.ndarray] | None:
    """The morphometry of a volume and its trabecular interior as a mask; None where no contours are found."""
    try:
        periosteal, endosteal = contours(volume)
    except InputError:
        return None
    traits = measure(volume, compartments=(periosteal, endosteal))
    interior = ndimage.distance_transform_edt(endosteal, volume.spacing) > DEPTH_MM
    return traits | {CLOSED: closed_slices(volume, periosteal)}, interior


def summary(volumes: list[Volume], seed: int) -> dict[str, float | int | None]:
    """What the ruler says of a group: N, the share with contours, the group's stamp, and mean and SD of its traits.

    `closed slices` is the share of slices with a closed cortical ring. The stamp (`metrics.stamp`) is None where no
    two interiors share voxels, and so are the traits where nothing could be measured. Volumes are measured by worker
    processes.
    """
    with workers() as pool:
        found = list(pool.map(measured, volumes))
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
        **{f"{key} SD": float(np.std([t[key] for t in traits])) if traits else None for key in SHOWN_TRAITS},
    }
