"""Feature families: published networks where their weights are at hand, the motion grader, and two that need none.

Volumes are intensities in [0, 1], shape (n, z, y, x), as array or tensor; every family returns (n, d) float64. A
distance on these features is named for the family that was used (FD_random3d, KID_spectrum), and for Inception or
MedicalNet only with their weights.
"""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional

from bonelib import InputError
from bonelib.core.pyramid import downsample
from bonelib.core.random import numpy_rng, torch_rng
from bonelib.evaluation import pretrained

CHANNELS = (16, 24, 32, 32, 24)
STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))  # the long axis has the fewest voxels
SLOPE = 0.2
VOXELS_AT_ONCE = 1 << 22
SPECTRUM_BINS = 16
SLICES = 2  # axial slices of each volume that the Inception network sees (section 3.3 of Angermann et al. 2023)
CHANCES = "motion grades"  # the grader's probabilities, the classes of an inception score
UNSCALED = ("inception", "medicalnet", "vgs", CHANCES)  # of networks, whose distances are published unscaled
FLAT = 0.01  # of the largest SD of a family; features that vary less are divided by no less, as they are mostly zero
POWER_FLOOR = 1e-12  # below the rounding of single precision, so that an empty volume has a finite logarithm


def families(
    grader=None, *, inception_weights=None, medicalnet_weights=None, seed: int = 0
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """The extractors that can be had, by the name that a metric's column bears: volumes (n, z, y, x) -> (n, d).

    `inception`, of `SLICES` rows a volume, and `medicalnet` if their weights are found at the path or in the usual
    cache, `vgs` if a `grader` (as of `training.grading.load_grader`) is given, `random3d` and `spectrum` always.
    """
    found = {}
    for name, path, extract in (
        ("inception", inception_weights, partial(inception, seed=seed)),
        ("medicalnet", medicalnet_weights, medicalnet),
    ):
        file = pretrained.find_weights(name, path)
        if file is not None:
            found[name] = partial(extract, weights=pretrained.load_weights(file))
    if grader is not None:
        found["vgs"] = partial(graded, grader=grader)
    return found | {"random3d": partial(random3d, seed=seed), "spectrum": spectrum}


def cached(name: str, extract: Callable, volumes: np.ndarray, folder: str | Path | None) -> np.ndarray:
    """`extract(volumes)`, kept in `folder` under a hash of the volumes, the name, and the code and weights behind it.

    Features of the same volumes are computed once, whoever asks. Without a folder nothing is kept.
    """
    if folder is None:
        return extract(volumes)
    values = np.ascontiguousarray(volumes)
    key = hashlib.sha256(f"{name} {values.dtype} {values.shape}".encode())
    for part in (values, *(np.frombuffer(b, np.uint8) for b in _identity(extract))):
        key.update(part.data if part.size else b"")
    file = Path(folder) / f"{name}-{key.hexdigest()[:24]}.safetensors"
    if file.is_file():
        return load_file(file)["features"]
    found = np.ascontiguousarray(extract(values))
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    save_file({"features": found}, part)
    os.replace(part, file)
    return found


def standardised(reference: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Features of every set (n, d), brought to mean 0 and SD 1 of `reference`, so that no feature rules by its unit."""
    mean, sd = reference.mean(axis=0), reference.std(axis=0)
    scale = np.maximum(sd, max(FLAT * sd.max(), 1e-9))
    return [(features - mean) / scale for features in (reference, *others)]


def scaled(name: str, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The sets (n, d) of a family with "real" at mean 0 and SD 1, or as they are where they are published so."""
    if name in UNSCALED:
        return found
    others = {key: values for key, values in found.items() if key != "real"}
    return dict(zip(["real", *others], standardised(found["real"], *others.values()), strict=True))


def inception(volumes, weights: dict, seed: int = 0, slices: int = SLICES) -> np.ndarray:
    """Inception-v3 features of random axial slices, (n * slices, 2048), the rows of a volume one after the other.

    Slices are drawn without repetition from (seed, number of the volume). Raises `InputError` as `random3d`, and for
    fewer slices than wanted.
    """
    volumes = _checked(volumes)
    if volumes.shape[1] < slices:
        raise InputError(f"volumes have {volumes.shape[1]} slices; at least {slices} are needed")
    rngs = (numpy_rng(seed, "inception slices", i) for i in range(len(volumes)))
    chosen = [sorted(rng.choice(volumes.shape[1], slices, replace=False)) for rng in rngs]
    pictures = torch.cat([volume[index] for volume, index in zip(volumes, chosen, strict=True)])
    return _by_batch(pictures, lambda batch: pretrained.inception_v3(batch, weights))


def medicalnet(volumes, weights: dict) -> np.ndarray:
    """Pooled features of MedicalNet's 3D ResNet, (n, 512) or (n, 2048). Raises `InputError` as `random3d`."""
    return _by_batch(_checked(volumes), lambda batch: pretrained.medicalnet(batch, weights))


def graded(volumes, grader) -> np.ndarray:
    """Features (n, d) of the network that grades motion (VGS), averaged over its windows along the bone.

    `grader` is the network and its configuration, as `training.grading.load_grader` returns them. Raises `InputError`
    as `random3d`.
    """
    network, config = grader
    return _by_batch(_checked(volumes), lambda batch: _over_windows(batch, config["grading"], network.features))


def grade_chances(volumes, grader) -> np.ndarray:
    """The grader's probabilities (n, 5) of motion grades 1 to 5, the classes of an inception score."""
    network, config = grader

    def chances(batch):
        above = torch.sigmoid(_over_windows(batch, config["grading"], network))
        edges = torch.cat([torch.ones(len(above), 1), torch.cummin(above, 1).values, torch.zeros(len(above), 1)], 1)
        return edges[:, :-1] - edges[:, 1:]

    return _by_batch(_checked(volumes), chances)


def random3d(volumes, seed: int = 0) -> np.ndarray:
    """Mean and standard deviation of five layers of a frozen random 3D convolutional network, (n, 256).

    Strided 3x3x3 convolutions with leaky rectifiers, He-scaled weights and biases drawn from `seed`; every other filter
    sums to zero, so that texture is not drowned by brightness (Saxe et al. 2011). Raises `InputError` for a shape that
    is not (n, z, y, x), NaN, or intensities outside [0, 1].
    """
    volumes = _checked(volumes)
    layers = [(w.to(volumes.device), b.to(volumes.device)) for w, b in _random_layers(seed)]
    return _by_batch(volumes, lambda batch: _pooled_layers(batch, layers))


def spectrum(volumes) -> np.ndarray:
    """Log10 power in radial bins of in-plane frequency, then in bins along z, of each volume: (n, d).

    Slices and columns are freed of their mean and windowed (Hann); bins are equal in width up to the Nyquist frequency,
    16 of each kind or half of the shortest edge, so only volumes of one grid can be compared. Raises `InputError` as
    `random3d`, and for fewer than 4 voxels in-plane or 2 along z.
    """
    volumes = _checked(volumes)
    _, depth, height, width = volumes.shape
    if min(height, width) < 4 or depth < 2:
        raise InputError(f"volumes has the grid {(depth, height, width)}; accepted is at least (2, 4, 4)")
    rows, columns = torch.fft.fftfreq(height).abs(), torch.fft.rfftfreq(width)
    radius = torch.hypot(rows[:, None], columns[None, :])
    in_plane = _bin_weights(radius.flatten(), min(SPECTRUM_BINS, min(height, width) // 2), volumes.device)
    along = _bin_weights(torch.fft.rfftfreq(depth), min(SPECTRUM_BINS, depth // 2), volumes.device)
    return _by_batch(volumes, lambda batch: _log_power(batch, in_plane, along))


def _random_layers(seed):
    rng = torch_rng(seed, "random3d features")
    layers, before = [], 1
    for channels in CHANNELS:
        weight = torch.randn((channels, before, 3, 3, 3), generator=rng)
        weight[::2] -= weight[::2].mean(dim=(1, 2, 3, 4), keepdim=True)
        weight *= (2 / (1 + SLOPE**2) / weight[0].numel()) ** 0.5
        layers.append((weight, 0.2 * torch.randn(channels, generator=rng)))
        before = channels
    return layers


def _pooled_layers(batch, layers):
    x, pooled = 2 * batch[:, None] - 1, []
    for (weight, bias), stride in zip(layers, STRIDES, strict=True):
        # the nearest voxel continues the volume: padding by zeros would draw an edge around it
        x = functional.pad(x, (1,) * 6, mode="replicate")
        x = functional.leaky_relu(functional.conv3d(x, weight, bias, stride), SLOPE)
        mean = x.mean(dim=(2, 3, 4), keepdim=True)
        power = (x - mean).square_().mean(dim=(2, 3, 4))  # several times faster than `std` on a processor
        pooled += [mean.flatten(1), power.sqrt()]
    return torch.cat(pooled, dim=1)


def _log_power(batch, in_plane, along):
    _, depth, height, width = batch.shape
    slices = batch - batch.mean(dim=(2, 3), keepdim=True)
    slices = slices * _hann(height, batch.device)[:, None] * _hann(width, batch.device)
    power = torch.fft.rfft2(slices).abs().square().mean(dim=1).flatten(1) / (height * width)
    columns = (batch - batch.mean(dim=1, keepdim=True)) * _hann(depth, batch.device)[:, None, None]
    power_z = torch.fft.rfft(columns, dim=1).abs().square().mean(dim=(2, 3)) / depth
    return torch.cat([power @ in_plane, power_z @ along], dim=1).add(POWER_FLOOR).log10()


def _hann(n, device):
    return torch.hann_window(n + 2, periodic=False, device=device)[1:-1]


def _bin_weights(frequency, bins, device):
    """Matrix (frequencies, bins) that averages the power of each bin; frequency zero is in none."""
    edges = torch.linspace(0, 0.5, bins + 1)
    index = torch.bucketize(frequency, edges) - 1  # bin i holds edges[i] < frequency <= edges[i + 1]
    member = (index[:, None] == torch.arange(bins)).float()
    return (member / member.sum(dim=0).clamp(min=1)).to(device)


def _over_windows(batch, how, compute):
    """The mean of `compute` over windows of as many slices as the grader was trained on, on its grid."""
    batch = batch[:, None]
    for _ in range(how["halvings"]):
        batch = downsample(batch[..., : batch.shape[-1] // 2 * 2])
    slices = batch.shape[2]
    depth = min(how["depth"], slices)
    starts = np.linspace(0, slices - depth, -(-slices // depth)).round().astype(int)
    return torch.stack([compute(batch[:, :, s : s + depth]) for s in starts]).mean(0)


def _identity(extract):
    """Bytes that differ between extractors: the source of this module, and the arguments that are bound."""
    yield Path(__file__).read_bytes() + Path(pretrained.__file__).read_bytes()
    for key, value in sorted(getattr(extract, "keywords", {}).items()):
        tensors = value[0].state_dict() if key == "grader" else value if isinstance(value, dict) else None
        yield f"{key} {None if tensors is not None else value!r}".encode()
        for name, tensor in (tensors or {}).items():
            yield name.encode() + tensor.contiguous().numpy().tobytes()


def _by_batch(volumes, compute):
    size = max(1, min(64, VOXELS_AT_ONCE // volumes[0].numel()))
    with torch.inference_mode():
        parts = [compute(batch.float()).double().cpu() for batch in volumes.split(size)]
    return torch.cat(parts).numpy()


def _checked(volumes):
    if not isinstance(volumes, torch.Tensor):
        volumes = torch.from_numpy(np.ascontiguousarray(volumes))
    if volumes.ndim != 4 or not volumes.numel():
        raise InputError(f"volumes has shape {tuple(volumes.shape)}; accepted is (n, z, y, x)")
    if not volumes.is_floating_point():
        raise InputError(f"volumes has the type {volumes.dtype}; accepted are floats in [0, 1]")
    low, high = float(volumes.min()), float(volumes.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # false for NaN as well
        raise InputError(f"volumes reach from {low:.3g} to {high:.3g}; accepted is [0, 1], without NaN")
    return volumes
