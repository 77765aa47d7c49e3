"""The trabecular network: a perforated Voronoi network of plates and rods, defined in space and drawn on any grid.

Seeds lie jittered in a metric that is stretched along the bone. Cell faces are plates (whole, reduced to a rim, or
open), cell edges are rods. Distances are in mm, so that thickness is a parameter and not a result.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree

from bonelib.core.random import numpy_rng
from bonelib.scans.phantom.random_fields import Lattice, sample, smooth_noise

STRETCH = (1.17, 0.85)  # cell size along the two in-plane axes
JITTER = 0.425  # of the cell edge, either way; less shows the seed lattice as rows of dots
WARP = ((0.10, 2.2), (0.03, 1.1))  # mm amplitude and length; beyond .15 mm the vertical direction is lost
TURN = 0.5  # rad, bound of the in-plane turn of the preferred direction
JOINED = 0.3  # share of a smooth field in the draw of a face: neighbours are whole together and make long plates
JOINED_MM = (6.0, 1.3, 1.3)
LEVEL_FACES_OPEN = 0.9  # horizontal faces open first
IN_PLANE_PREFERENCE = 0.5
RIM_MM, RIM_FADE = 0.10, 0.30  # width of the rim left in a face, and the draw beyond the whole ones that it fades over
SPREAD = 0.15  # of plate and rod thickness, either way
ROD_TO_PLATE = 1.15
EDGES_WITHOUT_ROD = 0.70
GRADIENT = (0.4, 1.3, 0.3, 0.15)  # denser under the cortex (share, mm), distally, and in smooth patches
PATCH_MM = 4.0
THICKER_OUTSIDE = 0.12  # plates under the cortex, over 1 mm
CANDIDATES = 18  # seeds looked at per block of voxels
BLOCK_MM = (0.98, 0.49, 0.49)
CALIBRATION_POINTS = 24_000
FINE_MM = 0.06  # a voxel this small tells plates and rods apart wherever they meet
LEAST_PLATES = 0.28  # below this plate fraction only rods too thin to be seen remain, and the cells are enlarged
CHUNK_VOXELS = 1 << 16  # per pass; keeps the working set in the processor's cache


class Network(NamedTuple):
    """Seeds (n, 3) in metric space, their attributes (n, 8), and the map from millimetres into that space."""

    seeds: np.ndarray
    tree: cKDTree
    table: torch.Tensor  # mm in the turned frame (3), two draws, a smooth draw, plate and thickness factor
    warp: tuple[Lattice, ...]
    turn: float
    plate_mm: float
    plates: float  # fraction of faces that are whole, before gradients
    stretch: tuple[float, float, float]
    probes: tuple[torch.Tensor, ...]  # geometry at points spread evenly over the measured compartment


Depth = Callable[[torch.Tensor], torch.Tensor]


def make_network(
    key: tuple,
    box: tuple,
    measured: tuple,
    depth: Depth,
    measured_depth: Depth,
    *,
    cell_mm: float,
    plate_mm: float,
    fraction: float,
    stretch: float,
) -> Network:
    """The network whose mean bone volume fraction in the measured compartment equals `fraction`.

    `key` is (seed, patient), `box` the (low, high) corners in mm (z, y, x) that are filled where `depth` (points
    (n, 3) -> mm) is positive, `measured` those of the stack, in which `measured_depth` marks the compartment. Cells
    are drawn out `stretch`-fold along z; they are enlarged in steps of 7 % while too few faces would be whole for a
    visible network.
    """
    points = _inside(measured, measured_depth)
    for _ in range(8):
        network = _seeded(key, box, measured[1][0], depth, cell_mm, plate_mm, (stretch, *STRETCH))
        network = network._replace(probes=_probes(network, points))
        plates = _calibrated(network, fraction)
        if plates >= LEAST_PLATES:
            break
        cell_mm *= 1.07
    return network._replace(plates=max(plates, LEAST_PLATES / 2))


def draw_network(network: Network, to_bone: Callable, depth: torch.Tensor, voxel_mm: float) -> torch.Tensor:
    """Bone volume fraction per voxel (z, y, x) where `depth` mm (z, y, x) is positive, box-filtered over the voxel.

    `to_bone` maps voxel indices (..., 3) to mm in the bone's frame. Plates and rods are integrated over the voxel
    exactly along their normals, so that mass does not depend on the grid.
    """
    block = torch.tensor([max(1, round(mm / voxel_mm)) for mm in BLOCK_MM])
    size = tuple(block.tolist())
    count = [-(-n // b) for n, b in zip(depth.shape, size, strict=True)]
    deepest = torch.nn.functional.max_pool3d(depth[None, None], size, size, ceil_mode=True)[0, 0]
    active = (deepest > -voxel_mm).nonzero()
    drawn = torch.zeros(*count, math.prod(size))
    if len(active) == 0:
        return drawn.new_zeros(depth.shape)
    nodes = torch.stack(torch.meshgrid(*(torch.arange(n + 1) for n in count), indexing="ij"), -1)
    nodes = to_metric(network, to_bone(nodes * block - 0.5))
    corner = torch.stack(torch.meshgrid(*[torch.arange(2)] * 3, indexing="ij"), -1).reshape(8, 3)
    weights = _corner_weights(size)
    # where plates and rods meet within one wide voxel some of their volume is lost: the probes tell how much
    gain = _mean_fraction(network, FINE_MM) / _mean_fraction(network, voxel_mm)
    per_chunk = max(1, CHUNK_VOXELS // math.prod(size))
    for start in range(0, len(active), per_chunk):
        ids = active[start : start + per_chunk]
        at = (ids[:, None, :] + corner).unbind(-1)
        corners = nodes[at]
        centre = corners.mean(1)
        near = torch.from_numpy(network.tree.query(centre.numpy(), k=CANDIDATES)[1])
        offsets = (corners - centre[:, None]).transpose(1, 2) @ weights
        drawn[ids.unbind(-1)] = _fractions_in_blocks(network, offsets, centre, near, voxel_mm)
    order = drawn.reshape(*count, *size).permute(0, 3, 1, 4, 2, 5)
    whole = order.reshape([n * b for n, b in zip(count, size, strict=True)])
    return (gain * whole[tuple(slice(n) for n in depth.shape)]).clamp_(max=1)


def to_metric(network: Network, points: torch.Tensor) -> torch.Tensor:
    """Metric position of points (..., 3) in mm."""
    moved = points.clone()
    for lattice in network.warp:
        moved += sample(lattice, points).movedim(0, -1)
    return turned(moved, network.turn) / torch.tensor(network.stretch)


def turned(points: torch.Tensor, angle: float) -> torch.Tensor:
    """Points (..., 3) turned in plane by `angle` rad, from y towards x."""
    z, y, x = points.unbind(-1)
    c, s = math.cos(angle), math.sin(angle)
    return torch.stack([z, c * y - s * x, s * y + c * x], -1)


def _seeded(key, box, height_mm, depth, cell_mm, plate_mm, stretch) -> Network:
    rng = numpy_rng(key[0], "network", *key[1:])
    turn = float(rng.uniform(-TURN, TURN))
    warp = []
    for amplitude, length in WARP:
        noise = smooth_noise(rng, box, length, channels=3)
        warp.append(noise._replace(values=noise.values * amplitude))
    joined, patches = smooth_noise(rng, box, JOINED_MM), smooth_noise(rng, box, PATCH_MM)
    reach = np.abs(np.array(box)).max(0)
    reach = np.array([reach[0], *[math.hypot(reach[1], reach[2])] * 2]) / np.array(stretch)
    half = np.ceil(reach / cell_mm).astype(int) + 1
    axes = [np.arange(-n, n + 1) for n in half]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).astype(float)
    grid[..., 1:] += 0.5 * (np.abs(grid[..., :1]) % 2)
    draws = numpy_rng(key[0], "seeds", *key[1:]).random((*grid.shape[:-1], 5))
    seeds = ((grid + JITTER * (2 * draws[..., :3] - 1)) * cell_mm).reshape(-1, 3)
    draws = draws[..., 3:].reshape(-1, 2)
    flat = torch.from_numpy(seeds.astype(np.float32)) * torch.tensor(stretch)
    place = turned(flat, -turn)
    inside = depth(place)
    low, high = (torch.tensor(corner, dtype=torch.float32) for corner in box)
    keep = (inside > -2.0) & (place > low - 2.5).all(-1) & (place < high + 2.5).all(-1)
    flat, place, inside, kept = flat[keep], place[keep], inside[keep], keep.numpy()
    share, decay, distal, patchy = GRADIENT
    plates = 1 + share * torch.exp(-inside.clamp(min=0) / decay)
    plates += distal * (0.5 - (place[:, 0] / height_mm).clamp(0, 1)) + patchy * sample(patches, place)[0]
    thicker = 1 + THICKER_OUTSIDE * torch.exp(-inside.clamp(min=0))
    smooth = 0.5 * (1 + torch.erf(sample(joined, place)[0] / math.sqrt(2)))
    draws = torch.from_numpy(draws[kept].astype(np.float32))
    table = torch.cat([flat, draws, smooth[:, None], plates.clamp(min=0.1)[:, None], thicker[:, None]], 1)
    metric = np.ascontiguousarray(seeds[kept])
    return Network(metric, cKDTree(metric), table, tuple(warp), turn, plate_mm, math.nan, stretch, ())


def _inside(box, depth) -> torch.Tensor:
    """Evenly spread points (n, 3) in mm at positive depth: an additive recurrence, which needs no random numbers."""
    low, high = (np.asarray(corner) for corner in box)
    root = 1.2207440846057596  # of x^4 = x + 1: the most even recurrence in three dimensions
    share = (np.arange(3 * CALIBRATION_POINTS)[:, None] * root ** -np.arange(1.0, 4.0)) % 1
    points = torch.from_numpy((low + share * (high - low)).astype(np.float32))
    return points[depth(points) > 0][:CALIBRATION_POINTS]


def _probes(network: Network, points: torch.Tensor) -> tuple[torch.Tensor, ...]:
    distance, near = network.tree.query(to_metric(network, points).numpy(), k=3)
    squared = torch.from_numpy((distance**2).astype(np.float32)).unbind(-1)
    return _geometry(network, squared, torch.from_numpy(near).unbind(-1))


def _calibrated(network: Network, fraction: float) -> float:
    """The plate fraction at which the mean bone fraction of the probes is `fraction`, by bisection."""
    low, high = 0.0, 2.0
    for _ in range(12):
        middle = (low + high) / 2
        mean = _mean_fraction(network._replace(plates=middle), FINE_MM)
        low, high = (middle, high) if mean < fraction else (low, middle)
    return (low + high) / 2


def _mean_fraction(network: Network, voxel_mm: float) -> float:
    return float(_fraction(network, network.probes, voxel_mm).numpy().mean(dtype=float))


def _corner_weights(size: tuple[int, int, int]) -> torch.Tensor:
    """Trilinear weights (8, voxels) of a block's corners at its voxel centres."""
    axes = [(torch.arange(n) + 0.5) / n for n in size]
    pairs = [torch.stack([1 - a, a]) for a in axes]
    return torch.einsum("az,by,cx->abczyx", *pairs).reshape(8, -1)


