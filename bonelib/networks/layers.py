"""The layers that generators and critics are made of. Tensors are (batch, channel, z, y, x)."""

import math
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonelib.core.pyramid import unhaar, upsample
from bonelib.core.random import Rng, sample_per_rank
from bonelib.networks import numerics
from bonelib.networks.numerics import Operation

CHANNELS_LAST = torch.channels_last_3d
FULL, FLAT = (3, 3, 3), (1, 3, 3)  # kernels of volumes and of slices


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, pad: tuple[int, int, int]) -> Tensor:
    """`F.conv3d` by checked kernels (see `numerics`); kernels of one voxel as a product, which is much faster."""
    product = weight.shape[2:] == (1, 1, 1) and stride == 1
    operation = Operation("product") if product else Operation("convolution", stride, pad)
    return numerics.apply(operation, x, weight, bias)


def _fold_upsampling(weight: Tensor) -> Tensor:
    """The kernel (in, out, 4, 4, 4) whose stride-2 transposed convolution equals nearest upsampling by two
    followed by convolution with `weight` (out, in, 3, 3, 3): 8 instead of 27 products per voxel, and no
    upsampled tensor. An axis along which the kernel is one voxel long stays as it is."""
    folded = weight.flip(2, 3, 4).transpose(0, 1)
    for axis in (a for a in (2, 3, 4) if weight.shape[a] > 1):
        before, after = [0] * 6, [0] * 6
        before[2 * (4 - axis)] = after[2 * (4 - axis) + 1] = 1
        folded = F.pad(folded, before) + F.pad(folded, after)
    return folded


def _along(kernel: tuple[int, int, int], n: int, rest: int) -> int | tuple[int, ...]:
    """`n` along the axes that a kernel extends over, and `rest` along the others; one number where all are alike."""
    return n if all(k > 1 for k in kernel) or n == rest else tuple(n if k > 1 else rest for k in kernel)


