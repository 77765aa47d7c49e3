"""The 3D residual network that grades motion (Angermann et al. 2023, section 3.3; blocks of He et al. 2016)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonelib.networks import numerics
from bonelib.networks.layers import CHANNELS_LAST
from bonelib.networks.numerics import Operation

GROUP = 8  # channels that are normalised together; no batch statistics, so that a batch of one works


class PlainConv(nn.Conv3d):
    """A 3D convolution in the precision `dtype`, without bias, as a normalisation follows."""

    def __init__(self, inputs: int, outputs: int, kernel, stride=1, dtype: torch.dtype = torch.float32):
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(inputs, outputs, kernel, stride, tuple(k // 2 for k in kernel), bias=False)
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        self.precision = dtype

    def forward(self, x: Tensor) -> Tensor:
        operation = Operation("convolution", self.stride, self.padding)
        return numerics.apply(operation, x.to(self.precision), self.weight.to(self.precision))


class Norm(nn.GroupNorm):
    """Normalises groups of channels over the volume of one sample, in the precision of its input."""

    def __init__(self, channels: int):
        super().__init__(max(1, channels // GROUP), channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Block(nn.Module):
    """Two 3x3x3 convolutions beside a shortcut, which is a 1x1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride, dtype: torch.dtype):
        super().__init__()
        self.convs = nn.ModuleList(
            [PlainConv(inputs, outputs, 3, stride, dtype), PlainConv(outputs, outputs, 3, 1, dtype)]
        )
        self.norms = nn.ModuleList([Norm(outputs), Norm(outputs)])
        nn.init.zeros_(self.norms[1].weight)  # every block starts as its shortcut
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else PlainConv(inputs, outputs, 1, stride, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.convs[0](x)))
        x = x if self.shortcut is None else self.shortcut(x)
        return F.relu(x + self.norms[1](self.convs[1](y)))


class ResNet(nn.Module):
    """Motion grade of volumes (n, 1, z, y, x) in [0, 1] of any size.

    `windows` are grey windows (centre, half width) in the unit of the input: streaks are faint in soft tissue and bone
    is bright. Each enters twice, as it is and freed of its local mean in plane. (64, 128, 256, 512) `widths` and (2, 2,
    2, 2) `blocks` are a ResNet-18 in 3D. The first convolution halves the grid in plane only, where motion acts.
    `forward` gives the logits (n, 4) of the grade being above 1, 2, 3 and 4, `features` the vectors (n, d) before them.
    """

    def __init__(
        self,
        widths=(16, 32, 64),
        blocks=(1, 1, 1),
        windows=((0.4, 0.3), (0.256, 0.05)),
        grades: int = 5,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.register_buffer("windows", torch.tensor(windows, dtype=torch.float32))
        self.stem = PlainConv(2 * len(windows), widths[0], (3, 5, 5), (1, 2, 2), dtype)
        self.norm = Norm(widths[0])
        stages, before = [], widths[0]
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for j in range(count):
                stages.append(Block(before, width, 2 if j == 0 and i > 0 else 1, dtype))
                before = width
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(2 * before, grades - 1)
        self.dtype = dtype

    def features(self, x: Tensor) -> Tensor:
        """Vectors (n, 2 widths[-1])."""
        seen = torch.cat([torch.tanh((x - centre) / width) for centre, width in self.windows], 1)
        seen = torch.cat([seen, 2 * (seen - F.avg_pool3d(seen, (1, 5, 5), 1, (0, 2, 2), count_include_pad=False))], 1)
        y = seen.to(self.dtype).contiguous(memory_format=CHANNELS_LAST)
        y = self.blocks(F.relu(self.norm(self.stem(y)))).float()
        return torch.cat([y.mean((2, 3, 4)), y.amax((2, 3, 4))], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
