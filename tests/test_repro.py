"""`make repro` runs what belongs to one model beside what belongs to another, and nothing before what it needs."""

import sys
from pathlib import Path

import pytest
import yaml

from bonelib import InputError, repro
from bonelib.progress import Progress

ROOT = Path(__file__).parents[1]


def test_stages_of_one_model_need_none_of_another():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    groups = repro.by_model(stages, ["a", "b"])
    assert groups[0][:2] == ["train@a", "select@a"] and [t.replace("@a", "@b") for t in groups[0]] == groups[1]
    assert repro.by_model({"one": {"cmd": "true"}, "two": {"matrix": {"size": [1]}}}, ["a"]) == [[]]


def test_what_they_share_comes_first(monkeypatch):
    monkeypatch.chdir(ROOT)
    models = yaml.safe_load((ROOT / "params.yaml").read_text())["models"]
    groups = repro.by_model(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"], models)
    shared = repro.before(sum(groups, []))
    assert {"preprocess", "superres"} <= set(shared) and not any("@" in name for name in shared)
    assert f"train@{models[0]}" in repro.before([f"inversion@{models[0]}"])


def test_groups_run_at_once_and_a_failure_is_told(monkeypatch, capsys):
    say = "import os, sys; print('share', os.environ['OMP_NUM_THREADS'], *sys.argv[1:]); sys.exit('bad' in sys.argv)"
    monkeypatch.setattr(repro, "REPRO", (sys.executable, "-c", say))
    monkeypatch.setattr(repro, "cores", lambda: 4)
    assert repro.side_by_side([["x"], ["y", "z"]], ["one", "two"]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "one: share 2 --single-item x",
        "two: share 2 --single-item y z",
    ]
    assert repro.side_by_side([["x"], ["bad"]], ["one", "two"]) == 1


def test_only_the_whole_pipeline_without_a_gpu_is_shared_out(monkeypatch):
    ran = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(repro, "before", lambda targets: ["first"])
    monkeypatch.setattr(repro, "side_by_side", lambda groups, names, progress: ran.append(names) or 0)
    monkeypatch.setattr(repro, "_dvc", lambda targets, progress: ran.append(targets) or 0)
    monkeypatch.setattr(repro, "_cores_alone", lambda: True)
    assert repro.repro(["a", "b"], []) == 0 and ran == [["first"], ["a", "b"], []]
    ran.clear()
    assert repro.repro(["a", "b"], ["paper"], share=True) == 0 and ran == [["first"], ["a", "b"], ["paper"]]
    ran.clear()
    assert repro.repro(["a", "b"], ["train@a"]) == repro.repro(["a"], []) == 0 and ran == [["train@a"], []]
    ran.clear()
    monkeypatch.setattr(repro, "_cores_alone", lambda: False)
    assert repro.repro(["a", "b"], []) == 0 and ran == [[]]


def test_dvc_does_without_git_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc").mkdir()
    repro.without_git()
    assert "no_scm = true" in (tmp_path / ".dvc/config.local").read_text()
    repro.without_git()  # a second time changes nothing
    (tmp_path / ".dvc/config.local").unlink()
    (tmp_path / ".git").mkdir()
    repro.without_git()
    assert not (tmp_path / ".dvc/config.local").exists()


def test_a_line_says_what_is_left():
    progress = Progress(["a", "b@x", "b@y", "c"], {"a": 30, "c": 150}, abreast=2)
    assert progress.heard("Stage 'a' didn't change, skipping\n") is None
    assert progress.heard("Running stage 'b@x':\n", "x") == "b@x: 3 stages left, about 8 min"
    assert progress.heard("b@x: took 60 s\n", "x") is None
    assert progress.heard("Running stage 'b@y':\n", "y") == "b@y: 3 stages left, about 4 min"
    assert progress.heard("Running stage 'c':\n", "x") == "c: 2 stages left, about 5 min"
    assert progress.heard("anything else\n") is None
    assert Progress(["a"], {}).remaining() == "1 stage left"


def test_another_profile_is_written_to_the_file_and_an_unknown_one_is_refused(tmp_path, capsys):
    params = tmp_path / "params.yaml"
    params.write_text("seed: 1\nprofile: published   # of two\nprofiles: {published: {}, laptop: {}}\n")
    repro.choose_profile("laptop", params)
    assert "profile: laptop   # of two" in params.read_text() and "laptop" in capsys.readouterr().out
    with pytest.raises(InputError, match="no profile 'desk'; accepted are published, laptop"):
        repro.choose_profile("desk", params)


def test_published_weights_refuse_scans_of_ones_own(tmp_path):
    values = {"models": ["a"], "profile": "p", "cohort": {"source": str(tmp_path)}}
    own = {"p": {"train": {"a": {"rate": 1}}}}
    repro.check_weights(values | {"profiles": own})
    with pytest.raises(InputError, match="make repro PROFILE=laptop"):
        repro.check_weights(values | {"profiles": {"p": {"train": {"a": {"published": "0.dir"}}}}})
