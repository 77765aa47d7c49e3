"""What a scan shows of an arm that moved while it was made: streaks, doubled edges, smeared trabeculae.

A projection along one direction holds one line of a slice's 2D spectrum (Fourier slice theorem). While the arm lies
elsewhere, the scanner reads these lines from the displaced object, so that an angular wedge of the spectrum is
replaced. How far the arm moves sets the visual grade (1 still ... 5 severe; Sode et al. 2011), which section 3.3 of
Angermann et al. 2023 uses.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
from torch import Tensor

from bonelib import InputError
from bonelib.scans.volumes import Volume

STILL = 1
COARSE_MM = 0.1214  # grid of the residual: streaks are long, and the point spread hides what is finer
JUDGED_MM = 0.2428  # grid on which the size of a motion is read, so that every scan grid reads the same
JUDGED_SLICES = 8
SOFT_TISSUE = 12.0  # mg HA/cm3, taken off before the field is faded to zero at its border
BORDER_MM = 3.0  # of mirrored field that fades to zero: more than any displacement
EDGE_DEG = 0.4  # over which one position of the arm passes into another
TURN_DEG = 180.0  # half a turn holds every projection
DRIFT = 0.2  # share of events in which the arm drifts to its place instead of jumping there
DRIFT_STEPS = 3  # rotations and rises of a drift; its shift is continuous
REDRAWS = 24
BATCH = 8  # slices transformed at once


class Grade(NamedTuple):
    """What is drawn for a visual grade, and the band of `motion` that the scan must fall into."""

    band: tuple[float, float]
    events: tuple[int, int]
    length: tuple[float, float]  # degrees of the half turn, each event
    shift: tuple[float, float]  # mm in plane
    rotation: tuple[float, float]  # degrees in plane
    rise: float  # mm along z, at most


GRADES = {
    2: Grade((0.014, 0.035), (1, 2), (18, 40), (0.10, 0.24), (0.15, 0.40), 0.0),
    3: Grade((0.050, 0.110), (1, 2), (30, 60), (0.20, 0.45), (0.40, 0.90), 0.0),
    4: Grade((0.150, 0.330), (1, 3), (35, 70), (0.35, 0.90), (0.80, 2.00), 0.3),
    5: Grade((0.450, 1.200), (2, 3), (40, 75), (0.80, 2.00), (2.00, 5.00), 0.3),
}


class Event(NamedTuple):
    """The arm lies elsewhere from `start` on for `length` degrees: `shift` mm (y, x), `rotation` deg, `rise` mm (z)."""

    start: float
    length: float
    shift: tuple[float, float]
    rotation: float
    rise: float
    drifts: bool


def moved(volume: Volume, rng: np.random.Generator, grade: int) -> tuple[Volume, dict]:
    """`volume` (true density, mg HA/cm3, axes z, y, x) as reconstructed when the arm moved so that `grade` results.

    Trajectories are drawn until the motion measure falls into the band of the grade, or the closest of `REDRAWS` is
    taken: 1 - correlation with the still scan over the whole field, on `JUDGED_SLICES` slices of .2428 mm without
    point spread or noise. All slices move alike, as a stack is one turn of the scanner. The truth holds `events`,
    `max_shift_mm`, `max_rotation_deg` and `motion`, the measure. Grade 1 returns the volume itself. Raises
    `InputError` for another grade than 1-5.
    """
    if grade == STILL:
        return volume, _truth([], 0.0)
    if grade not in GRADES:
        raise InputError(f"motion grade is {grade!r}; accepted are whole numbers from 1 (still) to 5 (severe)")
    voxels = torch.from_numpy(np.ascontiguousarray(volume.voxels, np.float32))
    coarse, spacing, factor = coarser(voxels, volume.spacing, COARSE_MM)
    events, motion = trajectory(coarse, spacing, rng, GRADES[grade])
    residual = spectral_residual(coarse, spacing, events, range(len(coarse)), factor)
    return volume.with_voxels(_added(voxels, residual, factor)), _truth(events, motion)


def draw_events(rng: np.random.Generator, how: Grade) -> list[Event]:
    """A trajectory of the grade `how`: events apart from each other, at any angle of the half turn."""
    count = int(rng.integers(how.events[0], how.events[1] + 1))
    lengths = rng.uniform(*how.length, count)
    lengths *= min(1.0, 0.9 * TURN_DEG / lengths.sum())  # no position but the first may hold most of the turn
    gaps = rng.dirichlet(np.ones(count)) * (TURN_DEG - lengths.sum())
    starts = rng.uniform(0, TURN_DEG) + np.cumsum(gaps) + np.cumsum(lengths) - lengths
    events = []
    for start, length in zip(starts % TURN_DEG, lengths, strict=True):
        size, way = rng.uniform(*how.shift), rng.uniform(0, 2 * math.pi)
        rotation = rng.uniform(*how.rotation) * rng.choice([-1, 1])
        rise, drifts = rng.uniform(-1, 1) * how.rise, rng.random() < DRIFT
        shift = (float(size * math.sin(way)), float(size * math.cos(way)))
        events.append(Event(float(start), float(length), shift, float(rotation), float(rise), bool(drifts)))
    return events


def motion_measure(judged: Tensor, spacing: tuple, events: list[Event]) -> float:
    """1 - correlation of the moved with the still field (z, y, x) on some slices: 0 still, about 1 unrelated."""
    rows = sorted({int((i + 0.5) * len(judged) / JUDGED_SLICES) for i in range(JUDGED_SLICES)})
    still = judged[rows]
    now = still + spectral_residual(judged, spacing, events, rows)
    return float(1 - torch.corrcoef(torch.stack([still.flatten(), now.flatten()]))[0, 1])


def trajectory(coarse: Tensor, spacing: tuple, rng: np.random.Generator, how: Grade) -> tuple[list[Event], float]:
    """The first trajectory whose motion lies in the band, or the closest one, and its motion."""
    judged, spacing, _ = coarser(coarse, spacing, JUDGED_MM)
    low, high = how.band
    best, least = None, math.inf
    for _ in range(REDRAWS):
        events = draw_events(rng, how)
        motion = motion_measure(judged, spacing, events)
        miss = max(low - motion, motion - high, 0.0)
        if miss < least:
            best, least = (events, motion), miss
        if miss == 0:
            break
    return best


def coarser(voxels: Tensor, spacing: tuple, wanted_mm: float) -> tuple[Tensor, tuple, int]:
    """Block means (z, y, x) on a grid of about `wanted_mm` or the grid itself, its spacing in mm, and the factor."""
    factor = max(1, round(wanted_mm / spacing[1]))
    if factor > 1:
        # Slab by slab, as pooling asks for the whole input in its own layout; an incomplete block at the end is
        # averaged over the voxels that it has.
        slabs = voxels.split(factor * BATCH)
        means = [
            F.avg_pool3d(s[None, None], (min(factor, len(s)), factor, factor), ceil_mode=True)[0, 0] for s in slabs
        ]
        voxels = torch.cat(means)
    return voxels, tuple(mm * factor for mm in spacing), factor


def spectral_residual(field: Tensor, spacing: tuple, events: list[Event], rows, factor: int = 1) -> Tensor:
    """What the motion adds to the slices `rows` of `field` (z, y, x): (len(rows), y, x), in the unit of the field.

    With `factor` > 1 the residual is sharpened in plane, so that its linear upsampling by `factor` has its values
    as block means.
    """
    rows, (_, height, width) = list(rows), field.shape
    border = [min(round(BORDER_MM / mm), n - 1) for mm, n in zip(spacing[1:], field.shape[1:], strict=True)]
    size = [next_fast_len(n + 2 * b, real=True) for n, b in zip((height, width), border, strict=True)]
    wedge, poses = _wedges(events, size, spacing[1:], factor)
    fade = _fade(height, border[0])[:, None] * _fade(width, border[1])
    grids = {turn: _turned_grid(turn, fade.shape, spacing[1:]) for turn in {turn for turn, _ in poses}}
    out = torch.empty(len(rows), height, width)
    for first in range(0, len(rows), BATCH):
        index = torch.tensor(rows[first : first + BATCH])
        still = _bordered(field[index], border) * fade
        spectrum = torch.fft.rfft2(still, s=size) * -wedge
        for (turn, rise), multiplier in poses.items():
            copy = still if rise == 0 else _bordered(_risen(field, index, rise / spacing[0]), border) * fade
            if turn != 0:
                copy = F.grid_sample(copy[None], grids[turn], mode="bicubic", align_corners=False)[0]
            spectrum += torch.fft.rfft2(copy, s=size) * multiplier
        back = torch.fft.irfft2(spectrum, s=size)
        out[first : first + BATCH] = back[:, border[0] : border[0] + height, border[1] : border[1] + width]
    return out


def _wedges(events: list[Event], size: list[int], spacing: tuple, factor: int) -> tuple[Tensor, dict]:
    """The share of every frequency (y, x) read from elsewhere, and {(rotation, rise): complex weight (y, x)}."""
    fy = torch.fft.fftfreq(size[0], dtype=torch.float64)[:, None]
    fx = torch.fft.rfftfreq(size[1], dtype=torch.float64)[None]
    angle = torch.rad2deg(torch.atan2(fy / spacing[0], fx / spacing[1]))
    mean = (factor**2 - factor % 2) / (4 * factor**2)  # weight that linear upsampling takes from the neighbours
    sharpen = 1 / ((1 - mean + mean * torch.cos(2 * math.pi * fy)) * (1 - mean + mean * torch.cos(2 * math.pi * fx)))
    sharpen[0, 0] = 0  # all projections hold the same mass
    wedge, poses = torch.zeros(angle.shape, dtype=torch.float64), {}
    for event in events:
        from_middle = _wrapped(angle - event.start - event.length / 2)
        steps = DRIFT_STEPS if event.drifts else 1
        there = (0.5 + from_middle / event.length).clamp(0, 1) if event.drifts else torch.ones(())
        phase = (fy / spacing[0] * event.shift[0] + fx / spacing[1] * event.shift[1]) * there
        for step in range(steps):
            part = event.length / steps
            offset = _wrapped(angle - event.start - (step + 0.5) * part).abs()
            share = ((part / 2 - offset) / EDGE_DEG + 0.5).clamp(0, 1) * sharpen
            way = (step + 0.5) / steps if event.drifts else 1.0
            pose = (event.rotation * way, event.rise * way)
            wedge += share
            poses[pose] = poses.get(pose, 0) + share * torch.exp(-2j * math.pi * phase)
    return wedge.float(), {pose: multiplier.to(torch.complex64) for pose, multiplier in poses.items()}


def _wrapped(degrees: Tensor) -> Tensor:
    """Angles of lines, which repeat after half a turn, in -90 to 90 degrees."""
    return (degrees + TURN_DEG / 2) % TURN_DEG - TURN_DEG / 2


def _fade(n: int, border: int) -> Tensor:
    """1 over `n` inner samples, falling to 0 over `border` samples on both sides."""
    fall = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(border) + 0.5) / max(border, 1))
    return torch.cat([fall, torch.ones(n), fall.flip(0)])


def _bordered(slices: Tensor, border: list[int]) -> Tensor:
    """Slices (n, y, x) above soft tissue, continued by their mirror image, so that what moves in looks like the arm."""
    pad = (border[1], border[1], border[0], border[0])
    return F.pad((slices - SOFT_TISSUE)[None], pad, mode="reflect")[0]


def _turned_grid(degrees: float, shape: tuple[int, int], spacing: tuple) -> Tensor:
    """Where `grid_sample` finds the slice turned about its centre by `degrees` (x towards y): (1, y, x, 2)."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    aspect = shape[0] * spacing[0] / (shape[1] * spacing[1])  # affine_grid counts in half widths and half heights
    theta = torch.tensor([[[cos, sin * aspect, 0.0], [-sin / aspect, cos, 0.0]]])
    return F.affine_grid(theta, [1, 1, *shape], align_corners=False)


