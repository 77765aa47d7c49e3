"""The progressive trainer: one loop. Time is counted in samples the critic has seen.

python -m bonelib.training.loop PROFILE MODEL [--params params.yaml] [--stacks DIR] [--grades FILE] [--superres DIR]
    [--to DIR] [--state DIR] [--seed N] [--timeout SECONDS]

trains a model of a profile, on a GPU if there is one, with the paths of the pipeline where no others are given. Behind
`torchrun --standalone --nproc-per-node 2 -m` instead of `python -m`, two processes share every batch and make the same
model.
"""

import argparse
import contextlib
import copy
import csv
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bonelib import InputError, core, networks, training
from bonelib.core.config import fingerprint
from bonelib.core.provenance import code_hash
from bonelib.core.pyramid import downsample, upsample
from bonelib.core.random import Part, torch_rng
from bonelib.networks import build_critic, build_generator
from bonelib.params import Augment, Train, check_file, section
from bonelib.scans import dataset
from bonelib.scans.dataset import Stacks, augmented, band_statistics, halved, load_stacks, order, set_apart
from bonelib.training import adaptive, checkpoint, distributed, losses, run, schedule
from bonelib.training.distributed import Ranks
from bonelib.training.run import CURVE_EVERY, MAX_IN_A_ROW, SAVE_EVERY_S, SAY_EVERY_S

STRIP = 8  # fixed latents whose samples are kept along the training
STRIP_PER_STAGE = 2
MARKS = 20  # in a training, to which it can go back
HALVINGS = 2  # of the rate, before a training that diverges is given up
WATCHED = 16  # train and held-out stacks on which the critic's gap is read
# A state made by other code is not continued
CODE = code_hash(networks, training, dataset, core)
CURVES = ("seen", "update", "stage", "fade", "critic_loss", "distance", "slope", "generator_loss", "overfit")
CURVES += ("sign", "augmented")  # of the scores of pairs; the probability of the adaptive augmentation


@dataclass
class Progress(run.Progress):
    """How far a training is; `seen` counts samples of the critic, `steps` updates of the generator."""

    halved: int = 0  # how often the rate was halved
    p: float = 0.0  # probability of the adaptive augmentation
    strip: list[int] | None = None  # the part of a stage in which the last samples of the fixed latents were kept
    snapshots: list[int] = field(default_factory=list)  # samples seen at each


