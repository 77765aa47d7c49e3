"""Whether drawn detail is like real detail: the same bones, once real and once drawn from what is left of them."""

import numpy as np
import torch

from bonelib.core.parallel import workers
from bonelib.core.pyramid import haar
from bonelib.core.random import numpy_rng
from bonelib.evaluation.morphometry import measure_or_none
from bonelib.evaluation.statistics import patient_interval
from bonelib.scans.volumes import Volume

SHOWN = ("Tb.BMD", "BV/TV", "Tb.Th", "Tb.Sp", "Tb.N", "DA", "Conn.D", "Ct.BMD", "Ct.Th")
BANDS = ("x", "y", "yx", "z", "zx", "zy", "zyx")  # along which axes the finest detail alternates


def traits(real: list[Volume], others: dict[str, list[Volume]], *, seed: int, draws: int) -> list[dict]:
    """Morphometry of real volumes, one a patient, and of the same bones in `others`: one row a trait.

    Rows: trait, N of patients, the mean of `real`, and of each of `others` its mean, the mean difference to `real` in
    percent of that with its 95 % interval (patients resampled), and the correlation over patients. Volumes that have
    no contours in any of the groups are left out of all.
    """
    groups = {"real": real, **others}
    with workers() as pool:
        found = {name: list(pool.map(measure_or_none, volumes)) for name, volumes in groups.items()}
    kept = [i for i in range(len(real)) if all(found[name][i] for name in groups)]
    rows = []
    for trait in SHOWN if kept else ():
        values = {name: np.array([found[name][i][trait] for i in kept]) for name in groups}
        row = {"trait": trait, "N": len(kept), "real": values["real"].mean()}
        for name in others:
            rng = numpy_rng(seed, "detail interval", trait, name)

            def relative(rows, theirs=values[name], real=values["real"]):
                return _relative(theirs[rows], real[rows])

            change = patient_interval(relative, range(len(kept)), rng=rng, draws=draws)
            row |= {
                name: values[name].mean(),
                f"{name}, difference %": change.value,
                f"{name}, low": change.low,
                f"{name}, high": change.high,
                f"{name}, r": float(np.corrcoef(values[name], values["real"])[0, 1]) if len(kept) > 2 else None,
            }
        rows.append(row)
    return rows


def bands(real: np.ndarray, drawn: np.ndarray) -> list[dict]:
    """SD and kurtosis of the seven detail bands of volumes (n, z, y, x): one row a band. Noise has a kurtosis of 3."""
    rows = []
    for i, name in enumerate(BANDS, 1):
        row = {"band": name}
        for group, volumes in (("real", real), ("drawn", drawn)):
            values = haar(torch.from_numpy(np.asarray(volumes, np.float32))[:, None])[:, i].double()
            values = values - values.mean()
            row[f"SD {group}"] = float(values.std())
            row[f"kurtosis {group}"] = float((values**4).mean() / (values**2).mean() ** 2)
        rows.append(row)
    return rows


def _relative(a, b):
    return float(100 * (a.mean() - b.mean()) / b.mean())
