"""Inversion on the oracle, whose codes are known; the losses by hand; killed and gone on, bit for bit."""

import numpy as np
import pytest
import torch
from oracle import GRID, SPACING, Oracle

from bonelib import InputError
from bonelib.core.random import torch_rng
from bonelib.latent import inversion
from bonelib.latent.codes import decode, load_codes, mean_code
from bonelib.latent.config import EncoderTraining, Refinement
from bonelib.latent.encoder_training import load_inverter, train_encoder
from bonelib.latent.models import Model
from bonelib.networks.config import CriticNet, ProGANConfig
from bonelib.networks.encoder import LatentDiscriminator, build_encoder, critic_features
from bonelib.networks.registry import build_critic, build_generator
from bonelib.networks.superres import Cascaded, SuperResolution
from bonelib.scans.dataset import Stacks

WIDTHS = (12, 12, 12)
TRAIN = dict(
    generator=dict(kind="stylegan", widths=WIDTHS, latent=8, style=8, padding="replicate"),
    critic=dict(widths=WIDTHS),
    schedule=dict(samples=[1, 1], fade=[0, 0], batch=[8, 8]),
    augment=None,
    n_critic=1,
    rate=1e-3,
)


def silent(*_, **__):
    pass


@pytest.fixture(scope="module")
def model():
    return oracle_model()


def oracle_model():
    torch.manual_seed(0)
    statistics = torch.tensor([[0.3], [0.1]]).expand(2, 2, 1)
    critic = build_critic(CriticNet(widths=WIDTHS, standardise=True), statistics=statistics).requires_grad_(False)
    return Model(Oracle(), critic, dict(train=TRAIN, sha256=dict(generator="oracle")))


def bones(model, n, purpose):
    codes = model.generator.sample_latent(n, torch_rng(0, purpose))
    return codes, inversion.draw_codes(model, codes)


@pytest.fixture(scope="module")
def data(model):
    return stacks_of(model)


