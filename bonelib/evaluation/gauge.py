"""A fast ruler for loops of thousands of bones: area, densities and cortex read on voxels of about a millimetre.

On such voxels a cortex is one voxel thick and `morphometry` finds no contours. What can be read on them, sums of
density in and about the bone, is differentiable; `fit` learns from measured scans how it goes with what `morphometry`
reads on fine voxels. Of so thin a cortex, thickness and density are told apart in part only.
How well it does must be shown on bones of patients that were not fitted (`agreement`).
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from bonelib import InputError
from bonelib.pyramid import downsample
from bonelib.randomness import numpy_rng
from bonelib.scans.dataset import Stacks

GRID_MM = 0.9  # volumes are averaged over blocks while their voxels are finer than this
BONE = 200.0  # mg HA/cm3: more than soft tissue on such voxels, less than half a voxel of cortex
MARROW = 60.0  # mg HA/cm3: less than trabecular bone with its marrow, more than soft tissue
CORTEX = 300.0  # mg HA/cm3: there is cortex where a voxel or one beside it has as much
SOFT_CORTEX = 50.0  # mg HA/cm3, width of the threshold in `closure`
CLOSED = 0.9  # share of the outline that needs cortex, as of a closed ring in `contours`
SOFT = (0.0, 600.0)  # mg HA/cm3: a voxel of the border counts from nothing to wholly
FEATURES = ("area", "outline", "core", "rim", "peak", "mean")
FITTED = ("Tt.Ar", "Tb.BMD", "Ct.BMD", "Ct.Th")
ATTRIBUTES = (*FITTED, "rotation")
UNITS = {"Tt.Ar": "mm2", "Tb.BMD": "mg HA/cm3", "Ct.BMD": "mg HA/cm3", "Ct.Th": "mm", "rotation": "degrees"}
LEAST = 4  # scans that `fit` must be given
RIDGE = 1e-4  # variance of a logarithm that is added to each feature's
PLANE = ndimage.generate_binary_structure(2, 1)[None]
WIDE = (np.hypot(*np.mgrid[-2:3, -2:3]) < 2.5)[None]  # no gap between radius and ulna is as wide
DISC = (np.hypot(*np.mgrid[-3:4, -3:4]) < 3.5)[None]  # what joins radius and ulna is narrower


class Gauge(NamedTuple):
    """Power laws: each attribute of `FITTED` is a product of powers of `FEATURES`.

    `powers` (1 + features, attributes), the constant first; `low`, `high` (attributes,): the range of the fitted scans;
    `closed`: the share of the outline that must have cortex for a bone to be read.
    """

    powers: Tensor
    low: Tensor
    high: Tensor
    closed: Tensor = torch.tensor(CLOSED)

    @property
    def within(self) -> tuple[Tensor, Tensor]:
        """`low` and `high` of all `ATTRIBUTES`, NaN where there is none."""
        none = torch.full((len(ATTRIBUTES) - len(FITTED),), torch.nan)
        return torch.cat([self.low, none]), torch.cat([self.high, none])

    def read(self, density: Tensor, spacing) -> Tensor:
        """`ATTRIBUTES` (n, 5) of densities (n, 1, z, y, x) in mg HA/cm3, differentiable; NaN if no cortex closes."""
        return self.of(features(density, spacing, float(self.closed)))

    def of(self, found: Tensor) -> Tensor:
        """`ATTRIBUTES` (n, 5) from `features`."""
        return torch.cat([(_terms(found) @ self.powers).exp(), found[:, len(FEATURES) :]], 1)


def features(density: Tensor, spacing, closed: float = CLOSED) -> Tensor:
    """What a coarse grid tells of bones (n, 1, z, y, x) in mg HA/cm3: (n, `FEATURES` and rotation), differentiable.

    area in mm2 and outline in mm of the soft outer contour; mean density of the core, of the rim about it per length of
    outline (mg/cm3 mm), the rim's density weighted by itself, the mean density within; rotation in degrees. Which
    voxels are looked at, the radius and not the ulna, is decided without a gradient. NaN if no cortex closes.
    """
    density, spacing = _coarse(density, spacing)
    n, _, z, y, x = density.shape
    flat = density.reshape(n * z, y, x)
    radius = _outlines(_steady(density))
    outer = torch.from_numpy(radius).to(flat)
    near, deep = _grown(outer, 1), _shrunk(outer, 1)
    inside = deep + (near - deep) * ((flat - SOFT[0]) / (SOFT[1] - SOFT[0])).clamp(0, 1)
    core = _shrunk(inside, 2)
    around = _grown(inside, 1)
    rim = around - core

    def total(field):
        return field.reshape(n, -1).sum(1)

    voxel = spacing[1] * spacing[2]
    area = total(inside) * voxel / z
    step_y, step_x = torch.diff(inside, dim=1)[:, :, :-1], torch.diff(inside, dim=2)[:, :-1]
    slope = ((step_y / spacing[1]) ** 2 + (step_x / spacing[2]) ** 2 + 1e-6).sqrt() - 1e-3
    outline = total(slope) * voxel / z
    middle = total(flat * core) / total(core)
    shell = total(flat * rim) * voxel / z / outline
    mineral = flat.clamp(min=0) * rim
    peak = total(mineral**3) / total(mineral**2)
    mean = total(flat * around) * voxel / z / area
    found = torch.stack([area, outline, middle, shell, peak, mean, _rotation(inside, n, spacing)], 1)
    enough = torch.from_numpy(_closed(flat.detach().cpu().numpy(), radius, n) >= closed).to(found.device)
    return torch.where(enough[:, None], found, torch.nan)


def closure(density: Tensor, spacing) -> Tensor:
    """Share of the outline at which bones (n, 1, z, y, x) have cortex, (n,), differentiable: softly counted."""
    density, _ = _coarse(density, spacing)
    n, _, z, y, x = density.shape
    flat = density.reshape(n * z, y, x)
    edge = torch.from_numpy(_edge(_outlines(_steady(density)))).to(flat).reshape(n, -1)
    cortex = torch.sigmoid((_grown(flat, 1) - CORTEX) / SOFT_CORTEX).reshape(n, -1)
    return (edge * cortex).sum(1) / edge.sum(1).clamp(min=1)


def _coarse(density, spacing):
    spacing = list(spacing)
    while min(spacing) < GRID_MM and not any(n % 2 for n in density.shape[2:]):
        density, spacing = downsample(density), [2 * s for s in spacing]
    return density, spacing


def _steady(density):
    """Slices (n * z, y, x) on which outlines are sought: a mean of three, so that they fit one another."""
    steady = ndimage.uniform_filter(density[:, 0].detach().cpu().numpy(), (0, 3, 0, 0), mode="nearest")
    return steady.reshape(-1, *steady.shape[2:])


def _edge(radius):
    return radius & ~ndimage.binary_erosion(radius, PLANE)


def _outlines(flat):
    """The radius and what it encloses, in every slice (n, y, x)."""
    # Where the cortex has a gap, marrow fills it; what is narrower than marrow lies between two bones, or about one
    marrow = (ndimage.median_filter(flat, (1, 3, 3)) > MARROW) & (flat < CORTEX)
    marrow = ndimage.binary_opening(marrow, WIDE)
    filled = ndimage.binary_fill_holes((flat > BONE) | marrow, PLANE)
    body = ndimage.binary_erosion(filled, DISC, border_value=1)
    labels, count = ndimage.label(body, np.pad(PLANE, ((1, 1), (0, 0), (0, 0))))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    largest = sizes[labels].max((1, 2), keepdims=True)
    body &= sizes[labels] == largest
    return ndimage.binary_dilation(body, DISC) & filled


def _closed(flat, radius, n):
    """Share of the outline of every bone (n,) at which there is cortex."""
    edge = _edge(radius)
    cortex = ndimage.maximum_filter(flat, (1, 3, 3)) > CORTEX
    found, whole = ((mask.reshape(n, -1)).sum(1) for mask in (edge & cortex, edge))
    return found / np.maximum(whole, 1)


def _grown(field, voxels):
    return F.max_pool2d(field[:, None], 2 * voxels + 1, 1, voxels)[:, 0]


def _shrunk(field, voxels):
    return 1 - _grown(1 - field, voxels)


def _rotation(inside, n, spacing):
    """Degrees between the long axis of the bone's cross-section and the y axis, from second moments."""
    _, y, x = inside.shape
    weight = inside.reshape(n, -1, y, x).sum(1)
    total = weight.sum((1, 2))
    at_y = torch.arange(y).to(inside)[None, :, None] * spacing[1]
    at_x = torch.arange(x).to(inside)[None, None, :] * spacing[2]
    dy = at_y - ((weight * at_y).sum((1, 2)) / total)[:, None, None]
    dx = at_x - ((weight * at_x).sum((1, 2)) / total)[:, None, None]
    yy, xx, xy = ((weight * part).sum((1, 2)) / total for part in (dy * dy, dx * dx, dy * dx))
    return torch.rad2deg(0.5 * torch.atan2(2 * xy, yy - xx))


