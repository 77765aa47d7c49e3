"""Inverse problems whose answers are known: by formula, on the oracle's bones, and by counting."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import GRID, INTENSITY, SPACING, Oracle
from scipy import fft

from bonelib import InputError
from bonelib.core.random import numpy_rng, torch_rng
from bonelib.evaluation.similarity import psnr
from bonelib.latent import inverse_problems as ip
from bonelib.latent.inverse_problems import Problem
from bonelib.latent.inversion import Inverter
from bonelib.latent.models import Model
from bonelib.scans.dataset import Stacks
from bonelib.scans.phantom.motion import GRADES, draw_events
from bonelib.studies import inverse_problems as study


class MeanCode(torch.nn.Module):
    """An encoder that says of every bone that it is the mean one."""

    def __init__(self):
        super().__init__()
        self.place = torch.device("cpu")

    def forward(self, volumes):
        return torch.zeros(len(volumes), 8)


@pytest.fixture(scope="module")
def model():
    return Model(Oracle(), torch.nn.Linear(1, 1), {})


@pytest.fixture(scope="module")
def bones(model):
    """Of 12 codes, on the oracle's grid."""
    with torch.no_grad():
        return model.generator.synthesize(torch.randn(12, 8, generator=torch_rng(0, "codes")))


def roughness():
    """A spectrum that falls with the frequency."""
    return ip.Deviation((0.3 / (1 + np.hypot.reduce(np.meshgrid(*map(np.arange, GRID), indexing="ij")))).astype("f4"))


def test_of_noise_alone_the_most_probable_bone_is_the_wiener_filter():
    prior, noise = roughness(), 0.05
    seen = torch.randn(1, 1, *GRID, generator=torch_rng(0, "seen"))
    first = torch.full_like(seen, 0.3)
    found = ip.most_probable(first, Problem([ip.as_given], [seen], noise), prior, 40)
    gain = prior.root**2 / (prior.root**2 + noise**2)
    wanted = 0.3 + fft.idctn(gain * fft.dctn((seen - first)[0, 0].numpy(), norm="ortho"), norm="ortho")
    assert np.allclose(found[0, 0].numpy(), wanted, atol=2e-3)


def test_the_prior_of_deviations_is_that_of_its_draws():
    prior, rng = roughness(), numpy_rng(0, "parts")
    draws = np.stack([prior.drawn(rng.standard_normal(GRID).astype("f4")) for _ in range(200)])
    found = ip.fit_deviation(torch.from_numpy(draws)[:, None])
    inner = (slice(1, None), slice(8, None), slice(8, None))  # where the spectrum is flat over neighbours
    assert np.allclose(found.root[inner], prior.root[inner], rtol=0.1)


@pytest.mark.parametrize("factor", [2, 4])
def test_the_most_probable_bone_has_the_means_that_were_observed(bones, factor):
    case = study.lower_resolution(bones[:2], ["a", "b"], factor, 1e-3, 0)
    prior = ip.fit_deviation(bones - bones.mean(0, keepdim=True))
    found = ip.most_probable(bones.mean(0, keepdim=True).expand(2, -1, -1, -1, -1), case, prior, 100)
    assert (F.avg_pool3d(found, factor) - torch.cat(case.observed)).abs().max() < 0.02
    assert (psnr(bones[:2, 0].numpy(), found[:, 0].numpy()) > 20).all()


def test_codes_are_found_through_the_operator(bones, model):
    bones = bones[:4]
    case = study.lower_resolution(bones, list("abcd"), 2, 0.005, 0)
    start = ip.enlarged(case.observed, GRID)
    left = 0.01 * torch.randn(bones.shape, generator=torch_rng(0, "left"))
    found = ip.most_probable_codes(start, case, model, Inverter(MeanCode(), None), left, steps=30, rate=0.2)
    drawn = model.generator.synthesize(found.codes)
    better = psnr(bones[:, 0].numpy(), drawn[:, 0].numpy()) > psnr(bones[:, 0].numpy(), start[:, 0].numpy())
    assert (found.after < found.before).all() and better.all()


def test_what_an_observation_may_differ_by_is_the_noise_and_what_codes_leave(bones):
    left = 0.1 * torch.randn(bones.shape, generator=torch_rng(0, "left"))
    variance, share = ip.unexplained(Problem([ip.as_given] * 12, [], 0.2), left)
    assert variance == pytest.approx(0.2**2 + 0.1**2, rel=0.05) and share > 0.9
    even = left.mean((2, 3, 4), keepdim=True).expand_as(left)  # one number a bone
    assert ip.unexplained(Problem([ip.as_given] * 12, [], 1e-6), even)[1] < 0.01


def test_the_first_estimate_that_explains_the_observation_has_more_evidence(bones):
    case = study.lower_resolution(bones, [str(i) for i in range(12)], 2, 0.01, 0)
    left = 0.02 * torch.randn(bones.shape, generator=torch_rng(0, "left"))
    mean = bones.mean(0, keepdim=True).expand_as(bones)
    near, far = ip.evidence(case, bones + left.flip(0), left), ip.evidence(case, mean, bones - mean)
    wrong = ip.evidence(case, bones.flip(0), left)
    assert (near > far).all() and (far > wrong).all()


