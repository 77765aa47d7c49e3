"""Smooth random fields on small lattices, read off at any point in space."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

NODES_PER_LENGTH = 3  # trilinear reading of a field of this sampling shows no kinks
SIGMA_PER_LENGTH = 0.5  # a Gaussian of half the length correlates about as white noise on nodes one length apart


class Lattice(NamedTuple):
    """Values (channel, z, y, x) on a regular grid whose first node lies at `origin` mm, nodes `step` mm apart."""

    values: torch.Tensor
    origin: tuple[float, float, float]
    step: tuple[float, float, float]


def sample(lattice: Lattice, points: torch.Tensor) -> torch.Tensor:
    """Trilinear values (channel, ...) at points (..., 3) in mm (z, y, x); beyond the lattice the border value holds."""
    nodes = torch.tensor(lattice.values.shape[1:], dtype=torch.float32)
    origin, step = (torch.tensor(mm, dtype=torch.float32) for mm in (lattice.origin, lattice.step))
    place = ((points - origin) / step * (2 / (nodes - 1)) - 1).flip(-1).reshape(1, -1, 1, 1, 3)
    values = F.grid_sample(lattice.values[None], place, mode="bilinear", padding_mode="border", align_corners=True)
    return values.reshape(lattice.values.shape[0], *points.shape[:-1])


def smooth_noise(
    rng: np.random.Generator,
    box: tuple[tuple[float, float, float], tuple[float, float, float]],
    length_mm: float | tuple[float, float, float],
    channels: int = 1,
) -> Lattice:
    """Gaussian noise of mean 0 and SD 1 that decorrelates over `length_mm`, covering `box` (low, high corner in mm)."""
    low, high = (np.asarray(corner, float) for corner in box)
    step = np.broadcast_to(np.asarray(length_mm, float), 3) / NODES_PER_LENGTH
    shape = np.maximum(np.ceil((high - low) / step).astype(int) + 1, 2)
    sigma = SIGMA_PER_LENGTH * NODES_PER_LENGTH
    taps = np.exp(-0.5 * (np.arange(-6, 7) / sigma) ** 2)
    gain = np.sqrt((taps**2).sum() / taps.sum() ** 2) ** 3
    white = rng.standard_normal((channels, *shape), dtype=np.float32)
    smooth = gaussian_filter(white, (0, sigma, sigma, sigma), mode="wrap", truncate=3.0) / gain
    return Lattice(torch.from_numpy(smooth.astype(np.float32)), tuple(low), tuple(step))


def upsample(values: torch.Tensor, factor: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Trilinear values (channel, *shape) between nodes (channel, z, y, x) that lie `factor` voxels apart."""
    if factor == 1:
        return values[(slice(None), *(slice(n) for n in shape))].clone()
    size = [(n - 1) * factor + 1 for n in values.shape[1:]]
    fine = F.interpolate(values[None], size=size, mode="trilinear", align_corners=True)[0]
    return fine[(slice(None), *(slice(n) for n in shape))]
