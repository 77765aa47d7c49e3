"""Shape of the distal radius, its cortex, the ulna and the soft tissue, in the bone's own frame in mm (z, y, x).

z runs proximally from the distal end of the stack, y along the long axis towards the ulna, x towards the palm.
Shapes are judged from published HR-pQCT figures, sizes follow Poncioni et al. 2026 and Angermann et al. 2023.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter1d
from scipy.spatial import cKDTree

from bonelib.core.random import numpy_rng
from bonelib.scans.phantom.random_fields import Lattice, sample, smooth_noise

HEIGHT_MM = 10.197  # 168 slices of 60.7 um, one standard stack
BOX = ((-1.0, -18.0, -13.5), (11.2, 27.0, 13.5))  # mm; holds the largest bone, and the ulna as far as it is seen

# Outline points (u along the long axis, - styloid, + ulna; v, - dorsal, + palmar), in units of length and depth.
OUTLINE = np.array(
    [
        (-0.50, 0.06), (-0.41, 0.25), (-0.17, 0.40), (0.10, 0.43), (0.30, 0.47), (0.45, 0.42), (0.505, 0.26),
        (0.425, 0.02), (0.48, -0.21), (0.41, -0.35), (0.27, -0.42), (0.13, -0.45), (0.075, -0.49), (0.02, -0.57),
        (-0.045, -0.49), (-0.11, -0.42), (-0.27, -0.30), (-0.42, -0.14),
    ]
)  # fmt: skip
NOTCH, TUBERCLE = 7, 13  # rows of OUTLINE
OUTLINE_JITTER = 0.009
OUTLINE_SAMPLES, OUTLINE_SMOOTHING = 720, 11
ASPECT = {"F": 25.5 / 15, "M": 29.5 / 17}  # long axis by depth
AREA_LOSS = 0.26  # of the area, from the distal to the proximal end
DRIFT_MM, ROLL_DEG = 0.35, 2.0  # SD over patients, from end to end
KEY_SLICES = 9
PLANE_STEP_MM = 0.25

# Where the cortex is thicker or thinner: row of OUTLINE, share, width as a fraction of the perimeter.
CORTEX_ARCS = ((5, 0.50, 0.05), (3, 0.22, 0.14), (7, 0.10, 0.08), (15, -0.32, 0.14), (13, -0.15, 0.05))
CORTEX_SPREAD = 0.20
PORE_RADIUS_MM = (0.14, 0.22)  # finer ones cannot be told from bone at the scanner's resolution
PORE_WALLS = 5.0  # least thickness of the cortex about a pore, in its radii
PORES_SEEN = 0.65  # of their volume, in a scan
# Fitted to 7 phantoms: local thickness over the volume-weighted mean of the profile, and what the contour of
# `evaluation.morphometry` adds in mm, which lies outside of the blurred surface and takes in dense trabeculae.
LOCAL_THICKNESS, CONTOUR_MM = 1.015, 0.048
CORTEX_ALONG_Z = (0.64, 0.72)  # factor at the distal end, and what is added up to the proximal one
THINNEST_CORTEX_MM = 0.3
RAGGED_MM, RAGGED_LENGTH_MM, RAGGED_REACH_MM = 0.06, 0.9, 0.6  # of the endosteal border

ULNA_RADIUS_MM = {"F": (6.0, 7.0), "M": (7.0, 8.0)}
ULNA_CORTEX_MM = (0.75, 0.15, 0.5, 1.0)  # mean, SD, bounds
ULNA_GAP_MM = (1.2, 2.5)  # to the nearest point of the radius, which is a corner of the notch; 2-4 to its floor
ULNA_SHOWN = (0.12, 0.38)  # share of its section within the crop
MARGINS_MM = ((1.5, 4.0), (2.0, 5.0), (2.0, 6.0))  # of the crop beyond the radius: styloid, dorsal, palmar

MUSCLE, FAT, SEPTUM, TENDON, SKIN, AIR = 12.0, -50.0, -35.0, 17.0, 15.0, -398.6  # mg HA/cm3
SKIN_RADIUS_MM = (22.5, 27.5)
SKIN_MM = 1.4
COVER_MM = (3.0, 5.0)  # least tissue between the radius and the air


class Shape(NamedTuple):
    """The shape of one forearm; `surface` holds signed distance and cortical thickness (2, key slice, y, x) in mm."""

    contours: np.ndarray  # (key slice, sample, 2) in mm (y, x)
    levels: np.ndarray  # z of the key slices in mm
    cortex: np.ndarray  # thickness (key slice, sample) in mm
    surface: Lattice
    ragged: Lattice
    ulna: dict
    tissue: tuple[Lattice, Lattice]
    tendons: np.ndarray  # rows of (y, x, semi-axis, semi-axis, angle, density)
    skin: tuple[float, float, float]  # centre y, centre x, radius in mm


def make_shape(key: tuple, traits: dict) -> Shape:
    """The forearm of one patient: `key` is (seed, patient), `traits` as in `population.sample_patient`."""
    rng = numpy_rng(key[0], "shape", *key[1:])
    levels = np.linspace(BOX[0][0], BOX[1][0], KEY_SLICES)
    contours, marks = _contours(rng, traits, levels / HEIGHT_MM)
    cortex = _cortex(rng, traits["Ct.Th"], marks, levels / HEIGHT_MM)
    surface = _surface(contours, cortex, levels)
    ragged = smooth_noise(rng, BOX, RAGGED_LENGTH_MM)
    notch = contours[:, int(marks[NOTCH] * OUTLINE_SAMPLES)].mean(0)
    radius = float(rng.uniform(*ULNA_RADIUS_MM[traits["sex"]]))
    mean, sd, low, high = ULNA_CORTEX_MM
    ulna = {
        "radius": radius,
        "centre": (notch[0] + radius, notch[1] + float(rng.normal(0, 0.6))),
        "cortex": float(np.clip(rng.normal(mean, sd), low, high)),
        "waves": ((2, 0.04, float(rng.uniform(0, 6.28))), (3, 0.025, float(rng.uniform(0, 6.28)))),
    }
    ulna["centre"] = _beside(ulna, contours, levels, float(rng.uniform(*ULNA_GAP_MM)))
    ulna["shown"] = float(rng.uniform(*ULNA_SHOWN))
    tissue = (smooth_noise(rng, BOX, (12.0, 5.0, 5.0)), smooth_noise(rng, BOX, (12.0, 2.2, 2.2)))
    tendons = _tendons(rng, contours.mean(0))
    centre = np.array([rng.normal(6.0, 1.0), rng.normal(0.5, 0.8)])
    reach = np.linalg.norm(contours - centre, axis=2).max() + float(rng.uniform(*COVER_MM))
    skin = (*centre.tolist(), max(float(rng.uniform(*SKIN_RADIUS_MM)), float(reach)))
    return Shape(contours, levels, cortex, surface, ragged, ulna, tissue, tendons, skin)


def distances(shape: Shape, points: torch.Tensor, thicker: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed distance to the periosteum (negative inside) and depth below the endosteum of radius and ulna.

    Points are (..., 3) in mm; each answer is (2, ...) in mm, radius first. `thicker` scales the cortex.
    """
    outside, cortex = sample(shape.surface, points)
    inner = -outside - cortex * thicker
    inner = inner + RAGGED_MM * sample(shape.ragged, points)[0] * torch.exp(-inner.abs() / RAGGED_REACH_MM)
    ulna = _ulna_distance(shape.ulna, points)
    return torch.stack([outside, ulna]), torch.stack([inner, -ulna - shape.ulna["cortex"] * thicker])


