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
import weakref
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bonelib import InputError
from bonelib.core.cli import command
from bonelib.core.parallel import map_large_blocks, peak_memory, workers
from bonelib.core.random import torch_rng
from bonelib.networks.config import HAGANConfig, HAGANCriticNet
from bonelib.networks.hagan_layers import SLOPE
from bonelib.scans.tables import write_table
from bonelib.studies.cost import in_turns, precisions
from bonelib.training import hagan
from bonelib.training.config import HierarchicalTrain
from bonelib.training.distributed import single_process
from bonelib.training.model_folder import Trained
from bonelib.training.run import Progress

WEIGHTS = 16  # bytes a parameter takes in training: itself, its gradient, and two moments of Adam
EDGES = (32, 64, 128, 256)  # voxels of the cubes in Table VII
LARGEST = HierarchicalTrain(
    generator=HAGANConfig(base=(4, 4, 4), stages=6, encoder=(32, 64, 128, 256)),
    critic=HAGANCriticNet(high=(16, 32, 64, 128, 256, 512), low=(32, 64, 128, 256)),
    batch=2,
)  # the published networks for 256^3
# An iteration of these loads what libraries load at their first use, which is no part of a network's memory
SMALL = HierarchicalTrain(
    generator=HAGANConfig(
        base=(4, 4, 4), stages=3, widths=(16, 16), fine=(16,), low=(16,), encoder=(16,), latent=16, division=2
    ),
    critic=HAGANCriticNet(high=(8, 8, 8), head=(8, 8), low=(8,)),
    batch=2,
)


def published(edge: int) -> HierarchicalTrain:
    """The published networks for cubes of `edge` voxels, batch 2. The public code has 128 and 256 alone."""
    if edge not in EDGES:
        raise InputError(f"edge is {edge}; accepted are {', '.join(map(str, EDGES))}")
    return coarser(LARGEST, LARGEST.generator.stages - EDGES[::-1].index(edge))


def coarser(how: HierarchicalTrain, stages: int) -> HierarchicalTrain:
    """The same networks for volumes of fewer `stages`: with their last halvings alone.

    So the published ones for 256^3 become those for 128^3, and have the parameters of Table VII at 64^3 and 32^3.
    """
    left = how.generator.stages - stages
    if not 0 <= left < min(len(how.generator.encoder), len(how.critic.low)):
        fewest = how.generator.stages - min(len(how.generator.encoder), len(how.critic.low)) + 1
        raise InputError(f"stages is {stages}; accepted are {fewest} to {how.generator.stages}")
    return HierarchicalTrain(
        **how.model_dump(exclude={"generator", "critic"}),
        generator=how.generator.model_dump() | dict(stages=stages, encoder=how.generator.encoder[left:]),
        critic=how.critic.model_dump() | dict(high=how.critic.high[left:], low=how.critic.low[left:]),
    )


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
    """The four updates, in the order of the authors' code, of `objects` of `training.hagan.build` with `adams` of their
    own; the losses of discriminators, generator, E^H and E^G."""
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


def started(how: HierarchicalTrain, seed: int) -> tuple[Trained, Progress, hagan.Part]:
    """What `hagan.update_all` takes: a training at its start, volumes of noise, and the sub-volume in the middle."""
    objects = hagan.build(how, seed, torch.device("cpu"))
    grid, shape = objects["generator"].grid, tuple(n << how.generator.stages for n in how.generator.base)
    whole = torch.rand(how.batch, 1, *shape, generator=torch_rng(seed, "cost real"))
    r = grid.starts // 2
    low = F.avg_pool3d(whole, grid.scale)
    trained = Trained(how, None, objects, seed, single_process()._replace(device=torch.device("cpu")))
    return trained, Progress(10**9), hagan.Part(whole, low, grid.high(whole, r), r)


def iteration_times(how: HierarchicalTrain, *, rounds: int, seed: int) -> list[dict]:
    """`cost.in_turns` of an iteration: plain, as trained here, that with a halo about sub-volumes, and that with
    convolutions in bfloat16, on processors that have it, where these pass their check."""
    runs = {}
    ways = {"plain": (False, "float32"), "here": (False, "float32"), "here, with halo": (True, "float32")}
    ways |= {f"here, with halo, {low}": (True, low) for low in precisions() if low != "float32"}
    for name, (halo, precision) in ways.items():
        generator = how.generator.model_copy(update=dict(halo=halo))
        own = how.model_copy(update=dict(generator=generator, precision=precision))
        trained, at, real = started(own, seed)
        runs[name] = partial(hagan.update_all, trained, at, real)
        if name == "plain":
            adams = {
                key: torch.optim.Adam(adam.param_groups[0]["params"], adam.defaults["lr"], how.betas, foreach=False)
                for key, adam in trained.objects.items()
                if key.startswith("adam")
            }
            runs[name] = partial(plain_iteration, trained.objects, adams, real, torch_rng(seed, "cost draws"))
    return in_turns(runs, rounds, "implementation")


def memory_of_an_iteration(how: HierarchicalTrain, seed: int) -> dict[str, float]:
    """Voxels, parameters, seconds, and MB of an iteration, in a process of its own: predicted and measured.

    Predicted are the MB held, 16 bytes a parameter, 4 for its running average, and the volumes; and those of
    activations, by which the tensors that are there at once exceed them at most. Measured is the peak of the process
    above what it held when it had made an iteration of small networks. Copies of weights that convolutions make while
    they run are not predicted: tens of MB for the published networks.
    """
    with workers(1) as pool:
        return pool.submit(_iterated, how, seed).result()


def _iterated(how: HierarchicalTrain, seed: int) -> dict[str, float]:
    torch.set_num_threads(1)
    map_large_blocks()  # else the allocator keeps some 200 MB between the weights
    hagan.update_all(*started(SMALL, seed))
    start = peak_memory()
    trained, at, real = started(how, seed)
    parts = [trained.objects[name] for name in ("generator", "critic", "encoder", "average")]
    parameters = sum(p.numel() for part in parts[:3] for p in part.parameters())
    average = sum(p.numel() for p in parts[3].parameters())
    with Live([*real[:3], *(t for part in parts for t in (*part.parameters(), *part.buffers()))]) as live:
        hagan.update_all(trained, at, real)  # behind it all moments are there
        begun = time.thread_time()
        hagan.update_all(trained, at, real)
        seconds = time.thread_time() - begun
    held = (WEIGHTS * parameters + 4 * average + 4 * real.whole.numel()) / 2**20
    predicted, measured = live.most / 2**20, peak_memory() - start
    row = {"voxels": real.whole[0].numel(), "parameters": parameters, "seconds": seconds, "MB held": held}
    row |= {"MB of activations": predicted - held, "MB measured": measured, "MB measured, less held": measured - held}
    return row | {"predicted/measured": predicted / measured}


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are there at once: those given, and those that operations make."""

    def __init__(self, given):
        super().__init__()
        self.known, self.now, self.most = set(), 0, 0
        for tensor in given:
            self._count(tensor)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place not in self.known:
            self.known.add(place)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out


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
