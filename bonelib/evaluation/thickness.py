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

from bonelib.evaluation.neighbours import CHUNK, DIRECTIONS, gradient_at, parts_of, steps_of

SLOPE = 0.8  # the distance rises so steeply, per mm, towards a neighbour whose sphere holds one's own
FACING = 0.7  # across the medial axis it falls so steeply: walls that face one another, not corners or roughness
LEVEL = 0.1  # and does not rise by more, per mm, to either side, so that noise tears no hole into the axis
LIKE = 0.5  # voxels: radii of neighbours that differ by no more may be told apart by noise alone
MASK_SMOOTHING = 0.8  # voxels: the surface of a mask is that of the smoothed mask
MIRROR_MM = 0.9  # where the array ends, a structure goes on as its mirror image for so far
FAR = np.float32(-1e6)  # stands for a distance not worked out, away from the surface and outside
BEYOND = 0.87  # voxels, from the surface to the nearest voxel outside, at most
LARGE = 6  # lattice steps in a sphere's radius for each step between the centres of such spheres
CLASSES = 8  # sphere radii are told apart to this part of a voxel


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
    distance = _to_surface(inside, spacing, level, frame)
    ridge = _ridge(distance, np.pad(inside, frame, mode="symmetric"), spacing)
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
    distance = _to_surface(inside, spacing, level, frame)
    ridge = _ridge(distance, np.pad(inside, frame, mode="symmetric"), spacing)
    thickness = _spheres(ridge, distance, inside, frame, spacing, stride)
    within = np.pad(domain, frame, mode="symmetric")
    axes, wall = ridge.voxels[ridge.medial], np.flatnonzero(_next_to(within))
    if not len(axes) + len(wall):
        return thickness, nothing
    shifts = np.zeros((len(axes) + len(wall), 3), np.float32)
    shifts[: len(axes)] = ridge.shifts[ridge.medial] * np.float32(spacing)
    distance = _to_points(within, np.concatenate([axes, wall]), shifts, spacing, surface=False)
    distance[~within] = 0
    return thickness, _spheres(_ridge(distance, within, spacing), distance, domain, frame, spacing, stride)


