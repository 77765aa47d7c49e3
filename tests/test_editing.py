"""Effects of directions, and bones drawn to measure, on a renderer whose attributes are known."""

import numpy as np
import pytest
import torch

from bonelib import InputError
from bonelib.core.random import torch_rng
from bonelib.evaluation import differentiable as gauge
from bonelib.latent import attribute_model as editing
from bonelib.latent import sefa
from bonelib.latent import target_optimisation as optimisation
from tests.oracle import GRID, INTENSITY, SPACING, TRAITS, Oracle, render

NAMES = ("Tt.Ar", "Tb.BMD", "Ct.BMD", "Ct.Th")


@pytest.fixture(scope="module")
def tool():
    oracle = Oracle(latent=12, entangled=True).float()

    def read(codes):
        found = oracle.attributes(codes)
        return torch.stack([found[name] for name in NAMES], 1)

    made, codes, found = editing.calibrate(read, NAMES, oracle, seed=1, samples=400)
    assert codes.shape == (400, 12) and found.shape == (400, 4)
    return made


def test_sefa_equals_the_eigenvectors():
    oracle = Oracle(latent=16, entangled=True)
    weight = oracle.factorized_weight()
    values, vectors = np.linalg.eigh((weight.T @ weight).numpy())
    found = sefa.directions(weight, 8)
    for i in range(8):
        expected = vectors[:, -1 - i] * np.sign(vectors[np.abs(vectors[:, -1 - i]).argmax(), -1 - i])
        assert np.abs(found.vectors[i].numpy() - expected).max() < 1e-6
    assert np.allclose(found.values, values[::-1][:8], rtol=1e-5)
    assert (found.vectors.double() @ oracle.right).diagonal().abs().min() > 0.999
    every = sefa.directions(weight, 16).vectors
    assert torch.allclose(every @ every.T, torch.eye(16), atol=1e-5)


def test_sefa_of_rows_of_length_one_differs_and_forgets_their_lengths():
    weight = torch.randn(30, 6, generator=torch_rng(0, "weight"))
    scaled = weight * torch.linspace(0.1, 3, 30)[:, None]
    assert torch.allclose(
        sefa.directions(weight, 6, normalise=True).vectors,
        sefa.directions(scaled, 6, normalise=True).vectors,
        atol=1e-5,
    )
    assert not torch.allclose(sefa.directions(weight, 6).vectors, sefa.directions(scaled, 6).vectors, atol=1e-2)


@pytest.mark.parametrize("weight, k", [(torch.ones(3), 1), (torch.ones(3, 4), 5), (torch.full((2, 2), torch.nan), 1)])
def test_sefa_refuses(weight, k):
    with pytest.raises(InputError):
        sefa.directions(weight, k)


def test_effects_at_a_code_are_the_derivatives(tool):
    codes = torch.randn(3, 12, generator=torch_rng(0, "codes"))
    values, slopes = editing.jacobian(tool.read, codes)
    step = 1e-2 * torch.randn(12, generator=torch_rng(0, "step"))
    change = tool.read(codes + step) - tool.read(codes - step)
    assert torch.allclose(change / 2, slopes @ step, rtol=1e-2, atol=1e-3)
    layered = codes[:, None].expand(-1, 3, -1)
    assert torch.allclose(editing.jacobian(tool.read, layered)[1], slopes, rtol=1e-4, atol=1e-4)
    _, some = editing.jacobian(tool.read, codes, torch.tensor([False, True]))
    assert torch.equal(some[:, 1:], slopes[:, 1:]) and slopes[:, 0].any() and not some[:, 0].any()


