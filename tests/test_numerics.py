"""Low precision is believed only where it agrees with float32."""

import logging
import sys

import pytest
import torch

from bonelib.networks import numerics
from bonelib.networks.layers import Conv
from bonelib.networks.numerics import Operation


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    monkeypatch.setattr(numerics, "_trusted", {})


def plant(monkeypatch, spoil):
    """Make the low-precision kernels of 3x3x3 convolutions wrong: `spoil(output)` is what they return."""
    compute = Operation.compute

    def wrong(self, x, weight, bias):
        y = compute(self, x, weight, bias)
        return spoil(y) if x.dtype in numerics.LOW and weight.shape[2:] == (3, 3, 3) else y

    monkeypatch.setattr(Operation, "compute", wrong)


@pytest.mark.parametrize("upsample", [False, True])
def test_right_kernels_are_used(upsample, caplog):
    conv = Conv(16, 16, upsample=upsample, dtype=torch.bfloat16)
    assert conv(torch.randn(2, 16, 4, 6, 5)).dtype == torch.bfloat16
    assert list(numerics._trusted.values()) == [True] and not caplog.records


class Halved(torch.autograd.Function):
    """The identity, with half the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


@pytest.mark.parametrize("spoil", [lambda y: 1.2 * y, lambda y: y * float("nan"), Halved.apply])
def test_a_planted_wrong_kernel_is_replaced_by_float32_and_said_once(spoil, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    torch.manual_seed(0)
    conv, x = Conv(16, 16, dtype=torch.bfloat16), torch.randn(2, 16, 4, 6, 5)
    exact = Conv(16, 16)
    exact.load_state_dict(conv.state_dict())
    plant(monkeypatch, spoil)
    for _ in range(2):
        found = []
        for layer in (conv, exact):
            given = x.clone().requires_grad_()
            y = layer(given)
            found.append((y.float(), *torch.autograd.grad(y.float().square().sum(), [given, layer.weight])))
    assert all((a - b).norm() / b.norm() < 0.02 for a, b in zip(*found, strict=True))
    assert [r.getMessage().count("runs in float32") for r in caplog.records] == [1]
    # Another signature is looked at for itself; without gradients a wrong gradient does no harm
    with torch.no_grad():
        conv(x)
    assert len(numerics._trusted) == 2


def test_a_kernel_that_ends_the_process_is_replaced_by_float32_and_said(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    numerics._close()
    ends = "print('ready', flush=True); input()"  # and that is all
    x = torch.randn(2, 4, 3, 5, 4, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(4, 4, 3, 3, 3).bfloat16().requires_grad_()
    operation = Operation("convolution", 1, (1, 1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(numerics, "OTHER", (sys.executable, "-c", ends))
        for _ in range(2):
            y = numerics.apply(operation, x, weight)
            exact = torch.nn.functional.conv3d(x.float(), weight.float(), None, 1, 1)
            assert y.dtype == torch.bfloat16 and (y.float() - exact).norm() / exact.norm() < 0.02
    assert [r.getMessage().count("ends the process; it runs in float32") for r in caplog.records] == [1]
    assert numerics.survived(operation, x, weight, None)  # in the next process


def test_a_check_draws_no_random_number_and_leaves_the_operands_alone():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 5, 4, dtype=torch.bfloat16)
    before, state = x.clone(), torch.get_rng_state()
    assert numerics.trusted(Operation("convolution", 1, (1, 1, 1)), x, torch.randn(4, 4, 3, 3, 3).bfloat16())
    assert torch.equal(x, before)
    torch.set_rng_state(state)


def test_networks_compute_in_float32_where_the_processor_has_no_kernels_for_less(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for kernels, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda kernels=kernels: kernels)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        numerics.compute_dtype.cache_clear()
        assert numerics.compute_dtype("bfloat16") == dtype and numerics.compute_dtype("float32") == torch.float32
    assert "no kernels for bfloat16" in caplog.text
    numerics.compute_dtype.cache_clear()
