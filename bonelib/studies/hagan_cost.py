"""What an iteration of HA-GAN costs beside a plain implementation of it, and its memory over size.

The plain one does what the authors' public code does, with the same weights: upsampled tensors, one convolution after
the other, the discriminators once for real and once for generated volumes, unfused Adam. Own code after the paper.

python -m bonelib.studies.hagan_cost [--edges 32 64 128] [--rounds N] [--to FOLDER]

times the published networks at 128^3, batch 2, on one core, and measures what an iteration takes of memory at each edge
length, in a process of its own; it writes iterations.csv and memory.csv.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bonelib import InputError
from bonelib.core.cli import command
from bonelib.core.parallel import peak_memory, workers
from bonelib.core.random import torch_rng
from bonelib.networks.config import HAGANConfig, HAGANCriticNet
from bonelib.networks.hagan_layers import SLOPE
from bonelib.scans.tables import write_table
from bonelib.studies.cost import Flops
from bonelib.training import hagan
from bonelib.training.config import HierarchicalTrain
from bonelib.training.distributed import single_process
from bonelib.training.run import Progress

WEIGHTS = 16  # bytes a parameter takes in training: itself, its gradient, and two moments of Adam


EDGES = (32, 64, 128, 256)  # voxels of the cubes in Table VII


def published(edge: int) -> HierarchicalTrain:
    """The published networks for cubes of `edge` voxels, batch 2.

    The public code has 128 and 256; with their last halvings alone, 32 and 64 have the parameters of Table VII too.
    """
    if edge not in EDGES:
        raise InputError(f"edge is {edge}; accepted are {', '.join(map(str, EDGES))}")
    left = len(EDGES) - 1 - EDGES.index(edge)  # halvings that the largest networks have before
    generator = HAGANConfig(base=(4, 4, 4), stages=6 - left, encoder=(32, 64, 128, 256)[left:])
    critic = HAGANCriticNet(high=(16, 32, 64, 128, 256, 512)[left:], low=(32, 64, 128, 256)[left:])
    return HierarchicalTrain(generator=generator, critic=critic, batch=2)


def plain_conv(conv, x: Tensor) -> Tensor:
    """What a `PlainConv` computes, without any rewriting."""
    weight = conv.weight if conv.norm is None else conv.norm(conv.weight)
    x = F.interpolate(x, scale_factor=2, mode="nearest") if conv.upsample else x
    return F.conv3d(x, weight, conv.bias, conv.stride, conv.pad)


def plain_chain(blocks, x: Tensor) -> Tensor:
    """Convolution, group norm and rectifier, block by block."""
    for block in blocks:
        norm = block.norm
        x = F.relu(F.group_norm(plain_conv(block.conv, x), norm.num_groups, norm.weight, norm.bias, norm.eps))
    return x


def plain_features(generator, latent: Tensor) -> Tensor:
    """G^A."""
    return plain_chain(generator.common, generator.dense(latent).reshape(len(latent), -1, *generator.base))


def plain_image(blocks, last, a: Tensor) -> Tensor:
    """G^L or G^H, in (0, 1)."""
    return torch.tanh(plain_conv(last, plain_chain(blocks, a))) * 0.5 + 0.5


def plain_logit(critic, x: Tensor, r: int | None) -> Tensor:
    """D^H for a sub-volume of start r, D^L where that is None."""
    x, layers = 2 * x - 1, critic.low[:-1] if r is None else critic.high
    for layer in layers:
        x = F.leaky_relu(plain_conv(layer, x), SLOPE)
    if r is None:
        return plain_conv(critic.low[-1], x).flatten(1).mean(1)
    x = torch.cat([x.flatten(1), x.new_full((len(x), 1), critic.grid.share(r))], 1)
    return critic.out(F.leaky_relu(critic.dense(x), SLOPE))[:, 0]


def plain_code(encoder, whole: Tensor) -> Tensor:
    """E^G of E^H of all sub-volumes; no gradient reaches E^H."""
    with torch.no_grad():
        parts = [plain_chain(encoder.high, 2 * encoder.grid.high(whole, r) - 1) for r in encoder.grid.partition()]
    return plain_conv(encoder.code, plain_chain(encoder.ground, torch.cat(parts, 2))).flatten(1)


def plain_iteration(objects: dict, adams: dict, real: hagan.Part, draws: torch.Generator) -> list[float]:
    """The four updates, in the order of the authors' code; the losses of discriminators, generator, E^H and E^G.

    `objects` are those of `training.hagan.build`, `adams` four optimisers of the same parameters.
    """
    generator, critic, encoder = (objects[name] for name in ("generator", "critic", "encoder"))
    low, high = (generator.low_blocks, generator.low_image), (generator.fine_blocks, generator.fine_image)

    def drawn(a):
        return plain_image(*high, generator.grid.low(a, real.r)), plain_image(*low, a)

    def step(name, loss):
        adams[name].zero_grad(set_to_none=True)
        loss.backward()
        adams[name].step()
        return loss.item()

    generator.requires_grad_(False)
    fakes = drawn(plain_features(generator, generator.sample_latent(len(real.whole), draws)))
    loss = 0.0
    for x, fake, r in zip((real.high, real.low), fakes, (real.r, None), strict=True):
        loss = loss + F.softplus(-plain_logit(critic, x, r)).mean() + F.softplus(plain_logit(critic, fake, r)).mean()
    losses = [step("adam_c", loss)]

    generator.requires_grad_(True)
    critic.requires_grad_(False)
    fakes = drawn(plain_features(generator, generator.sample_latent(len(real.whole), draws)))
    loss = sum(F.softplus(-plain_logit(critic, x, r)).mean() for x, r in zip(fakes, (real.r, None), strict=True))
    losses.append(step("adam_g", loss))

    generator.requires_grad_(False)
    again = plain_image(*high, plain_chain(encoder.high, 2 * real.high - 1))
    losses.append(step("adam_eh", F.l1_loss(again, real.high)))
    fakes = drawn(plain_features(generator, plain_code(encoder, real.whole)))
    loss = sum(F.l1_loss(fake, x) for fake, x in zip(fakes, (real.high, real.low), strict=True))
    losses.append(step("adam_eg", loss))
    generator.requires_grad_(True)
    critic.requires_grad_(True)
    return losses


def setting(how: HierarchicalTrain, seed: int) -> tuple[hagan.Trained, hagan.Part, Progress]:
    """A training at its start, with volumes of noise, and the sub-volume in the middle."""
    objects = hagan.build(how, seed, torch.device("cpu"))
    grid, shape = objects["generator"].grid, tuple(n << how.generator.stages for n in how.generator.base)
    whole = torch.rand(how.batch, 1, *shape, generator=torch_rng(seed, "cost real"))
    r = grid.starts // 2
    low = F.avg_pool3d(whole, grid.scale)
    trained = hagan.Trained(how, None, objects, seed, single_process()._replace(device=torch.device("cpu")))
    return trained, hagan.Part(whole, low, grid.high(whole, r), r), Progress(10**9)


def iteration_times(how: HierarchicalTrain, *, rounds: int, seed: int) -> list[dict]:
    """Seconds of one core for an iteration, plain, as trained here, and that with a halo about sub-volumes, in turns.

    One round that is not counted goes before. Rows: implementation, seconds (median), least, most, GFLOP, times faster
    than the plain one, rounds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = {}
        for name, halo in (("plain", False), ("here", False), ("here, with halo", True)):
            own = how.model_copy(update=dict(generator=how.generator.model_copy(update=dict(halo=halo))))
            trained, real, at = setting(own, seed)
            if name == "plain":
                adams = {
                    key: torch.optim.Adam(adam.param_groups[0]["params"], adam.defaults["lr"], how.betas, foreach=False)
                    for key, adam in trained.objects.items()
                    if key.startswith("adam")
                }
                draws = torch_rng(seed, "cost draws")
                runs[name] = (plain_iteration, trained.objects, adams, real, draws)
            else:
                runs[name] = (hagan.update_all, trained, at, real)
        flops, seconds = {}, {name: [] for name in runs}
        for turn in range(rounds + 1):
            for name, (run, *given) in runs.items():
                with Flops() as counter:
                    start = time.thread_time()
                    run(*given)
                    spent = time.thread_time() - start
                flops[name] = counter.total / 1e9
                seconds[name] += [spent] * bool(turn)
    finally:
        torch.set_num_threads(threads)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    return [
        {
            "implementation": name, "seconds": median[name], "least": min(values), "most": max(values),
            "GFLOP": flops[name], "times faster": median["plain"] / median[name], "rounds": rounds,
        }
        for name, values in seconds.items()
    ]  # fmt: skip


