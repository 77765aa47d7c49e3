"""Generators and critics. Nothing outside of this package asks which kind of generator it holds."""

import torch

from bonelib.networks.critic import Critic
from bonelib.networks.detail import Detail
from bonelib.networks.progan import ProGAN
from bonelib.networks.stylegan import StyleGAN
from bonelib.params import CriticNet, DetailLevels, Generator

BASE = (1, 9, 7)  # (z, y, x) of the coarsest grid; every stage doubles it


def build_generator(params: Generator, *, haar: bool = False, precision: str = "float32"):
    """The generator that a `Generator` section describes."""
    kinds = {"progan": ProGAN, "stylegan": StyleGAN}
    given = params.model_dump(exclude={"kind"}, exclude_none=True)
    return kinds[params.kind](base=BASE, haar=haar, dtype=getattr(torch, precision), **given)


def build_critic(
    params: CriticNet, *, haar: bool = False, precision: str = "float32", statistics: torch.Tensor | None = None
) -> Critic:
    """The critic that a `CriticNet` section describes; `statistics` (stages, 2, bands) are used if it standardises."""
    return Critic(
        params.widths,
        params.convs,
        BASE if params.whole else None,
        params.head,
        haar,
        statistics if params.standardise else None,
        dtype=getattr(torch, precision),
    )


def build_detail(params: DetailLevels, statistics: torch.Tensor | None = None) -> Detail:
    """The network of one level that a `DetailLevels` section describes; `statistics` (2, 8) are those of its bands."""
    return Detail(params.width, params.convs, statistics, dtype=getattr(torch, params.precision))
