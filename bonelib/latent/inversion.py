"""GAN inversion: codes of real bones by an encoder, then by optimisation (Angermann et al. 2023, section 3.5).

Codes are sought on the grid that the generator itself draws. Where super-resolution follows it, the texture of a bone
is read off the scan and joins the code at the end (`with_texture`).
"""

import copy
import hashlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from bonelib import InputError, core, networks, training
from bonelib.core.config import fingerprint
from bonelib.core.provenance import code_hash
from bonelib.core.pyramid import downsample
from bonelib.core.random import torch_rng
from bonelib.latent.codes import mean_code
from bonelib.latent.models import Model, enlarge
from bonelib.networks.encoder import (
    Encoder,
    LatentDiscriminator,
    build_encoder,
    critic_features,
    style_layers,
    texture_length,
    trunk,
)
from bonelib.params import EncoderTraining, Refinement, Train, section
from bonelib.scans import dataset
from bonelib.scans.dataset import Stacks, augmented, order
from bonelib.scans.tables import read_table, write_table
from bonelib.training import checkpoint, distributed, run
from bonelib.training.run import SAVE_EVERY_S, SAY_EVERY_S

WATCHED = 8  # held-out volumes on which the curves are read as well
AT_ONCE = 32  # volumes whose gradients are computed together
CURVES = ("seen", "dist", "perc", "latent", "held_out_dist", "held_out_perc", "told_apart")
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


def latent_prior_loss(codes: Tensor) -> Tensor:
    """Eq. (5): half the mean square of codes that should follow N(0, I)."""
    return 0.5 * codes.square().flatten(1).mean(1)


def latent_adversarial_loss(latent_discriminator: LatentDiscriminator, codes: Tensor) -> Tensor:
    """Eq. (8): -log D_W of the codes, whose 512 summands are all the same; of several styles a code their mean."""
    return F.softplus(-latent_discriminator(codes.flatten(0, -2))).reshape(len(codes), -1).mean(1)


def feature_norms(real: list[Tensor], drawn: list[Tensor]) -> Tensor:
    """Eq. (2) of Fetty et al. 2020: the Euclidean norms of the differences of features, summed over resolutions."""
    return sum((a - b).flatten(1).norm(dim=1) for a, b in zip(real, drawn, strict=True))


def told_apart(latent_discriminator: LatentDiscriminator, mapped: Tensor, encoded: Tensor) -> float:
    """How surely codes of the mapping network and of the encoder are told apart: the area under the ROC curve."""
    with torch.no_grad():
        difference = latent_discriminator(mapped)[:, None] - latent_discriminator(encoded)
    return float((difference > 0).float().mean() + 0.5 * (difference == 0).float().mean())


# Volumes and codes


def on_device(model: Model) -> Model:
    """The model with its generator and critic on the GPU, if there is one; all that follows then works there.

    Volumes and codes are given and come back on the CPU. Super-resolution stays where it is.
    """
    for part in (trunk(model.generator), model.critic):
        part.to(distributed.alone().device)
    return model


def _place(model: Model) -> torch.device:
    return next(model.critic.parameters()).device


def halvings(model: Model, slices: int) -> int:
    """How often stacks of `slices` slices are averaged down to the grid that the model's generator draws."""
    how = section(Train, model.config["train"], "train")
    return max(0, round(slices / 2 ** len(how.schedule.samples)).bit_length() - 1)


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
    place = encoder.statistics.device
    with torch.no_grad():
        return torch.cat([encoder(part.to(place)).cpu() for part in volumes.split(AT_ONCE)])


def draw_codes(model: Model, codes: Tensor) -> Tensor:
    """What the generator itself draws of codes, without noise and without super-resolution, (n, 1, z, y, x)."""
    generator, place = trunk(model.generator), _place(model)
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
    """Volumes of the generator's own grid (n, 1, z, y, x) at full size (n, z, y, x), through its super-resolution.

    The noise of number i is the same for all volumes of one seed, so that two volumes differ by what was given alone.
    """
    superres = getattr(model.generator, "superres", None)
    return coarse[:, 0].numpy() if superres is None else enlarge(superres, coarse[:, 0].numpy(), seed)


def with_texture(model: Model, codes: Tensor, textures: np.ndarray) -> Tensor:
    """Codes of the generator itself, followed by the draw that gives their bones the texture of scans.

    `textures` (n, 5) are those of `dataset.load_textures`; where a scan has none, the draw is 0. Codes of a model
    without super-resolution stay as they are.
    """
    superres = getattr(model.generator, "superres", None)
    if superres is None:
        return codes
    mean, sd = superres.texture_scaling
    standard = (torch.from_numpy(np.asarray(textures, np.float32)) - mean) / sd
    draws = superres.prior.inverse(draw_codes(model, codes), standard)
    draws = torch.where(draws.isfinite(), draws, 0.0)
    return torch.cat([codes, draws if codes.dim() == 2 else draws[:, None].expand(-1, codes.shape[1], -1)], -1)


