"""An analytic bone renderer x = R(M z) that answers the generator contract: latent methods have exact answers on it.

M is known, so are its singular vectors (what SeFa must find), the attributes of every code (what directions must find)
and, for W+, the style layer that carries each of them. `surfaces` are decision surfaces of known curvature.
"""

import torch
from torch import Tensor, nn

from bonelib.core.pyramid import downsample
from bonelib.core.random import sample_per_rank, torch_rng

GRID, SPACING = (4, 36, 28), 0.9712  # voxels (z, y, x) and mm, as the laptop profile's generators draw
INTENSITY = (-500.0, 1500.0)  # mg HA/cm3 at 0 and at 1
SOFT = 0.5  # mm, width of the logistic edges
# Attribute: (typical value, log change per unit of M z, style layer). Angle and taper change linearly from 0.
TRAITS = {
    "Tt.Ar": (280.0, 0.12, 0),  # mm2, of the outer ellipse in the middle of the stack
    "aspect": (1.3, 0.08, 0),  # long axis over short axis
    "angle": (0.0, 0.15, 0),  # radians
    "taper": (0.0, 0.06, 0),  # relative change of the radius from the middle to either end
    "Ct.Th": (2.2, 0.15, 1),  # mm
    "Ct.BMD": (850.0, 0.06, 1),  # mg HA/cm3
    "Tb.BMD": (160.0, 0.25, 2),  # mg HA/cm3
    "contrast": (100.0, 0.4, 2),  # mg HA/cm3, amplitude of the trabecular pattern
}
LINEAR = ("angle", "taper")


class Oracle(nn.Module):
    """Styles z in R^latent, (n, latent) or (n, layers, latent), to volumes (n, 1, 4, 36, 28) in (0, 1).

    M = U diag(s) V' with `singular` values s from 1.5 down to 0.5, `right` vectors V (latent, 8) and left vectors U,
    the identity, so that every attribute has its own singular direction, or a rotation where `entangled`. With the
    default `latent` of 8 a volume has one code; with more, M has a null space in which nothing happens.
    `noise_scale` is the SD of voxel noise, added where `noise` is given. Truncation scales towards the mean code, 0.
    """

    layers, stages = 3, 2

    def __init__(self, latent: int = 8, entangled: bool = False, noise_scale: float = 0.0, seed: int = 0):
        super().__init__()
        self.latent, self.noise_scale, k = latent, noise_scale, len(TRAITS)
        rng = torch_rng(seed, "oracle", latent)
        right = torch.linalg.qr(torch.randn(latent, k, generator=rng, dtype=torch.float64))[0]
        left = torch.linalg.qr(torch.randn(k, k, generator=rng, dtype=torch.float64))[0]
        self.register_buffer("right", right)
        self.register_buffer("singular", torch.linspace(1.5, 0.5, k, dtype=torch.float64))
        left = left if entangled else torch.eye(k, dtype=torch.float64)
        self.register_buffer("M", (left * self.singular) @ right.T)

    def sample_latent(self, n: int, rng) -> Tensor:
        return sample_per_rank(torch.randn, n, self.latent, rng=rng)

    def to_styles(self, latent: Tensor, truncation: float | None = None) -> Tensor:
        return latent if truncation is None else truncation * latent

    def factorized_weight(self) -> Tensor:
        """M, (8, latent)."""
        return self.M

    def direction(self, name: str) -> Tensor:
        """The unit vector (latent,) along which the attribute `name` rises fastest: its row of M."""
        row = self.M[list(TRAITS).index(name)]
        return row / row.norm()

    def attributes(self, styles: Tensor) -> dict[str, Tensor]:
        """Every attribute of the bones (n,), exactly, by name; differentiable."""
        if styles.dim() == 2:
            styles = styles[:, None].expand(-1, self.layers, -1)
        found = {}
        for row, (name, (typical, change, layer)) in zip(self.M.to(styles.dtype), TRAITS.items(), strict=True):
            moved = change * (styles[:, layer] @ row)
            found[name] = moved if name in LINEAR else typical * moved.exp()
        return found

    def synthesize(self, styles: Tensor, stage: int | None = None, fade: float = 1.0, noise=None) -> Tensor:
        volumes = render(**{name.replace(".", "_"): value for name, value in self.attributes(styles).items()})
        if noise is not None and self.noise_scale:
            volumes = volumes + self.noise_scale * sample_per_rank(torch.randn, *volumes.shape, rng=noise).to(volumes)
        for _ in range(self.stages - (self.stages if stage is None else stage)):
            volumes = downsample(volumes)
        return volumes


def render(*, Tt_Ar, aspect, angle, taper, Ct_Th, Ct_BMD, Tb_BMD, contrast) -> Tensor:
    """Volumes (n, 1, 4, 36, 28) of bones with these attributes, each (n,): an elliptic tube around a wavy interior."""
    z, y, x = torch.meshgrid(*(SPACING * (torch.arange(n).to(Tt_Ar) - (n - 1) / 2) for n in GRID), indexing="ij")

    def each(value):
        return value[:, None, None, None]

    scale = 1 + each(taper) * z / z.max()
    short = (Tt_Ar / (torch.pi * aspect)).sqrt()
    long, short = each(short * aspect) * scale, each(short) * scale
    u = (each(angle.cos()) * y + each(angle.sin()) * x) / long
    v = (each(angle.cos()) * x - each(angle.sin()) * y) / short
    radius = (u.square() + v.square() + 1e-6).sqrt()
    steep = ((u / long).square() + (v / short).square() + 1e-9).sqrt() / radius
    outside = (radius - 1) / steep  # mm to the outer ellipse, to first order
    bone = torch.sigmoid(-outside / SOFT)
    marrow = torch.sigmoid(-(outside + each(Ct_Th)) / SOFT)
    wave = torch.cos(1.5 * y) * torch.cos(1.5 * x + 0.8 * z)
    density = bone * each(Ct_BMD) + marrow * (each(Tb_BMD) + each(contrast) * wave - each(Ct_BMD))
    low, high = INTENSITY
    return ((density - low) / (high - low))[:, None]


def surface(kind: str, radius: float = 2.0):
    """A function f (n, d) -> (n,) whose zero set is a decision surface of known curvature.

    "plane": all curvatures 0. "sphere" about 0: all 1 / radius where the normal points to larger f. "saddle" at 0, with
    the normal along the last axis: -1 / radius along the first, 1 / radius along the second, 0 along the others.
    """
    return {
        "plane": lambda x: x.sum(1) / x.shape[1] ** 0.5 - 0.5,
        "sphere": lambda x: x.norm(dim=1) - radius,
        "saddle": lambda x: x[:, -1] + (x[:, 1].square() - x[:, 0].square()) / (2 * radius),
    }[kind]
