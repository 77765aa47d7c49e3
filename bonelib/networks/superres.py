"""Super-resolution of a generator's volumes by four or two, and a generator cascaded with it. Not in the papers."""

from collections.abc import Callable
from functools import partial
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonelib.core.pyramid import downsample, unhaar, upsample
from bonelib.core.random import RankShard, sample_per_rank
from bonelib.networks.layers import CHANNELS_LAST, AddNoise, Conv, Dense

SLOPE = 0.2  # of the leaky rectifier
NOISE = 0.25  # SD of the weights of the noise inputs at the start
NOISE_CHANNELS = 8  # beside the given volume
GAIN = 0.3  # of what draws the bands, at the start
REFINE = 8  # channels on the finest grid
NOWHERE = (0, 0, 0)  # along z, y, x
HALO = 2  # voxels of the given grid about a window or a volume, drawn too and cut off: its edges see the zeros beyond
SLAB = 2**24  # voxels that are drawn at a time, about 100 bytes each


class Residual(nn.Module):
    """x <- (x + noise + conv(activation(x, texture))) / sqrt(2), the activation scaled and shifted by the texture."""

    def __init__(self, width: int, texture: int, dtype: torch.dtype):
        super().__init__()
        self.conv, self.add_noise = Conv(width, width, dtype=dtype), AddNoise()
        self.noise_scale = nn.Parameter(NOISE * torch.randn(width))
        self.modulation = Dense(texture, 2 * width) if texture else None
        if texture:
            nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, texture: Tensor | None, noise, trim=NOWHERE) -> Tensor:
        """Without the outermost voxels along the axes of `trim`."""
        h, keep = x, 0.5**0.5  # of both terms: their sum keeps the variance
        if self.modulation is not None:
            scale, shift = self.modulation(texture).to(x.dtype)[:, :, None, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, x, 1 + scale)
        h = self.conv.convolve(F.leaky_relu(h, SLOPE), keep * self.conv.bias, keep, pad=padding(trim))
        h = self.add_noise(h, noise(h), keep * self.noise_scale)
        return torch.add(h, trimmed(x, trim), alpha=keep)


def trimmed(x: Tensor, trim: tuple[int, int, int]) -> Tensor:
    """Volumes (n, c, z, y, x) without so many voxels at both ends of each axis."""
    return x[(slice(None), slice(None), *(slice(t, n - t) for t, n in zip(trim, x.shape[2:], strict=True)))]


def padding(trim: tuple[int, int, int]) -> tuple[int, int, int]:
    """Of a convolution of 3x3x3 that leaves out the outermost voxels where `trim` is 1."""
    return tuple(1 - t for t in trim)