# Encoder training


def train_encoder(
    params: EncoderTraining,
    model: Model,
    data: Stacks,
    folder: str | Path,
    *,
    state: str | Path,
    seed: int,
    say=print,
) -> tuple[Inverter, list[dict]]:
    """Train the encoder of a model by eq. (6) or (9), or on sampled pairs (Fetty et al. 2020); returns its curves too.

    Writes encoder.safetensors and encoder.json. The generator and its critic stay as they are. Killed, it goes on from
    the newest state in `state`, bit for bit. Raises `InputError` if it diverges, or when asked to stop.
    """
    folder, state = Path(folder), Path(state)
    patients = sorted({row["patient"] for row in data.of("train")})
    identity = fingerprint(params, model.config["sha256"], data.meta["data_hash"], patients, seed, CODE)
    inverter, points = _train_encoder(params, model, data, state, identity, seed, say)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: part for name, part in inverter._asdict().items() if part is not None}
    checkpoint.save_tensors(folder / "encoder.safetensors", checkpoint.pack(**parts))
    content = {"run": identity, "encoder": json.loads(params.model_dump_json()), "model": model.config["sha256"]}
    curves = [dict(zip(CURVES, point, strict=True)) for point in points]
    write_table(folder / "encoder-curves.csv", curves)
    checkpoint.write_json(folder / "encoder.json", content)
    return inverter, curves


def known_encoder(folder: str | Path, model: Model) -> tuple[Inverter, list[dict]]:
    """What `train_encoder` wrote to a folder: the encoder, and its curves. Raises `InputError` as `load_inverter`."""
    rows = read_table(Path(folder) / "encoder-curves.csv")
    return load_inverter(folder, model), [{k: float(v) if v else float("nan") for k, v in r.items()} for r in rows]


def load_inverter(folder: str | Path, model: Model) -> Inverter:
    """The encoder of a model from the folder it was written to. Raises `InputError` for another model's, or none."""
    folder = Path(folder)
    if not (folder / "encoder.json").is_file():
        raise InputError(f"{folder / 'encoder.json'}: no such file; 05_inversion writes it beside encoder.safetensors")
    config = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    if config["model"] != model.config["sha256"]:
        raise InputError(f"{folder / 'encoder.json'}: made for other weights than the model's; run 05_inversion again")
    inverter = _new_inverter(section(EncoderTraining, config["encoder"], f"{folder / 'encoder.json'}: encoder"), model)
    parts = {name: part for name, part in inverter._asdict().items() if part is not None}
    checkpoint.unpack(load_file(folder / "encoder.safetensors"), **parts)
    return _at_rest(inverter)


def _new_inverter(params: EncoderTraining, model: Model) -> Inverter:
    how = section(Train, model.config["train"], "train")
    statistics = getattr(model.critic, "statistics", None)
    encoder = build_encoder(
        how.generator,
        dense=params.dense,
        norm=params.norm,
        haar=how.haar,
        precision=how.precision,
        statistics=None if statistics is None else statistics[-1],
    )
    code = encoder.to_code.weight.shape[0]
    latent_discriminator = LatentDiscriminator(code).to(_place(model)) if params.prior == "discriminator" else None
    return Inverter(encoder.to(_place(model)), latent_discriminator)


def _at_rest(inverter: Inverter) -> Inverter:
    for part in inverter:
        if part is not None:
            part.requires_grad_(False).eval()
    return inverter


