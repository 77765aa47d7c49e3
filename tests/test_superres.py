"""Super-resolution: mass is kept, windows and wholes agree, training continues bit for bit, a model carries it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bonelib import InputError
from bonelib.core.config import section
from bonelib.latent.models import draw, enlarge, growth_strip, load_model, load_superres
from bonelib.networks.config import SuperRes
from bonelib.networks.progan import ProGAN
from bonelib.networks.superres import Cascaded, SuperResolution, TexturePrior
from bonelib.scans.dataset import Stacks, halved
from bonelib.scans.volumes import Volume
from bonelib.studies import superres_check
from bonelib.training import losses, run, superres, texture_reader
from bonelib.training.config import Train
from bonelib.training.loop import train

SMALL = dict(samples=16, window=[2, 4, 4], width=8, depth=1, fine_width=8, fine_depth=1, critic=[8, 8], batch=4, ema=1)
SMALL |= dict(lattice=0.01, obedience=0.3)


def quiet(*_, **__):
    pass


@pytest.fixture
def stacks():
    return random_scans()


def random_scans():
    rng = np.random.default_rng(0)
    rows = [
        dict(scan=f"s{i}", patient=f"p{i}", split="train" if i < 4 else "held-out", volume=i, start=0) for i in range(6)
    ]
    meta = dict(stack_slices=16, data_hash="0", shape=[16, 144, 112], spacing_mm=[0.2] * 3, intensity=[-500, 1500])
    volumes = rng.random((6, 32, 144, 112)).astype(np.float16)
    return Stacks(volumes, rows, meta | dict(unit="mgHA"))


@pytest.fixture
def textures():
    values = np.random.default_rng(1).random((6, 5)).astype(np.float32)
    values[2] = np.nan  # one scan could not be measured
    return values


@pytest.fixture
def small():
    torch.manual_seed(0)
    return SuperResolution(8, 1, 8, 1)


def test_what_was_given_is_kept(small):
    given = torch.rand(2, 1, 4, 6, 8)
    drawn = small(given, torch.randn(2, 5), torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 1, 16, 24, 32)
    assert torch.allclose(small.reduced(drawn), given, atol=1e-6)
    assert drawn.std() > 1.05 * given.std()  # and something is drawn over it


def test_a_window_is_drawn_as_its_place_in_the_whole(small):
    given = torch.rand(1, 1, 24, 26, 28)
    drawn, part = small(given), small(given[:, :, 2:22, 3:25, 4:28])
    reach = 6  # voxels of the given grid over which an edge is felt
    cut = tuple(slice(4 * reach, n - 4 * reach) for n in part.shape[2:])
    place = tuple(
        slice(4 * (reach + o), 4 * (reach + o) + c.stop - c.start) for o, c in zip((2, 3, 4), cut, strict=True)
    )
    assert torch.allclose(part[0, 0][cut], drawn[0, 0][place], atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 2, 5), (1, 4, 4)])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_whole_is_what_its_surroundings_give_less_these(shape, depth):
    torch.manual_seed(0)
    net, given = SuperResolution(8, 1, 8, depth).eval(), torch.rand(1, 1, *shape)
    halo = [min(2, n - 1) for n in shape]
    around = torch.nn.functional.pad(given, [h for h in reversed(halo) for _ in range(2)], mode="reflect")
    with torch.no_grad():
        all_of_it = net(around, noise=torch.Generator().manual_seed(1)).clamp(0, 1)
        whole = net.whole(given, noise=torch.Generator().manual_seed(1))
    inner = tuple(slice(4 * h, 4 * (h + n)) for h, n in zip(halo, shape, strict=True))
    assert torch.allclose(whole, all_of_it[(slice(None), slice(None), *inner)], atol=1e-5)


def test_twice_as_fine_keeps_what_was_given():
    torch.manual_seed(0)
    net, given = SuperResolution(8, 1, 8, 2, texture=0, factor=2).eval(), torch.rand(2, 1, 4, 6, 8)
    drawn = net(given, noise=torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 1, 8, 12, 16) and drawn.std() > 1.05 * given.std()
    assert torch.allclose(net.reduced(drawn), given, atol=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("fine_depth", [1, 2])
def test_slabs_draw_what_the_whole_does(factor, fine_depth):
    torch.manual_seed(0)
    net = SuperResolution(8, 2, 8, fine_depth, texture=0, factor=factor).eval()
    given = torch.rand(1, 1, 37, 5, 6)

    def whole(most):
        with torch.no_grad():
            return net.whole(given, noise=torch.Generator().manual_seed(1), most=most)

    at_once = whole(10**9)
    assert at_once.shape == (1, 1, *(factor * n for n in given.shape[2:]))
    assert torch.allclose(whole(at_once.numel() // 5), at_once, atol=1e-6)


def test_a_cascade_may_go_on(small):
    torch.manual_seed(0)
    cascaded = Cascaded(ProGAN(widths=(8, 8), latent=4), small, SuperResolution(8, 1, 8, 1, texture=0, factor=2))
    styles = cascaded.to_styles(cascaded.sample_latent(1, torch.Generator().manual_seed(1)))
    volumes = [cascaded.synthesize(styles, stage, noise=torch.Generator().manual_seed(2)) for stage in range(1, 5)]
    assert cascaded.stages == 4 and [v.shape[2] for v in volumes] == [2, 4, 8, 16]
    both = torch.stack([cascaded.finer[0].reduced(volumes[3]).flatten(), volumes[2].flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9  # not equal, as both are clamped


def test_a_cascade_answers_as_a_generator(small):
    torch.manual_seed(0)
    own = ProGAN(widths=(8, 8), latent=4)
    cascaded = Cascaded(own, small)
    latent = cascaded.sample_latent(2, torch.Generator().manual_seed(1))
    styles = cascaded.to_styles(latent)
    assert cascaded.stages == 3 and latent.shape == (2, 4 + 5)
    assert torch.equal(cascaded.synthesize(styles, 1), own.synthesize(styles[:, :4], 1))
    assert torch.equal(cascaded.coarse(styles), own.synthesize(styles[:, :4]))
    whole = cascaded.synthesize(styles, noise=torch.Generator().manual_seed(2))
    assert whole.shape == (2, 1, 8, 72, 56) and whole.min() >= 0 and whole.max() <= 1
    assert cascaded.synthesize(styles, 2).shape == (2, 1, 4, 36, 28)
    assert cascaded.factorized_weight().shape == (len(own.factorized_weight()) + 2 * (8 + 8), 4 + 5)
    assert torch.equal(cascaded.to_styles(latent, 0.0), torch.zeros(2, 9))


def test_the_texture_prior_draws_what_it_was_fitted_to():
    torch.manual_seed(0)
    volumes = torch.rand(400, 1, 2, 6, 6) * torch.linspace(0.4, 1, 400)[:, None, None, None, None]
    codes = TexturePrior.histogram(volumes)[:, :2] @ torch.tensor([[1.0, 0.5], [0.0, 1.0]]) + 0.1 * torch.randn(400, 2)
    prior = TexturePrior(2)
    prior.fit(volumes, codes)
    drawn = prior(volumes, torch.randn(400, 2))
    assert torch.allclose(drawn.std(0), codes.std(0), rtol=0.1)
    assert torch.corrcoef(torch.stack([drawn[:, 0], codes[:, 0]]))[0, 1] > 0.9
    assert torch.allclose(prior(volumes, prior.inverse(volumes, codes)), codes, atol=1e-3)


def test_halved_scans_keep_their_means_and_places(stacks):
    half = halved(stacks, 1)
    assert half.volumes.shape == (6, 16, 72, 56) and half.meta["stack_slices"] == 8
    assert half.meta["spacing_mm"] == [0.4] * 3 and half.meta["shape"] == [8, 72, 56]
    assert half.volumes[2, 3, 4, 5] == pytest.approx(stacks.volumes[2, 6:8, 8:10, 10:12].mean(), abs=1e-3)
    assert halved(stacks, 0) is stacks


def test_training_continues_bit_for_bit(stacks, textures, tmp_path, monkeypatch):
    how = SuperRes(**SMALL)
    superres.train_superres(how, stacks, textures, tmp_path / "whole", state=tmp_path / "s", seed=1, say=quiet)
    monkeypatch.setattr(run, "SAVE_EVERY_S", 0.0)
    update_ema, calls = run.update_ema, []

    def killed(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        update_ema(*given)

    where, said = dict(state=tmp_path / "state", seed=1), []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "update_ema", killed)
        superres.train_superres(how, stacks, textures, tmp_path / "broken", **where, say=quiet)
    superres.train_superres(how, stacks, textures, tmp_path / "broken", **where, say=lambda t, **_: said.append(t))
    assert "continues at 8 of 16 samples" in said[0] and "0 of 8 updates were left out" in said[-1]
    for name in ("superres.safetensors", "curves.csv", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_training_brings_what_is_added_to_its_size(stacks, textures, tmp_path):
    """What 4x4x4 means lose has an SD of .29 here; after some updates the drawn is neither flat nor far too strong."""
    how = SuperRes(**SMALL | dict(samples=200, ema=5))
    superres.train_superres(how, stacks, textures, tmp_path, state=tmp_path / "state", seed=1, say=quiet)
    volumes = torch.from_numpy(stacks.volumes[4:, :16].astype(np.float32))[:, None]
    network = load_superres(tmp_path)
    drawn = torch.from_numpy(enlarge(network, network.reduced(volumes)[:, 0].numpy(), 1))
    assert 0.5 < drawn.std() / volumes.std() < 1.5


def test_training_twice_as_fine_needs_no_texture(stacks, tmp_path):
    how = SuperRes(**SMALL | dict(factor=2, texture=0))
    none = np.zeros((6, 0), np.float32)
    superres.train_superres(how, stacks, none, tmp_path, state=tmp_path / "state", seed=1, say=quiet)
    network, given = load_superres(tmp_path), stacks.volumes[4:, :8, :16, :16].astype(np.float32)
    assert enlarge(network, given, 1).shape == (2, 16, 32, 32)


def test_updates_left_out_are_bounded_and_a_slope_that_is_not_finite_is_an_alarm(
    stacks, textures, tmp_path, monkeypatch
):
    how, update, calls = SuperRes(**SMALL), run.update, []

    def some_left_out(*given):
        calls.append(1)
        return False if len(calls) == 2 else update(*given)

    where = dict(seed=1, say=quiet)
    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match="1 of 8 updates were left out.*accepted are 1%"),
    ):
        patch.setattr(run, "update", some_left_out)
        superres.train_superres(how, stacks, textures, tmp_path / "a", state=tmp_path / "sa", **where)
    slopes = superres.losses.slopes
    monkeypatch.setattr(superres.losses, "slopes", lambda gradient: slopes(gradient) * float("inf"))
    monkeypatch.setattr(run, "update", lambda *given: True)
    with pytest.raises(InputError, match="at 4 samples .*slope is inf.*though the update was taken"):
        superres.train_superres(how, stacks, textures, tmp_path / "b", state=tmp_path / "sb", **where)


def test_a_model_carries_its_super_resolution(stacks, textures, tmp_path):
    superres.train_superres(
        SuperRes(**SMALL), stacks, textures, tmp_path / "superres", state=tmp_path / "d", seed=1, say=quiet
    )
    network = dict(
        generator=dict(kind="progan", widths=[8, 8, 8], latent=8),
        critic=dict(widths=[8, 8, 8]),
        schedule=dict(samples=[8, 8], fade=[0, 4], batch=[4, 4]),
        n_critic=1,
        rate=1e-3,
    )
    where = dict(state=tmp_path / "s", superres=tmp_path / "superres", seed=1, say=quiet)
    train(section(Train, network, "train"), stacks, tmp_path / "model", **where)
    model = load_model(tmp_path / "model")
    assert model.config["data"]["spacing_mm"] == [0.2] * 3
    assert draw(model, 2, seed=1).shape == (2, 16, 144, 112)
    shapes = [v.shape[1:] for _, v in growth_strip(tmp_path / "model", 1)]
    assert shapes == [(2, 18, 14), (4, 36, 28), (8, 144, 112)]  # the middle of the finest
    (tmp_path / "model/superres.safetensors").unlink()
    with pytest.raises(InputError, match="superres.safetensors: no such file"):
        load_model(tmp_path / "model")


def test_a_window_that_does_not_fit_is_refused(stacks, textures, tmp_path):
    how = SuperRes(**SMALL | dict(window=[16, 8, 8]))
    with pytest.raises(InputError, match="superres.window"):
        superres.train_superres(how, stacks, textures, tmp_path, state=tmp_path / "state", seed=1)


def test_a_training_goes_on_from_earlier_weights(stacks, textures, tmp_path):
    how = section(SuperRes, SMALL, "superres")
    superres.train_superres(how, stacks, textures, tmp_path / "a", state=tmp_path / "sa", seed=1, say=quiet)
    further = how.model_copy(update=dict(rate=1e-12, critic_rate=1e-12))
    more = dict(state=tmp_path / "sb", seed=2, start=tmp_path / "a", say=quiet)
    superres.train_superres(further, stacks, textures, tmp_path / "b", **more)
    a, b = (load_file(tmp_path / name / "superres.safetensors") for name in "ab")
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)
    began = json.loads((tmp_path / "b/config.json").read_text())["started_from"]
    assert set(began) == {"superres", "superres-critic"}
    with pytest.raises(InputError, match="holds none of superres.safetensors"):
        superres.train_superres(how, stacks, textures, tmp_path / "c", state=tmp_path, seed=1, start=tmp_path / "sb")


def test_detail_in_air_that_shows_the_grid_is_seen():
    given, noise = torch.full((4, 1, 4, 8, 8), 0.25), 0.01 * torch.randn(4, 1, 16, 32, 32)
    striped = noise + 0.01 * torch.tensor([1.0, -1.0]).repeat(16)
    assert losses.lattice(noise, given) == pytest.approx(1, abs=0.6)
    assert losses.lattice(striped, given) > 50
    assert losses.lattice(striped, given + 0.5) == 0  # in bone there may be anything


def test_thickness_is_read_from_plates():
    def plates(thickness, period=16):
        profile = ((torch.arange(48) % period) < thickness).float()
        fine = (0.15 + 0.5 * profile).expand(1, 1, 16, 48, 48)
        return texture_reader.features(fine, torch.full((1, 1, 4, 12, 12), 0.35))[0]

    thin, thick = plates(4), plates(8)
    # Twice the bone volume over the bone surface at one threshold, in voxels; a window cuts some plates open
    assert 2 * thin[0] / thin[1] == pytest.approx(4, rel=0.25)
    assert 2 * thick[0] / thick[1] == pytest.approx(8, rel=0.25)
    x = torch.randn(200, 4)
    reader = texture_reader.fit(x, x @ torch.eye(4)[:, :2] + 3)
    assert torch.allclose((x - reader.mean) @ reader.weight + reader.bias, x[:, :2] + 3, atol=0.05)


def test_lines_in_the_spectrum_of_air_are_found():
    air = np.random.default_rng(0).normal(0, 50, (4, 16, 64, 64)).astype(np.float32)
    assert all(0.5 < value < 2 for key, value in superres_check.lines(air).items() if key != "N")
    air[:, :, :, ::2] += 10
    found = superres_check.lines(air)
    assert found["N"] == 16 and found["x"] > 5 and found["y"] < 2


def test_traits_of_the_same_bones_agree():
    z, y, x = np.indices((8, 80, 60))
    radius = np.hypot(y - 40, x - 30)

    def bone(r, seed):
        density = 50.0 * (radius < r) + 900.0 * ((radius < r) & (radius > r - 5))
        density += 600 * ((radius < r) & (np.random.default_rng(seed).random(radius.shape) < 0.1))
        return Volume(density.astype(np.float32), (0.3, 0.3, 0.3), "mgHA")

    real = [bone(r, i) for i, r in enumerate((20, 22, 24, 26))]
    rows = {r["trait"]: r for r in superres_check.traits(real, {"same": real}, seed=1, draws=20)}
    row = rows["Tb.BMD"]
    assert row["N"] == 4 and row["same"] == row["real"] and row["same, difference %"] == 0
    assert row["same, low"] == row["same, high"] == 0 and row["same, r"] == pytest.approx(1)