def _fractions_in_blocks(network, offsets, centre, near, voxel_mm) -> torch.Tensor:
    """Bone fraction (block, voxel) from the three nearest of the candidate seeds `near` (block, k)."""
    seeds = torch.from_numpy(network.seeds).float()[near] - centre[:, None]
    # |x - s|^2 - |x|^2 is all that differences need; + 4 keeps it positive, so that floats sort like integers
    squared = torch.baddbmm((seeds**2).sum(-1, keepdim=True) + 4.0, seeds, offsets, alpha=-2.0)
    tagged = squared.view(torch.int32)
    tagged.bitwise_and_(~31).bitwise_or_(torch.arange(near.shape[1], dtype=torch.int32)[None, :, None])
    tagged = tagged.view(torch.float32)
    first = torch.full_like(tagged[:, 0], 1e9)
    second, third = first.clone(), first.clone()
    for k in range(near.shape[1]):
        candidate = tagged[:, k]
        later = torch.maximum(first, candidate)
        torch.minimum(first, candidate, out=first)
        latest = torch.maximum(second, later)
        torch.minimum(second, later, out=second)
        torch.minimum(third, latest, out=third)
    best = (first, second, third)
    ids = [torch.gather(near, 1, (b.view(torch.int32) & 31).long()).reshape(-1) for b in best]
    squared = [b.reshape(-1) for b in best]
    fraction = torch.zeros(len(ids[0]))
    reach = network.plate_mm * (1 + SPREAD) * (1 + THICKER_OUTSIDE) * ROD_TO_PLATE / 2 + voxel_mm / 2
    gap = (network.table[ids[1], :3] - network.table[ids[0], :3]).norm(dim=1)
    wide = (network.table[ids[2], :3] - network.table[ids[0], :3]).norm(dim=1)
    close = (squared[1] - squared[0] < 2 * reach * gap) | (squared[2] - squared[0] < 2 * reach * wide)
    some = close.nonzero()[:, 0]
    geometry = _geometry(network, [s[some] for s in squared], [i[some] for i in ids])
    fraction[some] = _fraction(network, geometry, voxel_mm)
    return fraction.reshape(near.shape[0], -1)