def memory_of_an_iteration(how: HierarchicalTrain, seed: int) -> dict[str, float]:
    """Voxels, parameters, and MB of an iteration, in a process of its own: predicted and measured.

    Predicted are 16 bytes a parameter and the most that tensors kept for a backward pass take at once; measured is the
    peak of the process above its start.
    """
    with workers(1) as pool:
        return pool.submit(_iterated, how, seed).result()


def _iterated(how: HierarchicalTrain, seed: int) -> dict[str, float]:
    torch.set_num_threads(1)
    start = peak_memory()
    trained, real, at = setting(how, seed)
    parameters = sum(p.numel() for n in ("generator", "critic", "encoder") for p in trained.objects[n].parameters())
    average = sum(p.numel() for p in trained.objects["average"].parameters())
    kept = _Kept(p for n in ("generator", "critic", "encoder") for p in trained.objects[n].parameters())
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda saved: saved.tensor):
        hagan.update_all(trained, at, real)
    held = (WEIGHTS * parameters + 4 * average + 4 * real.whole.numel()) / 2**20
    activations, measured = kept.most / 2**20, peak_memory() - start
    return {
        "voxels": real.whole[0].numel(), "parameters": parameters, "MB held": held, "MB of activations": activations,
        "MB measured": measured, "predicted/measured": (held + activations) / measured,
    }  # fmt: skip


