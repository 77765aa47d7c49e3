"""The training losses: one function for each equation of Angermann et al. 2023, and a relativistic pair beside them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bonelib.core.random import RankShard, Rng, sample_per_rank
from bonelib.networks.superres import TexturePrior
from bonelib.training.config import Train


def of_critic(
    how: Train, critic, real: Tensor, fake: Tensor, rng: torch.Generator | RankShard, stage: int, fade: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The critic's loss by `how.loss`, its scores of `real` and of `fake` (n,), and its slopes where they are held.

    Wasserstein is eq. (1), with slopes held at one between real and generated volumes. Relativistic compares them in
    pairs, and holds the slopes at zero where the volumes are: with weight `penalty` this is gamma / 2 (R1 + R2) of
    Huang et al. 2024; the drift term takes the constant that it leaves free. Nonsaturating is the logistic loss of
    single volumes, with slopes held at zero where they are real (R1 of Mescheder et al. 2018).
    """
    both = torch.cat([real, fake])
    on_real, on_fake = critic(both, stage, fade).split(len(real))
    held = {"relativistic": both, "nonsaturating": real}
    at = held[how.loss] if how.loss in held else mix(real, fake, rng)
    slope = slopes(critic.input_gradient(at, stage, fade))
    if how.loss == "wasserstein":
        return critic_loss(on_real, on_fake, slope, penalty=how.penalty, drift=how.drift), on_real, on_fake, slope
    if how.loss == "nonsaturating":
        loss = F.softplus(-on_real).mean() + F.softplus(on_fake).mean() + how.penalty * slope.square().mean()
        return loss, on_real, on_fake, slope
    loss = relativistic(on_real, on_fake) + how.penalty * slope.square().mean() + how.drift * on_real.square().mean()
    return loss, on_real, on_fake, slope


def of_generator(how: Train, critic, real: Tensor, fake: Tensor, stage: int, fade: float) -> Tensor:
    """The generator's loss by `how.loss`; `real` are the volumes that `fake` is paired with, if it is relativistic."""
    on_fake = critic(fake, stage, fade)
    if how.loss == "wasserstein":
        return generator_loss(on_fake)
    if how.loss == "nonsaturating":
        return F.softplus(-on_fake).mean()
    with torch.no_grad():
        on_real = critic(real, stage, fade)
    return relativistic(on_fake, on_real)


def mix(real: Tensor, fake: Tensor, rng: torch.Generator | RankShard) -> Tensor:
    """Points on the lines between real and generated volumes, uniform, for the gradient penalty of eq. (1)."""
    share = sample_per_rank(torch.rand, len(real), 1, 1, 1, 1, rng=rng).to(real)
    return share * real + (1 - share) * fake


def slopes(gradient: Tensor) -> Tensor:
    """The Euclidean norm of each sample's input gradient, (n,)."""
    return (gradient.float().square().sum(dim=(1, 2, 3, 4)) + 1e-12).sqrt()


def critic_loss(on_real: Tensor, on_fake: Tensor, slope: Tensor, *, penalty: float, drift: float) -> Tensor:
    """Eq. (1): Wasserstein loss with the two-sided gradient penalty (`penalty` is p1) and drift (`drift` is p2)."""
    return on_fake.mean() - on_real.mean() + penalty * (slope - 1).square().mean() + drift * on_real.square().mean()


def generator_loss(on_fake: Tensor) -> Tensor:
    """Eq. (2)."""
    return -on_fake.mean()


def mixed_styles(share: float, generator, latent: Tensor, rng: Rng, stage: int) -> Tensor:
    """The styles of latents (n, latent); a `share` of them have those of other latents from a random layer of `stage`
    on (Karras et al. 2019, section 3.1). With share 0 they are (n, style), and nothing is drawn; else (n, layers,
    style)."""
    styles = generator.to_styles(latent)
    if not share:
        return styles
    other = generator.to_styles(generator.sample_latent(len(latent), rng).to(latent))
    mixed, place = sample_per_rank(torch.rand, len(latent), 2, rng=rng).to(latent).unbind(1)
    used = generator.layers * stage // generator.stages
    first = torch.where(mixed < share, 1 + (place * (used - 1)).long(), generator.layers)
    own = torch.arange(generator.layers, device=latent.device) < first[:, None]
    return torch.where(own[..., None], styles[:, None], other[:, None])


def path_lengths(generator, styles: Tensor, rng: Rng, stage: int, fade: float) -> Tensor:
    """How much volumes change with their styles, (n,): of a random direction of the volume the gradient by the styles,
    the root mean square over layers of its norm (Karras et al. 2020, section 3.2), differentiable once more."""
    styles = styles if styles.dim() == 3 else styles[:, None].expand(-1, generator.layers, -1)
    volumes = generator.synthesize(styles, stage, fade, rng)
    direction = sample_per_rank(torch.randn, *volumes.shape, rng=rng).to(volumes) / volumes[0].numel() ** 0.5
    (slope,) = torch.autograd.grad((volumes * direction).sum(), styles, create_graph=True)
    return (slope.square().sum((1, 2)) / slope.shape[1] + 1e-12).sqrt()


