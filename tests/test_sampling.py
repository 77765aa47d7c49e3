"""The command line of sampling: a mistake is one sentence and exit code 2, and nothing is written."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from bonelib import InputError
from bonelib.latent import models, sampling

WIDTH = 4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of codes, right and wrong, and a model that draws nothing."""
    for name in ("config.json", "generator.safetensors", "critic.safetensors"):
        (tmp_path / name).write_text('{"train": ', encoding="utf-8")
    (tmp_path / "file").touch()
    codes = {
        "good": torch.zeros(2, WIDTH, dtype=torch.float64),
        "wide": torch.zeros(1, WIDTH + 1),
        "nan": torch.full((1, WIDTH), float("nan")),
        "none": torch.zeros(0, WIDTH),
    }
    for name, values in codes.items():
        save_file({"codes": values}, tmp_path / f"{name}.safetensors")
    generator = SimpleNamespace(sample_latent=lambda n, rng: torch.zeros(n, WIDTH), to_styles=lambda z, t: z)
    monkeypatch.setattr(sampling, "load_model", lambda folder: SimpleNamespace(generator=generator))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-n", "0"], "-n is 0; accepted are whole numbers from 1"),
        (["--truncation", "nan"], "--truncation is nan; accepted are numbers"),
        (["--to", "{}/file"], "is a file, or lies below one"),
        (["--to", "{}/file/below"], "is a file, or lies below one"),
        (["--codes", "{}/wide.safetensors"], "the codes are 1 x 5 numbers; this model accepts n x 4"),
        (["--codes", "{}/nan.safetensors"], "some codes are NaN or infinite"),
        (["--codes", "{}/none.safetensors"], "the codes are 0 x 4 numbers"),
        (["--codes", "{}/no.safetensors"], "no codes"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(folder, monkeypatch, capsys, arguments, says):
    given = [a.format(folder) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["sampling", "model", "--to", str(folder / "out"), *given])
    assert sampling.main() == 2
    told = capsys.readouterr().err.strip()
    assert says in told and "\n" not in told and not (folder / "out").exists()


def test_codes_of_another_type_are_read(folder):
    codes = sampling.read_codes(folder / "good.safetensors", (WIDTH,))
    assert codes.dtype == torch.float32 and codes.shape == (2, WIDTH)


def test_a_torn_config_is_named(folder):
    with pytest.raises(InputError, match="config.json: not readable as JSON"):
        models.load_model(folder)
    (folder / "config.json").write_text(json.dumps({"train": {}}), encoding="utf-8")
    with pytest.raises(InputError, match="config.json: data is missing; needed are train, data"):
        models.load_model(folder)
