"""`make repro` runs what is stale, side by side where nothing waits, and nothing before what it needs."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bonelib import InputError, repro

ROOT = Path(__file__).parents[1]


DVC = """
stages:
  first: {cmd: touch first, outs: [first]}
  model:
    matrix: {model: [a, b]}
    cmd: touch ${item.model}
    deps: [first]
    outs: ["${item.model}"]
  last: {cmd: touch last, deps: [a, b], outs: [last]}
  other: {cmd: touch other, outs: [other]}
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """A small repository of DVC, in which the tests run."""
    monkeypatch.chdir(tmp_path)
    for command in ("git", "init", "-q"), ("dvc", "init", "-q"):
        subprocess.run(command, check=True)
    Path("dvc.yaml").write_text(DVC)


def test_a_plan_is_what_is_stale_of_what_is_needed(stages):
    assert repro.plan(["last"]) == {
        "first": set(),
        "model@a": {"first"},
        "model@b": {"first"},
        "last": {"first", "model@a", "model@b"},
    }
    assert repro.plan([]).keys() == repro.plan(["last"]).keys() | {"other"}
    assert repro.plan(["model"]).keys() == {"first", "model@a", "model@b"}
    with pytest.raises(InputError, match="no stage 'lost'; accepted are first, last, model, model@a"):
        repro.plan(["last", "lost"])
    assert repro.repro(repro.plan(["model@a"]), 2, {}) == 0
    assert repro.plan(["last"]) == {"model@b": set(), "last": {"model@b"}}
    assert repro.plan(["model@a"]) == {}


def test_the_longest_way_to_the_end_begins_first():
    needs = {"end": {"a", "b"}, "a": set(), "b": set(), "alone": set()}
    assert repro.order(needs, {"a": 1, "b": 2, "end": 5, "alone": 4}) == ["b", "a", "end", "alone"]
    assert repro.order(needs, {"a": 2, "b": 1, "end": 5, "alone": 8}) == ["alone", "a", "b", "end"]
    assert repro.order({}, {}) == []


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """ran(needs, lanes): the status, and [(begin, end, stage, threads)] of processes in place of DVC's."""
    say = (
        "import os, sys, time; name = sys.argv[-1]; began = time.time(); time.sleep(0.3);"
        "print(began, time.time(), name, os.environ['OMP_NUM_THREADS'], sep='|'); sys.exit('bad' in name)"
    )
    monkeypatch.setattr(repro, "REPRO", (sys.executable, "-c", say))
    monkeypatch.setattr(repro, "cores", lambda: 4)

    def run(needs, lanes, capsys):
        status = repro.repro(needs, lanes, {})
        lines = [line.split(": ")[1].split("|") for line in capsys.readouterr().out.splitlines()]
        return status, {name: (float(began), float(ended), int(share)) for began, ended, name, share in lines}

    return run


def test_stages_run_side_by_side_when_what_they_need_is_there(ran, capsys):
    status, times = ran({"a": set(), "b": {"a"}, "c": {"a"}, "d": {"a"}, "e": {"b", "c", "d"}}, 2, capsys)
    assert status == 0 and len(times) == 5
    assert all(times["a"][1] < times[name][0] and times[name][1] < times["e"][0] for name in "bcd")
    # The first and the last are alone and have all cores; of the three between, two run at a time
    assert [times[name][2] for name in "abce"] == [4, 2, 2, 4]
    begun = sorted(times[name][0] for name in "bcd")
    ended = sorted(times[name][1] for name in "bcd")
    assert begun[1] < ended[0] < begun[2]


def test_a_failure_is_told_and_begins_nothing_more(ran, capsys):
    status, times = ran({"bad": set(), "good": set(), "next": {"good"}, "after": {"bad"}}, 2, capsys)
    assert status == 1 and not {"after"} & times.keys()


def test_stages_that_measure_times_run_alone(ran, capsys):
    assert {
        stage.partition("@")[0] for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    } > repro.ALONE
    status, times = ran({"cost": set(), "a": set(), "b": set(), "hagan": set()}, 3, capsys)
    assert status == 0
    for name in ("cost", "hagan"):
        began, ended, share = times.pop(name)
        assert share == 4 and not any(a < ended and began < b for a, b, _ in times.values())


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
    assert repro.remaining(["b@x", "b@y", "c"], {"a": 30, "c": 150}, 2) == "3 stages left, about 4 min"
    assert repro.remaining(["c"], {"a": 30, "c": 150}, 2) == "1 stage left, about 2 min"
    assert repro.remaining(["a"], {"a": 30}, 1) == "1 stage left, about 30 s"
    assert repro.remaining(["a"], {}, 1) == "1 stage left"


def test_what_is_left_is_said_where_a_stage_begins(monkeypatch, capsys):
    say = "import sys; print(f\"Running stage '{sys.argv[-1]}':\\n{sys.argv[-1]}: took 60 s\")"
    monkeypatch.setattr(repro, "REPRO", (sys.executable, "-c", say))
    seconds = {"a": 30, "b": 150}
    assert repro.repro({"a": set(), "b": {"a"}}, 1, seconds) == 0 and seconds == {"a": 60, "b": 60}
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["a: Running stage 'a':", "a: 2 stages left, about 3 min", "a: a: took 60 s"]
    assert lines[3:] == ["b: Running stage 'b':", "b: 1 stage left, about 2 min", "b: b: took 60 s"]


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
