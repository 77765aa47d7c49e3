"""How codes are refined, chosen on the oracle, whose bones measure what they should."""

import numpy as np
import pytest
import torch
from oracle import INTENSITY, SPACING, Oracle

from bonelib import InputError
from bonelib.core.random import torch_rng
from bonelib.latent import inversion
from bonelib.latent import refinement as tuning
from bonelib.latent.config import Refinement, RefinementGrid
from bonelib.latent.models import Model
from bonelib.networks.config import CriticNet
from bonelib.networks.registry import build_critic


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    critic = build_critic(CriticNet(widths=(8, 8, 8))).requires_grad_(False)
    data = dict(intensity=INTENSITY, spacing_mm=[SPACING] * 3)
    return Model(Oracle(), critic, dict(data=data, sha256="oracle"))


def guess(volumes):
    """An encoder that always says the mean code."""
    return torch.zeros(len(volumes), 8)


guess.place = torch.device("cpu")


def test_what_measures_most_like_the_bones_is_chosen_whatever_its_loss(model, tmp_path):
    codes = model.generator.sample_latent(6, torch_rng(1, "bones")).float()
    volumes = inversion.draw_codes(model, codes)
    assert tuning.morphometric_error(model, volumes, volumes) == pytest.approx(0)
    # A latent term of weight 100 keeps codes at the mean, and steps of 1e-6 where they begin
    tried = RefinementGrid(weights=((1, 0, 100), (1, 0, 0)), rates=(1e-6, 0.05))
    chosen, rows = tuning.choose(volumes, model, inversion.Inverter(guess, None), Refinement(steps=60), tried)
    assert (chosen.weights, chosen.rate, chosen.steps) == ((1, 0, 0), 0.05, 60)
    off = [row["attributes, SDs off"] for row in rows]
    assert [row["chosen"] for row in rows] == [False, False, False, True] and off[3] < 0.5 * min(off[:3])
    assert rows[3]["loss lowered"] == 1 and rows[3]["latent"] > rows[1]["latent"]
    tuning.save_refinement(tmp_path, chosen)
    assert tuning.load_refinement(tmp_path) == chosen


def test_nothing_is_chosen_where_nothing_can_be_read(model, tmp_path):
    empty = torch.zeros(2, 1, 4, 36, 28)
    assert np.isnan(tuning.morphometric_error(model, empty, empty)).all()
    tried = RefinementGrid(weights=((1, 0, 0),), rates=(1e-6,))
    how = Refinement(steps=1, rate=0.1)
    chosen, rows = tuning.choose(empty, model, inversion.Inverter(guess, None), how, tried)
    assert chosen == how and (rows[0]["N"], rows[0]["chosen"], rows[0]["attributes, SDs off"]) == (0, False, None)
    with pytest.raises(InputError, match="no such file"):
        tuning.load_refinement(tmp_path)
