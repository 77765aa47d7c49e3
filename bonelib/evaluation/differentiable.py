"""Differentiable surrogate of morphometry: area, densities and cortex on voxels of about a millimetre.

On such voxels a cortex is one voxel thick and `morphometry` finds no contours. Here rays leave the middle of the bone;
where they leave the bone, and how dense it is at each depth below its surface, are sums that follow every voxel
smoothly. Only the window about the radius is cut by thresholds, without a gradient. `fit` calibrates these sums against
`morphometry` on fine voxels; of so thin a cortex, thickness and density can be separated in part only. `agreement`
shows how well, on patients that were not fitted.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from sklearn.linear_model import Ridge
from torch import Tensor

from bonelib import InputError
from bonelib.core.pyramid import downsample
from bonelib.core.random import numpy_rng
from bonelib.evaluation.statistics import Interval, patient_interval
from bonelib.scans.dataset import Stacks

GRID_MM = 0.9  # volumes are averaged over blocks while their voxels are finer than this
BONE = 200.0  # mg HA/cm3: more than soft tissue on such voxels, less than half a voxel of cortex
MARROW = 60.0  # mg HA/cm3: less than trabecular bone with its marrow, more than soft tissue
CORTEX, SOFT_CORTEX = 250.0, 50.0  # mg HA/cm3: a ray has met cortex where it has as much, softly counted
CLOSED = 0.8  # share of the rays that must meet cortex
SOLID = 600.0  # mg HA/cm3: a step through as much ends a bone, through less in part
RAYS, STEP, FAR = 64, 0.5, 24.0  # of each slice; mm between points of a ray, and mm to its end
GROWN, SOFT = 2, 1.0  # voxels by which the window about the radius is wider than it, and over which its edge is spread
EDGE = 0.4  # mm over which one depth goes over into another
DEPTHS, SHELL = (-0.5, 0.5, 1.5, 2.5, 3.5), 0.5  # mm below the surface at which density is read, and SD of each
RIM = (-1.5, 3.0)  # mm below the surface: where a cortex is looked for
SMALL = 20.0  # mm2: no radius is as small
FAINT = 30.0  # no weight is below e^-30: what float32 can hold in part only takes several times as long to multiply
FEATURES = ("area", "outline", "peak", "core", *(f"at {d:g} mm" for d in DEPTHS))
FITTED = ("Tt.Ar", "Tb.BMD", "Ct.BMD", "Ct.Th")
ATTRIBUTES = (*FITTED, "rotation")
UNITS = {"Tt.Ar": "mm2", "Tb.BMD": "mg HA/cm3", "Ct.BMD": "mg HA/cm3", "Ct.Th": "mm", "rotation": "degrees"}
LEAST = 4  # scans that `fit` must be given
RIDGE = 1e-4  # variance of a logarithm that is added to each feature's
PLANE = np.pad(ndimage.generate_binary_structure(2, 1)[None], ((1, 1), (0, 0), (0, 0)))  # neighbours in a slice
WIDE = np.hypot(*np.mgrid[-2:3, -2:3]) < 2.5  # no gap between radius and ulna is as wide
DISC = np.hypot(*np.mgrid[-3:4, -3:4]) < 3.5  # what joins radius and ulna is narrower


class SurrogateMorphometry(NamedTuple):
    """Power laws: each attribute of `FITTED` is a product of powers of `FEATURES`.

    `powers` (1 + features, attributes), the constant first; `low`, `high` (attributes,): the range of the fitted scans;
    `closed`: the share of the rays that must meet cortex for a bone to be read.
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

    def read_with_margin(self, density: Tensor, spacing) -> Tensor:
        """`read`, and behind it (n, 6) the share of closed rays less what a reading needs."""
        seen = _look(density, spacing)
        return torch.cat([self.of(_features(seen, float(self.closed))), (_closure(seen) - self.closed)[:, None]], 1)

    def of(self, found: Tensor) -> Tensor:
        """`ATTRIBUTES` (n, 5) from `features`."""
        return torch.cat([(_terms(found) @ self.powers).exp(), found[:, len(FEATURES) :]], 1)


def features(density: Tensor, spacing, closed: float = CLOSED) -> Tensor:
    """What a coarse grid tells of bones (n, 1, z, y, x) in mg HA/cm3: (n, `FEATURES` and rotation), differentiable.

    area in mm2 and outline in mm of the surface; the rim's density weighted by itself, the mean density of the core,
    and at each of `DEPTHS`; rotation in degrees. NaN if less than the share `closed` of the rays meets cortex.
    """
    return _features(_look(density, spacing), closed)


