"""The conditional HA-GAN: classes by grades and by an attribute, and a network that is trained further from another."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_hagan_training import stacks, train

from bonelib import InputError
from bonelib.core.random import torch_rng
from bonelib.latent.models import load_model
from bonelib.scans.dataset import Stacks
from bonelib.scans.tables import write_table
from bonelib.studies import conditional as cd
from bonelib.studies.config import Conditional


def graded(grades="12345512"):
    data = stacks()
    rows = [row | {"grade": g.strip()} for row, g in zip(data.rows, grades, strict=True)]
    return Stacks(data.volumes, rows, data.meta | {"intensity": [-500, 1500], "unit": "mgHA", "spacing_mm": [0.25] * 3})


def test_a_scan_has_the_class_of_its_grade_and_none_without_one():
    data = graded("12345 1 ")
    values = cd.values_of(data, cd.GRADE, "no table")
    edges = cd.edges_of(data, values, cd.GRADE)
    assert edges == [1.5, 2.5, 3.5, 4.5]
    assert [row["class"] for row in cd.labelled(data, values, edges).rows] == [0, 1, 2, 3, 4, 0]
    with pytest.raises(InputError, match="no training scan has class 4 of 5 by motion grade"):
        cd.edges_of(data, cd.values_of(graded("12355512"), cd.GRADE, ""), cd.GRADE)


def test_fifths_are_those_of_the_training_scans(tmp_path):
    data = graded()
    table = [{"scan": f"s{i}", "BV/TV": v} for i, v in enumerate((0.1, 0.2, 0.3, 0.4, 0.5, "", 9, 0.0))]
    write_table(tmp_path / "attributes.csv", table)
    values = cd.values_of(data, "BV/TV", tmp_path / "attributes.csv")
    edges = cd.edges_of(data, values, "BV/TV")
    assert edges == pytest.approx([0.18, 0.26, 0.34, 0.42])
    assert {r["scan"]: r["class"] for r in cd.labelled(data, values, edges).rows} == {
        "s0": 0, "s1": 1, "s2": 2, "s3": 3, "s4": 4, "s6": 4, "s7": 0,
    }  # fmt: skip
    with pytest.raises(InputError, match="holds no BV/T; accepted are motion grade and its attributes"):
        cd.values_of(data, "BV/T", tmp_path / "attributes.csv")


def test_it_begins_as_the_unconditional_one_and_keeps_what_lies_between_its_classes(tmp_path):
    train(tmp_path, samples=8)
    base, data = load_model(tmp_path / "model"), graded()
    how = cd.conditional(base.how, 8)
    start = cd.widened(base, how, tmp_path / "start", 1)
    for name, network in (("generator", base.generator), ("critic", base.critic)):
        wide = load_file(start / f"{name}.safetensors")
        for key, value in network.state_dict().items():
            assert torch.equal(wide[key][tuple(slice(n) for n in value.shape)], value), key
    assert not load_file(start / "generator.safetensors")["dense.weight"][:, -cd.CLASSES :].any()
    values = cd.values_of(data, cd.GRADE, "")
    cd.train_conditional(
        Conditional(samples=8), tmp_path / "model", data, values, tmp_path / "grades", state=tmp_path / "s", seed=1
    )
    assert cd.known_edges(tmp_path / "grades") == [1.5, 2.5, 3.5, 4.5]
    model = cd.of_grades(tmp_path)
    assert model.how.generator.classes == cd.CLASSES and model.config["seen"] == 8
    latent = base.generator.sample_latent(1, torch_rng(1, "sample", 0))
    styles = cd.styles_of(model, [3, 0], 1)
    assert torch.equal(styles[:1, :8], model.generator.to_styles(latent, model.how.generator.truncation))
    assert styles[:, 8:].tolist() == [[0, 0, 0, 1, 0], [1, 0, 0, 0, 0]]


def test_an_instrument_that_finds_what_was_asked_is_said_to():
    asked, edges = [0, 1, 2, 3, 4] * 4, [1.5, 2.5, 3.5, 4.5]
    groups = [f"p{i}" for i in range(20)]
    found = cd.obeyed(asked, np.array(asked) + 1.2, groups, edges, seed=1, draws=50)
    assert (found["N"], found["read"], found["right"], found["right or beside"]) == (20, 20, 1, 1)
    assert found["r"] == pytest.approx(1) and found["right low"] == 1
    worse = cd.obeyed(asked, [*(np.array(asked[:-1]) + 2.2), np.nan], groups, edges, seed=1, draws=50)
    assert worse["read"] == 19 and worse["right"] == pytest.approx(3 / 19) and worse["right or beside"] == 1
    assert cd.obeyed(asked, [np.nan] * 20, groups, edges, seed=1, draws=50)["right"] is None
