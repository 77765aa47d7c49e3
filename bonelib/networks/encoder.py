"""Encoders, the reversed generator, and the latent discriminator (Angermann et al. 2023, section 3.5)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonelib import InputError
from bonelib.core.pyramid import haar
from bonelib.networks.config import BASE, Generator, HAGANConfig
from bonelib.networks.critic import Critic
from bonelib.networks.hagan import HAGANEncoder
from bonelib.networks.layers import CHANNELS_LAST, FLAT, FULL, Conv, Dense
from bonelib.networks.numerics import compute_dtype

SLOPE = 0.2  # of the leaky rectifier
GAIN = 2**0.5  # of a layer, since its rectifier halves the power


class Encoder(nn.Module):
    """Maps volumes (n, 1, z, y, x) of shape `base` x 2^stages to codes (n, code).

    Table A.2 read from its end: the image to the finest width, then every stage's two convolutions, the one that leaves
    it with stride 2, and a dense layer; there is no pixel norm. `widths` are the generator's, coarsest first. `dense`
    adds fully connected layers: two in the paper for a StyleGAN, whose codes come out of a leaky rectifier too.

    Not in the paper: `norm` "instance" (Fetty et al. 2020); `haar` and `flat` read what a generator draws that has
    them; `statistics` (2, bands), mean and SD, standardise the input.
    """

    def __init__(
        self,
        base=BASE,
        widths=(128, 128, 128, 64, 32, 16),
        code=512,
        dense=0,
        norm="none",
        haar=False,
        padding="zeros",
        statistics=None,
        flat=False,
        dtype=torch.float32,
    ):
        super().__init__()
        self.haar, self.instance = haar, norm == "instance"
        bands, how = 8 if haar else 1, dict(kernel=FLAT if flat else FULL, padding=padding, dtype=dtype)
        if statistics is None:
            statistics = torch.tensor([[0.0], [1.0]]).expand(2, bands)
        self.register_buffer("statistics", statistics.clone())
        self.from_image = Conv(bands, widths[-1], **how)
        stages = list(zip(widths[:-1], widths[1:], strict=True))
        self.convs = nn.ModuleList(
            conv
            for coarse, fine in reversed(stages)
            for conv in (Conv(fine, fine, **how), Conv(fine, coarse, stride=2, **how))
        )
        self.to_code = Dense(widths[0] * base[0] * base[1] * base[2], code)
        self.dense = nn.ModuleList(Dense(code, code, gain=GAIN) for _ in range(dense))

    @property
    def place(self) -> torch.device:
        """Where the volumes must be."""
        return self.statistics.device

    def forward(self, volumes: Tensor) -> Tensor:
        mean, sd = self.statistics.reshape(2, -1, 1, 1, 1)
        x = (((haar(volumes) if self.haar else volumes) - mean) / sd).contiguous(memory_format=CHANNELS_LAST)
        for conv in (self.from_image, *self.convs):
            x = conv(x)
            x = F.silu(F.instance_norm(x) if self.instance and x[0, 0].numel() > 1 else x)
        code = self.to_code(x.float().flatten(1))
        for dense in self.dense:
            code = F.leaky_relu(dense(code), SLOPE)
        return code


class LatentDiscriminator(nn.Module):
    """Tells codes of the mapping network from codes of the encoder: D_W of eq. (8), as the logit of its probability.

    (n, code) to (n,). The paper does not say how it is made: here `layers` dense layers with leaky rectifiers, as the
    mapping network, then one to a number.
    """

    def __init__(self, code: int = 512, layers: int = 3):
        super().__init__()
        self.dense = nn.ModuleList(Dense(code, code, gain=GAIN) for _ in range(layers))
        self.out = Dense(code, 1)

    def forward(self, codes: Tensor) -> Tensor:
        for dense in self.dense:
            codes = F.leaky_relu(dense(codes), SLOPE)
        return self.out(codes)[:, 0]


def build_encoder(
    generator: Generator | HAGANConfig, *, dense: int = 0, norm: str = "none", precision: str = "float32", **how
) -> Encoder | HAGANEncoder:
    """The reverse of the generator that a section describes; a HA-GAN has an encoder of its own. `how` are `haar` and
    `statistics` of an `Encoder`."""
    if isinstance(generator, HAGANConfig):
        if dense or norm != "none":
            raise InputError(f"encoder: dense {dense}, norm {norm}: that of a HA-GAN accepts dense 0 and norm none")
        own = dict(features=generator.widths[-1], widths=generator.encoder, latent=generator.code)
        return HAGANEncoder(**generator.parts(), **own, dtype=compute_dtype(precision))
    how |= dict(padding=generator.padding, flat=generator.flat, dtype=compute_dtype(precision))
    return Encoder(generator.base, generator.widths, generator.code, dense, norm, **how)


def trunk(generator: nn.Module) -> nn.Module:
    """The generator itself, without the super-resolution that may follow it."""
    return getattr(generator, "generator", generator)


def coarsely(generator: nn.Module):
    """What maps the codes of a generator to volumes on the grid of its trunk."""
    return getattr(generator, "coarse", generator.synthesize)


def texture_length(generator: nn.Module) -> int:
    """How many numbers of a code, its last ones, are the texture's and not the trunk's."""
    return getattr(generator, "texture", 0)


def style_layers(generator: nn.Module) -> int | None:
    """How many styles a code may hold, one a layer (W+); None where a code is one vector."""
    return getattr(trunk(generator), "layers", None)


def critic_features(critic: Critic, volumes: Tensor, which: str = "penultimate") -> list[Tensor]:
    """Feature maps of the critic at its last stage, float32, each (n, channel, z, y, x).

    "penultimate": the one behind the last convolution but one, f_(L-1) of eq. (4). "first": one a resolution, behind
    the first 3x3x3 convolution that sees it, finest first (eq. (2) of Fetty et al. 2020).
    """
    seen: list[Tensor] = []
    critic.trace(volumes, critic.stages, 1.0, seen.append)
    if which == "penultimate":
        return [seen[-1].float()]
    firsts, place = [], 1  # behind the 1x1x1 convolution from the image
    for block in reversed(critic.blocks):
        firsts.append(seen[place].float())
        place += len(block)
    return firsts
