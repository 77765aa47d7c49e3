"""Halving, doubling and Haar bands of grids, shared by data and networks. Tensors are (batch, channel, z, y, x)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(x: Tensor, flat: bool = False) -> Tensor:
    """Nearest upsampling by two along all axes, or in plane alone."""
    return F.interpolate(x, scale_factor=(1.0, 2.0, 2.0) if flat else 2, mode="nearest")


def downsample(x: Tensor, times: int = 1) -> Tensor:
    """Mean over blocks of 2x2x2 voxels, of a single slice 2x2 (written as a reshape: deterministic on every device)."""
    for _ in range(times):
        n, c, z, y, w = x.shape
        depth = 1 if z == 1 else 2
        x = x.reshape(n, c, z // depth, depth, y // 2, 2, w // 2, 2).mean(dim=(3, 5, 7))
    return x


def smeared(x: Tensor) -> Tensor:
    """Every voxel replaced by the mean of its block, on the same grid."""
    return upsample(downsample(x), x.shape[2] == 1)


def haar(x: Tensor) -> Tensor:
    """One level of the orthonormal Haar transform: (n, 1, z, y, x) to the 8 bands (n, 8, z/2, y/2, x/2), mean first."""
    n, _, z, y, w = x.shape
    x = x.reshape(n, z // 2, 2, y // 2, 2, w // 2, 2).permute(0, 2, 4, 6, 1, 3, 5)
    for axis in (1, 2, 3):
        even, odd = x.select(axis, 0), x.select(axis, 1)
        x = torch.stack([even + odd, even - odd], dim=axis) * 0.5**0.5
    return x.reshape(n, 8, z // 2, y // 2, w // 2)


def unhaar(bands: Tensor) -> Tensor:
    """The inverse and adjoint of `haar`."""
    n, _, z, y, w = bands.shape
    x = bands.reshape(n, 2, 2, 2, z, y, w)
    for axis in (1, 2, 3):
        mean, difference = x.select(axis, 0), x.select(axis, 1)
        x = torch.stack([mean + difference, mean - difference], dim=axis) * 0.5**0.5
    return x.permute(0, 4, 1, 5, 2, 6, 3).reshape(n, 1, 2 * z, 2 * y, 2 * w)
