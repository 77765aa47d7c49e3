"""What the scanner does to true density: point spread and coloured noise, on the native grid or a coarser one."""

import numpy as np
from scipy.ndimage import correlate1d
from scipy.special import ive

from bonelib.scans.volumes import Volume

NATIVE_MM = 0.0607  # XtremeCT II reconstruction grid
PSF_SIGMA_MM = 0.065  # FWHM 153 um: nominal XtremeCT II resolution of 95 um at 10 % MTF (Manske et al. 2015)
NOISE_SIGMA = 0.84  # native voxels: autocorrelation .70 / .24 / .04 at lags 1 / 2 / 3, as in genuine crops


def scan(volume: Volume, rng: np.random.Generator, *, noise_sd: float) -> Volume:
    """What an XtremeCT II would return for true density in `volume` (mg HA/cm3, axes z, y, x).

    `noise_sd` is the noise SD in mg HA/cm3 on the native grid of .0607 mm. A coarser grid gets what block averaging
    of a native scan would leave: the same point spread in mm, and noise of lower SD that is nearly white.
    """
    voxels = np.asarray(volume.voxels, np.float32)
    noise = rng.standard_normal(voxels.shape, dtype=np.float32)
    for axis, spacing in enumerate(volume.spacing):
        voxels = correlate1d(voxels, spread_kernel(spacing), axis=axis, mode="nearest")
        noise = correlate1d(noise, noise_kernel(spacing), axis=axis, mode="wrap")
    noise *= np.float32(noise_sd)
    noise += voxels
    return volume.with_voxels(noise)


def spread_kernel(spacing_mm: float) -> np.ndarray:
    """Weights of the point spread on a grid of `spacing_mm`: the discrete Gaussian, whose variance is exact."""
    variance = (PSF_SIGMA_MM / spacing_mm) ** 2
    reach = int(np.ceil(4 * np.sqrt(variance))) + 1
    weights = ive(np.abs(np.arange(-reach, reach + 1)), variance)
    return weights / weights.sum()


def noise_covariance(spacing_mm: float) -> np.ndarray:
    """Covariance per axis at lags 0 to 31 of native noise of SD 1, averaged over blocks of `spacing_mm`.

    The native correlation is exp(-k^2 / 4 s^2) for white noise through a Gaussian of s voxels; averaging f voxels
    weights it with a triangle of half-width f. The covariance in space is the product over the axes.
    """
    factor = spacing_mm / NATIVE_MM
    offsets = np.arange(-int(np.ceil(factor)), int(np.ceil(factor)) + 1)
    weights = np.clip(factor - np.abs(offsets), 0, None)
    distance = factor * np.arange(32)[:, None] + offsets[None, :]
    return np.exp(-(distance**2) / (4 * NOISE_SIGMA**2)) @ (weights / weights.sum())


def noise_kernel(spacing_mm: float) -> np.ndarray:
    """Weights that turn white noise of SD 1 into the covariance of `noise_covariance`: the root of its spectrum."""
    covariance = noise_covariance(spacing_mm)
    power = np.fft.rfft(np.concatenate([covariance, [0.0], covariance[:0:-1]])).real
    weights = np.fft.fftshift(np.fft.irfft(np.sqrt(np.clip(power, 0, None))))
    centre = len(weights) // 2
    keep = np.flatnonzero(np.abs(weights) > 2e-3 * weights[centre])
    reach = centre - keep[0]
    weights = weights[centre - reach : centre + reach + 1]
    return weights * np.sqrt(covariance[0] / (weights**2).sum())