def stacks_of(model):
    """Stacks of 48 bones of 24 patients, the last eight of which are held out."""
    _, volumes = bones(model, 48, "patients")
    rows = [
        dict(
            scan=f"{i // 2}_ses-{i % 2}",
            patient=str(i // 2),
            volume=i,
            start=0,
            split="train" if i < 32 else "held-out",
        )
        for i in range(48)
    ]
    meta = dict(spacing_mm=[SPACING] * 3, stack_slices=GRID[0], data_hash="bones")
    return Stacks(volumes[:, 0].numpy().astype(np.float16), rows, meta)


def test_the_losses_are_those_of_the_paper():
    x, y = torch.zeros(2, 1, 2, 2, 2), torch.zeros(2, 1, 2, 2, 2)
    x[0, 0, 0, 0, 0], y[0, 0, 0, 0, 0] = 3.0, 1.0
    assert inversion.distortion(x, y).tolist() == [0.5 / 8 * 4, 0]  # eq. (3)
    assert inversion.perceptual([x], [y]).tolist() == [0.5 / 8 * 4, 0]  # eq. (4)
    code = torch.zeros(1, 512)
    code[0, :2] = 2.0
    assert inversion.latent_loss(code, None).tolist() == pytest.approx([8 / 1024])  # eq. (5)
    latent_discriminator = LatentDiscriminator(512, layers=0)
    torch.nn.init.zeros_(latent_discriminator.out.weight)
    torch.nn.init.constant_(latent_discriminator.out.bias, np.log(3))  # a probability of 3/4
    assert inversion.latent_loss(code, latent_discriminator).tolist() == pytest.approx([-np.log(0.75)])  # eq. (8)
    several = code[:, None].repeat(1, 5, 1)
    assert inversion.latent_loss(several, latent_discriminator).tolist() == pytest.approx([-np.log(0.75)])
    assert inversion.feature_norms([x, 2 * x], [y, 2 * y]).tolist() == [6, 0]  # eq. (2) of Fetty et al.


def test_the_objective_is_eq_7(model):
    codes, volumes = bones(model, 3, "objective")
    other = codes + 0.5
    drawn = inversion.draw_codes(model, other)
    a, b = (critic_features(model.critic, v)[0] for v in (volumes, drawn))
    parts = [
        [float((p[i] - q[i]).square().mean()) for p, q in ((volumes, drawn), (a, b), (other, 0 * other))]
        for i in range(3)
    ]
    expected = [sum(values) for values in parts]
    assert inversion.losses(Refinement(), model, volumes, other).tolist() == pytest.approx(expected, rel=1e-5)
    eq10 = inversion.losses(Refinement(weights=(0, 1, 0)), model, volumes, other)
    assert eq10.tolist() == pytest.approx([values[1] for values in parts], rel=1e-5)


def test_refinement_recovers_codes(model):
    codes, volumes = bones(model, 4, "recovered")
    how = Refinement(steps=250, rate=0.02, weights=(1, 0, 0), betas=(0.9, 0.9))
    start = codes + 0.4 * torch.randn(codes.shape, generator=torch_rng(0, "guess"))
    found = inversion.refine(start, volumes, model, how, say=silent).codes
    assert ((found - codes).norm(dim=1) / codes.norm(dim=1)).max() < 0.01


def test_the_published_refinement_lowers_the_loss_of_every_bone(model):
    _, volumes = bones(model, 6, "lowered")
    how, start = Refinement(), mean_code(model).expand(6, -1)
    found = inversion.refine(start, volumes, model, how, say=silent).codes
    before, after = (inversion.losses(how, model, volumes, codes) for codes in (start, found))
    assert (after < before).all()


def test_bones_are_refined_alike_alone_and_together(model):
    codes, volumes = bones(model, 20, "together")
    how = Refinement(steps=5)
    together = inversion.refine(codes + 0.1, volumes, model, how, say=silent).codes
    alone = inversion.refine(codes[18:19] + 0.1, volumes[18:19], model, how, say=silent).codes
    assert torch.allclose(together[18], alone[0], atol=1e-5)


def test_bones_are_refined_alike_whatever_the_threads(model):
    codes, volumes = bones(model, 70, "threads")
    how, before, found = Refinement(weights=(1, 1, 1), rate=0.02, steps=3), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(inversion.refine(codes + 0.1, volumes, model, how, say=silent).codes)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_w_plus_fits_a_mixed_bone_that_one_style_cannot(model):
    codes, _ = bones(model, 3, "mixed")
    mixed = 3 * codes[None]  # one bone, a style of its own in each of the three layers, far apart
    volume = inversion.draw_codes(model, mixed)
    how = Refinement(steps=200, rate=0.03, weights=(1, 0, 0))
    start = mean_code(model)[None]
    wide = inversion.refine(start, volume, model, how.model_copy(update=dict(space="w+")), say=silent).codes
    assert wide.shape == (1, 3, 8) and not torch.allclose(wide[:, 0], wide[:, 1])
    one = inversion.refine(start, volume, model, how, say=silent).codes
    assert inversion.losses(how, model, volume, wide) < inversion.losses(how, model, volume, one)
    plain = Model(build_generator(ProGANConfig(widths=WIDTHS, latent=8)), model.critic, model.config)
    with pytest.raises(InputError, match="w\\+"):
        inversion.refine(start, volume, plain, how.model_copy(update=dict(space="w+")), say=silent)


def test_fettys_refinement_recovers_codes(model):
    codes, volumes = bones(model, 4, "fetty")
    how = Refinement(steps=300, loss="norms", optimiser="radam", rate=0.02, betas=(0.9, 0.999))
    start = codes + 0.2 * torch.randn(codes.shape, generator=torch_rng(0, "guess"))
    found = inversion.refine(start, volumes, model, how, say=silent).codes
    before, after = ((z - codes).norm(dim=1) for z in (start, found))
    assert (after < 0.4 * before).all()


SAMPLED = EncoderTraining(
    prior="normal", pairs="sampled", samples=960, batch=8, rate=2e-2, betas=(0.0, 0.99), final_decay=0.5
)


def test_an_encoder_trained_on_pairs_knows_unseen_codes(model, data, tmp_path):
    inverter, _ = train_encoder(SAMPLED, model, data, tmp_path, state=tmp_path / "state", seed=1, say=silent)
    codes, volumes = bones(model, 64, "unseen")
    found = inversion.encode(inverter.encoder, volumes)
    assert np.corrcoef(found.flatten(), codes.flatten())[0, 1] > 0.8
    again = load_inverter(tmp_path, model)
    assert torch.equal(inversion.encode(again.encoder, volumes), found)
    finer = model._replace(config=model.config | dict(sha256=dict(generator="oracle", superres="another")))
    assert load_inverter(tmp_path, finer).encoder  # which draws on from what the encoder knows
    other = model._replace(config=model.config | dict(sha256=dict(generator="another")))
    with pytest.raises(InputError, match="other weights"):
        load_inverter(tmp_path, other)


def test_an_encoder_trained_on_real_bones_draws_unseen_ones(model, data, tmp_path):
    how = EncoderTraining(
        prior="discriminator", dense=2, weights=(5, 1, 0.04), samples=640, batch=8, rate=1e-2, final_decay=0.5
    )
    inverter, points = train_encoder(how, model, data, tmp_path, state=tmp_path / "state", seed=1, say=silent)
    held_out = inversion.targets(model, data, data.of("held-out"))
    drawn = inversion.draw_codes(model, inversion.encode(inverter.encoder, held_out))
    mean = inversion.draw_codes(model, mean_code(model).expand(len(held_out), -1))
    ratio = inversion.distortion(held_out, drawn).mean() / inversion.distortion(held_out, mean).mean()
    assert ratio < 0.5
    assert 0 <= points[-1]["latent_discriminator_auc"] <= 1 and points[-1]["seen"] == 640


def test_all_ways_to_a_code_are_compared_on_the_same_bones(model, tmp_path):
    _, volumes = bones(model, 3, "ways")
    _, others = bones(model, 2, "further")
    inverter = inversion.Inverter(build_encoder(model.how.generator).requires_grad_(False), None)
    how = Refinement(steps=3)
    codes, seconds = inversion.invert_all(volumes, model, inverter, how, state=tmp_path, also=others, say=silent)
    assert {way: tuple(z.shape) for way, z in codes.items()} == {
        "encoder": (5, 8),
        "hybrid": (5, 8),
        "optimisation": (3, 8),
        "hybrid in W+": (3, 3, 8),
    }
    assert set(seconds) == set(codes) and seconds["hybrid"] > seconds["encoder"] > 0
    assert torch.equal(codes["encoder"], inversion.encode(inverter.encoder, torch.cat([volumes, others])))
    for way, found in codes.items():
        measures = inversion.further_measures(how, model, volumes, found[:3], None)
        drawn = inversion.draw_codes(model, found[:3])
        sum_of_parts = inversion.distortion(volumes, drawn).numpy() + measures["critic features, eq. (4)"]
        parts = sum_of_parts + measures["latent, eq. (5)"]
        assert measures["refinement loss"] == pytest.approx(2 * parts, rel=1e-4), way


def test_codes_are_kept_in_the_shape_of_styles(model, data, tmp_path):
    rows = data.of("held-out")[:4]
    codes, _ = bones(model, 4, "kept")
    inversion.save_codes(tmp_path, model, rows, codes, codes + 1, np.zeros((4, 5)))
    encoded, _ = load_codes(tmp_path, "encoded")
    refined, table = load_codes(tmp_path)
    assert encoded.shape == refined.shape == (4, 3, 8) and torch.equal(refined[:, 2], codes + 1)
    assert table[1] == dict(scan="16_ses-1", patient="16", visit="1", split="held-out", start="0", index="1")


def test_some_stacks_are_spread_over_all():
    rows = [dict(index=i) for i in range(10)]
    assert [row["index"] for row in inversion.evenly_spaced(rows, 4)] == [0, 3, 6, 9]
    assert inversion.evenly_spaced(rows, None) == inversion.evenly_spaced(rows, 99) == rows


def test_a_bone_that_is_decoded_again_is_not_drawn_again():
    torch.manual_seed(0)
    generator = Cascaded(build_generator(ProGANConfig(widths=(4, 4), latent=6)), SuperResolution(4, 1, 4, 1))
    data, calls = {"spacing_mm": [0.1] * 3, "intensity": [-500, 1500], "unit": "mgHA"}, []
    draw = generator.synthesize
    generator.synthesize = lambda *given, **more: calls.append(given) or draw(*given, **more)
    model, (first, second) = Model(generator, None, {"data": data}), torch.randn(2, 11)
    fine, other = decode(model, first, 1), decode(model, second, 1)
    assert np.array_equal(decode(model, first.clone(), 1).voxels, fine.voxels) and len(calls) == 2
    assert not np.array_equal(other.voxels, fine.voxels)
    half = decode(model, first, 1, 0.2)
    assert len(calls) == 2 and half.spacing == (0.2, 0.2, 0.2)
    assert half.voxels[0, 0, 0] == pytest.approx(fine.voxels[:2, :2, :2].mean(), abs=1e-2)
    coarse = decode(model, first, 1, 0.4)  # the generator's own grid, whose means the super-resolution keeps
    assert len(calls) == 3 and coarse.shape == tuple(n // 4 for n in fine.shape)
    assert not np.array_equal(decode(model, first, 2).voxels, fine.voxels) and len(calls) == 4


def test_the_texture_of_a_scan_joins_its_code():
    torch.manual_seed(0)
    superres = SuperResolution(4, 1, 4, 1)
    superres.texture_scaling.copy_(torch.stack([torch.arange(5.0), torch.full((5,), 2.0)]))
    own = build_generator(ProGANConfig(widths=(4, 4), latent=6))
    cascaded = Model(Cascaded(own, superres), build_critic(CriticNet(widths=(4, 4))), dict(train=TRAIN))
    codes, textures = torch.randn(3, 6), np.random.default_rng(0).normal(size=(3, 5))
    textures[1, 2] = np.nan  # a scan that could not be measured
    found = inversion.with_texture(cascaded, codes, textures)
    assert torch.equal(found[:, :6], codes) and torch.equal(inversion.own_codes(cascaded, found), codes)
    drawn = superres.prior(own.synthesize(codes), found[:, 6:]).detach().numpy()
    assert np.allclose(drawn[[0, 2]], (textures[[0, 2]] - np.arange(5)) / 2, atol=1e-4)
    assert torch.isfinite(found).all() and found[1, 8] == 0
