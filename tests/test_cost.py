"""Costs are measured in one run, by turns, and memory in a process of its own."""

import torch

from bonelib.params import CriticNet, Generator
from bonelib.studies import cost

CRITIC = CriticNet(widths=[8, 8, 8], convs=2)
PROGAN = Generator(kind="progan", widths=[8, 8, 8], latent=8, noise=0.5)
STYLEGAN = Generator(kind="stylegan", widths=[8, 8, 8], latent=8, style=8, noise=0.5)


def test_precisions_take_turns_and_do_the_same_work():
    rows = cost.update_times(STYLEGAN, CRITIC, stage=2, batch=1, n_critic=2, rounds=1)
    assert [row["precision"] for row in rows] == ["float32", "bfloat16"] and rows[0]["times faster"] == 1
    assert rows[0]["GFLOP"] > 0 and all(row["least"] <= row["seconds"] <= row["most"] for row in rows)
    assert cost.peak_rate(torch.float32, 0.05) > 1


def test_sampling_is_measured_in_a_process_of_its_own():
    found = cost.sampling_cost(PROGAN, "float32")
    assert found["MB in all"] > found["MB above start"] >= 0
