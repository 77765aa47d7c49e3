"""params.yaml: every mistake is one sentence that names the key and what is accepted."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bonelib import InputError
from bonelib.core.config import fingerprint, section
from bonelib.params import check_file
from bonelib.training.config import Train

ROOT = Path(__file__).parents[1]


def changed(tmp_path, **edit):
    """params.yaml with {"a.b.c": value} set, or taken out where the value is None."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    for path, value in edit.items():
        *parents, last = path.split("__")
        part = values
        for key in parents:
            part = part[key]
        part[last] = value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return tmp_path / "params.yaml"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (dict(profile="laptpo"), "profile 'laptpo' does not exist; accepted are tiny, laptop, paper"),
        (dict(sead=1), "unknown key sead; did you mean 'seed'"),
        (dict(profiles__tiny__trian={}), "unknown key profiles.tiny.trian; did you mean 'train'"),
        (dict(profiles__tiny__train__progan__rat=1), "unknown key profiles.tiny.train.progan.rat; did you mean 'rate'"),
        (
            dict(profiles__tiny__train__progan__generator__nosie=True),
            "unknown key profiles.tiny.train.progan.generator.nosie; did you mean 'noise'",
        ),
        (dict(profiles__tiny__train__progan__n_critic="five"), "profiles.tiny.train.progan.n_critic: .* 'five'"),
        (dict(profiles__tiny__train__progan__n_critic=0), "n_critic: .* greater than or equal to 1"),
        (dict(profiles__tiny__train__progan__schedule__fade=[0]), "schedule: .* one entry a stage"),
        (dict(profiles__tiny__preprocess__stack_slices=9), "preprocess: .*must be 9 x 7 times a power of two"),
        (dict(profiles__tiny__preprocess__intensity=[5, 1]), "must rise"),
        (dict(cohort__source="/nowhere/scans"), "cohort.source: /nowhere/scans does not exist"),
        (dict(cohort__unit="HU"), "cohort.unit: "),
        (dict(profiles__tiny__train__progan__haar=False), "2 stages need 3 widths"),
        (dict(profiles__tiny__voxel_mm=60.7), "profiles.tiny.voxel_mm: "),
    ],
)
def test_a_mistake_is_named(tmp_path, monkeypatch, edit, says):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=says) as error:
        check_file(changed(tmp_path, **edit))
    assert "\n" not in str(error.value)


def test_the_file_in_the_repository_is_right(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert check_file()["profile"] in ("published", "extended", "tiny", "laptop", "paper")


def test_the_command_ends_with_2_and_no_traceback(tmp_path):
    changed(tmp_path, profile="huge")
    done = subprocess.run([sys.executable, "-m", "bonelib.repro"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'huge' does not exist" in done.stderr


def test_the_file_is_checked_before_anything_slow_is_imported():
    slow = "{'torch', 'dvc', 'matplotlib', 'pandas', 'sklearn'}"
    command = f"import sys, bonelib.repro; sys.exit(' '.join({slow} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True).stderr.strip() == ""
    )


def test_sections_are_frozen_and_their_fingerprint_follows_the_values(monkeypatch):
    monkeypatch.chdir(ROOT)
    values = check_file()["profiles"]["tiny"]["train"]["progan"]
    first, second = section(Train, values, "t"), section(Train, {**values, "rate": 1e-3}, "t")
    with pytest.raises(ValueError, match="frozen"):
        first.rate = 1.0
    assert fingerprint(first) == fingerprint(section(Train, values, "t")) != fingerprint(second)
