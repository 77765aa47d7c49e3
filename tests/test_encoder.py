"""The encoder is the generator reversed; features of the critic are those of the convolutions they are named for."""

import pytest
import torch
import torch.nn.functional as F

from bonelib.core.random import torch_rng
from bonelib.networks.config import CriticNet, ProGANConfig, StyleGANConfig
from bonelib.networks.encoder import (
    Encoder,
    LatentDiscriminator,
    build_encoder,
    critic_features,
    style_layers,
    trunk,
)
from bonelib.networks.registry import build_critic, build_generator
from bonelib.networks.superres import Cascaded, SuperResolution

SMALL = {
    "progan": ProGANConfig(widths=(8, 6, 4), latent=16, padding="replicate", base_convs=1),
    "stylegan": StyleGANConfig(widths=(8, 6, 4), latent=16, style=12, base_convs=1),
}


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("haar", [False, True])
def test_an_encoder_takes_what_its_generator_draws_and_gives_what_it_takes(kind, haar):
    generator = build_generator(SMALL[kind], haar=haar)
    encoder = build_encoder(SMALL[kind], haar=haar, dense=2 * (kind == "stylegan"))
    styles = generator.to_styles(generator.sample_latent(3, torch_rng(0, "codes")))
    codes = encoder(generator.synthesize(styles))
    assert codes.shape == styles.shape
    generator.synthesize(codes).mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_the_published_encoder_mirrors_table_a2():
    encoder = Encoder()
    assert [conv.weight.shape[:2] for conv in (encoder.from_image, *encoder.convs)] == [
        *[(16, 1), (16, 16), (32, 16), (32, 32), (64, 32), (64, 64), (128, 64), (128, 128), (128, 128)],
        *[(128, 128), (128, 128)],
    ]
    assert [conv.stride for conv in encoder.convs] == [1, 2] * 5
    assert encoder.to_code.weight.shape == (512, 8064) and len(encoder.dense) == 0
    assert [tuple(d.weight.shape) for d in Encoder(dense=2, widths=(4, 4)).dense] == [(512, 512)] * 2


def test_statistics_standardise_the_bands():
    torch.manual_seed(0)
    plain, volumes = Encoder(widths=(4, 4), code=6), torch.rand(2, 1, 2, 18, 14)
    scaled = Encoder(widths=(4, 4), code=6, statistics=torch.tensor([[0.3], [0.5]]))
    scaled.load_state_dict(plain.state_dict() | {"statistics": scaled.statistics})
    assert torch.allclose(scaled(0.3 + 0.5 * volumes), plain(volumes), atol=1e-5)


def test_instance_norm_makes_the_code_blind_to_the_contrast_of_features():
    torch.manual_seed(0)
    encoder, volumes = Encoder(widths=(4, 4, 4), code=6, norm="instance"), torch.rand(2, 1, 4, 36, 28)
    assert torch.allclose(encoder(5 * volumes), encoder(volumes), atol=1e-3)
    assert not torch.allclose(Encoder(widths=(4, 4, 4), code=6)(5 * volumes), encoder(volumes), atol=1e-3)


def test_the_latent_discriminator_learns_a_shifted_code():
    torch.manual_seed(0)
    judge = LatentDiscriminator(8, layers=2)
    adam = torch.optim.Adam(judge.parameters(), lr=1e-2)
    rng = torch_rng(0, "codes")
    for _ in range(60):
        real, fake = torch.randn(2, 32, 8, generator=rng) + torch.tensor([[[1.0]], [[-1.0]]])
        adam.zero_grad()
        (F.softplus(-judge(real)).mean() + F.softplus(judge(fake)).mean()).backward()
        adam.step()
    real, fake = torch.randn(2, 64, 8, generator=rng) + torch.tensor([[[1.0]], [[-1.0]]])
    assert (judge(real)[:, None] > judge(fake)).float().mean() > 0.95


def test_features_are_those_of_the_named_convolutions():
    torch.manual_seed(0)
    critic = build_critic(CriticNet(widths=(5, 4, 3), convs=2, whole=True))
    volumes = torch.rand(2, 1, 4, 36, 28)
    (last,) = critic_features(critic, volumes)
    assert torch.allclose(critic.out(last).flatten(1), critic.patches(volumes), atol=1e-5)
    first, second = critic_features(critic, volumes, "first")
    image = F.leaky_relu(critic.from_image[1](volumes), 0.2)
    assert torch.allclose(first, F.leaky_relu(critic.blocks[1][0](image), 0.2), atol=1e-5)
    entering = F.leaky_relu(critic.blocks[1][1](first), 0.2)
    assert torch.allclose(second, F.leaky_relu(critic.blocks[0][0](entering), 0.2), atol=1e-5)


def test_the_trunk_and_its_styles_are_found_below_the_super_resolution():
    plain = build_generator(SMALL["progan"])
    styled = build_generator(SMALL["stylegan"])
    assert trunk(plain) is plain and style_layers(plain) is None
    cascaded = Cascaded(styled, SuperResolution(4, 1, 4, 1))
    assert trunk(cascaded) is styled and style_layers(cascaded) == 6