def _features(seen, closed):
    turn = 2 * np.pi / RAYS
    area_of_step = seen.away * STEP * turn
    surface = seen.surface.reshape(seen.n, -1, RAYS)
    slope = (surface.roll(-1, 2) - surface.roll(1, 2)) / (2 * turn)
    area = (surface**2 * turn / 2).sum(2).mean(1)
    outline = ((surface**2 + slope**2 + 1e-6).sqrt() * turn).sum(2).mean(1)

    def total(field):
        return (field * area_of_step).reshape(seen.n, -1).sum(1)

    core = torch.sigmoid((seen.depth - DEPTHS[-1] - 2 * SHELL) / EDGE)
    mineral = seen.density.clamp(min=0) * _rim(seen)
    parts = [area, outline, total(mineral**3) / total(mineral**2), total(seen.density * core) / total(core)]
    for depth in DEPTHS:
        shell = (((seen.depth - depth) / SHELL).square() / 2).clamp(max=FAINT).neg().exp()
        parts.append(total(seen.density * shell) / total(shell))
    found = torch.stack([*parts, _rotation(surface)], 1)
    enough = (_closure(seen) >= closed) & (area > SMALL)
    return torch.where(enough[:, None], found, torch.nan)


class _Seen(NamedTuple):
    """Along rays of all slices of n bones (n * z, RAYS, points): density, window, depth below the surface in mm; how
    far away points are (points,), and the surface is (n * z, RAYS)."""

    n: int
    density: Tensor
    window: Tensor
    depth: Tensor
    away: Tensor
    surface: Tensor


def _look(density, spacing) -> _Seen:
    density, spacing = _coarse(density, spacing)
    n, _, z, y, x = density.shape
    flat, window = density.reshape(n * z, y, x), _window(density).to(density)
    # From the middle of what is in the window, one for all slices of a bone
    mass = ((flat.clamp(0, SOLID) + 1) * window).reshape(n, z, y, x).sum(1)
    whole = mass.sum((1, 2)).clamp(min=1e-9)
    middle = [(mass.sum(3 - axis) * torch.arange(k).to(mass)).sum(1) / whole for axis, k in ((1, y), (2, x))]
    angle, away = torch.arange(RAYS).to(mass) * (2 * np.pi / RAYS), torch.arange(0.5, FAR / STEP).to(mass) * STEP
    places = []
    for start, mm, size, way in ((middle[1], spacing[2], x, angle.cos()), (middle[0], spacing[1], y, angle.sin())):
        at = start.repeat_interleave(z)[:, None, None] + way[:, None] * away / mm
        places.append(2 * at / (size - 1) - 1)
    along = F.grid_sample(torch.stack([flat, window], 1), torch.stack(places, -1), align_corners=True)
    density, window = along.unbind(1)
    # A point is inside if there is something solid at it or beyond: no gap in a cortex lets a ray out at once
    hollow = 1 - (density / SOLID).clamp(0, 0.999) * window
    inside = 1 - hollow.log().flip(2).cumsum(2).clamp(min=-FAINT).exp().flip(2)
    surface = inside.sum(2) * STEP
    return _Seen(n, density, window, surface[:, :, None] - away, away, surface)


def _rim(seen):
    low, high = RIM
    rim = torch.sigmoid((seen.depth - low) / EDGE) * torch.sigmoid((high - seen.depth) / EDGE) * seen.window
    return rim.clamp(min=np.exp(-FAINT / 2))


def _closure(seen):
    densest = (seen.density * _rim(seen)).amax(2)
    return torch.sigmoid((densest - CORTEX) / SOFT_CORTEX).reshape(seen.n, -1).mean(1)


def _coarse(density, spacing):
    spacing = list(spacing)
    while min(spacing) < GRID_MM and not any(n % 2 for n in density.shape[2:]):
        density, spacing = downsample(density), [2 * s for s in spacing]
    return density, spacing


def _window(density):
    """Where the radius of bones (n, 1, z, y, x) is looked for, (n * z, y, x): 1 at the bone and a little about it."""
    n, _, z, y, x = density.shape
    # A mean of three slices, so that outlines of neighbours fit one another
    steady = ndimage.uniform_filter(density[:, 0].detach().cpu().numpy(), (0, 3, 0, 0), mode="nearest")
    radius = ndimage.binary_dilation(_outlines(steady.reshape(n * z, y, x)), PLANE, iterations=GROWN)
    soft = ndimage.gaussian_filter(radius.reshape(n, z, y, x).astype(np.float32), (0, SOFT, SOFT, SOFT), mode="nearest")
    return torch.from_numpy(soft).reshape(n * z, y, x)


def _outlines(flat):
    """The radius and what it encloses, in every slice (n, y, x)."""
    # Where the cortex has a gap, marrow fills it; what is narrower than marrow lies between two bones, or about one
    marrow = (_median(flat) > MARROW) & (flat < CORTEX)
    marrow = _dilated(~_dilated(~marrow, WIDE, outside=True), WIDE)
    empty, _ = ndimage.label(np.pad(~((flat > BONE) | marrow), ((0, 0), (1, 1), (1, 1)), constant_values=True), PLANE)
    filled = (empty != empty[:, :1, :1])[:, 1:-1, 1:-1]
    body = ~_dilated(~filled, DISC)
    labels, count = ndimage.label(body, PLANE)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    largest = sizes[labels].max((1, 2), keepdims=True)
    body &= sizes[labels] == largest
    return _dilated(body, DISC) & filled


