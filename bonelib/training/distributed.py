"""Several processes train one model: each has its part of every batch, and their gradients are averaged.

torchrun starts them; they talk through gloo on CPUs and through NCCL on GPUs, one a process. Nothing is wrapped around
the networks: a wrapper that averages a gradient as soon as the backward pass has reached it goes wrong without a word
where the critic's score and its penalty are sent back one after the other (pytorch#47562). After one backward pass
through the whole loss there is nothing to get wrong, and the mean over equal parts is the mean over the batch.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bonelib import InputError
from bonelib.training.config import Schedule

TIMEOUT_S = 600.0  # without a sign of another process until it is given up; reading stacks and saving take their time


class RankError(RuntimeError):
    """Another process is lost, hangs, or holds other weights. Its text is one sentence."""


class Ranks(NamedTuple):
    """This process, number `rank` of the `size` that train together, and its device.

    `talk` is the group for what is not a gradient: always gloo, which raises an error in time where NCCL would hang.
    """

    rank: int
    size: int
    device: torch.device
    talk: Any = None
    timeout_s: float = TIMEOUT_S

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"


def single_process() -> Ranks:
    """One process, on the GPU if there is one."""
    return Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def process_group(timeout_s: float = TIMEOUT_S) -> Iterator[Ranks]:
    """Join the processes that torchrun started, and leave them at the end; without torchrun there is one. Raises
    `InputError` if they do not find each other within `timeout_s`, and `RankError` when one is missed for as long
    later."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield single_process()
        return
    timeout, cuda = timedelta(seconds=timeout_s), torch.cuda.is_available()
    try:
        rank, size, local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=size, timeout=timeout)
        ranks = Ranks(rank, size, device, dist.new_group(backend="gloo", timeout=timeout), timeout_s)
    except (KeyError, ValueError, RuntimeError) as error:
        why = str(error).strip().split("\n")[0]
        raise InputError(f"the processes did not find each other; were they started by torchrun? ({why})") from None
    try:
        yield ranks
    except InputError as error:
        raise InputError(f"{ranks}: {error}") from None
    barrier(ranks)
    dist.destroy_process_group()


def check_batches(plan: Schedule, ranks: Ranks) -> None:
    """Refuse a schedule with a batch that the processes cannot share equally."""
    for stage, batch in enumerate(plan.batch, 1):
        if batch % ranks.size:
            raise InputError(
                f"params.yaml: schedule.batch: the {batch} samples of stage {stage} cannot be divided equally among "
                f"{ranks.size} processes; give a multiple of {ranks.size}, or start another number of processes"
            )


@contextmanager
def _together(ranks: Ranks) -> Iterator[None]:
    """An exchange, begun when all processes are here. One that does not come in time ends it with a `RankError`.

    Rank 0 hears from all of them and names it; the others hear from rank 0 alone.
    """
    try:
        dist.monitored_barrier(ranks.talk, timedelta(seconds=ranks.timeout_s), wait_all_ranks=True)
        yield
    except RuntimeError as error:
        lost = re.search(r"Ranks? (\d[\d, ]*) failed to pass", str(error))
        who = f"rank {lost[1]}" if lost else "rank 0, or one it waits for," if ranks.rank else "another process"
        raise RankError(f"{ranks}: {who} does not answer, since it ended or hangs; this one ends too") from None


def barrier(ranks: Ranks) -> None:
    """Wait until all processes are here."""
    if ranks.size > 1:
        with _together(ranks):
            pass


def average_gradients(parameters: Iterable[Tensor], ranks: Ranks) -> None:
    """Replace the gradients of `parameters` by their means over all processes, in one flat message."""
    if ranks.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    with _together(ranks):
        dist.all_reduce(flat)
    flat /= ranks.size
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def all_reduce_mean(values: Sequence[Tensor | float], ranks: Ranks) -> list[float]:
    """The means of single numbers over all processes."""
    own = [value.item() if isinstance(value, Tensor) else float(value) for value in values]
    if ranks.size == 1:
        return own
    sums = torch.tensor(own, dtype=torch.float64)
    with _together(ranks):
        dist.all_reduce(sums, group=ranks.talk)
    return (sums / ranks.size).tolist()


def broadcast(thing: Any, ranks: Ranks) -> Any:
    """What rank 0 holds as `thing`, on all processes; it travels by pickle, between processes of one job alone."""
    box = [thing]
    if ranks.size > 1:
        with _together(ranks):
            dist.broadcast_object_list(box, src=0, group=ranks.talk)
    return box[0]


@torch.no_grad()
def checksum(parameters: Iterable[Tensor]) -> Tensor:
    """One number (int64) of the bits of float32 `parameters` and of their places."""
    bits = torch.cat([p.detach().flatten() for p in parameters]).view(torch.int32).long()
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum().cpu()  # wraps around, as a hash may


def assert_replicas_equal(parameters: Iterable[Tensor], ranks: Ranks, update: int) -> None:
    """Raise `RankError`, naming the processes and the `update`, unless all hold the same `parameters` bit for bit."""
    if ranks.size == 1:
        return
    own = checksum(parameters)
    sums = [torch.zeros_like(own) for _ in range(ranks.size)]
    with _together(ranks):
        dist.all_gather(sums, own, group=ranks.talk)
    if drifted := [str(rank) for rank, other in enumerate(sums) if other != sums[0]]:
        raise RankError(
            f"{ranks}: after update {update} the weights of rank {', '.join(drifted)} are not those of rank 0; the "
            "training would be worth nothing, and ends; started again, it goes on from the last state saved"
        )
