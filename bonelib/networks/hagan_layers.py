"""The layers of HA-GAN: plain convolutions, folded where they follow an upsampling, and spectral norms."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonelib.core.pyramid import upsample
from bonelib.networks import numerics
from bonelib.networks.layers import _fold_upsampling, convolve
from bonelib.networks.numerics import Operation

SLOPE = 0.2  # of the leaky rectifier in discriminators
FOLD_FROM = 256  # voxels of a batch, from which a folded kernel costs less to make than it spares


class PlainConv(nn.Module):
    """A 3D convolution with the weights that PyTorch starts it with, U(-1, 1)/sqrt(fan in), and no equalised rate.

    `kernel`, `stride` and `pad` are (z, y, x). `upsample` doubles the grid first (nearest; kernel 3 and padding 1
    only). `spectral` divides the weight by its largest singular value, found by one power iteration a forward pass in
    training (Miyato et al. 2018).
    """

    def __init__(
        self,
        inputs,
        outputs,
        kernel=(3, 3, 3),
        stride=(1, 1, 1),
        pad=(1, 1, 1),
        *,
        upsample=False,
        spectral=False,
        dtype=torch.float32,
    ):
        super().__init__()
        bound = 1 / math.sqrt(inputs * math.prod(kernel))
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.stride, self.pad, self.upsample, self.dtype = tuple(stride), tuple(pad), upsample, dtype
        self.norm = SpectralNorm(outputs) if spectral else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.norm is None else self.norm(self.weight)
        x, weight, bias = x.to(self.dtype), weight.to(self.dtype), self.bias.to(self.dtype)
        if self.upsample and len(x) * x[0, 0].numel() >= FOLD_FROM:
            return numerics.apply(Operation("transposed convolution", 2, (1, 1, 1)), x, _fold_upsampling(weight), bias)
        x = upsample(x) if self.upsample else x
        if self.stride == (1, 1, 1):
            return convolve(x, weight, bias, 1, self.pad)
        return numerics.apply(Operation("convolution", self.stride, self.pad), x, weight, bias)


class SpectralDense(nn.Linear):
    """A fully connected layer, started as PyTorch does, whose weight is divided by its largest singular value."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.norm = SpectralNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.norm(self.weight), self.bias)


class SpectralNorm(nn.Module):
    """A weight (outputs, ...) over its largest singular value; a forward pass in training betters the estimate."""

    def __init__(self, outputs: int):
        super().__init__()
        self.register_buffer("u", F.normalize(torch.randn(outputs), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(self.u @ matrix, dim=0)
            u = F.normalize(matrix @ v, dim=0)
            if self.training:
                self.u.copy_(u)
        return weight / (u @ matrix @ v)


class GroupNorm(nn.GroupNorm):
    """Group normalisation, in float32 whatever the type of the features; over given statistics, where there are some.

    `statistics` are those of `moments`, (mean, 1/SD), each (n, groups). A volume that is made in parts is normalised by
    those of all its parts.
    """

    def forward(self, x: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if statistics is None:
            return super().forward(x.float()).to(x.dtype)
        each = x.shape[1] // self.num_groups
        mean, inverse = (t.float().repeat_interleave(each, 1) for t in statistics)
        scale = self.weight * inverse
        shift = self.bias - mean * scale
        return torch.addcmul(_by_channel(shift), x.float(), _by_channel(scale)).to(x.dtype)

    def moments(self, parts) -> tuple[Tensor, Tensor]:
        """Statistics of a feature map that comes in parts (n, channel, z, y, x); the sums are in float64."""
        total, squares, count = 0.0, 0.0, 0
        for part in parts:
            grouped = part.double().reshape(len(part), self.num_groups, -1)
            total, squares = total + grouped.sum(2), squares + grouped.square().sum(2)
            count += grouped.shape[2]
        mean = total / count
        return mean, torch.rsqrt(squares / count - mean.square() + self.eps)


def _by_channel(values: Tensor) -> Tensor:
    return values[:, :, None, None, None]