class _Kept:
    """The bytes that a backward pass keeps, now and at most; `without` are tensors that are there anyway."""

    def __init__(self, without):
        self.without, self.holders = {_place(tensor) for tensor in without}, Counter()
        self.now, self.most = 0, 0

    def add(self, tensor: Tensor) -> "_Saved":
        place, size = _place(tensor), tensor.untyped_storage().nbytes()
        if place not in self.without:
            self.holders[place] += 1
            self.now += size * (self.holders[place] == 1)
            self.most = max(self.most, self.now)
        return _Saved(tensor, place, size, self)


class _Saved:
    """A tensor that is kept until its backward pass; then it counts no more."""

    def __init__(self, tensor: Tensor, place: int, size: int, kept: _Kept):
        self.tensor, self.place, self.size, self.kept = tensor, place, size, kept

    def __del__(self):
        if self.place not in self.kept.without:
            self.kept.holders[self.place] -= 1
            self.kept.now -= self.size * (self.kept.holders[self.place] == 0)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@command
def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--edges", type=int, nargs="*", default=EDGES[:3])
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--seed", type=int, default=1)
    cli.add_argument("--to", type=Path, default=Path("scratch/hagan_cost"))
    args = cli.parse_args()
    settings = {edge: published(edge) for edge in args.edges}
    args.to.mkdir(parents=True, exist_ok=True)
    memory = []
    for edge, how in settings.items():
        memory.append({"edge": edge} | memory_of_an_iteration(how, args.seed))
        print(memory[-1], flush=True)
        write_table(args.to / "memory.csv", memory)
    for row in (rows := iteration_times(published(128), rounds=args.rounds, seed=args.seed)):
        print(row, flush=True)
    write_table(args.to / "iterations.csv", rows)
    print(f"the tables are in {args.to}")


if __name__ == "__main__":
    sys.exit(main())
