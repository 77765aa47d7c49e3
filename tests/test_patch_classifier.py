"""The patch classifier tells what differs and nothing else."""

import numpy as np
import pytest

from bonelib import InputError
from bonelib.studies.patch_classifier import SIZE, classify, patch


def volumes(n, seed, lines=0.0):
    """Noise about an intensity of bone, with `lines` added to every second column."""
    found = 0.35 + 0.05 * np.random.default_rng(seed).standard_normal((n, 6, 70, 66)).astype(np.float32)
    found[..., ::2] += lines
    return found


def test_patches_have_the_shape_of_their_plane():
    rng = np.random.default_rng(0)
    assert patch(volumes(1, 0)[0], "axial", rng).shape == (3, SIZE, SIZE)
    assert patch(volumes(1, 0)[0], "coronal", rng).shape == (3, 6, SIZE)


def test_lines_are_found_and_equal_volumes_are_not_told_apart():
    patients = [f"p{i // 2}" for i in range(16)]
    lined = classify(volumes(16, 0), patients, volumes(12, 1, lines=0.06), updates=8, seed=1, draws=20)
    assert lined.accuracy.value > 0.9 and lined.accuracy.low <= lined.accuracy.value <= lined.accuracy.high
    assert lined.surest.shape[1:] == (SIZE, SIZE)
    same = classify(volumes(16, 0), patients, volumes(12, 2), updates=8, seed=1, draws=20)
    assert 0.3 < same.accuracy.value < 0.7


def test_too_few_are_refused():
    with pytest.raises(InputError, match="3 patients and 8 samples"):
        classify(volumes(3, 0), ["a", "b", "c"], volumes(8, 1), updates=1, seed=1)