@pytest.mark.parametrize("layers", [False, True])
def test_a_bone_is_drawn_to_measure_and_keeps_the_rest(tool, layers):
    code = 0.5 * torch.randn(1, 12, generator=torch_rng(2, "code"))
    code = code[:, None].expand(-1, 3, -1) if layers else code
    before = tool.read(code)[0]
    wanted = float(tool.low[1] + 0.8 * tool.span[1])
    moved, measured = optimisation.move(tool, code, {"Tb.BMD": wanted})
    after = tool.read(moved)[0]
    assert moved.shape == code.shape and abs(measured["Tb.BMD"] - wanted) < 0.01 * tool.span[1]
    assert torch.allclose(after, torch.tensor([measured[name] for name in NAMES]), rtol=1e-4)
    assert ((after - before).abs() / tool.span)[[0, 2, 3]].max() < 0.011
    if layers:
        assert torch.allclose(moved - code, (moved - code)[:, :1].expand_as(code))  # one shift for all styles
    free, _ = optimisation.move(tool, code, {"Tb.BMD": wanted}, hold=False)
    assert (free - code).norm() < (moved - code).norm()


def test_codes_walk_together_as_they_do_alone(tool):
    codes = 0.5 * torch.randn(5, 12, generator=torch_rng(3, "codes"))
    targets = tool.read(codes)
    targets[:, 1] = tool.low[1] + torch.tensor([0.1, 0.5, 0.9, 1.5, 40]) * tool.span[1]  # the last ones cannot be met
    targets[1, 2] = torch.nan
    together = optimisation.optimise_to_target(tool, codes, targets, seeds=range(5))
    assert (together.error[:2] <= optimisation.TOLERANCE).all() and together.error[-1] > 0.1
    for i in range(5):
        alone = optimisation.optimise_to_target(tool, codes[i : i + 1], targets[i : i + 1], seeds=[i])
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.allclose(ours[i : i + 1].float(), theirs.float(), rtol=1e-3, atol=1e-3)


def test_a_walk_goes_round_what_cannot_be_read(tool):
    oracle = Oracle(latent=12, entangled=True).float()
    code, free = torch.zeros(1, 12), torch.linalg.svd(oracle.M.float())[2][-1]  # nothing is seen of this direction
    away = oracle.direction("Tb.BMD").float() + free

    def margin(codes):
        return 0.1 - 0.1 * codes @ away

    def read(codes):
        return torch.where(margin(codes)[:, None] < 0, torch.nan, tool.read(codes))

    wanted = tool.read(code)[0]
    wanted[1] = tool.low[1] + 0.95 * tool.span[1]

    def read_with_margin(codes):
        return torch.cat([read(codes), margin(codes)[:, None]], 1)

    blind = tool._replace(read=read)
    straight = optimisation.optimise_to_target(blind, code, wanted[None], starts=1, steps=6)
    warned = optimisation.optimise_to_target(
        blind._replace(read_with_margin=read_with_margin), code, wanted[None], starts=1, steps=6
    )
    assert straight.error > 0.1 and warned.error <= optimisation.TOLERANCE
    assert float(margin(warned.codes)) >= 0 and float(warned.codes @ free) < -0.5


def test_attributes_that_do_not_go_together_cannot_be_asked_for(tool):
    shape = torch.tensor([[4.0, 1.2], [1.2, 1.0]])
    made = tool._replace(
        names=("a", "b"),
        centre=torch.tensor([10.0, 5.0]),
        shape=shape,
        max_mahalanobis=2.0,
        low=torch.zeros(2),
        high=torch.ones(2) * 20,
    )
    off = torch.tensor([2.0, -0.5])
    assert made.mahalanobis(made.centre + off) == pytest.approx(float(off @ shape.inverse() @ off) ** 0.5, rel=1e-5)
    assert made.mahalanobis(torch.tensor([13.0, torch.nan])) == pytest.approx(1.5)  # 3 of an SD of 2
    low, high = made.attainable_range(torch.tensor([11.0, 5.3]), 1)
    for end in (low, high):  # at both ends it is just as far from the mean as it may be
        assert made.mahalanobis(torch.tensor([11.0, end])) == pytest.approx(2.0, rel=1e-4)
    assert made._replace(high=torch.tensor([20.0, 5.5])).attainable_range(torch.tensor([11.0, 5.3]), 1) == (low, 5.5)
    far = torch.tensor([14.0, 2.0])  # a bone that is itself farther out may be asked for what is as far
    assert made.mahalanobis(far) > 2 and made.attainable_range(far, 1)[0] == pytest.approx(2.0, rel=1e-4)


