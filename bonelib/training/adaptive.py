"""Adaptive augmentation (Karras et al. 2020a): the critic sees changed volumes, the more of them the surer it is.

Real and generated volumes are changed alike, in the critic's steps and in the generator's. As long as most volumes stay
as they are, the generator learns to draw them unchanged (their section 2.2). A bone is mirrored along its axis, shifted
by whole voxels, turned and zoomed in plane, made denser or less dense, or loses a box. How often is steered by the
share of pairs that the critic ranks rightly, which needs a loss that compares pairs: a Wasserstein critic is trained
until it ranks all of them rightly, and its held-out gap would let the training see the bones it is tested on.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bonelib.core.random import torch_rng
from bonelib.training.config import Adaptive

LIMIT = 0.8  # of the probability; above it changes leak into what is drawn
SHIFT = 1 / 8  # of height and width
TURN = math.radians(15)
ZOOM = 1.2
SCALE, OFFSET = 1.2, 0.1  # of intensities in [0, 1]
BOX = 1 / 2  # of height and width


def augmented(volumes: Tensor, purpose: str, first: int, every: int, seed: int, p: float) -> Tensor:
    """`volumes` (n, 1, z, y, x), every `every`th sample from number `first`, each change made with probability `p`.

    Bilinear in plane, with the mirrored image beyond the edge. All draws are keyed by seed, purpose and number.
    """
    if p == 0:
        return volumes
    n, _, _, height, width = volumes.shape
    draws = [torch.rand(13, generator=torch_rng(seed, "adaptive", purpose, first + i * every)) for i in range(n)]
    draws = torch.stack(draws).to(volumes)
    mirrored, shifted, turned, scaled, cut = (draws[:, :5] < p).T
    size, (y, x, angle, zoom, scale, offset) = draws.new_tensor([height, width]), (2 * draws[:, 5:11] - 1).T
    volumes = torch.where(_of(mirrored), volumes.flip(2), volumes)

    moved = torch.round(torch.stack([x * width, y * height], 1) * SHIFT) * shifted[:, None]
    angle, zoom = TURN * angle * turned, ZOOM ** (zoom * turned)
    cos, sin, aspect = torch.cos(angle) / zoom, torch.sin(angle) / zoom, height / width
    # affine_grid counts in half widths and half heights, so that the off-diagonal terms carry the aspect ratio
    turn = torch.stack([torch.stack([cos, -sin * aspect], 1), torch.stack([sin / aspect, cos], 1)], 1)
    theta = torch.cat([turn, (2 * moved / size.flip(0))[:, :, None]], 2)
    grid = F.affine_grid(theta, [n, 1, height, width], align_corners=False)
    volumes = F.grid_sample(volumes[:, 0], grid, padding_mode="reflection", align_corners=False)[:, None]

    volumes = volumes * _of(SCALE ** (scale * scaled)) + _of(OFFSET * offset * scaled)
    middle = draws[:, 11:] * size
    rows, columns = (torch.arange(k, device=volumes.device) + 0.5 for k in (height, width))
    inside = ((rows - middle[:, :1]).abs() < BOX / 2 * height)[:, :, None] & (
        (columns - middle[:, 1:]).abs() < BOX / 2 * width
    )[:, None, :]
    return volumes.masked_fill((inside & cut[:, None, None])[:, None, None], 0.0)


def _of(values: Tensor) -> Tensor:
    """One value a sample, shaped to meet volumes."""
    return values[:, None, None, None, None]


def update_probability(p: float, ranked: float, samples: int, how: Adaptive) -> float:
    """The probability after `samples` more, of whose pairs the critic's mean sign, real over generated, is `ranked`.

    It moves at one speed, up where the critic is surer than `how.target` and down where it is less (section 3.1).
    """
    return min(LIMIT, max(0.0, p + ((ranked > how.target) - (ranked < how.target)) * samples / how.ramp))
