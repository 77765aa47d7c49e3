"""What an update and a sample cost, in float32 and in bfloat16: seconds of one core, memory and operations.

Both precisions take turns in one run, where the machine has kernels for both; absolute times are the machine's.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bonelib.core.parallel import peak_memory, workers
from bonelib.core.random import torch_rng
from bonelib.networks.config import CriticNet, Generator
from bonelib.networks.numerics import compute_dtype
from bonelib.networks.registry import build_critic, build_generator
from bonelib.training import losses, run


def precisions() -> tuple[str, ...]:
    """Those in which networks compute on this machine: bfloat16 only where it has kernels for it."""
    return ("float32",) if compute_dtype("bfloat16") == torch.float32 else ("float32", "bfloat16")


def update(generator, critic, adams, real: Tensor, stage: int, n_critic: int, rng) -> Tensor:
    """One update of the generator after `n_critic` of the critic, as in the trainer; returns its samples."""
    n = len(real)

    def sample(count):
        latent = generator.sample_latent(count, rng).to(real.device)
        return generator.synthesize(generator.to_styles(latent), stage, 1.0, rng)

    with torch.no_grad():
        fakes = sample(n_critic * n).split(n)
    for fake in fakes:
        on_real, on_fake = critic(torch.cat([real, fake]), stage).split(n)
        slope = losses.slopes(critic.input_gradient(losses.mix(real, fake, rng), stage))
        run.update(adams[1], losses.critic_loss(on_real, on_fake, slope, penalty=10, drift=1e-3), 2.0)
    critic.requires_grad_(False)
    fake = sample(n)
    run.update(adams[0], losses.generator_loss(critic(fake, stage)), 2.0)
    critic.requires_grad_(True)
    return fake.detach()


def update_times(
    generator: Generator,
    critic: CriticNet,
    names: tuple[str, ...] | None = None,
    *,
    stage: int,
    batch: int,
    n_critic: int,
    rounds: int,
    seed: int = 1,
) -> list[dict]:
    """`in_turns` of an update in each precision of `names` (default: `precisions()`), and the GFLOP/s it reaches."""
    runs = {}
    for precision in names or precisions():
        torch.manual_seed(torch_rng(seed, "cost").initial_seed())
        given = prepared(generator, critic, stage, batch, torch_rng(seed, "cost shape"), precision=precision)
        runs[precision] = partial(update, *given, stage, n_critic, torch_rng(seed, "cost draws"))
    rows = in_turns(runs, rounds, "precision")
    return [row | {"GFLOP/s": row["GFLOP"] / row["seconds"]} for row in rows]


def prepared(generator: Generator, critic: CriticNet, stage: int, batch: int, rng, device="cpu", **how) -> tuple:
    """Of what `update` takes: both networks, their optimisers, and a batch of noise on the grid of a stage."""
    networks = build_generator(generator, **how).to(device), build_critic(critic, **how).to(device)
    adams = [torch.optim.Adam(net.parameters(), 1e-4, betas=(0.0, 0.98), fused=True) for net in networks]
    with torch.no_grad():
        styles = networks[0].to_styles(networks[0].sample_latent(1, rng).to(device))
        grid = networks[0].synthesize(styles, stage).shape[2:]
    return *networks, adams, torch.rand(batch, 1, *grid, device=device)


@contextmanager
def one_core():
    """One thread for torch, while the block lasts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_turns(runs: dict[str, Callable[[], object]], rounds: int, column: str) -> list[dict]:
    """What one core takes for each of `runs`, which take turns: a row each, under its name in `column`.

    Seconds (median), least, most, times faster than the first, GFLOP, rounds. Two rounds that are not timed go before.
    """
    flops, seconds = {}, {name: [] for name in runs}
    with one_core():
        for name, run in runs.items():
            run()  # low precision is checked against float32 here
            with Flops() as counter:
                run()
            flops[name] = counter.total / 1e9
        for _, (name, run) in product(range(rounds), runs.items()):
            start = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - start)
    median, rows = {name: float(np.median(values)) for name, values in seconds.items()}, []
    for name, values in seconds.items():
        row = {column: name, "seconds": median[name], "least": min(values), "most": max(values)}
        faster = next(iter(median.values())) / median[name]
        rows.append(row | {"times faster": faster, "GFLOP": flops[name], "rounds": rounds})
    return rows


def stage_costs(generator: Generator, critic: CriticNet, precision: str, *, stages, **how) -> list[dict]:
    """The row of `update_times` at each of `stages`, coarsest first, in a process of its own, with its peak memory in
    MB."""
    with workers(1) as pool:
        return pool.submit(_updated, generator, critic, precision, sorted(stages), how).result()


def _updated(generator: Generator, critic: CriticNet, precision: str, stages: list[int], how: dict) -> list:
    before, rows = peak_memory(), []
    for stage in stages:
        (row,) = update_times(generator, critic, (precision,), stage=stage, **how)
        del row["times faster"]  # than itself
        rows.append({"stage": stage} | row | {"MB above start": peak_memory() - before, "MB in all": peak_memory()})
    return rows


def sampling_cost(generator: Generator, precision: str) -> dict[str, float]:
    """Seconds of one core for one volume of the last stage, and the process's peak memory above its start, in MB."""
    with workers(1) as pool:
        return pool.submit(_sampled, generator, precision).result()


def _sampled(how: Generator, precision: str) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    generator = build_generator(how, precision=precision).eval()
    rng, before = torch_rng(1, "cost sample"), peak_memory()
    seconds = []
    for _ in range(3):  # the first one is not counted
        start = time.thread_time()
        with torch.inference_mode():
            generator.synthesize(generator.to_styles(generator.sample_latent(1, rng)), noise=rng)
        seconds.append(time.thread_time() - start)
    return {"seconds": min(seconds[1:]), "MB above start": peak_memory() - before, "MB in all": peak_memory()}


def peak_rate(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """GFLOP/s that one core reaches in a convolution that suits it: 128 channels, 3x3x3, on 8x24x24 voxels."""
    with one_core():
        x = torch.rand(4, 128, 8, 24, 24).to(dtype).contiguous(memory_format=torch.channels_last_3d)
        weight, best, until = torch.rand(128, 128, 3, 3, 3).to(dtype), np.inf, time.thread_time() + seconds
        with torch.inference_mode():
            while time.thread_time() < until:
                start = time.thread_time()
                F.conv3d(x, weight, padding=1)
                best = min(best, time.thread_time() - start)
    return float(2 * x.numel() * 27 * 128 / best / 1e9)


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products, also those of backward passes."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out
