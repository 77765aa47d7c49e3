"""What is said of HA-GAN: empty slices, the seams of sub-volumes, what its parts are worth, memory over size."""

import numpy as np
import pytest
import torch
from test_ablation import InThisProcess

from bonelib.core.config import section
from bonelib.latent.models import Model
from bonelib.networks.config import HAGANConfig
from bonelib.networks.hagan import Grid
from bonelib.networks.registry import build_generator
from bonelib.scans.dataset import Stacks
from bonelib.scans.phantom.contrasts import Slices
from bonelib.studies import ablation
from bonelib.studies import hagan_study as study
from bonelib.studies.config import Trials
from bonelib.studies.hagan_config import HAGANStudy

SMALL = dict(
    kind="hagan", base=[2, 3, 2], stages=3, widths=[16, 16], fine=[16], low=[16], encoder=[16], latent=8, division=2
)  # 16 x 24 x 16 voxels from 4 x 6 x 4 cells, two of which are a sub-volume
TRAIN = dict(generator=SMALL, critic=dict(high=[4, 4, 4], head=[4, 4], low=[4]), samples=8, batch=4)
HOW = dict(train=TRAIN, trials=dict(base=TRAIN, variants={"as it is": {}}, seeds=1, seconds=0.1, samples=8), blank=0.25)


def stacks():
    rng = np.random.default_rng(0)
    split = ["train"] * 8 + ["held-out"] * 4
    rows = [dict(scan=f"s{i}", patient=f"p{i // 2}", split=split[i], volume=i, start=i % 3) for i in range(12)]
    meta = dict(stack_slices=16, data_hash="0", spacing_mm=[0.1] * 3, shape=[18, 24, 16])
    return Stacks(rng.uniform(0.1, 1, (12, 18, 24, 16)).astype(np.float16), rows, meta)


def test_empty_slices_lie_at_the_ends_and_the_rest_stays():
    data = stacks()
    found = study.blanked(data, 0.25, 1)
    for row, old in zip(found.rows, data.rows, strict=True):
        stack = found.pooled([row], 0)[0, 0].numpy()
        given = data.pooled([old], 0)[0, 0].numpy()
        empty = ~stack.any((1, 2))
        assert empty.sum() == 4 and np.array_equal(stack[~empty], given[~empty])
        assert np.diff(np.flatnonzero(~empty)).max() == 1  # what is left is in one piece
    assert len({study.blanked(data, share, 1).meta["data_hash"] for share in (0.25, 0.5)} | {"0"}) == 3
    assert found.of("held-out")[0]["patient"] == data.of("held-out")[0]["patient"]


def test_stacks_of_both_splits_are_compared_on_one_grid():
    sets, patients = study.compared(stacks(), 3, 1)
    assert sets["real"].shape == (3, 16, 24, 16) == sets["other real"].shape and set(patients) <= {"p4", "p5"}


def test_a_jump_where_sub_volumes_meet_is_found():
    grid, volumes = Grid(4, 2, 4), np.random.default_rng(0).random((3, 16, 40, 40))
    assert study.junction_jump(volumes, grid) == pytest.approx(1, abs=0.1)
    volumes[:, 8:] += 1  # where the second of two sub-volumes begins
    assert study.junction_jump(volumes, grid).min() > 2
    volumes[:, 4:] += 1
    assert study.junction_jump(volumes, grid).max() < 2.9


def test_a_sub_volume_with_a_halo_is_nearer_to_the_whole_than_one_with_zeros_beyond():
    generator = build_generator(section(HAGANConfig, SMALL, "generator")).eval()
    rows = {row["slices from the meeting"]: row for row in study.seams(Model(generator, None, {}), 2, 1)}
    assert sorted(rows) == [-4, -3, -2, -1, 1, 2, 3, 4] and generator.halo
    for at, row in rows.items():
        assert row[study.HALO] < row[study.ZEROS] or abs(at) > 3
    for block in generator.fine_blocks:  # without norms nothing is left
        block.norm = torch.nn.Identity()
    assert max(row[study.HALO] for row in study.seams(Model(generator, None, {}), 1, 1)) < 1e-5


