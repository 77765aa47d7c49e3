"""`make repro` runs what belongs to one model beside what belongs to another, and nothing before what it needs."""

import subprocess
import sys
from pathlib import Path

import yaml

from bonelib import repro

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
    monkeypatch.setattr(repro, "side_by_side", lambda groups, names: ran.append(names) or 0)
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command[3:]) or done)
    monkeypatch.setattr(repro, "_cores_alone", lambda: True)
    assert repro.repro(["a", "b"], []) == 0 and ran == [["first"], ["a", "b"], []]
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
