"""HA-GAN: published sizes, sub-volumes that fit into the whole, slabs equal to the whole, discriminators, encoder."""

import pytest
import torch
import torch.nn.functional as F

from bonelib import InputError
from bonelib.core.config import section
from bonelib.core.pyramid import downsample, upsample
from bonelib.core.random import torch_rng
from bonelib.networks.config import HAGANConfig, HAGANCriticNet
from bonelib.networks.encoder import build_encoder, critic_features
from bonelib.networks.hagan import grid_of
from bonelib.networks.hagan_layers import FOLD_FROM, PlainConv, SpectralDense
from bonelib.networks.registry import build_critic, build_generator

SMALL = dict(
    kind="hagan", stages=4, widths=[16, 16, 8], fine=[8], low=[8], encoder=[8, 16], latent=12, division=2
)  # 16x144x112, A 4x36x28
CRITIC = HAGANCriticNet(high=[4, 8, 8, 8], head=[8, 4], low=[4, 8])
CUBE = SMALL | dict(base=[2, 3, 2], stages=5, widths=[16, 16, 8, 8], encoder=[8, 8, 16], fine=[8], division=8)


def config(**values):
    return section(HAGANConfig, SMALL | values, "generator")


def count(*parts):
    return sum(p.numel() for part in parts for p in part.parameters())


@pytest.mark.parametrize(
    ("own", "high", "low", "sizes"),
    [
        (dict(), (32, 64, 128, 256, 512), (64, 128, 256), (4_599_073, 2_642_369, 19_663_168, 79_583_972)),
        (
            dict(stages=6, encoder=(32, 64, 128, 256)),
            (16, 32, 64, 128, 256, 512),
            (32, 64, 128, 256),
            (4_630_833, 2_771_425, 19_663_264, 79_744_884),
        ),
    ],
)
def test_the_published_networks_have_the_published_numbers_of_parameters(own, high, low, sizes):
    how = HAGANConfig(base=(4, 4, 4), **own)
    with torch.device("meta"):
        generator, encoder = build_generator(how), build_encoder(how)
        critic = build_critic(HAGANCriticNet(high=high, low=low), generator=how)
    assert count(generator.dense, generator.common) == 52_392_256
    assert count(generator.fine_blocks, generator.fine_image) == 56_257
    assert count(generator.low_blocks, generator.low_image) == 69_697
    assert count(encoder.high) == 161_152
    found = (count(critic.high, critic.dense, critic.out), count(critic.low), count(encoder.ground, encoder.code))
    assert (*found, count(generator, critic, encoder)) == sizes


@pytest.mark.parametrize("values", [SMALL, CUBE, SMALL | dict(fine=[8, 8], encoder=[8]), SMALL | dict(fine=[])])
def test_volumes_of_any_base_depth_and_division_come_at_every_stage(values):
    values = values | dict(widths=[16, 8, 8, 8], encoder=[8] * (values["stages"] - 1 - len(values["fine"])))
    how = section(HAGANConfig, values, "generator")
    generator = build_generator(how).eval()
    latent = generator.sample_latent(2, torch_rng(1, "test"))
    with torch.no_grad():
        made = {s: generator.synthesize(generator.to_styles(latent, 1.0), s) for s in range(1, how.stages + 1)}
    for stage, volumes in made.items():
        assert volumes.shape == (2, 1, *(n << stage for n in how.base))
        assert 0 < volumes.min() < volumes.max() < 1
    for stage in range(1, generator.low_stage):
        assert torch.equal(made[stage], downsample(made[stage + 1]))
    assert torch.equal(made[how.stages], generator.draw_high(generator.features(generator.to_styles(latent, 1.0))))
    assert generator.factorized_weight().shape[1] == how.latent


def test_truncated_latents_stay_inside():
    generator = build_generator(config())
    latent = 3 * generator.sample_latent(40, torch_rng(1, "test"))
    assert generator.to_styles(latent, 0.5).abs().max() <= 0.5 and torch.equal(generator.to_styles(latent), latent)


@pytest.mark.parametrize("voxels", [(2, 3, 4), (8, 9, 7)])
def test_a_convolution_behind_an_upsampling_is_the_same_folded_and_not(voxels):
    conv, x = PlainConv(3, 2, upsample=True), torch.randn(1, 3, *voxels, requires_grad=True)
    plain = F.conv3d(upsample(x), conv.weight, conv.bias, padding=1)
    assert (x[0, 0].numel() >= FOLD_FROM) == (voxels[0] == 8)
    torch.testing.assert_close(conv(x), plain, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), [x, conv.weight]) for y in (conv(x), plain)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_a_sub_volume_of_either_grid_is_the_same_part_and_all_of_them_are_the_whole():
    grid = grid_of((1, 9, 7), 5, (8,), 4)  # 8 cells of 4 slices, 2 of them a sub-volume
    assert (grid.cells, grid.depth, grid.scale, grid.starts) == (8, 2, 4, 7)
    x = torch.arange(32.0).reshape(1, 1, 32, 1, 1)
    coarse = downsample(downsample(x.expand(-1, -1, -1, 4, 4)))
    for r in range(grid.starts):
        assert torch.equal(grid.high(x, r).reshape(2, 4).mean(1), grid.low(coarse, r).flatten())
    assert torch.equal(torch.cat([grid.high(x, r) for r in grid.partition()], 2), x)
    assert [grid.share(r) for r in (0, 3, 6)] == [0, 0.5, 1]


