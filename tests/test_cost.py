"""Every saving leaves the function as it is: outputs and gradients equal those of the plain implementation."""

from dataclasses import replace

import pytest
import torch

from bonelib.params import CriticNet, Generator
from bonelib.studies import cost
from bonelib.training import losses

CRITIC = CriticNet(widths=[8, 8, 8], convs=2)
KINDS = {
    "progan": Generator(kind="progan", widths=[8, 8, 8], latent=8, noise=0.5),
    "progan, replicate": Generator(kind="progan", widths=[8, 8, 8], latent=8, padding="replicate"),
    "stylegan": Generator(kind="stylegan", widths=[8, 8, 8], latent=8, style=8, noise=0.5),
    "stylegan, replicate": Generator(kind="stylegan", widths=[8, 8, 8], latent=8, style=8, padding="replicate"),
}


def gradients(how, savings):
    """A sample, and all gradients of one critic and one generator loss at the same draws."""
    generator, critic = cost.networks(how, CRITIC, savings)
    rng = torch.Generator().manual_seed(0)
    real = torch.rand(2, 1, 4, 36, 28, generator=rng)
    styles = generator.to_styles(generator.sample_latent(2, rng))
    fake = generator.synthesize(styles, 2, 0.6, rng)
    slope = losses.slopes(cost.input_gradient(critic, losses.mix(real, fake.detach(), rng), 2, savings))
    on_real, on_fake = critic(torch.cat([real, fake.detach()]), 2).split(2)
    losses.critic_loss(on_real, on_fake, slope, penalty=10, drift=1e-3).backward()
    found = {f"critic.{n}": p.grad.clone() for n, p in critic.named_parameters() if p.grad is not None}
    losses.generator_loss(critic(fake, 2)).backward()
    found |= {f"generator.{n}": p.grad for n, p in generator.named_parameters() if p.grad is not None}
    return fake.detach(), found


@pytest.mark.parametrize("kind", KINDS)
def test_savings_change_neither_outputs_nor_gradients(kind):
    plain, plain_gradients = gradients(KINDS[kind], cost.PLAIN)
    saved, saved_gradients = gradients(KINDS[kind], replace(cost.ALL, bfloat16=False))
    assert torch.allclose(plain, saved, atol=1e-5)
    assert plain_gradients.keys() == saved_gradients.keys() and len(saved_gradients) > 15
    for name, gradient in plain_gradients.items():
        assert torch.dist(gradient, saved_gradients[name]) <= 1e-4 * gradient.norm() + 5e-6, name  # some sums cancel


def test_the_table_compares_in_one_run():
    which = cost.variants("stylegan")
    assert list(which)[:4] == ["plain", "channels last", "folded upsampling", "small products"]
    assert list(which)[4:] == ["shared kernels", "explicit penalty", "fakes together", "bfloat16"]
    assert "shared kernels" not in cost.variants("progan")
    ends = {name: which[name] for name in ("plain", "bfloat16")}
    rows = cost.update_times(KINDS["stylegan"], CRITIC, ends, stage=2, batch=1, n_critic=2, rounds=1)
    assert [row["savings"] for row in rows] == list(ends) and rows[0]["times faster"] == 1
    assert rows[1]["GFLOP"] < rows[0]["GFLOP"] and all(row["least"] <= row["seconds"] <= row["most"] for row in rows)
    assert torch.get_num_threads() >= 1 and cost.peak_rate(torch.float32, 0.05) > 1


def test_sampling_is_measured_in_a_process_of_its_own():
    found = cost.sampling_cost(KINDS["progan"], cost.ALL)
    assert found["seconds"] > 0 and found["MB in all"] > found["MB above start"] >= 0
