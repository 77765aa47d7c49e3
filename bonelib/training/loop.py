"""Train a GAN. Here is what a step of a progressive one is; time is counted in samples the critic has seen.

python -m bonelib.training.loop PROFILE MODEL [--params params.yaml] [--stacks DIR] [--grades FILE] [--superres DIR]
    [--to DIR] [--state DIR] [--start DIR] [--seed N] [--seconds S] [--timeout SECONDS]

trains a model of a profile, on a GPU if there is one, with the paths of the pipeline where no others are given. Behind
`torchrun --standalone --nproc-per-node 2 -m` instead of `python -m`, two processes share every batch and make the same
model. With `--seconds` it stops after so many seconds of training, writes the model as it is, and goes on when it is
run again.
"""

import argparse
import copy
import os
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bonelib import InputError, core, networks, training
from bonelib.core.cli import command
from bonelib.core.config import fingerprint, read_params
from bonelib.core.provenance import code_hash
from bonelib.core.pyramid import downsample, smeared
from bonelib.core.random import RankShard, torch_rng
from bonelib.networks.registry import build_critic, build_generator
from bonelib.scans import dataset
from bonelib.scans.dataset import Stacks, augmented, band_statistics, load_stacks, order
from bonelib.training import adaptive, checkpoint, distributed, hagan, losses, run, schedule
from bonelib.training.config import HierarchicalTrain, Train, training_section
from bonelib.training.distributed import Ranks
from bonelib.training.model_folder import (
    CURVES,
    Strip,
    Trained,
    keep_snapshot,
    kept_snapshots,
    own_grid,
    start_networks,
    write_model,
)
from bonelib.training.run import Progress

STRIP = 8  # fixed latents whose samples are kept along the training
STRIP_PER_STAGE = 2
PATHS_EVERY, PATH_DECAY = 4, 0.01  # updates between two of the path lengths, and how fast their mean moves
ROLLBACK_POINTS = 20  # in a training
WATCHED = 16  # train and held-out stacks on which the critic's gap is read
# A state made by other code is not continued
CODE = code_hash(networks, training, dataset, core)
SHOWN = ("stage", "fade", "distance", "slope")


class _Kind(NamedTuple):
    """A training of one kind of generator: what `start` makes of stacks that fit is trained, by what `step` returns."""

    name: str
    start: Callable[[Train | HierarchicalTrain, Stacks, int, Ranks], dict]
    step: Callable[[Trained], Callable[[Progress], dict]]
    curves: tuple[str, ...]
    shown: tuple[str, ...]


def train(
    params: Train | HierarchicalTrain,
    data: Stacks,
    folder: str | Path,
    *,
    state: str | Path,
    seed: int,
    superres: str | Path | None = None,
    start: str | Path | None = None,
    say=print,
    ranks: Ranks | None = None,
    seconds: float | None = None,
) -> dict:
    """Train one model on the training stacks and write it to `folder`; returns the final entry of its curves.

    Writes generator.safetensors (its running average where `ema` > 0), critic.safetensors, of a HA-GAN
    encoder.safetensors, config.json, curves.csv, growth.safetensors (samples of fixed latents along the training) and,
    where there are `snapshots`, what they kept as candidates/SEEN.safetensors, for `studies.selection` to choose from.
    Interrupted, the same call goes on from the newest state in `state`, bit for bit; `seconds`, rollback and ranks are
    those of `run.run`. Another number of ranks may go on, and gets the same up to rounding.

    Where a generator draws a coarser grid than that of `data`, the rest is drawn by the trained network in the folder
    `superres`, which is copied into the model. `start` is a model folder whose networks are trained further, from the
    beginning of the last stage on. Raises `InputError` where either is missing, or the stacks do not fit the generator.
    """
    folder, state, meta, kind = Path(folder), Path(state), data.meta, KINDS[type(params)]
    ranks = ranks or distributed.single_process()
    data, coarser = own_grid(params, data, superres)
    objects = kind.start(params, data, seed, ranks)
    began = start_networks(objects, start, say if ranks.rank == 0 else lambda *_: None)
    identity = fingerprint(params, data.meta["data_hash"], seed, CODE, began)
    at = run.run(
        kind.step(Trained(params, data, objects, seed, ranks, state)),
        objects,
        end=schedule.total(params.plan),
        begin=sum(params.plan.samples[:-1]) if began else 0,
        state=state,
        fingerprint=identity,
        name=kind.name,
        say=say,
        ranks=ranks,
        marks=ROLLBACK_POINTS,
        seconds=seconds,
        shown=kind.shown,
        time_left=partial(schedule.seconds_left, params.plan),
    )
    if ranks.rank == 0:
        parts = dict(average=objects["average"], critic=objects["critic"], growth=objects["growth"].kept)
        parts |= dict(candidates=kept_snapshots(at, state), began=began, superres=superres if coarser else None)
        more = {"encoder": objects["encoder"]} if "encoder" in objects else {}
        checkpoint.write_json(folder / "record.json", run.record(at, seed, ranks.device))
        write_model(folder, params, meta, **parts, run=identity, at=at, columns=kind.curves, more=more)
    return dict(zip(kind.curves, at.curves[-1], strict=True)) if at.curves else {}