def _geometry(network: Network, squared, ids) -> tuple[torch.Tensor, ...]:
    """Distances in mm to the two nearest faces and, within each, to the edge they share; face and edge attributes."""
    a, b, c = (network.table[i] for i in ids)
    n12, n13 = b[:, :3] - a[:, :3], c[:, :3] - a[:, :3]
    l12, l13 = n12.norm(dim=1), n13.norm(dim=1)
    d12, d13 = (squared[1] - squared[0]) / (2 * l12), (squared[2] - squared[0]) / (2 * l13)
    cosine = ((n12 * n13).sum(1) / (l12 * l13)).clamp(-0.97, 0.97)
    sine = (1 - cosine**2).sqrt()
    e12, e13 = (d13 - cosine * d12) / sine, (d12 - cosine * d13) / sine
    faces = []
    for other, normal, length in ((b, n12, l12), (c, n13, l13)):
        unit = normal / length[:, None]
        favour = (1 - LEVEL_FACES_OPEN * unit[:, 0].abs()) * (
            1 + IN_PLANE_PREFERENCE * (unit[:, 2] ** 2 - unit[:, 1] ** 2)
        )
        own = (a[:, 3] + other[:, 3]).frac()
        draw = (1 - JOINED) * own + JOINED * (a[:, 5] + other[:, 5]) / 2
        thick = (a[:, 7] + other[:, 7]) / 2 * (1 + SPREAD * (2 * (a[:, 4] + other[:, 4]).frac() - 1))
        faces += [draw, favour * (a[:, 6] + other[:, 6]) / 2, thick]
    edge = (a[:, 3] + b[:, 3] + c[:, 3]).frac()
    girth = (1 + SPREAD * (2 * (a[:, 4] + b[:, 4] + c[:, 4]).frac() - 1)) * (a[:, 7] + b[:, 7] + c[:, 7]) / 3
    return d12, e12, *faces[:3], d13, e13, *faces[3:], edge, girth


