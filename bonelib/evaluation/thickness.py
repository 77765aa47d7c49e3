"""Local thickness of a structure, and of the space between medial axes, in mm and finer than a voxel.

The thickness at a point is the diameter of the largest sphere that holds the point and fits into the structure
(Hildebrand and Rueegsegger 1997, J Microsc 185:67). Spheres are centred on the ridge of the distance to the
surface. What a voxel grid rounds off, half a voxel and more on trabeculae two voxels thick, is recovered twice: the
surface lies where the density crosses the threshold between two voxels, and the ridge where the distance would
peak between two voxels.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
from scipy import ndimage

SLOPE = 0.8  # the distance rises so steeply, per mm, towards a neighbour whose sphere holds one's own
FACING = 0.7  # across the medial axis it falls so steeply: walls that face one another, not corners or roughness
LEVEL = 0.1  # and does not rise by more, per mm, to either side, so that noise tears no hole into the axis
LIKE = 0.5  # voxels: radii of neighbours that differ by no more may be told apart by noise alone
MASK_SMOOTHING = 0.8  # voxels: the surface of a mask is that of the smoothed mask
MIRROR_MM = 0.9  # where the array ends, a structure goes on as its mirror image for so far
FAR = -1e6  # stands for a distance not worked out, away from the surface and outside
BEYOND = 0.87  # voxels, from the surface to the nearest voxel outside, at most
LARGE = 6  # lattice steps in a sphere's radius for each step between the centres of such spheres
CLASSES = 8  # sphere radii are told apart to this part of a voxel
CHUNK = 1 << 21  # voxels painted, or measured, at a time
DIRECTIONS = np.array([d for d in product((-1, 0, 1), repeat=3) if d > (0, 0, 0)])
DIRECTIONS = DIRECTIONS[np.argsort(np.abs(DIRECTIONS).sum(1), kind="stable")]  # axes first: they sort out most


class Ridge(NamedTuple):
    """Centres of maximal spheres: voxel (flat index), way from it to the ridge in voxels (n, 3), radius in mm.

    `medial` tells which are on the medial axis, between walls that face one another.
    """

    voxels: np.ndarray
    shifts: np.ndarray
    radii: np.ndarray
    medial: np.ndarray


def local_thickness(inside: np.ndarray, spacing, *, level: np.ndarray | None = None, stride: int = 1) -> np.ndarray:
    """Diameter in mm (z, y, x) of the largest sphere within `inside` that holds a voxel; 0 outside, NaN without a wall.

    `level` (z, y, x) is positive inside and its zero is the surface, by default that of `inside` itself, smoothed.
    Where it does not change sign, the surface lies halfway between voxels. Where the structure meets the end of the
    array it goes on as its mirror image. With `stride` only every so many voxels along each axis are answered,
    `inside[::stride, ::stride, ::stride]`.
    """
    inside = np.asarray(inside, bool)
    if inside.all() or not inside.any():
        return np.where(inside, np.float32(np.nan), np.float32(0))[::stride, ::stride, ::stride]
    frame = _frame(inside, spacing, stride)
    framed = np.pad(inside, frame, mode="symmetric")
    level = _mask_level(inside) if level is None else level
    ridge, distance = _distance_and_ridge(framed, spacing, np.pad(level, frame, mode="symmetric"))
    return _spheres(ridge, distance, inside, frame, spacing, stride)


def thickness_and_axes(
    inside: np.ndarray, domain: np.ndarray, spacing, *, level: np.ndarray | None = None, stride: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Local thickness of `inside`, and that of `domain` less the medial axis of `inside`, each as `local_thickness`.

    The second tells how far the medial axes lie apart: where walls of `inside` face one another, the ridge of the
    distance to them. `inside` lies in `domain`, whose border is a wall to both, unless the array ends there.
    """
    inside, domain = np.asarray(inside, bool), np.asarray(domain, bool)
    nothing = np.where(domain, np.float32(np.nan), np.float32(0))[::stride, ::stride, ::stride]
    if inside.all() or not inside.any():
        return np.where(inside[::stride, ::stride, ::stride], nothing, 0), nothing
    frame = _frame(domain, spacing, stride)
    framed = np.pad(inside, frame, mode="symmetric")
    level = _mask_level(inside) if level is None else level
    ridge, distance = _distance_and_ridge(framed, spacing, np.pad(level, frame, mode="symmetric"))
    thickness = _spheres(ridge, distance, inside, frame, spacing, stride)
    within = np.pad(domain, frame, mode="symmetric")
    wall = np.flatnonzero(_next_to(within))
    points = np.concatenate([ridge.voxels[ridge.medial], wall])
    if not len(points):
        return thickness, nothing
    shifts = np.zeros((len(points), 3), np.float32)
    shifts[: -len(wall) or None] = ridge.shifts[ridge.medial] * np.float32(spacing)
    away = np.ones(framed.shape, bool)
    away.ravel()[points] = False
    voxels = np.flatnonzero(within)
    distance = np.zeros(framed.shape, np.float32)
    distance.ravel()[voxels] = _to_points(voxels, away, points, shifts, spacing, surface=False)
    between = _ridge(distance, within, spacing)
    return thickness, _spheres(between, distance, domain, frame, spacing, stride)