def _train_encoder(params, model, data, state, identity, seed, say) -> tuple[Inverter, list]:
    augment = section(Train, model.config["train"], "train").augment
    generator, critic, place = trunk(model.generator), model.critic, _place(model)
    torch.manual_seed(torch_rng(seed, "encoder weights").initial_seed())
    encoder, latent_discriminator = _new_inverter(params, model)
    average = copy.deepcopy(encoder).requires_grad_(False)
    optimiser = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam}[params.optimiser]
    adam_e = optimiser(encoder.parameters(), lr=params.rate, betas=params.betas)
    objects = dict(encoder=encoder, average=average, adam_e=adam_e)
    if latent_discriminator is not None:
        adam_j = optimiser(latent_discriminator.parameters(), lr=params.rate, betas=params.betas)
        objects |= dict(latent_discriminator=latent_discriminator, adam_j=adam_j)
    n, times = params.batch, halvings(model, data.meta["stack_slices"])
    # On a grid once finer than needed, so that rotations are interpolated before the last halving
    pool = data.pooled(data.of("train"), max(0, times - 1))
    watched = targets(model, data, data.of("held-out")[:WATCHED]).to(place)
    with torch.no_grad():
        watched_features = critic_features(critic, watched)

    def train_step(at: run.Progress) -> dict[str, float]:
        for adam in (objects[name] for name in objects if name.startswith("adam")):
            adam.param_groups[0]["lr"] = params.rate * run.rate_at(at.seen / at.end, params.final_decay)
        draws = torch_rng(seed, "encoder", at.seen)
        with torch.no_grad():
            mapped = generator.to_styles(generator.sample_latent(n, draws).to(place), params.truncation)
        if params.pairs == "sampled":
            with torch.no_grad():
                volumes = generator.synthesize(mapped, noise=draws)
            codes = encoder(volumes)
            drawn = generator.synthesize(codes)
            # Fetty et al. 2020: the distance of the codes, and the l1 distance of the volumes
            apart = (codes - mapped).norm(dim=1)
            shown = (volumes - drawn).abs().flatten(1).mean(1), torch.zeros(n), apart
            loss = (apart + shown[0]).mean()
        else:
            volumes = pool[order(len(pool), at.seen, n, seed)].to(place).float()
            volumes = augmented(volumes, at.seen, seed, augment)
            volumes = downsample(volumes) if times else volumes
            with torch.no_grad():
                features = critic_features(critic, volumes)
            codes = encoder(volumes)
            drawn = generator.synthesize(codes)
            if latent_discriminator is not None:
                latent_discriminator.requires_grad_(False)
            latent = (
                latent_prior_loss(codes)
                if latent_discriminator is None
                else latent_adversarial_loss(latent_discriminator, codes)
            )
            shown = distortion(volumes, drawn), perceptual(features, critic_features(critic, drawn)), latent
            loss = sum(w * term.mean() for w, term in zip(params.weights, shown, strict=True))  # eqs. (6), (9)
        at.count(run.update(adam_e, loss, params.clip))
        if latent_discriminator is not None:
            latent_discriminator.requires_grad_(True)
            codes = codes.detach()
            loss_j = F.softplus(-latent_discriminator(mapped)).mean() + F.softplus(latent_discriminator(codes)).mean()
            at.count(run.update(adam_j, loss_j, params.clip))
        run.update_ema(average, encoder, params.ema, at.seen // n)
        at.seen += n
        with torch.no_grad():
            now = generator.synthesize(average(watched))
            unseen = distortion(watched, now), perceptual(watched_features, critic_features(critic, now))
        auc = 0.5 if latent_discriminator is None else told_apart(latent_discriminator, mapped, codes)
        return dict(zip(CURVES[1:], [*(float(term.detach().mean()) for term in (*shown, *unseen)), auc], strict=True))

    at = run.run(train_step, objects, end=params.samples, state=state, fingerprint=identity, name="encoder", say=say)
    return _at_rest(Inverter(average, latent_discriminator)), at.curves


# Refinement


def objective(
    how: Refinement, model: Model, volumes: Tensor, latent_discriminator: LatentDiscriminator | None = None
) -> partial[Tensor]:
    """The function of codes (n, code) or (n, layers, code) that refinement minimises, one value a volume, (n,).

    `how.loss` "squares": eqs. (7) and (10), which are twice the weighted sum of eqs. (3), (4) and (5) or (8); "norms":
    eq. (1) of Fetty et al. 2020.
    """
    volumes = volumes.to(_place(model))
    with torch.no_grad():
        features = critic_features(model.critic, volumes, _features(how))
    return partial(_objective, how, model, volumes, features, latent_discriminator)


def _features(how: Refinement) -> str:
    return "penultimate" if how.loss == "squares" else "first"


def _objective(how, model, volumes, features, latent_discriminator, codes) -> Tensor:
    drawn = trunk(model.generator).synthesize(codes)
    seen = critic_features(model.critic, drawn, _features(how))
    if how.loss == "norms":
        return feature_norms(features, seen) + (volumes - drawn).flatten(1).norm(dim=1)
    latent = (
        latent_prior_loss(codes)
        if latent_discriminator is None
        else latent_adversarial_loss(latent_discriminator, codes)
    )
    terms = distortion(volumes, drawn), perceptual(features, seen), latent
    return 2 * sum(w * term for w, term in zip(how.weights, terms, strict=True))


def losses(
    how: Refinement,
    model: Model,
    volumes: Tensor,
    codes: Tensor,
    latent_discriminator: LatentDiscriminator | None = None,
) -> Tensor:
    """What `objective` says of codes, (n,)."""
    with torch.no_grad():
        parts = zip(volumes.split(AT_ONCE), codes.split(AT_ONCE), strict=True)
        return torch.cat([objective(how, model, x, latent_discriminator)(z.to(_place(model))).cpu() for x, z in parts])


class Inverted(NamedTuple):
    """Codes in the shape of those at the start or with a style a layer, and the seconds all of them took together,
    those before an interruption included."""

    codes: Tensor
    seconds: float


def refine(
    start: Tensor,
    volumes: Tensor,
    model: Model,
    how: Refinement,
    *,
    latent_discriminator: LatentDiscriminator | None = None,
    state: str | Path | None = None,
    say=print,
) -> Inverted:
    """Codes that draw `volumes` (n, 1, z, y, x) better than the codes `start`, by eq. (7) or (10).

    `start` is (n, code), and so is the result; with `how.space` "w+" the result is (n, layers, code), every layer's
    style on its own. All volumes take every step together, and each goes its own way. With a folder `state` it goes on
    where it was killed. Raises `InputError` for "w+" where a generator has one style alone.
    """
    if how.space == "w+":
        if style_layers(model.generator) is None:
            raise InputError("refine.space: 'w+' needs a generator with a style a layer; accepted here is 'w'")
        start = as_styles(model, start)
    codes = nn.Parameter(start.clone().to(_place(model)))
    optimiser = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam}[how.optimiser]
    adam = optimiser([codes], lr=how.rate, betas=how.betas)
    cuts = [slice(i, i + AT_ONCE) for i in range(0, len(codes), AT_ONCE)]
    values = [objective(how, model, volumes[cut], latent_discriminator) for cut in cuts]
    identity, done, before = None, 0, 0.0
    if state is not None:
        state = Path(state)
        data = [hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for t in (start, volumes)]
        identity = fingerprint(how, model.config["sha256"], data, CODE)
        if found := checkpoint.load_state(state, identity):
            done, before = found[1]["seen"], found[1]["seconds"]
            codes.data.copy_(found[0].pop("codes"))
            checkpoint.unpack(found[0], adam=adam)
            say(f"refinement continues at step {done} of {how.steps}", flush=True)
    begun = saved = said = time.monotonic()
    said_at = done
    while done < how.steps:
        adam.zero_grad()
        for cut, value in zip(cuts, values, strict=True):
            value(codes[cut]).sum().backward()
        adam.step()
        done += 1
        clock = time.monotonic()
        if clock - said > SAY_EVERY_S:
            left = (how.steps - done) * (clock - said) / (done - said_at)
            say(f"refinement of {len(codes)} | step {done}/{how.steps} | about {left / 60:.1f} min left", flush=True)
            said, said_at = clock, done
        if state is not None and (clock - saved > SAVE_EVERY_S or done == how.steps):
            saved = clock
            tensors = {"codes": codes.data, **checkpoint.pack(adam=adam)}
            checkpoint.save_state(state, tensors, dict(seen=done, seconds=before + clock - begun, fingerprint=identity))
    return Inverted(codes.detach().cpu(), before + time.monotonic() - begun)


