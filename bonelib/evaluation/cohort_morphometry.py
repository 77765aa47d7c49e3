"""The attributes of a cohort: every preprocessed scan measured, and how the patients are distributed."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from bonelib.core.parallel import workers
from bonelib.evaluation.morphometry import measure_or_none
from bonelib.scans.dataset import Stacks
from bonelib.scans.given import CORTEX, MARROW
from bonelib.scans.preprocessing import subsample, subsample_labels, to_density
from bonelib.scans.tables import read_table, write_table
from bonelib.scans.volumes import Volume

COARSE_MM = 0.25  # areas, densities and the cortex can be read on voxels of up to this size, in a tenth of the time


def measure_scans(stacks: Stacks, folder: str | Path, *, path: str | Path, own: str | Path | None = None) -> list[dict]:
    """Measure each whole preprocessed scan of `stacks` in `folder`; one row a scan, also written to `path`.

    Rows: scan, patient, split, grade, and the traits of `morphometry.measure`, on voxels of up to `COARSE_MM`:
    thicknesses of trabeculae are then those of a blurred image. A scan that cannot be measured has empty traits. Where
    users gave contours (contours.npy), they are measured in; traits in the table `own` take the place of ours. In
    parallel.
    """
    scans = {row["volume"]: row for row in stacks.rows}
    keys = ("scan", "patient", "split", "grade")
    grid = (Path(folder) / "volumes.npy", stacks.meta["spacing_mm"], stacks.meta["intensity"])
    with workers() as pool:
        jobs = [pool.submit(_measured, index, *grid) for index in scans]
        rows = [{k: row[k] for k in keys} | job.result() for row, job in zip(scans.values(), jobs, strict=True)]
    given = {row.pop("scan"): row for row in read_table(own)} if own and Path(own).is_file() else {}
    rows = [row | {k: float(v) for k, v in given.get(row["scan"], {}).items() if v} for row in rows]
    write_table(path, rows)
    return rows


def _measured(index: int, path: Path, spacing, intensity) -> dict[str, float]:
    voxels = to_density(np.load(path, mmap_mode="r")[index].astype(np.float32), intensity)
    volume = Volume(voxels, tuple(spacing))
    step = max(1, int(COARSE_MM / min(spacing)))
    coarse = subsample(volume.with_voxels(voxels[: len(voxels) // step * step]), step)
    return measure_or_none(coarse, compartments=_given(path.with_name("contours.npy"), index, step)) or {}


def _given(path: Path, index: int, step: int):
    """The user's own compartments of a scan, or None."""
    labels = subsample_labels(np.load(path, mmap_mode="r")[index], step) if path.is_file() else np.zeros(1)
    return (labels >= CORTEX, labels == MARROW) if labels.any() else None


def by_patient(rows: list[dict], trait: str, **where) -> np.ndarray:
    """The mean of `trait` over the scans of each patient, of rows whose columns equal `where`; NaN is left out."""
    table = pd.DataFrame([row for row in rows if all(row[key] == wanted for key, wanted in where.items())])
    if trait not in table:
        return np.zeros(0)
    values = pd.to_numeric(table[trait]).replace([np.inf, -np.inf], np.nan).dropna()
    return values.groupby(table["patient"], sort=False).mean().to_numpy()


def normality(rows: list[dict], traits: tuple[str, ...]) -> list[dict]:
    """Of each trait over the patients: N, mean, SD, skewness, and the Shapiro-Wilk test of a normal distribution."""
    table = []
    for trait in traits:
        values = by_patient(rows, trait)
        row = {"trait": trait, "N patients": len(values), "mean": float(values.mean())}
        row |= {"SD": float(values.std(ddof=1)), "skewness": float(stats.skew(values)), "Shapiro W": None, "p": None}
        if len(values) >= 3 and np.ptp(values) > 0:
            row["Shapiro W"], row["p"] = map(float, stats.shapiro(values))
        table.append(row)
    return table
