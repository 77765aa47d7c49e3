"""3D-StyleGAN: the style-based generator (Angermann et al. 2023, section 3.2 and Table A.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonelib import InputError
from bonelib.core.random import Rng, sample_per_rank, torch_rng
from bonelib.networks.layers import CHANNELS_LAST, FLAT, FULL, AddNoise, Dense, Growing, ModulatedConv, to_images

MAPPING = 6  # dense layers from z to w: m1 ... m5 and w
PER_STAGE = 3  # styles, one for each convolution: c_1 before the upsampling, c_3 and c_5 behind it
SLOPE = 0.2  # of the leaky rectifier
GAIN = 2**0.5  # of a layer, since its rectifier halves the power
MEAN_OF = 1024  # latents whose styles are averaged for the truncation trick


class StyleGAN(Growing):
    """Maps latents z ~ N(0, I) to styles w, and these to volumes in (0, 1) of shape `base` x 2^stage. Every convolution
    but those to the image follows a style: `layers` in all, three each time the grid is doubled.

    `widths` has one entry for the learned constant and one for each doubling; by default there are the fifteen layers
    that are published. How Table A.3 is read, where it contradicts the text or itself:

    - Its layer w has 128 channels, but W lies in R^512 in sections 3.2 and 3.5 and the encoder ends there: `style` is
      512 unless given.
    - c53 and c55 have 128 channels, but the noise behind them, the style s15 and the text's "channel size c at the
      last stage" 16: every stage has its own width, and its first convolution, still on the coarser grid, makes the
      change (c51, from 32 to 16).
    - The constant cc, "where the scale is a learned parameter", is a learned tensor, as in StyleGAN: a fixed field
      with one learned factor would tell the first convolution nothing of where in the volume it is.
    - The convolution `out` has no style, nor the fifteen one for it: it is not modulated.

    `noise` is where the scales of the noise inputs start, one a layer; the paper does not say where, StyleGAN begins
    at 0. `mapping_rate` multiplies the learning rate of the mapping network (0.02 in Appendix B).

    Not in the paper, all off by default: `affine_rate` multiplies the learning rate of the styles' affine maps (at the
    full rate a short training first learns to leave the styles out, and draws one bone); `base_convs`, which follow the
    first layer's style, `haar` and `padding` are those of a `ProGAN`; `flat` draws slices, (n, 1, 1, y, x): kernels are
    1x3x3, and grids are doubled in plane alone.
    """

    def __init__(
        self,
        base=(1, 9, 7),
        widths=(128, 128, 128, 64, 32, 16),
        latent=512,
        style=512,
        mapping_rate=0.02,
        affine_rate=1.0,
        noise=0.0,
        base_convs=0,
        haar=False,
        padding="zeros",
        flat=False,
        dtype=torch.float32,
    ):
        super().__init__()
        self.flat, kernel = flat, FLAT if flat else FULL
        self.latent, self.stages, self.haar = latent, len(widths) - 1 + haar, haar
        self.layers = PER_STAGE * (len(widths) - 1)
        outputs = [latent] * (MAPPING - 1) + [style]
        self.mapping = nn.ModuleList(Dense(latent, o, gain=GAIN, rate=mapping_rate) for o in outputs)
        self.constant = nn.Parameter(torch.randn(widths[0], *base))
        how = dict(gain=GAIN, rate=affine_rate, kernel=kernel, padding=padding, dtype=dtype)
        self.ground = nn.ModuleList(ModulatedConv(style, widths[0], widths[0], **how) for _ in range(base_convs))
        self.convs = nn.ModuleList(
            ModulatedConv(style, inputs, o, upsample=doubles, **how)
            for i, o in zip(widths[:-1], widths[1:], strict=True)
            for inputs, doubles in ((i, False), (o, True), (o, False))
        )
        self.noise_scale = nn.ParameterList(torch.tensor(float(noise)) for _ in self.convs)
        self.add_noise = AddNoise()
        self.to_image = to_images(widths, haar, kernel, padding, dtype)
        self.register_buffer("mean_style", torch.zeros(style))
        self.centre()

    def to_styles(self, latent: Tensor, truncation: float | None = None) -> Tensor:
        """The styles w (n, style) of latents (n, latent); `truncation` is psi of section 4.1, published 0.8: it draws
        w towards the mean style, w_mean + psi (w - w_mean), from 1 (as it is; so is None) to 0 (all are the mean)."""
        if truncation is not None and not 0 <= truncation <= 1:
            raise InputError(f"truncation {truncation}: that of a StyleGAN is a share of the style, from 0 to 1")
        for dense in self.mapping:
            latent = F.leaky_relu(dense(latent), SLOPE)
        if truncation is None:
            return latent
        if self.training:
            self.centre()
        return torch.lerp(self.mean_style, latent, truncation)

    def synthesize(
        self, styles: Tensor, stage: int | None = None, fade: float = 1.0, noise: Rng | None = None
    ) -> Tensor:
        """Volumes (n, 1, z, y, x) at `stage`; `fade` < 1 blends the new stage with the upsampled one before it.

        `styles` is (n, style), one for all layers, or (n, layers, style), one for each, from coarse to fine, of which
        a stage before the last uses the first ones. `noise` draws the noise inputs; without it they are left out.
        """
        stage = self.stages if stage is None else stage
        if styles.dim() == 2:
            styles = styles[:, None].expand(-1, self.layers, -1)
        x = self.constant.expand(len(styles), *self.constant.shape).contiguous(memory_format=CHANNELS_LAST)
        for conv in self.ground:
            x = F.leaky_relu(conv(x, styles[:, 0]), SLOPE, inplace=True)
        before = x
        for layer in range(PER_STAGE * (stage - self.haar)):
            if layer % PER_STAGE == 0:
                before = x
            x = self.convs[layer](x, styles[:, layer])
            if noise is not None:
                field = sample_per_rank(torch.randn, len(x), 1, *x.shape[2:], rng=noise).to(x)
                x = self.add_noise(x, field, self.noise_scale[layer])
            x = F.leaky_relu(x, SLOPE, inplace=True)
        return self.image(x, before, stage, fade)

    def factorized_weight(self) -> Tensor:
        """The matrix A of eq. (11): the affine maps of all layers, one below the other, (channels, style)."""
        return torch.cat([conv.affine.weight.detach() * conv.affine.rate for conv in (*self.ground, *self.convs)])

    @torch.no_grad()
    def centre(self) -> None:
        """Set `mean_style` to the mean style of a fixed batch of latents.

        Called for when weights are saved or the module is set to evaluation, so that the mean belongs to them (also
        to those of a running average, which has never seen a latent); while it trains, at every truncation.
        """
        latent = self.sample_latent(MEAN_OF, torch_rng(0, "mean style")).to(self.mean_style)
        self.mean_style.copy_(self.to_styles(latent).mean(0))

    def state_dict(self, *args, **kwargs):
        self.centre()
        return super().state_dict(*args, **kwargs)

    def train(self, mode: bool = True):
        if not mode:
            self.centre()
        return super().train(mode)
