"""Costs are measured in one run, by turns, and memory in a process of its own."""

from pathlib import Path

import pytest
import torch
import yaml

from bonelib import InputError
from bonelib.core.config import section
from bonelib.networks.config import CriticNet, ProGANConfig, StyleGANConfig
from bonelib.studies import cost, hagan_cost, published_sizes
from bonelib.training import hagan
from bonelib.training.config import HierarchicalTrain, Train

CRITIC = CriticNet(widths=[8, 8, 8], convs=2)
PROGAN = ProGANConfig(widths=[8, 8, 8], latent=8, noise=0.5)
STYLEGAN = StyleGANConfig(widths=[8, 8, 8], latent=8, style=8, noise=0.5)


def test_precisions_take_turns_and_do_the_same_work():
    rows = cost.update_times(STYLEGAN, CRITIC, stage=2, batch=1, n_critic=2, rounds=1)
    assert [row["precision"] for row in rows] == [*cost.precisions()] and rows[0]["times faster"] == 1
    assert rows[0]["GFLOP"] > 0 and all(row["least"] <= row["seconds"] <= row["most"] for row in rows)
    assert cost.peak_rate(torch.float32, 0.05) > 1


def test_sampling_is_measured_in_a_process_of_its_own():
    found = cost.sampling_cost(PROGAN, "float32")
    assert found["MB in all"] > found["MB above start"] >= 0


def test_the_published_schedule_is_timed_stage_by_stage():
    values = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())["profiles"]["tiny"]["train"]
    how = section(Train, values["progan"], "progan")
    rows = published_sizes.measure(how, updates=1, seed=1, device=torch.device("cpu"))
    assert [row["grid"] for row in rows] == ["2x18x14", "4x36x28"]
    for row, samples in zip(rows, how.schedule.samples, strict=True):
        assert row["updates of the schedule"] == samples / (row["batch"] * how.n_critic)
        assert row["hours"] * 3600 == pytest.approx(row["seconds an update"] * row["updates of the schedule"])
        assert row["power, W"] is None and row["kWh"] is None


HAGAN = HierarchicalTrain(
    generator=dict(
        kind="hagan",
        base=[2, 3, 2],
        stages=4,
        widths=[16, 16, 8],
        fine=[8],
        low=[8],
        encoder=[8, 8],
        latent=8,
        division=4,
    ),
    critic=dict(high=[4, 4, 8], head=[8, 4], low=[4, 4]),
    batch=2,
)


def test_the_plain_iteration_of_hagan_computes_what_ours_does():
    trained, _, real = hagan_cost.started(HAGAN, 1)
    generator, critic, encoder = (trained.objects[name].eval() for name in ("generator", "critic", "encoder"))
    with torch.no_grad():
        latent = generator.sample_latent(2, torch.Generator().manual_seed(0))
        a, plain = generator.features(latent), hagan_cost.plain_features(generator, latent)
        pairs = [
            (a, plain),
            (generator.draw_high(a), hagan_cost.plain_image(generator.fine_blocks, generator.fine_image, plain)),
            (generator.draw_low(a), hagan_cost.plain_image(generator.low_blocks, generator.low_image, plain)),
            (critic.judge_high(real.high, real.r)[0], hagan_cost.plain_logit(critic, real.high, real.r)),
            (critic.judge_low(real.low)[0], hagan_cost.plain_logit(critic, real.low, None)),
            (encoder(real.whole), hagan_cost.plain_code(encoder, real.whole)),
        ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_iterations_of_hagan_take_turns_and_the_plain_one_does_more_work():
    plain, here, halo, *low = hagan_cost.iteration_times(HAGAN, rounds=1, seed=1)
    assert [row["implementation"] for row in low] == [f"here, with halo, {p}" for p in cost.precisions()[1:]]
    assert plain["times faster"] == 1 and plain["GFLOP"] > halo["GFLOP"] > here["GFLOP"] > 0


def test_the_memory_of_an_iteration_is_as_predicted():
    low = dict(base=[4, 4, 4], widths=[16] * 4, fine=[16], low=[16], encoder=[16] * 3, latent=16)
    how = HierarchicalTrain(generator=low, critic=dict(high=[8] * 5, head=[8, 8], low=[8] * 3), batch=2)
    found = hagan_cost.memory_of_an_iteration(how, 1)
    assert found["voxels"] == 128**3 and found["MB of activations"] > found["MB held"] > 0
    assert found["predicted/measured"] == pytest.approx(1, abs=0.25)  # of 75 MB, some 10 of which are of libraries


@pytest.mark.parametrize(("edge", "millions"), [(32, 74.7), (64, 78.7), (128, 79.6), (256, 79.7)])
def test_the_published_networks_have_the_parameters_of_table_vii(edge, millions):
    how = hagan_cost.published(edge)
    with torch.device("meta"):
        objects = hagan.build(how, 1, torch.device("meta"))
    count = sum(p.numel() for name in ("generator", "critic", "encoder") for p in objects[name].parameters())
    assert round(count / 1e6, 1) == millions and edge == how.slices


def test_a_size_that_the_networks_do_not_have_is_refused():
    with pytest.raises(InputError, match="edge is 100; accepted are 32, 64, 128, 256"):
        hagan_cost.published(100)
    with pytest.raises(InputError, match="stages is 2; accepted are 3 to 4"):
        hagan_cost.coarser(HAGAN, 2)
