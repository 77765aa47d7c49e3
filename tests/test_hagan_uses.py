"""What codes say of attributes, and walks to a value that is asked, where the answers are known."""

import numpy as np
import pytest
import torch
from test_ablation import InThisProcess

from bonelib import InputError
from bonelib.core.config import section
from bonelib.latent import directions as ds
from bonelib.scans.config import Preprocess
from bonelib.studies import hagan_uses as study
from bonelib.studies.hagan_config import HAGANUses

how = dict(seed=1, draws=50)


def bones(values):
    return study.Bones(torch.zeros(len(values), 1, 2, 2, 2), values, [f"p{i // 2}" for i in range(len(values))])


@pytest.fixture(scope="module")
def planted():
    """Codes of 120 bones, two a patient, and attributes: the first two follow the codes, the third is noise."""
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((120, 6))
    values = rng.standard_normal((120, len(study.ATTRIBUTES)))
    values[:, :2] = codes @ rng.standard_normal((6, 2)) * 3 + 10
    return torch.from_numpy(codes).float(), values


def test_what_codes_say_is_found_and_noise_is_not(planted):
    codes, values = planted
    values = values.copy()
    values[:4, 0] = np.nan
    rows, predicted = study.explained(codes, bones(values), **how)
    assert [row["attribute"] for row in rows] == list(study.ATTRIBUTES)
    assert rows[0]["R2"] > 0.99 < rows[1]["R2"] and rows[2]["R2"] < 0.1
    assert (rows[0]["N"], rows[0]["patients"], rows[1]["N"]) == (116, 58, 120)
    assert all(row["R2 low"] <= row["R2"] <= row["R2 high"] for row in rows)
    assert np.isnan(predicted[:4, 0]).all() and np.abs(predicted[4:, 0] - values[4:, 0]).max() < 0.5


def test_a_patient_is_predicted_by_ridges_that_have_not_seen_them():
    """The code holds nothing but who a patient is: within patients values repeat, and between them they are random."""
    rng, who = np.random.default_rng(1), np.repeat(np.arange(20), 4)
    codes, values = torch.eye(20)[torch.from_numpy(who)], torch.from_numpy(rng.standard_normal(20)[who])
    of_others = ds.ridge_left_out(codes, values, [f"p{w}" for w in who]).numpy()
    each_alone = ds.ridge_left_out(codes, values).numpy()
    assert study.share(values.numpy(), each_alone) > 0.8 and study.share(values.numpy(), of_others) < 0.1


def test_of_too_few_bones_nothing_is_said(planted):
    codes, values = planted
    rows, predicted = study.explained(codes[:6], bones(values[:6]), **how)
    assert all(row["R2"] is None for row in rows) and np.isnan(predicted).all()


def test_a_walk_ends_where_the_ridge_predicts_what_was_asked(planted):
    codes, values = planted
    direction, _ = ds.ridge(codes, torch.from_numpy(values[:, 0]))
    targets = torch.tensor([5.0, 10.0, 15.0])
    found = study.walks(codes[:4], direction, targets)
    assert found.shape == (4, 3, 6)
    assert torch.allclose(direction.value(found.flatten(0, 1)).reshape(4, 3), targets.expand(4, 3), atol=1e-3)
    across = found - codes[:4, None]
    along = (across @ direction.vector)[..., None] * direction.vector
    assert torch.allclose(across, along, atol=1e-4)  # and nothing else of the code is changed


def test_dose_and_response_tell_slope_level_and_distance():
    asked, level = np.linspace(0, 4, 5), np.array([[0.0], [1.0], [2.0], [3.0]])
    patients = list("abcd")
    row = study.dose_response(asked, level + 0.5 * asked, patients, **how)
    assert row["slope"] == pytest.approx(0.5) and row["correlation within bones"] == pytest.approx(1)
    assert row["slope low"] == pytest.approx(0.5) == row["slope high"] and row["N"] == 4
    exact = study.dose_response(asked, np.tile(asked, (4, 1)), patients, **how)
    assert exact["slope"] == pytest.approx(1) and exact["distance in SDs"] == 0
    far = study.dose_response(asked, np.tile(asked, (4, 1)) + np.std(asked), patients, **how)
    assert far["distance in SDs"] == pytest.approx(1)
    holes = level + 0.5 * asked
    holes[0, 2:] = np.nan
    holes[1] = np.nan
    row = study.dose_response(asked, holes, patients, **how)
    assert (row["N"], row["bones measured"]) == (3, 12) and row["slope"] == pytest.approx(0.5)
    assert study.dose_response(asked, np.full((4, 5), np.nan), patients, **how)["slope"] is None


def test_phantoms_are_drawn_measured_and_lie_on_the_grid_of_the_generator(monkeypatch):
    monkeypatch.setattr(study, "workers", InThisProcess)
    given = Preprocess(shape=[42, 144, 112], stack_slices=16)
    found = study.draw_bones(1, given, 0.2428, 1, seed=1)
    assert found.stacks.shape == (1, 1, 8, 72, 56) and 0.1 < found.stacks.mean() < 0.9
    row = dict(zip(study.ATTRIBUTES, found.values[0], strict=True))
    assert 100 < row["Tt.Ar"] < 700 and row["Tb.BMD"] < row["Tt.BMD"] < row["Ct.BMD"] and 0.3 < row["Ct.Th"] < 3
    assert found.patients == [f"phantom {study.FIRST}"]


def test_bones_must_be_left_to_learn_from():
    with pytest.raises(InputError, match="walked 8 of 12 patients leaves fewer than 5"):
        section(HAGANUses, dict(patients=12, walked=8), "uses")
