"""The critic that grows with either generator (Angermann et al. 2023, section 3.2)."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonelib.core.pyramid import downsample, haar, unhaar, upsample
from bonelib.networks.layers import CHANNELS_LAST, FLAT, FULL, Conv, Dense

SLOPE = 0.2  # of the leaky rectifier


def _leaky_relu_backward(gradient: Tensor, active: Tensor) -> Tensor:
    """The gradient before a leaky rectifier, given the one behind it and the rectifier's output `active`."""
    return torch.ops.aten.leaky_relu_backward(gradient.to(active.dtype), active, SLOPE, True)


class Critic(nn.Module):
    """Scores volumes (n, 1, z, y, x) of shape base x 2^stage by the mean of its patch outputs, (n,).

    `widths` runs from the coarsest grid to the finest, as in the generator. A 1x1x1 convolution links the image at a
    stage to features; stride-2 convolutions lead to the coarsest grid, then a 3x3x3 convolution to one channel.

    Not in the paper, all off by default: `convs` 2 puts a stride-1 convolution before each of stride 2; `whole`,
    the coarsest grid, makes the last layer see all of it at once instead of patches; `head` puts fully connected layers
    of these widths before the score; `haar` and `flat` look at what a generator draws that has them; `statistics`
    (stages, 2, bands), the mean and SD of every band at every stage, standardise the input; `condition` numbers (n,
    condition) that a volume should agree with shift the output of every convolution but the last.
    """

    def __init__(
        self,
        widths=(128, 128, 128, 64, 32, 16),
        convs=1,
        whole=None,
        head=(),
        haar=False,
        statistics=None,
        condition=0,
        flat=False,
        dtype=torch.float32,
    ):
        super().__init__()
        self.flat, full = flat, FLAT if flat else FULL
        self.stages, self.haar = len(widths) - 1 + haar, haar
        bands = 8 if haar else 1
        if statistics is None:
            statistics = torch.tensor([0.0, 1.0])[None, :, None].expand(self.stages, 2, bands)
        self.register_buffer("statistics", statistics.clone())
        self.from_image = nn.ModuleList(Conv(bands, w, (1, 1, 1), dtype=dtype) for w in widths[0 if haar else 1 :])
        self.blocks = nn.ModuleList()
        for coarse, fine in zip(widths[:-1], widths[1:], strict=True):
            block = [Conv(fine, fine, full, dtype=dtype) for _ in range(convs - 1)]
            self.blocks.append(nn.ModuleList([*block, Conv(fine, coarse, full, stride=2, dtype=dtype)]))
        sizes, kernel, hidden = (widths[0], *head, 1), full if whole is None else tuple(whole), []
        for i, (inputs, outputs) in enumerate(pairwise(sizes)):
            gain, padding = 2**0.5 if i < len(head) else 1.0, "zeros" if whole is None else "none"
            hidden.append(Conv(inputs, outputs, (1, 1, 1) if i else kernel, gain=gain, padding=padding, dtype=dtype))
        *hidden, self.out = hidden
        self.head = nn.ModuleList(hidden)
        layers = [*self.from_image, *(conv for block in self.blocks for conv in block), *self.head]
        self.shifts = nn.ModuleList(Dense(condition, conv.weight.shape[0]) for conv in layers) if condition else None
        self.shift_of = {conv: i for i, conv in enumerate(layers)}

    def forward(
        self, x: Tensor, stage: int | None = None, fade: float = 1.0, condition: Tensor | None = None
    ) -> Tensor:
        return self.patches(x, stage, fade, condition).mean(dim=1)

    def patches(
        self, x: Tensor, stage: int | None = None, fade: float = 1.0, condition: Tensor | None = None
    ) -> Tensor:
        """The score of every patch, (n, patches)."""
        return self.trace(x, self.stages if stage is None else stage, fade, lambda active: None, condition)

    def trace(self, x: Tensor, stage: int, fade: float, seen, condition: Tensor | None = None) -> Tensor:
        """The forward pass; `seen` is shown the output of every rectifier, in order."""

        def layer(conv, x):
            x = conv(x)
            if condition is not None and condition.shape[1]:
                x = x + self.shifts[self.shift_of[conv]](condition).to(x.dtype)[:, :, None, None, None]
            x = F.leaky_relu(x, SLOPE, inplace=True)
            seen(x)
            return x

        h = layer(self.from_image[stage - 1], self._to_network_grid(x, stage))
        doublings = stage - self.haar
        for s in range(doublings, 0, -1):
            for conv in self.blocks[s - 1]:
                h = layer(conv, h)
            if s == doublings and stage > 1 and fade < 1:
                old = layer(self.from_image[stage - 2], self._to_network_grid(downsample(x), stage - 1))
                h = fade * h + (1 - fade) * old.to(h.dtype)
        for conv in self.head:
            h = layer(conv, h)
        return self.out(h).float().flatten(1)

    def _to_network_grid(self, x: Tensor, stage: int) -> Tensor:
        """The critic's view of a volume: its bands, standardised."""
        mean, sd = self.statistics[stage - 1].reshape(2, -1, 1, 1, 1)
        return (((haar(x) if self.haar else x) - mean) / sd).contiguous(memory_format=CHANNELS_LAST)

    def _from_network_grid(self, gradient: Tensor, stage: int) -> Tensor:
        """The adjoint of `_to_network_grid`."""
        gradient = gradient.float() / self.statistics[stage - 1, 1].reshape(-1, 1, 1, 1)
        return unhaar(gradient) if self.haar else gradient

    def input_gradient(
        self, x: Tensor, stage: int | None = None, fade: float = 1.0, condition: Tensor | None = None
    ) -> Tensor:
        """The gradient of the score with respect to `x`, as a function of the weights: of a critic of leaky
        rectifiers a chain of transposed convolutions with fixed masks. The penalty of eq. (1) needs no double
        backward pass then."""
        stage = self.stages if stage is None else stage
        masks = []
        with torch.no_grad():
            self.trace(x, stage, fade, masks.append, condition)
        doublings = stage - self.haar
        old_mask = masks.pop(1 + len(self.blocks[doublings - 1])) if stage > 1 and fade < 1 else None

        def back(conv, gradient):
            mask = masks.pop()
            return conv.transposed(_leaky_relu_backward(gradient, mask))

        first, halved = (*self.head, self.out)[0], (0 if self.flat else stage, stage, stage)
        sizes = zip(x.shape[2:], halved, first.weight.shape[2:], first.pad, strict=True)
        patches = [(n >> times) - k + 1 + 2 * pad for n, times, k, pad in sizes]
        gradient = self.out.transposed(x.new_full((len(x), 1, *patches), 1 / math.prod(patches)))
        for conv in reversed(self.head):
            gradient = back(conv, gradient)
        skip = 0.0
        for s in range(1, doublings + 1):
            if s == doublings and old_mask is not None:
                old = _leaky_relu_backward(gradient, old_mask) * (1 - fade)
                skip = self._from_network_grid(self.from_image[stage - 2].transposed(old), stage - 1)
                skip = upsample(skip, self.flat) / (4 if self.flat else 8)
                gradient = gradient * fade
            for conv in reversed(self.blocks[s - 1]):
                gradient = back(conv, gradient)
        return self._from_network_grid(back(self.from_image[stage - 1], gradient), stage) + skip
