"""The conditional HA-GAN: classes by grades and by an attribute, and a network that is trained further from another."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_hagan_training import SMALL, stacks, train

from bonelib import InputError
from bonelib.core.random import torch_rng
from bonelib.latent.models import load_model
from bonelib.scans.dataset import Stacks
from bonelib.scans.tables import write_table
from bonelib.studies import augmentation
from bonelib.studies import conditional as cd
from bonelib.studies.hagan_config import Conditional
from bonelib.training import checkpoint
from bonelib.training.config import Grading, training_section
from bonelib.training.grading import build_grader

META = {"intensity": [-500.0, 1500.0], "unit": "mgHA", "spacing_mm": [0.25] * 3}


def graded(grades="12345512"):
    data = stacks()
    rows = [row | {"grade": g.strip()} for row, g in zip(data.rows, grades, strict=True)]
    return Stacks(data.volumes, rows, data.meta | META)


def test_a_scan_has_the_class_of_its_grade_and_none_without_one():
    data = graded("12345 1 ")
    values = cd.values_of(data, cd.GRADE, "no table")
    edges = cd.edges_of(data, values, cd.GRADE)
    assert edges == [1.5, 2.5, 3.5, 4.5]
    found = cd.labelled(data, values, edges)
    assert [row["class"] for row in found.rows] == [0, 1, 2, 3, 4, 0]
    other = cd.labelled(data, values | {"s0": 2.0}, edges)  # another training, though of the same volumes
    assert len({data.meta["data_hash"], found.meta["data_hash"], other.meta["data_hash"]}) == 3
    assert cd.edges_of(data, cd.values_of(graded("12355512"), cd.GRADE, ""), cd.GRADE) is None


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
    assert cd.edges_of(data, dict.fromkeys(values, float("nan")), "BV/TV") is None


def test_it_begins_as_the_unconditional_one(tmp_path):
    train(tmp_path, samples=8)
    base = load_model(tmp_path / "model")
    start = cd.widened(base, cd.conditional(base.how, 8), tmp_path / "start", 1)
    for name, network in (("generator", base.generator), ("critic", base.critic)):
        wide = load_file(start / f"{name}.safetensors")
        for key, value in network.state_dict().items():
            assert torch.equal(wide[key][tuple(slice(n) for n in value.shape)], value), key
    assert not load_file(start / "generator.safetensors")["dense.weight"][:, -cd.CLASSES :].any()


def profile(folder, grades="12345512"):
    """What a profile has made of eight scans, with a grader; and an unconditional model of their grid."""
    data = graded(grades)
    for name in ("stacks", "grading"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "stacks/volumes.npy", data.volumes)
    write_table(folder / "stacks/stacks.csv", data.rows)
    checkpoint.write_json(folder / "stacks/stacks.json", data.meta)
    values = np.random.default_rng(1).random(8)
    write_table(folder / "stacks/attributes.csv", [{"scan": f"s{i}", "Tt.Ar": v} for i, v in enumerate(values)])
    rows = [dict(scan=f"s{i}", patient=f"p{i}", grade=g, predicted=1.1) for i, g in enumerate(grades)]
    write_table(folder / "grading/grades.csv", rows)
    how = Grading(widths=[4], blocks=[1], depth=4)
    net = build_grader(how, META["intensity"])
    checkpoint.save_tensors(folder / "grading/grader.safetensors", net.state_dict())
    content = {"grading": json.loads(how.model_dump_json()), "data": data.meta}
    checkpoint.write_json(folder / "grading/config.json", content)
    cd.loop.train(training_section(SMALL | {"samples": 4, "encode": False}, "train"), data, folder / "base",
                  state=folder / "state/base", seed=1, say=lambda *_, **__: None)  # fmt: skip
    return folder / "base"


def arms(folder, base, said, **how):
    return cd.arms({name: Conditional(samples=8, **one) for name, one in how.items()}, base, folder, folder / "told",
                   state=folder / "state", seed=1, say=lambda what, **_: said.append(what))  # fmt: skip


def test_samples_of_each_class_and_held_out_scans_are_read(tmp_path):
    base, said = profile(tmp_path), []
    found = arms(tmp_path, base, said, grades={})
    assert not said and cd.read_classes(tmp_path / "told/grades") == ("motion grade", [1.5, 2.5, 3.5, 4.5])
    model = cd.of_grades(tmp_path / "told")
    assert model.how.generator.classes == cd.CLASSES and model.config["seen"] == 8
    latent = load_model(base).generator.sample_latent(1, torch_rng(1, "sample", 0))
    styles = cd.styles_of(model, [3, 0], 1)
    assert torch.equal(styles[:1, :8], model.generator.to_styles(latent, model.how.generator.truncation))
    assert styles[:, 8:].tolist() == [[0, 0, 0, 1, 0], [1, 0, 0, 0, 0]]

    read = cd.read_all(found["grades"], 10, 1)
    assert list(read) == ["samples", "held-out scans"]  # the model draws the scans' own grid
    samples, scans = read.values()
    assert samples.asked == [0, 1, 2, 3, 4] * 2 and len(samples.of(2)) == 2 and samples.volumes[0].shape == (16, 24, 16)
    assert all(1 <= value <= 5 for value in samples.found) and len(set(samples.groups)) == 10
    assert (scans.asked, scans.found, scans.groups) == ([0, 1], [1.1, 1.1], ["p6", "p7"])

    drawn = augmentation.drawn(model, styles, 0, 1)
    assert drawn.shape == (2, 16, 24, 16) and np.abs(drawn[0] - drawn[1]).max() > 0


def test_a_grader_gets_as_many_samples_of_the_grades_as_mixed_bones(tmp_path, monkeypatch):
    train(tmp_path, samples=8)
    how = cd.conditional(load_model(tmp_path / "model").how, 8)
    told, data, asked = cd.build_generator(how.generator), graded(), []

    def drawn(model, codes, halvings, seed):
        asked.append((model, codes))
        return np.zeros((len(codes), 16, 24, 16), np.float16)

    monkeypatch.setattr(augmentation, "drawn", drawn)
    model = load_model(tmp_path / "model")
    model = model._replace(generator=told, config=model.config | {"train": json.loads(how.model_dump_json())})
    rows = [row | {"grade": "4"} for row in augmentation.graded(data.of("train"))]
    sets = augmentation.training_sets(None, torch.zeros(6, 2, 8), data, rows, AUGMENTED, seed=1, conditional=model)
    volumes, given = sets[augmentation.ASKED]
    assert len(volumes.volumes) == len(given) == len(sets[augmentation.MIXED][1]) == 6 + 2
    assert [row["given"] for row in given] == [4] * 8
    assert asked[-1][0] is model and asked[-1][1][:, 8:].tolist() == [[0, 0, 0, 1, 0]] * 2


AUGMENTED = augmentation.Augmentation(grading=dict(widths=[4], blocks=[1]), seeds=1, draws=20)


def test_what_cannot_be_told_on_these_scans_is_said(tmp_path):
    base, said = profile(tmp_path, "11111111"), []
    assert not arms(tmp_path, base, said, grades={})
    (tmp_path / "grading/grader.safetensors").unlink()
    assert not arms(tmp_path, base, said, grades={})
    assert said == [
        "no HA-GAN is told grades: a class has no training scan",
        "no HA-GAN is told grades: no grader was trained",
    ]
    coarse = graded()
    tall = Stacks(
        coarse.volumes.repeat(2, 1).repeat(2, 2).repeat(2, 3), coarse.rows, coarse.meta | {"stack_slices": 32}
    )
    np.save(tmp_path / "stacks/volumes.npy", tall.volumes)
    checkpoint.write_json(tmp_path / "stacks/stacks.json", tall.meta)
    assert not arms(tmp_path, base, said, area={"by": "Tt.Ar"})
    assert said[-1] == "no HA-GAN is told area: it would draw coarser voxels than the scans'"
    with pytest.raises(InputError, match="classes.json: not the classes of a conditional model"):
        cd.read_classes(tmp_path)


def test_a_reader_that_finds_what_was_asked_is_said_to():
    edges, groups = [1.5, 2.5, 3.5, 4.5], [f"p{i}" for i in range(20)]
    read = cd.Read([0, 1, 2, 3, 4] * 4, list(np.array([0, 1, 2, 3, 4] * 4) + 1.2), groups, [])
    found = cd.obeyed(read, edges, seed=1, draws=50)
    assert (found["N"], found["read"], found["right"], found["right or beside"]) == (20, 20, 1, 1)
    assert found["r"] == pytest.approx(1) and found["right low"] == 1
    worse = cd.obeyed(read._replace(found=[*(np.array(read.found[:-1]) + 1), np.nan]), edges, seed=1, draws=50)
    assert worse["read"] == 19 and worse["right"] == pytest.approx(3 / 20)  # of the highest class alone
    assert worse["right or beside"] == pytest.approx(19 / 20)  # a bone that cannot be read is not right
    assert cd.obeyed(read._replace(found=[np.nan] * 20), edges, seed=1, draws=50)["right"] == 0
