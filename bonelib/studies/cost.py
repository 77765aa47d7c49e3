"""What training and sampling cost, and what each way of saving is worth, against the plain eager implementation.

The plain one is the same network and the same update, written as one would first: float32, the default memory layout,
upsampling before its convolution, kernels made per sample, the penalty by a double backward pass, generated volumes
made batch by batch. Ratios are of times taken in turn in one run; absolute times are the machine's.
"""

import time
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bonelib.core.parallel import peak_memory, workers
from bonelib.core.random import torch_rng
from bonelib.networks import build_critic, build_generator
from bonelib.networks.layers import AddNoise, Conv, ModulatedConv, PixelNorm
from bonelib.params import CriticNet, Generator
from bonelib.training import losses, run


@dataclass(frozen=True)
class Savings:
    """Which savings are on, in the order in which the table adds them."""

    channels_last: bool = False
    folded_upsampling: bool = False
    small_products: bool = False
    shared_kernels: bool = False
    explicit_penalty: bool = False
    fakes_together: bool = False
    bfloat16: bool = False


PLAIN, ALL = Savings(), Savings(*[True] * len(fields(Savings)))


class PlainConv(Conv):
    """`Conv` with the savings that concern it switched off one by one."""

    savings = PLAIN

    def convolve(self, x: Tensor, bias: Tensor | None, factor: Tensor | None = None) -> Tensor:
        x = x if self.savings.channels_last else x.contiguous()
        if self.savings.folded_upsampling if self.upsample else self.savings.small_products:
            return super().convolve(x, bias, factor)
        weight = self.weight * self.scale if factor is None else self.weight * self.scale * factor
        return self.plainly(x, weight, bias)

    def plainly(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        """The convolution as one would first write it."""
        x, pad = x.to(self.dtype), self.pad
        if self.upsample:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.replicate:
            x, pad = F.pad(x, [p for p in reversed(pad) for _ in range(2)], mode="replicate"), 0
        bias = None if bias is None else bias.to(self.dtype)
        return F.conv3d(x, weight.to(self.dtype), bias, stride=self.stride, padding=pad, groups=groups)


class PlainModulatedConv(ModulatedConv, PlainConv):
    """`ModulatedConv` with a kernel of its own for each sample, as a grouped convolution."""

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        if self.savings.shared_kernels:
            return super().forward(x, style)
        n = len(x)
        weight = self.weight * self.scale * self.affine(style)[:, None, :, None, None, None]
        weight = self.gain * weight * torch.rsqrt(weight.square().sum((2, 3, 4, 5), keepdim=True) + 1e-8)
        x = x if self.savings.channels_last else x.contiguous()
        y = self.plainly(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), None, groups=n)
        return y.reshape(n, -1, *y.shape[2:]) + self.bias.to(y.dtype)[:, None, None, None]


class PlainPixelNorm(PixelNorm):
    """`PixelNorm` by torch's own mean over the channels."""

    savings = PLAIN

    def forward(self, x: Tensor) -> Tensor:
        if self.savings.small_products:
            return super().forward(x)
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class PlainAddNoise(AddNoise):
    """`AddNoise` with the field stretched over the channels."""

    savings = PLAIN

    def forward(self, x: Tensor, field: Tensor, weight: Tensor) -> Tensor:
        if self.savings.small_products:
            return super().forward(x, field, weight)
        return x + field.to(x) * weight.to(x.dtype).reshape(1, -1, 1, 1, 1)


def plainer(network: nn.Module, savings: Savings) -> nn.Module:
    """The network with only these savings on, its weights untouched."""
    kinds = {Conv: PlainConv, ModulatedConv: PlainModulatedConv, PixelNorm: PlainPixelNorm, AddNoise: PlainAddNoise}
    for module in network.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]
            module.savings = savings
    return network


def networks(generator: Generator, critic: CriticNet, savings: Savings, seed: int = 1) -> tuple[nn.Module, nn.Module]:
    """Generator and critic with these savings; the weights depend on the seed alone."""
    torch.manual_seed(torch_rng(seed, "cost").initial_seed())
    precision = "bfloat16" if savings.bfloat16 else "float32"
    pair = build_generator(generator, precision=precision), build_critic(critic, precision=precision)
    return plainer(pair[0], savings), plainer(pair[1], savings)


