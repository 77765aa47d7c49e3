"""Losses by hand, Appendix B as a table, and training that continues bit for bit."""

import csv
import json

import numpy as np
import pytest
import torch

from bonelib import InputError
from bonelib.core.config import section
from bonelib.networks.config import CriticNet
from bonelib.networks.registry import build_critic
from bonelib.params import check_file
from bonelib.scans.config import Augment
from bonelib.scans.dataset import Stacks, augmented, order, set_apart
from bonelib.training import adaptive, checkpoint, loop, losses, run, schedule
from bonelib.training.config import Adaptive, Schedule, Train

PAPER = Schedule(samples=(180_000, *[360_000] * 4), fade=(0, *[180_000] * 4), batch=(24, 24, 12, 6, 3))
SMALL = dict(
    generator=dict(kind="progan", widths=[8, 8, 8], latent=8, noise=0.5),
    critic=dict(widths=[8, 8, 8], convs=2, standardise=True),
    schedule=dict(samples=[48, 64], fade=[0, 32], batch=[4, 4], final_decay=0.5),
    n_critic=2,
    rate=4e-3,
    ema=2,
)
RELATIVISTIC = SMALL | dict(
    loss="relativistic", penalty=1.0, adaptive=dict(target=0.1, ramp=100), snapshots=dict(number=3, validation=0.2)
)


@pytest.fixture
def stacks():
    return random_stacks()


def random_stacks():
    rng = np.random.default_rng(0)
    rows = [
        dict(scan=f"s{i}", patient=f"p{i}", split="train" if i < 6 else "held-out", volume=i, start=0) for i in range(8)
    ]
    return Stacks(rng.random((8, 4, 36, 28)).astype(np.float16), rows, dict(stack_slices=4, data_hash="0"))


def test_equation_1_by_hand():
    loss = losses.critic_loss(
        torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5]), torch.tensor([1.0, 1.5]), penalty=10, drift=0.1
    )
    assert loss.item() == pytest.approx(0.5 - 2.0 + 10 * 0.125 + 0.1 * 5.0)
    assert losses.generator_loss(torch.tensor([1.0, 3.0])).item() == -2.0


def test_slope_of_a_linear_critic():
    gradient = torch.full((2, 1, 2, 2, 2), 3.0)
    assert torch.allclose(losses.slopes(gradient), torch.full((2,), 3.0 * 8**0.5))


def test_mixed_samples_lie_between():
    real, fake = torch.ones(64, 1, 1, 1, 1), torch.zeros(64, 1, 1, 1, 1)
    share = losses.mix(real, fake, torch.Generator().manual_seed(0))
    assert share.min() >= 0 and share.max() <= 1 and 0.4 < share.mean() < 0.6


@pytest.mark.parametrize("fade", [1.0, 0.3])
def test_the_relativistic_losses_have_the_gradients_of_plain_autograd(fade):
    torch.manual_seed(0)
    critic = build_critic(CriticNet(widths=(4, 4, 4), convs=2))
    real, fake, gamma, drift = torch.rand(3, 1, 4, 36, 28), torch.rand(3, 1, 4, 36, 28), 5.0, 0.1
    how = section(Train, {**SMALL, "loss": "relativistic", "penalty": gamma, "drift": drift}, "train")

    def gradient(loss):
        return torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)
                if g is not None
            ]
        )

    x, y = real.clone().requires_grad_(), fake.clone().requires_grad_()
    on_x, on_y = critic(x, 2, fade), critic(y, 2, fade)
    r1, r2 = (
        torch.autograd.grad(score.sum(), at, create_graph=True)[0].square().sum(dim=(1, 2, 3, 4)).mean()
        for score, at in ((on_x, x), (on_y, y))
    )
    plain = -torch.nn.functional.logsigmoid(on_x - on_y).mean() + gamma / 2 * (r1 + r2)
    loss, on_real, on_fake, slope = losses.of_critic(how, critic, real, fake, None, 2, fade)
    assert slope.shape == (6,) and torch.allclose(on_real, on_x) and torch.allclose(on_fake, on_y)
    expected, found = gradient(plain + drift * on_x.square().mean()), gradient(loss)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    unpenalised = gradient(-torch.nn.functional.logsigmoid(critic(real, 2, fade) - critic(fake, 2, fade)).mean())
    assert (unpenalised - expected).norm() > 0.1 * expected.norm()  # the penalty is a good part of it

    pull = torch.autograd.grad(losses.of_generator(how, critic, real, y, 2, fade), y)[0]
    plain = torch.autograd.grad(-torch.nn.functional.logsigmoid(critic(y, 2, fade) - critic(real, 2, fade)).mean(), y)[
        0
    ]
    assert torch.allclose(pull, plain, atol=1e-7) and pull.abs().max() > 1e-5


