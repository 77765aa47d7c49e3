"""Detail: mass is kept, windows and wholes agree, training continues bit for bit, a model carries its details."""

import json

import numpy as np
import pytest
import torch

from bonelib import InputError
from bonelib.core.pyramid import downsample
from bonelib.latent.models import draw, growth_strip, load_details, load_model, refine
from bonelib.networks.detail import Detail, Refined
from bonelib.networks.progan import ProGAN
from bonelib.params import DetailLevels, Train, section
from bonelib.scans.dataset import Stacks, halved
from bonelib.scans.volumes import Volume
from bonelib.studies import superres_check as detail_check
from bonelib.training import detail as fine
from bonelib.training.loop import train

SMALL = dict(levels=2, samples=[8, 8], window=[4, 8, 8], width=8, convs=1, critic=8, batch=4, ema=1)


@pytest.fixture
def stacks():
    rng = np.random.default_rng(0)
    rows = [
        dict(scan=f"s{i}", patient=f"p{i}", split="train" if i < 4 else "held-out", volume=i, start=0) for i in range(6)
    ]
    meta = dict(stack_slices=16, data_hash="0", shape=[16, 144, 112], spacing_mm=[0.2] * 3, intensity=[-500, 1500])
    volumes = rng.random((6, 32, 144, 112)).astype(np.float16)
    return Stacks(volumes, rows, meta | dict(unit="mgHA"))


def test_what_was_given_is_kept():
    torch.manual_seed(0)
    coarse = torch.rand(2, 1, 4, 6, 8)
    drawn = Detail(8, 2)(coarse, torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 1, 8, 12, 16)
    assert torch.allclose(downsample(drawn), coarse, atol=1e-6)
    assert drawn.std() > 1.05 * coarse.std()  # and something is drawn over it


def test_a_window_is_drawn_as_its_place_in_the_whole():
    torch.manual_seed(0)
    detail, whole = Detail(8, 1), torch.rand(1, 1, 16, 18, 20)
    r, drawn = detail.reach, detail(whole)
    part = detail(whole[:, :, 2:14, 3:17, 4:18])
    inner = part[:, :, 2 * r : -2 * r, 2 * r : -2 * r, 2 * r : -2 * r]
    assert torch.allclose(
        inner, drawn[:, :, 4 + 2 * r : 28 - 2 * r, 6 + 2 * r : 34 - 2 * r, 8 + 2 * r : 36 - 2 * r], atol=1e-5
    )


def test_a_refined_generator_answers_as_a_generator():
    torch.manual_seed(0)
    own = ProGAN(widths=(8, 8), latent=4)
    refined = Refined(own, [Detail(4, 1), Detail(4, 1)])
    styles = refined.to_styles(refined.sample_latent(2, torch.Generator().manual_seed(1)))
    assert refined.stages == 3 and torch.equal(refined.synthesize(styles, 1), own.synthesize(styles, 1))
    assert refined.synthesize(styles, 2).shape == (2, 1, 4, 36, 28)
    volumes = refined.synthesize(styles, noise=torch.Generator().manual_seed(2))
    assert volumes.shape == (2, 1, 8, 72, 56) and volumes.min() >= 0 and volumes.max() <= 1
    assert torch.equal(refined.factorized_weight(), own.factorized_weight())


def test_halved_scans_keep_their_means_and_places(stacks):
    half = halved(stacks, 1)
    assert half.volumes.shape == (6, 16, 72, 56) and half.meta["stack_slices"] == 8
    assert half.meta["spacing_mm"] == [0.4] * 3 and half.meta["shape"] == [8, 72, 56]
    assert half.volumes[2, 3, 4, 5] == pytest.approx(stacks.volumes[2, 6:8, 8:10, 10:12].mean(), abs=1e-3)
    assert halved(stacks, 0) is stacks


