"""3D-StyleGAN against Table A.3, its shortcuts against the plain computation, and what each style may change."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bonelib import InputError
from bonelib.core.config import section
from bonelib.core.pyramid import upsample
from bonelib.latent.models import draw, load_model
from bonelib.networks.layers import Dense, ModulatedConv
from bonelib.networks.stylegan import StyleGAN
from bonelib.scans.dataset import Stacks
from bonelib.training import loop
from bonelib.training.config import Train

SMALL = dict(widths=(8, 8, 6, 4), latent=16, style=12)
# Input and output channels of c11, c13, c15, c21 ... c55, and so of the styles s1 ... s15 (inputs). Table A.3 prints
# stages 1, 2 and 5; 3 and 4 follow from section 3.2, where stages 3 to 5 halve the channels.
TABLE = [(128, 128)] * 6 + [(128, 64), (64, 64), (64, 64), (64, 32), (32, 32), (32, 32), (32, 16), (16, 16), (16, 16)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def styles_of(generator, n=2, seed=0):
    return generator.to_styles(generator.sample_latent(n, rng(seed)))


def test_published_sizes():
    generator = StyleGAN()
    assert [(m.weight.shape[1], m.weight.shape[0]) for m in generator.mapping] == [(512, 512)] * 6  # m1 ... m5, w
    assert StyleGAN(style=128).mapping[-1].weight.shape == (128, 512)  # w, as printed in the table
    assert generator.constant.shape == (128, 1, 9, 7)  # cc
    assert [conv.weight.shape[1::-1] for conv in generator.convs] == TABLE
    assert [conv.affine.weight.shape for conv in generator.convs] == [(i, 512) for i, _ in TABLE]  # s1 ... s15
    assert [conv.upsample for conv in generator.convs] == [False, True, False] * 5  # up1 ... up5
    assert generator.layers == len(generator.noise_scale) == 15 and all(n.numel() == 1 for n in generator.noise_scale)
    assert generator.to_image[-1].weight.shape == (1, 16, 3, 3, 3)  # out
    assert generator.factorized_weight().shape == (sum(i for i, _ in TABLE), 512) == (1216, 512)
    count = 6 * (512 * 512 + 512) + 128 * 63
    count += sum(i * (512 + 1) + 27 * i * o + o + 1 for i, o in TABLE)
    count += sum(27 * o + 1 for o in (128, 128, 64, 32, 16))
    assert sum(p.numel() for p in generator.parameters()) == count == 5_453_684


def test_published_shapes_at_every_stage():
    generator = StyleGAN()
    with torch.no_grad():
        for stage in (1, 2, 3, 4):  # the fifth, 32x288x224, only takes longer
            assert generator.synthesize(styles_of(generator, 1), stage).shape[2:] == tuple(
                n << stage for n in (1, 9, 7)
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("haar", [False, True])
@pytest.mark.parametrize("base", [(1, 9, 7), (2, 3, 4)])
def test_shapes_at_every_stage_and_batch_of_one(base, haar, dtype):
    generator = StyleGAN(base, **SMALL, haar=haar, dtype=dtype, padding="replicate", base_convs=1)
    for stage in range(1, generator.stages + 1):
        for fade in (0.3, 1.0):
            volume = generator.synthesize(styles_of(generator, 1), stage, fade, rng())
            assert volume.shape == (1, 1, *(n << stage for n in base)) and volume.dtype == torch.float32
            assert volume.min() > 0 and volume.max() < 1
    volume.mean().backward()
    assert all(p.grad.isfinite().all() for p in generator.convs.parameters())


def test_fade_runs_from_the_old_stage_to_the_new():
    generator = StyleGAN(**SMALL)
    w = styles_of(generator)
    old, new, begun = generator.synthesize(w, 1), generator.synthesize(w, 2), generator.synthesize(w, 2, fade=0.0)
    assert torch.equal(begun, upsample(old))
    assert torch.allclose(generator.synthesize(w, 2, fade=0.5), (new + begun) / 2, atol=1e-6)


def kernels(conv, style):
    """A kernel for each sample (n, outputs, inputs, 3, 3, 3), as in Karras et al. 2020, equations 1 and 3."""
    weight = conv.weight * conv.scale * conv.affine(style)[:, None, :, None, None, None]
    return weight / (weight.square().sum((2, 3, 4, 5), keepdim=True) + 1e-8).sqrt()


def plainly(conv, x, style):
    """A modulated convolution with those kernels, one group of channels a sample, on a grid that is upsampled first."""
    weight = 2**0.5 * kernels(conv, style)
    x = upsample(x) if conv.upsample else x
    x = F.pad(x, (1,) * 6, mode="replicate" if conv.replicate else "constant")
    y = F.conv3d(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), groups=len(weight))
    return y.reshape(len(weight), -1, *y.shape[2:]) + conv.bias[:, None, None, None]


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize("doubles", [False, True])
def test_scaling_channels_is_a_kernel_for_each_sample(doubles, padding):
    conv = ModulatedConv(5, 6, 4, upsample=doubles, padding=padding).double()
    conv.dtype = torch.float64
    x = torch.randn(3, 6, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    style = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(conv.bias)
    assert torch.allclose(kernels(conv, style).flatten(2).norm(dim=2), torch.ones((), dtype=x.dtype), atol=1e-4)
    inputs = [x, style, *conv.parameters()]
    results = []
    for function in (conv, lambda *xs: plainly(conv, *xs)):
        y = function(x, style)
        results.append([y, *torch.autograd.grad((y * torch.arange(y.numel()).reshape(y.shape).cos()).sum(), inputs)])
    for shortcut, plain in zip(*results, strict=True):
        assert plain.abs().max() > 0 and torch.allclose(shortcut, plain, rtol=1e-9, atol=1e-9)
    single = conv.float()
    single.dtype = torch.float32
    assert torch.allclose(single(x.float(), style.float()), results[1][0].float(), atol=1e-5)


@pytest.mark.parametrize("doubles", [False, True])
def test_bfloat16_gradients_are_right_at_every_depth(doubles):
    conv = ModulatedConv(8, 16, 16, upsample=doubles)
    for depth in (1, 2, 3, 4):  # torch 2.13 returns garbage at depth 2 without `convolve`
        x, style = torch.randn(3, 16, depth, 9, 7), torch.randn(3, 8)
        weights, results = torch.randn(conv(x, style).shape), []
        for conv.dtype in (torch.float32, torch.bfloat16):
            y = conv(x, style)
            results.append([y, *torch.autograd.grad((y.float() * weights).sum(), conv.parameters())])
        for exact, near in zip(*results, strict=True):
            assert (exact - near).norm() < 0.03 * exact.norm(), depth


def test_slow_affine_maps_begin_as_the_others_and_move_less():
    moved, first = {}, {}
    for rate in (1.0, 0.05):
        torch.manual_seed(0)
        generator = StyleGAN(**SMALL, affine_rate=rate)
        weight = generator.factorized_weight()
        first[rate] = weight.clone()
        adam = torch.optim.Adam([conv.affine.weight for conv in generator.convs], lr=1e-2)
        z = generator.sample_latent(2, torch.Generator().manual_seed(1))
        generator.synthesize(generator.to_styles(z)).sum().backward()
        adam.step()
        moved[rate] = (generator.factorized_weight() - weight).abs().mean()
    assert torch.allclose(first[1.0], first[0.05], atol=1e-5)
    assert 0.03 * moved[1.0] < moved[0.05] < 0.07 * moved[1.0]


def test_a_style_changes_its_layer_and_what_follows():
    generator = StyleGAN(**SMALL)
    w = styles_of(generator)[:1, None].repeat(1, generator.layers, 1)
    seen = []
    for conv in generator.convs:
        conv.register_forward_hook(lambda module, given, y: seen.append(y.detach()))

    def run(styles, stage=None):
        seen.clear()
        return generator.synthesize(styles, stage), list(seen)

    image, before = run(w)
    assert torch.equal(image, generator.synthesize(w[:, 0]))  # one style for all layers
    for layer in range(generator.layers):
        mixed = w.clone()
        mixed[:, layer] = styles_of(generator, seed=1)[:1]
        other, after = run(mixed)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [True] * layer + [False] * (generator.layers - layer) and not torch.equal(image, other)
        for stage in (1, 2, 3):
            assert torch.equal(run(w, stage)[0], run(mixed, stage)[0]) == (layer >= 3 * stage)


def test_truncation_draws_styles_towards_their_mean():
    generator = StyleGAN(**SMALL)
    z = generator.sample_latent(3, rng())
    w, none = generator.to_styles(z), generator.to_styles(z, 0.0)
    assert torch.equal(generator.to_styles(z, 1.0), w) and torch.equal(none, generator.mean_style.expand(3, -1))
    assert torch.allclose(generator.to_styles(z, 0.8), none + 0.8 * (w - none), atol=1e-6)  # section 4.1
    volumes = generator.synthesize(none)
    assert torch.allclose(volumes, volumes[:1].expand_as(volumes), rtol=0, atol=1e-6)
    assert (generator.synthesize(w)[0] - volumes[0]).abs().max() > 1e-3
    many = generator.to_styles(generator.sample_latent(20_000, rng(5)))
    assert ((many.mean(0) - generator.mean_style).abs() < 0.15 * many.std(0)).all()
    with pytest.raises(InputError, match="truncation 1.8: .* from 0 to 1"):
        generator.to_styles(z, 1.8)


def test_the_mean_style_belongs_to_the_weights():
    generator, loaded = StyleGAN(**SMALL), StyleGAN(**SMALL).eval()
    z, first = generator.sample_latent(2, rng()), generator.mean_style.clone()
    with torch.no_grad():
        generator.mapping[0].weight.mul_(2)
    mean = generator.to_styles(z, 0.0)[0].clone()
    assert not torch.allclose(mean, first)
    generator.mean_style.zero_()
    loaded.load_state_dict(generator.state_dict())
    for again in (loaded, generator.eval()):
        assert torch.equal(again.to_styles(z, 0.0)[0], mean)
    assert torch.equal(loaded.synthesize(loaded.to_styles(z)), generator.synthesize(generator.to_styles(z)))


def test_noise_is_that_of_its_generator():
    generator = StyleGAN(**SMALL, noise=0.5)
    w = styles_of(generator)
    first, again, other = (generator.synthesize(w, noise=rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(generator.synthesize(w), generator.synthesize(w)) and not torch.equal(
        first, generator.synthesize(w)
    )
    first.mean().backward()
    assert all(scale.grad for scale in generator.noise_scale)
    torch.manual_seed(0)
    silent = StyleGAN(**SMALL)  # the same weights, and the scales where StyleGAN starts
    assert torch.equal(silent.synthesize(w, noise=rng(1)), silent.synthesize(w))


def test_signals_keep_their_scale():
    # zeros around the published base would take most of the first kernels away: 1x9x7 is one voxel deep
    generator, powers = StyleGAN((1, 4, 4), (32, 32, 32, 16), latent=64, style=64, padding="replicate"), []
    for conv in generator.convs:
        conv.register_forward_hook(lambda module, given, y: powers.append(y.square().mean().item()))
    w = styles_of(generator, 16)
    generator.synthesize(w)
    assert 0.2 < w.square().mean() < 5 and all(0.5 < p < 5 for p in powers), powers  # 2 where nothing correlates


def test_the_mapping_network_learns_as_with_a_slower_rate():
    # Appendix B: the learning rate of the mapping network is multiplied by 0.02; here as a parameter group says it
    slow, plain = Dense(6, 4, bias=0.5, rate=0.02), Dense(6, 4)
    x = torch.randn(8, 6)
    with torch.no_grad():
        plain.weight.copy_(slow.weight * 0.02)
        plain.bias.copy_(slow.bias * 0.02)
    assert torch.allclose(slow(x), plain(x), atol=1e-5) and plain.weight.std() < 3
    start = plain.weight.detach().clone()
    adams = [torch.optim.Adam(d.parameters(), r, betas=(0.0, 0.98), eps=1e-7) for d, r in ((slow, 4e-3), (plain, 8e-5))]
    for _ in range(20):
        for dense, adam in zip((slow, plain), adams, strict=True):
            adam.zero_grad()
            (dense(x).tanh().mean() * 1e-6).backward()  # as small as epsilon
            adam.step()
    assert torch.allclose(slow.weight * 0.02 - start, plain.weight - start, rtol=0.05, atol=2e-6)
    assert (plain.weight - start).abs().mean() > 1e-4
    assert {m.rate for m in StyleGAN(**SMALL).mapping} == {0.02}


HOW = dict(
    generator=dict(kind="stylegan", widths=[8, 8, 8], latent=8, style=8),
    critic=dict(widths=[8, 8, 8], convs=2, standardise=True),
    schedule=dict(samples=[32, 32], fade=[0, 16], batch=[4, 4]),
    n_critic=2,
    rate=4e-3,
    ema=2,
)


def test_keys_of_the_other_kind_are_refused():
    assert section(Train, HOW, "t").generator.style == 8
    progan = dict(kind="progan", widths=[8, 8, 8])
    for key in ("style", "mapping_rate", "affine_rate"):
        with pytest.raises(InputError, match=f"unknown key t.generator.{key}; did you mean ") as error:
            section(Train, {**HOW, "generator": {**progan, key: 1}}, "t")
        assert "\n" not in str(error.value) and f"'{key}'" not in str(error.value)
        section(Train, {**HOW, "generator": {**progan, key: None}}, "t")  # as models of earlier versions have it
    with pytest.raises(InputError, match="t.generator: .*'stylgan'.*'progan', 'stylegan'"):
        section(Train, {**HOW, "generator": {**HOW["generator"], "kind": "stylgan"}}, "t")


def test_what_was_trained_can_be_drawn_from(tmp_path):
    rows = [dict(split="train" if i < 6 else "held-out", volume=i, start=0) for i in range(8)]
    volumes = np.random.default_rng(0).random((8, 4, 36, 28)).astype(np.float16)
    stacks = Stacks(volumes, rows, dict(stack_slices=4, data_hash="0"))
    where = dict(state=tmp_path / "state", seed=3, say=lambda *a, **k: None)
    loop.train(section(Train, HOW, "train"), stacks, tmp_path / "model", **where)
    model = load_model(tmp_path / "model")
    fresh = StyleGAN(widths=(8, 8, 8), latent=8, style=8).mean_style
    assert not torch.equal(model.generator.mean_style, fresh)
    one, two = (draw(model, 2, seed=1, truncation=psi) for psi in (0.8, 0.2))
    assert one.shape == (2, 4, 36, 28) and np.ptp(one - two) > 0
