"""Draw one visit of one phantom patient: shape, network, pores and soft tissue put together on a grid.

The bone is defined in space by (seed, patient), without a grid: a visit or another voxel size shows the same bone.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import bonelib.scans.phantom.anatomy as anatomy
import bonelib.scans.phantom.population as population
import bonelib.scans.phantom.trabeculae as trabeculae
from bonelib import InputError
from bonelib.core.random import numpy_rng
from bonelib.scans.phantom.random_fields import Lattice, sample, smooth_noise, upsample
from bonelib.scans.phantom.scanner import NATIVE_MM, PSF_SIGMA_MM
from bonelib.scans.volumes import Volume

TISSUE = 1100.0  # mg HA/cm3, fully mineralised trabecular bone
# Fitted so that scans of .0607 mm measure the reference's DA and come nearest to its Tb.Th, Tb.N, Tb.Sp and BV/TV at
# once: plate thickness by Tb.BMD in mg HA/cm3; cell edge and stretch along z, each at the bone volume fraction of the
# female mean and its change with that fraction.
TRUE_PLATE_MM = ((50.0, 105.0, 145.0, 199.0, 330.0), (0.09, 0.096, 0.099, 0.104, 0.12))
FRACTION = 0.134
CELL_MM = (0.65, -1.2)
STRETCH = (1.65, -3.0)
STRETCH_ON_AREA = 0.2  # per SD of Tt.Ar: larger bones are more anisotropic
# Powers of Tb.N, and of Tb.Th, beyond what Tb.BMD lets expect: what a scan reads answers weakly to cells and plates,
# and smaller cells of the same mass have fewer whole plates, which stretch makes up for in DA.
CELL_ON_TB_N, STRETCH_ON_TB_N, PLATE_ON_TB_TH = -2.0, 2.5, 2.0
# What the contour of `evaluation.morphometry` reads, fitted to phantoms with a cortex of .6-1.5 mm: true cortical
# density is Ct.BMD x (constant + width / Ct.Th), for the point spread at both surfaces and the pores.
CORTEX_EDGE = (1.04, 0.079)
CORTEX_PATCHES = (35.0, 1.6)  # mg HA/cm3 SD, mm
BORDER_MM = -0.008  # width of cortex that the contour leaves with the trabeculae, besides the point spread; likewise
LATTICE_MM = 0.2  # smooth quantities are worked out on nodes about this far apart
SOFT_TISSUE_ROWS = 4  # nodes along z per row of soft tissue, which hardly changes along the arm
CROP_VOXELS = ((397, 663), (278, 529))  # native voxels along y and x (Angermann et al. 2023)
CROP_JITTER_MM = 0.3  # SD of the field of view between visits
VOXEL_MM = (0.03, 0.5)
OUTSIDE, TRABECULAR, CORTICAL, ULNA = range(4)


class Bone(NamedTuple):
    """One patient's forearm, free of any grid."""

    shape: anatomy.Shape
    network: trabeculae.Network
    pores: np.ndarray
    patches: Lattice
    traits: dict
    margins: np.ndarray


class Drawn(NamedTuple):
    """A scan without noise: density, compartment per voxel (0 outside, 1 trabecular, 2 cortical, 3 ulna), truth."""

    volume: Volume
    compartments: np.ndarray
    bone: np.ndarray
    truth: dict


def draw_visit(
    seed: int,
    patient: int,
    visit: int,
    voxel_mm: float,
    *,
    course: population.Course = population.COURSE,
    **traits,
) -> Drawn:
    """One visit of one patient on a grid of `voxel_mm`, with the compartments and bone fraction that are its truth.

    When it is, and what has changed by then, is as `course` says. It is drawn in slabs along z, which keeps the
    working memory small. Raises `InputError` for an unknown trait.
    """
    bone, now, grid, to_bone = _visit(seed, patient, visit, voxel_mm, traits, course)
    density, compartments, spongy = _voxels(bone, now["change"], to_bone, grid, voxel_mm)
    true = _truth(density, compartments, spongy, bone, now)
    side = bone.traits["side"]
    if side == "left":  # bones are defined as right ones
        density, compartments, spongy = (np.ascontiguousarray(p[..., ::-1]) for p in (density, compartments, spongy))
    return Drawn(Volume(density, (voxel_mm,) * 3, side=side), compartments, spongy, true)


