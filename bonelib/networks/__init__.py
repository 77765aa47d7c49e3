"""Generators and critics. Nothing outside of this package asks which kind of generator it holds."""

import torch

from bonelib.networks.critic import Critic
from bonelib.networks.progan import ProGAN
from bonelib.params import CriticNet, Generator

BASE = (1, 9, 7)  # (z, y, x) of the coarsest grid; every stage doubles it


def build_generator(params: Generator, *, haar: bool = False, precision: str = "float32"):
    """The generator that a `Generator` section describes."""
    kinds = {"progan": ProGAN}
    return kinds[params.kind](
        base=BASE, haar=haar, dtype=getattr(torch, precision), **params.model_dump(exclude={"kind"})
    )


def build_critic(
    params: CriticNet, *, haar: bool = False, precision: str = "float32", statistics: torch.Tensor | None = None
) -> Critic:
    """The critic that a `CriticNet` section describes; `statistics` (stages, 2, bands) are used if it standardises."""
    return Critic(
        params.widths,
        params.convs,
        BASE if params.whole else None,
        haar,
        statistics if params.standardise else None,
        dtype=getattr(torch, precision),
    )
