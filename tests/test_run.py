"""The one loop under every training: it goes on bit for bit, goes back when it diverges, and stops when it is told."""

import os
import signal

import numpy as np
import pytest
import test_grading
import test_inversion
import test_superres
import torch
from test_training import RELATIVISTIC, SMALL, random_stacks, same_files

from bonelib import InputError
from bonelib.core.config import section
from bonelib.core.random import torch_rng
from bonelib.latent.config import EncoderTraining, Refinement
from bonelib.latent.encoder_training import train_encoder
from bonelib.latent.inversion import refine
from bonelib.networks.config import SuperRes
from bonelib.training import checkpoint, loop, run
from bonelib.training.config import Train
from bonelib.training.grading import train_grader
from bonelib.training.superres import train_superres

STYLEGAN = SMALL | dict(generator=dict(kind="stylegan", widths=[8, 8, 8], latent=8, style=8, noise=0.5))


def quiet(*_, **__):
    pass


def gan(how):
    return lambda folder, **where: loop.train(section(Train, how, "train"), random_stacks(), folder, seed=3, **where)


def encoder(prior):
    model = test_inversion.oracle_model()
    how, data = EncoderTraining(prior=prior, samples=48, batch=8, ema=5), test_inversion.stacks_of(model)
    return lambda folder, **where: train_encoder(how, model, data, folder, seed=1, **where)


def refinement():
    model = test_inversion.oracle_model()
    codes, volumes = test_inversion.bones(model, 3, "killed")

    def refined(folder, **where):
        found = refine(codes + 0.3, volumes, model, Refinement(steps=12), **where)
        checkpoint.save_tensors(folder / "codes.safetensors", {"codes": found.codes})

    return refined


def grader():
    how = test_grading.SMALL.model_copy(update=dict(samples=60))
    return lambda folder, **where: train_grader(how, test_grading.stripes(), folder, seed=1, **where)


def superres():
    data, textures = test_superres.random_scans(), np.random.default_rng(1).random((6, 5)).astype(np.float32)
    return lambda folder, **where: train_superres(
        SuperRes(**test_superres.SMALL), data, textures, folder, seed=1, **where
    )


TRAININGS = {
    "Wasserstein": (lambda: gan(SMALL), (3, 9)),  # killed after so many states: in the first stage, in a fade-in
    "relativistic": (lambda: gan(RELATIVISTIC), (3, 9)),
    "StyleGAN": (lambda: gan(STYLEGAN), (5,)),
    "encoder, Gaussian codes": (lambda: encoder("normal"), (3,)),
    "encoder, latent discriminator": (lambda: encoder("discriminator"), (3,)),
    "refinement": (refinement, (5,)),
    "grader": (grader, (3, 4)),
    "super-resolution": (superres, (2,)),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_killed_training_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    make, kills = TRAININGS[name]
    train, save, said = make(), checkpoint.save_state, []
    train(tmp_path / "whole/out", state=tmp_path / "whole/state", say=quiet)
    monkeypatch.setattr(run, "SAVE_EVERY_S", 0.0)
    where = dict(state=tmp_path / "killed/state", say=lambda text, **_: said.append(text))
    for after in kills:
        saves = []

        def dying(*args, saves=saves, after=after):
            save(*args)
            saves.append(1)
            if len(saves) == after:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint, "save_state", dying)
            train(tmp_path / "killed/out", **where)
    train(tmp_path / "killed/out", **where)
    assert sum("continues at" in text for text in said) == len(kills)
    same_files(tmp_path / "whole/out", tmp_path / "killed/out")


class Toy:
    """A weight that learns from keyed numbers; from step `spoiled` on its loss is not finite above a rate."""

    def __init__(self, end=200, spoiled=None, low=0.3):
        self.net = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.net.weight)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=1.0)
        self.end, self.spoiled, self.low, self.rates = end, spoiled, low, []

    def step(self, at):
        rate = 0.5**at.halved
        self.adam.param_groups[0]["lr"] = rate
        x = torch.rand(4, 1, generator=torch_rng(0, "toy", at.seen))
        bad = self.spoiled is not None and at.steps >= self.spoiled and rate > self.low
        loss = self.net(x).square().mean() * (float("nan") if bad else 1)
        self.rates.append(rate)
        at.count(run.update(self.adam, loss, 2.0))
        at.seen += 4
        at.own["last"] = at.seen
        return {"loss": 0.0 if bad else loss.item()}

    def train(self, state, **more):
        objects = dict(net=self.net, adam=self.adam)
        how = dict(end=self.end, state=state, fingerprint="toy", name="toy", say=quiet) | more
        return run.run(self.step, objects, **how)


def test_a_training_that_diverges_goes_back_to_the_last_mark_with_half_the_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "MAX_IN_A_ROW", 0)
    monkeypatch.setattr(run, "MAX_LEFT_OUT", 1.0)
    said, toy = [], Toy(spoiled=13)
    at = toy.train(tmp_path, marks=5, say=lambda text, **_: said.append(text))
    assert at.seen == 200 and at.halved == 2 and at.own == {"last": 200}
    back = "diverged at 56 samples; goes back to 40, with 1/{} of the rate"
    assert [text for text in said if "diverged" in text] == [back.format(2), back.format(4)]
    assert toy.rates[:14] == [1.0] * 14 and toy.rates[14:18] == [0.5] * 4 and toy.rates[-1] == 0.25
    with pytest.raises(InputError, match="the training diverged at 56 samples, even with 1/4 of the rate"):
        Toy(spoiled=13, low=0.0).train(tmp_path / "hopeless", marks=5)
    with pytest.raises(InputError, match="the training diverged at 56 samples; a lower rate may help"):
        Toy(spoiled=13).train(tmp_path / "unmarked")


def test_a_budget_of_seconds_stops_a_training_which_goes_on_when_it_is_run_again(tmp_path, monkeypatch):
    whole = Toy(end=2000)
    whole.train(tmp_path / "whole")
    clock = [0.0]

    def ticking():
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(run.time, "monotonic", ticking)
    said, seen = [], []
    while not seen or seen[-1] < 2000:
        toy = Toy(end=2000)
        seen.append(toy.train(tmp_path / "part", seconds=100, say=lambda text, **_: said.append(text)).seen)
        assert len(seen) < 20
    assert len(seen) > 2 and seen[0] < seen[1]
    assert f"toy: stopped after 100 s at {seen[0]} of 2000 samples; run it again to go on" in said
    assert torch.equal(toy.net.weight, whole.net.weight)


def test_a_request_to_stop_saves_the_state(tmp_path):
    toy, step = Toy(), Toy.step

    def asked(at):
        if at.seen == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(toy, at)

    toy.step = asked
    with pytest.raises(InputError, match="stopped on request at 44 of 200 samples; run it again to go on"):
        toy.train(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert checkpoint.load_state(tmp_path, "toy")[1]["seen"] == 44


def test_an_update_without_a_finite_gradient_is_left_out_and_a_loss_that_is_not_finite_is_an_alarm(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([weight], lr=0.1)
    assert not run.update(adam, (weight * torch.tensor([1.0, float("nan"), 1.0])).sum(), clip=2)
    assert torch.equal(weight, torch.ones(3))
    assert run.update(adam, weight.sum(), clip=2) and not torch.equal(weight, torch.ones(3))
    toy, step = Toy(), Toy.step
    toy.step = lambda at: step(toy, at) | {"loss": float("inf")}
    with pytest.raises(InputError, match="at 4 samples loss is inf, though the update was taken"):
        toy.train(tmp_path)
