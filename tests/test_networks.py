"""Networks against the published tables, and their shortcuts against the plain computation."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from bonelib.core.config import section
from bonelib.core.pyramid import downsample, haar, unhaar, upsample
from bonelib.core.random import torch_rng
from bonelib.networks.critic import Critic
from bonelib.networks.layers import AddNoise, Conv, PixelNorm
from bonelib.networks.progan import ProGAN
from bonelib.networks.registry import build_generator
from bonelib.networks.stylegan import StyleGAN
from bonelib.training.config import Train

SMALL = dict(widths=(8, 8, 6, 4), latent=16)


def test_published_sizes():
    generator = ProGAN()
    assert generator.dense.weight.shape == (8064, 512)  # d1
    assert [c.weight.shape[0] for c in generator.first] == [128, 128, 64, 32, 16]  # c11 ... c51
    assert [c.weight.shape[:2] for c in generator.second] == [(w, w) for w in (128, 128, 64, 32, 16)]
    assert generator.to_image[-1].weight.shape == (1, 16, 3, 3, 3)  # out
    dense, convs = 512 * 8064 + 8064, 0
    for i, o in [(128, 128), (128, 128), (128, 64), (64, 32), (32, 16)]:
        convs += i * o * 27 + o + o * o * 27 + o + o * 27 + 1
    assert sum(p.numel() for p in generator.parameters()) == dense + convs
    critic = Critic()
    assert [c.stride for block in critic.blocks for c in block] == [2] * 5
    assert [block[0].weight.shape[1::-1] for block in critic.blocks] == [
        (128, 128),
        (128, 128),
        (64, 128),
        (32, 64),
        (16, 32),
    ]


@pytest.mark.parametrize("bands", [False, True])
def test_shapes_at_every_stage_and_batch_of_one(bands):
    generator, critic = ProGAN(**SMALL, haar=bands), Critic(SMALL["widths"], haar=bands)
    for stage in range(1, generator.stages + 1):
        for fade in (0.3, 1.0):
            volume = generator.synthesize(generator.sample_latent(1, torch.Generator()), stage, fade)
            assert volume.shape == (1, 1, *(n << stage for n in (1, 9, 7)))
            assert volume.min() > 0 and volume.max() < 1
            assert critic(volume, stage, fade).shape == (1,)


def test_fade_runs_from_the_old_stage_to_the_new():
    generator = ProGAN(**SMALL)
    z = generator.sample_latent(2, torch.Generator())
    old, new, begun = generator.synthesize(z, 1), generator.synthesize(z, 2), generator.synthesize(z, 2, fade=0.0)
    assert torch.equal(begun, upsample(old))
    half = generator.synthesize(z, 2, fade=0.5)
    assert torch.allclose(half, (new + begun) / 2, atol=1e-6)
    critic, x = Critic(SMALL["widths"]), torch.rand(2, 1, 4, 36, 28)
    assert torch.allclose(critic(x, 2, 0.0), critic(downsample(x), 1), atol=1e-5)


@pytest.mark.parametrize("profile", ["tiny", "laptop", "paper"])
def test_a_bone_changes_along_its_axis(profile):
    """Also from slices far apart, which nothing but the zeros beyond the coarsest grid, one voxel deep, can tell."""
    values = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())["profiles"][profile]["train"]
    for name in ("progan", "stylegan"):
        params = section(Train, values[name], name)
        torch.manual_seed(0)
        generator = build_generator(params.generator.model_copy(update={"noise": 0.0}), haar=params.haar)
        with torch.no_grad():
            bone = generator.synthesize(generator.to_styles(generator.sample_latent(1, torch_rng(0, "z"))), 1)[0, 0]
        first, *others = bone if not params.haar else bone.unflatten(0, (-1, 2)).mean(1)
        assert all(float((first - other).abs().mean()) > 0.05 * float(bone.std()) for other in others), name
    alike = ProGAN(widths=(8, 8), latent=16, haar=True, padding="replicate")
    bone = alike.synthesize(torch.randn(1, 16, generator=torch_rng(0, "z")))[0, 0]
    assert torch.allclose(bone[:2], bone[2:], atol=1e-6) and not torch.allclose(bone[0], bone[1], atol=1e-3)


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_folded_upsampling_is_upsampling_and_convolution(padding):
    plain, folded = Conv(4, 5, padding=padding), Conv(4, 5, padding=padding, upsample=True)
    folded.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 3, 5, 4, requires_grad=True)
    a, b = plain(upsample(x)), folded(x)
    assert torch.allclose(a, b, atol=1e-5)
    weights = torch.randn_like(a)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    assert torch.allclose(plain.weight.grad, folded.weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("fade", [0.4, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(convs=2, condition=2),
        dict(head=(6,)),
        dict(convs=2, whole=(1, 9, 7), haar=True),
        dict(whole=(1, 9, 7), head=(6, 5)),
        dict(haar=True, condition=2),
    ],
)
def test_explicit_input_gradient_is_autograds(options, fade):
    bands = 8 if options.get("haar") else 1
    widths = SMALL["widths"] if bands == 1 else SMALL["widths"][1:]
    critic = Critic(widths, statistics=torch.rand(3, 2, bands) + 0.5, **options)
    condition = torch.randn(3, 2) if critic.shifts else None
    for shift in critic.shifts or ():
        torch.nn.init.normal_(shift.weight)
    x = torch.rand(3, 1, *(n << 3 for n in (1, 9, 7)), requires_grad=True)
    explicit = critic.input_gradient(x, 3, fade, condition)
    (plain,) = torch.autograd.grad(critic(x, 3, fade, condition).sum(), x, create_graph=True)
    assert torch.allclose(explicit, plain, rtol=1e-4, atol=1e-6 * plain.detach().abs().max().item())
    weights = torch.randn_like(x)
    critic.zero_grad()
    (plain * weights).square().sum().backward()
    second = {n: p.grad.clone() for n, p in critic.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    critic.zero_grad()
    (explicit * weights).square().sum().backward()
    assert second
    for name, parameter in critic.named_parameters():
        if name in second:
            assert torch.allclose(parameter.grad, second[name], rtol=1e-3, atol=1e-5 * float(second[name].abs().max()))


@pytest.mark.parametrize("how", [{}, {"stride": 2}, {"upsample": True}, {"padding": "replicate"}])
@pytest.mark.parametrize("grid", [(1, 9, 7), (2, 18, 14), (3, 6, 8), (4, 6, 8)])
def test_bfloat16_gradients_are_right_on_every_grid(how, grid):
    # also on processors whose kernels are wrong: those are found out (`numerics`)
    rough, exact = Conv(16, 16, dtype=torch.bfloat16, **how), Conv(16, 16, **how)
    exact.load_state_dict(rough.state_dict())
    x, found = torch.randn(4, 16, *grid), []
    for conv in (rough, exact):
        given = x.clone().requires_grad_()
        y = conv(given)
        (y.float() * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        found.append((y, given.grad, conv.weight.grad))
    for got, wanted in zip(*found, strict=True):
        assert (got - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("how", [{}, {"stride": 2}, {"kernel": (1, 1, 1)}, {"kernel": (2, 9, 7), "padding": "none"}])
def test_the_adjoint_is_right_in_both_precisions_and_so_is_its_gradient(how):
    # <conv(x), g> = <x, transposed(g)> for the linear part, and both depend on the weight alike
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.02)):
        conv = Conv(16, 8, dtype=dtype, **how)
        x = torch.randn(4, 16, 2, 18, 14)
        y = F.conv3d(x, conv.weight * conv.scale, stride=conv.stride, padding=conv.pad)
        g = torch.randn_like(y)
        exact = torch.autograd.grad((y * g).sum(), conv.weight)[0]
        got = torch.autograd.grad((conv.transposed(g).float() * x).sum(), conv.weight)[0]
        assert (got - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("network", [ProGAN(**SMALL), StyleGAN(**SMALL, style=12)])
def test_without_gradients_and_alone_a_volume_is_the_same(network):
    styles = network.to_styles(network.sample_latent(2, torch_rng(1, "styles"))).detach()
    with_gradients = network.synthesize(styles)
    with torch.no_grad():
        together, alone = network.synthesize(styles), network.synthesize(styles[1:])
    assert with_gradients.requires_grad and torch.allclose(with_gradients, together, atol=1e-4)
    assert torch.allclose(with_gradients[1:], alone, atol=1e-4)  # other kernels round otherwise, layer by layer


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_layers_that_work_in_place_without_gradients_do_the_same(layout):
    x = torch.randn(2, 5, 3, 4, 6).contiguous(memory_format=layout)
    field, weight = torch.randn(2, 1, 3, 4, 6), torch.nn.Parameter(torch.randn(5))
    noisy, normal = x + field * weight.reshape(1, 5, 1, 1, 1), x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()
    assert torch.allclose(AddNoise()(x, field, weight), noisy, atol=1e-6)
    assert torch.allclose(PixelNorm()(x), normal, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(AddNoise()(x.clone(), field, weight), noisy, atol=1e-6)
        assert torch.allclose(PixelNorm()(x.clone()), normal, atol=1e-6)


def test_haar_is_orthonormal():
    x = torch.randn(2, 1, 4, 6, 8)
    bands = haar(x)
    assert torch.allclose(unhaar(bands), x, atol=1e-6)
    assert torch.allclose(bands.square().sum(), x.square().sum())
    assert torch.allclose(bands[:, :1], downsample(x) * 8**0.5, atol=1e-6)


def test_equalised_learning_rate_keeps_the_scale_of_signals():
    x = torch.randn(64, 32, 4, 6, 6)
    assert 0.8 < F.leaky_relu(Conv(32, 64)(x)[:, :, 1:-1, 1:-1, 1:-1], 0.2).square().mean() < 1.3


def test_truncated_latents_stay_within_and_keep_their_order():
    generator = ProGAN(**SMALL)
    z = generator.sample_latent(500, torch.Generator().manual_seed(0))
    cut = generator.to_styles(z, 1.8)
    assert cut.abs().max() <= 1.8
    assert torch.equal(z.flatten().argsort(), cut.flatten().argsort())
    assert torch.equal(generator.to_styles(z), z)


def test_noise_inputs_matter_only_where_they_are_on():
    rng = torch.Generator().manual_seed(1)
    silent, noisy = ProGAN(**SMALL), ProGAN(**SMALL, noise=0.5)
    with torch.no_grad():
        for scale in noisy.noise_scale:
            scale.fill_(0.5)
    for generator, differs in ((silent, False), (noisy, True)):
        z = generator.sample_latent(1, torch.Generator())
        first, again = (generator.synthesize(z, noise=rng) for _ in range(2))
        assert torch.equal(first, again) != differs