def test_what_cannot_be_drawn_is_refused(tool):
    code = torch.zeros(1, 12)
    for target in (2 * float(tool.high[1]), float(tool.low[1]) / 2):
        with pytest.raises(InputError, match=r"Tb.BMD .* outside of the calibrated range"):
            optimisation.move(tool, code, {"Tb.BMD": target})
    with pytest.raises(InputError, match="'Tb.Sp' cannot be asked for"):
        optimisation.move(tool, code, {"Tb.Sp": 1.0})
    narrow = tool._replace(max_latent_norm=0.2)
    with pytest.raises(InputError, match="no plausible bone near this one"):
        optimisation.move(narrow, code, {"Tb.BMD": float(tool.high[1])})
    alone = tool._replace(max_mahalanobis=0.1)
    with pytest.raises(InputError, match="goes with no bone"):
        optimisation.move(alone, code, {"Tb.BMD": float(tool.high[1])})
    nothing = tool._replace(read=lambda codes: torch.full((len(codes), 4), torch.nan))
    with pytest.raises(InputError, match="no closed cortex"):
        optimisation.move(nothing, code, {"Tb.BMD": float(tool.high[1])})


def traits(n, seed=0, **fixed):
    """Traits of `n` oracle bones, drawn as the oracle draws them."""
    rng = torch_rng(seed, "traits")
    drawn = {
        name: change * torch.randn(n, generator=rng)
        if name in ("angle", "taper")
        else typical * (change * torch.randn(n, generator=rng)).exp()
        for name, (typical, change, _) in TRAITS.items()
    }
    drawn |= {name: torch.full((n,), float(value)) for name, value in fixed.items()}
    drawn["Ct.Th"] = drawn["Ct.Th"] * 0.65  # nearly as thick as that of a radius
    return {name.replace(".", "_"): values for name, values in drawn.items()}


def density(found):
    return INTENSITY[0] + (INTENSITY[1] - INTENSITY[0]) * render(**found)


def test_a_gauge_reads_other_bones_than_it_was_fitted_on():
    known, others = traits(120, 1, contrast=20), traits(60, 2, contrast=20)
    table = torch.stack([known[name.replace(".", "_")] for name in gauge.FITTED], 1).numpy()
    fitted = gauge.fit(gauge.features(density(known), [SPACING] * 3), table)
    read = fitted.read(density(others), [SPACING] * 3)
    seen = read.isfinite().all(1)
    assert seen.sum() > 40
    # Of a cortex thinner than two voxels, thickness and density are told apart in part only
    for i, (name, least) in enumerate(zip(gauge.FITTED, (0.99, 0.97, 0.65, 0.8), strict=True)):
        truth = others[name.replace(".", "_")][seen].numpy()
        assert np.corrcoef(read[seen, i], truth)[0, 1] > least, name
    table = torch.stack([others[name.replace(".", "_")] for name in gauge.FITTED], 1).numpy()
    rows = gauge.agreement(read, table, [str(i) for i in range(60)], seed=1, draws=50)
    assert [r["attribute"] for r in rows] == list(gauge.FITTED) and rows[0]["N"] == int(seen.sum())
    assert all(r["r low"] <= r["r"] <= r["r high"] and r["bias low"] <= r["bias"] <= r["bias high"] for r in rows)
    turned = torch.rad2deg(others["angle"])[seen].numpy()
    assert abs(np.corrcoef(read[seen, 4], turned)[0, 1]) > 0.9


def test_a_gauge_averages_fine_voxels_and_differentiates():
    coarse = density(traits(4, 3, contrast=0)).requires_grad_()
    found = gauge.features(coarse, [SPACING] * 3)
    fine = coarse.detach().repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    assert torch.allclose(gauge.features(fine, [SPACING / 2] * 3), found.detach(), rtol=1e-4, atol=1e-3)
    (slope,) = torch.autograd.grad(found[:, gauge.FEATURES.index("core")].sum(), coarse)
    assert slope.abs().sum() > 0 and coarse.shape[2:] == GRID