def test_schedule_is_appendix_b():
    assert schedule.total(PAPER) == 1_620_000
    for seen, stage, batch in [
        (0, 1, 24),
        (179_999, 1, 24),
        (180_000, 2, 24),
        (540_000, 3, 12),
        (900_000, 4, 6),
        (1_260_000, 5, 3),
        (1_619_999, 5, 3),
    ]:
        now = schedule.at(PAPER, seen)
        assert (now.stage, now.batch) == (stage, batch)
        assert now.rate == pytest.approx(0.85 ** (stage - 1))
    assert schedule.at(PAPER, 100).fade == 1
    fades = [schedule.at(PAPER, 180_000 + k).fade for k in range(0, 200_000, 24)]
    assert 0 < fades[0] < 1e-3 and all(a <= b for a, b in zip(fades, fades[1:], strict=False))
    assert schedule.at(PAPER, 180_000 + 90_000).fade == pytest.approx(0.5, abs=1e-3)
    assert schedule.at(PAPER, 180_000 + 180_000).fade == 1


def test_published_profile_is_appendix_b():
    train = check_file()["profiles"]["paper"]["train"]["progan"]
    how = section(Train, train, "train")
    assert how.schedule == PAPER
    assert (how.n_critic, how.rate, how.clip, how.ema, how.haar, how.precision) == (5, 4e-3, 2, 0, False, "float32")
    assert (how.loss, how.penalty, how.drift) == ("wasserstein", 10, 1e-3)
    assert not how.generator.noise and not how.critic.standardise and not how.critic.whole and how.critic.convs == 1


def test_final_decay_ends_low():
    plan = Schedule(samples=(100, 100), fade=(0, 0), batch=(1, 1), rate_decay=1.0, final_decay=0.5)
    assert (
        schedule.at(plan, 150).rate == 1 and schedule.at(plan, 175).rate == 0.5 and schedule.at(plan, 199).rate == 0.02
    )


def test_order_visits_every_stack_once_an_epoch_and_is_a_function_of_the_number():
    assert sorted(order(7, 0, 7, seed=1)) == list(range(7))
    assert order(7, 3, 9, seed=1) == [*order(7, 3, 4, seed=1), *order(7, 7, 5, seed=1)]
    assert order(7, 0, 7, seed=1) != order(7, 0, 7, seed=2)


def test_augmentation_rotates_and_zooms_in_plane():
    y, x = np.meshgrid(np.arange(72) - 35.5, np.arange(56) - 27.5, indexing="ij")
    bar = torch.tensor(((abs(y) < 20) & (abs(x) < 6)).astype(np.float32)).expand(16, 1, 4, 72, 56)
    moved = augmented(bar, 0, 1, Augment(rotation=10, zoom=1.15))
    areas, angles = [], []
    for picture in moved[:, 0, 2].numpy().astype(float):
        mass = picture.sum()
        cy, cx = (picture * y).sum() / mass, (picture * x).sum() / mass
        cov = [
            [(picture * (a - ca) * (b - cb)).sum() / mass for b, cb in ((y, cy), (x, cx))]
            for a, ca in ((y, cy), (x, cx))
        ]
        angles.append(np.degrees(0.5 * np.arctan2(2 * cov[0][1], cov[0][0] - cov[1][1])))
        areas.append(mass / bar[0, 0, 0].sum().item())
    assert all(abs(a) < 10.5 for a in angles) and max(angles) > 4 and min(angles) < -4
    assert all(0.98 < a < 1.15**2 * 1.03 for a in areas) and max(areas) > 1.15
    assert torch.equal(moved[3:5], augmented(bar[3:5], 3, 1, Augment()))


