"""HA-GAN: a generator and encoder that learn large volumes from sub-volumes (Sun et al. 2022, section III).

Own code after the paper. Volumes are in [0, 1] outside of the networks and in [-1, 1] inside.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonelib.core.pyramid import downsample
from bonelib.core.random import Rng, sample_per_rank
from bonelib.networks.hagan_layers import GroupNorm, PlainConv
from bonelib.networks.layers import CHANNELS_LAST
from bonelib.networks.progan import fold_normal

GROUPS = 8  # of the group norms, or as many as there are channels
HALO = 1  # cells of A on each side of a sub-volume, which all that G^H draws of it depends on
PARTS = 8  # a large volume is drawn in so many slabs, or one a cell of A
WHOLE = 2**22  # voxels, from which a volume is drawn in slabs


class Grid:
    """Where sub-volumes lie: counted in cells of A along z, each as deep as `scale` slices of the volume.

    Of `cells` cells a sub-volume has `depth`, so that S^L and S^H cut the same part at any start r, and r is one of
    `starts` numbers. (The published code counts r in slices and rounds it for A: they then differ by up to 3 slices.)
    """

    def __init__(self, cells: int, depth: int, scale: int):
        self.cells, self.depth, self.scale, self.starts = cells, depth, scale, cells - depth + 1

    def share(self, r: int) -> float:
        """Where a start lies, from 0 to 1: what D^H is told of it."""
        return r / max(1, self.starts - 1)

    def partition(self) -> list[int]:
        """The starts T_v of adjoining sub-volumes that cover all; the last one overlaps where it must."""
        return [min(r, self.starts - 1) for r in range(0, self.cells, self.depth)]

    def low(self, a: Tensor, r: int) -> Tensor:
        """S^L: the cells of A (n, channel, z, y, x) from r on."""
        return a[:, :, r : r + self.depth]

    def high(self, x: Tensor, r: int) -> Tensor:
        """S^H: the slices of a volume (n, 1, z, y, x) that belong to the cells from r on."""
        return x[:, :, r * self.scale : (r + self.depth) * self.scale]


class HAGAN(nn.Module):
    """Maps latents z ~ N(0, I) to volumes (n, 1, z, y, x) in (0, 1) of shape `base` x 2^`stages`.

    G^A makes features A on a grid coarser by 2^(1 + len(fine)); G^L draws a whole volume there; G^H draws any part of
    the fine one from the part of A below it. `widths` are the channels of G^A: of the dense layer and the convolution
    behind it, then of one convolution each; the first ones double the grid, until it is that of A. `fine` are the
    channels of G^H between A and the volume; `low` those of G^L. `division` says what part of the volume's slices a
    sub-volume has, `halo` whether its borders are drawn from one more cell of A on each side; without, as published,
    zeros stand beyond them in training and not later, when the whole volume is drawn. With `classes`, the conditional
    variant of section IV-C, a latent ends in that many numbers of which one is 1.

    Stages as other generators have them: the last is the fine volume, that of A's grid what G^L draws, and others are
    block means. There are no noise inputs.
    """

    def __init__(
        self,
        base=(4, 4, 4),
        widths=(512, 512, 256, 128, 64),
        stages=5,
        fine=(32,),
        low=(32, 16),
        latent=1024,
        division=8,
        halo=True,
        classes=0,
        dtype=torch.float32,
    ):
        super().__init__()
        self.base, self.stages, self.latent, self.halo, self.classes = tuple(base), stages, latent, halo, classes
        self.low_stage = stages - len(fine) - 1
        self.grid = grid_of(base, stages, fine, division)
        how = dict(dtype=dtype)
        self.dense = nn.Linear(latent + classes, widths[0] * base[0] * base[1] * base[2])
        doubles = [False, *(i < self.low_stage for i in range(len(widths) - 1))]
        self.common = nn.ModuleList(
            Block(i, o, upsample=up, **how) for i, o, up in zip((widths[0], *widths), widths, doubles, strict=False)
        )
        self.low_blocks = nn.ModuleList(Block(i, o, **how) for i, o in zip((widths[-1], *low), low, strict=False))
        self.low_image = PlainConv(low[-1], 1, **how)
        self.fine_blocks = nn.ModuleList(
            Block(i, o, upsample=True, **how) for i, o in zip((widths[-1], *fine), fine, strict=False)
        )
        self.fine_image = PlainConv((widths[-1], *fine)[-1], 1, upsample=True, **how)

    def sample_latent(self, n: int, rng: Rng) -> Tensor:
        """`n` latents from N(0, I), (n, latent), and behind each its class, all equally often, where there are any."""
        latent = sample_per_rank(torch.randn, n, self.latent, rng=rng)
        if not self.classes:
            return latent
        return self.of_class(latent, (self.classes * sample_per_rank(torch.rand, n, 1, rng=rng)[:, 0]).long())

    def of_class(self, latent: Tensor, labels: Tensor | None) -> Tensor:
        """Latents (n, ...) as those of classes `labels` (n,), in place of their own; without classes as they are."""
        if not self.classes:
            return latent
        return torch.cat([latent[:, : self.latent], F.one_hot(labels, self.classes).to(latent)], 1)

    def to_styles(self, latent: Tensor, truncation: float | None = None) -> Tensor:
        """The latents, folded into +-`truncation` as those of a ProGAN (None leaves them)."""
        return torch.cat([fold_normal(latent[:, : self.latent], truncation), latent[:, self.latent :]], 1)

    def features(self, styles: Tensor) -> Tensor:
        """A = G^A(z), (n, channel, z, y, x)."""
        x = self.dense(styles).reshape(len(styles), -1, *self.base).contiguous(memory_format=CHANNELS_LAST)
        for block in self.common:
            x = block(x)
        return x

    def draw_low(self, a: Tensor) -> Tensor:
        """G^L: volumes on the grid of A."""
        for block in self.low_blocks:
            a = block(a)
        return _image(self.low_image(a))

    def draw_high(self, a: Tensor) -> Tensor:
        """G^H: volumes finer than the features `a` by `grid.scale`, with zeros beyond their borders."""
        for block in self.fine_blocks:
            a = block(a)
        return _image(self.fine_image(a))

    def draw_part(self, a: Tensor, r: int) -> Tensor:
        """Eq. (3): the sub-volume of start r, with its halo drawn and cut off."""
        if not self.halo:
            return self.draw_high(self.grid.low(a, r))
        return self._cut(self.draw_high(self._with_halo(a, r, self.grid.depth)), r, self.grid.depth, self.grid.scale)

    def _with_halo(self, a: Tensor, r: int, depth: int) -> Tensor:
        return a[:, :, max(0, r - HALO) : r + depth + HALO]

    def _cut(self, x: Tensor, r: int, depth: int, scale: int) -> Tensor:
        """What was made of `_with_halo`, on a grid finer by `scale`, without the halo."""
        begin = min(r, HALO) * scale
        return x[:, :, begin : begin + depth * scale]

    def draw_in_slabs(self, a: Tensor, parts: int = PARTS) -> Tensor:
        """`draw_high` in slabs along z, for all but the feature maps of a slab at once: equal up to rounding.

        Each group norm of G^H needs one pass over all slabs for its statistics, the image another one.
        """
        depth = max(1, self.grid.cells // parts)
        slabs = [(r, min(depth, self.grid.cells - r)) for r in range(0, self.grid.cells, depth)]
        known: list[tuple[Tensor, Tensor]] = []

        def run(r: int, count: int, convolved: int) -> Tensor:
            x = self._with_halo(a, r, count)
            for block, statistics in zip(self.fine_blocks, known, strict=False):
                x = F.relu(block.norm(block.conv(x), statistics), inplace=not torch.is_grad_enabled())
            last = (*(block.conv for block in self.fine_blocks), self.fine_image)[convolved]
            return self._cut(last(x), r, count, 2 ** (convolved + 1))

        for i, block in enumerate(self.fine_blocks):
            known.append(block.norm.moments(run(r, count, i) for r, count in slabs))
        return torch.cat([_image(run(r, count, len(known))) for r, count in slabs], 2)

    def synthesize(
        self, styles: Tensor, stage: int | None = None, fade: float = 1.0, noise: Rng | None = None
    ) -> Tensor:
        """Volumes (n, 1, z, y, x) at `stage`; `fade` and `noise` change nothing here.

        Without gradients, large ones are drawn in slabs.
        """
        stage, a = self.stages if stage is None else stage, self.features(styles)
        if stage <= self.low_stage:
            x, made = self.draw_low(a), self.low_stage
        else:
            large = a[0, 0].numel() * self.grid.scale**3 >= WHOLE and not torch.is_grad_enabled()
            x, made = self.draw_in_slabs(a) if large else self.draw_high(a), self.stages
        for _ in range(made - stage):
            x = downsample(x)
        return x

    def factorized_weight(self) -> Tensor:
        """The matrix A of eq. (11) of Angermann et al.: the first linear layer, (outputs, latent)."""
        return self.dense.weight.detach()


class Block(nn.Module):
    """A convolution, a group norm and a rectifier."""

    def __init__(self, inputs: int, outputs: int, kernel=(3, 3, 3), stride=(1, 1, 1), **how):
        super().__init__()
        self.conv = PlainConv(inputs, outputs, kernel, stride, **how)
        self.norm = GroupNorm(min(GROUPS, outputs), outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)


class HAGANEncoder(nn.Module):
    """E^H, which maps sub-volumes to `features` channels like those of A, and E^G, which maps these to codes (n,
    latent). `widths` are the channels of E^G behind each halving. E^H is G^H reversed: a strided convolution each time
    the grid is halved, and one more between them."""

    def __init__(
        self,
        base=(4, 4, 4),
        stages=5,
        features=64,
        fine=(32,),
        widths=(64, 128, 256),
        latent=1024,
        division=8,
        dtype=torch.float32,
    ):
        super().__init__()
        self.grid = grid_of(base, stages, fine, division)
        strided = dict(kernel=(4, 4, 4), stride=(2, 2, 2), dtype=dtype)
        first, *others = (*reversed(fine), features)
        high = [Block(1, first, **strided)]
        for inputs, output in zip((first, *others), others, strict=False):
            high += [Block(inputs, inputs, dtype=dtype), Block(inputs, output, **strided)]
        self.high = nn.Sequential(*high)
        pairs = zip((features, *widths), widths, strict=False)
        self.ground = nn.Sequential(*(Block(i, o, **strided) for i, o in pairs))
        self.code = PlainConv(widths[-1], latent, tuple(base), pad=(0, 0, 0), dtype=dtype)

    @property
    def place(self) -> torch.device:
        """Where the volumes must be."""
        return self.code.weight.device

    def forward(self, volumes: Tensor) -> Tensor:
        """The codes (n, latent) of volumes (n, 1, z, y, x) in [0, 1]."""
        return self.encode(self.features(volumes))

    def part(self, x: Tensor) -> Tensor:
        """E^H: the features of sub-volumes (n, 1, z, y, x) in [0, 1]."""
        return self.high((2 * x - 1).contiguous(memory_format=CHANNELS_LAST))

    def features(self, volumes: Tensor) -> Tensor:
        """The features of whole volumes, one sub-volume at a time."""
        parts, done = [], 0
        for r in self.grid.partition():
            parts.append(self.part(self.grid.high(volumes, r))[:, :, done - r :])
            done = r + self.grid.depth
        return torch.cat(parts, 2)

    def encode(self, features: Tensor) -> Tensor:
        """E^G: the codes of features of whole volumes."""
        return self.code(self.ground(features)).float().flatten(1)


def grid_of(base, stages: int, fine, division: int) -> Grid:
    """The `Grid` of a network's settings."""
    cells = base[0] << (stages - len(fine) - 1)
    return Grid(cells, max(1, cells // division), 2 << len(fine))


def _image(x: Tensor) -> Tensor:
    """What a last convolution gives, through tanh, in (0, 1)."""
    return torch.tanh(x.float()).mul(0.5).add(0.5)
