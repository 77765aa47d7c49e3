"""Bones from degraded observations of them: maximum a posteriori inversion through a forward operator.

An observation is y = A x + n with white noise n. Beforehand a bone is x = m + r: a first estimate m and a deviation r
that is Gaussian and stationary. With the mean bone as m, the most probable x is the Wiener filter; with m = G(w), the
volume of a code w, it is inversion through the operator (Marinescu et al. 2020, "Bayesian image reconstruction using
deep generative models"), with what no code can draw taken from the observation. Volumes are intensities.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import fft, ndimage
from torch import Tensor

from bonelib.latent.inversion import AT_ONCE, Inverter, encode, latent_loss, place_of
from bonelib.latent.models import Model
from bonelib.networks.encoder import trunk
from bonelib.scans.phantom.motion import GRADES, Event, draw_events, spectral_residual

SMOOTH = 1.0  # coefficients over which the spectrum of deviations is averaged, as it is that of few volumes
ENOUGH = 1e-3  # of the right-hand side: a remainder at which conjugate gradients stop
Operator = Callable[[Tensor], Tensor]  # of a volume (1, 1, z, y, x), affine


class Problem(NamedTuple):
    """Observations (1, 1, z, y, x) of bones, the operator of each, and the SD of the noise that was added."""

    operators: Sequence[Operator]
    observed: Sequence[Tensor]
    noise: float


def averaged(factor: int) -> Operator:
    """Block means: voxels `factor` times as long."""
    return lambda volume: F.avg_pool3d(volume, factor)


def moved(events: list[Event], spacing, intensity: tuple[float, float]) -> Operator:
    """The arm moves as `events` say while it is scanned, on a grid of `spacing` mm (`scans.phantom.motion`)."""
    low, high = intensity

    def operator(volume: Tensor) -> Tensor:
        density = low + (high - low) * volume[0, 0]
        residual = spectral_residual(density, tuple(spacing), events, range(len(density)))
        return volume + residual[None, None] / (high - low)

    return operator


def as_given(volume: Tensor) -> Tensor:
    return volume


def enlarged(observed: Sequence[Tensor], shape) -> Tensor:
    """Observations on the grid of `shape` (z, y, x) by trilinear interpolation, (n, 1, z, y, x)."""
    return torch.cat([F.interpolate(y, size=tuple(shape), mode="trilinear", align_corners=False) for y in observed])


class Deviation(NamedTuple):
    """Prior of deviations from a first estimate: Gaussian and stationary, mirrored at the border.

    `root` (z, y, x) is the root of its spectrum of cosines, the SDs of its independent parts.
    """

    root: np.ndarray

    def drawn(self, parts: np.ndarray) -> np.ndarray:
        """The deviation (z, y, x) that has these parts, in SDs."""
        return fft.idctn(self.root * parts, norm="ortho")

    def adjoint(self, volume: np.ndarray) -> np.ndarray:
        return self.root * fft.dctn(volume, norm="ortho")


def fit_deviation(left: Tensor) -> Deviation:
    """The prior of which the deviations `left` (n, 1, z, y, x) may be draws, those of training bones."""
    power = np.mean([fft.dctn(one, norm="ortho") ** 2 for one in left[:, 0].numpy()], axis=0)
    return Deviation(np.sqrt(ndimage.gaussian_filter(power, SMOOTH, mode="reflect")).astype(np.float32))


def most_probable(first: Tensor, problem: Problem, prior: Deviation, steps: int) -> Tensor:
    """The most probable bones (n, 1, z, y, x) about first estimates of this shape: m + r of the module's text.

    Of the Gaussian r the mode, by at most `steps` conjugate gradients each.
    """
    found = []
    for m, operator, y in zip(first.split(1), problem.operators, problem.observed, strict=True):
        found.append(m + torch.from_numpy(_deviation(m, operator, y, problem.noise, prior, steps))[None, None])
    return torch.cat(found)


def _deviation(first, operator, observed, noise, prior, steps) -> np.ndarray:
    none = torch.zeros_like(first, requires_grad=True)
    base = operator(none)

    def adjoint(values: Tensor) -> np.ndarray:
        (back,) = torch.autograd.grad(base, none, values, retain_graph=True)
        return prior.adjoint(back[0, 0].numpy())

    def normal(parts: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            seen = operator(torch.from_numpy(prior.drawn(parts))[None, None]) - base
        return noise**2 * parts + adjoint(seen)

    with torch.no_grad():
        missing = observed - operator(first)
    right = adjoint(missing)
    return prior.drawn(_conjugate_gradients(normal, right, steps))


def _conjugate_gradients(normal, right: np.ndarray, steps: int) -> np.ndarray:
    found, left = np.zeros_like(right), right.copy()
    way, size = left.copy(), float((left**2).sum(dtype=np.float64))
    limit = ENOUGH**2 * size
    for _ in range(steps):
        if size <= limit:
            break
        image = normal(way)
        step = size / float((way * image).sum(dtype=np.float64))
        found += np.float32(step) * way
        left -= np.float32(step) * image
        size, before = float((left**2).sum(dtype=np.float64)), size
        way = left + np.float32(size / before) * way
    return found


def _spectrum(problem: Problem, left: Tensor) -> np.ndarray:
    """Mean square of what an observation differs by from that of the first estimate, by parts in cosines."""
    powers = []
    for operator, one in zip(problem.operators, left.split(1), strict=False):
        seen = operator(one) - operator(torch.zeros_like(one))
        powers.append(fft.dctn(seen[0, 0].numpy(), norm="ortho") ** 2)
    return np.mean(powers, axis=0) + problem.noise**2


def unexplained(problem: Problem, left: Tensor) -> tuple[float, float]:
    """What an observation may differ from that of the best code: its variance, and the share that is independent, by
    the participation ratio of its spectrum. `left` (n, 1, z, y, x) is what codes left of training bones."""
    power = _spectrum(problem, left)
    return float(power.mean()), float(power.mean() ** 2 / (power**2).mean())


def evidence(problem: Problem, first: Tensor, left: Tensor) -> np.ndarray:
    """The logarithm of the density of every observation about that of its first estimate, up to a constant, (n,).
    `left` (m, 1, z, y, x) is what such estimates left of training bones: stationary, so that parts in cosines are taken
    as independent."""
    power, found = ndimage.gaussian_filter(_spectrum(problem, left), SMOOTH, mode="reflect"), []
    for m, operator, y in zip(first.split(1), problem.operators, problem.observed, strict=True):
        with torch.no_grad():
            error = fft.dctn((y - operator(m))[0, 0].numpy(), norm="ortho")
        found.append(-0.5 * float((error**2 / power + np.log(power)).sum(dtype=np.float64)))
    return np.array(found)


def likely_trajectory(
    observed: Tensor, first: Tensor, prior: Deviation, noise: float, spacing, intensity, *, grade: int, count: int, rng
) -> list[Event]:
    """Of `count` trajectories as the phantom draws them for `grade`, that under which the observation is most probable.
    `first` (1, 1, z, y, x) is an estimate of the bone at rest, from which it deviates as `prior` says: moving hardly
    changes that spectrum."""
    weight = 1 / (prior.root**2 + noise**2)

    def misfit(events: list[Event]) -> float:
        with torch.no_grad():
            error = observed - moved(events, spacing, intensity)(first)
        return float((weight * fft.dctn(error[0, 0].numpy(), norm="ortho") ** 2).mean())

    return min((draw_events(rng, GRADES[grade]) for _ in range(count)), key=misfit)


class Codes(NamedTuple):
    """Most probable codes (n, code); of every bone the objective at the start and at the end, and what of that is the
    prior's part, minus the logarithm of the code's density (n,)."""

    codes: Tensor
    before: Tensor
    after: Tensor
    prior: Tensor


def most_probable_codes(
    start: Tensor, problem: Problem, model: Model, inverter: Inverter, left: Tensor, *, steps: int, rate: float
) -> Codes:
    """The codes (n, code) of which the observations are most probable, from those that the encoder reads in first
    estimates `start` (n, 1, z, y, x) on the generator's grid.

    Adam lowers half the squared error of A G(w) over its variance, of as many voxels as are independent
    (`unexplained`), less the logarithm of the codes' density: half their square, or eq. (8) for every one of their
    numbers.
    """
    variance, share = unexplained(problem, left)
    generator, place = trunk(model.generator), place_of(model)
    codes, before, after, priors = [], [], [], []
    for begin in range(0, len(start), AT_ONCE):
        part = slice(begin, begin + AT_ONCE)
        own = encode(inverter.encoder, start[part]).to(place).requires_grad_()
        adam = torch.optim.Adam([own], lr=rate, betas=(0.5, 0.9))

        def objective(own=own, part=part):
            drawn = generator.synthesize(own).cpu().split(1)
            pairs = zip(problem.operators[part], drawn, problem.observed[part], strict=True)
            errors = torch.stack([(operator(x) - y).square().sum() for operator, x, y in pairs])
            prior = latent_loss(own, inverter.latent_discriminator).cpu() * own.shape[-1]
            return share * errors / (2 * variance) + prior, prior

        for step in range(steps):
            adam.zero_grad()
            values, _ = objective()
            values.sum().backward()
            before += values.tolist() if step == 0 else []
            adam.step()
        with torch.no_grad():
            values, prior = objective()
        after, priors = after + values.tolist(), priors + prior.tolist()
        codes.append(own.detach().cpu())
    return Codes(torch.cat(codes), torch.tensor(before), torch.tensor(after), torch.tensor(priors))
