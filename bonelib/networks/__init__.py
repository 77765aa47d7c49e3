"""Generators and critics. Nothing outside of this package asks which kind of generator it holds."""

import torch

from bonelib.networks.config import CriticNet, Generator, ProGANConfig, StyleGANConfig, SuperRes
from bonelib.networks.critic import Critic
from bonelib.networks.numerics import compute_dtype
from bonelib.networks.progan import ProGAN
from bonelib.networks.stylegan import StyleGAN
from bonelib.networks.superres import SuperResolution

TEXTURE = 5  # numbers of a texture code (`scans.dataset.TEXTURE`)
BASE = (1, 9, 7)  # (z, y, x) of the coarsest grid; every stage doubles it


GENERATORS = {ProGANConfig: ProGAN, StyleGANConfig: StyleGAN}


def build_generator(params: Generator, *, haar: bool = False, precision: str = "float32"):
    """The generator that a section of `networks.config.GENERATORS` describes."""
    return GENERATORS[type(params)](base=BASE, haar=haar, dtype=compute_dtype(precision), **params.network())


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
        dtype=compute_dtype(precision),
    )


def build_superres(params: SuperRes) -> SuperResolution:
    """The super-resolution network that a `SuperRes` section describes."""
    sizes = params.width, params.depth, params.fine_width, params.fine_depth
    return SuperResolution(*sizes, texture=TEXTURE, dtype=compute_dtype(params.precision))