def run_small(stacks, folder, how, **more):
    return loop.train(
        section(Train, how, "train"),
        stacks,
        folder / "model",
        state=folder / "state",
        seed=3,
        say=lambda *a, **k: None,
        **more,
    )


def same_files(one, other, count=None):
    files = sorted(path.relative_to(one) for path in one.glob("**/*.*") if path.name != "record.json")
    kept = (path for path in other.glob("**/*.*") if path.name != "record.json")  # which says how long it took
    assert files and files == sorted(path.relative_to(other) for path in kept) and len(files) == (count or len(files))
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def spoiled_above(rate, after, monkeypatch):
    """Losses of the generator that are not finite from update `after` on, as long as the rate is above `rate`."""
    step = run.update

    def spoil(adam, loss, *args):
        group = adam.param_groups[0]
        generators = group["eps"] == 1e-7
        steps = int(adam.state[group["params"][0]]["step"]) if adam.state else 0
        bad = generators and steps >= after and group["lr"] > rate
        return step(adam, loss * float("nan") if bad else loss, *args)

    monkeypatch.setattr(run, "update", spoil)
    monkeypatch.setattr(run, "MAX_IN_A_ROW", 0)


def test_a_training_that_diverges_goes_back_with_half_the_rate_bit_for_bit(stacks, tmp_path, monkeypatch):
    spoiled_above(1.5e-3, 4, monkeypatch)  # the rate is 4e-3 at first, so it takes two halvings
    monkeypatch.setattr(loop, "ROLLBACK_POINTS", 5)
    how, said, rates = section(Train, RELATIVISTIC, "train"), [], []

    def train(folder):
        where = dict(state=folder / "state", seed=3)
        loop.train(how, stacks, folder / "model", say=lambda text, **_: said.append(text), **where)
        return folder / "model"

    whole = train(tmp_path / "whole")
    back = [text for text in said if "diverged" in text]
    assert back == [
        "diverged at 40 samples; goes back to 24, with 1/2 of the rate",
        "diverged at 40 samples; goes back to 24, with 1/4 of the rate",
    ]
    save = checkpoint.save_state

    def dying(folder, tensors, meta):
        save(folder, tensors, meta)
        rates.append(meta["halved"])
        if len(rates) in (6, 9, 12):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_state", dying)
    monkeypatch.setattr(run, "SAVE_EVERY_S", 0.0)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed")
    same_files(whole, train(tmp_path / "killed"), 8)
    assert {0, 1, 2} == set(rates)


def test_snapshots_are_taken_where_the_schedule_says_and_augmentation_begins(stacks, tmp_path):
    plan = section(Train, RELATIVISTIC, "train").schedule
    counts = [schedule.snapshots(plan, 3, 0.5, seen) for seen in (0, 79, 80, 95, 96, 111, 112, 119)]
    assert counts == [0, 0, 1, 1, 2, 2, 3, 3]
    run_small(stacks, tmp_path, RELATIVISTIC)
    names = sorted(path.name for path in (tmp_path / "model/candidates").iterdir())
    assert names == ["0000000080.safetensors", "0000000096.safetensors", "0000000112.safetensors"]
    table = list(csv.DictReader((tmp_path / "model/curves.csv").read_text().splitlines()))
    assert float(table[0]["augmented"]) < max(float(row["augmented"]) for row in table) > 0.1
    first, last = (tmp_path / "model/candidates" / names[i] for i in (0, -1))
    assert last.read_bytes() == (tmp_path / "model/generator.safetensors").read_bytes() != first.read_bytes()