def _fraction(network: Network, geometry, voxel_mm: float) -> torch.Tensor:
    """Bone fraction of voxels from their distances, each plate and rod integrated over the voxel width."""
    d12, e12, draw12, favour12, thick12, d13, e13, draw13, favour13, thick13, edge, girth = geometry
    t, q = network.plate_mm, network.plates
    first = _slab(d12, t * thick12, voxel_mm) * _extent(e12, draw12, favour12 * q, voxel_mm)
    second = _slab(d13, t * thick13, voxel_mm) * _extent(e13, draw13, favour13 * q, voxel_mm)
    second *= (e13 / voxel_mm + 0.5).clamp(0, 1)
    side = girth * (t * ROD_TO_PLATE * math.sqrt(math.pi) / 2)  # a square section of the rod's area
    rod = _slab(d12, side, voxel_mm) * _slab(e12.abs(), side, voxel_mm) * (edge > EDGES_WITHOUT_ROD)
    plates = first + second - first * second  # exact for planes that cross at a right angle
    return torch.maximum(plates, rod)


def _slab(distance: torch.Tensor, thickness: torch.Tensor, voxel_mm: float) -> torch.Tensor:
    """Share of a voxel, `distance` mm from the mid plane, that a slab fills: the box filter of its profile."""
    share = 0.5 + (thickness / 2 - distance) / voxel_mm
    return torch.minimum(share.clamp(0, 1), thickness / voxel_mm)


def _extent(edge_distance: torch.Tensor, draw: torch.Tensor, whole: torch.Tensor, voxel_mm: float) -> torch.Tensor:
    """1 within a whole face; else 1 up to the rim's width from the edge and 0 beyond."""
    rim = RIM_MM * (1 - (draw - whole) / RIM_FADE)
    width = torch.where(draw < whole, torch.full_like(rim, 1e3), rim)
    return ((width - edge_distance) / voxel_mm + 0.5).clamp(0, 1) * (width > 0)
