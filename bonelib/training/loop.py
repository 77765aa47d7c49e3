"""The progressive trainer: one loop. Time is counted in samples the critic has seen.

python -m bonelib.training.loop PROFILE MODEL [--params params.yaml] [--stacks DIR] [--grades FILE] [--details DIR]
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
from pathlib import Path

import torch
from torch import Tensor

from bonelib import InputError, networks, pyramid, randomness, training
from bonelib.networks import build_critic, build_generator
from bonelib.params import Train, check_file, fingerprint, section
from bonelib.provenance import code_hash
from bonelib.pyramid import downsample, upsample
from bonelib.randomness import Part, torch_rng
from bonelib.scans import dataset
from bonelib.scans.dataset import Stacks, augmented, band_statistics, halved, load_stacks, order
from bonelib.training import checkpoint, distributed, losses, schedule
from bonelib.training.distributed import Ranks

STRIP = 8  # fixed latents whose samples are kept along the training
SAVE_EVERY_S = 20.0
SAY_EVERY_S = 10.0
CURVE_EVERY = 5  # generator updates between two points of the curves
STRIP_PER_STAGE = 2
LEFT_OUT = 20  # updates in a row without a finite gradient after which there is no hope
WATCHED = 16  # train and held-out stacks on which the critic's gap is read
# A state made by other code is not continued
CODE = code_hash(networks, training, dataset, pyramid, randomness)
CURVES = ("seen", "update", "stage", "fade", "critic_loss", "distance", "slope", "generator_loss", "overfit")


def train(
    params: Train,
    data: Stacks,
    folder: str | Path,
    *,
    state: str | Path,
    seed: int,
    details: str | Path | None = None,
    say=print,
    ranks: Ranks | None = None,
) -> dict:
    """Train one model on the training stacks and write it to `folder`; returns the final entry of its curves.

    Writes generator.safetensors (its running average where `ema` > 0), critic.safetensors, config.json, curves.csv
    and growth.safetensors (samples of fixed latents along the training). Interrupted, the same call goes on from
    the newest state in `state`, bit for bit: every random number is keyed by the seed and a running count.

    Where the stages end on a coarser grid than that of `data`, the rest is drawn by the trained networks in the folder
    `details`, which are copied into the model.

    Of several `ranks` each makes its part of every batch, sample number i on rank i mod their number, and all of them
    take the same steps. Rank 0 alone reads and writes states, writes the model and says anything. How many they are is
    no part of the state: another number may go on, and gets the same up to rounding.
    """
    folder, state = Path(folder), Path(state)
    ranks = ranks or distributed.alone()
    rank, size, device = ranks.rank, ranks.size, ranks.device
    distributed.check_batches(params.schedule, ranks)
    say = say if rank == 0 else lambda *_, **__: None
    run = fingerprint(params, data.meta["data_hash"], seed, CODE)
    plan, end = params.schedule, schedule.total(params.schedule)
    stages = len(plan.samples)
    # Halvings from the grid of the data to the one that the last stage draws
    coarser = round(math.log2(data.meta["stack_slices"] / 2 ** (stages + params.haar)))
    if coarser and details is not None and not (Path(details) / "detail.safetensors").is_file():
        raise InputError(f"{details}: no detail.safetensors; the stages end on a grid too coarse to do without")
    meta, data = data.meta, halved(data, coarser)
    rows = {split: data.of(split) for split in ("train", "held-out")}
    some = rows["train"][:: max(1, len(rows["train"]) // 64)]
    statistics = torch.stack([band_statistics(data.pooled(some, stages - s - 1), params.haar) for s in range(stages)])

    torch.manual_seed(torch_rng(seed, "weights").initial_seed())
    generator = build_generator(params.generator, haar=params.haar, precision=params.precision)
    critic = build_critic(params.critic, haar=params.haar, precision=params.precision, statistics=statistics)
    generator, critic = generator.to(device), critic.to(device)
    average = new_average(generator)
    adam_g = torch.optim.Adam(generator.parameters(), lr=params.rate, betas=(0.0, 0.98), eps=1e-7, fused=True)
    adam_c = torch.optim.Adam(critic.parameters(), lr=params.rate, betas=(0.0, 0.98), eps=5e-5, fused=True)
    objects = dict(generator=generator, critic=critic, average=average, adam_g=adam_g, adam_c=adam_c)
    strip_latent = generator.sample_latent(STRIP, torch_rng(seed, "strip")).to(device)

    lock = checkpoint.locked(state) if rank == 0 else contextlib.nullcontext()
    with lock, checkpoint.asked_to_stop() as asked:
        seen, update, curves, growth, last_strip = 0, 0, [], {}, None
        if found := distributed.from_first(checkpoint.load_state(state, run) if rank == 0 else None, ranks):
            tensors, known = found
            growth = {k.removeprefix("growth."): tensors.pop(k) for k in list(tensors) if k.startswith("growth.")}
            checkpoint.unpack(tensors, **objects)
            seen, update, curves, last_strip = (known[k] for k in ("seen", "update", "curves", "last_strip"))
            say(f"continues at {seen} of {end} samples", flush=True)
        distributed.same_everywhere([*generator.parameters(), *critic.parameters()], ranks, update)
        pool, pooled_stage, left_out = {}, None, 0
        saved = said = time.monotonic()
        said_seen = seen

        while seen < end:
            now = schedule.at(plan, seen)
            batch = now.batch // size  # of this rank
            if now.stage != pooled_stage:
                # One stage finer than needed, so that rotations are interpolated before the last halving.
                halvings = max(0, stages - now.stage - 1)
                pool = {split: data.pooled(rows[split], halvings) for split in rows}
                pooled_stage = now.stage
            for adam in (adam_g, adam_c):
                adam.param_groups[0]["lr"] = params.rate * now.rate

            def real(split: str, first: int, count: int, every: int = 1, now=now, pool=pool) -> Tensor:
                stacks = pool[split][order(len(pool[split]), first, count, seed, every)].to(device).float()
                stacks = augmented(stacks, first, seed, params.augment, every)
                if stacks.shape[2] > data.meta["stack_slices"] >> (stages - now.stage):
                    stacks = downsample(stacks)
                return now.fade * stacks + (1 - now.fade) * upsample(downsample(stacks)) if now.fade < 1 else stacks

            # Critic: n_c updates, whose generated volumes are made in one batch, as the generator rests meanwhile
            draws = Part(torch_rng(seed, "critic", update), rank, size)
            latent = generator.sample_latent(params.n_critic * batch, draws).to(device)
            with torch.no_grad():
                fakes = generator.synthesize(generator.to_styles(latent), now.stage, now.fade, draws)
            for fake in fakes.split(batch):
                x = real("train", seen + rank, batch, size)
                terms = losses.of_critic(params, critic, x, fake, draws, now.stage, now.fade)
                loss_c, on_real, on_fake, slope = terms
                left_out = 0 if step(adam_c, loss_c, params.clip, ranks) else left_out + 1
                seen += now.batch

            # Generator
            draws = Part(torch_rng(seed, "generator", update), rank, size)
            latent = generator.sample_latent(batch, draws).to(device)
            critic.requires_grad_(False)
            fake = generator.synthesize(generator.to_styles(latent), now.stage, now.fade, draws)
            loss_g = losses.of_generator(params, critic, x, fake, now.stage, now.fade)
            left_out = 0 if step(adam_g, loss_g, params.clip, ranks) else left_out + 1
            critic.requires_grad_(True)
            if left_out > LEFT_OUT:
                raise InputError(f"{state}: the training diverged at {seen} samples; a lower rate may help")
            follow(average, generator, params.ema, now.into // (params.n_critic * now.batch))
            update += 1
            distributed.same_everywhere([*generator.parameters(), *critic.parameters()], ranks, update)

            read = distributed.means((loss_c, on_real.mean() - on_fake.mean(), slope.mean(), loss_g), ranks)
            if update % CURVE_EVERY == 0 or seen >= end:
                with torch.no_grad():
                    gap = [critic(real(split, seen, WATCHED), now.stage, now.fade).mean().item() for split in rows]
                curves.append([seen, update, now.stage, round(now.fade, 4), *read, gap[0] - gap[1]])
            mark = [now.stage, now.into * STRIP_PER_STAGE // plan.samples[now.stage - 1]]
            if mark != last_strip or seen >= end:
                last_strip = mark
                with torch.no_grad():
                    styles = average.to_styles(strip_latent)
                    kept = average.synthesize(styles, now.stage, now.fade, torch_rng(seed, "strip noise"))
                growth[f"{seen:010d}"] = kept[:, 0].half().cpu()
            clock = time.monotonic()
            if clock - said > SAY_EVERY_S or seen >= end:
                pace = (clock - said) / (seen - said_seen)
                say(
                    f"stage {now.stage} fade {now.fade:.2f} | {seen}/{end} samples | {1 / pace:.1f}/s | "
                    f"distance {read[1]:.2f} slope {read[2]:.2f} | "
                    f"about {schedule.seconds_left(plan, seen, pace) / 60:.1f} min left",
                    flush=True,
                )
                said, said_seen = clock, seen
            stop = any(distributed.means((bool(asked),), ranks))  # a request that reached one rank holds for all
            if rank == 0 and (stop or clock - saved > SAVE_EVERY_S) and seen < end:
                saved = clock
                kept = checkpoint.pack(**objects) | {f"growth.{k}": v for k, v in growth.items()}
                checkpoint.save_state(
                    state, kept, dict(seen=seen, update=update, curves=curves, last_strip=last_strip, fingerprint=run)
                )
            if stop and seen < end:
                distributed.meet(ranks)  # when the state is saved
                raise InputError(f"{state}: stopped on request at {seen} of {end} samples; run it again to go on")

    if rank == 0:
        write_model(folder, params, meta, average, critic, curves, growth, run, details if coarser else None)
    return dict(zip(CURVES, curves[-1], strict=True))


def step(adam: torch.optim.Optimizer, loss: Tensor, clip: float, ranks: Ranks | None = None) -> bool:
    """One update with the gradient's norm clipped (Appendix B); False, and none, where the gradient is not finite.

    Of several ranks the gradient is the mean, so that all of them clip, step or leave out alike.
    """
    adam.zero_grad(set_to_none=True)
    loss.backward()
    if ranks:
        distributed.average_gradients(adam.param_groups[0]["params"], ranks)
    norm = torch.nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], clip)
    if finite := bool(torch.isfinite(norm)):
        adam.step()
    return finite


def new_average(generator):
    """The running average of a generator's weights at its start."""
    return copy.deepcopy(generator).requires_grad_(False)


