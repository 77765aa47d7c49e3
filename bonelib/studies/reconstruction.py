"""Reconstruction error: voxels, features, morphometry and re-identification."""

import numpy as np
from scipy.spatial.distance import cdist

from bonelib.core.parallel import workers
from bonelib.core.random import numpy_rng
from bonelib.evaluation.features import random3d
from bonelib.evaluation.morphometry import measure_or_none
from bonelib.evaluation.similarity import psnr, ssim
from bonelib.evaluation.statistics import mean_rows, patient_mean
from bonelib.scans.volumes import Volume

SHOWN = ("Tt.Ar", "Tb.BMD", "BV/TV", "Tb.Th", "Tb.Sp", "Tb.N", "Ct.BMD", "Ct.Th")


def random3d_distance(real: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Distance of each volume to its reconstruction in the features of a frozen random 3D network: (n,).

    The root mean square over features, each in SDs of it over `real`: near 1.4 for two bones picked at random.
    """
    a, b = random3d(real), random3d(drawn.clip(0, 1))
    return np.sqrt((((a - b) / (a.std(0) + 1e-9)) ** 2).mean(1))


def recognised(real: np.ndarray, drawn: np.ndarray, patients: list[str], *, own: bool = True) -> np.ndarray:
    """Whether the real volume that is nearest to each reconstruction, voxel by voxel, is of the same patient: (n,).

    Without `own`, the very volume that was reconstructed is no candidate, only others of its patient and of the rest.
    """
    a, b = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (drawn, real))
    squared = cdist(a, b, "sqeuclidean")
    if not own:
        np.fill_diagonal(squared, np.inf)
    patients = np.asarray(patients)
    return (patients[squared.argmin(1)] == patients).astype(float)


def compare(
    real: np.ndarray,
    drawn: dict[str, np.ndarray],
    patients: list[str],
    further: dict[str, dict[str, np.ndarray]],
    *,
    seed: int,
    draws: int,
) -> list[dict]:
    """Every method's reconstructions `drawn` of volumes `real`, (n, z, y, x) in [0, 1]: one row a method and measure,
    with its interval by patient. `further` {method: {measure: values (n,)}} are measures that the caller made."""
    rows = []
    for method, volumes in drawn.items():
        found = {
            "PSNR, dB": psnr(real, volumes),
            "SSIM": ssim(real, volumes),
            "random3d distance": random3d_distance(real, volumes),
            "own patient is nearest": recognised(real, volumes, patients),
            "own patient is nearest, own stack left out": recognised(real, volumes, patients, own=False),
            **further.get(method, {}),
        }
        of_all = mean_rows(found, patients, "reconstruction", seed=seed, draws=draws)
        rows += [dict(method=method) | row for row in of_all]
    return rows


def attribute_errors(
    real: list[Volume], drawn: dict[str, list[Volume]], patients: list[str], *, seed: int, draws: int
) -> list[dict]:
    """The error of every measured attribute of reconstructions at full size: one row a method and attribute.

    N of bones with contours in both, mean and mean absolute error, with its interval by patient, and the SD of the
    attribute over their real volumes; None where N is 0.
    """
    groups = {"real": real, **drawn}
    with workers() as pool:
        found = {name: list(pool.map(_measured, volumes)) for name, volumes in groups.items()}
    rows = []
    for method in drawn:
        for name in SHOWN:
            true, seen = (np.array([t.get(name, np.nan) for t in found[g]]) for g in ("real", method))
            error, rng = seen - true, numpy_rng(seed, "attribute error", name)
            known = np.isfinite(error)
            size, low, high, n, _ = patient_mean(np.abs(error), patients, rng=rng, draws=draws)
            numbers = (error[known].mean(), size, low, high, true[known].std()) if n else [None] * 5
            names = ("mean error", "absolute error", "low", "high", "SD of real")
            row = {"method": method, "attribute": name, "N": n}
            rows.append(row | {key: v if v is None else float(v) for key, v in zip(names, numbers, strict=True)})
    return rows


def _measured(volume):
    return measure_or_none(volume, anisotropy=False) or {}  # no anisotropy is shown