class Conv(nn.Module):
    """A 3D convolution with equalised learning rate: weights drawn from N(0, 1), scaled by 1/sqrt(fan in) when used
    (Karras et al. 2017, section 4.1; Angermann et al. 2023, Appendix B).

    `kernel` is (z, y, x). `stride` 2 halves the grid, `upsample` doubles it first (nearest; kernel 3 only), both along
    the axes alone that the kernel extends over. `padding` is "zeros", "replicate" or "none".
    """

    def __init__(
        self,
        inputs,
        outputs,
        kernel=(3, 3, 3),
        *,
        stride=1,
        upsample=False,
        padding="zeros",
        gain=2**0.5,
        dtype=torch.float32,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = gain / math.sqrt(inputs * math.prod(kernel))
        self.pad = tuple(0 if padding == "none" else k // 2 for k in kernel)
        self.upsample, self.replicate, self.dtype = upsample, padding == "replicate", dtype
        self.stride, self.doubling, self.margin = (_along(kernel, n, rest) for n, rest in ((stride, 1), (2, 1), (1, 0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.bias)

    def convolve(self, x: Tensor, bias: Tensor | None, factor: Tensor | float | None = None, pad=None) -> Tensor:
        """The convolution with another bias, or with none; `factor` multiplies its kernels, before any rounding; `pad`
        (z, y, x) replaces its own padding."""
        weight = self.weight * self.scale if factor is None else self.weight * self.scale * factor
        weight, bias = weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        x, pad = x.to(self.dtype), self.pad if pad is None else pad
        if self.replicate and any(pad):
            x = F.pad(x, [p for p in reversed(pad) for _ in range(2)], mode="replicate")
            pad = (0, 0, 0)
        if self.upsample:  # the padded border, doubled, is cut off again
            cut = tuple(p * (3 if self.replicate else 1) for p in self.pad)
            operation = Operation("transposed convolution", self.doubling, cut)
            return numerics.apply(operation, x, _fold_upsampling(weight), bias)
        return convolve(x, weight, bias, self.stride, pad)

    def transposed(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the input, given the one with respect to the output: the adjoint map."""
        gradient, weight = gradient.to(self.dtype), (self.weight * self.scale).to(self.dtype)
        if self.stride == 1:  # again a convolution, of the mirrored kernel
            pad = tuple(k - 1 - p for k, p in zip(weight.shape[2:], self.pad, strict=True))
            return convolve(gradient, weight.transpose(0, 1).flip(2, 3, 4), None, 1, pad)
        return numerics.apply(Operation("transposed convolution", self.stride, self.pad, self.margin), gradient, weight)


def _lr_multiplier(stored: Tensor, rate: float) -> Tensor:
    """`rate` times a stored parameter, whose value then learns as if its learning rate were multiplied by it: the
    gradient is passed back as it is. Were it multiplied too (Karras et al. 2020), Adam's epsilon of Appendix B would
    not be small beside it, and clipping the gradient's norm would hardly see it."""
    return stored if rate == 1 else stored.detach() * rate + (stored - stored.detach())


class Dense(nn.Module):
    """A fully connected layer with equalised learning rate.

    `rate` multiplies its learning rate: weight and bias are stored divided by it (see `_lr_multiplier`).
    """

    def __init__(self, inputs, outputs, *, gain=1.0, bias=0.0, rate=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self.scale, self.rate = gain / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _lr_multiplier(self.weight, self.rate), _lr_multiplier(self.bias, self.rate)
        return F.linear(x * self.scale, weight, bias)  # the input is the smaller one to scale


class ModulatedConv(Conv):
    """A convolution whose kernels follow a style, sample by sample: every input channel is scaled by an affine map of
    the style (n, style), then every output channel back to a kernel of norm `gain` (weight demodulation: Karras et
    al. 2020, section 2.2; Angermann et al. 2023, section 3.2).

    Scaling the input's and the output's channels around one shared convolution is the same map, and needs no kernels
    per sample. `rate` multiplies the learning rate of the affine map.
    """

    def __init__(self, style, inputs, outputs, *, gain=2**0.5, rate=1.0, **how):
        super().__init__(inputs, outputs, **how)
        self.affine, self.gain = Dense(style, inputs, bias=1.0, rate=rate), gain

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale = self.affine(style)
        power = (self.weight * self.scale).square().sum((2, 3, 4))  # of each pair of channels; float32, as `scale`
        back = self.gain * torch.rsqrt(scale.square() @ power.T + 1e-8)
        voxels = x[0, 0].numel() * (8 if self.upsample else 1)
        # A kernel of its own for a sample is less work than two passes over its voxels, unless these are few. A GPU
        # would rather have one large convolution; so would float32 on a CPU, where torch hands the convolution of a
        # single small volume to its slow reference kernel
        alone = x.device.type == "cpu" and self.dtype in numerics.LOW and voxels > self.weight[0].numel()
        if len(x) == 1 or alone:
            kernels = (back[:, :, None] * scale[:, None])[..., None, None, None]
            return torch.cat([self.convolve(*one) for one in zip(x.split(1), repeat(self.bias), kernels)])
        y = self.convolve(x.to(self.dtype) * _by_channel(scale, self.dtype), None)
        return torch.addcmul(_by_channel(self.bias[None], y.dtype), y, _by_channel(back, y.dtype))


def _by_channel(values: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, channels) as factors of a feature map."""
    return values.to(dtype)[:, :, None, None, None]


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), in place of `x` where no gradient will ask for it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class PixelNorm(nn.Module):
    """Every voxel at unit mean square over channels (Karras et al. 2017, section 4.2); without gradients in place."""

    def forward(self, x: Tensor) -> Tensor:
        # The mean as a product with a column: torch's own mean over channels copies bfloat16 to float32 on a CPU
        last = x.movedim(1, -1)
        mean = (last * last) @ last.new_full((last.shape[-1], 1), 1 / last.shape[-1])
        times = torch.mul if torch.is_grad_enabled() else Tensor.mul_
        return times(last, torch.rsqrt(mean + 1e-8)).movedim(-1, 1)


class Growing(nn.Module):
    """What generators that grow stage by stage share; they have `latent`, `haar`, `flat` and `to_image`."""

    def sample_latent(self, n: int, rng: Rng) -> Tensor:
        """`n` latents from N(0, I), shape (n, latent)."""
        return sample_per_rank(torch.randn, n, self.latent, rng=rng)

    def image(self, x: Tensor, before: Tensor, stage: int, fade: float) -> Tensor:
        """Volumes of the features of a stage; `fade` < 1 blends them with those of the features `before` it."""
        image = self._image(x, stage)
        if fade == 1 or stage == 1:
            return image
        return fade * image + (1 - fade) * upsample(self._image(before, stage - 1), self.flat)

    def _image(self, x: Tensor, stage: int) -> Tensor:
        image = self.to_image[stage - 1](x).float()
        return torch.sigmoid(unhaar(image) if self.haar else image)


def to_images(widths, haar: bool, kernel, padding: str, dtype: torch.dtype) -> nn.ModuleList:
    """A convolution from the features of each stage to its volume, or to its eight Haar bands."""
    how = dict(gain=1.0, padding=padding, dtype=dtype)
    return nn.ModuleList(Conv(o, 8 if haar else 1, kernel, **how) for o in widths[0 if haar else 1 :])


class AddNoise(nn.Module):
    """Adds a field (n, 1, z, y, x) to every channel, times that channel's weight (channels,) or one weight for all; in
    place without gradients."""

    def forward(self, x: Tensor, field: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(x.dtype).expand(x.shape[1])
        if torch.is_grad_enabled():
            return torch.addcmul(x, field, weight.reshape(1, -1, 1, 1, 1))
        # A product too: to stretch a field over few channels is slow on a CPU
        last = x.movedim(1, -1)
        return (
            last.reshape(-1, x.shape[1]).addmm_(field.reshape(-1, 1), weight[None]).reshape(last.shape).movedim(-1, 1)
        )
