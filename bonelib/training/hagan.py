"""HA-GAN: what a step of its training is (Sun et al. 2022, eqs. (2) to (8)). Time is counted in real volumes seen."""

import copy
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bonelib import InputError
from bonelib.core.pyramid import downsample
from bonelib.core.random import RankShard, torch_rng
from bonelib.networks.encoder import build_encoder
from bonelib.networks.registry import build_critic, build_generator
from bonelib.scans.dataset import Stacks, augmented, order
from bonelib.training import distributed, run
from bonelib.training.config import HierarchicalTrain
from bonelib.training.distributed import Ranks
from bonelib.training.model_folder import Strip, Trained, keep_snapshot
from bonelib.training.run import Progress

STRIP = 8  # fixed latents whose samples are kept along the training
STRIP_PARTS = 4  # of a training, at whose starts and end they are kept
WATCHED = 4  # train and held-out volumes on which the gap of the discriminators is read
CURVES = ("seen", "update", "critic_loss", "distance", "generator_loss", "by_features", "by_code", "overfit")
SHOWN = ("distance", "generator_loss", "by_features", "by_code")


class Part(NamedTuple):
    """The real volumes of one step: whole, on the grid of A, and the sub-volume of start r; and their classes (n,)."""

    whole: Tensor
    low: Tensor
    high: Tensor
    r: int
    labels: Tensor | None = None


def start(params: HierarchicalTrain, data: Stacks, seed: int, ranks: Ranks) -> dict:
    """`build`, for stacks of the grid that the generator draws, each of one of its classes, where it has any."""
    if params.batch % ranks.size:
        says = f"found {params.batch}, which {ranks.size} processes cannot share equally"
        raise InputError(f"params.yaml: batch: {says}; accepted are multiples of {ranks.size}")
    wanted = tuple(n << params.generator.stages for n in params.generator.base)
    found = (data.meta["stack_slices"], *data.volumes.shape[2:])
    if found != wanted:
        raise InputError(f"params.yaml: generator: it draws {wanted} voxels, but the stacks have {found}")
    count = params.generator.classes
    for row in data.rows if count else ():
        if row.get("class") not in range(count):
            says = f"found class {row.get('class')!r}; accepted are 0 to {count - 1}, as generator.classes is {count}"
            raise InputError(f"stacks.csv: scan {row['scan']}: {says}")
    return build(params, seed, ranks.device)


def build(params: HierarchicalTrain, seed: int, device: torch.device) -> dict:
    """What is trained, at its start: all networks, the generator's running average, four optimisers, and the strip."""
    torch.manual_seed(torch_rng(seed, "weights").initial_seed())
    generator = build_generator(params.generator, precision=params.precision).to(device)
    critic = build_critic(params.critic, generator=params.generator, precision=params.precision).to(device)
    adam = partial(torch.optim.Adam, betas=params.betas, fused=True)
    objects = dict(generator=generator, critic=critic, average=copy.deepcopy(generator).requires_grad_(False))
    objects["adam_g"] = adam(_used(generator, params.low), lr=params.rate)
    objects["adam_c"] = adam(_used(critic, params.low), lr=params.critic_rate)
    if params.encode:
        encoder = build_encoder(params.generator, precision=params.precision).to(device)
        ground = [*encoder.ground.parameters(), *encoder.code.parameters()]
        objects |= dict(encoder=encoder, adam_eh=adam(encoder.high.parameters(), lr=params.encoder_rate))
        objects |= dict(adam_eg=adam(ground, lr=params.encoder_rate))
    return objects | dict(growth=Strip())


def _used(network: torch.nn.Module, low: bool) -> list[torch.nn.Parameter]:
    """The parameters of a network, without those of its coarse branch, "low...", where that is left out."""
    return [p for name, p in network.named_parameters() if low or not name.startswith("low")]


def stepping(trained: Trained):
    """The step of a training, for `run.run`."""
    return partial(_step, trained)