def train(
    params: Train,
    data: Stacks,
    folder: str | Path,
    *,
    state: str | Path,
    seed: int,
    superres: str | Path | None = None,
    start: str | Path | None = None,
    say=print,
    ranks: Ranks | None = None,
) -> dict:
    """Train one model on the training stacks and write it to `folder`; returns the final entry of its curves.

    Writes generator.safetensors (its running average where `ema` > 0), critic.safetensors, config.json, curves.csv,
    growth.safetensors (samples of fixed latents along the training) and, where there are `snapshots`, what they kept as
    candidates/SEEN.safetensors, for `evaluation.selection` to choose from. Interrupted, the same call goes on from
    the newest state in `state`, bit for bit: every random number is keyed by the seed and a running count.

    A training that diverges goes back to its last mark, a state saved at a fixed number of samples, with half the rate.

    Where the stages end on a coarser grid than that of `data`, the rest is drawn by the trained network in the folder
    `superres`, which is copied into the model. `start` is a model folder whose networks are trained further, from the
    beginning of the last stage on.

    Of several `ranks` each makes its part of every batch, sample number i on rank i mod their number, and all of them
    take the same steps. Rank 0 alone reads and writes states, writes the model and says anything. How many they are is
    no part of the state: another number may go on, and gets the same up to rounding.
    """
    folder, state = Path(folder), Path(state)
    ranks = ranks or distributed.alone()
    rank, size, device = ranks.rank, ranks.size, ranks.device
    distributed.check_batches(params.schedule, ranks)
    say = partial(say, flush=True) if rank == 0 else lambda *_: None
    plan, end = params.schedule, schedule.total(params.schedule)
    stages = len(plan.samples)
    # Halvings from the grid of the data to the one that the last stage draws
    coarser = round(math.log2(data.meta["stack_slices"] / 2**stages))
    if coarser and superres is not None and not (Path(superres) / "superres.safetensors").is_file():
        raise InputError(f"{superres}: no superres.safetensors; the stages end on a grid too coarse to do without")
    meta, data = data.meta, halved(data, coarser)
    data = set_apart(data, params.snapshots.validation) if params.snapshots else data
    rows = {split: data.of(split) for split in ("train", "held-out")}
    objects = build(params, data, seed, device)
    generator, critic, average, adam_g, adam_c = objects.values()
    began = checkpoint.start_from(start, dict(generator=generator, critic=critic), say)
    average.load_state_dict(generator.state_dict())
    identity = fingerprint(params, data.meta["data_hash"], seed, CODE, began)
    weights = [*generator.parameters(), *critic.parameters()]
    strip_latent = generator.sample_latent(STRIP, torch_rng(seed, "strip")).to(device)

    lock = checkpoint.locked(state) if rank == 0 else contextlib.nullcontext()
    with lock, checkpoint.asked_to_stop() as asked:
        first = Progress(end, seen=sum(plan.samples[:-1]) if began else 0)
        at, growth = begin(state, identity, first, objects, ranks)
        if at.seen:
            say(f"continues at {at.seen} of {end} samples")
        distributed.same_everywhere(weights, ranks, at.steps)
        pool, pooled_stage = {}, None
        saved = said = time.monotonic()
        said_seen = at.seen

        def shown(volumes: Tensor, purpose: str) -> Tensor:
            return adaptive.augmented(volumes, purpose, at.seen + rank, size, seed, at.p)

        while at.seen < end:
            now, begun, started = schedule.at(plan, at.seen), at.seen, time.monotonic()
            batch = now.batch // size  # of this rank
            if now.stage != pooled_stage:
                # One stage finer than needed, so that rotations are interpolated before the last halving.
                halvings = max(0, stages - now.stage - 1)
                pool = {split: data.pooled(rows[split], halvings) for split in rows}
                pooled_stage = now.stage
            slices = data.meta["stack_slices"] >> (stages - now.stage)
            real = partial(real_volumes, now=now, slices=slices, seed=seed, augment=params.augment, device=device)
            for adam in (adam_g, adam_c):
                adam.param_groups[0]["lr"] = params.rate * now.rate * 0.5**at.halved

            # Critic: n_c updates, whose generated volumes are made in one batch, as the generator rests meanwhile
            draws = Part(torch_rng(seed, "critic", at.steps), rank, size)
            latent = generator.sample_latent(params.n_critic * batch, draws).to(device)
            with torch.no_grad():
                fakes = generator.synthesize(generator.to_styles(latent), now.stage, now.fade, draws)
            sign = 0.0
            for fake in fakes.split(batch):
                x = real(pool["train"], at.seen + rank, batch, size)
                pair = shown(x, "real"), shown(fake, "generated")
                terms = losses.of_critic(params, critic, *pair, draws, now.stage, now.fade)
                loss_c, on_real, on_fake, slope = terms
                at.count(run.update(adam_c, loss_c, params.clip, ranks))
                sign += torch.sign(on_real - on_fake).mean().item() / params.n_critic
                at.seen += now.batch

            # Generator
            draws = Part(torch_rng(seed, "generator", at.steps), rank, size)
            latent = generator.sample_latent(batch, draws).to(device)
            critic.requires_grad_(False)
            fake = generator.synthesize(generator.to_styles(latent), now.stage, now.fade, draws)
            pair = shown(x, "real beside it"), shown(fake, "to be improved")
            loss_g = losses.of_generator(params, critic, *pair, now.stage, now.fade)
            if params.autocorrelation and now.decaying:
                loss_g = loss_g + params.autocorrelation * losses.autocorrelation_difference(x, fake)
            if params.histogram:
                loss_g = loss_g + params.histogram * losses.histogram_distance(x, fake)
            at.count(run.update(adam_g, loss_g, params.clip, ranks))
            critic.requires_grad_(True)

            if at.in_a_row > MAX_IN_A_ROW:
                diverged = at.seen
                at, growth = go_back(at, state, identity, objects, ranks)
                say(f"diverged at {diverged} samples; goes back to {at.seen}, with 1/{2**at.halved} of the rate")
                said, said_seen = time.monotonic(), at.seen
                continue

            run.update_ema(average, generator, params.ema, now.into // (params.n_critic * now.batch))
            at.steps += 1
            distributed.same_everywhere(weights, ranks, at.steps)
            read = (loss_c, on_real.mean() - on_fake.mean(), slope.mean(), loss_g, sign)
            *read, sign = distributed.means(read, ranks)
            if not math.isfinite(read[2]):
                say(f"ALARM at {at.seen} samples: slope is {read[2]}")
                if not at.in_a_row:
                    raise InputError(f"{state}: at {at.seen} samples slope is {read[2]}, though the update was taken")
            if params.adaptive:
                at.p = adaptive.steered(at.p, sign, at.seen - begun, params.adaptive)
            if at.steps % CURVE_EVERY == 0 or at.seen >= end:
                with torch.no_grad():
                    scores = [critic(real(pool[s], at.seen, WATCHED), now.stage, now.fade).mean().item() for s in rows]
                gap = scores[0] - scores[1]
                at.curves.append([at.seen, at.steps, now.stage, round(now.fade, 4), *read, gap, sign, at.p])
            part = [now.stage, now.into * STRIP_PER_STAGE // plan.samples[now.stage - 1]]
            if part != at.strip or at.seen >= end:
                at.strip = part
                with torch.no_grad():
                    styles, noise = average.to_styles(strip_latent), torch_rng(seed, "strip noise")
                    kept = average.synthesize(styles, now.stage, now.fade, noise)
                growth[f"{at.seen:010d}"] = kept[:, 0].half().cpu()
            if params.snapshots and snapshots_due(params, at.seen) > snapshots_due(params, begun):
                at.snapshots.append(at.seen)
                if rank == 0:
                    checkpoint.save_tensors(snapshot(state, at.seen), average.state_dict())

            clock = time.monotonic()
            at.seconds += clock - started
            if clock - said > SAY_EVERY_S or at.seen >= end:
                pace = (clock - said) / (at.seen - said_seen)
                left = schedule.seconds_left(plan, at.seen, pace) / 60
                say(
                    f"stage {now.stage} fade {now.fade:.2f} | {at.seen}/{end} samples | {1 / pace:.1f}/s | "
                    f"distance {read[1]:.2f} slope {read[2]:.2f} | about {left:.1f} min left"
                )
                said, said_seen = clock, at.seen
            stop = any(distributed.means((bool(asked),), ranks))  # a request that reached one rank holds for all
            mark = at.seen * MARKS // end > begun * MARKS // end and not at.in_a_row
            if rank == 0 and (stop or mark or clock - saved > SAVE_EVERY_S) and at.seen < end:
                saved = clock
                save(state, identity, at, objects, growth, mark=mark)
            if stop and at.seen < end:
                distributed.meet(ranks)  # when the state is saved
                raise InputError(f"{state}: stopped on request at {at.seen} of {end} samples; run it again to go on")

        if rank == 0:
            say(at.account(state))
            candidates = [snapshot(state, seen) for seen in at.snapshots]
            parts = dict(average=average, critic=critic, growth=growth, candidates=candidates, began=began)
            checkpoint.write_json(folder / "record.json", run.record(at, seed, device))
            write_model(folder, params, meta, run=identity, at=at, superres=superres if coarser else None, **parts)
    return dict(zip(CURVES, at.curves[-1], strict=True))


def begin(
    state: Path, identity: str, first: Progress, objects: dict, ranks: Ranks
) -> tuple[Progress, dict[str, Tensor]]:
    """Fill `objects` from the newest state, or save their start as the first mark; progress and strip of latents."""
    found = distributed.from_first(checkpoint.load_state(state, identity) if ranks.rank == 0 else None, ranks)
    if not found and ranks.rank == 0:
        save(state, identity, first, objects, {}, mark=True)
        shutil.rmtree(snapshot(state, 0).parent, ignore_errors=True)
    return restore(found, objects) if found else (first, {})


def go_back(
    lost: Progress, state: Path, identity: str, objects: dict, ranks: Ranks
) -> tuple[Progress, dict[str, Tensor]]:
    """Fill `objects` from the last mark of a training that diverged, with half its rate; progress and strip of latents.

    Raises `InputError` where the rate was halved often enough.
    """
    again = ranks.rank == 0 and lost.halved < HALVINGS
    mark = distributed.from_first(checkpoint.load_state(state, identity, marked=True) if again else None, ranks)
    if not mark:
        tried = f", even with 1/{2**lost.halved} of the rate" if lost.halved else ""
        raise InputError(f"{state}: the training diverged at {lost.seen} samples{tried}; a lower rate may help")
    at, growth = restore(mark, objects)
    at.halved = lost.halved + 1
    if ranks.rank == 0:
        save(state, identity, at, objects, growth, mark=True)
    return at, growth


def build(params: Train, data: Stacks, seed: int, device: torch.device) -> dict:
    """What is trained, at its start: generator, critic, the generator's running average, and an optimiser for both."""
    rows, stages = data.of("train"), len(params.schedule.samples)
    some = rows[:: max(1, len(rows) // 64)]
    statistics = torch.stack([band_statistics(data.pooled(some, stages - s - 1), params.haar) for s in range(stages)])
    torch.manual_seed(torch_rng(seed, "weights").initial_seed())
    generator = build_generator(params.generator, haar=params.haar, precision=params.precision)
    critic = build_critic(params.critic, haar=params.haar, precision=params.precision, statistics=statistics)
    generator, critic = generator.to(device), critic.to(device)
    average = copy.deepcopy(generator).requires_grad_(False)
    adam_g = torch.optim.Adam(generator.parameters(), lr=params.rate, betas=(0.0, 0.98), eps=1e-7, fused=True)
    adam_c = torch.optim.Adam(critic.parameters(), lr=params.rate, betas=(0.0, 0.98), eps=5e-5, fused=True)
    return dict(generator=generator, critic=critic, average=average, adam_g=adam_g, adam_c=adam_c)


def real_volumes(
    pool: Tensor,
    first: int,
    count: int,
    every: int = 1,
    *,
    now: schedule.Moment,
    slices: int,
    seed: int,
    augment: Augment | None,
    device: torch.device,
) -> Tensor:
    """`count` real volumes, every `every`th from sample number `first`, on the grid of `slices` and as faded as now."""
    stacks = pool[order(len(pool), first, count, seed, every)].to(device).float()
    stacks = augmented(stacks, first, seed, augment, every)
    if stacks.shape[2] > slices:
        stacks = downsample(stacks)
    return now.fade * stacks + (1 - now.fade) * upsample(downsample(stacks)) if now.fade < 1 else stacks


def save(state: Path, identity: str, at: Progress, objects: dict, growth: dict, *, mark: bool) -> None:
    """Save a state, to continue from and, if it is a mark, to go back to."""
    tensors = checkpoint.pack(**objects) | {f"growth.{key}": value for key, value in growth.items()}
    checkpoint.save_state(state, tensors, asdict(at) | dict(fingerprint=identity, mark=mark))


def restore(found: tuple[dict[str, Tensor], dict], objects: dict) -> tuple[Progress, dict[str, Tensor]]:
    """Fill `objects` from a saved state; returns its progress and the strip of fixed latents."""
    tensors, meta = found
    growth = {key.removeprefix("growth."): tensors.pop(key) for key in list(tensors) if key.startswith("growth.")}
    checkpoint.unpack(tensors, **objects)
    return Progress(**{key.name: meta[key.name] for key in fields(Progress)}), growth


def snapshot(state: Path, seen: int) -> Path:
    return state / "snapshots" / f"{seen:010d}.safetensors"


def snapshots_due(params: Train, seen: int) -> int:
    return schedule.snapshots(params.schedule, params.snapshots.number, params.snapshots.part, seen)


def write_model(
    folder: Path,
    params: Train,
    meta: dict,
    *,
    average,
    critic,
    growth: dict,
    candidates: list[Path],
    run: str,
    at: Progress,
    began: dict[str, str],
    superres: str | Path | None,
) -> None:
    """A model folder: weights, the JSON that says how to use them, curves, the growing strip and what was kept."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_tensors(folder / "generator.safetensors", average.state_dict())
    checkpoint.save_tensors(folder / "critic.safetensors", critic.state_dict())
    checkpoint.save_tensors(folder / "growth.safetensors", growth)
    with open(folder / "curves.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([CURVES, *at.curves])
    shutil.rmtree(folder / "candidates", ignore_errors=True)
    for path in candidates:
        (folder / "candidates").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "candidates" / path.name)
    parts = ["generator", "critic"]
    content = {"run": run, "train": json.loads(params.model_dump_json()), "data": meta, "seen": at.seen}
    content |= {"started_from": began} if began else {}
    if superres is not None:
        for name in ("superres", "superres-critic"):
            shutil.copyfile(Path(superres) / f"{name}.safetensors", folder / f"{name}.safetensors")
        content["superres"] = json.loads((Path(superres) / "config.json").read_text(encoding="utf-8"))["superres"]
        shutil.copyfile(Path(superres) / "record.json", folder / "superres-record.json")
        parts += ["superres", "superres-critic"]
    content["sha256"] = {name: checkpoint.digest(folder / f"{name}.safetensors") for name in parts}
    checkpoint.write_json(folder / "config.json", content)


def main() -> int:
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
    cli.add_argument("--timeout", type=float, default=distributed.TIMEOUT_S, help="seconds until a rank is given up")
    args = cli.parse_args()
    out, who = Path("out") / args.profile, ""
    try:
        values = check_file(args.params)
        for kind, name, known in (
            ("profile", args.profile, values["profiles"]),
            ("model", args.model, values["profiles"].get(args.profile, {}).get("train", {})),
        ):
            if name not in known:
                raise InputError(f"{args.params}: no {kind} {name!r}; accepted are {', '.join(known)}")
        train_values = values["profiles"][args.profile]["train"][args.model]
        how = section(Train, train_values, f"profiles.{args.profile}.train.{args.model}")
        stacks, grades = args.stacks or out / "stacks", args.grades or out / "grading" / "grades.csv"
        data = load_stacks(stacks, grades)
        to = args.to or out / "models" / args.model
        with distributed.joined(args.timeout) as ranks:
            who = f"{ranks}: " if ranks.size > 1 else ""
            train(
                how,
                data,
                to,
                state=args.state or Path("scratch/state") / args.profile / args.model,
                seed=values["seed"] if args.seed is None else args.seed,
                superres=args.superres or out / "superres",
                start=args.start,
                ranks=ranks,
            )
            if ranks.rank == 0:
                print(f"the model is in {to}")
                if how.snapshots:
                    command = f"python -m bonelib.studies.selection {to} --stacks {stacks} --grades {grades}"
                    print(f"the best of its snapshots is chosen by {command}")
    except InputError as error:
        print(f"{who}{error}", file=sys.stderr)
        return 2
    except distributed.RankError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)  # at once: leaving in order would wait for those that do not answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
