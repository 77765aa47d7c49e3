"""GAN inversion: codes of real bones by an encoder, then by optimisation (Angermann et al. 2023, section 3.5).

Codes are sought on the grid that the generator itself draws. Where super-resolution follows it, the texture of a bone
is read off the scan and joins the code at the end (`with_texture`).
"""

import hashlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonelib import InputError, core, networks, training
from bonelib.core.config import fingerprint
from bonelib.core.parallel import side_by_side
from bonelib.core.provenance import code_hash
from bonelib.latent.codes import mean_code
from bonelib.latent.config import Refinement
from bonelib.latent.models import Model, enlarge
from bonelib.networks.encoder import Encoder, LatentDiscriminator, critic_features, style_layers, texture_length, trunk
from bonelib.scans import dataset
from bonelib.scans.dataset import Stacks
from bonelib.scans.tables import write_table
from bonelib.training import checkpoint, distributed, run

AT_ONCE = 32  # volumes whose gradients are computed together
OPTIMISERS = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam}
CODE = code_hash(sys.modules[__name__], networks, training, dataset, core)


class Inverter(NamedTuple):
    """A trained encoder, and the latent discriminator it was trained against (None where codes are Gaussian)."""

    encoder: Encoder
    latent_discriminator: LatentDiscriminator | None


# The losses, each (n,)


def distortion(real: Tensor, drawn: Tensor) -> Tensor:
    """Eq. (3): half the mean square difference of volumes (n, 1, z, y, x)."""
    return 0.5 * (real - drawn).square().flatten(1).mean(1)


def perceptual(real: list[Tensor], drawn: list[Tensor]) -> Tensor:
    """Eq. (4): half the mean square difference of the critic's features, a list of maps (n, channel, z, y, x)."""
    return 0.5 * torch.cat([(a - b).flatten(1) for a, b in zip(real, drawn, strict=True)], 1).square().mean(1)


def latent_loss(codes: Tensor, latent_discriminator: LatentDiscriminator | None) -> Tensor:
    """Eq. (5), half the mean square of codes that should follow N(0, I), or with a discriminator eq. (8): -log D_W of
    the codes, whose 512 summands are all the same; of several styles a code their mean."""
    if latent_discriminator is None:
        return 0.5 * codes.square().flatten(1).mean(1)
    return F.softplus(-latent_discriminator(codes.flatten(0, -2))).reshape(len(codes), -1).mean(1)


def feature_norms(real: list[Tensor], drawn: list[Tensor]) -> Tensor:
    """Eq. (2) of Fetty et al. 2020: the Euclidean norms of the differences of features, summed over resolutions."""
    return sum((a - b).flatten(1).norm(dim=1) for a, b in zip(real, drawn, strict=True))


# Volumes and codes


def on_device(model: Model) -> Model:
    """The model with its generator and critic on the GPU, if there is one; all that follows then works there, but
    super-resolution. Volumes and codes are given and come back on the CPU."""
    for part in (trunk(model.generator), model.critic):
        part.to(distributed.single_process().device)
    return model


def place_of(model: Model) -> torch.device:
    return next(model.critic.parameters()).device


def halvings(model: Model, slices: int) -> int:
    """How often stacks of `slices` slices are averaged down to the grid that the model's generator draws."""
    return max(0, round(slices / model.how.slices).bit_length() - 1)


def targets(model: Model, data: Stacks, rows: list[dict]) -> Tensor:
    """The stacks of `rows` on the grid that the model's generator draws, (n, 1, z, y, x)."""
    return data.pooled(rows, halvings(model, data.meta["stack_slices"])).float()


def evenly_spaced(rows: list[dict], count: int | None) -> list[dict]:
    """`count` of the rows of stacks (None or too many: all), evenly spread, so that they are of many patients."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, count).astype(int)]


def encode(encoder: Encoder, volumes: Tensor) -> Tensor:
    """Codes (n, code) of volumes on the generator's grid, (n, 1, z, y, x)."""
    with torch.no_grad():
        return torch.cat([encoder(part.to(encoder.place)).cpu() for part in volumes.split(AT_ONCE)])


def draw_codes(model: Model, codes: Tensor) -> Tensor:
    """What the generator itself draws of codes, without noise and without super-resolution, (n, 1, z, y, x)."""
    generator, place = trunk(model.generator), place_of(model)
    with torch.no_grad():
        return torch.cat([generator.synthesize(part.to(place)).cpu() for part in codes.split(AT_ONCE)])


