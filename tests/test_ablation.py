"""Trials of variants are equal in CPU time, tell what a sample is worth, and are not run twice."""

import numpy as np
import pytest

from bonelib import InputError
from bonelib.core.config import section
from bonelib.scans.dataset import Stacks
from bonelib.studies import ablation as ablation
from bonelib.studies.config import Trials, changed

BASE = dict(
    generator=dict(kind="progan", widths=[4, 4], latent=8, base_convs=1),
    critic=dict(widths=[4, 4]),
    schedule=dict(samples=[8, 56], fade=[0, 0], batch=[4, 4]),
    haar=True,
    augment=None,
    n_critic=1,
    rate=4e-3,
)


def rings(n, broken=()):
    """Volumes (n, 4, 36, 28) of a bright ring a slice, of random size; those in `broken` have a gap."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:36, :28]
    volumes = 0.1 + 0.02 * rng.standard_normal((n, 4, 36, 28)).astype(np.float32)
    for i, volume in enumerate(volumes):
        distance = np.hypot(y - 18, x - 14)
        ring = abs(distance - rng.uniform(7, 11)) < 1.2
        if i in broken:
            ring &= ~((y < 18) & (abs(x - 14) < 3))
        volume[:, ring] = 0.5
    return volumes


def test_changes_reach_into_sections_and_empty_ones_replace_them():
    assert changed({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}}) == {"a": {"b": 5, "c": 2}, "d": 3}
    assert changed({"a": {"b": 1}}, {"a": {}}) == {"a": {}} and changed({"a": {"b": 1}}, {"a": None}) == {"a": None}
    with pytest.raises(InputError, match="ablation.*widhts"):
        section(Trials, dict(base=BASE, variants={"typo": {"critic": {"widhts": [1, 2]}}}, seconds=1), "ablation")


def test_a_gap_opens_a_ring():
    level = ablation.ring_level(rings(16))
    assert 0.2 < level < 0.5
    found = ablation.closed_rings(rings(8, broken=(2, 5)), level)
    assert found[[0, 1, 3, 4, 6, 7]].min() == 1 and found[[2, 5]].max() == 0


def test_worse_samples_measure_worse():
    real, patients = rings(64), [f"p{i // 4}" for i in range(64)]
    level = ablation.ring_level(real)
    same, broken = (ablation.against(real, rings(64, broken), patients, level, 1, 10) for broken in ((), range(64)))
    assert same["closed rings"] == 1 and broken["closed rings"] == 0
    assert broken["Frechet distance"] > 1 > 1e-3 > same["Frechet distance"]
    assert broken["residual"] > 1.1 * same["residual"] and same["residual"] == pytest.approx(same["residual, real"])
    flat = ablation.against(real, np.repeat(real[:1], 32, 0), patients, level, 1, 10)
    assert flat["relative SD"] < 0.05 < same["relative SD"] and flat["recall"] < same["recall"]


def test_trials_are_run_once(tmp_path, monkeypatch):
    rows = [dict(patient=f"p{i // 4}", split="held-out" if i > 55 else "train", volume=i, start=0) for i in range(64)]
    meta = dict(stack_slices=4, data_hash="0", shape=[4, 36, 28], spacing_mm=[1.0] * 3, intensity=[0, 1], unit="mgHA")
    data = Stacks(rings(64).astype(np.float16), rows, meta)
    variants = {"as it is": {}, "head": {"critic": {"head": [4]}}}
    how = section(Trials, dict(base=BASE, variants=variants, seeds=1, seconds=0.1, samples=8, draws=4), "ablation")
    monkeypatch.setattr(ablation, "workers", InThisProcess)
    rows, drawn = ablation.run(how, data, tmp_path, seed=1, say=lambda *_, **__: None)
    assert [(r["variant"], r["seed"]) for r in rows] == [("real", 1)] + [(v, 1) for v in variants]
    assert all(r["samples"] >= 4 and r["CPU s"] > 0 and 0 <= r["closed rings"] <= 1 for r in rows[1:])
    assert {name: v.shape for name, v in drawn.items()} == dict.fromkeys(variants, (8, 4, 36, 28))
    monkeypatch.setattr(ablation, "train", None)
    again, _ = ablation.run(how, data, tmp_path, seed=1, say=lambda *_, **__: None)
    assert again == rows
    means = ablation.over_seeds(rows + [row | {"seed": 2} for row in rows[1:]])
    assert [m["variant"] for m in means[:-1]] == ["real", *variants] and means[1]["seeds"] == 2
    closed = [r["closed rings"] for r in rows if r["variant"] == "head"]
    assert means[2]["closed rings"] == pytest.approx(np.mean(closed))


class InThisProcess:
    """A pool that runs what it is given at once."""

    def __init__(self, also=()):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, call, *given):
        value = call(*given)
        return type("Done", (), {"result": lambda self: value})()
