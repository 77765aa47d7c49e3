"""Slices in two contrasts: phantoms, networks of slices, losses, and codes that are moved, with planted truth."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion

from bonelib import InputError
from bonelib.core.config import section
from bonelib.core.random import torch_rng
from bonelib.latent import directions
from bonelib.networks.config import CriticNet, StyleGANConfig
from bonelib.networks.encoder import build_encoder
from bonelib.networks.layers import FLAT, Conv
from bonelib.networks.registry import build_critic, build_generator
from bonelib.scans.phantom import contrasts
from bonelib.scans.phantom.rendering import TRABECULAR, draw_centred
from bonelib.scans.volumes import Volume, write_volume
from bonelib.studies import contrast_edits as edits
from bonelib.studies import two_contrasts as study
from bonelib.training import losses
from bonelib.training.config import Train

SHAPE = (12, 40, 32)
GENERATOR = StyleGANConfig(base=(1, 5, 4), flat=True, widths=(8, 8, 4), latent=6, style=5)
NUMBERS = dict(seed=1, draws=20)


# The phantom's second contrast


@pytest.fixture(scope="module")
def pair():
    return contrasts.draw_pair(1, contrasts.FIRST, "M", SHAPE)


def test_both_contrasts_show_one_anatomy(pair):
    mineral, soft = pair
    assert pair.shape == (2, *SHAPE) and pair.min() >= 0 and pair.max() <= 1
    drawn = draw_centred(1, contrasts.FIRST, contrasts.HEIGHT_MM / 24, [2 * n for n in SHAPE], sex="M")
    marrow = binary_erosion(drawn.compartments == TRABECULAR, iterations=2)[::2, ::2, ::2]
    cortex = mineral > 0.55
    assert soft[marrow].mean() > 2 * soft[cortex].mean() and mineral[cortex].mean() > mineral[marrow].mean() + 0.15
    outside = (drawn.compartments == 0)[::2, ::2, ::2]
    assert np.ptp(np.quantile(soft[outside], [0.1, 0.9])) > 0.3  # fat and muscle are told apart,
    assert np.ptp(np.quantile(mineral[outside], [0.1, 0.9])) < 0.15  # which X-rays hardly do


def test_what_a_contrast_has_of_its_own_is_drawn_again_alike(pair):
    again = contrasts.draw_pair(1, contrasts.FIRST, "M", SHAPE)
    other = contrasts.draw_pair(1, contrasts.FIRST + 1, "M", SHAPE)
    assert np.array_equal(pair, again) and not np.array_equal(pair[1], other[1])


def test_slices_come_in_pairs_of_patients_who_are_in_one_split():
    data, people = contrasts.draw_slices(1, 8, SHAPE, 0.25)
    assert [p["sex"] for p in people] == list("MMMFMMMF") and [p["split"] == "held-out" for p in people] == [
        (i + 1) % 4 == 0 for i in range(8)
    ]
    rows = study.spread_rows(data, "train", 3, 4)
    assert len(rows) == 3 * 4 * 2 and len({row["patient"] for row in rows}) == 3
    for a, b in zip(rows[::2], rows[1::2], strict=True):
        assert (a["patient"], a["position"]) == (b["patient"], b["position"])
        assert (a["contrast"], b["contrast"]) == contrasts.CONTRASTS
    assert {rows[0]["position"], rows[-1]["position"]} == {0.0, 1.0}
    assert data.pooled(rows[:2], 1).shape == (2, 1, 1, 20, 16)  # halved in plane alone
    assert study.counted(people, 12)[1] == {
        "split": "held-out",
        "patients": 2,
        "women": 2,
        "slices of each contrast": 24,
    }
    few, fewer = contrasts.draw_slices(1, 8, SHAPE, 0.25, 2)
    assert [p["patient"] for p in fewer] == [people[i]["patient"] for i in (0, 3, 6, 7)]
    for row in few.rows:
        same = next(r for r in data.rows if (r["scan"], r["start"]) == (row["scan"], row["start"]))
        assert np.array_equal(few.volumes[row["volume"]], data.volumes[same["volume"]])
    soft = contrasts.stacks_of(contrasts.Slices(few, fewer), "soft tissue", 8, 2)
    assert [(row["patient"], row["start"]) for row in soft.of("held-out")] == [
        (person["patient"], start) for person in fewer[1:2] + fewer[3:] for start in (0, 4)
    ]
    assert np.array_equal(soft.pooled(soft.rows[-1:], 0)[0, 0], few.volumes[-1, 4:])


def test_a_grid_over_the_field_has_cubes_within_it():
    for height, width in ((72, 56), (80, 64), (24, 16)):
        slices, *plane = contrasts.grid_over_field(height, width)
        edge = contrasts.FIELD_MM[0] / slices
        assert plane == [height, width] and edge * height <= contrasts.FIELD_MM[1] + 1e-9
        assert edge * width <= contrasts.FIELD_MM[2] + 1e-9 and contrasts.FIELD_MM[0] / (slices - 1) > edge


def test_a_network_that_knows_one_class_alone_has_no_surface_to_be_bent():
    codes = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    known = study.Coded(codes, codes, [])
    how = SimpleNamespace(points=5, tangents=8)
    nets = {"one class": torch.nn.Linear(3, 1), "two": torch.nn.Linear(3, 1)}
    for net, bias in zip(nets.values(), (100.0, 0.0), strict=True):
        torch.nn.init.ones_(net.requires_grad_(False).weight)
        torch.nn.init.constant_(net.bias, bias)
    one, two = study.bending({k: SimpleNamespace(network=net) for k, net in nets.items()}, known, how, seed=1)
    assert one["points"] == 0 and all(one[key] is None for key in study.BENT)
    assert two["points"] == 5 and abs(two["mean"]) < 1e-6  # a plane


def test_two_scans_of_ones_own_are_read_on_the_grid_of_the_slices(tmp_path):
    """A square of mineral off the middle, on finer voxels, comes out where it was, and only where both scans fit."""
    values = np.full((30, 160, 130), -500.0, np.float32)
    values[:, 40:80, 30:70] = 900.0
    files = []
    for name, voxels in (
        ("a", values),
        ("b", np.where(values > 0, 80.0, 400.0).astype(np.float32)),
        ("c", values[:-1]),
    ):
        files.append(str(tmp_path / f"{name}.nii.gz"))
        write_volume(Volume(voxels, (0.3, 0.3, 0.3)), files[-1])
    data, rows = contrasts.given_pair((files[0], files[1]), SHAPE)
    mineral, soft = data.pooled(rows[:2], 0)[:, 0, 0].float()
    found = np.argwhere(mineral.numpy() > 0.5).mean(0)
    wanted = [(59.5 - 79.5) * 0.3 / (35.47 / 40) + 19.5, (49.5 - 64.5) * 0.3 / (28.38 / 32) + 15.5]
    assert found == pytest.approx(wanted, abs=0.6) and float(mineral.max()) == pytest.approx(0.7, abs=0.01)
    assert float(soft.max()) == pytest.approx(1, abs=0.01) and float(soft.min()) == pytest.approx(0.2, abs=0.01)
    with pytest.raises(InputError, match="c.nii.gz has the grid"):
        contrasts.given_pair((files[0], files[2]), SHAPE)


# Networks of slices


def test_kernels_of_slices_are_flat_and_grids_double_in_plane():
    generator, critic = build_generator(GENERATOR), build_critic(CriticNet(widths=(8, 8, 4)), generator=GENERATOR)
    for network in (generator, critic, build_encoder(GENERATOR, norm="instance")):
        convs = [m for m in network.modules() if isinstance(m, Conv)]
        assert {tuple(conv.weight.shape[2:]) for conv in convs} <= {FLAT, (1, 1, 1)}
    styles = generator.to_styles(generator.sample_latent(3, torch_rng(0, "latent")))
    assert generator.synthesize(styles, 1).shape == (3, 1, 1, 10, 8)
    assert generator.synthesize(styles, 2, 0.5).shape == (3, 1, 1, 20, 16)
    assert build_encoder(GENERATOR)(generator.synthesize(styles)).shape == (3, 5)


@pytest.mark.parametrize("whole", [False, True])
def test_the_critic_of_slices_knows_its_gradient(whole):
    critic = build_critic(CriticNet(widths=(8, 8, 4), convs=2, whole=whole), generator=GENERATOR)
    for stage, fade in ((1, 1.0), (2, 1.0), (2, 0.4)):
        x = torch.rand(3, 1, 1, 5 << stage, 4 << stage, requires_grad=True)
        (exact,) = torch.autograd.grad(critic(x, stage, fade).sum(), x)
        assert torch.allclose(critic.input_gradient(x, stage, fade), exact, atol=1e-6)


def test_a_flat_network_of_several_slices_or_of_bands_is_refused():
    with pytest.raises(InputError, match="must begin with 1"):
        section(StyleGANConfig, dict(base=[2, 5, 4], flat=True), "generator")
    how = dict(generator=GENERATOR.model_dump(), critic=dict(widths=[8, 8]), haar=True)
    how["generator"] |= dict(widths=[8, 8])
    how["schedule"] = dict(samples=[8, 8], fade=[0, 0], batch=[4, 4])
    with pytest.raises(InputError, match="haar halves the grid along z"):
        section(Train, how, "train")
    progan = how | dict(generator=dict(kind="progan", widths=[8, 8, 8]), critic=dict(widths=[8, 8, 8]), haar=False)
    with pytest.raises(InputError, match="a progan has none"):
        section(Train, progan | dict(mixing=0.5), "train")


# Losses


def test_styles_are_mixed_at_one_place_and_as_often_as_asked():
    generator, rng = (
        build_generator(StyleGANConfig(base=(1, 5, 4), flat=True, widths=(4,) * 4, latent=6, style=5)),
        None,
    )
    latent = generator.sample_latent(400, torch_rng(0, "latent"))
    plain = losses.mixed_styles(0.0, generator, latent, rng, 3)
    assert torch.equal(plain, generator.to_styles(latent))  # and nothing is drawn, as there is nothing to draw from
    mixed = losses.mixed_styles(0.5, generator, latent, torch_rng(0, "mixing"), 2)
    own = (mixed == plain[:, None]).all(2)
    assert own[:, 0].all() and (own[:, 1:].int() <= own[:, :-1].int()).all()  # once another's, always
    assert 0.4 < float((~own.all(1)).float().mean()) < 0.6
    assert set(own.sum(1).tolist()) == {1, 2, 3, 4, 5, 9}  # within the six layers that the second stage uses


def test_the_path_length_of_a_linear_generator_is_known():
    class Linear:
        layers = 2
        weight = torch.nn.Parameter(3.0 * torch.eye(4))

        def synthesize(self, styles, stage, fade, noise):
            return (styles.sum(1) @ self.weight).reshape(-1, 1, 1, 2, 2)

    styles = torch.randn(2000, 4, generator=torch_rng(0, "styles")).requires_grad_()
    lengths = losses.path_lengths(Linear(), styles, torch_rng(0, "direction"), 1, 1.0)
    assert float(lengths.detach().square().mean()) == pytest.approx(9.0, rel=0.05)  # 3^2, of a unit direction
    (slope,) = torch.autograd.grad(lengths.mean(), Linear.weight)
    assert float(slope.diagonal().sum()) == pytest.approx(
        float(lengths.detach().mean()) / 3, rel=0.05
    )  # it grows with the weight


def test_the_non_saturating_loss_holds_the_slope_at_real_slices_alone():
    critic = build_critic(CriticNet(widths=(8, 8, 4)), generator=GENERATOR)
    how = Train(
        generator=GENERATOR, critic=dict(widths=(8, 8, 4)), loss="nonsaturating", penalty=2.0,
        schedule=dict(samples=(8, 8), fade=(0, 0), batch=(4, 4)),
    )  # fmt: skip
    real, fake = torch.rand(2, 4, 1, 1, 20, 16)
    loss, on_real, on_fake, slope = losses.of_critic(how, critic, real, fake, torch_rng(0, "mix"), 2, 1.0)
    x = real.clone().requires_grad_()
    (exact,) = torch.autograd.grad(critic(x).sum(), x)
    r1 = exact.square().sum((1, 2, 3, 4)).mean()
    softplus = torch.nn.functional.softplus
    assert len(slope) == 4 and torch.allclose(loss, softplus(-on_real).mean() + softplus(on_fake).mean() + 2 * r1)
    assert torch.allclose(losses.of_generator(how, critic, real, fake, 2, 1.0), softplus(-critic(fake)).mean())


# Codes that are moved


def test_formula_3_on_a_straight_way_is_a_line():
    codes, normal = torch.randn(2, 5, 4, generator=torch_rng(0, "codes"))[0], torch.tensor([0.0, 1.0, 0.0, 0.0])
    way, mean = directions.straight(directions.Direction(normal, 3.0, 0.0)), torch.ones(4)
    moved = directions.formula3(way, codes, mean, 0.7, 2.0)
    assert torch.allclose(moved, 1 + 0.7 * (codes - 1) + 2 * normal)
    network = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 1))
    back = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        back.weight.copy_(torch.linalg.inv(network[0].weight))
    bent = directions.bent(network, back)
    with torch.no_grad():
        assert torch.allclose(directions.formula3(bent, codes, mean, 1.0, 0.0), codes, atol=1e-4)  # there and back
        odds = network(directions.formula3(bent, codes, mean, 1.0, 2.0)) - network(codes)
    assert torch.allclose(odds, 2 * network[-1].weight.norm().expand(5, 1), atol=1e-3)


def planted(patients=8, positions=5):
    """Codes of slices, whose contrast is the first number and whose position the second; images show both, and a third
    number, that of the patient."""
    rng, rows, codes = np.random.default_rng(0), [], []
    for p in range(patients):
        of_patient = rng.normal()
        for z in range(positions):
            for c, contrast in enumerate(contrasts.CONTRASTS):
                rows.append(dict(patient=f"p{p}", sex="FM"[p % 2], contrast=contrast, start=3 * z, position=z / 4))
                codes.append([4 * c + 0.1 * rng.normal(), 0.5 * 3 * z, of_patient, (p % 2) * 2.0, rng.normal() * 0.1])
    codes = torch.tensor(codes, dtype=torch.float32)
    return study.Coded(codes, draw(codes), rows)


def draw(codes):
    """Images of 1 x 2 x 2 pixels of codes, or of those with three styles: contrast is decided by the second."""
    if codes.dim() == 3:
        codes = torch.stack([codes[:, 1, 0], codes[:, 0, 1], codes[:, 0, 2], codes[:, 0, 3]], 1)
    return codes[:, :4].reshape(-1, 1, 1, 2, 2) / 10


def test_a_contrast_that_is_a_direction_is_transferred_and_back():
    known, other = planted(), planted(4)
    way = directions.straight(directions.Direction(torch.eye(5)[0], 1.0, 0.0))
    found, rows = edits.transfers(known, other, way, known.codes.mean(0), 1.0, draw, study.error, **NUMBERS)
    table = {(row["transfer"], row[""]): row for row in rows}
    for one in found:
        moved, mean = table[one.name, "moved"], table[one.name, edits.MEAN]
        assert edits.FACTORS[one.factor] == pytest.approx(edits.UNIT, rel=0.1)  # the one nearest to 20
        assert moved["value"] < 0.2 * mean["value"] and table[one.name, edits.BEST]["value"] == 0
        assert (moved["N"], moved["patients"]) == (20, 4)


def test_a_walk_along_the_bone_finds_every_slice():
    other, way = planted(4), directions.straight(directions.Direction(torch.eye(5)[1], 1.0, 0.0))
    walks, rows, steps, at = edits.walks(other, way, 5, 0.4, 1.0, draw, study.error, **NUMBERS)
    assert [row["value"] for row in steps] == pytest.approx([0.5, 0.5]) and at == ["0.0", "1.2", "2.4", "3.6", "4.8"]
    errors = walks[contrasts.CONTRASTS[0]].errors
    assert errors.min(2).max() < 0.05 * errors[0, 4].max()
    far = {row[""]: row["value"] for row in rows if row["contrast"] == contrasts.CONTRASTS[0] and row["mm"] == 2.4}
    assert far["moved"] < 0.05 * far["not moved"]


def test_the_cliff_of_an_injection_lies_behind_the_layer_that_decides():
    assert edits.cliff(np.array([68.6, 58.6, 58.7, 58.9, 60.4, 459.1, 461.4, 460.6])) == (
        4,
        pytest.approx(7.60, abs=0.01),
    )
    other = planted(4)
    rows, cliffs = edits.injections(other, lambda w: w[:, None].expand(-1, 3, -1), draw, study.error, **NUMBERS)
    assert {row["last layer that matters"] for row in cliffs if row[""] == "paired"} == {1}
    curves = edits.grouped(rows, "transfer")
    for lines in curves.values():
        assert lines["paired"][0]["value"] == 0 < lines["unpaired"][0]["value"]  # another patient is another anatomy


def test_slices_put_together_are_as_continuous_as_they_are():
    ramp = np.tile(np.arange(12.0).reshape(1, 3, 4), (5, 1, 1))
    rows = edits.joined(
        {"same": [ramp, ramp], "shifted": [ramp + np.arange(5.0)[:, None, None]] * 2}, ["a", "b"], **NUMBERS
    )
    assert [row["value"] for row in rows] == pytest.approx([0, 1, 1, 1])


def test_what_is_planted_in_codes_is_told_apart_in_unknown_patients():
    known, other = planted(16), planted(6)
    how = study.TwoContrasts.model_construct(tries=1, epochs=40, draws=20, points=5, tangents=8)
    told = {name: study.tell(known, other, name, how, seed=1) for name in study.ATTRIBUTES}
    for one in told.values():
        row = one.row
        assert row["logistic"] == 1 and row["unknown.balanced"] == 1 and row["unknown.patients"] == 6
        assert row["taken"] == directions.chosen(row["R2 of the way back"], row["network"], row["logistic"])
    assert told["sex"].row["N left out"] == 4 * 10 and abs(float(told["sex"].plane.vector[3])) > 0.9
    assert study.regression(known, other, how, seed=1)[0]["R2 of unknown patients"] > 0.95
    assert len(study.bending(told, known, how, seed=1)) == 3
    with pytest.raises(InputError, match="sex: a class is empty"):
        women = study.Coded(known.codes, known.images, [row | {"sex": "F"} for row in known.rows])
        study.tell(women, other, "sex", how, seed=1)


def test_errors_are_in_the_units_they_are_named_for():
    real, drawn = torch.zeros(2, 1, 1, 2, 2), torch.full((2, 1, 1, 2, 2), 0.1)
    assert study.error(drawn, real, study.MINERAL).tolist() == pytest.approx([200, 200])
    assert study.error(drawn, real, study.SOFT).tolist() == pytest.approx([0.2, 0.2])