def test_patients_set_apart_are_whole_and_no_training_sees_them(stacks, tmp_path, monkeypatch):
    doubled = Stacks(stacks.volumes, [row for row in stacks.rows for _ in range(2)], stacks.meta)
    apart = set_apart(doubled, 0.34)
    splits = {split: {row["patient"] for row in apart.of(split)} for split in ("train", "validation", "held-out")}
    assert [len(patients) for patients in splits.values()] == [4, 2, 2] and len(apart.of("validation")) == 4
    assert set.union(*splits.values()) == {f"p{i}" for i in range(8)}
    shuffled = Stacks(stacks.volumes, doubled.rows[::-1], stacks.meta)
    assert {row["patient"] for row in set_apart(shuffled, 0.34).of("validation")} == splits["validation"]
    pooled, seen = Stacks.pooled, set()

    def watched(self, rows, halvings):
        seen.update(row["patient"] for row in rows)
        return pooled(self, rows, halvings)

    monkeypatch.setattr(Stacks, "pooled", watched)
    hidden = {row["patient"] for row in set_apart(stacks, 0.2).of("validation")}
    short = dict(samples=[8, 32], fade=[0, 0], batch=[4, 4])
    run_small(stacks, tmp_path, {**RELATIVISTIC, "schedule": short})
    assert hidden and seen == {f"p{i}" for i in range(8)} - hidden


def test_adaptive_changes_are_keyed_by_number_and_as_frequent_as_asked():
    volumes = torch.rand(400, 1, 4, 36, 28)
    changed = adaptive.augmented(volumes, "real", 0, 1, 5, 0.2)
    same = (changed - volumes).abs().amax(dim=(1, 2, 3, 4)) < 1e-4
    assert 0.8**5 - 0.08 < same.float().mean() < 0.8**5 + 0.08
    assert adaptive.augmented(volumes, "real", 0, 1, 5, 0.0) is volumes
    of_rank = adaptive.augmented(volumes[3:9:2], "real", 3, 2, 5, 0.2)
    assert torch.allclose(of_rank, changed[3:9:2], atol=1e-6)
    assert not torch.allclose(adaptive.augmented(volumes, "generated", 0, 1, 5, 0.2), changed)


def test_adaptive_changes_keep_a_bone_a_bone_and_let_gradients_through():
    y, x = torch.meshgrid(torch.arange(36) - 17.5, torch.arange(28) - 13.5, indexing="ij")
    disc = (((y / 11) ** 2 + (x / 8) ** 2) < 1).float() * torch.tensor([0.2, 0.4, 0.6, 0.8])[:, None, None]
    volumes = disc.expand(200, 1, 4, 36, 28).clone().requires_grad_()
    changed = adaptive.augmented(volumes, "real", 0, 1, 5, adaptive.LIMIT)
    weight = torch.autograd.grad(changed.square().sum(), volumes)[0].abs().sum(dim=(1, 2, 3, 4))
    assert (weight > 0).all() and weight.isfinite().all()
    profile = changed.detach().amax(dim=(3, 4))[:, 0]
    upside_down = (profile[:, 0] > profile[:, 3]).float().mean()
    assert 0.7 < upside_down < 0.9  # mirrored along the bone in a share of LIMIT
    assert 0.2 < (changed.detach() > 0.3).float().sum() / (volumes.detach() > 0.3).float().sum() < 1.5
    assert changed.min() > -0.3 and changed.max() < 1.3