def _frame(inside, spacing, stride):
    """Voxels to add before and after each axis: a mirror image where the structure meets the end, else a border."""
    frame = []
    for axis, step in enumerate(spacing):
        faces = inside.take(0, axis), inside.take(-1, axis)
        wanted = [int(MIRROR_MM / step) + 2 if f.any() else 1 for f in faces]
        frame.append([-(-n // stride) * stride for n in wanted])
    return frame


def _to_surface(inside, spacing, level, frame):
    """Distance to the surface in mm (z, y, x), of the framed structure; negative in the voxels just outside."""
    if level is None:
        level = ndimage.gaussian_filter(inside.astype(np.float32), MASK_SMOOTHING, mode="nearest") - np.float32(0.5)
    inside, level = (np.pad(values, frame, mode="symmetric") for values in (inside, level))
    shell, shifts = _surface(inside, level, spacing)
    distance = _to_points(inside, shell, shifts, spacing, surface=True)
    distance.ravel()[shell] = -np.sqrt((shifts**2).sum(1))
    beyond, depth = _beyond(inside, shell, shifts, spacing)
    distance.ravel()[beyond] = -depth
    return distance


def _surface(inside, level, spacing):
    """Voxels outside with a neighbour inside, and the way in mm (n, 3) from each to the surface."""
    shell, flat, levels = np.flatnonzero(_next_to(inside)), inside.ravel(), level.ravel()
    inverse = np.zeros((len(shell), 3), np.float32)  # of the way in mm along each axis to the surface
    for axis, side, at, there in _beside(shell, inside.shape):
        at, there = at[flat[there]], there[flat[there]]
        out, into = levels[shell[at]], levels[there]
        share = np.where(out <= 0, np.clip(out / np.minimum(out - into, -1e-6), 0.02, 0.98), 0.5)
        way = side / (share * spacing[axis])
        inverse[at, axis] = np.where(np.abs(way) > np.abs(inverse[at, axis]), way, inverse[at, axis])
    # the plane that cuts the axes at 1 / inverse is nearest at inverse / |inverse|^2
    shifts = inverse / (inverse**2).sum(1, keepdims=True)
    at = np.flatnonzero(_off_border(level <= 0).ravel()[shell])
    normal = gradient_at(level, shell[at], spacing)
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
    known, row = inside.copy(), np.full(inside.size, -1, np.int32)
    known.ravel()[shell] = True
    row[shell] = np.arange(len(shell), dtype=np.int32)
    beyond = np.flatnonzero(_next_to(known))
    square = np.full(len(beyond), np.inf, np.float32)
    for axis, side, at, there in _beside(beyond, inside.shape):
        which = row[there]
        at, way = at[which >= 0], shifts[which[which >= 0]]
        way[:, axis] += side * spacing[axis]
        square[at] = np.minimum(square[at], (way**2).sum(1))
    return beyond, np.sqrt(square)


def _next_to(inside):
    near = np.zeros_like(inside)
    for axis in range(3):
        there, here = (np.moveaxis(mask, axis, 0) for mask in (near, inside))
        there[1:] |= here[:-1]
        there[:-1] |= here[1:]
    return near & ~inside


def _beside(voxels, shape):
    """Across each of the six faces: axis, side, which of the voxels have a neighbour there, and its flat index."""
    place, steps = np.unravel_index(voxels, shape), steps_of(shape)
    for axis, side in product(range(3), (-1, 1)):
        at = np.flatnonzero((place[axis] + side >= 0) & (place[axis] + side < shape[axis]))
        yield axis, side, at, voxels[at] + side * steps[axis]


def _off_border(mask):
    return np.pad(mask[1:-1, 1:-1, 1:-1], 1)


def _to_points(inside, points, shifts, spacing, *, surface):
    """Distance in mm of the voxels inside to the nearest of `points` (flat indices), each moved by its shift in mm. If
    `surface`, the shift is at right angles to a surface, and the distance is that to its tangent plane; else the points
    nearest to the six neighbours are tried as well. `FAR` outside."""
    shape, steps = inside.shape, steps_of(inside.shape)
    row, away = np.zeros(inside.size, np.int32), np.ones(shape, bool)
    row[points] = np.arange(len(points), dtype=np.int32)
    away.ravel()[points] = False
    nearest = _nearest(away, spacing)
    places = np.stack(np.unravel_index(points, shape)).astype(np.int32)
    moves = np.ascontiguousarray(shifts.T)
    depth = np.sqrt((shifts**2).sum(1))
    normals = moves / np.maximum(depth, 1e-9)
    found, voxels = np.full(shape, FAR), np.flatnonzero(inside)
    for part in parts_of(voxels):
        here = voxels[part]
        place = np.unravel_index(here, shape)

        def to(which, at=slice(None), place=place):
            way = [((p[which] - o[at]) * h).astype(np.float32) for p, o, h in zip(places, place, spacing, strict=True)]
            return way, np.sqrt(sum((w + m[which]) ** 2 for w, m in zip(way, moves, strict=True)))

        which = row[nearest[here]]
        way, distance = to(which)
        if surface:
            to_voxel = np.sqrt(sum(w**2 for w in way))
            to_plane = -sum(w * n[which] for w, n in zip(way, normals, strict=True)) - depth[which]
            low = np.minimum(to_voxel - np.float32(BEYOND * min(spacing)), distance)
            distance = np.clip(to_plane, np.maximum(low, 0), distance)
        else:
            for axis, side in product(range(3), (-1, 1)):
                step = np.clip(place[axis] + side, 0, shape[axis] - 1) - place[axis]
                other = row[nearest[here + step * steps[axis]]]
                at = np.flatnonzero(other != which)
                distance[at] = np.minimum(distance[at], to(other[at], at)[1])
        found.ravel()[here] = distance
    return found


def _nearest(away, spacing):
    """For every voxel (z, y, x), the flat index of the nearest one that is False in `away`."""
    z, y, x = ndimage.distance_transform_edt(away, spacing, return_distances=False, return_indices=True)
    for index, step in ((z, away[0].size), (y, away.shape[2])):
        index *= step
    return (z + y + x).ravel()


def _ridge(distance, inside, spacing):
    """Voxels inside whose own is held by no neighbour's sphere, each with the peak of the distance next to it."""
    for axis in range(3):  # what goes on at the end of the array may have its ridge beyond: here is the best of it
        for end, last in ((0, 1), (-1, -2)):
            face, next_to_it = (np.moveaxis(distance, axis, 0)[i] for i in (end, last))
            np.copyto(face, next_to_it, where=np.moveaxis(inside, axis, 0)[end])
    flat, voxels = distance.ravel(), np.flatnonzero(_off_border(inside))
    neighbours = [(d, int(d @ steps_of(inside.shape)), np.linalg.norm(d * spacing)) for d in DIRECTIONS]
    parts = [_peaks(flat, voxels[part], neighbours) for part in parts_of(voxels)]
    ridge = Ridge(*map(np.concatenate, zip(*parts, strict=True)))
    return _evened(ridge, distance.shape, spacing)


def _peaks(flat, voxels, neighbours):
    height = flat[voxels]
    for _, step, length in neighbours:
        kept = np.maximum(flat[voxels - step], flat[voxels + step]) < height + np.float32(SLOPE * length)
        voxels, height = voxels[kept], height[kept]
    shifts, gain = np.zeros((len(voxels), 3), np.float32), np.zeros(len(voxels), np.float32)
    medial = np.zeros(len(voxels), bool)
    for direction, step, length in neighbours:
        before, after = flat[voxels - step], flat[voxels + step]
        known = np.minimum(before, after) > FAR
        floor = height - np.float32(length)  # no distance falls more steeply, but it may not be known
        before, after = np.maximum(before, floor), np.maximum(after, floor)
        fall = height - np.minimum(before, after)
        across = known & (np.maximum(before, after) - height <= LEVEL * length) & (fall > FACING * length)
        medial |= across
        at = np.flatnonzero(across & (np.abs(after - before) > 2 * gain))
        difference = after[at] - before[at]
        gain[at] = np.abs(difference) / 2
        shifts[at] = (difference / (2 * fall[at]))[:, None] * direction
    return Ridge(voxels, shifts, height + gain, medial)


def _evened(ridge, shape, spacing):
    """Radius of the medial axis averaged over its next voxels, lest the largest sphere picks out the noise.

    Neighbours that differ by more than `LIKE` voxels are of another place, or of the slope of a ball's centre.
    """
    voxels, radii, field = ridge.voxels[ridge.medial], ridge.radii.copy(), np.full(np.prod(shape), FAR)
    for _ in range(2):
        values = radii[ridge.medial]
        field[voxels] = values
        for part in parts_of(voxels):
            own = values[part]
            total, count = own.copy(), np.ones_like(own)
            for direction, side in product(DIRECTIONS, (1, -1)):
                other = field[voxels[part] + side * int(direction @ steps_of(shape))]
                alike = np.abs(own - other) < LIKE * min(spacing)
                total += np.where(alike, other, np.float32(0))
                count += alike
            values[part] = total / count
        radii[ridge.medial] = values
    return ridge._replace(radii=radii)


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
    largest, flat, steps = np.zeros(len(missed), np.float32), padded.ravel(), steps_of(padded.shape)
    for direction in (*DIRECTIONS, *-DIRECTIONS):
        largest = np.maximum(largest, flat[missed + int(direction @ steps)])
    own = 2 * distance[::stride, ::stride, ::stride][core][answered & (found == 0)]
    flat[missed] = np.where(largest > 0, largest, own)
    return np.where(answered, padded[1:-1, 1:-1, 1:-1], np.float32(0))


def _painted(ridge, shape, spacing, stride):
    """The largest sphere over every `stride`-th voxel: small ones are laid down first, larger ones over them.

    Spheres of one class of radius whose centres lie alike among the answered voxels cover one pattern of them.
    """
    spacing = np.asarray(spacing)
    grid = 2 * stride  # centres lie on half voxels
    centres = np.empty((len(ridge.voxels), 3), np.int32)
    for part in parts_of(centres):
        voxels = np.stack(np.unravel_index(ridge.voxels[part], shape), 1)
        centres[part] = np.rint(2 * (voxels + ridge.shifts[part]))
    kept = _thinned(centres, ridge.radii / (spacing.min() * stride), grid)
    centres, radii = centres[kept], ridge.radii[kept]
    width = spacing.min() / CLASSES
    reach = np.ceil((radii.max(initial=0) + width) / (spacing * stride)).astype(int) + 2
    lattice = np.zeros([-(-n // stride) + 2 * r for n, r in zip(shape, reach, strict=True)], np.float32)
    flat, steps = lattice.ravel(), steps_of(lattice.shape)
    cell, rest = np.divmod(centres, grid)
    key = np.floor(radii / width).astype(np.int64) * grid**3 + rest @ np.array([grid**2, grid, 1])
    order = np.argsort(key, kind="stable")
    key, base, radii = key[order], ((cell + reach) @ steps)[order], radii[order]
    starts, drawn = np.flatnonzero(np.diff(key, prepend=-1)), None
    for start, stop in zip(starts, np.append(starts[1:], len(key)), strict=True):
        level, residue = divmod(int(key[start]), grid**3)
        if level != drawn:
            drawn, size = level, int(np.ceil((level + 1) * width / (spacing * stride).min())) + 1
            box = np.ogrid[tuple(slice(1 - min(size, r + 1), min(size, r + 1)) for r in reach)]
            pattern = sum(edge * step for edge, step in zip(box, steps, strict=True))
            squares = [[((e * grid - r) * h / 2) ** 2 for r in range(grid)] for e, h in zip(box, spacing, strict=True)]
        z, y, x = (of[r] for of, r in zip(squares, np.unravel_index(residue, (grid,) * 3), strict=True))
        offsets = pattern[z + y + x <= ((level + 0.5) * width) ** 2]
        value, share = 2 * radii[start:stop].mean(), max(1, CHUNK // max(1, len(offsets)))
        for first in range(start, stop, share):
            flat[base[first : min(first + share, stop), None] + offsets] = value
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
