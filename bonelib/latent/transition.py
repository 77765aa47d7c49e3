"""From one bone to another: a path of codes, its smoothness, and whether an attribute stays within its ends
(Angermann et al. 2023, section 4.2).

Codes are what a generator's `synthesize` takes, one a bone; a path of `points` codes from one bone to another has the
shape (points, *code).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bonelib import InputError
from bonelib.core.random import numpy_rng
from bonelib.evaluation.compartments import TRAITS, read
from bonelib.evaluation.statistics import pair_mean
from bonelib.latent.attribute_model import AttributeModel, readings
from bonelib.latent.codes import along
from bonelib.latent.models import Model
from bonelib.latent.target_optimisation import optimise_to_target


def line(first: Tensor, last: Tensor, weights) -> Tensor:
    """The straight path: (1 - w) `first` + w `last` for every weight w, (weights, *code) for codes of one shape."""
    weights = torch.as_tensor(weights, dtype=first.dtype).reshape(-1, *[1] * first.dim())
    return (1 - weights) * first + weights * last


def slerp(first: Tensor, last: Tensor, weights, centre: Tensor) -> Tensor:
    """The path on a sphere about `centre` (weights, *code): the direction from it turns evenly, and the distance from
    it changes evenly. For codes of one shape."""
    a, b = first - centre, last - centre
    size_a, size_b = a.norm(), b.norm()
    angle = torch.arccos((a * b / (size_a * size_b)).sum().clamp(-1, 1))
    if angle < 1e-3:
        return line(first, last, weights)
    w = torch.as_tensor(weights, dtype=first.dtype).reshape(-1, *[1] * first.dim())
    turned = (torch.sin((1 - w) * angle) * a / size_a + torch.sin(w * angle) * b / size_b) / torch.sin(angle)
    return centre + ((1 - w) * size_a + w * size_b) * turned


def geodesic(draw: Callable[[Tensor], Tensor], path: Tensor, steps: int) -> Tensor:
    """The path with the ends of `path` (points, *code) whose volumes change least: a geodesic of the metric that the
    generator pulls back from voxels to codes (Shao et al. 2018).

    The energy of the polygon of volumes, which `draw` makes of codes, is minimised over the inner codes by at most
    `steps` iterations of L-BFGS; at its minimum all segments are equally long.
    """
    if len(path) < 3:
        raise InputError(f"a path of {len(path)} codes has none between its ends; at least 3 are needed")
    ends, inner = path[[0, -1]].detach(), path[1:-1].detach().clone().requires_grad_()
    with torch.no_grad():
        first, last = draw(ends)
    minimise(inner, lambda: energy(torch.cat([first[None], draw(inner), last[None]])), steps)
    return torch.cat([ends[:1], inner.detach(), ends[1:]])


def minimise(free: Tensor, value: Callable[[], Tensor], steps: int) -> None:
    """Lower `value()` over `free`, in place, by at most `steps` iterations of L-BFGS."""
    search = torch.optim.LBFGS([free], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def evaluated():
        search.zero_grad()
        found = value()
        found.backward()
        return found

    search.step(evaluated)


def energy(volumes: Tensor) -> Tensor:
    """Energy of the polygon through `volumes` (points, ...): the limit is half the integral of squared speed."""
    return 0.5 * (len(volumes) - 1) * volumes.diff(dim=0).square().sum()


def smoothness(features: np.ndarray) -> dict[str, float]:
    """How smoothly a path runs through named features (points, d), at equal steps from 0 to 1. NaN where the ends are
    the same.

    `detour`: its length over the distance of its ends. `path length`: twice its energy over that distance squared, the
    perceptual path length of Karras et al. 2019 freed of its unit: 1 for a path that is straight at even speed, and
    never less. `jolt`: the largest second derivative over the same distance.
    """
    segments = len(features) - 1
    if segments < 2:
        raise InputError(f"a path of {len(features)} points has no curvature; at least 3 are needed")
    steps = np.diff(np.asarray(features, float), axis=0)
    size, apart = np.linalg.norm(steps, axis=1), np.linalg.norm(steps.sum(axis=0))
    apart = apart if apart > 0 else np.nan
    return {
        "detour": float(size.sum() / apart),
        "path length": float(segments * (size**2).sum() / apart**2),
        "jolt": float(segments**2 * np.linalg.norm(np.diff(steps, axis=0), axis=1).max() / apart),
    }


def overshoot(values: np.ndarray) -> np.ndarray:
    """How far an attribute leaves the interval of its two ends: paths (n, points) to (n,), 0 where it never does."""
    values = np.asarray(values, float)
    ends = values[:, [0, -1]]
    return np.maximum(values.max(axis=1) - ends.max(axis=1), ends.min(axis=1) - values.min(axis=1))


def density_constrained_path(tool: AttributeModel, paths: Tensor, weights, name: str) -> Tensor:
    """Paths (n, weights, *code) whose inner codes are moved as short a way as can be (`optimise_to_target`) until
    attribute `name` runs straight from end to end, with all others left free; as near as the loop comes. Where an end
    cannot be read, the path stays as it is."""
    ends = torch.stack([readings(tool.read, paths[:, k])[:, tool.index(name)] for k in (0, -1)], 1)
    known, inner = ends.isfinite().all(1), weights[1:-1]
    if not known.any() or not len(inner):
        return paths
    wanted = torch.full((int(known.sum()) * len(inner), len(tool.names)), torch.nan)
    wanted[:, tool.index(name)] = line(*ends[known].T, inner).T.flatten()
    found = optimise_to_target(tool, paths[known, 1:-1].flatten(0, 1), wanted, seeds=range(len(wanted)))
    paths = paths.clone()
    paths[known, 1:-1] = found.codes.unflatten(0, (-1, len(inner)))
    return paths


def measured(
    model: Model, codes: Tensor, pairs: list[tuple[int, int]], paths: Tensor, seed: int
) -> dict[str, np.ndarray]:
    """Area and densities along the path of every pair of `codes` (n, *code): {trait: (pairs, points)}.

    `paths` are (pairs, points, *code); bones that stand in several pairs are drawn once. NaN where no contours are
    found.
    """
    bones = along(model, codes, pairs, list(paths[:, 1:-1]), seed, read)
    return {trait: np.array([[reading.traits[trait] for reading in path] for path in bones]) for trait in TRAITS}


def density_retention(
    values: np.ndarray,
    closed: np.ndarray,
    patients: list[tuple[str, str]],
    *,
    low: float,
    margin: float,
    least: float,
    seed,
    draws,
) -> list[dict]:
    """What the paths (n, points) of one density do between their ends, a row each, with intervals by patient.

    The share that stays below `low` and within the ends, exactly and up to `margin`; how far a path leaves them; and
    how much its middle lies above the mean of its ends, since a code between two is nearer to the mean bone. For paths
    on which every bone has contours, and for those on which it also has a closed cortex in the share `least` of its
    slices (`closed`, (n, points)), where the density can be trusted. `patients` names the two of a path.
    """
    values, closed = np.asarray(values, float), np.asarray(closed, float)
    away, measured = overshoot(values), np.isfinite(values).all(axis=1)
    middle = values[:, values.shape[1] // 2] - values[:, [0, -1]].mean(axis=1)
    numbers = {
        f"share of paths that stay low, up to {margin:.3g}": values.max(axis=1) <= low + margin,
        "share of paths within the ends": away <= 0,
        f"share of paths within the ends, up to {margin:.3g}": away <= margin,
        "distance beyond the ends": away,
        "middle above the mean of the ends": middle,
    }
    kinds = {"contours found": measured, "cortex closed": measured & (closed.min(axis=1) >= least)}
    rows = []
    for kind, kept in kinds.items():
        table = {"share of all paths": kept} | {k: np.where(kept, v, np.nan) for k, v in numbers.items()}
        for name, column in table.items():
            found = pair_mean(column, patients, rng=numpy_rng(seed, "staying", kind, name), draws=draws)
            rows.append({"paths": kind, "": name} | found._asdict())
    return rows


def all_density_retention(found: dict, names: dict[str, list], limits: dict[str, dict], **how) -> list[dict]:
    """The rows of `density_retention` for every path and density of `found` {path: {density: (values, closed)}}.

    `names` and `limits` (low and margin) are those of a density; `how` is the same for all.
    """
    every = [(path, t, table) for path, of_path in found.items() for t, table in of_path.items()]
    return [
        {"path": path, "density": t} | row
        for path, t, table in every
        for row in density_retention(*table, names[t], **limits[t], **how)
    ]


def summary(rows: list[dict], by: str, *, seed: int, draws: int) -> list[dict]:
    """Mean and interval by patient of every number in `rows`, one row a path, for each value of the column `by`.

    Rows name their patients in the columns first and last.
    """
    measures = [key for key, value in rows[0].items() if isinstance(value, float)]
    table = []
    for name in dict.fromkeys(row[by] for row in rows):
        group = [row for row in rows if row[by] == name]
        patients = [(row["first"], row["last"]) for row in group]
        for measure in measures:
            rng = numpy_rng(seed, "summary", name, measure)
            found = pair_mean([row[measure] for row in group], patients, rng=rng, draws=draws)
            table.append({by: name, "measure": measure} | found._asdict())
    return table