def _ulna_distance(ulna: dict, points: torch.Tensor) -> torch.Tensor:
    """Signed distance in mm of points (..., 3) to the surface of the ulna, negative inside."""
    y, x = points[..., 1] - ulna["centre"][0], points[..., 2] - ulna["centre"][1]
    angle, radius = torch.atan2(x, y), ulna["radius"]
    edge = radius * (1.05 - 0.1 * points[..., 0] / HEIGHT_MM)
    for order, share, phase in ulna["waves"]:
        edge = edge + radius * share * torch.cos(order * angle + phase)
    return torch.hypot(x, y) - edge


def _beside(ulna: dict, contours: np.ndarray, levels: np.ndarray, gap_mm: float) -> tuple[float, float]:
    """Centre (y, x) at which the ulna lies `gap_mm` from the nearest point of the radius within the stack."""
    within = (levels >= 0) & (levels <= HEIGHT_MM)
    heights = np.repeat(levels[within], contours.shape[1])
    points = torch.from_numpy(np.column_stack([heights, contours[within].reshape(-1, 2)])).float()
    low, (far, x) = 0.0, (contours[..., 0].max() + 12.0, ulna["centre"][1])
    for _ in range(20):
        y = (low + far) / 2
        near = float(_ulna_distance(ulna | {"centre": (y, x)}, points).min()) < gap_mm
        low, far = (y, far) if near else (low, y)
    return y, x