def own_codes(model: Model, codes: Tensor) -> Tensor:
    """Codes without the texture, which the generator itself does not know."""
    return codes[..., : codes.shape[-1] - texture_length(model.generator)]


def as_styles(model: Model, codes: Tensor) -> Tensor:
    """Codes in the shape that they are kept in: (n, code), or (n, layers, code) of a generator with styles."""
    layers = style_layers(model.generator)
    return codes if layers is None or codes.dim() == 3 else codes[:, None].expand(-1, layers, -1).contiguous()


def decode_full_resolution(model: Model, coarse: Tensor, seed: int) -> np.ndarray:
    """Volumes of the generator's own grid (n, 1, z, y, x) at full size (n, z, y, x), through its super-resolution. The
    noise of number i is the same for all volumes of one seed."""
    superres = getattr(model.generator, "superres", None)
    return coarse[:, 0].numpy() if superres is None else enlarge(superres, coarse[:, 0].numpy(), seed)


def with_texture(model: Model, codes: Tensor, textures: np.ndarray) -> Tensor:
    """Codes of the generator itself, followed by the draw that gives their bones the textures (n, 5) of scans
    (`dataset.load_textures`), 0 where a scan has none; as they are without super-resolution."""
    superres = getattr(model.generator, "superres", None)
    if superres is None:
        return codes
    mean, sd = superres.texture_scaling
    standard = (torch.from_numpy(np.asarray(textures, np.float32)) - mean) / sd
    draws = superres.prior.inverse(draw_codes(model, codes), standard)
    draws = torch.where(draws.isfinite(), draws, 0.0)
    return torch.cat([codes, draws if codes.dim() == 2 else draws[:, None].expand(-1, codes.shape[1], -1)], -1)


def with_average_texture(model: Model, codes: Tensor) -> Tensor:
    """Codes of the generator itself (..., code), followed by the draw of the average texture, if it has any."""
    return F.pad(codes, (0, texture_length(model.generator)))


# Refinement


def objective(
    how: Refinement, model: Model, volumes: Tensor, latent_discriminator: LatentDiscriminator | None = None
) -> Callable[[Tensor], Tensor]:
    """The function of codes (n, code) or (n, layers, code) that refinement minimises, (n,): eqs. (7) and (10), twice
    the weighted sum of eqs. (3), (4) and (5) or (8), or as "norms" eq. (1) of Fetty et al. 2020."""
    volumes, which = volumes.to(place_of(model)), "penultimate" if how.loss == "squares" else "first"
    with torch.no_grad():
        features = critic_features(model.critic, volumes, which)

    def value(codes: Tensor) -> Tensor:
        drawn = trunk(model.generator).synthesize(codes)
        seen = critic_features(model.critic, drawn, which)
        if how.loss == "norms":
            return feature_norms(features, seen) + (volumes - drawn).flatten(1).norm(dim=1)
        terms = distortion(volumes, drawn), perceptual(features, seen), latent_loss(codes, latent_discriminator)
        return 2 * sum(w * term for w, term in zip(how.weights, terms, strict=True))

    return value


def losses(how: Refinement, model: Model, volumes: Tensor, codes: Tensor, latent_discriminator=None) -> Tensor:
    """What `objective` says of codes, (n,)."""
    with torch.no_grad():
        parts = zip(volumes.split(AT_ONCE), codes.split(AT_ONCE), strict=True)
        values = [objective(how, model, x, latent_discriminator)(z.to(place_of(model))) for x, z in parts]
    return torch.cat(values).cpu()


class Inverted(NamedTuple):
    """Codes in the shape of those at the start or with a style a layer, and the seconds all of them took together,
    those before an interruption included."""

    codes: Tensor
    seconds: float