def _mask_level(inside):
    return ndimage.gaussian_filter(inside.astype(np.float32), MASK_SMOOTHING, mode="nearest") - np.float32(0.5)


def _distance_and_ridge(inside, spacing, level):
    """Ridge of the distance to the surface, and that distance in mm (z, y, x), negative in the voxels just outside."""
    shell, shifts = _surface(inside, level, spacing)
    voxels = np.flatnonzero(inside)
    distance = np.full(inside.shape, FAR, np.float32)
    distance.ravel()[shell] = -np.sqrt((shifts**2).sum(1))
    beyond, depth = _beyond(inside, shell, shifts, spacing)
    distance.ravel()[beyond] = -depth
    distance.ravel()[voxels] = _to_points(voxels, inside, shell, shifts, spacing, surface=True)
    return _ridge(distance, inside, spacing), distance


def _frame(inside, spacing, stride):
    """Voxels to add before and after each axis: a mirror image where the structure meets the end, else a border."""
    frame = []
    for axis, step in enumerate(spacing):
        faces = inside.take(0, axis), inside.take(-1, axis)
        wanted = [int(MIRROR_MM / step) + 2 if f.any() else 1 for f in faces]
        frame.append([-(-n // stride) * stride for n in wanted])
    return frame


def _spheres(ridge, distance, inside, frame, spacing, stride):
    """Diameter of the largest sphere over each answered voxel.

    Voxels at the surface that the spheres leave out by a part of a voxel take the largest of their neighbours.
    """
    core = tuple(
        slice(f // stride, f // stride - (-n // stride)) for (f, _), n in zip(frame, inside.shape, strict=True)
    )
    found = _painted(ridge, distance.shape, spacing, stride)[core]
    answered = inside[::stride, ::stride, ::stride]
    padded, missed = np.pad(found, 1), np.flatnonzero(np.pad(answered & (found == 0), 1))
    largest, flat, steps = np.zeros(len(missed), np.float32), padded.ravel(), _steps(padded.shape)
    for direction in (*DIRECTIONS, *-DIRECTIONS):
        largest = np.maximum(largest, flat[missed + int(direction @ steps)])
    own = 2 * distance[::stride, ::stride, ::stride][core][answered & (found == 0)]
    flat[missed] = np.where(largest > 0, largest, own)
    return np.where(answered, padded[1:-1, 1:-1, 1:-1], np.float32(0))


def _surface(inside, level, spacing):
    """Voxels outside with a neighbour inside, and the way in mm (n, 3) from each to the surface."""
    shape, steps = inside.shape, _steps(inside.shape)
    shell = np.flatnonzero(_next_to(inside))
    place = np.unravel_index(shell, shape)
    flat, levels, level = inside.ravel(), level, level.ravel()
    inverse = np.zeros((len(shell), 3), np.float32)  # of the way in mm along each axis to the surface
    for axis, side in product(range(3), (-1, 1)):
        at = np.flatnonzero((place[axis] + side >= 0) & (place[axis] + side < shape[axis]))
        at = at[flat[shell[at] + side * steps[axis]]]
        out, into = level[shell[at]], level[shell[at] + side * steps[axis]]
        share = np.where(out <= 0, np.clip(out / np.minimum(out - into, -1e-6), 0.02, 0.98), 0.5)
        there = side / (share * spacing[axis])
        inverse[at, axis] = np.where(np.abs(there) > np.abs(inverse[at, axis]), there, inverse[at, axis])
    # the plane that cuts the axes at 1 / inverse is nearest at inverse / |inverse|^2
    shifts = inverse / (inverse**2).sum(1, keepdims=True)
    inner = np.all([(p > 0) & (p < n - 1) for p, n in zip(place, shape, strict=True)], axis=0) & (level[shell] <= 0)
    at = np.flatnonzero(inner)
    normal = gradient_at(levels, shell[at], spacing)
    normal /= np.maximum(np.sqrt((normal**2).sum(1, keepdims=True)), 1e-9)
    # one estimate per axis cut, |normal| x way along it, weighed by how well the axis lies
    inverse = inverse[at]
    cut = np.where(inverse != 0, normal, 0)
    weight = (cut**2).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = np.where(inverse != 0, np.abs(cut) ** 3 / np.abs(inverse), 0).sum(1) / weight
    agrees = (weight > 0.3) & ((cut * inverse) >= 0).all(1)
    shifts[at[agrees]] = (depth[:, None] * normal)[agrees]
    return shell, shifts


def _beyond(inside, shell, shifts, spacing):
    """Voxels next to the shell, away from the structure, and how far in mm they lie from its surface."""
    known = inside.copy()
    known.ravel()[shell] = True
    beyond = np.flatnonzero(_next_to(known))
    row = np.full(inside.size, -1, np.int32)
    row[shell] = np.arange(len(shell), dtype=np.int32)
    place, square = np.unravel_index(beyond, inside.shape), np.full(len(beyond), np.inf, np.float32)
    for axis, side in product(range(3), (-1, 1)):
        at = np.flatnonzero((place[axis] + side >= 0) & (place[axis] + side < inside.shape[axis]))
        there = row[beyond[at] + side * _steps(inside.shape)[axis]]
        at, way = at[there >= 0], shifts[there[there >= 0]].copy()
        way[:, axis] += side * spacing[axis]
        square[at] = np.minimum(square[at], (way**2).sum(1))
    return beyond, np.sqrt(square)


def _next_to(inside):
    near = np.zeros(inside.shape, bool)
    for axis in range(3):
        a, b = _pair(axis)
        near[a] |= inside[b]
        near[b] |= inside[a]
    return near & ~inside


def gradient_at(values: np.ndarray, voxels: np.ndarray, spacing) -> np.ndarray:
    """Direction (n, 3) in which `values` (z, y, x) rise at voxels (flat indices) off the border, after Sobel."""
    flat, steps = values.ravel(), _steps(values.shape)
    gradient = np.zeros((len(voxels), 3), np.float32)
    for direction in DIRECTIONS:
        step, weight = int(direction @ steps), 2.0 ** -np.abs(direction).sum()
        difference = flat[voxels + step] - flat[voxels - step]
        gradient += difference[:, None] * (weight * direction / spacing).astype(np.float32)
    return gradient


def _to_points(voxels, away, points, shifts, spacing, *, surface):
    """Distance in mm of `voxels` to the nearest of `points`, voxels where `away` is False, each moved by its shift.

    If `surface`, the shift is at right angles to a surface, and the distance is that to its tangent plane: the point
    whose voxel is nearest may lie some voxels to the side. Else the points that are nearest to the six neighbours
    are tried as well.
    """
    nearest = ndimage.distance_transform_edt(away, spacing, return_distances=False, return_indices=True)
    shape, steps = away.shape, _steps(away.shape)
    row = np.zeros(away.size, np.int32)
    row[points] = np.arange(len(points), dtype=np.int32)
    nearest = nearest.reshape(3, -1)
    depth = np.sqrt((shifts**2).sum(1))
    normal = shifts / np.maximum(depth, 1e-9)[:, None]
    found = np.empty(len(voxels), np.float32)
    for start in range(0, len(voxels), CHUNK):
        here = voxels[start : start + CHUNK]
        place = np.unravel_index(here, shape)

        def to_point_of(at, place=place):
            target = [n[at] for n in nearest]
            which = row[target[0] * steps[0] + target[1] * steps[1] + target[2]]
            way = [((t - p) * h).astype(np.float32) for t, p, h in zip(target, place, spacing, strict=True)]
            return which, way, np.sqrt(sum((w + shifts[which, axis]) ** 2 for axis, w in enumerate(way)))

        which, way, distance = to_point_of(here)
        if surface:
            to_voxel = np.sqrt(sum(w**2 for w in way))
            to_plane = -sum(w * normal[which, axis] for axis, w in enumerate(way)) - depth[which]
            low = np.minimum(to_voxel - np.float32(BEYOND * min(spacing)), distance)
            distance = np.clip(to_plane, np.maximum(low, 0), distance)
        else:
            for axis, side in product(range(3), (-1, 1)):
                inside = np.clip(place[axis] + side, 0, shape[axis] - 1) - place[axis]
                distance = np.minimum(distance, to_point_of(here + inside * steps[axis])[2])
        found[start : start + CHUNK] = distance
    return found


def _ridge(distance, inside, spacing):
    """Voxels inside whose own is held by no neighbour's sphere, each with the peak of the distance next to it."""
    for axis in range(3):  # what goes on at the end of the array may have its ridge beyond: here is the best of it
        for end, last in ((0, 1), (-1, -2)):
            face, next_to_it = (np.moveaxis(distance, axis, 0)[i] for i in (end, last))
            np.copyto(face, next_to_it, where=np.moveaxis(inside, axis, 0)[end])
    core = np.zeros_like(inside)
    core[1:-1, 1:-1, 1:-1] = inside[1:-1, 1:-1, 1:-1]
    voxels, flat, steps = np.flatnonzero(core), distance.ravel(), _steps(distance.shape)
    height = flat[voxels]
    for direction in DIRECTIONS:
        length, step = np.linalg.norm(direction * spacing), int(direction @ steps)
        kept = np.maximum(flat[voxels - step], flat[voxels + step]) < height + np.float32(SLOPE * length)
        voxels, height = voxels[kept], height[kept]
    shifts, gain = np.zeros((len(voxels), 3), np.float32), np.zeros(len(voxels), np.float32)
    medial = np.zeros(len(voxels), bool)
    for direction in DIRECTIONS:
        length, step = np.linalg.norm(direction * spacing), int(direction @ steps)
        floor = height - np.float32(length)  # no distance falls more steeply, but it may not be known
        before, after = np.maximum(flat[voxels - step], floor), np.maximum(flat[voxels + step], floor)
        fall = height - np.minimum(before, after)
        across = (np.maximum(before, after) - height <= LEVEL * length) & (fall > FACING * length)
        across &= np.minimum(flat[voxels - step], flat[voxels + step]) > FAR
        medial |= across
        at = np.flatnonzero(across & (np.abs(after - before) > 2 * gain))
        difference = after[at] - before[at]
        gain[at] = np.abs(difference) / 2
        shifts[at] = (difference / (2 * fall[at]))[:, None] * direction
    ridge = Ridge(voxels, shifts, height + gain, medial)
    return _evened(ridge, distance.shape, spacing)


def _evened(ridge, shape, spacing):
    """Radius of the medial axis averaged over its next voxels, lest the largest sphere picks out the noise.

    Neighbours that differ by more than `LIKE` voxels are of another place, or of the slope of a ball's centre.
    """
    voxels, steps = ridge.voxels[ridge.medial], _steps(shape)
    row = np.full(np.prod(shape), -1, np.int32)
    row[voxels] = np.arange(len(voxels), dtype=np.int32)
    pairs = []
    for direction in DIRECTIONS:
        there = row[voxels + int(direction @ steps)]
        at = np.flatnonzero(there >= 0)
        pairs.append((at, there[at]))
    values = ridge.radii[ridge.medial]
    for _ in range(2):
        total, count = values.copy(), np.ones(len(values), np.float32)
        for one, other in pairs:
            alike = np.abs(values[one] - values[other]) < LIKE * min(spacing)
            i, j = one[alike], other[alike]
            total[i] += values[j]  # within a direction no voxel comes twice
            total[j] += values[i]
            count[i] += 1
            count[j] += 1
        values = total / count
    radii = ridge.radii.copy()
    radii[ridge.medial] = values
    return ridge._replace(radii=radii)


def _painted(ridge, shape, spacing, stride):
    """The largest sphere over every `stride`-th voxel: small ones are laid down first, larger ones over them."""
    spacing = np.asarray(spacing)
    grid = 2 * stride  # centres lie on half voxels
    centres = np.rint(2 * (np.stack(np.unravel_index(ridge.voxels, shape), 1) + ridge.shifts)).astype(np.int32)
    width = spacing.min() / CLASSES
    kept = _thinned(centres, ridge.radii / (spacing.min() * stride), grid)
    centres, ridge = centres[kept], Ridge(*(part[kept] for part in ridge))
    classes = np.floor(ridge.radii / width).astype(np.int64)
    reach = np.ceil((ridge.radii.max(initial=0) + width) / (spacing * stride)).astype(int) + 2
    lattice = np.zeros([-(-n // stride) + 2 * r for n, r in zip(shape, reach, strict=True)], np.float32)
    flat, steps = lattice.ravel(), _steps(lattice.shape)
    cell, rest = np.divmod(centres, grid)
    base = ((cell + reach) @ steps).astype(np.int64)
    key = classes * grid**3 + rest @ np.array([grid**2, grid, 1])
    order = np.argsort(key, kind="stable")
    key, base, radii = key[order], base[order], ridge.radii[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    stops = np.append(starts[1:], len(key))
    ball = {}
    for start, stop in zip(starts, stops, strict=True):
        level, residue = divmod(int(key[start]), grid**3)
        if level not in ball:
            ball = {level: _box(int(np.ceil((level + 1) * width / (spacing * stride).min())) + 1, reach)}
        rest = np.array(np.unravel_index(residue, (grid,) * 3))
        away = ((ball[level] * grid - rest) * spacing / 2) ** 2
        offsets = ball[level][away.sum(1) <= ((level + 0.5) * width) ** 2] @ steps
        if not len(offsets):
            continue
        value = np.float32(2 * radii[start:stop].mean())
        share = max(1, CHUNK // len(offsets))
        for first in range(start, stop, share):
            flat[(base[first : min(first + share, stop), None] + offsets).ravel()] = value
    return lattice[tuple(slice(r, r - (-n // stride)) for r, n in zip(reach, shape, strict=True))]


def _thinned(centres, radii, grid):
    """Which spheres to paint: of large ones (radii in lattice steps) that nearly coincide only the largest."""
    coarse = np.maximum(np.floor(radii / LARGE), 1).astype(np.int32)
    large = np.flatnonzero(coarse > 1)
    cell = centres[large] // (coarse[large, None] * grid)
    order = np.lexsort((-radii[large], *cell.T, coarse[large]))
    parts = np.column_stack([coarse[large], cell])[order]
    first = np.append(True, (parts[1:] != parts[:-1]).any(1))[: len(order)]
    return np.concatenate([np.flatnonzero(coarse <= 1), large[order[first]]])


def _box(size, reach):
    edges = [np.arange(-min(size, r) + 1, min(size, r)) for r in reach + 1]
    return np.stack(np.meshgrid(*edges, indexing="ij"), -1).reshape(-1, 3)


def _pair(axis):
    first, second = [slice(None)] * 3, [slice(None)] * 3
    first[axis], second[axis] = slice(None, -1), slice(1, None)
    return tuple(first), tuple(second)


def _steps(shape):
    return np.array([shape[1] * shape[2], shape[2], 1])
