"""Train the encoder of a generator, and load it (Angermann et al. 2023, section 3.5)."""

import copy
import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import Tensor

from bonelib import InputError, core, networks, training
from bonelib.core.config import fingerprint, section
from bonelib.core.provenance import code_hash
from bonelib.core.pyramid import downsample
from bonelib.core.random import torch_rng
from bonelib.latent import inversion
from bonelib.latent.config import EncoderTraining
from bonelib.latent.inversion import OPTIMISERS, Inverter, distortion, latent_loss, perceptual
from bonelib.latent.models import Model
from bonelib.networks.encoder import LatentDiscriminator, build_encoder, critic_features, trunk
from bonelib.scans import dataset
from bonelib.scans.dataset import Stacks, augmented, order
from bonelib.scans.tables import read_table, write_table
from bonelib.training import checkpoint, run

WATCHED = 8  # held-out volumes on which the curves are read as well
CURVES = ("seen", "dist", "perc", "latent", "held_out_dist", "held_out_perc", "latent_discriminator_auc")
CODE = code_hash(sys.modules[__name__], inversion, networks, training, dataset, core)


def train_encoder(
    params: EncoderTraining, model: Model, data: Stacks, folder: str | Path, *, state: str | Path, seed: int, say=print
) -> tuple[Inverter, list[dict]]:
    """Train the encoder of a model by eq. (6) or (9), or on sampled pairs (Fetty et al. 2020); returns its curves too.

    Writes encoder.safetensors, in float16, and encoder.json. Killed, it goes on from the newest state in `state`, bit
    for bit. Raises `InputError` if it diverges, or when asked to stop.
    """
    folder, state = Path(folder), Path(state)
    patients = sorted({row["patient"] for row in data.of("train")})
    identity = fingerprint(params, _learned_from(model.config["sha256"]), data.meta["data_hash"], patients, seed, CODE)
    torch.manual_seed(torch_rng(seed, "encoder weights").initial_seed())
    encoder, latent_discriminator = _new_inverter(params, model)
    average = copy.deepcopy(encoder).requires_grad_(False)
    optimiser = partial(OPTIMISERS[params.optimiser], lr=params.rate, betas=params.betas)
    objects = dict(encoder=encoder, average=average, adam_e=optimiser(encoder.parameters()))
    if latent_discriminator is not None:
        objects |= dict(latent_discriminator=latent_discriminator, adam_j=optimiser(latent_discriminator.parameters()))
    times = inversion.halvings(model, data.meta["stack_slices"])
    # On a grid once finer than needed, so that rotations are interpolated before the last halving
    pool = data.pooled(data.of("train"), max(0, times - 1))
    watched = inversion.targets(model, data, data.of("held-out")[:WATCHED]).to(inversion.place_of(model))
    with torch.no_grad():
        features = critic_features(model.critic, watched)
    step = partial(_step, params, model, objects, _Real(pool, bool(times), seed, watched), features)
    at = run.run(step, objects, end=params.samples, state=state, fingerprint=identity, name="encoder", say=say)
    inverter = _at_rest(Inverter(average, latent_discriminator))
    folder.mkdir(parents=True, exist_ok=True)
    # In float16, as it is published; what is used from here on is what was written
    weights = {k: v.half() if k.endswith("weight") else v for k, v in checkpoint.pack(**_parts(inverter)).items()}
    checkpoint.save_tensors(folder / "encoder.safetensors", weights)
    checkpoint.unpack(weights, **_parts(inverter))
    curves = [dict(zip(CURVES, point, strict=True)) for point in at.curves]
    write_table(folder / "encoder-curves.csv", curves)
    content = dict(run=identity, encoder=params.model_dump(mode="json"), model=_learned_from(model.config["sha256"]))
    checkpoint.write_json(folder / "encoder.json", content)
    return inverter, curves


def _learned_from(weights: dict[str, str]) -> dict[str, str]:
    """Of the hashes of a model's weights, those that its encoder depends on: super-resolution comes behind them."""
    return {name: digest for name, digest in weights.items() if not name.startswith("superres")}


def known_encoder(folder: str | Path, model: Model) -> tuple[Inverter, list[dict]]:
    """What `train_encoder` wrote to a folder: the encoder, and its curves. Raises `InputError` as `load_inverter`."""
    rows = read_table(Path(folder) / "encoder-curves.csv")
    return load_inverter(folder, model), [{k: float(v) if v else float("nan") for k, v in r.items()} for r in rows]


def load_inverter(folder: str | Path, model: Model) -> Inverter:
    """The encoder of a model from the folder it was written to. Raises `InputError` for another model's, or none."""
    file = Path(folder) / "encoder.json"
    if not file.is_file():
        raise InputError(f"{file}: no such file; 05_inversion writes it beside encoder.safetensors")
    config = json.loads(file.read_text(encoding="utf-8"))
    if _learned_from(config["model"]) != _learned_from(model.config["sha256"]):
        raise InputError(f"{file}: made for other weights than the model's; run 05_inversion again")
    inverter = _new_inverter(section(EncoderTraining, config["encoder"], f"{file}: encoder"), model)
    checkpoint.unpack(load_file(file.with_suffix(".safetensors")), **_parts(inverter))
    return _at_rest(inverter)


