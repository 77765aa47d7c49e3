"""Style mixing: exact on the oracle, of which it is known what every style carries."""

import numpy as np
import pytest
import torch
from oracle import INTENSITY, TRAITS, Oracle

from bonelib import InputError
from bonelib.core.random import torch_rng
from bonelib.latent import mixing as mx
from bonelib.latent.codes import choose_pairs
from bonelib.scans.config import Preprocess


@pytest.fixture(scope="module")
def oracle():
    return Oracle()


def codes_of(oracle, n, seed=1):
    return oracle.sample_latent(n, torch_rng(seed, "test"))[:, None].repeat(1, oracle.layers, 1)


def test_the_published_crossings_follow_the_number_of_styles():
    assert mx.crossings(15, (3, 7, 12), 15) == [3, 7, 12]
    assert mx.crossings(6, (3, 7, 12), 15) == [1, 3, 5] and mx.crossings(3, (3, 7, 12), 15) == [1, 2]
    assert mx.scaled(3, (3, 7, 12), 15) == "3 of 15: 1 of 3; 7 of 15: 1 of 3; 12 of 15: 2 of 3"


def test_what_is_crossed(oracle):
    source, target = codes_of(oracle, 2)
    assert torch.equal(mx.crossed(source, target, 0), target) and torch.equal(mx.crossed(source, target, 3), source)
    mix = mx.crossed(source, target, 1)
    assert torch.equal(mix[0], source[0]) and torch.equal(mix[1:], target[1:])
    for wrong, says in ((source[0], "one style"), (source[:1], "one style")):
        with pytest.raises(InputError, match=says):
            mx.crossed(wrong, wrong, 1)
    with pytest.raises(InputError, match="accepted are 0 to 3"):
        mx.crossed(source, target, 4)


def test_a_crossing_takes_every_attribute_with_its_style(oracle):
    source, target = codes_of(oracle, 2)[:, None]
    of_source, of_target = oracle.attributes(source), oracle.attributes(target)
    for first in range(4):
        found = oracle.attributes(mx.crossed(source, target, first))
        for name, (_, _, style) in TRAITS.items():
            assert torch.equal(found[name], (of_source if style < first else of_target)[name])


def test_every_attribute_is_found_to_be_carried_by_its_style(oracle):
    codes, pairs = codes_of(oracle, 12), [(i, (i + 3) % 12) for i in range(12)]
    changes = {name: np.zeros((12, 4)) for name in TRAITS}
    for row, (i, j) in enumerate(pairs):
        own, other = codes[i], codes[j]
        swapped = [mx.crossed(mx.crossed(own, other, k), own, k + 1) for k in range(3)]
        found, base = oracle.attributes(torch.stack([*swapped, other])), oracle.attributes(own[None])
        for name in TRAITS:
            changes[name][row] = (found[name] - base[name]).numpy()
    changes["Ct.Th"][0] = np.nan  # one that could not be measured
    for row in mx.style_attribution(changes, [(f"p{i}", f"p{j}") for i, j in pairs], seed=1, draws=50):
        assert row["value"] == pytest.approx(float(TRAITS[row["attribute"]][2] == row["style"] - 1), abs=1e-9)
        assert row["N"] == (11 if row["attribute"] == "Ct.Th" else 12)


def test_the_table_has_a_column_a_style():
    row = dict(model="m", attribute="Ct.Th", style=1, value=0.5, low=0.25, high=0.75, N=7, patients=4)
    table = mx.by_style([row, row | dict(style=2, value=None)])
    assert table == [{"model": "m", "": "Ct.Th", "style 1": "0.50 (0.25 to 0.75)", "N": 7, "style 2": "none"}]


def test_injecting_a_contrast_has_its_cliff_behind_the_style_that_carries_it(oracle):
    source = codes_of(oracle, 8)
    target = source.clone()
    target[:, 1] += 2 * oracle.direction("Ct.BMD").float()  # the same bones, with another cortex
    images = oracle.synthesize(target)
    width = INTENSITY[1] - INTENSITY[0]
    paired = mx.injected(oracle.synthesize, source, target, images) * width
    assert paired.shape == (8, 4) and paired[:, :2].max() < 1e-3 and paired[:, 2:].min() > 1
    stranger = mx.injected(oracle.synthesize, source, target.roll(1, 0), images) * width
    assert (stranger[:, 0] > 3 * paired[:, 2]).all()  # an unpaired target's shape comes along
    assert (stranger[:, 1] < stranger[:, 0]).all() and stranger[:, 1].min() > 1


def test_sources_are_low_and_targets_high():
    values, patients = [1.0, 2, 3, 4, np.nan, 9], list("abcdef")
    pairs = choose_pairs(values, patients, 0.4, 99, np.random.default_rng(1), opposite=True)
    assert sorted(pairs) == [(0, 3), (0, 5), (1, 3), (1, 5)]
    with pytest.raises(InputError, match="of two patients"):
        choose_pairs([1.0, 1.0], "ab", 0.5, 3, np.random.default_rng(1), opposite=True)


def test_twins_are_one_bone_with_less_mineral():
    how = Preprocess(
        shape=(21, 72, 56), subsample=1, dct_clip=1000, stack_slices=8, stacks_per_scan=3, held_out=0.5,
        intensity=(-500, 1500),
    )  # fmt: skip
    rich, poor = np.stack([mx._pair_of_phantoms(number, 0.8, how, 0.4856, 1) for number in (1, 2)], 1)
    assert rich.shape == (2, 1, 8, 72, 56) and rich.min() >= 0 and rich.max() <= 1
    density = lambda x: 2000 * x - 500  # noqa: E731
    for a, b, other in zip(density(rich), density(poor), density(poor)[::-1], strict=True):
        cortex = a > 700
        assert b[cortex].mean() / a[cortex].mean() == pytest.approx(0.8, abs=0.06)
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.85 > 0.6 > np.corrcoef(a.ravel(), other.ravel())[0, 1]