def _risen(field: Tensor, index: Tensor, slices: float) -> Tensor:
    """The slices `index` of `field` after it rose by `slices` along z, by linear interpolation; the ends repeat."""
    below, last = math.floor(-slices), len(field) - 1
    share = -slices - below
    return field[(index + below).clamp(0, last)] * (1 - share) + field[(index + below + 1).clamp(0, last)] * share


def _added(voxels: Tensor, residual: Tensor, factor: int) -> np.ndarray:
    """`voxels` plus the residual, linearly upsampled by `factor`, in slabs of little memory."""
    if factor == 1:
        return (voxels + residual).numpy()
    out, last = torch.empty_like(voxels), len(residual) - 1
    for first in range(0, len(residual), BATCH):
        # One slice beyond on both sides, for the interpolation
        index = torch.arange(first - 1, min(first + BATCH, len(residual)) + 1).clamp(0, last)
        fine = F.interpolate(residual[index][None, None], scale_factor=factor, mode="trilinear")[0, 0]
        start, stop = first * factor, min((first + BATCH) * factor, len(voxels))
        inner = fine[factor : factor + stop - start, : voxels.shape[1], : voxels.shape[2]]
        torch.add(voxels[start:stop], inner, out=out[start:stop])
    return out.numpy()


def _truth(events: list[Event], motion: float) -> dict:
    return {
        "events": len(events),
        "max_shift_mm": round(max((math.hypot(*e.shift) for e in events), default=0.0), 4),
        "max_rotation_deg": round(max((abs(e.rotation) for e in events), default=0.0), 4),
        "motion": round(motion, 5),
    }