def test_an_arm_that_does_not_move_is_seen_as_it_is(bones):
    events = draw_events(numpy_rng(0, "events"), GRADES[4])
    still, moving = (ip.moved(e, [SPACING] * 3, INTENSITY) for e in ([], events))
    assert torch.allclose(still(bones[:1]), bones[:1], atol=1e-6)
    assert (moving(bones[:1]) - bones[:1]).abs().max() > 0.01
    a, b = bones[:1], bones[1:2]  # affine: a mixture of bones moves as the mixture of the moved
    assert torch.allclose(moving(0.3 * a + 0.7 * b), 0.3 * moving(a) + 0.7 * moving(b), atol=1e-5)


def test_of_several_trajectories_the_true_one_is_found_about_a_known_bone(bones):
    drawn, of = numpy_rng(0, "trajectories"), ([SPACING] * 3, INTENSITY)
    events = [draw_events(drawn, GRADES[4]) for _ in range(5)]
    prior = ip.Deviation(np.full(GRID, 0.01, "f4"))
    for true in events[1:4]:
        seen = ip.moved(true, *of)(bones[:1])
        rng = numpy_rng(0, "trajectories")
        assert ip.likely_trajectory(seen, bones[:1], prior, 0.005, *of, grade=4, count=5, rng=rng) == true


def test_motion_corrected_with_the_true_trajectory_comes_closer(bones):
    rows = [dict(scan=f"s{i}", patient=str(i), volume=i, start=0, split="held-out") for i in range(3)]
    fine = F.interpolate(bones[:3], scale_factor=2)[:, 0].numpy().astype("f2")
    meta = dict(spacing_mm=[SPACING / 2] * 3, stack_slices=2 * GRID[0], intensity=INTENSITY)
    case = study.motion(Stacks(fine, rows, meta), rows, GRID, 4, 0.002, 0)
    prior, mean = ip.fit_deviation(bones - bones.mean(0)), bones.mean(0, keepdim=True)
    found = ip.most_probable(mean.expand(3, -1, -1, -1, -1), case, prior, 20)
    real, moved = bones[:3, 0].numpy(), torch.cat(list(case.observed))[:, 0].numpy()
    assert (psnr(real, found[:, 0].numpy()) > psnr(real, moved)).all()


def test_false_and_missed_bone_are_counted():
    real = torch.zeros(1, 1, 1, 2, 5)
    real[..., 0, :4] = 1.0  # four voxels of bone
    restored = torch.zeros_like(real)
    restored[..., 0, 2:] = 1.0  # two of these, and one beside
    found = study.made_up(real, restored, (0.0, 1000.0))
    assert found["false bone"] == pytest.approx([1 / 3]) and found["missed bone"] == pytest.approx([0.5])
    assert np.isnan(study.made_up(real, 0 * real, (0.0, 1000.0))["false bone"]).all()


def test_true_detail_correlates_and_invented_detail_does_not(bones):
    smooth = F.interpolate(F.avg_pool3d(bones, 2), scale_factor=2)
    true, none = (study.added_detail(bones, v, 2) for v in (bones, smooth))
    assert true["detail, r"] == pytest.approx([1] * 12) and true["detail, SD over the true"] == pytest.approx([1] * 12)
    assert none["detail, SD over the true"].max() < 1e-5
    noise = 0.1 * torch.randn(bones.shape, generator=torch_rng(0, "invented"))
    assert np.abs(study.added_detail(bones, smooth + noise, 2)["detail, r"]).max() < 0.15


def test_better_is_counted_where_one_can_be_read():
    nan = np.nan
    assert study.better(np.array([2, 1, nan]), np.array([1, 2, 1])).tolist() == [1, 0, 0]
    found = study.better(np.array([1, nan, nan]), np.array([2, 1, nan]), least=True)
    assert found[:2].tolist() == [1, 0] and np.isnan(found[2])


def test_the_verdict_says_what_the_numbers_say():
    base, good = (dict.fromkeys(["PSNR, dB", "morphometry, SDs off"], np.array(v, float)) for v in ([1, 1], [2, 2]))
    found = {"2x": {study.OBSERVED: base, study.CODE: good}}
    rows = study.table(found, ["a", "b"], seed=0, draws=10)
    shares = {row["measure"]: row["value"] for row in rows if row["method"] == study.CODE}
    assert shares["PSNR better"] == 1 and shares["morphometry better"] == 0
    assert "as asked" in study.verdict(rows, "2x", "PSNR better", 0.9)[0]
    assert "less than asked" in study.verdict(rows, "2x", "morphometry better", 0.75)[0]


def test_too_few_codes_are_one_sentence():
    rows = [dict(scan="a", patient="a", volume=0, start=0, split="train")]
    data = Stacks(np.zeros((1, 1, 1, 1)), rows, {})
    with pytest.raises(InputError, match="holds 0 codes of held-out stacks; at least 2"):
        study.stacks_with_codes(data, [dict(scan="a", start="0", split="train")], "held-out", 3)