def invert_all(
    volumes: Tensor,
    model: Model,
    inverter: Inverter,
    how: Refinement,
    *,
    state: str | Path,
    also: Tensor | None = None,
    say=print,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Codes of volumes (n, 1, z, y, x) by encoder, optimisation and both (hybrid), and the seconds a volume of each.

    Optimisation alone starts at the mean code. A generator with a style a layer is inverted in W+ as well, if `how`
    does not already. The codes of volumes `also` are made by encoder and hybrid and follow behind the others'.
    """
    every, n = volumes if also is None else torch.cat([volumes, also]), len(volumes)
    start = time.monotonic()
    codes = {"encoder": encode(inverter.encoder, every)}
    seconds = {"encoder": (time.monotonic() - start) / len(every)}
    first = codes["encoder"]

    def refined(name, start, of, how=how, after=0.0):
        say(f"{name}: {how.steps} steps for {len(of)} volumes", flush=True)
        found = refine(
            start, of, model, how, latent_discriminator=inverter.latent_discriminator, state=Path(state) / name, say=say
        )
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
    """codes.safetensors (`encoded` and `refined`, in the shape of styles) and codes.csv, one row a code.

    `rows` are rows of stacks.csv; a scan's name ends in its visit. `textures` (n, 5) are theirs, for `with_texture`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"encoded": encoded, "refined": refined}
    kept = {name: with_texture(model, as_styles(model, codes), textures) for name, codes in kept.items()}
    checkpoint.save_tensors(folder / "codes.safetensors", kept)
    table = [
        {key: row[key] for key in ("scan", "patient")}
        | {"visit": row["scan"].rpartition("_ses-")[2], "split": row["split"], "start": row["start"], "index": i}
        for i, row in enumerate(rows)
    ]
    write_table(folder / "codes.csv", table)