def test_samples_have_a_row_with_intervals_below_that_of_further_real_stacks():
    rng = np.random.default_rng(0)
    features = {name: rng.standard_normal((16, 4)) + off for name, off in (("real", 0), ("other real", 0), ("far", 9))}
    volumes = {name: rng.random((16, 16, 8, 8)) for name in features}
    how = dict(seed=1, draws=10)
    real, far = study.table({"random3d": features}, [f"p{i // 2}" for i in range(16)], volumes, Grid(4, 2, 4), **how)
    assert (real["set"], far["set"]) == (study.REAL, "far") and far["FD"] > 10 * real["FD"]
    assert far["FD low"] <= far["FD"] <= far["FD high"] and far["ellipse overlap"] < real["ellipse overlap"]
    assert far["jump low"] <= far["jump"] <= far["jump high"]
    first, last = study.readable([real | {"stacks": "all"}, far])
    assert first["stacks"] == "all" and not last["stacks"] and "no interval" in first["FD"]
    assert last["FD"] == f"{far['FD']:.3g} ({far['FD low']:.3g} to {far['FD high']:.3g})"


def test_a_part_matters_where_it_makes_more_of_a_difference_than_a_seed():
    def rows(*values):
        pairs = zip(("plain", "other"), values, strict=True)
        return [dict(variant=name, seed=i, FD=v) for name, of in pairs for i, v in enumerate(of)]

    (worse,) = study.over_seeds(rows([1, 1.2], [3, 3.1]), ["plain", "other"])
    (same,) = study.over_seeds(rows([1, 3], [2, 3]), ["plain", "other"])
    (single,) = study.over_seeds(rows([1], [5]), ["plain", "other"])
    assert "worse by more" in worse and "nothing follows" in same and "one seed" in single


@pytest.mark.parametrize(("mine", "verdict"), [(10, "is HA-GAN's"), (90, "is not HA-GAN's")])
def test_the_slope_of_memory_over_size_is_read_from_the_numbers(mine, verdict):
    rows = [
        dict(generator=name, voxels=voxels, seconds=1.0, **{"MB measured": 5 + slope * voxels / 1e6})
        for name, slope in (("hagan", mine), ("progan", 50))
        for voxels in (10**6, 4 * 10**6)
    ]
    found = study.slopes(rows)
    assert found[0][f"MB measured, {study.EACH}"] == pytest.approx(mine)
    assert verdict in study.advantage(found)


def test_trials_of_hagan_are_trained_and_two_more_of_other_stacks(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "workers", InThisProcess)
    asked = []

    def drawn(seed, patients, shape, women):
        asked.append((patients, shape[1:]))
        people = [dict(patient=f"q{i}", split="held-out" if i % 4 == 3 else "train") for i in range(patients)]
        volumes = np.random.default_rng(seed).random((2 * patients, 20, *shape[1:])).astype(np.float16)
        return Slices(Stacks(volumes, [], stacks().meta), people)

    monkeypatch.setattr(study, "draw_slices", drawn)
    how = section(HAGANStudy, HOW | dict(second=dict(patients=8, stacks=3, seconds=0.1)), "study")
    found = study.trained(how, ablation.on_grid(Trials(**HOW["trials"]), stacks()), tmp_path, seed=1)
    assert [list(trials) for _, trials in found.values()] == [
        [("as it is", 1)], [(study.BLANK, 1)], [(study.SECOND, 1)],
    ]  # fmt: skip
    for _, trials in found.values():
        for took, volumes in trials.values():
            assert volumes.shape == (8, 16, 24, 16) and took["samples"] % 4 == 0 < took["samples"]
    assert asked == [(8, (24, 16))] and len(found[study.SECOND][0].rows) == 24
    real, patients = study.compared(found[study.SECOND][0], 8, 1)
    assert real["real"].shape == (6, 16, 24, 16) and set(patients) == {"q3", "q7"}