class SuperResolution(nn.Module):
    """Maps volumes (n, 1, z, y, x) in [0, 1], a texture code (n, texture), standardised, and noise to volumes `factor`
    times as fine, four or two.

    The given volume is kept as the mean of every block of `factor` voxels a side. `depth` residual convolutions of
    `width` channels work on the given grid, `fine_depth` of `fine_width` on one half as fine as the finest, whose eight
    Haar bands they draw; behind their inverse a small convolution sees all neighbours alike. All is local: a network
    trained on windows draws volumes of any size. `prior` draws a code for a given volume, as the training bones of such
    histograms have them.
    """

    def __init__(self, width=96, depth=4, fine_width=32, fine_depth=2, texture=5, factor=4, dtype=torch.float32):
        super().__init__()
        self.texture, self.factor, how = texture, factor, dict(dtype=dtype)
        self.halvings = factor.bit_length() - 1
        self.register_buffer("scaling", torch.tensor([0.0, 1.0, 1.0]))  # mean and SD of what is given, SD of the rest
        self.register_buffer("texture_scaling", torch.tensor([[0.0], [1.0]]).repeat(1, texture))  # mean and SD of codes
        self.prior = TexturePrior(texture)
        self.start = Conv(1 + NOISE_CHANNELS, width, **how)
        self.coarse = nn.ModuleList(Residual(width, texture, **how) for _ in range(depth))
        self.up = Conv(width, fine_width, upsample=self.halvings > 1, **how)
        self.fine = nn.ModuleList(Residual(fine_width, texture, **how) for _ in range(fine_depth))
        self.bands = Conv(fine_width, 8, gain=GAIN, **how)
        self.refine = nn.ModuleList([Conv(2, REFINE, **how), Conv(REFINE, 1, gain=GAIN, **how)])

    def forward(
        self,
        given: Tensor,
        texture: Tensor | None = None,
        noise: torch.Generator | Callable[[tuple], Tensor] | None = None,
        seen=None,
        halo=NOWHERE,
    ) -> Tensor:
        """`noise` draws the noise inputs, or gives those of a shape; without it they are left out, and the texture is
        the average one unless given. `seen` is what the layers look at in place of `given`, whose means are kept (for
        training). So many voxels of the given grid as `halo` (z, y, x) says are seen at both ends of an axis, and left
        out of what is drawn; the finer layers do not compute what nothing depends on."""
        mean, sd, added_sd = self.scaling
        draw = noise if callable(noise) else partial(torch.randn, generator=noise)
        half = self.factor // 2
        if texture is None:
            texture = given.new_zeros(len(given), self.texture)

        def field(times: int, like: Tensor, channels: int = 1) -> Tensor:
            """Noise on the given grid or a finer one, drawn for all of it: it is the same whatever is left out."""
            shape = (len(like), channels, *(times * n for n in given.shape[2:]))
            whole = like.new_zeros(shape) if noise is None else draw(shape).to(like)
            return trimmed(whole, tuple((a - b) // 2 for a, b in zip(shape[2:], like.shape[2:], strict=True)))

        x = ((given if seen is None else seen) - mean) / sd
        x = self.start(torch.cat([x, field(1, x, NOISE_CHANNELS)], 1).contiguous(memory_format=CHANNELS_LAST))
        for block in self.coarse:
            x = block(x, texture, partial(field, 1))
        x = self.up(F.leaky_relu(x, SLOPE))
        left = tuple(half * h for h in halo)

        def trim(needed: int) -> tuple[int, int, int]:
            """Whether a layer leaves out its outermost voxels, as those behind it need only so many of the halo."""
            nonlocal left
            cut = tuple(int(n > needed) for n in left)
            left = tuple(n - c for n, c in zip(left, cut, strict=True))
            return cut

        for behind, block in zip(range(len(self.fine), 0, -1), self.fine, strict=True):
            x = block(x, texture, partial(field, half), trim(behind + 1))
        x = self.bands.convolve(F.leaky_relu(x, SLOPE), self.bands.bias, pad=padding(trim(1)))
        added = unhaar(x.float())
        left = tuple(2 * n for n in left)
        first, last = self.refine
        h = torch.cat([added, field(self.factor, added)], 1).contiguous(memory_format=CHANNELS_LAST)
        h = first.convolve(h, first.bias, pad=padding(outer := trim(1)))
        h = last.convolve(F.leaky_relu(h, SLOPE), last.bias, pad=padding(inner := trim(0))).float()
        added = trimmed((trimmed(trimmed(added, outer), inner) + h) * added_sd, left)
        return self.raised(trimmed(given, halo)) + added - self.raised(self.reduced(added))

    def raised(self, x: Tensor) -> Tensor:
        """Volumes of the given grid, repeated on the one that is drawn."""
        for _ in range(self.halvings):
            x = upsample(x)
        return x

    def reduced(self, x: Tensor) -> Tensor:
        """Volumes that are drawn, averaged on the given grid."""
        return downsample(x, self.halvings)

    @property
    def reach(self) -> int:
        """Voxels of the given grid, on every side, that what is drawn in one depends on."""
        return 2 + len(self.coarse) + -(-(2 * len(self.fine) + 4) // self.factor)

    def whole(
        self, given: Tensor, texture: Tensor | None = None, noise: torch.Generator | None = None, most: int = SLAB
    ) -> Tensor:
        """Whole volumes in [0, 1], as `forward` but with mirrored surroundings, as windows have theirs in training.

        Without gradients, at most about so many voxels as `most` are drawn at a time, in slabs along z that see all
        that they depend on, with the same noise.
        """
        halo = tuple(min(HALO, n - 1) for n in given.shape[2:])
        around = F.pad(given, [h for h in reversed(halo) for _ in range(2)], mode="reflect")
        slabs = -(-given.numel() * self.factor**3 // most)
        if slabs == 1 or torch.is_grad_enabled():
            return self(around, texture, noise, halo=halo).clamp(0, 1)
        size, every, fields = given.shape[2], -(-given.shape[2] // slabs), Fields(noise, around.shape[2])
        drawn = given.new_empty(len(given), 1, *(self.factor * n for n in given.shape[2:]))
        for first in range(0, size, every):
            last = min(size, first + every)
            low = max(0, first + halo[0] - self.reach)
            high = min(around.shape[2], last + halo[0] + self.reach)
            part = noise and fields.between(low, high)
            fine = self(around[:, :, low:high], texture, part, halo=halo)
            own, start = self.factor * (last - first), self.factor * (first - low)
            drawn[:, :, self.factor * first : self.factor * last] = fine[:, :, start : start + own].clamp(0, 1)
        return drawn


class Fields:
    """The noise inputs of a volume of `depth` given slices, of which slabs take their parts."""

    def __init__(self, rng: torch.Generator | None, depth: int):
        self.rng, self.depth, self.drawn = rng, depth, []

    def between(self, low: int, high: int) -> Callable[[tuple], Tensor]:
        """What gives, in order, the fields of the given slices from `low` to `high`."""
        numbers = count()

        def take(shape: tuple) -> Tensor:
            n, channels, slices, *plane = shape
            number, times = next(numbers), slices // (high - low)
            if number == len(self.drawn):
                self.drawn.append(torch.randn(n, channels, times * self.depth, *plane, generator=self.rng))
            return self.drawn[number][:, :, times * low : times * high]

        return take


class TexturePrior(nn.Module):
    """Texture codes given a volume: normal about a linear map of the volume's histogram."""

    BINS = 12

    def __init__(self, texture: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(texture, self.BINS))
        self.register_buffer("bias", torch.zeros(texture))
        self.register_buffer("spread", torch.eye(texture))  # Cholesky factor of what is left

    @classmethod
    def histogram(cls, volumes: Tensor) -> Tensor:
        """Shares (n, BINS) of the voxels of volumes in [0, 1], in triangular bins between .2 and .75."""
        centres = torch.linspace(0.2, 0.75, cls.BINS, device=volumes.device)
        near = (1 - (volumes.flatten(1)[:, None] - centres[:, None]).abs() / (centres[1] - centres[0])).clamp(min=0)
        return near.mean(2) * cls.BINS

    def forward(self, volumes: Tensor, draw: Tensor) -> Tensor:
        """Codes (n, texture) for volumes (n, 1, z, y, x); `draw` (n, texture) is standard normal."""
        return self.histogram(volumes) @ self.weight.T + self.bias + draw @ self.spread.T

    def inverse(self, volumes: Tensor, codes: Tensor) -> Tensor:
        """The draw (n, texture) that gives these codes."""
        left = codes - self(volumes, torch.zeros_like(codes))
        return torch.linalg.solve_triangular(self.spread, left.T, upper=False).T

    def fit(self, volumes: Tensor, codes: Tensor) -> None:
        """Set the map to the ridge regression of codes (n, texture) on the histograms of volumes (n, 1, z, y, x)."""
        x = self.histogram(volumes)
        weight, mean, bias = ridge(x, codes)
        left = (codes - (x - mean) @ weight - bias).double()
        covariance = left.T @ left / max(1, len(left) - 1) + 1e-4 * torch.eye(left.shape[1], dtype=left.dtype)
        self.weight.copy_(weight.T)
        self.bias.copy_(bias - mean @ weight)
        self.spread.copy_(torch.linalg.cholesky(covariance))

    def completed(self, asked: Tensor) -> Tensor:
        """Changes of whole codes (n, texture) whose first numbers change by `asked` (n, k), the others as expected."""
        covariance, k = self.spread @ self.spread.T, asked.shape[1]
        return torch.cat([asked, asked @ torch.linalg.solve(covariance[:k, :k], covariance[:k, k:])], 1)


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (features, numbers), mean (features,) and bias (numbers,) of y ~ (x - mean) @ weight + bias."""
    mean, bias = x.mean(0), y.mean(0)
    a, b = (x - mean).double(), (y - bias).double()
    scale = a.std(0).clamp(min=1e-6)
    a = a / scale
    gram = a.T @ a + 1e-2 * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
    return (torch.linalg.solve(gram, a.T @ b) / scale[:, None]).float(), mean, bias


class Cascaded(nn.Module):
    """A generator whose volumes a `SuperResolution` draws four times as fine, and `finer` ones finer still, each what
    the one before it drew. Answers all that a generator answers.

    The texture of a bone is a part of its latent and of its styles, behind the generator's own: a draw from N(0, I)
    that the prior of the first network turns into a texture code, given the generator's volume. Where there is a style
    a layer, that of the last layer holds.
    """

    def __init__(self, generator: nn.Module, superres: SuperResolution, *finer: SuperResolution):
        super().__init__()
        self.generator, self.superres, self.finer = generator, superres, nn.ModuleList(finer)
        self.stages = generator.stages + sum(network.halvings for network in (superres, *finer))
        self.texture = superres.texture

    def sample_latent(self, n: int, rng: torch.Generator | RankShard) -> Tensor:
        """`n` latents from N(0, I)."""
        own = self.generator.sample_latent(n, rng)
        return torch.cat([own, sample_per_rank(torch.randn, n, self.texture, rng=rng).to(own)], 1)

    def to_styles(self, latent: Tensor, truncation: float | None = None) -> Tensor:
        """As the generator's own; a truncation below 1 shrinks the texture's draw as well."""
        own, texture = latent[:, : -self.texture], latent[:, -self.texture :]
        size = 1.0 if truncation is None else min(1.0, truncation)
        return torch.cat([self.generator.to_styles(own, truncation), texture * size], 1)

    def synthesize(
        self, styles: Tensor, stage: int | None = None, fade: float = 1.0, noise: torch.Generator | None = None
    ) -> Tensor:
        """Volumes (n, 1, z, y, x) in [0, 1]; the stages behind the generator's are those of super-resolution."""
        stage, reached = self.stages if stage is None else stage, self.generator.stages
        volumes = self.coarse(styles, min(stage, reached), fade, noise)
        draw = styles[:, -1] if styles.dim() == 3 else styles
        for network in (self.superres, *self.finer):
            if stage > reached:
                texture = network.prior(volumes, draw[:, -self.texture :]) if network is self.superres else None
                volumes = network.whole(volumes, texture, noise)
                reached += network.halvings
        return downsample(volumes, max(0, reached - stage))

    def coarse(self, styles: Tensor, *how, **more) -> Tensor:
        """Volumes on the generator's own grid, by its own arguments."""
        return self.generator.synthesize(styles[..., : -self.texture], *how, **more)

    def factorized_weight(self) -> Tensor:
        """The matrix A of eq. (11): the generator's, and that by which the texture's draw modulates, (rows, code)."""
        own = self.generator.factorized_weight()
        blocks = (*self.superres.coarse, *self.superres.fine)
        modulation = torch.cat([block.modulation.weight.detach() * block.modulation.scale for block in blocks])
        return torch.block_diag(own, modulation @ self.superres.prior.spread)
