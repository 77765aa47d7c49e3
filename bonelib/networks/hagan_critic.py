"""The discriminators of HA-GAN: D^H of sub-volumes and where they lie, D^L of coarse volumes (Sun et al. 2022)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonelib.core.pyramid import downsample
from bonelib.networks.hagan import grid_of
from bonelib.networks.hagan_layers import SLOPE, PlainConv, SpectralDense
from bonelib.networks.layers import CHANNELS_LAST


class HAGANCritic(nn.Module):
    """Logits of being real: by D^H for sub-volumes and their start, by D^L for coarse volumes, all in [0, 1].

    `high` are the channels of D^H behind each halving of a sub-volume, `head` those of the two layers behind; `low`
    those of D^L. Along an axis of 2 to 6 voxels a halving takes kernels of 2, so that thin sub-volumes can be halved as
    often. All layers are spectrally normed. Of `classes` both say logits as well (section IV-C).
    """

    def __init__(
        self,
        base=(4, 4, 4),
        stages=5,
        fine=(32,),
        division=8,
        high=(32, 64, 128, 256, 512),
        head=(128, 64),
        low=(64, 128, 256),
        classes=0,
        dtype=torch.float32,
    ):
        super().__init__()
        self.stages, self.doublings = stages, len(fine) + 1
        self.grid = grid_of(base, stages, fine, division)
        how = dict(spectral=True, dtype=dtype)
        shape, layers = [self.grid.depth * self.grid.scale, *(n << stages for n in base[1:])], []
        for inputs, outputs in zip((1, *high), high, strict=False):
            kernel, stride, pad = zip(*map(_halving, shape), strict=True)
            layers.append(PlainConv(inputs, outputs, kernel, stride, pad, **how))
            shape = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape, kernel, stride, pad, strict=True)]
        layers.append(PlainConv(high[-1], head[0], tuple(shape), pad=(0, 0, 0), **how))
        self.high = nn.ModuleList(layers)
        self.dense, self.out = SpectralDense(head[0] + 1, head[1]), SpectralDense(head[1], 1)
        self.class_of = SpectralDense(head[1], classes) if classes else None
        strided = dict(kernel=(4, 4, 4), stride=(2, 2, 2), **how)
        self.low = nn.ModuleList(PlainConv(i, o, **strided) for i, o in zip((1, *low), low, strict=False))
        last = tuple(n << (stages - self.doublings) >> len(low) for n in base)
        self.low.append(PlainConv(low[-1], 1 + classes, last, pad=(0, 0, 0), **how))

    def judge_high(self, x: Tensor, r: int, seen=lambda active: None) -> tuple[Tensor, Tensor | None]:
        """D^H(x, r): logits (n,) of sub-volumes of start r, and of their classes (n, classes) where there are any;
        `seen` is shown the output of every rectified layer."""
        x = _inside(x)
        for layer in self.high:
            x = F.leaky_relu(layer(x), SLOPE, inplace=True)
            seen(x)
        x = x.float().flatten(1)
        x = torch.cat([x, x.new_full((len(x), 1), self.grid.share(r))], 1)
        x = F.leaky_relu(self.dense(x), SLOPE)
        return self.out(x)[:, 0], self.class_of(x) if self.class_of else None

    def judge_low(self, x: Tensor, seen=lambda active: None) -> tuple[Tensor, Tensor | None]:
        """D^L(x): the same of volumes on the grid of A."""
        x = _inside(x)
        for layer in self.low[:-1]:
            x = F.leaky_relu(layer(x), SLOPE, inplace=True)
            seen(x)
        x = self.low[-1](x).float().flatten(2).mean(2)
        return x[:, 0], x[:, 1:] if self.class_of else None

    def forward(self, volumes: Tensor) -> Tensor:
        """The score (n,) of whole volumes: half the logit of D^L, half the mean of D^H over all sub-volumes."""
        return self.trace(volumes, self.stages, 1.0, lambda active: None)

    def trace(self, x: Tensor, stage: int, fade: float, seen) -> Tensor:
        """The forward pass, as other critics have it; `seen` is shown layers of D^H, sub-volume after sub-volume, then
        those of D^L."""
        parts = self.grid.partition()
        on_high = sum(self.judge_high(self.grid.high(x, r), r, seen)[0] for r in parts) / len(parts)
        for _ in range(self.doublings):
            x = downsample(x)
        return (on_high + self.judge_low(x, seen)[0]) / 2


def _inside(x: Tensor) -> Tensor:
    return (2 * x - 1).contiguous(memory_format=CHANNELS_LAST)


def _halving(n: int) -> tuple[int, int, int]:
    """Kernel, stride and padding of a convolution that halves an axis of n voxels; an odd one stays as it is."""
    if n % 2:
        return (3, 1, 1) if n > 1 else (1, 1, 0)
    return (4, 2, 1) if n >= 8 else (2, 2, 0)