def _step(trained: Trained, at: Progress) -> dict[str, float]:
    """One update of the discriminators, of the generator, of E^H and of E^G, with the same real volumes and r."""
    params, objects, ranks = trained.params, trained.objects, trained.ranks
    decay = run.rate_at(at.seen / at.end, params.final_decay) * 0.5**at.halved
    for name, adam in objects.items():
        if name.startswith("adam"):
            rate = {"adam_g": params.rate, "adam_c": params.critic_rate}.get(name, params.encoder_rate)
            adam.param_groups[0]["lr"] = rate * decay
    real, begun = _real(trained, at), at.seen
    at.seen += params.batch
    losses = update_all(trained, at, real)
    run.update_ema(objects["average"], objects["generator"], params.ema, at.steps)
    read = distributed.all_reduce_mean(losses, ranks)
    _keep_strip(trained, at)
    keep_snapshot(params, objects["average"], at, begun, trained.state, ranks)
    gap = _overfit(trained, at) if at.point_due else 0.0
    return dict(zip(CURVES[1:], (at.steps + 1, *read, gap), strict=True))


def update_all(trained: Trained, at: Progress, real: Part) -> tuple:
    """The four updates; losses of the discriminators, the mean logit of real less of generated, and other losses."""
    on_critic, loss_g = _update_critic(trained, at, real), _update_generator(trained, at, real.r)
    of_encoder = _update_encoder(trained, at, real) if trained.params.encode else (0.0, 0.0)
    return (*on_critic, loss_g, *of_encoder)


