"""The command `bonelib`, as a user types it."""

import subprocess
import sys

import pytest

from bonelib import cli
from bonelib.scans.tables import read_table
from bonelib.scans.volumes import write_volume


def bonelib(*words, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "bonelib.cli", *map(str, words)], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize("command", ["sample", "measure", "import", "train"])
def test_help_shows_examples_of_the_command(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bonelib", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert f"bonelib {command} " in capsys.readouterr().out.partition("examples")[2]


def test_an_unknown_command_is_refused_with_the_known_ones():
    done = bonelib("draw")
    assert done.returncode == 2 and "sample" in done.stderr and "Traceback" not in done.stderr


def test_measure_says_what_is_wrong_with_a_file_and_measures_the_others(tmp_path):
    from bonelib.scans.phantom import make_radius

    volume, truth = make_radius(3, voxel_mm=0.2428)
    write_volume(volume, tmp_path / "a.nii.gz")
    (tmp_path / "b.nii.gz").write_bytes(b"no scan")
    done = bonelib(
        "measure", tmp_path / "b.nii.gz", tmp_path / "a.nii.gz", "--unit", "mgHA", "--to", tmp_path / "table.tsv"
    )
    assert done.returncode == 2 and "b.nii.gz" in done.stderr and "Traceback" not in done.stderr
    (row,) = read_table(tmp_path / "table.tsv")
    assert row["file"] == "a.nii.gz" and float(row["Tb.BMD"]) == pytest.approx(truth["Tb.BMD"], rel=0.2)


def test_import_without_a_target_is_one_sentence(tmp_path):
    done = bonelib("import", tmp_path)
    assert done.returncode == 2 and "--to" in done.stderr and "Traceback" not in done.stderr
