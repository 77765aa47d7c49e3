"""Train the details: for each level a local network that doubles the resolution, on windows of the training scans."""

import csv
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bonelib import InputError, networks, pyramid, randomness, training
from bonelib.networks import build_detail
from bonelib.networks.critic import Critic
from bonelib.params import DetailLevels, fingerprint
from bonelib.provenance import code_hash
from bonelib.pyramid import downsample
from bonelib.randomness import numpy_rng, torch_rng
from bonelib.scans import dataset
from bonelib.scans.dataset import Stacks, band_statistics, halved
from bonelib.training import checkpoint, losses
from bonelib.training.loop import LEFT_OUT, SAVE_EVERY_S, SAY_EVERY_S, follow, new_average, step

HALO = 2  # voxels of the given grid about a window that are cut off again, as its edges are drawn from too little
FLAT = 0.06  # SD of a window, in the unit of the input, below which it shows hardly any bone
TRIES = 6  # for a window with bone in it; the last one is taken as it is
STATISTICS_FROM = 64  # windows
CURVE_EVERY = 5
CURVES = ("level", "seen", "critic_loss", "distance", "slope", "generator_loss")
# A state made by other code is not continued
CODE = code_hash(networks, training, dataset, pyramid, randomness)


def train_details(
    params: DetailLevels, data: Stacks, folder: str | Path, *, state: str | Path, seed: int, say=print
) -> list[list]:
    """Train every level and write detail.safetensors, curves.csv and config.json to `folder`; returns the curves.

    Level 1 is the coarsest; the last one draws the grid of `data`. A level learns from real coarse volumes, not from
    generated ones, and knows no other level: what it learns serves every generator. Killed, it goes on bit for bit.
    """
    folder, state = Path(folder), Path(state)
    folder.mkdir(parents=True, exist_ok=True)
    run = fingerprint(params, data.meta["data_hash"], seed, CODE)
    tensors, curves = {}, []
    for level in range(1, params.levels + 1):
        grid = halved(data, params.levels - level)
        own = state / f"level-{level}"
        with checkpoint.locked(own), checkpoint.asked_to_stop() as asked:
            weights, curve = _train_level(params, grid, level, own, run, seed, say, asked)
        tensors |= {f"{level - 1}.{name}": value for name, value in weights.items()}
        curves += [[level, *point] for point in curve]
    checkpoint.save_tensors(folder / "detail.safetensors", tensors)
    with open(folder / "curves.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([CURVES, *curves])
    content = {"run": run, "detail": json.loads(params.model_dump_json()), "data": data.meta}
    checkpoint.write_json(
        folder / "config.json", content | {"sha256": checkpoint.digest(folder / "detail.safetensors")}
    )
    return curves


def windows(params: DetailLevels, data: Stacks, level: int, first: int, count: int, seed: int) -> Tensor:
    """Windows number `first` onwards of the training scans, (count, 1, z, y, x) on the grid of `data`.

    They are twice `params.window` and its halo, which are counted in voxels of the grid that a level is given; bone
    is preferred.
    """
    size, shape = [2 * (n + 2 * HALO) for n in params.window], data.volumes.shape[1:]
    if any(n > have for n, have in zip(size, shape, strict=True)):
        raise InputError(f"detail.window {params.window} needs scans of {tuple(size)} voxels; they have {shape}")
    scans = sorted({row["volume"] for row in data.of("train")})
    found = []
    for number in range(first, first + count):
        rng = numpy_rng(seed, "detail window", level, number)
        for _ in range(TRIES):
            corner = [rng.integers(have - n + 1) for n, have in zip(size, shape, strict=True)]
            box = tuple(slice(c, c + n) for c, n in zip(corner, size, strict=True))
            window = data.volumes[(scans[rng.integers(len(scans))], *box)]
            if np.std(window[::4, ::4, ::4], dtype=np.float32) > FLAT:
                break
        mirrored = [axis for axis in range(3) if rng.random() < 0.5]
        found.append(torch.from_numpy(np.flip(window.astype(np.float32), mirrored).copy()))
    return torch.stack(found)[:, None]


def without_halo(fine: Tensor) -> Tensor:
    cut = slice(2 * HALO, -2 * HALO)
    return fine[:, :, cut, cut, cut]


def _train_level(params, data, level, state, run, seed, say, asked) -> tuple[dict[str, Tensor], list]:
    statistics = band_statistics(windows(params, data, level, 0, STATISTICS_FROM, seed), bands=True)
    torch.manual_seed(torch_rng(seed, "detail weights", level).initial_seed())
    detail = build_detail(params, statistics)
    width, dtype = params.critic, getattr(torch, params.precision)
    critic = Critic((width,) * 3, convs=2, haar=True, statistics=statistics.expand(2, 2, 8), dtype=dtype)
    average = new_average(detail)
    adam = partial(torch.optim.Adam, lr=params.rate, betas=(0.0, 0.98), fused=True)
    adam_g, adam_c = adam(detail.parameters(), eps=1e-7), adam(critic.parameters(), eps=5e-5)
    objects = dict(detail=detail, critic=critic, average=average, adam_g=adam_g, adam_c=adam_c)
    seen, curve, end, n = 0, [], params.samples[level - 1], params.batch
    if found := checkpoint.load_state(state, run):
        checkpoint.unpack(found[0], **objects)
        seen, curve = found[1]["seen"], found[1]["curve"]
        say(f"detail level {level} continues at {seen} of {end} samples", flush=True)
    saved = said = time.monotonic()
    said_seen, left_out = seen, 0

    while seen < end:
        for optimiser in (adam_g, adam_c):
            optimiser.param_groups[0]["lr"] = params.rate * rate_at(seen / end, params.final_decay)
        draws = torch_rng(seed, "detail noise", level, seen)
        window = windows(params, data, level, seen, n, seed)
        real, coarse = without_halo(window), downsample(window)

        with torch.no_grad():
            fake = without_halo(detail(coarse, draws))
        both = torch.cat([real, fake])
        on_real, on_fake = critic.patches(both).split(n)
        # The penalty is on the sum over patches at unit variance, so that it does not depend on the window's size
        slope = losses.slopes(critic.input_gradient(both)) * on_real.shape[1] ** 0.5
        loss_c = losses.relativistic(on_real, on_fake) + params.penalty * slope.square().mean()
        left_out = 0 if step(adam_c, loss_c, params.clip) else left_out + 1

        critic.requires_grad_(False)
        fake = without_halo(detail(coarse, draws))
        with torch.no_grad():
            on_real = critic.patches(real)
        loss_g = losses.relativistic(critic.patches(fake), on_real)
        left_out = 0 if step(adam_g, loss_g, params.clip) else left_out + 1
        if left_out > LEFT_OUT:
            raise InputError(f"{state}: the training diverged at {seen} samples; a lower rate may help")
        critic.requires_grad_(True)
        follow(average, detail, params.ema, seen // n)
        seen += n

        distance = (on_real.mean() - on_fake.mean()).item()
        if seen // n % CURVE_EVERY == 0 or seen >= end:
            curve.append([seen, loss_c.item(), distance, slope.mean().item(), loss_g.item()])
        clock = time.monotonic()
        if clock - said > SAY_EVERY_S or seen >= end:
            pace = (clock - said) / (seen - said_seen)
            left = f"about {(end - seen) * pace / 60:.1f} min of this level left"
            say(
                f"detail level {level} of {params.levels} | {seen}/{end} samples | {1 / pace:.1f}/s | "
                f"distance {distance:.2f} slope {slope.mean().item():.2f} | {left}",
                flush=True,
            )
            said, said_seen = clock, seen
        if asked or clock - saved > SAVE_EVERY_S or seen >= end:
            saved = clock
            checkpoint.save_state(state, checkpoint.pack(**objects), dict(seen=seen, curve=curve, fingerprint=run))
        if asked:
            raise InputError(f"{state}: stopped on request at {seen} of {end} samples; run it again to go on")
    return average.state_dict(), curve


def rate_at(share: float, final_decay: float) -> float:
    """Factor on the learning rate at a share of the training: falls to 2 % over the last `final_decay` of it."""
    return 1.0 if share <= 1 - final_decay else max(0.02, (1 - share) / final_decay)
