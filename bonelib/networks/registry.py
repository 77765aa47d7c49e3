"""Generators, critics and super-resolution, built from their sections. Nothing else asks of what kind they are."""

import torch

from bonelib.networks.config import (
    BASE,
    CriticNet,
    Generator,
    HAGANConfig,
    HAGANCriticNet,
    ProGANConfig,
    StyleGANConfig,
    SuperRes,
)
from bonelib.networks.critic import Critic
from bonelib.networks.hagan import HAGAN
from bonelib.networks.hagan_critic import HAGANCritic
from bonelib.networks.numerics import compute_dtype
from bonelib.networks.progan import ProGAN
from bonelib.networks.stylegan import StyleGAN
from bonelib.networks.superres import SuperResolution

GENERATORS = {ProGANConfig: ProGAN, StyleGANConfig: StyleGAN, HAGANConfig: HAGAN}


def build_generator(params: Generator | HAGANConfig, *, haar: bool = False, precision: str = "float32"):
    """The generator that a section of `networks.config` describes."""
    how = dict(dtype=compute_dtype(precision)) | ({"haar": True} if haar else {}) | params.network()
    return GENERATORS[type(params)](**how)


def build_critic(
    params: CriticNet | HAGANCriticNet,
    *,
    generator: Generator | HAGANConfig | None = None,
    haar: bool = False,
    precision: str = "float32",
    statistics: torch.Tensor | None = None,
) -> Critic | HAGANCritic:
    """The critic that a section describes, of what the `generator` draws (by default volumes of the usual base).

    `statistics` (stages, 2, bands) are used if it standardises.
    """
    if isinstance(params, HAGANCriticNet):
        how = dict(classes=generator.classes, dtype=compute_dtype(precision))
        return HAGANCritic(**generator.parts(), **params.model_dump(), **how)
    base = BASE if generator is None else generator.base
    return Critic(
        params.widths,
        params.convs,
        base if params.whole else None,
        params.head,
        haar,
        statistics if params.standardise else None,
        flat=generator is not None and generator.flat,
        dtype=compute_dtype(precision),
    )


def build_superres(params: SuperRes) -> SuperResolution:
    """The super-resolution network that a `SuperRes` section describes."""
    sizes = params.width, params.depth, params.fine_width, params.fine_depth
    how = dict(texture=params.texture, factor=params.factor)
    return SuperResolution(*sizes, **how, dtype=compute_dtype(params.precision))