def test_a_sub_volume_with_halo_is_a_part_of_the_whole_but_for_the_statistics_of_its_norms():
    generator = build_generator(config(base=(2, 3, 2), halo=True)).eval()
    bare = build_generator(config(base=(2, 3, 2), halo=False)).eval()
    bare.load_state_dict(generator.state_dict())
    for network in (generator, bare):
        for block in network.fine_blocks:  # no norm, so that a difference is one of the borders
            block.norm = torch.nn.Identity()
    with torch.no_grad():
        a = generator.features(generator.sample_latent(1, torch_rng(1, "test")))
        whole = generator.draw_high(a)
        for r in range(generator.grid.starts):
            part = generator.grid.high(whole, r)
            torch.testing.assert_close(generator.draw_part(a, r), part, rtol=0, atol=1e-6)
        seam = (bare.draw_part(a, 1) - bare.grid.high(whole, 1)).abs().amax((0, 1, 3, 4))
    assert seam[0] > 1e-3 < seam[-1] and seam[3:-3].max() < 1e-6  # three slices at each face, as in the published code


@pytest.mark.parametrize("fine", [[8], [8, 16], []])
@pytest.mark.parametrize("parts", [8, 3])
def test_a_volume_drawn_in_slabs_is_the_one_drawn_whole(fine, parts):
    values = CUBE | dict(fine=fine, encoder=[8] * (4 - len(fine)), widths=[16] * 5)
    generator = build_generator(section(HAGANConfig, values, "generator")).eval()
    with torch.no_grad():
        for block in generator.fine_blocks:
            block.norm.weight.uniform_(0.5, 2), block.norm.bias.uniform_(-1, 1)
        a = generator.features(generator.sample_latent(2, torch_rng(1, "test")))
        torch.testing.assert_close(generator.draw_in_slabs(a, parts), generator.draw_high(a), rtol=0, atol=1e-5)


def test_large_volumes_are_drawn_in_slabs_of_an_eighth(monkeypatch):
    generator = build_generator(section(HAGANConfig, CUBE, "generator")).eval()
    styles = generator.sample_latent(1, torch_rng(1, "test"))
    seen = []
    hook = generator.fine_image.register_forward_hook(lambda _, given, out: seen.append(given[0].shape[2]))
    with torch.no_grad():
        whole = generator.synthesize(styles)
        monkeypatch.setattr("bonelib.networks.hagan.WHOLE", 1)
        slabs = generator.synthesize(styles)
    hook.remove()
    cells = generator.grid.cells
    assert seen[0] == 2 * cells and len(seen) == 9 and max(seen[1:]) <= 2 * (cells // 8 + 2)
    torch.testing.assert_close(slabs, whole, rtol=0, atol=1e-5)


def test_the_discriminators_see_where_a_sub_volume_lies_and_every_weight_is_normed():
    how = config(base=(1, 3, 2))
    critic = build_critic(CRITIC, generator=how).requires_grad_(False)
    x = torch.rand(2, 1, 16, 48, 32)
    part = critic.grid.high(x, 1)
    for _ in range(30):
        critic.judge_high(part, 1)[0], critic.judge_low(x[:, :, :4, :12, :8])[0]
    critic.eval()
    for layer in critic.modules():
        if isinstance(layer, PlainConv | SpectralDense):
            norm = torch.linalg.matrix_norm(layer.norm(layer.weight.detach()).flatten(1), 2)
            assert norm.item() == pytest.approx(1, abs=0.05)
    scores = [critic.judge_high(part, r)[0] for r in range(3)]
    assert scores[0].shape == (2,) and (scores[0] - scores[2]).abs().min() > 1e-7
    coarse = downsample(downsample(x))
    parts = [critic.judge_high(critic.grid.high(x, r), r)[0] for r in (0, 2)]
    torch.testing.assert_close(critic(x), (sum(parts) / 2 + critic.judge_low(coarse)[0]) / 2)
    assert critic(x[:1]).shape == (1,) and critic_features(critic, x)[0].shape[:2] == (2, 8)


def test_evaluation_leaves_the_norms_of_a_discriminator_as_they_are():
    critic = build_critic(CRITIC, generator=config())
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    x = torch.rand(1, 1, 8, 144, 112)
    critic.eval().judge_high(x, 0)
    assert all(torch.equal(before[name], value) for name, value in critic.state_dict().items())
    critic.train().judge_high(x, 0)
    assert any(not torch.equal(before[name], value) for name, value in critic.state_dict().items())


@pytest.mark.parametrize(("depth", "division"), [(2, 2), (2, 4), (5, 3)])  # the last in parts that overlap
def test_the_encoder_makes_a_code_of_whole_volumes_part_by_part(depth, division):
    how = config(base=(depth, 3, 2), division=division)
    encoder = build_encoder(how).eval()
    with torch.no_grad():
        x, grid = torch.rand(2, 1, 16 * depth, 48, 32), encoder.grid
        features = encoder.features(x)
        first, last = (encoder.part(grid.high(x, r)) for r in (0, grid.starts - 1))
        assert features.shape == (2, 8, 4 * depth, 12, 8) and torch.equal(features[:, :, : grid.depth], first)
        assert torch.equal(features[:, :, -1], last[:, :, -1])
        assert encoder(x).shape == (2, 12) and torch.equal(encoder(x), encoder.encode(features))
    with pytest.raises(InputError, match="dense 2, norm none"):
        build_encoder(how, dense=2)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(stages=2), "stages must be two more"),
        (dict(widths=[16, 16]), "need 3 widths"),
        (dict(encoder=[8]), "encoder must have 2 numbers"),
        (dict(low=[12]), "12 channels cannot be normed in 8 groups"),
    ],
)
def test_a_mistake_in_the_section_is_named(wrong, says):
    with pytest.raises(InputError, match=says):
        config(**wrong)
