"""An audit that finds a planted leak, finds nothing where nothing is, and shuts the gate when in doubt."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from bonelib import InputError, published
from bonelib.core.random import numpy_rng, torch_rng
from bonelib.networks.critic import Critic
from bonelib.networks.progan import ProGAN
from bonelib.studies import privacy


def bones(n, seed, grid=(4, 36, 28)):
    rng = numpy_rng(seed, "test privacy")
    fields = ndimage.gaussian_filter(rng.standard_normal((n, *grid)), (0, 1, 2, 2))
    return (0.5 + 0.15 * fields / fields.std()).clip(0, 1).astype(np.float32)


def test_a_patient_has_the_score_of_the_best_stack():
    assert privacy.by_patient(np.array([1.0, 5, 2, 3]), ["b", "a", "a", "b"]).tolist() == [5, 3]


def test_attack_counts_and_its_interval_holds_the_truth():
    rng, hits = numpy_rng(0, "attack"), 0
    for i in range(20):
        members, others = rng.standard_normal(60) + 1, rng.standard_normal(40)
        found = privacy.attack(members, others, seed=i, draws=200)
        hits += found["AUC low"] <= 0.7602 <= found["AUC high"]  # Phi(1 / sqrt 2)
    assert hits >= 16 and (found["n_members"], found["n_others"]) == (60, 40)


def test_nearness_and_likeness_know_a_copy_again():
    real, fake = bones(12, 1), bones(8, 2)
    fake[3] = privacy.copies(real[5:6], 1, 0.005)[0]
    assert privacy.max_ncc(real, fake).argmax() == 5 and privacy.max_ncc(real, fake)[5] > 0.75
    assert privacy.max_ncc(real, real + 0.1).min() > 0.999
    near = privacy.nn_score(real.reshape(12, -1), fake.reshape(8, -1))
    scaled = real.reshape(12, -1) / (real.reshape(12, -1).std(axis=0) + 1e-9)
    drawn = fake.reshape(8, -1) / (real.reshape(12, -1).std(axis=0) + 1e-9)
    np.testing.assert_allclose(near, [-min(np.linalg.norm(r - f) for f in drawn) for r in scaled], rtol=1e-5)


def test_registration_finds_a_bone_that_was_moved():
    real = bones(6, 3)
    moved = np.roll(real, (2, -2), (2, 3))
    assert privacy.max_ncc(real, moved).min() > 0.7 > privacy.max_ncc(real, bones(6, 4)).max()


def test_a_generator_that_knows_its_volumes_gives_them_away():
    known, strange = (torch.from_numpy(bones(20, s))[:, None] for s in (5, 6))
    memory = privacy.MemorisingGenerator(known)
    assert memory.errors(known).max() < 1e-3 < 0.05 < memory.errors(strange).min()


def test_reconstruction_is_closer_for_what_the_generator_draws():
    torch.manual_seed(0)
    generator = ProGAN(base=(1, 9, 7), widths=(8, 8, 8), latent=8).requires_grad_(False)
    own = generator.synthesize(generator.sample_latent(3, torch_rng(0, "own")), 2)
    found = privacy.reconstruction(generator, torch.cat([own, torch.rand_like(own)]), 2, 1, 30, 0.05)
    assert found[:3].min() > found[3:].max() and (found < 0).all()


def test_an_overtrained_critic_knows_its_patients_and_the_given_one_stays():
    torch.manual_seed(0)
    critic = Critic((24, 16), whole=(1, 9, 7)).requires_grad_(False)
    before = {k: v.clone() for k, v in critic.state_dict().items()}
    known, strange, others = (torch.from_numpy(bones(n, s))[:, None] for n, s in ((8, 7), (16, 8), (16, 9)))
    known, strange, others = (v[:, :, ::2, ::2, ::2] for v in (known, strange, others))
    found = privacy.overtrained(critic, known, strange, 1, 150)
    scores = [privacy.critic_scores(found, v) for v in (known, others)]
    assert privacy.auc(*scores) > privacy.CAUGHT
    assert all(torch.equal(v, before[k]) for k, v in critic.state_dict().items())


def test_true_positives_by_chance_are_counted_exactly():
    # of 3 members and 2 others in random order: none, one, two or all members above both others
    members, others = np.array([3.0, 4.0, 0.0]), np.array([1.0, 2.0])
    assert privacy.chance(members, others) == pytest.approx(3 / 10)  # two of three members on top: (3 x 2) / (5 x 4)
    assert privacy.chance(members - 9, others) == pytest.approx(1)
    rng, found = numpy_rng(0, "chance"), []
    for _ in range(400):
        scores = rng.standard_normal(75)
        found.append(privacy.chance(scores[:60], scores[60:]))
    assert np.mean(np.array(found) < 0.05) < 0.07  # never oftener than it says, but for the luck of 400
    many = rng.standard_normal(400)
    assert privacy.chance(many[:200] + 3, many[200:]) < 1e-6


def scored(gap, seed, n=40, others=20):
    rng = numpy_rng(seed, "scores")
    return rng.standard_normal(n) + gap, rng.standard_normal(others)


def audited(gap, planted, others=20):
    names = ("near", "critic")
    kinds = dict(scores=gap, planted=planted, strangers=0)
    found = {kind: {name: scored(g, i, others=others) for i, name in enumerate(names)} for kind, g in kinds.items()}
    del found["strangers"]["critic"]
    return privacy.audit(found, tolerated=0.05, seed=1, draws=200)


def numbers(rows, nobody=False):
    return {"m.verdict": privacy.verdict(rows), "m.sha256.generator": "a", "m.phantoms only": nobody}


@pytest.mark.parametrize(
    "gap, planted, others, expected",
    [
        (0, 6, 20, "released"),
        (8, 6, 20, "blocked"),
        (0, 6, 12, "undecided"),
        (8, 6, 12, "blocked"),
        (0, 0.2, 20, "audit failed"),
        (8, 0.2, 20, "audit failed"),
    ],
)
def test_the_verdict_needs_its_controls_no_leak_and_enough_others(gap, planted, others, expected):
    rows = audited(gap, planted, others)
    assert privacy.verdict(rows) == expected
    assert ["strangers AUC" in row for row in rows] == [True, False]
    missed = any("MISSED" in cell for row in privacy.evidence(rows) for cell in row.values())
    assert missed == (expected == "audit failed")
    if expected == "released":
        assert "released" in published.require_release(numbers(rows), "m", {"generator": "a"})
    else:
        with pytest.raises(InputError, match=expected):
            published.require_release(numbers(rows), "m", {"generator": "a"})


def test_phantoms_pass_the_gate():
    rows = audited(8, 6)
    assert privacy.phantom_only("bonelib/scans/phantom/cohort.py", "d1", "d1")
    assert not privacy.phantom_only("bonelib/scans/phantom/cohort.py", "d1", "d2")  # trained on something else
    assert not privacy.phantom_only("data/mine", "d1", "d1")
    assert "holds no person" in published.require_release(numbers(rows, True), "m", {"generator": "a"})


def test_weights_that_were_not_audited_are_not_released():
    values = numbers(audited(0, 6), True)
    with pytest.raises(InputError, match="not those that were audited"):
        published.require_release(values, "m", {"generator": "b"})
    with pytest.raises(InputError, match="not audited"):
        published.require_release(values, "other", {"generator": "a"})
    with pytest.raises(InputError, match="not audited"):
        published.require_release({"m.phantoms only": True}, "m", {})


def test_members_that_differ_among_themselves_fail_the_audit(monkeypatch):
    monkeypatch.setattr(privacy, "halves", lambda scores, seed: (np.sort(scores)[20:], np.sort(scores)[:20]))
    rows = audited(0, 6)
    assert not rows[0]["negative holds"] and privacy.verdict(rows) == "audit failed"
