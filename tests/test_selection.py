"""The snapshot that is kept is the one whose samples are nearest to bones that no training saw."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bonelib import InputError
from bonelib.core.config import section
from bonelib.networks.registry import build_critic, build_generator
from bonelib.scans.dataset import Stacks, set_apart
from bonelib.studies import selection
from bonelib.training import checkpoint, loop
from bonelib.training.config import Train

HOW = dict(
    generator=dict(kind="progan", widths=[4, 4], latent=8, noise=0.5),
    critic=dict(widths=[4, 4]),
    schedule=dict(samples=[8, 8], fade=[0, 0], batch=[4, 4]),
    haar=True,
    n_critic=1,
    rate=4e-3,
    snapshots=dict(number=3, validation=0.5, samples=24, draws=10),
)


@pytest.fixture
def place(tmp_path):
    """A model folder with three candidates, of which the second draws what the patients look like, and the stacks."""
    how = section(Train, HOW, "train")
    generators = {}
    for seen, brightness in ((10, -4.0), (20, 0.0), (30, 3.0)):
        torch.manual_seed(1)
        generators[seen] = build_generator(how.generator, haar=True)
        with torch.no_grad():
            for name, value in generators[seen].named_parameters():
                if "to_image" in name and "bias" in name:
                    value[0] += brightness
    real = [generators[20].sample_latent(24, torch.Generator().manual_seed(7))]
    with torch.no_grad():
        real = generators[20].synthesize(generators[20].to_styles(real[0]), noise=torch.Generator().manual_seed(8))
    fine = real[:, 0].repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3).half().numpy()
    split = ["train"] * 16 + ["held-out"] * 8
    rows = [dict(scan=f"s{i}", patient=f"p{i}", split=split[i], volume=i, start=0) for i in range(24)]
    data = Stacks(fine, rows, dict(stack_slices=8, data_hash="0", shape=[8, 72, 56], spacing_mm=[1, 1, 1]))
    for seen, generator in generators.items():
        checkpoint.save_tensors(tmp_path / f"snapshots/{seen:010d}.safetensors", generator.state_dict())
    at = loop.Progress(30, seen=30, curves=[[30]])
    parts = dict(average=generators[30], critic=build_critic(how.critic, haar=True), at=at, growth={})
    candidates = sorted((tmp_path / "snapshots").iterdir())
    folder = tmp_path / "model"
    loop.write_model(folder, how, data.meta, **parts, candidates=candidates, run="0", superres=None)
    return folder, data, generators


def test_the_nearest_candidate_is_kept(place):
    folder, data, generators = place
    table = selection.choose(folder, data, seed=1)
    assert [row["seen"] for row in table if row["chosen"]] == [20]
    best, worst = (next(row for row in table if row["seen"] == seen) for seen in (20, 10))
    assert best[selection.NAME] < 0.2 * worst[selection.NAME] and best["low"] <= best[selection.NAME] <= best["high"]
    assert (best["patients"], best["N real"], best["N samples"]) == (8, 8, 24)
    config, kept = json.loads((folder / "config.json").read_text()), load_file(folder / "generator.safetensors")
    assert config["seen"] == 20 and config["sha256"]["generator"] == checkpoint.digest(folder / "generator.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in generators[20].state_dict().items())
    assert selection.measured(folder) == table and not selection.measured(folder / "candidates")
    with pytest.raises(InputError, match="candidates: no candidates"):
        selection.choose(folder, data, seed=1)


def test_neither_held_out_patients_nor_a_metric_without_an_interval_decide(place):
    folder, data, _ = place
    unlike = data.volumes.copy()
    unlike[[row["volume"] for row in data.of("held-out")]] = np.float16(1.0)
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"validation": 0.5', '"validation": 0.1')
    )
    table = selection.choose(folder, Stacks(unlike, data.rows, data.meta), seed=1)
    assert [row["seen"] for row in table if row["chosen"]] == [20]
    assert selection.measured(folder)[0]["low"] is None
    assert table[0]["patients"] == 2 == len(set_apart(data, 0.1).of("validation")) and table[0]["low"] is None
