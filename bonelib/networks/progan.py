"""3D-ProGAN: the progressively grown generator (Angermann et al. 2023, section 3.2 and Table A.2)."""

import torch
from torch import Tensor, nn

from bonelib.core.random import Rng, sample_per_rank
from bonelib.networks.layers import (
    CHANNELS_LAST,
    FLAT,
    FULL,
    AddNoise,
    Conv,
    Dense,
    Growing,
    PixelNorm,
    silu,
    to_images,
)


class ProGAN(Growing):
    """Maps latents z ~ N(0, I) to volumes in (0, 1) of shape `base` x 2^stage.

    `widths` has one entry for the reshaped dense layer and one for each time the grid is doubled. Where Table A.2 lists
    128 channels for the upsampling layers u4 and u5, their inputs have 64 and 32, and upsampling keeps the number of
    channels: the table is read so.

    Not in the paper, all off by default: `base_convs` puts so many convolutions before the first upsampling, on a grid
    so coarse that they cost next to nothing and that four of them see all of the bone; `noise` adds noise inputs behind
    every other convolution, scaled per channel by weights drawn with this SD (without them, on grids that show
    trabeculae, all bones carry the same pattern); `haar` lets each stage draw the eight Haar bands of its volume on
    the grid before it; `padding` "replicate" repeats the border of a grid instead of adding zeros. (The coarsest grid
    is one voxel deep, and only zeros beyond it tell its upper from its lower half: without these and without noise all
    slices of a bone are alike, or, with `haar`, all second ones.)
    """

    def __init__(
        self,
        base=(1, 9, 7),
        widths=(128, 128, 128, 64, 32, 16),
        latent=512,
        noise=0.0,
        base_convs=0,
        haar=False,
        padding="zeros",
        flat=False,
        dtype=torch.float32,
    ):
        super().__init__()
        self.flat, kernel = flat, FLAT if flat else FULL
        self.base, self.latent, self.stages = tuple(base), latent, len(widths) - 1 + haar
        self.haar = haar
        self.dense = Dense(latent, widths[0] * base[0] * base[1] * base[2])
        how = dict(kernel=kernel, padding=padding, dtype=dtype)
        self.ground = nn.ModuleList(Conv(widths[0], widths[0], **how) for _ in range(base_convs))
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.first = nn.ModuleList(Conv(i, o, upsample=True, **how) for i, o in pairs)
        self.second = nn.ModuleList(Conv(o, o, **how) for _, o in pairs)
        self.to_image = to_images(widths, haar, kernel, padding, dtype)
        scales = [nn.Parameter(noise * torch.randn(2, o)) for _, o in pairs]
        self.noise_scale = nn.ParameterList(scales) if noise else None
        self.norm, self.add_noise = PixelNorm(), AddNoise()

    def to_styles(self, latent: Tensor, truncation: float | None = None) -> Tensor:
        """The latents, redrawn beyond +-`truncation` by folding the normal distribution's quantiles onto those of
        the truncated one (the truncation trick of section 4.1; None leaves them)."""
        return fold_normal(latent, truncation)

    def synthesize(
        self, styles: Tensor, stage: int | None = None, fade: float = 1.0, noise: Rng | None = None
    ) -> Tensor:
        """Volumes (n, 1, z, y, x) at `stage`; `fade` < 1 blends the new stage with the upsampled one before it.

        `noise` draws the noise inputs; without it they are left out.
        """
        stage = self.stages if stage is None else stage
        x = self.dense(styles).reshape(len(styles), -1, *self.base).contiguous(memory_format=CHANNELS_LAST)
        for conv in self.ground:
            x = self.norm(silu(conv(x)))
        before = x
        for s in range(stage - self.haar):
            before = x
            x = self._behind(self.first[s](x), s, 0, noise)
            x = self._behind(self.second[s](x), s, 1, noise)
        return self.image(x, before, stage, fade)

    def _behind(self, x: Tensor, stage: int, layer: int, noise: Rng | None) -> Tensor:
        if self.noise_scale is not None and noise is not None:
            field = sample_per_rank(torch.randn, len(x), 1, *x.shape[2:], rng=noise).to(x)
            x = self.add_noise(x, field, self.noise_scale[stage][layer])
        return self.norm(silu(x))

    def factorized_weight(self) -> Tensor:
        """The matrix A of eq. (11): the first linear layer, (outputs, latent)."""
        return self.dense.weight.detach()


def fold_normal(latent: Tensor, truncation: float | None) -> Tensor:
    """Draws of N(0, I) as those of the normal distribution between +-`truncation`, quantile by quantile."""
    if truncation is None:
        return latent
    normal = torch.distributions.Normal(0.0, 1.0)
    low, high = normal.cdf(torch.tensor(-truncation)), normal.cdf(torch.tensor(truncation))
    return normal.icdf(low + (high - low) * normal.cdf(latent)).clamp(-truncation, truncation)