def draw_window(seed: int, patient: int, visit: int, voxel_mm: float, start, shape, **traits) -> Volume:
    """The density of `draw_visit` in a window of `shape` voxels (z, y, x) from `start` on, for a right bone."""
    bone, now, _, to_bone = _visit(seed, patient, visit, voxel_mm, traits | {"side": "right"})
    first = torch.tensor([int(n) for n in start])
    density, *_ = _voxels(bone, now["change"], lambda index: to_bone(index + first), [int(n) for n in shape], voxel_mm)
    return Volume(density, (voxel_mm,) * 3, side="right")


def draw_centred(seed: int, patient: int, voxel_mm: float, shape, **traits) -> Drawn:
    """The first visit of a patient, as a right bone, in a field of `shape` voxels (z, y, x) about its middle.

    Fields of all patients are alike, and none is cropped.
    """
    bone, now, grid, to_bone = _visit(seed, patient, 1, voxel_mm, traits | {"side": "right"})
    first = torch.tensor([(n - wanted) // 2 for n, wanted in zip(grid, shape, strict=True)])
    parts = _voxels(bone, now["change"], lambda index: to_bone(index + first), list(shape), voxel_mm)
    truth = _truth(*parts, bone, now)
    return Drawn(Volume(parts[0], (voxel_mm,) * 3, side="right"), *parts[1:], truth)


def _visit(seed, patient, visit, voxel_mm, traits, course=population.COURSE):
    """The bone, what it is at this visit, and the grid of its scan with the map to the bone's frame."""
    check_voxel(voxel_mm)
    bone = _bone(int(seed), int(patient), tuple(sorted(traits.items())))
    now = population.at_visit(bone.traits, seed, patient, visit, course)
    return bone, now, *_placed(bone, now, numpy_rng(seed, "crop", patient, visit), voxel_mm)


def _voxels(bone: Bone, change: dict, to_bone, grid, voxel_mm: float) -> list[np.ndarray]:
    """Density, compartment and bone fraction (z, y, x) at the voxels of a grid."""
    network = bone.network._replace(plate_mm=bone.network.plate_mm * change["Tb.BMD"])
    factor = max(1, round(LATTICE_MM / voxel_mm))
    smooth = _smooth_parts(bone, change, to_bone, grid, factor)
    pores = _pore_fraction(bone, to_bone, grid, voxel_mm)
    density, spongy = torch.empty(grid), torch.empty(grid)
    compartments = torch.empty(grid, dtype=torch.uint8)
    thickness = max(1, round(trabeculae.BLOCK_MM[0] / voxel_mm))
    for start in range(0, grid[0], thickness):
        stop = min(start + thickness, grid[0])
        first, last = start // factor, -(-(stop - 1) // factor)
        fine = upsample(smooth[:, first : last + 1], factor, (stop - first * factor, *grid[1:]))
        outside, depth, soft, cortex, ulna = fine[:, start - first * factor :]

        def to_slab(index: torch.Tensor, start: int = start) -> torch.Tensor:
            return to_bone(index + torch.tensor([start, 0, 0]))

        fraction = trabeculae.draw_network(network, to_slab, depth, voxel_mm)
        in_bone = (0.5 - outside / voxel_mm).clamp_(0, 1)
        in_marrow = torch.minimum((0.5 + depth / voxel_mm).clamp_(0, 1), in_bone)
        ring = in_bone - in_marrow
        marrow, fraction = bone.traits["marrow"], fraction * in_marrow
        mass = soft + in_bone * (marrow - soft) + fraction * (TISSUE - marrow)
        density[start:stop] = mass + (cortex - marrow) * ring * (1 - pores[start:stop])
        spongy[start:stop] = torch.maximum(fraction, ring)
        part = torch.where(depth > 0, TRABECULAR, CORTICAL).to(torch.uint8)
        part[ulna > 0.5] = ULNA
        part[outside >= 0] = OUTSIDE
        compartments[start:stop] = part
    return [part.numpy() for part in (density, compartments, spongy)]


def _smooth_parts(bone: Bone, change: dict, to_bone, grid, factor: int) -> torch.Tensor:
    """On nodes `factor` voxels apart: distance, depth, soft tissue, cortical density, what is ulna (5, z, y, x)."""
    nodes = [-(-(n - 1) // factor) + 1 for n in grid]
    points = to_bone(torch.stack(torch.meshgrid(*(torch.arange(n) * factor for n in nodes), indexing="ij"), -1))
    outside, depth = anatomy.distances(bone.shape, points, change["Ct.Th"])
    is_ulna = (outside[1] < outside[0]).float()
    rows = torch.linspace(0, nodes[0] - 1, max(2, nodes[0] // SOFT_TISSUE_ROWS)).round().long()
    soft = anatomy.soft_tissue(bone.shape, points[rows])
    soft = F.interpolate(soft[None, None], size=nodes, mode="trilinear", align_corners=True)[0, 0]
    level = bone.traits["Ct.BMD"] * (CORTEX_EDGE[0] + CORTEX_EDGE[1] / bone.traits["Ct.Th"])
    cortex = (level + CORTEX_PATCHES[0] * sample(bone.patches, points)[0]) * change["Ct.BMD"]
    return torch.stack([outside.amin(0), depth.amax(0), soft, cortex, is_ulna])


@functools.lru_cache(maxsize=2)
def _bone(seed: int, patient: int, traits: tuple) -> Bone:
    traits = population.sample_patient(seed, patient, **dict(traits))
    shape = anatomy.make_shape((seed, patient), traits)

    def depth(points: torch.Tensor) -> torch.Tensor:
        return anatomy.distances(shape, points)[1].amax(0)

    def radius_depth(points: torch.Tensor) -> torch.Tensor:
        return anatomy.distances(shape, points)[1][0]

    fraction = _bone_fraction(shape, traits)
    plate = float(np.interp(traits["Tb.BMD"], *TRUE_PLATE_MM)) * _beyond_density(traits, "Tb.Th") ** PLATE_ON_TB_TH
    cell, stretch = (at + slope * (fraction - FRACTION) for at, slope in (CELL_MM, STRETCH))
    area, sd = population.REFERENCE[traits["sex"]]["Tt.Ar"]
    crowding = _beyond_density(traits, "Tb.N")
    stretch = stretch * crowding**STRETCH_ON_TB_N + STRETCH_ON_AREA * (traits["Tt.Ar"] - area) / sd
    within = ((0.0, *anatomy.BOX[0][1:]), (anatomy.HEIGHT_MM, *anatomy.BOX[1][1:]))
    network = trabeculae.make_network(
        (seed, patient),
        anatomy.BOX,
        within,
        depth,
        radius_depth,
        cell_mm=max(cell, 0.45) * crowding**CELL_ON_TB_N,
        plate_mm=plate,
        fraction=fraction,
        stretch=float(np.clip(stretch, 1.2, 2.6)),
    )
    rng = numpy_rng(seed, "patches", patient)
    patches = smooth_noise(rng, anatomy.BOX, CORTEX_PATCHES[1])
    margins = np.array([rng.uniform(*bounds) for bounds in anatomy.MARGINS_MM])
    pores = anatomy.make_pores((seed, patient), shape, traits["Ct.Po"])
    return Bone(shape, network, pores, patches, traits, margins)


def _bone_fraction(shape: anatomy.Shape, traits: dict) -> float:
    """Bone fraction at which a scan's trabecular compartment reads Tb.BMD: less marrow, and cortex that spills in."""
    ring = shape.cortex.mean()
    perimeter = np.linalg.norm(np.diff(shape.contours, axis=1), axis=2).sum(1).mean() - 2 * math.pi * ring
    area = traits["Tt.Ar"] - (perimeter + math.pi * ring) * ring
    width = PSF_SIGMA_MM / math.sqrt(2 * math.pi) + BORDER_MM
    spill = width * perimeter / area * (traits["Ct.BMD"] - traits["Tb.BMD"])
    return max((traits["Tb.BMD"] - spill - traits["marrow"]) / (TISSUE - traits["marrow"]), 0.01)


def _beyond_density(traits: dict, name: str) -> float:
    """Factor by which a trait of this patient differs from that of others with the same trabecular density."""
    reference = population.REFERENCE[traits["sex"]]
    r = population.correlation()[population.COPULA.index("Tb.BMD"), population.COPULA.index(name)]
    mean, sd = reference["Tb.BMD"]
    expected = reference[name][0] + r * reference[name][1] * (traits["Tb.BMD"] - mean) / sd
    return float(np.clip(traits[name] / expected, 0.8, 1.25))


def _placed(bone: Bone, visit: dict, rng: np.random.Generator, voxel_mm: float):
    """Grid shape, and the map from voxel indices (..., 3) to mm in the bone's frame."""
    mean_turn, turn = math.radians(bone.traits["rotation"]), math.radians(visit["rotation"])
    within = (bone.shape.levels >= 0) & (bone.shape.levels <= anatomy.HEIGHT_MM)
    y, x = bone.shape.contours[within].reshape(-1, 2).T
    y, x = math.cos(mean_turn) * y - math.sin(mean_turn) * x, math.sin(mean_turn) * y + math.cos(mean_turn) * x
    styloid, dorsal, palmar = bone.margins
    margins = np.array([styloid, anatomy.ulnar_margin(bone.shape, mean_turn, y.max()), dorsal, palmar])
    margins += np.clip(rng.normal(0, CROP_JITTER_MM, 4), -0.7, 0.7)
    low = np.array([y.min() - margins[0], x.min() - margins[2]])
    high = np.array([y.max() + margins[1], x.max() + margins[3]])
    bounds = np.array(CROP_VOXELS) * NATIVE_MM
    size = np.clip(high - low, *bounds.T)
    low = np.where(high - low > size, low + (high - low - size) / 2, low - (size - (high - low)) / 2)
    grid = (round(anatomy.HEIGHT_MM / voxel_mm), *(int(n) for n in np.rint(size / voxel_mm)))
    start = torch.tensor([visit["shift_z"], low[0] - visit["shift_y"], low[1] - visit["shift_x"]], dtype=torch.float32)

    def to_bone(index: torch.Tensor) -> torch.Tensor:
        return trabeculae.turned((index + 0.5) * voxel_mm + start, -turn)

    return grid, to_bone


def _pore_fraction(bone: Bone, to_bone, grid, voxel_mm: float) -> torch.Tensor:
    """Share of each voxel (z, y, x) that is pore: capsules of square section and equal volume, box-filtered."""
    share = torch.zeros(grid)
    origin = to_bone(torch.zeros(3)).double().numpy()
    axes = np.stack([to_bone(torch.eye(3)[i]).double().numpy() - origin for i in range(3)], 1)
    centres = np.linalg.solve(axes, (bone.pores[:, :3] - origin).T).T if len(bone.pores) else []
    for centre, (radius, half) in zip(centres, bone.pores[:, 3:], strict=True):
        size = np.array([2 * half, *[math.sqrt(math.pi) * radius] * 2]) / voxel_mm
        low = np.maximum(np.floor(centre - size / 2 - 0.5).astype(int), 0)
        high = np.minimum(np.ceil(centre + size / 2 + 0.5).astype(int) + 1, grid)
        if (low >= high).any():
            continue
        parts = [
            np.clip(np.minimum(0.5 + size[i] / 2 - np.abs(np.arange(low[i], high[i]) - centre[i]), size[i]), 0, 1)
            for i in range(3)
        ]
        pore = np.einsum("z,y,x->zyx", *parts).astype(np.float32)
        view = share[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        torch.maximum(view, torch.from_numpy(pore), out=view)
    return share


def _truth(density: np.ndarray, compartments: np.ndarray, spongy: np.ndarray, bone: Bone, now: dict) -> dict:
    """Asked traits and visit, and under `true_...` what the drawn voxels hold before the scanner."""
    trabecular, cortical = compartments == TRABECULAR, compartments == CORTICAL
    count = [int(part.sum()) for part in (trabecular, cortical)]
    total = [float(density[part].sum(dtype=float)) for part in (trabecular, cortical)]
    voxel_mm = anatomy.HEIGHT_MM / density.shape[0]
    asked = {name: bone.traits[name] for name in population.TRAITS}
    pose = {name: now[name] for name in ("years", "rotation", "shift_z", "shift_y", "shift_x", "noise_sd")}
    true = {
        "true_Tt.Ar": sum(count) * voxel_mm**2 / density.shape[0],
        "true_Ct.Th": anatomy.cortical_thickness(bone.shape) * now["change"]["Ct.Th"],
        "true_Tb.BMD": total[0] / max(count[0], 1),
        "true_Ct.BMD": total[1] / max(count[1], 1),
        "true_Tt.BMD": sum(total) / max(sum(count), 1),
        "true_BV/TV": float(spongy[trabecular].sum(dtype=float)) / max(count[0], 1),
        "true_Tb.Th": bone.network.plate_mm * now["change"]["Tb.BMD"],
    }
    return {k: v if isinstance(v, str) else round(float(v), 5) for k, v in (asked | pose | true).items()}


def check_voxel(voxel_mm: float) -> None:
    """Raise `InputError` unless `voxel_mm` is one that can be drawn."""
    low, high = VOXEL_MM
    if not (isinstance(voxel_mm, int | float) and low <= voxel_mm <= high):
        raise InputError(f"voxel_mm is {voxel_mm!r}; accepted are {low:g} to {high:g} mm")
