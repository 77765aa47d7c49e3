"""HA-GAN's training: each loss moves its own networks, resumes bit for bit, and leaves a model that notebooks take."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bonelib import InputError
from bonelib.latent import inversion
from bonelib.latent.config import EncoderTraining
from bonelib.latent.encoder_training import train_encoder
from bonelib.latent.models import draw, growth_strip, load_model
from bonelib.params import check_file
from bonelib.scans.dataset import Stacks
from bonelib.scans.tables import read_table
from bonelib.training import hagan, loop, run
from bonelib.training.config import HierarchicalTrain, training_section

SMALL = dict(
    generator=dict(
        kind="hagan", base=[2, 3, 2], stages=3, widths=[16, 16], fine=[16], low=[16], encoder=[16], latent=8, division=2
    ),
    critic=dict(high=[4, 4, 4], head=[4, 4], low=[4]),
    samples=24,
    batch=4,
    ema=2,
)
quiet = dict(say=lambda *_, **__: None)


def stacks(shape=(16, 24, 16)):
    rng, split = np.random.default_rng(0), ["train"] * 6 + ["held-out"] * 2
    rows = [dict(scan=f"s{i}", patient=f"p{i}", split=split[i], volume=i, start=0) for i in range(8)]
    meta = dict(stack_slices=shape[0], data_hash="0", spacing_mm=[0.1] * 3, shape=list(shape))
    return Stacks(rng.random((8, *shape)).astype(np.float16), rows, meta)


def train(folder, **edit):
    how = training_section({**SMALL, **edit}, "train")
    return loop.train(how, stacks(), folder / "model", state=folder / "state", seed=3, **quiet)


def test_the_defaults_are_the_published_settings():
    how = HierarchicalTrain(generator=dict(kind="hagan"))
    assert how.samples // how.batch == 80_000 and how.betas == (0, 0.999) and how.lambdas == (5, 5)
    assert (how.rate, how.encoder_rate, how.critic_rate) == (1e-4, 1e-4, 4e-4) and how.generator.latent == 1024


def test_every_update_moves_its_own_networks_alone(tmp_path, monkeypatch):
    built, update, moved, build = [], run.update, [], hagan.build

    def kept(*args):
        built.append(build(*args))
        return built[0]

    def seen(adam, *args):
        names = ("generator", "critic", "encoder")
        now = {f"{n}.{k}": p for n in names for k, p in built[0][n].named_parameters()}
        before = {name: p.detach().clone() for name, p in now.items()}
        done = update(adam, *args)
        moved.append({name for name, p in now.items() if not torch.equal(p, before[name])})
        return done

    monkeypatch.setattr(hagan, "build", kept)
    monkeypatch.setattr(run, "update", seen)
    train(tmp_path, samples=4)
    critic, generator, high, ground = moved
    assert all(name.startswith("critic.") for name in critic) and any("low" in name for name in critic)
    assert all(name.startswith("generator.") for name in generator) and any("low" in name for name in generator)
    assert all(name.startswith("encoder.high.") for name in high) and high
    assert all(name.startswith(("encoder.ground", "encoder.code")) for name in ground) and ground


def test_reconstruction_gets_better_with_the_encoder(tmp_path):
    train(tmp_path, samples=80, encoder_rate=3e-3)
    curves = read_table(tmp_path / "model/curves.csv")
    first, last = (float(curves[i]["by_features"]) for i in (0, -1))
    assert last < first


def test_r_depends_on_seed_and_update_alone_and_takes_every_start(tmp_path):
    how, data = training_section(SMALL, "train"), stacks()
    objects = hagan.build(how, 3, torch.device("cpu"))
    found = []
    for rank in range(2):
        ranks = run.Ranks(rank, 2, torch.device("cpu"))
        trained = hagan.Trained(how, data, objects, 3, ranks)
        parts = [hagan._real(trained, run.Progress(100, seen=4 * i, steps=i)) for i in range(30)]
        found.append([part.r for part in parts])
        assert all(torch.equal(part.high, part.whole[:, :, 4 * part.r : 4 * part.r + 8]) for part in parts)
        assert parts[0].low.shape == (2, 1, 4, 6, 4)
    assert found[0] == found[1] and set(found[0]) == {0, 1, 2}
    fixed = hagan.Trained(how.model_copy(update=dict(random=False)), data, objects, 3, ranks)
    assert {hagan._real(fixed, run.Progress(100, steps=i)).r for i in range(20)} == {0, 2}


def test_a_killed_training_goes_on_bit_for_bit(tmp_path, killed_at):
    last = train(tmp_path / "whole")
    killed_at(3)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed")
    assert train(tmp_path / "killed") == last
    for name in ("generator", "critic", "encoder", "growth"):
        one, two = (load_file(tmp_path / f"{run}/model/{name}.safetensors") for run in ("whole", "killed"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("edit", [dict(low=False), dict(encode=False), dict(random=False)])
def test_the_ablations_train_without_what_they_leave_out(tmp_path, edit):
    train(tmp_path, samples=8, **edit)
    content = json.loads((tmp_path / "model/config.json").read_text())
    assert ("encoder" in content["sha256"]) == edit.get("encode", True)
    fresh = hagan.build(training_section({**SMALL, **edit}, "train"), 3, torch.device("cpu"))["generator"]
    trained = load_file(tmp_path / "model/generator.safetensors")
    same = {key for key, value in fresh.state_dict().items() if torch.equal(trained[key], value)}
    assert any(key.startswith("low") for key in same) != edit.get("low", True)


def test_snapshots_are_left_to_choose_from(tmp_path):
    train(tmp_path, snapshots=dict(number=3, samples=4))
    kept = sorted((tmp_path / "model/candidates").iterdir())
    assert [int(path.stem) for path in kept] == [12, 20, 24]  # from the middle to the end
    last, final = load_file(kept[-1]), load_file(tmp_path / "model/generator.safetensors")
    assert all(torch.equal(last[key], final[key]) for key in final)
    train(tmp_path, samples=8)
    assert not (tmp_path / "model/candidates").exists()


CONDITIONAL = {**SMALL, "generator": {**SMALL["generator"], "classes": 3}}


def classed(where=lambda i: i % 3):
    data = stacks()
    return Stacks(data.volumes, [row | {"class": where(i)} for i, row in enumerate(data.rows)], data.meta)


def test_a_conditional_latent_ends_in_its_class_which_truncation_leaves():
    generator = hagan.build(training_section(CONDITIONAL, "train"), 3, torch.device("cpu"))["generator"]
    latent = generator.sample_latent(300, torch.Generator().manual_seed(1))
    classes = latent[:, 8:]
    assert latent.shape == (300, 11) and torch.equal(classes.sum(1), torch.ones(300)) and classes.sum(0).min() > 70
    cut = generator.to_styles(latent, 0.5)
    assert torch.equal(cut[:, 8:], classes) and cut[:, :8].abs().max() <= 0.5 and generator.synthesize(cut[:2]).numel()
    other = generator.of_class(latent, torch.full((300,), 2))
    assert torch.equal(other[:, :8], latent[:, :8]) and torch.equal(other[:, 10], torch.ones(300))
    with torch.no_grad():
        assert not torch.equal(generator.synthesize(latent[:1]), generator.synthesize(other[:1] + latent[:1]))


def test_a_conditional_critic_learns_the_classes_and_the_generator_obeys_it(tmp_path):
    """Class k is a volume whose brightness is k: both discriminators learn it, and so does what is drawn."""
    data = classed()
    bright = np.stack(
        [np.full(v.shape, 0.2 + 0.3 * row["class"]) + 0.02 * v for v, row in zip(data.volumes, data.rows, strict=True)]
    )
    data = Stacks(bright.astype(np.float16), data.rows, data.meta)
    edit = dict(samples=1200, rate=3e-3, critic_rate=3e-3, class_weight=3.0, ema=20, encode=False)
    how = training_section({**CONDITIONAL, **edit}, "train")
    loop.train(how, data, tmp_path / "model", state=tmp_path / "state", seed=3, **quiet)
    model = load_model(tmp_path / "model")
    x = data.pooled(data.rows, 0).float()
    wanted = torch.tensor([row["class"] for row in data.rows])
    with torch.no_grad():
        for judged in (model.critic.judge_high(x[:, :, :8], 0)[1], model.critic.judge_low(hagan._coarse(x, 4))[1]):
            assert (judged.argmax(1) == wanted).float().mean() > 0.8
        latent = model.generator.sample_latent(12, torch.Generator().manual_seed(1))
        drawn = [model.generator.synthesize(model.generator.of_class(latent, torch.full((12,), k))) for k in range(3)]
    means = [float(v.mean()) for v in drawn]
    assert means[0] + 0.1 < means[1] < means[2] - 0.1, means


def test_stacks_without_the_classes_of_the_generator_are_refused(tmp_path):
    how = training_section(CONDITIONAL, "train")
    for data, found in ((stacks(), "None"), (classed(lambda i: i), "3")):
        with pytest.raises(InputError, match=f"found class {found}; accepted are 0 to 2"):
            loop.train(how, data, tmp_path, state=tmp_path / "state", seed=3, **quiet)


def test_the_encoder_of_a_conditional_generator_is_trained_with_true_classes(tmp_path):
    how = training_section({**CONDITIONAL, "samples": 8}, "train")
    last = loop.train(how, classed(), tmp_path / "model", state=tmp_path / "state", seed=3, **quiet)
    assert last["seen"] == 8 and 0 < last["by_code"] < 1
    inverter, _ = train_encoder(
        EncoderTraining(prior="normal", samples=8, batch=4), load_model(tmp_path / "model"), classed(),
        tmp_path / "codes", state=tmp_path / "e", seed=1, **quiet,
    )  # fmt: skip
    assert inversion.encode(inverter.encoder, torch.rand(2, 1, 16, 24, 16)).shape == (2, 11)


def test_the_model_is_drawn_grown_and_inverted_as_any_other(tmp_path):
    train(tmp_path, samples=8)
    model = load_model(tmp_path / "model")
    volumes = draw(model, 2, seed=1)
    assert volumes.shape == (2, 16, 24, 16) and 0 < volumes.min() < volumes.max() < 1
    assert np.array_equal(draw(model, 1, seed=1)[0], volumes[0])
    assert [v.shape[1:] for _, v in growth_strip(tmp_path / "model", 1)] == [(4, 6, 4), (8, 12, 8)]
    how = EncoderTraining(prior="normal", samples=8, batch=4)
    inverter, curves = train_encoder(how, model, stacks(), tmp_path / "codes", state=tmp_path / "e", seed=1, **quiet)
    codes = inversion.encode(inverter.encoder, torch.from_numpy(volumes)[:, None])
    assert codes.shape == (2, 8) and curves


def test_the_tiny_arm_trains_at_its_own_grid(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    how = training_section(check_file()["profiles"]["tiny"]["train"]["hagan"], "train")
    last = loop.train(how, stacks((16, 144, 112)), tmp_path / "model", state=tmp_path / "state", seed=3, **quiet)
    assert last["seen"] == how.samples and all(np.isfinite(value) for value in last.values())


def test_the_arm_of_a_laptop_is_small_and_its_sub_volume_two_cells_deep(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    how = training_section(check_file()["profiles"]["laptop"]["train"]["hagan"], "train")
    with torch.device("meta"):
        objects = hagan.build(how, 1, torch.device("meta"))
    networks = [part for part in objects.values() if isinstance(part, torch.nn.Module)]
    size = sum(p.numel() for part in networks for p in part.parameters())
    assert size <= 4_000_000 and objects["generator"].grid.depth >= 2


def test_stacks_of_another_grid_are_refused(tmp_path):
    how = training_section(SMALL, "train")
    for shape, says in (
        ((16, 24, 20), r"draws \(16, 24, 16\) voxels, but the stacks have \(16, 24, 20\)"),
        ((8, 24, 16), "draws 16 slices; the stacks have 8"),
    ):
        with pytest.raises(InputError, match=says):
            loop.train(how, stacks(shape), tmp_path, state=tmp_path / "state", seed=3, **quiet)


def test_a_kind_that_does_not_exist_is_named():
    with pytest.raises(InputError, match="generator.kind is 'hgan'; accepted are progan, stylegan, hagan"):
        training_section(dict(generator=dict(kind="hgan")), "train")
    with pytest.raises(InputError, match="unknown key train.lambda; did you mean 'lambdas'"):
        training_section({**SMALL, "lambda": 5}, "train")
