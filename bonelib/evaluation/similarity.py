"""Similarity of volumes voxel by voxel (PSNR, SSIM, MS-SSIM), and the diversity of a set by MS-SSIM."""

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from bonelib import InputError
from bonelib.core.parallel import workers
from bonelib.core.pyramid import downsample
from bonelib.core.random import numpy_rng
from bonelib.evaluation.statistics import pair_mean, pairs_between

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first: Wang et al. 2003
SIGMA, WINDOW = 1.5, 7  # voxels: SD and length of the Gaussian window
C1, C2 = 0.01**2, 0.03**2  # for intensities from 0 to 1
PAIRS_AT_ONCE = 8


def psnr(real: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of volumes (n, z, y, x) in [0, 1], at a peak of 1: (n,)."""
    pairs = zip(real.astype(np.float64), drawn.astype(np.float64), strict=True)
    return np.array([peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs])


def ssim(real: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Structural similarity of volumes (n, z, y, x) in [0, 1], mean over all voxels: (n,).

    Wang et al. 2004 with a Gaussian window of SD 1.5 voxels in all three directions; the volume is mirrored beyond its
    faces.
    """
    # With Gaussian weights and the full map, `win_size` is nothing but a least size
    how = dict(data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True, win_size=3)
    pairs = zip(real.astype(np.float64), drawn.astype(np.float64), strict=True)
    return np.array([structural_similarity(*pair, **how)[1].mean() for pair in pairs])


def ms_ssim(a, b) -> np.ndarray:
    """Multi-scale structural similarity of the pairs `a`, `b` (n, z, y, x) in [0, 1] -> (n,); 1 for equal volumes.

    Wang et al. 2003 in three dimensions: contrast and structure on every scale, luminance on the coarsest, negative
    similarities counted 0. There are as many scales, up to five, as leave the window of 7 voxels in the volume; the
    weights of those are brought to a sum of 1. Raises `InputError` for shapes that differ or are smaller than the
    window.
    """
    a, b = (torch.as_tensor(np.asarray(v)).float()[:, None] for v in (a, b))
    if a.shape != b.shape or a.ndim != 5 or min(a.shape[2:]) < WINDOW:
        raise InputError(f"a is {tuple(a[:, 0].shape)} and b {tuple(b[:, 0].shape)}; both need (n, z, y, x) from 7 on")
    scales = min(len(WEIGHTS), 1 + int(np.log2(min(a.shape[2:]) / WINDOW)))
    weights = np.array(WEIGHTS[:scales]) / sum(WEIGHTS[:scales])
    product = torch.ones(len(a), dtype=torch.float64)
    for scale, weight in enumerate(weights):
        luminance, structure = _terms(a, b)
        value = luminance * structure if scale == scales - 1 else structure
        product *= value.mean(dim=(1, 2, 3, 4)).clamp(min=0).double() ** weight
        a, b = (
            downsample(v[:, :, : v.shape[2] // 2 * 2, : v.shape[3] // 2 * 2, : v.shape[4] // 2 * 2]) for v in (a, b)
        )
    return product.numpy()


def diversity(volumes: np.ndarray, groups=None, *, pairs: int = 100, seed: int = 0, draws: int = 200) -> dict:
    """Mean MS-SSIM of at most `pairs` random pairs of `volumes` (n, z, y, x): high where a set repeats itself.

    `groups` (n,) names each volume's patient (None: all differ); only different ones are compared, and whole patients
    are resampled. Returns value, low, high, n and pairs.
    """
    groups = np.arange(len(volumes)) if groups is None else np.asarray(groups)
    first, second = pairs_between(groups, pairs, numpy_rng(seed, "ms-ssim pairs"))
    parts = [slice(i, i + PAIRS_AT_ONCE) for i in range(0, len(first), PAIRS_AT_ONCE)]
    with torch.inference_mode():
        values = [ms_ssim(volumes[first[part]], volumes[second[part]]) for part in parts]
    values, rng = np.concatenate([np.empty(0), *values]), numpy_rng(seed, "ms-ssim interval")
    pairs = np.stack([groups[first], groups[second]], 1)
    found = pair_mean(values, pairs, rng=rng, draws=draws)
    return dict(value=found.value, low=found.low, high=found.high, n=len(volumes), pairs=found.N)


def diversities(sets: dict[str, tuple], *, pairs: int, seed: int, draws: int) -> dict[str, dict]:
    """`diversity` of every set (volumes, groups), on voxels twice as large, by worker processes."""
    with workers() as pool:
        how = dict(pairs=pairs, seed=seed, draws=draws)
        jobs = {name: pool.submit(_of_halved, *one, how) for name, one in sets.items()}
        return {name: job.result() for name, job in jobs.items()}


def _of_halved(volumes, groups, how):
    coarse = downsample(torch.from_numpy(np.asarray(volumes, np.float32))[:, None])[:, 0]
    return diversity(coarse.numpy(), groups, **how)


def _terms(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, at every place where the window fits."""
    mean_a, mean_b = _window(a), _window(b)
    var_a, var_b, cov = _window(a * a) - mean_a**2, _window(b * b) - mean_b**2, _window(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return luminance, (2 * cov + C2) / (var_a + var_b + C2)


def _window(x: Tensor) -> Tensor:
    """Gaussian means, along one axis after the other."""
    taps = torch.exp(-0.5 * ((torch.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    taps = (taps / taps.sum()).to(x)
    for shape in ((WINDOW, 1, 1), (1, WINDOW, 1), (1, 1, WINDOW)):
        x = F.conv3d(x, taps.reshape(1, 1, *shape))
    return x