def _terms(found):
    logs = found[:, : len(FEATURES)].clamp(min=1).log()
    return torch.cat([torch.ones_like(logs[:, :1]), logs], 1)


def fit(found: Tensor, measured: np.ndarray, closed: float = CLOSED) -> Gauge:
    """A `Gauge` by ridge regression, on logarithms, of what `morphometry` measured (n, `FITTED`) on `features`.

    Scans with NaN on either side are left out. Raises `InputError` if fewer than `LEAST` remain.
    """
    x, y = _terms(found).double(), torch.as_tensor(np.asarray(measured)).double()
    kept = x.isfinite().all(1) & y.isfinite().all(1)
    x, y = x[kept], y[kept]
    if len(x) < LEAST:
        raise InputError(f"{len(x)} measured scans are too few for a gauge; at least {LEAST} are needed")
    mean = x.mean(0)
    centred, logs = x - mean, y.log()
    square = centred.T @ centred + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    powers = torch.linalg.solve(square, centred.T @ (logs - logs.mean(0)))
    powers[0] = logs.mean(0) - mean[1:] @ powers[1:]
    return Gauge(powers.float(), y.amin(0).float(), y.amax(0).float(), torch.tensor(closed))


def of_scans(
    stacks: Stacks, measured: list[dict], n: int, closed: float = CLOSED
) -> tuple[Tensor, np.ndarray, list[dict]]:
    """`features` of all held-out and `n` training scans, what the rows `measured` say of them, and their own rows."""
    first = list({row["scan"]: row for row in stacks.rows}.values())
    keep = sorted(i for i, row in enumerate(first) if row["split"] == "held-out")
    train = [i for i in range(len(first)) if i not in set(keep)]
    keep += [train[i] for i in np.unique(np.linspace(0, len(train) - 1, max(n, 1)).astype(int))]
    rows, table = [first[i] for i in sorted(keep)], {row["scan"]: row for row in measured}
    spacing, parts = stacks.meta["spacing_mm"], []
    for row in rows:
        scan = stacks.volumes[row["volume"]].astype(np.float32)
        block = 2 ** max(0, int(np.ceil(np.log2(GRID_MM / min(spacing)))))
        scan = torch.from_numpy(scan[tuple(slice(k // block * block) for k in scan.shape)])[None, None]
        low, high = stacks.meta["intensity"]
        parts.append(features(low + (high - low) * scan, spacing, closed))
    values = [[float(table[row["scan"]].get(name) or "nan") for name in FITTED] for row in rows]
    return torch.cat(parts), np.array(values), rows


def agreement(read: Tensor, measured: np.ndarray, patients: list[str], *, seed: int, draws: int) -> list[dict]:
    """How a gauge's readings (n, ...) agree with what `morphometry` measured (n, `FITTED`): one row an attribute.

    N scans and patients, correlation r, bias (read - measured) and SD of the error, r and bias with 95 % intervals by
    resampling patients.
    """
    x, y = read[:, : len(FITTED)].double().numpy(), np.asarray(measured, float)
    kept = np.isfinite(x).all(1) & np.isfinite(y).all(1)
    names, patient = np.unique(np.asarray(patients)[kept], return_inverse=True)
    x, y = x[kept], y[kept]
    rng, members = numpy_rng(seed, "agreement"), [np.flatnonzero(patient == i) for i in range(len(names))]
    some = [np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))]) for _ in range(draws)]
    rows = []
    for k, name in enumerate(FITTED):
        found = {"attribute": name, "unit": UNITS[name], "N": len(x), "patients": len(names)}
        for key, statistic in (("r", _correlation), ("bias", lambda a, b: float((a - b).mean()))):
            low, high = np.nanquantile([statistic(x[i, k], y[i, k]) for i in some], [0.025, 0.975])
            found |= {key: statistic(x[:, k], y[:, k]), f"{key} low": float(low), f"{key} high": float(high)}
        rows.append(found | {"SD of error": float((x[:, k] - y[:, k]).std()), "SD": float(y[:, k].std())})
    return rows


def rows(scans: list[dict], measured: np.ndarray, read: Tensor) -> list[dict]:
    """What was measured and what is read of every scan, as a table."""
    table = []
    for scan, theirs, ours in zip(scans, measured.tolist(), read.tolist(), strict=True):
        row = {key: scan[key] for key in ("scan", "patient", "split")}
        for name, a, b in zip(FITTED, theirs, ours, strict=False):
            row |= {f"{name} measured": a, f"{name} read": b}
        table.append(row)
    return table


def panels(measured: np.ndarray, read: Tensor, sets: dict[str, np.ndarray]) -> list[dict]:
    """For `figures.scatter`: what is read against what was measured (n, `FITTED`), by set of scans (masks)."""
    drawn = []
    for k, name in enumerate(FITTED):
        ends = [float(np.nanmin(measured[:, k])), float(np.nanmax(measured[:, k]))]
        dots = {label: (measured[mask, k], read[mask, k].numpy()) for label, mask in sets.items()}
        drawn.append(
            dict(title=f"{name}, {UNITS[name]}", x="morphometry", y="read", sets=dots, lines={"": (ends, ends)})
        )
    return drawn


def _correlation(a, b):
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else float("nan")
