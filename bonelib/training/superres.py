"""Train the super-resolution network on windows of the training scans, each scan with its texture code.

python -m bonelib.training.superres PROFILE [--stacks DIR] [--grades FILE] [--to DIR] [--state DIR] [--seconds S]

With `--seconds` it stops after so many seconds of training, writes the network as it is, and goes on when run again.
"""

import argparse
import copy
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bonelib import InputError, core, networks, training
from bonelib.core.cli import command
from bonelib.core.config import fingerprint, read_params, section
from bonelib.core.provenance import code_hash
from bonelib.core.random import numpy_rng, torch_rng
from bonelib.networks.config import SuperRes
from bonelib.networks.critic import Critic
from bonelib.networks.numerics import compute_dtype
from bonelib.networks.registry import build_superres
from bonelib.networks.superres import HALO
from bonelib.scans import dataset
from bonelib.scans.dataset import Stacks, band_statistics, load_stacks, load_textures
from bonelib.training import checkpoint, distributed, losses, run, texture_reader
from bonelib.training.texture_reader import TextureReader, features

FLAT = 0.08  # SD of a given window, in the unit of the input, below which it shows hardly any bone
TRIES = 6  # for a window with bone in it; the last one is taken as it is
ANY = 8  # every so many windows one is taken wherever it lies, so that air and soft tissue are learned too
STATISTICS_FROM = 64  # windows
CLIP = 2.5  # of a texture code, in SDs
ASKED = 2  # numbers of the code, thickness and spacing, that may be asked for whatever the given volume
GUIDED = 2  # windows of a batch that are drawn with two codes, in every second step
CURVES = ("seen", "critic_loss", "distance", "slope", "generator_loss", "lattice", "disobedience")
# A state made by other code is not continued
CODE = code_hash(networks, training, dataset, core)


class Source(NamedTuple):
    """Where windows come from: training scans (numbers of volumes), and the standardised texture code of each."""

    data: Stacks
    scans: list[int]
    codes: np.ndarray


def train_superres(
    params: SuperRes,
    data: Stacks,
    textures: np.ndarray,
    folder: str | Path,
    *,
    state: str | Path,
    seed: int,
    start: Path | None = None,
    say=print,
    seconds: float | None = None,
) -> list[list]:
    """Train the network and write superres.safetensors, curves.csv and config.json to `folder`; returns the curves.

    It learns from real volumes averaged over blocks of voxels, and so serves every generator. `textures` (volumes,
    `params.texture`) are those of `dataset.load_textures`, if the network has any. Killed, it goes on bit for bit. With
    no `samples` the folder stays empty. `start` is a folder of weights to go on from.
    """
    folder, state = Path(folder), Path(state)
    folder.mkdir(parents=True, exist_ok=True)
    if not params.samples:
        return []
    scans = sorted({row["volume"] for row in data.of("train")})
    mean, sd = np.nanmean(textures[scans], 0), np.nanstd(textures[scans], 0) + 1e-6
    codes = np.nan_to_num(((textures - mean) / sd).clip(-CLIP, CLIP)).astype(np.float32)
    source = Source(data, scans, codes)

    torch.manual_seed(torch_rng(seed, "superres weights").initial_seed())
    network = build_superres(params)
    sample, _ = windows(params, source, 0, STATISTICS_FROM, seed)
    statistics, given = band_statistics(sample, bands=True), network.reduced(sample)
    detail = params.added * (sample - network.raised(given)).std()
    network.scaling.copy_(torch.stack([given.mean(), given.std(), detail]))
    network.texture_scaling.copy_(torch.from_numpy(np.stack([mean, sd])))
    how = dict(statistics=statistics.expand(len(params.critic), 2, 8), condition=network.texture)
    critic = Critic(params.critic, convs=2, haar=True, **how, dtype=compute_dtype(params.precision))
    reader = _fit_texture(network, source) if network.texture else None
    began = checkpoint.start_from(start, {"superres": network, "superres-critic": critic}, say)
    device = distributed.single_process().device
    network, critic = network.to(device), critic.to(device)
    reader = reader and TextureReader(*(t.to(device) for t in reader))
    identity = fingerprint(params, data.meta["data_hash"], seed, CODE, began)
    average = copy.deepcopy(network).requires_grad_(False)
    adam = partial(torch.optim.Adam, betas=(0.0, 0.98), eps=1e-8, fused=True)
    adam_g, adam_c = adam(network.parameters(), lr=params.rate), adam(critic.parameters(), lr=params.critic_rate)
    objects = dict(network=network, critic=critic, average=average, adam_g=adam_g, adam_c=adam_c)
    step = partial(_step, params, source, reader, objects, seed)
    how = dict(name="super-resolution", say=say, seconds=seconds)
    at = run.run(step, objects, end=params.samples, state=state, fingerprint=identity, **how)

    checkpoint.save_tensors(folder / "superres.safetensors", average.state_dict())
    checkpoint.save_tensors(folder / "superres-critic.safetensors", critic.state_dict())
    run.write_curves(folder / "curves.csv", CURVES, at)
    content = {"run": identity, "superres": params.model_dump(mode="json"), "data": data.meta, "seen": at.seen}
    content |= {"started_from": began} if began else {}
    content["sha256"] = checkpoint.digest(folder / "superres.safetensors")
    checkpoint.write_json(folder / "config.json", content)
    checkpoint.write_json(folder / "record.json", run.record(at, seed, device))
    return at.curves