def _parts(inverter: Inverter) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in inverter._asdict().items() if part is not None}


def _at_rest(inverter: Inverter) -> Inverter:
    for part in _parts(inverter).values():
        part.requires_grad_(False).eval()
    return inverter


def _new_inverter(params: EncoderTraining, model: Model) -> Inverter:
    how, statistics = model.how, getattr(model.critic, "statistics", None)
    seen = dict(haar=how.haar, statistics=None if statistics is None else statistics[-1])
    encoder = build_encoder(how.generator, dense=params.dense, norm=params.norm, precision=how.precision, **seen)
    place, code = inversion.place_of(model), how.generator.code
    latent_discriminator = LatentDiscriminator(code).to(place) if params.prior == "discriminator" else None
    return Inverter(encoder.to(place), latent_discriminator)


class _Real(NamedTuple):
    """Real volumes, on a grid once finer than needed where that is to be `halved`; held-out ones that are watched."""

    pool: Tensor
    halved: bool
    seed: int
    watched: Tensor


def _step(params, model: Model, objects: dict, real: _Real, features: list[Tensor], at: run.Progress):
    """One update of the encoder, and of the latent discriminator; `features` are the critic's of what is watched."""
    generator, latent_discriminator = trunk(model.generator), objects.get("latent_discriminator")
    for adam in (objects[name] for name in objects if name.startswith("adam")):
        adam.param_groups[0]["lr"] = params.rate * run.rate_at(at.seen / at.end, params.final_decay)
    draws = torch_rng(real.seed, "encoder", at.seen)
    with torch.no_grad():
        latent = generator.sample_latent(params.batch, draws).to(inversion.place_of(model))
        mapped = generator.to_styles(latent, params.truncation)
    if params.pairs == "sampled":
        loss, terms, codes = _on_sampled_pairs(generator, objects["encoder"], mapped, draws)
    else:
        loss, terms, codes = _on_real_volumes(params, model, objects, real, at.seen)
    at.count(run.update(objects["adam_e"], loss, params.clip))
    auc = 0.5
    if latent_discriminator is not None:
        latent_discriminator.requires_grad_(True)
        codes = codes.detach()
        loss = F.softplus(-latent_discriminator(mapped)).mean() + F.softplus(latent_discriminator(codes)).mean()
        at.count(run.update(objects["adam_j"], loss, params.clip))
        auc = latent_discriminator_auc(latent_discriminator, mapped, codes)
    run.update_ema(objects["average"], objects["encoder"], params.ema, at.seen // params.batch)
    at.seen += params.batch
    with torch.no_grad():
        drawn = generator.synthesize(objects["average"](real.watched))
        unseen = distortion(real.watched, drawn), perceptual(features, critic_features(model.critic, drawn))
    values = (*(float(term.detach().mean()) for term in (*terms, *unseen)), auc)
    return dict(zip(CURVES[1:], values, strict=True))


def _on_sampled_pairs(generator, encoder, mapped: Tensor, draws) -> tuple[Tensor, tuple, Tensor]:
    """Loss, terms and codes of Fetty et al. 2020: the distance of the codes, and the l1 distance of the volumes."""
    with torch.no_grad():
        volumes = generator.synthesize(mapped, noise=draws)
    codes = encoder(volumes)
    apart = (codes - mapped).norm(dim=1)
    difference = (volumes - generator.synthesize(codes)).abs().flatten(1).mean(1)
    return (apart + difference).mean(), (difference, torch.zeros(len(codes)), apart), codes


def _on_real_volumes(params, model: Model, objects: dict, real: _Real, seen: int) -> tuple[Tensor, tuple, Tensor]:
    """Loss, terms and codes of eqs. (6) and (9)."""
    latent_discriminator = objects.get("latent_discriminator")
    volumes = real.pool[order(len(real.pool), seen, params.batch, real.seed)].to(inversion.place_of(model)).float()
    volumes = augmented(volumes, seen, real.seed, model.how.augment)
    volumes = downsample(volumes) if real.halved else volumes
    with torch.no_grad():
        features = critic_features(model.critic, volumes)
    codes = objects["encoder"](volumes)
    drawn = trunk(model.generator).synthesize(codes)
    if latent_discriminator is not None:
        latent_discriminator.requires_grad_(False)
    found = perceptual(features, critic_features(model.critic, drawn))
    terms = distortion(volumes, drawn), found, latent_loss(codes, latent_discriminator)
    return sum(w * term.mean() for w, term in zip(params.weights, terms, strict=True)), terms, codes


def latent_discriminator_auc(latent_discriminator: LatentDiscriminator, mapped: Tensor, encoded: Tensor) -> float:
    """How surely codes of the mapping network and of the encoder are told apart: the area under the ROC curve."""
    with torch.no_grad():
        scores = latent_discriminator(torch.cat([mapped, encoded])).cpu()
    return float(roc_auc_score([1] * len(mapped) + [0] * len(encoded), scores))