def ulnar_margin(shape: Shape, turn: float, end: float) -> float:
    """Distance in mm from `end`, the ulnar end of the radius along y turned by `turn` rad, to the crop's edge.

    The crop shows the share `shown` of the section of the ulna: a segment of its circle.
    """
    heights = np.linspace(0, 2, 201)  # of the segment, in radii
    shares = (np.arccos(1 - heights) - (1 - heights) * np.sqrt(2 * heights - heights**2)) / math.pi
    (y, x), radius = shape.ulna["centre"], shape.ulna["radius"]
    first = math.cos(turn) * y - math.sin(turn) * x - radius
    return max(first + radius * float(np.interp(shape.ulna["shown"], shares, heights)) - end, 1.0)


def soft_tissue(shape: Shape, points: torch.Tensor) -> torch.Tensor:
    """Density in mg HA/cm3 of what surrounds the bones at points (..., 3) in mm."""
    broad, fine = sample(shape.tissue[0], points)[0], sample(shape.tissue[1], points)[0]
    mixed = broad + 0.45 * fine
    density = torch.full_like(broad, MUSCLE)
    density = torch.where((mixed - 0.2).abs() < 0.1, SEPTUM, density)
    density = torch.where(mixed > 0.9, FAT, density)
    y, x = points[..., 1], points[..., 2]
    for row in shape.tendons:
        c, s = math.cos(row[4]), math.sin(row[4])
        along, across = c * (y - row[0]) + s * (x - row[1]), c * (x - row[1]) - s * (y - row[0])
        level = torch.sqrt((along / row[2]) ** 2 + (across / row[3]) ** 2)
        density = torch.where(level < 1.5, 0.5 * FAT, density)
        density = torch.where(level < 1.0, row[5], density)
    cy, cx, radius = shape.skin
    below = radius - torch.hypot(y - cy, x - cx)
    subcutaneous = 4.0 + 1.2 * broad
    density = torch.where(below < subcutaneous.clamp(2.5, 6.0), FAT, density)
    density = torch.where(below < SKIN_MM, SKIN, density)
    return torch.where(below < 0, AIR, density)


def cortical_thickness(shape: Shape) -> float:
    """Mean local thickness in mm of the drawn cortex within the stack: larger spheres hold more of the volume."""
    within = (shape.levels >= 0) & (shape.levels <= HEIGHT_MM)
    return LOCAL_THICKNESS * float((shape.cortex[within] ** 2).sum() / shape.cortex[within].sum())


