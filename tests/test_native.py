"""Whole scans at the scanner's own voxels: grids fit, what is drawn is compared with scans, a model is put together."""

import numpy as np
import pytest

from bonelib import InputError
from bonelib.core.config import read_params, section
from bonelib.studies import native
from bonelib.studies.hagan_config import Native


@pytest.fixture(scope="module")
def how():
    return section(Native, read_params()["profiles"]["tiny"]["native"], "native")


def test_coarse_scans_are_the_means_of_fine_ones(how):
    few = how.model_copy(update={"patients": 2})
    coarse = native.coarse_scans(few, 1)
    assert coarse.volumes.shape == (4, 4, 36, 28) and coarse.meta["spacing_mm"] == pytest.approx([0.9712] * 3)
    assert {row["patient"] for row in coarse.of("held-out")} == {f"phantom {native.FIRST + 1}"}
    fine = native.fine_scans(few, [native.FIRST], 1)
    assert fine.volumes.shape == (1, 32, 288, 224)
    nine = native.data_of(few, fine.volumes.repeat(9, 0), range(native.FIRST, native.FIRST + 9), 0.1).rows
    assert [row["volume"] for row in nine if row["split"] == "held-out"] == [7]
    means = fine.volumes[0].astype(np.float32).reshape(4, 8, 36, 8, 28, 8).mean((1, 3, 5))
    assert np.corrcoef(means.ravel(), coarse.volumes[0].astype(np.float32).ravel())[0, 1] > 0.95


@pytest.mark.parametrize("profile", ["tiny", "laptop", "paper"])
def test_what_is_trained_draws_the_whole_scan(profile):
    how = section(Native, read_params()["profiles"][profile]["native"], "native")
    stack = (how.preprocess.stack_slices, *how.preprocess.shape[1:])
    for train, times in ((how.train, how.halvings), (how.direct, 0)):
        assert tuple(n << train.generator.stages + times for n in train.generator.base) == stack


def test_bones_without_contours_are_counted_and_not_averaged():
    bone = dict.fromkeys((*native.TRAITS, native.CLOSED), 2.0)
    found = {native.REAL: [bone, {**bone, "Tb.N": 4.0}], native.DRAWN: [None, bone], native.BY_HAGAN: [None]}
    rows = native.table(found, seed=1, draws=20)
    of = {(row["trait"], row["group"]): row for row in rows}
    assert of[native.FOUND, native.DRAWN]["value"] == 0.5 and of["Tb.N", native.DRAWN]["N"] == 1
    assert of["Tb.N", native.REAL]["value"] == 3 and of["Tb.N", native.BY_HAGAN]["N"] == 0
    lines = {line["trait"]: line for line in native.readable(rows)}
    assert lines["Tb.N"][f"{native.BY_HAGAN}, N 1"] == "none" and lines["Tb.N"][f"{native.DRAWN}, N 2"] == "2"
    assert lines["Tb.N"][f"{native.REAL}, N 2"] == "3, SD 1.41"
    said = native.verdict(rows, {"seconds": 121.0, "MB": 100.0, "threads": 2}, {})
    assert "at most 120 were asked on two cores: not met" in said[0] and said[1].endswith("on two cores: met.")
    assert "Tb.N: -33% beside scans." in said


def test_a_model_whose_super_resolution_does_not_fit_is_refused_before_anything_is_trained(how, tmp_path):
    with pytest.raises(InputError, match="superres.safetensors: no such file; native.middle must name"):
        native.train_model(how, tmp_path, tmp_path / "model", state=tmp_path / "state", seed=1)
    for name in native.MIDDLE:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "config.json").write_text('{"data": {"spacing_mm": [0.1, 0.1, 0.1], "intensity": [-500, 1500]}}')
    with pytest.raises(InputError, match=r"config.json: spacing_mm is \[0.1, 0.1, 0.1\], but native needs \[0.24"):
        native.train_model(how, tmp_path, tmp_path / "model", state=tmp_path / "state", seed=1)