def test_a_gauge_watches_what_it_reads():
    bones = density(traits(30, 1, contrast=20))
    table = torch.stack([traits(30, 1, contrast=20)[name.replace(".", "_")] for name in gauge.FITTED], 1).numpy()
    fitted = gauge.fit(gauge.features(bones, [SPACING] * 3), table)
    bones[:3, :, :, 18:] = 0  # half of the cortex is missing
    seen, read = fitted.read_with_margin(bones, [SPACING] * 3), fitted.read(bones, [SPACING] * 3)
    assert torch.equal(seen[:, :-1].nan_to_num(-1), read.nan_to_num(-1))
    assert (seen[:, -1] >= 0).equal(read.isfinite().all(1)) and int((seen[:, -1] >= 0).sum()) == 27


@pytest.mark.parametrize("seed", [6, 7, 8])
def test_a_gauge_follows_a_cortex_that_fades_in_part(seed):
    bone, fades = density(traits(1, seed, contrast=0)), torch.zeros(1, 1, *GRID)
    fades[..., :8, :] = 1
    found = gauge.features(bone * (1 - fades * torch.linspace(0, 0.9, 91)[:, None, None, None, None]), [SPACING] * 3, 0)
    for name in ("area", "outline", "core"):
        values = found[:, gauge.FEATURES.index(name)]
        # Where voxels are in or out by a threshold, one of these steps is up to half of the way
        assert float(values.diff().abs().max()) < 0.1 * float(values.max() - values.min()), name


def test_where_bones_are_all_the_same_or_few_there_is_no_range():
    oracle = Oracle(latent=12, entangled=True).float()

    def alike(codes):
        return torch.ones(len(codes), 4)

    def rarely(codes):
        found = oracle.attributes(codes)
        found = torch.stack([found[name] for name in NAMES], 1)
        return torch.where((torch.arange(len(codes)) < 5)[:, None], found, torch.nan)

    for read in (alike, rarely):
        made, codes, _ = editing.calibrate(read, NAMES, oracle, seed=1, samples=40)
        assert not made.calibrated
        with pytest.raises(InputError, match="nothing can be asked for"):
            optimisation.move(made, codes[:1], {"Tb.BMD": 100.0})


def test_a_gauge_refuses_what_it_cannot_read():
    nothing = torch.zeros(2, 1, *GRID)
    ring = density(traits(1, 4))
    ring[:, :, :, 18:] = 0  # half of the cortex is missing
    assert gauge.features(torch.cat([nothing, ring]), [SPACING] * 3).isnan().all()
    with pytest.raises(InputError, match="too few for a fit"):
        gauge.fit(gauge.features(density(traits(3)), [SPACING] * 3), np.ones((3, 4)))


def test_an_instrument_is_written_and_opened(tmp_path):
    oracle = Oracle().float()
    known = traits(40, 5)
    table = torch.stack([known[name.replace(".", "_")] for name in gauge.FITTED], 1).numpy()
    fitted = gauge.fit(gauge.features(density(known), [SPACING] * 3), table)
    data = dict(intensity=INTENSITY, spacing_mm=[SPACING] * 3)
    read = editing.readers(oracle, fitted, data)[0]
    made, codes, found = editing.calibrate(read, gauge.ATTRIBUTES, oracle, seed=1, samples=40)
    editing.save_attribute_model(made, fitted, tmp_path / "instrument.safetensors")
    again = editing.load_attribute_model(tmp_path / "instrument.safetensors", oracle, data)
    assert torch.allclose(again.read(codes), found, rtol=1e-4, atol=1e-3, equal_nan=True) and torch.equal(
        again.low, made.low
    )
    blind, _, _ = editing.calibrate(lambda c: read(c) * torch.nan, gauge.ATTRIBUTES, oracle, seed=1, samples=40)
    editing.save_attribute_model(blind, fitted, tmp_path / "instrument.safetensors")
    assert not editing.load_attribute_model(tmp_path / "instrument.safetensors", oracle, data).calibrated
    with pytest.raises(InputError, match="no such file"):
        editing.load_attribute_model(tmp_path / "other", oracle, data)