def _contours(rng, traits: dict, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Contours (key slice, sample, 2) in mm, and the place of each outline point as a fraction of the samples."""
    points = OUTLINE + rng.normal(0, OUTLINE_JITTER, OUTLINE.shape)
    aspect = ASPECT[traits["sex"]] * float(np.clip(1 + rng.normal(0, 0.04), 0.9, 1.1))
    drift, roll = rng.normal(0, DRIFT_MM, 2), math.radians(rng.normal(0, ROLL_DEG))
    curves = []
    for height in heights:
        moved = points.copy()
        moved[NOTCH, 0] += 0.02 * height
        moved[TUBERCLE, 1] += 0.05 * height
        angle = np.arctan2(moved[:, 1], moved[:, 0])
        round_ = 0.5 * np.stack([np.cos(angle), np.sin(angle)], 1)
        moved += 0.05 * max(height, 0) * (round_ - moved)
        curves.append(_closed(moved))
    curves = np.array(curves) * (math.sqrt(aspect), 1 / math.sqrt(aspect))
    inside = (heights >= 0) & (heights <= 1)
    shrink = np.sqrt(1 + AREA_LOSS * (0.5 - heights))[:, None, None]
    curves *= shrink * np.sqrt(traits["Tt.Ar"] / np.mean([_area(c) for c in (curves * shrink)[inside]]))
    turn = roll * (heights - 0.5)
    y, x = curves[..., 0].copy(), curves[..., 1].copy()
    c, s = np.cos(turn)[:, None], np.sin(turn)[:, None]
    curves = np.stack([c * y - s * x, s * y + c * x], -1) + ((heights - 0.5)[:, None] * drift)[:, None]
    curves -= curves[inside].mean((0, 1))
    flat = _closed(points)
    marks = np.linalg.norm(flat[None] - points[:, None], axis=2).argmin(1) / OUTLINE_SAMPLES
    return curves, marks


def _closed(points: np.ndarray) -> np.ndarray:
    """A smooth closed curve (sample, 2) through `points`, evenly sampled by arc length."""
    ring = np.vstack([points, points[:1]])
    chord = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(ring, axis=0), axis=1))])
    dense = CubicSpline(chord, ring, bc_type="periodic")(np.linspace(0, chord[-1], 2000, endpoint=False))
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(dense, axis=0, append=dense[:1]), axis=1))])
    at = np.linspace(0, length[-1], OUTLINE_SAMPLES, endpoint=False)
    loop = np.vstack([dense, dense[:1]])
    even = np.stack([np.interp(at, length, loop[:, i]) for i in range(2)], 1)
    return gaussian_filter1d(even, OUTLINE_SMOOTHING, axis=0, mode="wrap")


def _area(curve: np.ndarray) -> float:
    y, x = curve.T
    return 0.5 * abs(float(np.sum(y * np.roll(x, -1) - x * np.roll(y, -1))))


def _cortex(rng, mean_mm: float, marks: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Cortical thickness (key slice, sample) in mm that the contour of a scan reads as `mean_mm` in the mean."""
    place = np.arange(OUTLINE_SAMPLES) / OUTLINE_SAMPLES
    profile = np.ones(OUTLINE_SAMPLES)
    for row, share, width in CORTEX_ARCS:
        away = np.abs(place - marks[row])
        away = np.minimum(away, 1 - away)
        profile += share * np.exp(-0.5 * (away / width) ** 2)
    noise = gaussian_filter1d(rng.standard_normal((KEY_SLICES, OUTLINE_SAMPLES)), 22, axis=1, mode="wrap")
    noise = gaussian_filter1d(noise, 1.2, axis=0, mode="nearest")
    noise /= noise.std()
    along = CORTEX_ALONG_Z[0] + CORTEX_ALONG_Z[1] * np.clip(heights, 0, 1)
    thickness = profile * np.exp(CORTEX_SPREAD * noise) * along[:, None]
    within = (heights >= 0) & (heights <= 1)
    wanted = (mean_mm - CONTOUR_MM) / LOCAL_THICKNESS
    for _ in range(3):
        part = thickness[within]
        thickness = np.maximum(thickness * wanted * part.sum() / (part**2).sum(), THINNEST_CORTEX_MM)
    return thickness


def _surface(contours: np.ndarray, cortex: np.ndarray, levels: np.ndarray) -> Lattice:
    low, high = (np.array(corner[1:]) for corner in BOX)
    shape = np.ceil((high - low) / PLANE_STEP_MM).astype(int) + 1
    plane = np.stack(np.meshgrid(*(low[i] + PLANE_STEP_MM * np.arange(shape[i]) for i in range(2)), indexing="ij"), -1)
    values = np.empty((2, len(levels), *shape), np.float32)
    for k, curve in enumerate(contours):
        tangent = np.roll(curve, -1, 0) - np.roll(curve, 1, 0)
        normal = np.stack([tangent[:, 1], -tangent[:, 0]], 1) / np.linalg.norm(tangent, axis=1)[:, None]
        normal *= np.sign(((curve - curve.mean(0)) * normal).sum())
        distance, nearest = cKDTree(curve).query(plane.reshape(-1, 2))
        along = ((plane.reshape(-1, 2) - curve[nearest]) * normal[nearest]).sum(1)
        values[0, k] = np.where(distance < 1.0, along, np.sign(along) * distance).reshape(shape)
        values[1, k] = cortex[k][nearest].reshape(shape)
    step = (levels[1] - levels[0], PLANE_STEP_MM, PLANE_STEP_MM)
    return Lattice(torch.from_numpy(values), (levels[0], *low), step)


def _tendons(rng, contour: np.ndarray) -> np.ndarray:
    centre = contour.mean(0)
    rows = []
    for at in rng.choice(len(contour), 14, replace=False):
        away = (contour[at] - centre) / np.linalg.norm(contour[at] - centre)
        y, x = contour[at] + away * rng.uniform(1.2, 3.5) + away * 0.8
        angle = math.atan2(away[1], away[0]) + math.pi / 2
        rows.append((y, x, rng.uniform(0.9, 2.3), rng.uniform(0.8, 1.5), angle, MUSCLE + rng.uniform(2, 8)))
    return np.array(rows)


def make_pores(key: tuple, shape: Shape, fraction: float) -> np.ndarray:
    """Cortical pores, rows of (z, y, x, radius, half length) in mm, that a scan sees fill `fraction` of the cortex.

    They are capsules along z that a scan can show: of radius .14-.22 mm and half length .4-1.1 mm, where the cortex is
    thick enough to enclose them.
    """
    rng = numpy_rng(key[0], "pores", *key[1:])
    within = (shape.levels >= 0) & (shape.levels <= HEIGHT_MM)
    perimeter = np.linalg.norm(np.diff(shape.contours, axis=1), axis=2).sum(1)[within].mean()
    wanted = fraction / PORES_SEEN * perimeter * shape.cortex[within].mean() * HEIGHT_MM
    rows, filled = [], 0.0
    while filled < wanted:
        z, at, depth = rng.uniform(0, HEIGHT_MM), int(rng.integers(OUTLINE_SAMPLES)), rng.uniform(0.42, 0.58)
        radius, half = rng.uniform(*PORE_RADIUS_MM), rng.uniform(0.4, 1.1)
        place = np.interp(z, shape.levels, np.arange(KEY_SLICES))
        k, share = min(int(place), KEY_SLICES - 2), place - min(int(place), KEY_SLICES - 2)
        curve = (1 - share) * shape.contours[k] + share * shape.contours[k + 1]
        thickness = (1 - share) * shape.cortex[k, at] + share * shape.cortex[k + 1, at]
        if thickness < PORE_WALLS * radius:
            continue
        inward = curve.mean(0) - curve[at]
        tangent = curve[(at + 1) % OUTLINE_SAMPLES] - curve[at - 1]
        normal = np.array([tangent[1], -tangent[0]]) / np.linalg.norm(tangent)
        y, x = curve[at] + normal * np.sign(normal @ inward) * depth * thickness
        rows.append((z, y, x, radius, half))
        filled += math.pi * radius**2 * 2 * half
    return np.array(rows).reshape(-1, 5)