def follow(average, generator, half_life: float, updates: int) -> None:
    """Move the running average of the weights; it starts afresh with each stage, whose new layers are random."""
    keep = min(0.5 ** (1 / half_life), (1 + updates) / (10 + updates)) if half_life else 0.0
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), generator.parameters(), strict=True):
            slow.lerp_(fast, 1 - keep)


def write_model(
    folder: Path,
    params: Train,
    meta: dict,
    generator,
    critic,
    curves: list,
    growth: dict,
    run: str,
    details: str | Path | None,
) -> None:
    """A model folder: weights, the JSON that says how to use them, curves and the growing strip."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_tensors(folder / "generator.safetensors", generator.state_dict())
    checkpoint.save_tensors(folder / "critic.safetensors", critic.state_dict())
    checkpoint.save_tensors(folder / "growth.safetensors", growth)
    with open(folder / "curves.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([CURVES, *curves])
    parts = ["generator", "critic"]
    content = {"run": run, "train": json.loads(params.model_dump_json()), "data": meta, "seen": curves[-1][0]}
    if details is not None:
        shutil.copyfile(Path(details) / "detail.safetensors", folder / "detail.safetensors")
        content["detail"] = json.loads((Path(details) / "config.json").read_text())["detail"]
        parts.append("detail")
    content["sha256"] = {name: checkpoint.digest(folder / f"{name}.safetensors") for name in parts}
    checkpoint.write_json(folder / "config.json", content)


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("profile")
    cli.add_argument("model")
    cli.add_argument("--params", type=Path, default=Path("params.yaml"))
    cli.add_argument("--stacks", type=Path, help="out/PROFILE/stacks")
    cli.add_argument("--grades", type=Path, help="out/PROFILE/grading/grades.csv")
    cli.add_argument("--details", type=Path, help="out/PROFILE/detail")
    cli.add_argument("--to", type=Path, help="out/PROFILE/models/MODEL")
    cli.add_argument("--state", type=Path, help="scratch/state/PROFILE/MODEL")
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
        data = load_stacks(args.stacks or out / "stacks", args.grades or out / "grading" / "grades.csv")
        to = args.to or out / "models" / args.model
        with distributed.joined(args.timeout) as ranks:
            who = f"{ranks}: " if ranks.size > 1 else ""
            train(
                how,
                data,
                to,
                state=args.state or Path("scratch/state") / args.profile / args.model,
                seed=values["seed"] if args.seed is None else args.seed,
                details=args.details or out / "detail",
                ranks=ranks,
            )
            if ranks.rank == 0:
                print(f"the model is in {to}")
    except InputError as error:
        print(f"{who}{error}", file=sys.stderr)
        return 2
    except distributed.RankError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)  # at once: leaving in order would wait for those that do not answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
