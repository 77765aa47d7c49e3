"""Random numbers keyed by (seed, purpose, index), so that no result depends on order, workers or interruption."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def _key(seed: int, purpose: str, *index: int | str) -> bytes:
    return hashlib.sha256(repr((int(seed), purpose, *index)).encode()).digest()


def numpy_rng(seed: int, purpose: str, *index: int | str) -> np.random.Generator:
    """A generator that is the same for the same key in any process."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_key(seed, purpose, *index)[:16], "little")))


def torch_rng(seed: int, purpose: str, *index: int | str) -> torch.Generator:
    """The torch counterpart of `numpy_rng` (CPU; draws are moved to the device afterwards)."""
    return torch.Generator().manual_seed(int.from_bytes(_key(seed, purpose, *index)[:8], "little") >> 1)


class RankShard(NamedTuple):
    """What `rng` draws for a batch that is divided among `size` processes: sample i belongs to number i mod `size`."""

    rng: torch.Generator
    rank: int
    size: int


Rng = torch.Generator | RankShard


def sample_per_rank(draw: Callable[..., Tensor], n: int, *shape: int, rng: Rng) -> Tensor:
    """Random numbers (n, *shape) for `n` samples by `draw`, torch.randn or torch.rand.

    Of a `RankShard` they are drawn for the samples of all processes and cut, so that a sample's numbers are the same
    whatever the number of processes.
    """
    if isinstance(rng, torch.Generator):
        return draw(n, *shape, generator=rng)
    return draw(n * rng.size, *shape, generator=rng.rng)[rng.rank :: rng.size]