def update(generator, critic, adams, real: Tensor, stage: int, n_critic: int, savings: Savings, rng) -> Tensor:
    """One update of the generator after `n_critic` of the critic, as in the trainer; returns its samples."""
    n = len(real)

    def drawn(count):
        with torch.no_grad():
            return generator.synthesize(generator.to_styles(generator.sample_latent(count, rng)), stage, 1.0, rng)

    fakes = drawn(n_critic * n).split(n) if savings.fakes_together else (drawn(n) for _ in range(n_critic))
    for fake in fakes:
        on_real, on_fake = critic(torch.cat([real, fake]), stage).split(n)
        slope = losses.slopes(input_gradient(critic, losses.mix(real, fake, rng), stage, savings))
        run.update(adams[1], losses.critic_loss(on_real, on_fake, slope, penalty=10, drift=1e-3), 2.0)
    critic.requires_grad_(False)
    fake = generator.synthesize(generator.to_styles(generator.sample_latent(n, rng)), stage, 1.0, rng)
    run.update(adams[0], losses.generator_loss(critic(fake, stage)), 2.0)
    critic.requires_grad_(True)
    return fake.detach()


def input_gradient(critic, x: Tensor, stage: int, savings: Savings) -> Tensor:
    """The gradient that the penalty is on, as a chain of transposed convolutions or by autograd."""
    if savings.explicit_penalty:
        return critic.input_gradient(x, stage)
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(critic(x, stage).sum(), x, create_graph=True)[0]


def variants(kind: str) -> dict[str, Savings]:
    """The savings added one by one: {name of what is added: all that is on}."""
    found, now = {"plain": PLAIN}, PLAIN
    for field in fields(Savings):
        now = replace(now, **{field.name: True})
        if field.name != "shared_kernels" or kind == "stylegan":
            found[field.name.replace("_", " ")] = now
    return found


def update_times(
    generator: Generator,
    critic: CriticNet,
    which: dict[str, Savings],
    *,
    stage: int,
    batch: int,
    n_critic: int,
    rounds: int,
    seed: int = 1,
) -> list[dict]:
    """Seconds of one core for an update with each of `which`, taken in turn, after one round that is not counted.

    Rows: savings, seconds (median), least, most, times faster than the first of `which`, GFLOP done, GFLOP/s, rounds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = {}
        for name, savings in which.items():
            pair = networks(generator, critic, savings, seed)
            adams = [torch.optim.Adam(net.parameters(), 1e-4, betas=(0.0, 0.98), fused=True) for net in pair]
            with torch.no_grad():
                styles = pair[0].to_styles(pair[0].sample_latent(1, torch_rng(seed, "cost shape")))
                shape = pair[0].synthesize(styles, stage).shape[1:]
            real = torch.rand(batch, *shape, generator=torch_rng(seed, "cost real"))
            runs[name] = (*pair, adams, real, stage, n_critic, savings, torch_rng(seed, "cost draws"))
        flops, seconds = {}, {name: [] for name in runs}
        for turn in range(rounds + 1):
            for name, run in runs.items():
                if turn == 0:
                    with _Flops() as counter:
                        update(*run)
                    flops[name] = counter.total / 1e9
                    continue
                start = time.thread_time()
                update(*run)
                seconds[name].append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    first = next(iter(median.values()))
    return [
        {
            "savings": name, "seconds": median[name], "least": min(values), "most": max(values),
            "times faster": first / median[name], "GFLOP": flops[name], "GFLOP/s": flops[name] / median[name],
            "rounds": rounds,
        }
        for name, values in seconds.items()
    ]  # fmt: skip


def stage_costs(generator: Generator, critic: CriticNet, name: str, savings: Savings, *, stages, **how) -> list[dict]:
    """The row of `update_times` for one variant at each of `stages`, coarsest first, in a process of its own.

    And that process's peak memory in MB, which is that of the stage, as no stage before it is as large.
    """
    with workers(1) as pool:
        return pool.submit(_updated, generator, critic, {name: savings}, sorted(stages), how).result()


def _updated(generator: Generator, critic: CriticNet, which: dict[str, Savings], stages: list[int], how: dict) -> list:
    before, rows = peak_memory(), []
    for stage in stages:
        (row,) = update_times(generator, critic, which, stage=stage, **how)
        del row["times faster"]  # than itself
        rows.append({"stage": stage} | row | {"MB above start": peak_memory() - before, "MB in all": peak_memory()})
    return rows


class _Flops(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products, also those of a double backward."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def sampling_cost(generator: Generator, savings: Savings) -> dict[str, float]:
    """Seconds of one core for one volume of the last stage, and the process's peak memory above its start, in MB."""
    with workers(1) as pool:
        return pool.submit(_sampled, generator, savings).result()


def _sampled(how: Generator, savings: Savings) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    precision = "bfloat16" if savings.bfloat16 else "float32"
    generator = plainer(build_generator(how, precision=precision), savings).eval()
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.rand(4, 128, 8, 24, 24).to(dtype).contiguous(memory_format=torch.channels_last_3d)
        weight, best, until = torch.rand(128, 128, 3, 3, 3).to(dtype), np.inf, time.thread_time() + seconds
        with torch.inference_mode():
            while time.thread_time() < until:
                start = time.thread_time()
                F.conv3d(x, weight, padding=1)
                best = min(best, time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return float(2 * x.numel() * 27 * 128 / best / 1e9)
