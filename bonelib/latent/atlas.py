"""Mean bones of a cohort: the mean code, and the mean code as a function of age, sex and density."""

import numpy as np
import torch
from torch import Tensor

from bonelib.latent.attribute_model import AttributeModel, readings


def conditions(rows: list[dict], people: dict[str, dict], density) -> dict[str, np.ndarray]:
    """Age, sex (F 0, M 1) and trabecular density of the bones of `rows`, as far as they are known: name to (n,)."""

    def numbers(key, meaning):
        return np.array([meaning(people.get(row["patient"], {}).get(key) or "nan") for row in rows])

    found = {
        "age": numbers("age", float),
        "sex": numbers("sex", lambda s: {"F": 0.0, "M": 1.0}.get(s, np.nan)),
        "Tb.BMD": np.asarray(density, float),
    }
    return {name: v for name, v in found.items() if np.isfinite(v).sum() > 3 and np.nanstd(v) > 0}


def atlas(codes: Tensor, covariates: np.ndarray, at: np.ndarray) -> Tensor:
    """The mean code (m, ...) of bones with covariates `at` (m, p): codes by linear regression on covariates (n, p)."""
    design = np.column_stack([np.ones(len(covariates)), covariates])
    flat = codes.flatten(1).double().numpy()
    weights = np.linalg.lstsq(design, flat, rcond=None)[0]
    means = np.column_stack([np.ones(len(at)), at]) @ weights
    return torch.from_numpy(means).float().reshape(len(at), *codes.shape[1:])


def atlases(tool: AttributeModel, codes: Tensor, known: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], list[dict]]:
    """The mean bone, and mean bones under each of `conditions`: codes by name, and what is read on them as rows.

    Sexes are F and M; of numbers the 10th, 50th and 90th percentile are taken.
    """
    found, places = {"mean": codes.mean(0, keepdim=True)}, {"mean": ([float("nan")], len(codes))}
    for name, values in known.items():
        has = np.isfinite(values)
        at = np.array([0.0, 1.0]) if name == "sex" else np.quantile(values[has], [0.1, 0.5, 0.9])
        found[name] = atlas(codes[torch.from_numpy(has)], values[has][:, None], at[:, None])
        places[name] = (at.tolist(), int(has.sum()))
    rows = []
    for name, (at, n) in places.items():
        for a, values in zip(at, readings(tool.read, found[name]).tolist(), strict=True):
            rows.append(dict(condition=name, at=a, N=n) | dict(zip(tool.names, values, strict=True)))
    return found, rows