def test_the_probability_of_changes_is_steered_and_bounded():
    how = Adaptive(target=0.6, ramp=100)
    steer = adaptive.update_probability
    assert steer(0.3, 0.7, 10, how) == pytest.approx(0.4)
    assert steer(0.3, 0.5, 10, how) == pytest.approx(0.2)
    assert steer(0.3, 0.6, 10, how) == 0.3 == steer(0.3, float("nan"), 10, how)
    assert steer(0.02, 0.5, 10, how) == 0.0 and steer(0.75, 0.9, 10, how) == adaptive.LIMIT


def test_adaptive_augmentation_needs_pairs():
    with pytest.raises(InputError, match="steered by pairs of scores, which loss relativistic has and wasserstein not"):
        section(Train, {**RELATIVISTIC, "loss": "wasserstein"}, "train")


def test_a_damaged_or_foreign_state_is_passed_over(stacks, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SAVE_EVERY_S", 0.0)
    run_small(stacks, tmp_path, SMALL)
    folder = tmp_path / "state"
    older, newest = sorted(folder.glob("state-*.json"))
    mark = json.loads(newest.read_text())["fingerprint"]
    assert checkpoint.load_state(folder, "another") is None
    damaged = bytearray(newest.with_suffix(".safetensors").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.with_suffix(".safetensors").write_bytes(damaged)
    assert checkpoint.load_state(folder, mark)[1]["seen"] == json.loads(older.read_text())["seen"]


def test_states_of_another_training_do_not_push_out_ones_own(tmp_path):
    """They may have come further than the new training is, and were once kept in its place."""
    for seen in (900, 950):
        checkpoint.save_state(tmp_path, {"a": torch.ones(1)}, dict(seen=seen, fingerprint="before"))
    for seen in (10, 20, 30):
        checkpoint.save_state(tmp_path, {"a": torch.ones(1)}, dict(seen=seen, fingerprint="now"))
        assert checkpoint.load_state(tmp_path, "now")[1]["seen"] == seen
    assert [json.loads(p.read_text())["seen"] for p in sorted(tmp_path.glob("state-*.json"))] == [20, 30]


def test_two_trainers_never_share_a_folder(tmp_path):
    with (
        checkpoint.locked(tmp_path),
        pytest.raises(InputError, match="another training is running"),
        checkpoint.locked(tmp_path),
    ):
        pass


def test_the_running_average_is_not_the_last_generator(stacks, tmp_path):
    run_small(stacks, tmp_path / "a", SMALL)
    run_small(stacks, tmp_path / "b", {**SMALL, "ema": 0})
    weights = [(tmp_path / n / "model/generator.safetensors").read_bytes() for n in "ab"]
    critics = [(tmp_path / n / "model/critic.safetensors").read_bytes() for n in "ab"]
    assert weights[0] != weights[1] and critics[0] == critics[1]


def test_a_period_of_two_voxels_is_a_difference_of_autocorrelations():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(0.34 + 0.03 * rng.standard_normal((4, 1, 8, 24, 20))).float() for _ in range(2))
    lined = b.clone()
    lined[:, :, :, ::2] += 0.02
    lined.requires_grad_()
    found = losses.autocorrelation_difference(a, lined)
    assert losses.autocorrelation_difference(a, b) < 0.02 < 0.05 < found
    found.backward()  # and a step against it takes the lines away
    better = losses.autocorrelation_difference(a, lined.detach() - 0.1 * lined.grad / lined.grad.norm())
    assert better < found


def test_bones_all_alike_are_far_from_bones_that_differ():
    rng = np.random.default_rng(0)

    def bones(spread):
        centre = 0.34 + spread * rng.standard_normal((8, 1, 1, 1, 1))
        return torch.from_numpy(centre + 0.03 * rng.standard_normal((8, 1, 8, 24, 20))).float()

    real, alike = bones(0.05), bones(0.0).requires_grad_()
    found = losses.histogram_distance(real, alike)
    assert losses.histogram_distance(real, bones(0.05)) < found / 2
    assert losses.histogram_distance(real, real.clone().requires_grad_()).isfinite()
    found.backward()
    assert alike.grad.isfinite().all() and alike.grad.abs().max() > 0