def _step(
    params: SuperRes, source: Source, reader: TextureReader | None, objects: dict, seed: int, at: run.Progress
) -> dict[str, float]:
    """One update of the critic and one of the network, on the same windows."""
    network, critic, average, adam_g, adam_c = objects.values()
    decay = run.rate_at(at.seen / at.end, params.final_decay)
    adam_g.param_groups[0]["lr"], adam_c.param_groups[0]["lr"] = params.rate * decay, params.critic_rate * decay
    device = network.scaling.device
    window, code = (t.to(device) for t in windows(params, source, at.seen, params.batch, seed))
    given, draws, outer = network.reduced(window), torch_rng(seed, "superres noise", at.seen), params.factor * HALO
    # Conditioning augmentation (Ho et al. 2022): generators draw volumes that no scan would give
    strength = params.corruption * torch.rand(len(given), 1, 1, 1, 1, generator=draws)
    seen = given + (strength * torch.randn(given.shape, generator=draws)).to(device)
    # The critic must find lines at the period of its own bands, too
    shift = [int(n) for n in torch.randint(2, (3,), generator=draws)]
    real = _inner(window, outer, shift)

    with torch.no_grad():
        fake = _inner(network(given, code, draws, seen), outer, shift)
    both, codes = torch.cat([real, fake]), torch.cat([code, code])
    on_real, on_fake = critic.patches(both, condition=codes).split(len(real))
    # The penalty is on the sum over patches at unit variance, so that it does not depend on the window's size
    slope = losses.slopes(critic.input_gradient(both, condition=codes)) * on_real.shape[1] ** 0.5
    loss_c = losses.relativistic(on_real, on_fake) + params.penalty * slope.square().mean()
    at.count(run.update(adam_c, loss_c, params.clip))

    critic.requires_grad_(False)
    fine = network(given, code, draws, seen)
    fake = _inner(fine, outer, shift)
    with torch.no_grad():
        on_real = critic.patches(real, condition=code)
    loss_g = losses.relativistic(critic.patches(fake, condition=code), on_real)
    lines = losses.lattice(_inner(fine - network.raised(given), outer), _inner(given, HALO))
    disobedience = given.new_zeros(())
    if params.obedience and reader and at.steps % 2 == 0:
        disobedience = _disobedience(network, reader, given[:GUIDED], code[:GUIDED], seed, at.seen)
    loss_g = loss_g + params.lattice * lines + params.obedience * disobedience
    at.count(run.update(adam_g, loss_g, params.clip))
    critic.requires_grad_(True)
    run.update_ema(average, network, params.ema, at.seen // params.batch)
    at.seen += params.batch
    distance = on_real.mean() - on_fake.mean()
    values = (loss_c, distance, slope.mean(), loss_g, lines, disobedience)
    return dict(zip(CURVES[1:], [value.item() for value in values], strict=True))


def _disobedience(network, reader: TextureReader, given: Tensor, code: Tensor, seed: int, seen: int) -> Tensor:
    """How far the texture read from the same windows, drawn with two codes, differs otherwise than the codes do."""
    asked = torch.randn(len(given), ASKED, generator=torch_rng(seed, "superres asked", seen)).to(given)
    change = network.prior.completed(asked)
    read = []
    for sign in (-1, 1):
        noise = torch_rng(seed, "superres guided noise", seen)  # the same for both
        fine = _inner(network(given, code + sign / 2 * change, noise), network.factor * HALO)
        read.append(reader(fine, _inner(given, HALO)))
    return (read[1] - read[0] - change)[:, :ASKED].square().mean()


def windows(params: SuperRes, source: Source, first: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows number `first` onwards of the training scans, (count, 1, z, y, x), and their texture codes (count, 5).

    They are `params.factor` times `params.window` and its halo, which are counted in voxels of the given grid; bone is
    preferred.
    """
    size, shape = [params.factor * (n + 2 * HALO) for n in params.window], source.data.volumes.shape[1:]
    every = params.factor // 2
    if any(n > have for n, have in zip(size, shape, strict=True)):
        raise InputError(f"superres.window {params.window} needs scans of {tuple(size)} voxels; they have {shape}")
    found, codes = [], []
    for number in range(first, first + count):
        rng = numpy_rng(seed, "superres window", number)
        for _ in range(TRIES):
            corner = [rng.integers(have - n + 1) for n, have in zip(size, shape, strict=True)]
            box = tuple(slice(c, c + n) for c, n in zip(corner, size, strict=True))
            scan = source.scans[rng.integers(len(source.scans))]
            window = source.data.volumes[(scan, *box)]
            given = window[::every, ::every, ::every].astype(np.float32)
            z, y, x = (n // 2 for n in given.shape)
            if number % ANY == 0 or given.reshape(z, 2, y, 2, x, 2).mean((1, 3, 5)).std() > FLAT:
                break
        mirrored = [axis for axis in range(3) if rng.random() < 0.5]
        found.append(torch.from_numpy(np.flip(window.astype(np.float32), mirrored).copy()))
        codes.append(source.codes[scan])
    return torch.stack(found)[:, None], torch.from_numpy(np.stack(codes))


def _inner(x: Tensor, halo: int, shift=(0, 0, 0)) -> Tensor:
    """A window without its halo, moved by `shift` voxels."""
    cut = (slice(halo + s, n - halo + s) for n, s in zip(x.shape[2:], shift, strict=True))
    return x[(slice(None), slice(None), *cut)]


def _fit_texture(network, source: Source) -> TextureReader:
    """Fit how texture codes follow from whole stacks, averaged (the network's prior) and as they are (the reader)."""
    rows = {row["volume"]: row for row in source.data.of("train")}
    codes = torch.from_numpy(source.codes[source.scans])
    given, seen = [], []
    for scan in source.scans:
        stack = source.data.pooled([rows[scan]], 0).float()
        given.append(network.reduced(stack))
        seen.append(features(stack, given[-1]))
    network.prior.fit(torch.cat(given), codes)
    return texture_reader.fit(torch.cat(seen), codes)


@command
def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("profile")
    cli.add_argument("--stacks", type=Path, help="out/PROFILE/stacks")
    cli.add_argument("--grades", type=Path, help="out/PROFILE/grading/grades.csv")
    cli.add_argument("--to", type=Path, help="out/PROFILE/superres")
    cli.add_argument("--state", type=Path, help="scratch/state/PROFILE/superres")
    cli.add_argument("--start", type=Path, help="a model folder whose weights are trained further")
    cli.add_argument("--seconds", type=float, help="of training, after which it stops")
    args = cli.parse_args()
    values, out = read_params(), Path("out") / args.profile
    if args.profile not in values["profiles"]:
        raise InputError(f"params.yaml: no profile {args.profile!r}; accepted are {', '.join(values['profiles'])}")
    params = section(SuperRes, values["profiles"][args.profile]["superres"], f"profiles.{args.profile}.superres")
    stacks, to = args.stacks or out / "stacks", args.to or out / "superres"
    data = load_stacks(stacks, args.grades or out / "grading" / "grades.csv")
    state = args.state or Path("scratch/state") / args.profile / "superres"
    where = dict(state=state, seed=values["seed"], start=args.start, seconds=args.seconds)
    train_superres(params, data, load_textures(stacks, data), to, **where)
    print(f"the network is in {to}")


if __name__ == "__main__":
    sys.exit(main())
