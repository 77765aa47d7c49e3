"""Low-precision convolutions, checked against float32 when a process first meets their signature.

Which bfloat16 kernels of a library are wrong depends on the processor and on the library's version: on some, a 3x3x3
convolution of a grid one or two voxels deep returns uninitialised memory without an error. No list of exceptions can be
right, so every signature (operation, shapes, strides, precision, device, with gradients or without) is computed in both
precisions once, on random operands, and runs in float32 from then on where the two disagree. Some kernels of weight
gradients write beyond their memory, which ends the process (torch 2.13.0 on processors with AMX, rows of more than a
hundred voxels on grids few voxels deep): with gradients a signature is tried in another process first.
"""

import contextlib
import functools
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 0.03  # relative error in the Euclidean norm; that of right bfloat16 kernels is about 0.003
GARBAGE = (float("inf"), 3e4)  # freed memory is filled with these, so that a kernel that reads it is found out
LOW = (torch.bfloat16, torch.float16)
TRIES = 3  # in another process: what was written beyond memory is found when it is freed
READY, ALIVE, FAILED = "ready", "alive", "failed:"  # what it answers
OTHER = (sys.executable, "-P", __file__)  # that process, which ends with its standard input

log = logging.getLogger(__name__)
_trusted: dict[tuple, bool] = {}
_one_at_a_time = threading.Lock()


@functools.cache
def compute_dtype(precision: str) -> torch.dtype:
    """The type that networks of a `precision` of params.yaml ("float32" or "bfloat16") compute in on this machine.

    A processor without bfloat16 kernels, and without a GPU beside it, computes in float32: there a convolution in
    bfloat16 is done one product at a time, and takes a hundred times as long.
    """
    dtype = getattr(torch, precision)
    here = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.bfloat16 and not (here or torch.cuda.is_available()):
        if multiprocessing.parent_process() is None:  # workers need not repeat it
            log.warning("this processor has no kernels for bfloat16; networks compute in float32")
        return torch.float32
    return dtype


class Operation(NamedTuple):
    """A convolution but for its operands: input (n, c, z, y, x), weight and bias. Padding is (z, y, x)."""

    kind: str  # "convolution", "transposed convolution" or "product": a convolution with kernels of one voxel
    stride: int | tuple[int, int, int] = 1
    padding: tuple[int, int, int] = (0, 0, 0)
    output_padding: int | tuple[int, int, int] = 0

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.kind == "convolution":
            return F.conv3d(x, weight, bias, self.stride, self.padding)
        if self.kind == "transposed convolution":
            return F.conv_transpose3d(x, weight, bias, self.stride, self.padding, self.output_padding)
        x = F.linear(x.movedim(1, -1), weight.flatten(1)).movedim(-1, 1)
        return x if bias is None else x + bias[:, None, None, None]  # no view, whose change in place would be copied


def apply(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`operation` in the precision of `x`, or in float32 where that precision is not to be trusted; in `x`'s type."""
    if x.dtype not in LOW or trusted(operation, x, weight, bias):
        return operation.compute(x, weight, bias)
    return operation.compute(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def trusted(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether low precision gives this signature's output, and its gradients where they are asked for, right."""
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    key = (operation, _signature(x), _signature(weight), bias is not None, gradients)
    if key not in _trusted:
        ends = gradients and x.device.type == "cpu" and not survived(operation, x, weight, bias)
        error = float("inf") if ends else _error(operation, x, weight, bias, gradients)
        _trusted[key] = error <= TOLERANCE
        if not _trusted[key]:
            says = "ends the process" if ends else f"is wrong (relative error {error:.2g})"
            log.warning(
                f"{operation.kind} of {tuple(x.shape)} with {tuple(weight.shape)}, stride {operation.stride}, "
                f"in {str(x.dtype).removeprefix('torch.')} on {x.device.type} {says}; it runs in float32"
            )
    return _trusted[key]


@functools.cache
def _elsewhere() -> subprocess.Popen:
    """The process in which signatures are tried, a line of JSON each; it answers each with a line."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}  # it keeps no memory
    other = subprocess.Popen(OTHER, env=env, **pipes)
    if _answer(other) != READY:
        raise RuntimeError(f"{' '.join(OTHER)}: could not be started, to try kernels of low precision in")
    return other


def _answer(other: subprocess.Popen) -> str:
    """What it says next, without what a library may print; nothing where it has ended."""
    return next((line.strip() for line in other.stdout if line.startswith((READY, ALIVE, FAILED))), "")


def survived(operation: Operation, *operands: Tensor | None) -> bool:
    """Whether another process lives on when it computes the operation and its gradients, on operands like these."""
    like = [None if t is None else (t.shape, t.stride(), str(t.dtype).removeprefix("torch.")) for t in operands]
    with _one_at_a_time:
        if _elsewhere().poll() is not None:  # it was ended from outside
            _close()
        other = _elsewhere()
        print(json.dumps([operation, like, torch.get_num_threads()]), file=other.stdin, flush=True)
        answer = _answer(other)
        if not answer:
            _close()
    if answer.startswith(FAILED):
        raise RuntimeError(f"{operation.kind} in low precision, tried in another process: {answer}")
    return answer == ALIVE


def _close() -> None:
    """End the other process, and forget it."""
    with contextlib.suppress(OSError):
        _elsewhere().stdin.close()
    _elsewhere().wait()
    _elsewhere().stdout.close()
    _elsewhere.cache_clear()


def _try(operation: list, like: list, threads: int) -> None:
    torch.set_num_threads(threads)
    for _ in range(TRIES):
        made = [t and torch.empty_strided(t[0], t[1], dtype=getattr(torch, t[2])).normal_() for t in like]
        _outcome(Operation(*operation), made, gradients=True)


def _signature(x: Tensor) -> tuple:
    return (tuple(x.shape), x.stride(), x.dtype, x.device.type)


def _error(operation, x, weight, bias, gradients) -> float:
    """The largest relative error over two kinds of garbage in freed memory, of output and gradients."""
    rng = torch.Generator().manual_seed(0)

    def like(t):
        return torch.empty_like(t).copy_(torch.randn(t.shape, generator=rng)) if t is not None else None

    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        operands = [like(t) for t in (x, weight, bias)]
        exact = _outcome(operation, [None if t is None else t.float() for t in operands], gradients)
        worst = 0.0
        for value in GARBAGE:
            _spoil_freed_memory([*operands, *exact], value)
            found = _outcome(operation, operands, gradients)
            worst = max(worst, *(_relative(a, b) for a, b in zip(found, exact, strict=True)))
    return worst


def _outcome(operation: Operation, operands: list, gradients: bool) -> list[Tensor]:
    operands = [None if t is None else t.detach().requires_grad_(gradients) for t in operands]
    y = operation.compute(*operands)
    if not gradients:
        return [y]
    upstream = torch.empty_like(y).copy_(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return [y.detach(), *torch.autograd.grad(y, [t for t in operands if t is not None], upstream)]


def _spoil_freed_memory(tensors: list[Tensor], value: float) -> None:
    given = [t for t in tensors if t is not None]
    held = [torch.full((t.numel(),), value, dtype=d, device=t.device) for t in given for d in (t.dtype, LOW[0])]
    del held


def _relative(found: Tensor, exact: Tensor) -> float:
    error = (found.float() - exact).norm() / exact.norm().clamp(min=1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which interrupts the process that asks
    print(READY, flush=True)
    for line in sys.stdin:
        try:
            _try(*json.loads(line))
        except (RuntimeError, MemoryError) as error:
            print(FAILED, " ".join(str(error).split()), flush=True)
        else:
            print(ALIVE, flush=True)