def _dilated(masks, disc, outside=False):
    """Masks (n, y, x) grown by a disc (k, k); what lies outside of them is `outside`. `ndimage` takes longer."""
    (_, y, x), reach = masks.shape, len(disc) // 2
    padded = np.pad(masks, ((0, 0), (reach, reach), (reach, reach)), constant_values=outside)
    grown = np.zeros_like(masks)
    for i, j in zip(*np.nonzero(disc), strict=True):
        grown |= padded[:, i : i + y, j : j + x]
    return grown


def _median(flat):
    """The median of every 3 x 3 voxels of slices (n, y, x), which `ndimage` sorts one by one, many times slower.

    It is the median of the largest of three columns' least, the median of their medians, and the least of their
    largest (Smith 1996, "Implementing median filters in XC4000E FPGAs").
    """
    padded = np.pad(flat, ((0, 0), (1, 1), (1, 1)), mode="edge")
    low, middle, high = _sorted3(*(padded[:, i : i + flat.shape[1]] for i in range(3)))

    def beside(values):
        return (values[:, :, i : i + flat.shape[2]] for i in range(3))

    return _sorted3(_sorted3(*beside(low))[2], _sorted3(*beside(middle))[1], _sorted3(*beside(high))[0])[1]


def _sorted3(a, b, c):
    low, high = np.minimum(a, b), np.maximum(a, b)
    return np.minimum(low, c), np.maximum(low, np.minimum(high, c)), np.maximum(high, c)


def _rotation(surface):
    """Degrees between the long axis of cross-sections (n, z, RAYS) and the y axis, from the second moments of all."""
    angle = torch.arange(RAYS).to(surface) * (2 * np.pi / RAYS)
    dy, dx = angle.sin(), angle.cos()

    def total(field):
        return field.sum((1, 2))

    area, arm, square = total(surface**2) / 2, surface**3 / 3, surface**4 / 4
    y, x = total(arm * dy) / area, total(arm * dx) / area
    yy, xx = total(square * dy * dy) / area - y**2, total(square * dx * dx) / area - x**2
    xy = total(square * dy * dx) / area - y * x
    return torch.rad2deg(0.5 * torch.atan2(2 * xy, yy - xx))


def _terms(found):
    logs = found[:, : len(FEATURES)].clamp(min=1).log()
    return torch.cat([torch.ones_like(logs[:, :1]), logs], 1)


def fit(found: Tensor, measured: np.ndarray, closed: float = CLOSED) -> SurrogateMorphometry:
    """Fit by ridge regression, on logarithms, what `morphometry` measured (n, `FITTED`) to `features`.

    Scans with NaN on either side are left out. Raises `InputError` if fewer than `LEAST` remain.
    """
    x, y = _terms(found).double(), torch.as_tensor(np.asarray(measured)).double()
    kept = x.isfinite().all(1) & y.isfinite().all(1)
    x, y = x[kept], y[kept]
    if len(x) < LEAST:
        raise InputError(f"{len(x)} measured scans are too few for a fit; at least {LEAST} are needed")
    ridge = Ridge(RIDGE * len(x), solver="cholesky").fit(x[:, 1:].numpy(), y.log().numpy())
    powers = torch.from_numpy(np.vstack([ridge.intercept_, ridge.coef_.T]))
    return SurrogateMorphometry(powers.float(), y.amin(0).float(), y.amax(0).float(), torch.tensor(closed))


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
        scan, coarse = _coarse(scan, spacing)
        low, high = stacks.meta["intensity"]
        parts.append(features(low + (high - low) * scan, coarse, closed))
    values = [[float(table[row["scan"]].get(name) or "nan") for name in FITTED] for row in rows]
    return torch.cat(parts), np.array(values), rows


def agreement(read: Tensor, measured: np.ndarray, patients: list[str], *, seed: int, draws: int) -> list[dict]:
    """How the surrogate's readings (n, ...) agree with what `morphometry` measured (n, `FITTED`): one row an attribute.

    N scans and patients, correlation r, bias (read - measured) and SD of the error, r and bias with 95 % intervals by
    resampling patients.
    """
    x, y = read[:, : len(FITTED)].double().numpy(), np.asarray(measured, float)
    kept = np.isfinite(x).all(1) & np.isfinite(y).all(1)
    x, y, rows = x[kept], y[kept], []

    def statistics(i):
        return [[_correlation(a, b), (a - b).mean()] for a, b in zip(x[i].T, y[i].T, strict=True)]

    found = patient_interval(statistics, np.asarray(patients)[kept], rng=numpy_rng(seed, "agreement"), draws=draws)
    for k, name in enumerate(FITTED):
        row = {"attribute": name, "unit": UNITS[name], "N": found.N, "patients": found.patients}
        row |= Interval(*(numbers[k] for numbers in found[:3]), found.N, found.patients).columns("r", "bias")
        rows.append(row | {"SD of error": float((x[:, k] - y[:, k]).std()), "SD": float(y[:, k].std())})
    return rows


def _correlation(a, b):
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else float("nan")
