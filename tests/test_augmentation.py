"""Generated bones in the training set of a grader: what is mixed with what, and effects that are planted."""

import numpy as np
import pytest
import torch
from test_grading import quiet, stripes
from test_inversion import oracle_model

from bonelib.core.random import torch_rng
from bonelib.scans.dataset import Stacks
from bonelib.studies import augmentation as study
from bonelib.studies.config import Augmentation
from bonelib.training.grading import scans_of

HOW = Augmentation(
    grading=dict(widths=(8, 8), blocks=(1, 1), depth=4, samples=400, batch=10, rate=8e-3), seeds=2, draws=50
)


def rows_of(grades, patients):
    return [dict(grade=g, patient=p) for g, p in zip(grades, patients, strict=True)]


def test_what_is_mixed_is_of_one_grade_and_two_patients():
    rows = rows_of("1112223", "aabacde")
    found = study.mixes(rows, styles=6, count=40, seed=1)
    assert found == study.mixes(rows, styles=6, count=40, seed=1) and len(found) == 40
    for mix in found:
        a, b = rows[mix.source], rows[mix.target]
        assert a["grade"] == b["grade"] and a["patient"] != b["patient"] and 1 <= mix.styles <= 5
    assert {rows[mix.source]["grade"] for mix in found} == {"1", "2"}  # grade 3 has one patient
    assert study.mixes(rows_of("112", "aab"), 6, 9, 1) == [] == study.mixes(rows, 1, 9, 1)


def test_a_share_is_of_the_whole_set():
    count = study.count_of(rows_of("1" * 80, "a" * 80), 0.2)
    assert count == 20


def test_sets_hold_the_same_scans_and_as_many_generated_bones_with_their_grades():
    data = stripes()
    rows = study.graded(data.of("train"))
    codes = torch.randn(len(rows), 3, 8, generator=torch_rng(0, "codes"))
    model = oracle_model()
    model = model._replace(config=model.config | {"data": data.meta | {"spacing_mm": [0.2428] * 3, "unit": "mgHA"}})
    sets = study.training_sets(model, codes, data, rows, HOW, seed=1)
    assert list(sets) == [study.SCANS, study.REDRAWN, study.MIXED]
    (_, alone), (redrawn, first), (mixed, second) = sets.values()
    assert first == second and len(first) == len(alone) + 10 and first[: len(alone)] == alone
    assert len(redrawn.volumes) == len(mixed.volumes) == len(first)
    assert np.array_equal(redrawn.volumes[: len(alone)], mixed.volumes[: len(alone)])
    assert np.abs(redrawn.volumes[len(alone) :] - mixed.volumes[len(alone) :]).max() > 0.05
    given = {(row["scan"], int(row["grade"])) for row in rows}
    assert {(scan["scan"], scan["given"]) for scan in second} <= given


def test_a_set_with_wrong_grades_is_seen_to_do_harm(tmp_path):
    data = stripes(patients=10)
    scans = scans_of(data)
    train, tested = ([s for s in scans if (int(s["patient"][1:]) < 6) == first] for first in (True, False))
    wrong = [s | {"given": 6 - s["given"]} for s in train]
    stacks = Stacks(data.volumes, [], data.meta)
    sets = {study.SCANS: (stacks, train), study.MIXED: (stacks, train + 2 * wrong)}
    found = study.graded_by(sets, data, tested, HOW, tmp_path, seed=1, say=quiet)
    assert found[study.SCANS].shape == (2, len(tested))
    rows = {(r["trained on"], r[""]): r for r in study.compared(found, tested, seed=1, draws=50)}
    alone, harm = rows[study.SCANS, study.ERROR], rows[study.MIXED, f"change of {study.ERROR}"]
    assert harm["low"] > 0 and harm["value"] == pytest.approx(rows[study.MIXED, study.ERROR]["value"] - alone["value"])
    assert (alone["N"], alone["patients"]) == (len(tested), 4)
    assert rows[study.SCANS, study.BALANCED]["value"] > rows[study.MIXED, study.BALANCED]["value"]


def test_grades_are_compared_by_hand():
    tested = [dict(given=g, patient=p) for g, p in ((1, "a"), (1, "a"), (3, "b"), (5, "c"))]
    found = {
        study.SCANS: np.array([[1, 1, 3, 4.0], [1, 1, 3, 4.0]]),
        study.MIXED: np.array([[1, 1, 3, 5], [2, 1, 3, 5]]),
    }
    rows = {(r["trained on"], r[""]): r for r in study.compared(found, tested, seed=1, draws=50)}
    assert rows[study.SCANS, study.ERROR]["value"] == pytest.approx(1 / 3)  # over patients, not scans
    assert rows[study.SCANS, study.BALANCED]["value"] == pytest.approx(2 / 3)
    assert rows[study.MIXED, study.BALANCED]["value"] == pytest.approx((1 + 2.5 / 3) / 2)
    assert rows[study.MIXED, f"change of {study.ERROR}"]["value"] == pytest.approx((0.25 - 1) / 3)
