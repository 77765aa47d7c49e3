"""Mean bones of a cohort: the mean code, straight or intrinsic, and the mean code as a function of age, sex, density
and grade of motion."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bonelib import InputError
from bonelib.latent.attribute_model import AttributeModel, readings
from bonelib.latent.transition import energy, line, minimise


def conditions(rows: list[dict], people: dict[str, dict], density, grades=None) -> dict[str, np.ndarray]:
    """Age, sex (F 0, M 1), trabecular density and grade of the bones of `rows`, as far as they are known and vary: name
    to (n,). `density` and `grades`, where they are given, have one number a bone."""

    def numbers(key, meaning):
        return np.array([meaning(people.get(row["patient"], {}).get(key) or "nan") for row in rows])

    found = {
        "age": numbers("age", float),
        "sex": numbers("sex", lambda s: {"F": 0.0, "M": 1.0}.get(s, np.nan)),
        "Tb.BMD": np.asarray(density, float),
    } | ({} if grades is None else {"grade": np.asarray(grades, float)})
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


class IntrinsicMean(NamedTuple):
    """The code of an intrinsic mean (*code), and the geodesics from it to every bone, (n, points, *code)."""

    code: Tensor
    paths: Tensor


def intrinsic_mean(draw: Callable[[Tensor], Tensor], codes: Tensor, points: int, steps: int) -> IntrinsicMean:
    """The Fréchet mean of `codes` (n, *code): whose squared geodesic distances to them (`transition.geodesic`, of the
    volumes that `draw` makes) add up to the least.

    Of a polygon with held ends, the least energy is half the squared length: so one minimisation, over the mean and the
    inner codes of the `points` of every path together, finds all, by at most `steps` iterations of L-BFGS from the
    straight mean.
    """
    if points < 3:
        raise InputError(f"paths of {points} codes have none between their ends; at least 3 are needed")
    ends, first = codes.detach(), codes.detach().mean(0)
    inner = [line(first, end, np.linspace(0, 1, points))[1:-1] for end in ends]
    free = torch.cat([first[None], *inner]).requires_grad_()
    with torch.no_grad():
        last = draw(ends)

    def value():
        volumes = draw(free)
        ways = volumes[1:].unflatten(0, (len(ends), points - 2))
        polygons = (torch.cat([volumes[:1], way, end[None]]) for way, end in zip(ways, last, strict=True))
        return sum(energy(polygon) for polygon in polygons)

    minimise(free, value, steps)
    found, between = free.detach()[0], free.detach()[1:].unflatten(0, (len(ends), points - 2))
    return IntrinsicMean(found, torch.cat([found.expand(len(ends), 1, *found.shape), between, ends[:, None]], 1))


def distances(draw: Callable[[Tensor], Tensor], paths: Tensor) -> np.ndarray:
    """Lengths (n,) of paths (n, points, *code): of the polygon of their volumes, root mean square over voxels."""
    with torch.no_grad():
        volumes = [draw(path).flatten(1) for path in paths]
    return np.array([float(v.diff(dim=0).square().mean(1).sqrt().sum()) for v in volumes])
