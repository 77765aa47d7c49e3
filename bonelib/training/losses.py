"""The training losses, one function for each equation of Angermann et al. 2023."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bonelib.randomness import Part, drawn


def mix(real: Tensor, fake: Tensor, rng: torch.Generator | Part) -> Tensor:
    """Points on the lines between real and generated volumes, uniform, for the gradient penalty of eq. (1)."""
    share = drawn(torch.rand, len(real), 1, 1, 1, 1, rng=rng).to(real)
    return share * real + (1 - share) * fake


def slopes(gradient: Tensor) -> Tensor:
    """The Euclidean norm of each sample's input gradient, (n,)."""
    return (gradient.float().square().sum(dim=(1, 2, 3, 4)) + 1e-12).sqrt()


def critic_loss(on_real: Tensor, on_fake: Tensor, slope: Tensor, *, penalty: float, drift: float) -> Tensor:
    """Eq. (1): Wasserstein loss with the two-sided gradient penalty (`penalty` is p1) and drift (`drift` is p2)."""
    return on_fake.mean() - on_real.mean() + penalty * (slope - 1).square().mean() + drift * on_real.square().mean()


def generator_loss(on_fake: Tensor) -> Tensor:
    """Eq. (2)."""
    return -on_fake.mean()


def relativistic(better: Tensor, worse: Tensor) -> Tensor:
    """How far scores `better` fall short of scores `worse`, pair by pair (logistic; Jolicoeur-Martineau 2018).

    The critic wants real above generated ones, the generator the reverse. Not in the paper.
    """
    return F.softplus(worse - better).mean()