LAGS = tuple((z, y, x) for z in (0, 1) for y in (-2, -1, 0, 1, 2) for x in (0, 1, 2) if (z, y, x) > (0, 0, 0))
LAGS += ((2, 0, 0),)  # without it a period of two slices is left
TRABECULAR = (0.27, 0.42)  # intensities between which the surroundings of a voxel are taken for trabecular bone
SURROUNDINGS = (3, 5, 5)  # voxels


def autocorrelation_difference(real: Tensor, fake: Tensor) -> Tensor:
    """How much the second moments of trabecular bone differ between two batches of volumes (n, 1, z, y, x): the mean
    squared difference of the autocorrelations at `LAGS`, and of the logarithm of the SD, of intensities less the mean
    of their surroundings, where that mean is `TRABECULAR`.

    Upsampling leaves a period of two voxels in what generators draw, to which critics are nearly blind; a loss on the
    spectrum removes it (Durall et al. 2020).
    """
    (variance, rho), (fake_variance, fake_rho) = (_autocorrelations(volumes) for volumes in (real, fake))
    return (rho - fake_rho).square().sum() + (variance.log() - fake_variance.log()).square() / 4


def _autocorrelations(volumes: Tensor) -> tuple[Tensor, Tensor]:
    """Variance, and autocorrelations (lags,), of the trabecular bone in volumes."""
    mean = F.avg_pool3d(volumes, SURROUNDINGS, 1, [n // 2 for n in SURROUNDINGS], count_include_pad=False)
    low, high = TRABECULAR
    weight = torch.sigmoid((mean - low) / 0.01) * torch.sigmoid((high - mean) / 0.01)
    weight, signal = weight.detach(), (volumes - mean) * weight.detach()
    variance = signal.square().sum() / weight.square().sum().clamp(min=1)

    def moment(z, y, x):
        def pair(t):
            ends = t[:, :, z:, max(y, 0) : t.shape[3] + min(y, 0), x:]
            return t[:, :, : t.shape[2] - z, max(-y, 0) : t.shape[3] - max(y, 0), : t.shape[4] - x], ends

        (a, b), (u, v) = pair(signal), pair(weight)
        return (a * b).sum() / (u * v).sum().clamp(min=1)

    return variance, torch.stack([moment(*lag) for lag in LAGS]) / variance.clamp(min=1e-8)


def histogram_distance(real: Tensor, fake: Tensor) -> Tensor:
    """Energy distance between the density histograms of two batches of volumes (n, 1, z, y, x), one value.

    That of the volume and of its mean over 3x3 voxels in plane are compared, square roots of shares, so that rare
    densities count (the Hellinger distance); unbiased over pairs (Szekely and Rizzo 2013). Critics are slow to see that
    every bone is as dense as the mean one.
    """
    a, b = _histograms(real), _histograms(fake)

    def mean_distance(u, v, pairs):
        # The square root has no slope at zero, where a histogram meets itself
        return ((u[:, None] - v[None]).square().sum(2) + 1e-8).sqrt().sum() / pairs

    n, m = len(a), len(b)
    within = mean_distance(a, a, n * (n - 1)) + mean_distance(b, b, m * (m - 1))
    return 2 * mean_distance(a, b, n * m) - within


def _histograms(volumes: Tensor) -> Tensor:
    smooth = F.avg_pool3d(volumes, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    shares = torch.cat([TexturePrior.histogram(v) for v in (volumes, smooth)], 1)
    return (shares / TexturePrior.BINS + 1e-4).sqrt()


AIR = 0.32  # intensity below which a voxel is air or soft tissue, some 140 mg HA/cm3


def lattice(added: Tensor, given: Tensor) -> Tensor:
    """How far the detail `added`, on a finer grid, to given volumes (n, 1, z, y, x) shows the grid that it was drawn
    on, one value. In air and soft tissue the mean detail at each of the places in a block of voxels is zero: the mean
    square of these means, over what noise of the same variance would leave in them."""
    n, _, z, y, x = given.shape
    side = added.shape[2] // z
    places = added.reshape(n, z, side, y, side, x, side).permute(2, 4, 6, 0, 1, 3, 5).reshape(side**3, -1)
    air = (given < AIR).flatten().to(added)
    count = air.sum().clamp(min=1)
    means = places @ air / count
    variance = (places.square() @ air).mean() / count
    return means.square().mean() * count / variance.clamp(min=1e-8).detach()


def relativistic(better: Tensor, worse: Tensor) -> Tensor:
    """How far scores `better` fall short of scores `worse`, pair by pair (logistic; Jolicoeur-Martineau 2018).

    The critic wants real above generated ones, the generator the reverse. Not in the paper.
    """
    return F.softplus(worse - better).mean()
