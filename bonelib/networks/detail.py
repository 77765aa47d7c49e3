"""Detail: a local network that draws a volume twice as fine over a given one, and a generator refined by it.

Laplacian pyramids of adversarial networks: Denton et al. 2015. Not in the papers.
"""

import torch
from torch import Tensor, nn

from bonelib.core.pyramid import downsample, upsample
from bonelib.networks.layers import CHANNELS_LAST, AddNoise, Conv, PixelNorm, silu

NOISE = 0.25  # SD of the weights of the noise inputs at the start
FINER = 3  # convolutions on the finer grid, the first of which leads to it


class Detail(nn.Module):
    """Maps volumes (n, 1, z, y, x) in [0, 1] and noise to volumes twice as fine.

    The given volume is kept as the mean of every block of 2x2x2 voxels, so that no density is made or lost. What is
    added is drawn by `convs` 3x3x3 convolutions of `width` channels on the given grid, then by `FINER` of half as many
    on the finer one, where strands of one or two voxels are joined; a noise input stands behind each. All is local: a
    network trained on windows draws volumes of any size. `statistics` (2, 8) are mean and SD of the Haar bands.
    """

    def __init__(self, width: int = 32, convs: int = 2, statistics=None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.register_buffer("statistics", torch.tensor([[0.0] * 8, [1.0] * 8]) if statistics is None else statistics)
        how, half = dict(padding="replicate", dtype=dtype), width // 2
        layers = [Conv(1, width, **how), *(Conv(width, width, **how) for _ in range(convs))]
        layers += [Conv(width, half, upsample=True, **how), *(Conv(half, half, **how) for _ in range(FINER - 1))]
        self.layers, self.out = nn.ModuleList(layers), Conv(half, 1, gain=1.0, **how)
        widths = [conv.weight.shape[0] for conv in layers]
        self.noise_scale = nn.ParameterList(nn.Parameter(NOISE * torch.randn(w)) for w in widths)
        self.norm, self.add_noise = PixelNorm(), AddNoise()

    @property
    def reach(self) -> int:
        """Voxels of the given grid over which an edge of the volume is felt."""
        return len(self.layers) - FINER + 1 + (FINER + 1) // 2

    def forward(self, coarse: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """`noise` draws the noise inputs; without it they are left out."""
        mean, sd = self.statistics / 8**0.5  # of the mean band as of the volume itself
        x = ((coarse - mean[0]) / sd[0]).contiguous(memory_format=CHANNELS_LAST)
        for conv, scale in zip(self.layers, self.noise_scale, strict=True):
            x = conv(x)
            if noise is not None:
                field = torch.randn(len(x), 1, *x.shape[2:], generator=noise).to(x)
                x = self.add_noise(x, field, scale)
            x = self.norm(silu(x))
        added = self.out(x).float() * sd[1:].square().sum().sqrt()
        return upsample(coarse) + added - upsample(downsample(added))


class Refined(nn.Module):
    """A generator whose volumes are refined by a chain of `Detail`, coarsest first. Answers all a generator answers."""

    def __init__(self, generator: nn.Module, details: list[Detail]):
        super().__init__()
        self.generator, self.details = generator, nn.ModuleList(details)
        self.stages = generator.stages + len(self.details)
        self.sample_latent, self.to_styles = generator.sample_latent, generator.to_styles
        self.factorized_weight = generator.factorized_weight

    def synthesize(
        self, styles: Tensor, stage: int | None = None, fade: float = 1.0, noise: torch.Generator | None = None
    ) -> Tensor:
        """Volumes (n, 1, z, y, x) in [0, 1]; the stages beyond the generator's own are those of the details."""
        own = self.generator.stages
        stage = self.stages if stage is None else stage
        volumes = self.generator.synthesize(styles, min(stage, own), fade, noise)
        for detail in self.details[: max(0, stage - own)]:
            # Finer is made of what can be shown, as when the details were trained
            volumes = detail(volumes, noise).clamp(0, 1)
        return volumes