def test_training_continues_bit_for_bit(stacks, tmp_path):
    how = DetailLevels(**SMALL)
    fine.train_details(
        how, stacks, tmp_path / "whole", state=tmp_path / "whole-state", seed=1, say=lambda *a, **k: None
    )

    class Stop(Exception):
        pass

    def stop_at_level_2(text, **_):
        if "level 2" in text:
            raise Stop

    with pytest.raises(Stop):
        fine.train_details(how, stacks, tmp_path / "broken", state=tmp_path / "state", seed=1, say=stop_at_level_2)
    said = []
    fine.train_details(
        how, stacks, tmp_path / "broken", state=tmp_path / "state", seed=1, say=lambda t, **_: said.append(t)
    )
    assert "level 1 continues at 8 of 8 samples" in said[0]
    for name in ("detail.safetensors", "curves.csv", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_training_brings_the_bands_to_their_size(stacks, tmp_path):
    """Real detail has an SD of .1 here; after some updates drawn detail is neither flat nor far too strong."""
    how = DetailLevels(**SMALL | dict(levels=1, samples=[160], ema=5))
    fine.train_details(how, stacks, tmp_path, state=tmp_path / "state", seed=1, say=lambda *a, **k: None)
    volumes = stacks.volumes[4:, :16].astype(np.float32)
    coarse = downsample(torch.from_numpy(volumes)[:, None])[:, 0].numpy()
    for row in detail_check.bands(volumes, refine(load_details(tmp_path), coarse, 1)[-1]):
        assert 0.6 < row["SD drawn"] / row["SD real"] < 1.6


def test_a_model_carries_its_details(stacks, tmp_path):
    how = DetailLevels(**SMALL)
    fine.train_details(how, stacks, tmp_path / "detail", state=tmp_path / "d", seed=1, say=lambda *a, **k: None)
    network = dict(
        generator=dict(kind="progan", widths=[8, 8, 8], latent=8),
        critic=dict(widths=[8, 8, 8]),
        schedule=dict(samples=[8, 8], fade=[0, 4], batch=[4, 4]),
        n_critic=1,
        rate=1e-3,
    )
    quiet = dict(seed=1, say=lambda *a, **k: None)
    where = dict(state=tmp_path / "s", details=tmp_path / "detail")
    train(section(Train, network, "train"), stacks, tmp_path / "model", **where, **quiet)
    model = load_model(tmp_path / "model")
    assert model.config["data"]["spacing_mm"] == [0.2] * 3
    assert draw(model, 2, seed=1).shape == (2, 16, 144, 112)
    assert [v.shape[1:] for _, v in growth_strip(tmp_path / "model", 1)] == [
        (2, 18, 14),
        (4, 36, 28),
        (8, 72, 56),
        (16, 144, 112),
    ]
    (tmp_path / "model/detail.safetensors").unlink()
    with pytest.raises(InputError, match="detail.safetensors: no such file"):
        load_model(tmp_path / "model")


def test_a_window_that_does_not_fit_is_refused(stacks, tmp_path):
    how = DetailLevels(**SMALL | dict(window=[16, 8, 8]))
    with pytest.raises(InputError, match="detail.window"):
        fine.train_details(how, stacks, tmp_path, state=tmp_path / "state", seed=1)
    assert not json.loads(DetailLevels().model_dump_json())["levels"]


def test_no_levels_are_no_work(stacks, tmp_path):
    assert fine.train_details(DetailLevels(), stacks, tmp_path, state=tmp_path / "state", seed=1) == []
    assert len(load_details(tmp_path)) == 0


def test_traits_of_the_same_bones_agree():
    z, y, x = np.indices((8, 80, 60))
    radius = np.hypot(y - 40, x - 30)

    def bone(r, seed):
        density = 50.0 * (radius < r) + 900.0 * ((radius < r) & (radius > r - 5))
        density += 600 * ((radius < r) & (np.random.default_rng(seed).random(radius.shape) < 0.1))
        return Volume(density.astype(np.float32), (0.3, 0.3, 0.3), "mgHA")

    real = [bone(r, i) for i, r in enumerate((20, 22, 24, 26))]
    rows = {r["trait"]: r for r in detail_check.traits(real, {"same": real}, seed=1, draws=20)}
    row = rows["Tb.BMD"]
    assert row["N"] == 4 and row["same"] == row["real"] and row["same, difference %"] == 0
    assert row["same, low"] == row["same, high"] == 0 and row["same, r"] == pytest.approx(1)