def _start(params: Train, data: Stacks, seed: int, ranks: Ranks) -> dict:
    """Both networks, the generator's running average, optimisers, and the strip."""
    distributed.check_batches(params.schedule, ranks)
    rows, stages, device = data.of("train"), len(params.schedule.samples), ranks.device
    some = rows[:: max(1, len(rows) // 64)]
    statistics = torch.stack([band_statistics(data.pooled(some, stages - s - 1), params.haar) for s in range(stages)])
    torch.manual_seed(torch_rng(seed, "weights").initial_seed())
    generator = build_generator(params.generator, haar=params.haar, precision=params.precision)
    of_critic = dict(generator=params.generator, statistics=statistics)
    critic = build_critic(params.critic, haar=params.haar, precision=params.precision, **of_critic)
    generator, critic = generator.to(device), critic.to(device)
    average = copy.deepcopy(generator).requires_grad_(False)
    adam_g = torch.optim.Adam(generator.parameters(), lr=params.rate, betas=(0.0, 0.98), eps=1e-7, fused=True)
    adam_c = torch.optim.Adam(critic.parameters(), lr=params.rate, betas=(0.0, 0.98), eps=5e-5, fused=True)
    return dict(generator=generator, critic=critic, average=average, adam_g=adam_g, adam_c=adam_c, growth=Strip())


def _stepping(trained: Trained) -> Callable[[Progress], dict[str, float]]:
    data, stages = trained.data, len(trained.params.schedule.samples)

    @lru_cache(1)
    def pools(stage: int) -> dict[str, Tensor]:
        # One stage finer than needed, so that rotations are interpolated before the last halving
        return {split: data.pooled(data.of(split), max(0, stages - stage - 1)) for split in ("train", "held-out")}

    return partial(_step, trained._replace(pools=pools))


def _step(trained: Trained, at: Progress) -> dict[str, float]:
    """Updates of the critic, one of the generator, and what is kept along the way."""
    params, objects = trained.params, trained.objects
    now, begun = schedule.at(params.schedule, at.seen), at.seen
    for adam in (objects["adam_g"], objects["adam_c"]):
        adam.param_groups[0]["lr"] = params.rate * now.rate * 0.5**at.halved
    x, *of_critic, sign = _update_critic(trained, at, now)
    loss_g = _update_generator(trained, at, now, x)
    updates = now.into // (params.n_critic * now.batch)
    run.update_ema(objects["average"], objects["generator"], params.ema, updates)
    *read, sign = distributed.all_reduce_mean((*of_critic, loss_g, sign), trained.ranks)
    if params.adaptive:
        at.own["p"] = adaptive.update_probability(at.own.get("p", 0.0), sign, at.seen - begun, params.adaptive)
    _keep_strip(trained, at, now)
    keep_snapshot(params, objects["average"], at, begun, trained.state, trained.ranks)
    gap = _overfit(trained, at, now) if at.point_due else 0.0
    values = (at.steps + 1, now.stage, round(now.fade, 4), *read, sign, at.own.get("p", 0.0), gap)
    return dict(zip(CURVES[1:], values, strict=True))


def _update_critic(trained: Trained, at: Progress, now: schedule.Moment) -> tuple:
    """n_critic updates, whose generated volumes are made in one batch, as the generator rests meanwhile.

    The last real volumes, loss, distance and slope, and the mean sign of the scores of pairs.
    """
    params, ranks, seed = trained.params, trained.ranks, trained.seed
    generator, critic, batch = trained.objects["generator"], trained.objects["critic"], now.batch // ranks.size
    draws = RankShard(torch_rng(seed, "critic", at.steps), ranks.rank, ranks.size)
    latent = generator.sample_latent(params.n_critic * batch, draws).to(ranks.device)
    with torch.no_grad():
        styles = losses.mixed_styles(params.mixing, generator, latent, draws, now.stage)
        fakes = generator.synthesize(styles, now.stage, now.fade, draws)
    sign = 0.0
    for fake in fakes.split(batch):
        x = _real(trained, now, "train", at.seen + ranks.rank, batch, ranks.size)
        pair = _changed(trained, at, x, "real"), _changed(trained, at, fake, "generated")
        loss, on_real, on_fake, slope = losses.of_critic(params, critic, *pair, draws, now.stage, now.fade)
        at.count(run.update(trained.objects["adam_c"], loss, params.clip, ranks))
        sign += torch.sign(on_real - on_fake).mean().item() / params.n_critic
        at.seen += now.batch
    return x, loss, on_real.mean() - on_fake.mean(), slope.mean(), sign


def _update_generator(trained: Trained, at: Progress, now: schedule.Moment, x: Tensor) -> Tensor:
    """One update of the generator, whose volumes are paired with the real ones `x`; the loss."""
    params, ranks = trained.params, trained.ranks
    generator, critic = trained.objects["generator"], trained.objects["critic"]
    draws = RankShard(torch_rng(trained.seed, "generator", at.steps), ranks.rank, ranks.size)
    latent = generator.sample_latent(now.batch // ranks.size, draws).to(ranks.device)
    critic.requires_grad_(False)
    styles = losses.mixed_styles(params.mixing, generator, latent, draws, now.stage)
    fake = generator.synthesize(styles, now.stage, now.fade, draws)
    pair = _changed(trained, at, x, "real beside it"), _changed(trained, at, fake, "to be improved")
    loss = losses.of_generator(params, critic, *pair, now.stage, now.fade)
    if params.autocorrelation and now.decaying:
        loss = loss + params.autocorrelation * losses.autocorrelation_difference(x, fake)
    if params.histogram:
        loss = loss + params.histogram * losses.histogram_distance(x, fake)
    if params.path_length and at.steps % PATHS_EVERY == 0:
        loss = loss + params.path_length * PATHS_EVERY * _path_penalty(trained, at, now, draws)
    at.count(run.update(trained.objects["adam_g"], loss, params.clip, ranks))
    critic.requires_grad_(True)
    return loss


def _path_penalty(trained: Trained, at: Progress, now: schedule.Moment, draws) -> Tensor:
    """How far path lengths of half a batch are from their running mean, which is the same on every rank."""
    generator, ranks = trained.objects["generator"], trained.ranks
    latent = generator.sample_latent(max(1, now.batch // ranks.size // 2), draws).to(ranks.device)
    mean = at.own.get("path", 0.0)
    lengths = losses.path_lengths(generator, generator.to_styles(latent), draws, now.stage, now.fade)
    (length,) = distributed.all_reduce_mean((lengths.mean(),), ranks)
    at.own["path"] = mean + PATH_DECAY * (length - mean) if mean else length
    return (lengths - at.own["path"]).square().mean()


def _changed(trained: Trained, at: Progress, volumes: Tensor, purpose: str) -> Tensor:
    """Volumes as the critic sees them under adaptive augmentation."""
    first, p = at.seen + trained.ranks.rank, at.own.get("p", 0.0)
    return adaptive.augmented(volumes, purpose, first, trained.ranks.size, trained.seed, p)


def _real(trained: Trained, now: schedule.Moment, split: str, first: int, count: int, every: int = 1) -> Tensor:
    """`count` real volumes, every `every`th from sample number `first`, on the grid of the stage and faded like it."""
    params, pool = trained.params, trained.pools(now.stage)[split]
    stacks = pool[order(len(pool), first, count, trained.seed, every)].to(trained.ranks.device).float()
    stacks = augmented(stacks, first, trained.seed, params.augment, every)
    if stacks.shape[2] > trained.data.meta["stack_slices"] >> (len(params.schedule.samples) - now.stage):
        stacks = downsample(stacks)
    return now.fade * stacks + (1 - now.fade) * smeared(stacks) if now.fade < 1 else stacks


@torch.no_grad()
def _overfit(trained: Trained, at: Progress, now: schedule.Moment) -> float:
    """How much higher the critic scores training stacks than held-out ones."""
    critic = trained.objects["critic"]
    train, held_out = (
        critic(_real(trained, now, split, at.seen, WATCHED), now.stage, now.fade).mean().item()
        for split in trained.pools(now.stage)
    )
    return train - held_out


@torch.no_grad()
def _keep_strip(trained: Trained, at: Progress, now: schedule.Moment) -> None:
    """Samples of the fixed latents, at the end and at the start of every part of a stage."""
    part = [now.stage, now.into * STRIP_PER_STAGE // trained.params.schedule.samples[now.stage - 1]]
    if part == at.own.get("strip") and at.seen < at.end:
        return
    at.own["strip"], average = part, trained.objects["average"]
    latent = average.sample_latent(STRIP, torch_rng(trained.seed, "strip")).to(trained.ranks.device)
    noise = torch_rng(trained.seed, "strip noise")
    volumes = average.synthesize(average.to_styles(latent), now.stage, now.fade, noise)
    trained.objects["growth"].kept[f"{at.seen:010d}"] = volumes[:, 0].half().cpu()


KINDS = {
    Train: _Kind("GAN", _start, _stepping, CURVES, SHOWN),
    HierarchicalTrain: _Kind("HA-GAN", hagan.start, hagan.stepping, hagan.CURVES, hagan.SHOWN),
}


@command
def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("profile")
    cli.add_argument("model")
    cli.add_argument("--params", type=Path, default=Path("params.yaml"))
    cli.add_argument("--stacks", type=Path, help="out/PROFILE/stacks")
    cli.add_argument("--grades", type=Path, help="out/PROFILE/grading/grades.csv")
    cli.add_argument("--superres", type=Path, help="out/PROFILE/superres")
    cli.add_argument("--to", type=Path, help="out/PROFILE/models/MODEL")
    cli.add_argument("--state", type=Path, help="scratch/state/PROFILE/MODEL")
    cli.add_argument("--start", type=Path, help="a model folder whose networks are trained further")
    cli.add_argument("--seed", type=int, help="that of params.yaml")
    cli.add_argument("--seconds", type=float, help="of training, after which it stops")
    cli.add_argument("--timeout", type=float, default=distributed.TIMEOUT_S, help="seconds until a rank is given up")
    args = cli.parse_args()
    values = read_params(args.params)
    for kind, name, known in (
        ("profile", args.profile, values["profiles"]),
        ("model", args.model, values["profiles"].get(args.profile, {}).get("train", {})),
    ):
        if name not in known:
            raise InputError(f"{args.params}: no {kind} {name!r}; accepted are {', '.join(known)}")
    how = values["profiles"][args.profile]["train"][args.model]
    how = training_section(how, f"profiles.{args.profile}.train.{args.model}")
    out = Path("out") / args.profile
    stacks, grades = args.stacks or out / "stacks", args.grades or out / "grading" / "grades.csv"
    data, to = load_stacks(stacks, grades), args.to or out / "models" / args.model
    where = dict(
        state=args.state or Path("scratch/state") / args.profile / args.model,
        seed=values["seed"] if args.seed is None else args.seed,
        superres=args.superres or out / "superres",
        start=args.start,
    )
    try:
        with distributed.process_group(args.timeout) as ranks:
            train(how, data, to, ranks=ranks, seconds=args.seconds, **where)
            if ranks.rank == 0:
                print(f"the model is in {to}")
                if how.snapshots:
                    choose = f"python -m bonelib.studies.selection {to} --stacks {stacks} --grades {grades}"
                    print(f"the best of its snapshots is chosen by {choose}")
    except distributed.RankError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)  # at once: leaving in order would wait for those that do not answer


if __name__ == "__main__":
    sys.exit(main())
