"""Random numbers keyed by (seed, purpose, index), so that no result depends on order, workers or interruption."""

import hashlib

import numpy as np
import torch


def _key(seed: int, purpose: str, *index: int | str) -> bytes:
    return hashlib.sha256(repr((int(seed), purpose, *index)).encode()).digest()


def numpy_rng(seed: int, purpose: str, *index: int | str) -> np.random.Generator:
    """A generator that is the same for the same key in any process."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_key(seed, purpose, *index)[:16], "little")))


def torch_rng(seed: int, purpose: str, *index: int | str) -> torch.Generator:
    """The torch counterpart of `numpy_rng` (CPU; draws are moved to the device afterwards)."""
    return torch.Generator().manual_seed(int.from_bytes(_key(seed, purpose, *index)[:8], "little") >> 1)
