"""A differentiable reading of the texture code, by which super-resolution is held to the code that it is given."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bonelib.core.pyramid import upsample
from bonelib.networks.superres import ridge

THRESHOLDS = (0.33, 0.41, 0.49)  # intensities, of 160 to 480 mg HA/cm3 in the map of 01
SOFTNESS = 0.03
TRABECULAR = (0.27, 0.42)  # of the given volume's surroundings, between which bone is taken for trabecular
SURROUNDINGS = (1, 3, 3)  # voxels of the given volume
LAGS = ((0, 0, 1), (0, 1, 0), (0, 0, 2), (0, 2, 0), (1, 0, 0), (2, 0, 0))


class TextureReader(NamedTuple):
    """A linear map from `features` to standardised texture codes, fitted to training scans."""

    mean: Tensor  # (features,)
    weight: Tensor  # (features, numbers)
    bias: Tensor  # (numbers,)

    def __call__(self, fine: Tensor, given: Tensor) -> Tensor:
        """The code (n, numbers) read from volumes `fine` (n, 1, z, y, x) over the volumes `given`, a fourth as fine."""
        return (features(fine, given) - self.mean) @ self.weight + self.bias


def features(fine: Tensor, given: Tensor) -> Tensor:
    """What thickness, spacing and order of trabeculae show in, (n, features), of the trabecular bone in `fine`, which
    `given` alone places: volume fraction and share of surface along each axis at three soft thresholds (their ratio is
    the thickness of the plate model, Parfitt et al. 1983), variance, third moment, and autocorrelations."""
    mean = F.avg_pool3d(given, SURROUNDINGS, 1, [n // 2 for n in SURROUNDINGS], count_include_pad=False)
    low, high = TRABECULAR
    inside = (torch.sigmoid((mean - low) / 0.01) * torch.sigmoid((high - mean) / 0.01)).detach()
    inside, centre = upsample(upsample(inside)), upsample(upsample(mean)).detach()

    def average(values: Tensor, weight: Tensor) -> Tensor:
        return (values * weight).sum((1, 2, 3, 4)) / weight.sum((1, 2, 3, 4)).clamp(min=1)

    def shifted(x: Tensor, lag) -> tuple[Tensor, Tensor]:
        z, y, x_ = lag
        return x[:, :, : x.shape[2] - z, : x.shape[3] - y, : x.shape[4] - x_], x[:, :, z:, y:, x_:]

    found = []
    for threshold in THRESHOLDS:
        bone = torch.sigmoid((fine - threshold) / SOFTNESS)
        found.append(average(bone, inside))
        for lag in LAGS[0], LAGS[1], LAGS[4]:
            (a, b), (u, v) = shifted(bone, lag), shifted(inside, lag)
            found.append(average((a - b).abs(), u * v))
    signal = fine - centre
    variance = average(signal.square(), inside)
    found += [variance.clamp(min=1e-8).sqrt(), average(signal**3, inside) / variance.clamp(min=1e-8) ** 1.5]
    for lag in LAGS:
        (a, b), (u, v) = shifted(signal, lag), shifted(inside, lag)
        found.append(average(a * b, u * v) / variance.clamp(min=1e-8))
    return torch.stack(found, 1)


def fit(seen: Tensor, codes: Tensor) -> TextureReader:
    """The ridge regression of codes (n, numbers) on features (n, features)."""
    weight, mean, bias = ridge(seen, codes)
    return TextureReader(mean, weight, bias)