def refine(
    start: Tensor, volumes: Tensor, model: Model, how: Refinement, *, latent_discriminator=None, state=None, say=print
) -> Inverted:
    """Codes that draw `volumes` (n, 1, z, y, x) better than the codes `start` (n, code), by eq. (7) or (10); with
    `how.space` "w+" (n, layers, code), every layer's style on its own.

    All volumes take every step together, and each goes its own way. With a folder `state` it goes on where it was
    killed. Raises `InputError` for "w+" where a generator has one style alone.
    """
    if how.space == "w+":
        if style_layers(model.generator) is None:
            raise InputError("refine.space: 'w+' needs a generator with a style a layer; accepted here is 'w'")
        start = as_styles(model, start)
    codes = nn.ParameterDict({"codes": start.clone().to(place_of(model))})
    adam = OPTIMISERS[how.optimiser](codes.parameters(), lr=how.rate, betas=how.betas)
    cuts = [slice(i, i + AT_ONCE) for i in range(0, len(start), AT_ONCE)]
    values = [objective(how, model, volumes[cut], latent_discriminator) for cut in cuts]
    data = [hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for t in (start, volumes)]

    def slope(cut: slice, value: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        part = codes["codes"][cut].detach().requires_grad_()
        total = value(part).sum()
        return total.item(), torch.autograd.grad(total, part)[0]

    def step(every: Callable, at: run.Progress) -> dict[str, float]:
        totals, slopes = zip(*every(slope, cuts, values), strict=True)
        codes["codes"].grad = torch.cat(slopes)
        adam.step()
        at.count(True)
        at.seen += 1
        return {"loss": sum(totals) / len(start)}

    identity = fingerprint(how, model.config["sha256"], data, CODE) if state else ""
    where = dict(state=state and Path(state), fingerprint=identity, name=f"refinement of {len(start)}")
    with side_by_side(len(cuts) if place_of(model).type == "cpu" else 1) as every:
        parts = dict(codes=codes, adam=adam)
        at = run.run(partial(step, every), parts, end=how.steps, **where, say=say, brief=True)
    return Inverted(codes["codes"].detach().cpu(), at.seconds)


def invert_all(
    volumes: Tensor, model: Model, inverter: Inverter, how: Refinement, *, state: str | Path, also=None, say=print
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Codes of volumes (n, 1, z, y, x) by encoder, optimisation and both (hybrid), and the seconds a volume of each.

    Optimisation alone starts at the mean code. A generator with a style a layer is inverted in W+ as well. The codes of
    volumes `also` are made by encoder and hybrid and follow behind the others'.
    """
    every, n = volumes if also is None else torch.cat([volumes, also]), len(volumes)
    start = time.monotonic()
    codes = {"encoder": encode(inverter.encoder, every)}
    seconds = {"encoder": (time.monotonic() - start) / len(every)}
    first = codes["encoder"]

    def refined(name, start, of, how=how, after=0.0):
        say(f"{name}: {how.steps} steps for {len(of)} volumes", flush=True)
        more = dict(latent_discriminator=inverter.latent_discriminator, state=Path(state) / name, say=say)
        found = refine(start, of, model, how, **more)
        codes[name], seconds[name] = found.codes, after + found.seconds / len(of)

    refined("hybrid", first, every, after=seconds["encoder"])
    refined("optimisation", own_codes(model, mean_code(model).cpu()).expand(n, -1), volumes)
    if style_layers(model.generator) is not None and how.space == "w":
        wide = how.model_copy(update=dict(space="w+"))
        refined("hybrid in W+", first[:n], volumes, wide, after=seconds["encoder"])
    return codes, seconds


def further_measures(
    how: Refinement, model: Model, volumes: Tensor, codes: Tensor, latent_discriminator: LatentDiscriminator | None
) -> dict[str, np.ndarray]:
    """Of every reconstruction (n,): the loss that refinement minimises, the critic's eq. (4), and eq. (5) or (8)."""
    eq4 = losses(Refinement(weights=(0, 0.5, 0)), model, volumes, codes)
    latent = losses(Refinement(weights=(0, 0, 0.5)), model, volumes, codes, latent_discriminator)
    return {
        "refinement loss": losses(how, model, volumes, codes, latent_discriminator).numpy(),
        "critic features, eq. (4)": eq4.numpy(),
        "latent, eq. (5)" if latent_discriminator is None else "latent, eq. (8)": latent.numpy(),
    }


# Codes on disk


def save_codes(
    folder: str | Path, model: Model, rows: list[dict], encoded: Tensor, refined: Tensor, textures: np.ndarray
) -> None:
    """codes.safetensors (`encoded` and `refined`, in the shape of styles) and codes.csv, one row a code. `rows` are
    rows of stacks.csv; a scan's name ends in its visit. `textures` (n, 5) are theirs, for `with_texture`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"encoded": encoded, "refined": refined}
    kept = {name: with_texture(model, as_styles(model, codes), textures) for name, codes in kept.items()}
    checkpoint.save_tensors(folder / "codes.safetensors", kept)
    table = []
    for i, row in enumerate(rows):
        who = {"scan": row["scan"], "patient": row["patient"], "visit": row["scan"].rpartition("_ses-")[2]}
        table.append(who | {"split": row["split"], "start": row["start"], "index": i})
    write_table(folder / "codes.csv", table)