def _real(trained: Trained, at: Progress) -> Part:
    """The real volumes of a step that belong to this rank; r is the same on all."""
    params, grid = trained.params, trained.objects["generator"].grid
    first, every = at.seen + trained.ranks.rank, trained.ranks.size
    whole, labels = _volumes(trained, "train", first, params.batch // every, every)
    whole = augmented(whole, first, trained.seed, params.augment, every)
    draws = torch_rng(trained.seed, "sub-volume", at.steps)
    starts = range(grid.starts) if params.random else grid.partition()
    r = starts[int(torch.randint(len(starts), (), generator=draws))]
    return Part(whole, _coarse(whole, grid.scale), grid.high(whole, r), r, labels)


def _volumes(trained: Trained, split: str, first: int, count: int, every: int = 1) -> tuple[Tensor, Tensor | None]:
    """Volumes and, of a conditional model, their classes."""
    rows, device = trained.data.of(split), trained.ranks.device
    chosen = [rows[i] for i in order(len(rows), first, count, trained.seed, every)]
    conditional = trained.params.generator.classes > 0
    labels = torch.tensor([row["class"] for row in chosen], device=device) if conditional else None
    return trained.data.pooled(chosen, 0).to(device).float(), labels


def _coarse(x: Tensor, scale: int) -> Tensor:
    """X^L: block means. (The published code takes every fourth voxel, which keeps the noise of one voxel.)"""
    for _ in range(scale.bit_length() - 1):
        x = downsample(x)
    return x


def _latents(trained: Trained, purpose: str, at: Progress) -> Tensor:
    draws = RankShard(torch_rng(trained.seed, purpose, at.steps), trained.ranks.rank, trained.ranks.size)
    generator = trained.objects["generator"]
    return generator.sample_latent(trained.params.batch // trained.ranks.size, draws).to(trained.ranks.device)


def _update_critic(trained: Trained, at: Progress, real: Part) -> tuple[Tensor, Tensor]:
    """One update of both discriminators, eqs. (4) and (5); the loss, and the mean logit of real less of generated."""
    params, generator, critic = trained.params, trained.objects["generator"], trained.objects["critic"]
    with torch.no_grad():
        a = generator.features(_latents(trained, "discriminators", at))
        pairs = [(real.high, generator.draw_part(a, real.r), partial(critic.judge_high, r=real.r))]
        if params.low:
            pairs.append((real.low, generator.draw_low(a), critic.judge_low))
        del a
    loss, distance = 0.0, 0.0
    for x, fake, judge in pairs:
        logits, classes = judge(torch.cat([x, fake]))
        on_real, on_fake = logits.chunk(2)
        loss = loss + F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
        if classes is not None:  # of real volumes alone, as published code has it
            loss = loss + F.cross_entropy(classes[: len(x)], real.labels)
        distance = distance + (on_real.mean() - on_fake.mean()).detach() / len(pairs)
    at.count(_update(trained, "adam_c", loss))
    return loss.detach(), distance


def _update_generator(trained: Trained, at: Progress, r: int) -> Tensor:
    """One update of the generator, which raises log D of what it draws (not saturating, as published code has it)."""
    params, generator, critic = trained.params, trained.objects["generator"], trained.objects["critic"]
    latent = _latents(trained, "generator", at)
    a = generator.features(latent)
    critic.requires_grad_(False)
    judged = [critic.judge_high(generator.draw_part(a, r), r)]
    if params.low:
        judged.append(critic.judge_low(generator.draw_low(a)))
    loss = sum(F.softplus(-logits).mean() for logits, _ in judged)
    if generator.classes:
        wanted = latent[:, generator.latent :].argmax(1)
        loss = loss + params.class_weight * sum(F.cross_entropy(classes, wanted) for _, classes in judged)
    at.count(_update(trained, "adam_g", loss))
    critic.requires_grad_(True)
    return loss.detach()


def _update_encoder(trained: Trained, at: Progress, real: Part) -> tuple[Tensor, Tensor]:
    """One update of E^H by eq. (6), then one of E^G by eq. (7); the l1 distances of sub-volumes by either's codes."""
    params, generator, encoder = trained.params, trained.objects["generator"], trained.objects["encoder"]
    generator.requires_grad_(False)
    by_features = F.l1_loss(generator.draw_high(encoder.part(real.high)), real.high)
    at.count(_update(trained, "adam_eh", params.lambdas[0] * by_features))
    with torch.no_grad():
        features = encoder.features(real.whole)
    a = generator.features(generator.of_class(encoder.encode(features), real.labels))
    by_code = F.l1_loss(generator.draw_part(a, real.r), real.high)
    loss = by_code + F.l1_loss(generator.draw_low(a), real.low) if params.low else by_code
    at.count(_update(trained, "adam_eg", params.lambdas[1] * loss))
    generator.requires_grad_(True)
    return by_features.detach(), by_code.detach()


def _update(trained: Trained, name: str, loss: Tensor) -> bool:
    clip = trained.params.clip or float("inf")
    return run.update(trained.objects[name], loss, clip, trained.ranks)


@torch.no_grad()
def _overfit(trained: Trained, at: Progress) -> float:
    """How much higher the discriminators score training volumes than held-out ones."""
    critic = trained.objects["critic"].eval()
    scores = [critic(_volumes(trained, split, at.seen, WATCHED)[0]).mean().item() for split in ("train", "held-out")]
    critic.train()
    return scores[0] - scores[1]


@torch.no_grad()
def _keep_strip(trained: Trained, at: Progress) -> None:
    """Samples of the fixed latents: coarse ones along the training, in the end on a grid half as fine as the volume."""
    part, average = at.seen * STRIP_PARTS // at.end, trained.objects["average"]
    if part == at.own.get("strip", -1):
        return
    at.own["strip"] = part
    styles = average.sample_latent(STRIP, torch_rng(trained.seed, "strip")).to(trained.ranks.device)
    early = at.seen < at.end and trained.params.low
    stage = average.low_stage if early else average.stages - 1
    drawn = [average.synthesize(one, stage)[:, 0].half().cpu() for one in styles.split(1)]
    trained.objects["growth"].kept[f"{at.seen:010d}"] = torch.cat(drawn)
