"""Visits whose change is known, mean bones whose answer is known, and sets whose histogram is counted."""

import numpy as np
import pytest
import torch
from oracle import INTENSITY, Oracle
from test_inversion import oracle_model

from bonelib import InputError
from bonelib.core.config import section
from bonelib.core.random import torch_rng
from bonelib.latent import attribute_model as editing
from bonelib.latent.atlas import distances, intrinsic_mean
from bonelib.latent.config import Refinement
from bonelib.latent.inversion import Inverter
from bonelib.scans.config import Preprocess
from bonelib.scans.dataset import Stacks
from bonelib.scans.phantom.population import Course, at_visit, sample_patient
from bonelib.studies import atlases, target_set
from bonelib.studies import visits as study
from bonelib.studies.config import VisitsAndAtlases

ORACLE = Oracle()
YEARS = (0.0, 1.0, 2.0, 3.0, 5.0)


def draw(codes):
    with torch.no_grad():
        return ORACLE.synthesize(codes)


def read(volumes):
    """Density of the middle of the marrow, over whole waves of its pattern."""
    low, high = INTENSITY
    return low + (high - low) * volumes[:, 0, :, 14:22, 10:18].mean((1, 2, 3))


@pytest.fixture(scope="module")
def tool():
    def of_codes(codes):
        return torch.stack([read(ORACLE.synthesize(codes)), ORACLE.attributes(codes)["Tt.Ar"]], 1)

    return editing.calibrate(of_codes, (study.TRAIT, "Tt.Ar"), ORACLE, seed=1, samples=100)[0]


def codes_of(n, seed=0):
    return 0.5 * torch.randn(n, 8, generator=torch_rng(seed, "codes"))


def on_lines(slope):
    """An arm whose codes lie on straight lines over the years, with the slopes (8,) or (patient, 8); and its codes."""
    codes = codes_of(5)[:, None] + torch.tensor(YEARS)[:, None] * torch.as_tensor(slope).reshape(-1, 1, 8)
    volumes = draw(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])
    return study.Arm(volumes, YEARS, np.zeros(codes.shape[:2]), list("abcde")), codes


def test_a_course_changes_what_it_names_by_as_much_as_it_says():
    course = Course((0.0, 1.0, 5.0), {"Tb.BMD": (-0.05, 0.0)})
    traits = sample_patient(1, 7)
    assert at_visit(traits, 1, 7, 3, course)["change"] == pytest.approx({"Tb.BMD": 0.75, "Ct.BMD": 1, "Ct.Th": 1})
    assert at_visit(traits, 1, 7, 5, course)["years"] == 7  # behind the last, one a year


def test_an_arm_has_the_known_visits_and_the_last_and_loses_what_is_asked():
    how = VisitsAndAtlases(patients=3, visits=6, known=2, change=-0.05, spread=0.0)
    arm = study.draw_arm(how, Preprocess(shape=(20, 72, 56), stack_slices=8), 0.4856, 1, 1)
    assert arm.volumes.shape == (3, 3, 1, 4, 36, 28) and arm.years == (0, 1, 5) and len(set(arm.patients)) == 3
    assert (arm.density[:, 2] / arm.density[:, 0] < 0.85).all() and (arm.density[:, 1] < arm.density[:, 0]).all()
    assert not torch.equal(arm.volumes[0, 0], arm.volumes[1, 0])


def test_lines_go_through_what_lies_on_them():
    arm, codes = on_lines(torch.randn(5, 8, generator=torch_rng(0, "slopes")))
    assert torch.allclose(study.line_at(codes[:, :4], YEARS[:4], 5.0), codes[:, 4], atol=1e-5)
    assert torch.allclose(study.slopes(codes, YEARS), codes[:, 1] - codes[:, 0], atol=1e-5)
    assert study.of_the_others(torch.tensor([1.0, 2.0, 6.0])).tolist() == [4.0, 3.5, 1.5]


def test_the_line_of_codes_finds_a_visit_that_lies_on_it(tool):
    arm, codes = on_lines(0.3 * torch.randn(5, 8, generator=torch_rng(0, "slopes")))
    found = study.predict(arm, codes, 4, draw, read, tool, seed=1)
    real = arm.volumes[:, -1]
    for way in (study.OWN, study.CHANGED, study.BEST):  # nothing is lost by inversion, so that all are exact
        assert (found[way] - real).abs().max() < 1e-4
    wrong = {way: study.errors(real, v, read, INTENSITY) for way, v in found.items()}
    assert (wrong[study.SAME][study.VOXEL] > 5).all() and (wrong[study.OTHERS][study.VOXEL] > 5).all()
    assert wrong[study.SAME][study.VOXEL] == pytest.approx(wrong[study.SAME_CODE][study.VOXEL], rel=1e-5)
    rows = {(r["method"], r["measure"]): r for r in study.table(wrong, arm.patients, seed=1, draws=20)}
    assert rows[study.OWN, f"{study.VOXEL}, smaller"]["value"] == 1 and rows[study.OWN, study.BIAS]["N"] == 5
    gain = rows[study.OWN, f"{study.VOXEL}, less by"]["value"]
    assert gain == pytest.approx(wrong[study.SAME][study.VOXEL].mean(), rel=1e-2)
    assert len(study.pivot(list(rows.values()))) == len(found)


def test_a_direction_that_all_share_is_found_in_the_others(tool):
    arm, codes = on_lines(0.2 * ORACLE.direction("Tb.BMD").float())
    found = study.predict(arm, codes, 4, draw, read, tool, seed=1)
    assert (found[study.OTHERS] - arm.volumes[:, -1]).abs().max() < 1e-4
    assert study.alike(codes, YEARS, arm.patients, seed=1, draws=10).value == pytest.approx(1)


def test_a_density_is_changed_by_what_is_asked(tool):
    codes, change = codes_of(4), torch.tensor([-20.0, -10.0, 10.0, 20.0])
    moved = study.with_change(tool, codes, change, 1)
    assert torch.allclose(read(draw(moved)) - read(draw(codes)), change, atol=0.02 * float(tool.span[0]))


def test_of_a_change_the_part_that_is_seen_is_counted():
    true = np.array([[1.0, 2.0, 4.0], [3.0, 1.0, 2.0]])
    seen = 0.4 * true + np.array([[7.0], [-2.0]])  # what differs between patients says nothing of a change
    seen, true = np.vstack([seen, [np.nan] * 3]), np.vstack([true, true[:1]])
    found = study.seen_change(seen, true, list("abc"), seed=1, draws=10)
    assert found.value == pytest.approx(0.4) and found.low == pytest.approx(0.4) and found.N == 2


def test_all_visits_of_a_patient_start_from_one_code():
    class Reads(torch.nn.Module):
        place = torch.device("cpu")

        def forward(self, volumes):
            return volumes.flatten(1)[:, :8]

    volumes = torch.rand(2, 3, 1, 4, 36, 28, generator=torch_rng(0, "visits"))
    how, found = Refinement(steps=1, weights=(1, 0, 0), rate=1e-9), Inverter(Reads(), None)
    codes = study.invert_visits(volumes, 2, oracle_model(), found, how, say=lambda *_, **__: None)
    wanted = volumes[:, :2].flatten(2)[..., :8].mean(1, keepdim=True)
    assert torch.allclose(codes, wanted.expand(-1, 3, -1), atol=1e-6)


def stacks(scans):
    rows = [
        dict(scan=s, patient=p, volume=i, start=z, split="train") for i, (s, p) in enumerate(scans) for z in (0, 8, 16)
    ]
    return Stacks(np.zeros((1, 1, 1, 1)), rows, {})


def test_two_scans_of_a_patient_are_named_or_found():
    data = stacks([("a1", "a"), ("b1", "b"), ("b2", "b"), ("b3", "b")])
    assert [(r["scan"], r["start"]) for r in study.two_visits(data, None)] == [("b1", 8), ("b2", 8)]
    assert [r["scan"] for r in study.two_visits(data, ("b3", "b1"))] == ["b3", "b1"]
    for names, says in ((("a1", "b1"), "of one patient"), (("a1", "a9"), "a9 is not among the stacks")):
        with pytest.raises(InputError, match=says):
            study.two_visits(data, names)
    with pytest.raises(InputError, match="no patient has two scans"):
        study.two_visits(stacks([("a1", "a"), ("b1", "b")]), None)
    assert [r["scan"] for r in atlases.one_a_patient(data.rows, 2)] == ["a1", "b1"]
    assert [r["start"] for r in atlases.one_a_patient(data.rows, 2)] == [8, 8]


def test_a_section_that_leaves_no_visit_or_no_bone_is_refused():
    for values, says in (
        (dict(known=6), "leaves no visit"),
        (dict(change=-0.15, spread=0.03), "may leave no bone"),
        (dict(density=[200, 100], shares=[1]), "density must rise"),
    ):
        with pytest.raises(InputError, match=says):
            section(VisitsAndAtlases, values, "visits_and_atlases")


# Mean bones


def test_the_intrinsic_mean_is_the_middle_of_an_arc_and_of_a_plane():
    def sphere(codes):
        return codes / codes.norm(dim=-1, keepdim=True)

    angles = torch.tensor([0.0, 0.3, 1.2])
    codes = torch.stack([angles.cos(), angles.sin(), torch.zeros(3)], 1)
    found = intrinsic_mean(sphere, codes, 9, 60)
    middle = sphere(found.code)
    assert float(torch.atan2(middle[1], middle[0])) == pytest.approx(0.5, abs=2e-3) and abs(float(middle[2])) < 1e-3
    lengths = distances(sphere, found.paths) * 3**0.5
    assert lengths == pytest.approx([0.5, 0.2, 0.7], abs=5e-3)
    flat = torch.randn(4, 3, generator=torch_rng(0, "flat"))
    plane = intrinsic_mean(lambda codes: 2 * codes, flat, 3, 60)
    assert torch.allclose(plane.code, flat.mean(0), atol=1e-3)
    with pytest.raises(InputError, match="at least 3"):
        intrinsic_mean(sphere, codes, 2, 5)


def test_no_way_is_shorter_than_the_geodesic_and_no_mean_nearer_than_the_intrinsic_one():
    codes = 2 * codes_of(3)
    found = intrinsic_mean(ORACLE.synthesize, codes, 4, 8)
    rows = {row[""]: row for row in atlases.straight_and_geodesic(found, codes, list("abc"), draw, seed=1, draws=10)}
    short, near = rows.values()
    assert short["value"] < short["high"] < 1 and near["value"] < 1


def linear(codes):
    """Volumes of 8 voxels that are the code, and what is read in them."""
    return codes.reshape(len(codes), 1, 2, 2, 2)


@pytest.mark.parametrize("part", [1.0, 0.5])
def test_an_atlas_follows_its_condition_by_as_much_as_its_codes_do(part):
    condition = np.linspace(100, 200, 30)
    codes = torch.randn(30, 8, generator=torch_rng(0, "codes"))
    codes[:, 0] = torch.from_numpy(part * condition)
    asked = {"density": (condition, condition), "half known": (np.where(np.arange(30) % 2, condition, np.nan),) * 2}
    rows, slopes = atlases.all_follow(
        codes, asked, [str(i) for i in range(30)], linear, lambda v: v.flatten(1)[:, 0], points=4, seed=1, draws=10
    )
    assert [row["N"] for row in slopes] == [30, 15] and len(rows) == 8
    for row in slopes:
        assert row["value"] == pytest.approx(part, rel=1e-3) and row["low"] == pytest.approx(row["high"], rel=1e-3)
    assert rows[0]["at"] == pytest.approx(rows[0]["asked"]) and rows[0]["measured"] == pytest.approx(part * 110)


def test_atlases_are_drawn_at_every_sex_and_between_quantiles_of_an_age():
    assert atlases.places(np.array([1.0, 0.0, 0.0, np.nan]), 5).tolist() == [0, 1]
    assert atlases.places(np.arange(11.0), 3).tolist() == [1, 5, 9]
    found = atlases.extremes(torch.arange(11.0)[:, None], {"age": np.arange(11.0)})
    assert list(found) == ["age: 1 and 9"] and torch.allclose(found["age: 1 and 9"], torch.tensor([[1.0], [9.0]]))


def test_a_mean_of_voxels_is_blurred_and_a_step_is_sharp():
    step = torch.zeros(1, 1, 2, 2, 2)
    step[..., 1] = 0.5
    assert atlases.sharpness(step) == pytest.approx([(4 * 0.25 / 8) ** 0.5])
    codes = torch.randn(12, 8, generator=torch_rng(0, "codes"))
    rows = atlases.sharp(linear(codes), codes, [str(i) for i in range(12)], linear, seed=1, draws=20)
    assert rows[0]["value"] == pytest.approx(rows[1]["value"]) and rows[0]["value"] < 0.5  # all is linear
    assert rows[2]["value"] == pytest.approx(1)


# A set to a histogram


def test_the_distance_of_a_histogram_is_counted():
    to = target_set.Histogram((0.0, 1.0, 2.0), (3.0, 1.0))
    assert to.quantiles(4).tolist() == pytest.approx([1 / 6, 0.5, 5 / 6, 1.5])
    assert to.distance(to.quantiles(50)) == pytest.approx(0.01)
    assert to.distance(np.full(9, 1.0)) == pytest.approx(0.75) and to.distance(np.full(9, 5.0)) == 1
    assert to.distance(np.append(to.quantiles(50), [np.nan] * 50)) == pytest.approx(0.5)  # not read, not of it


def test_a_set_has_the_histogram_that_samples_do_not_have(tool):
    samples = torch.randn(60, 8, generator=torch_rng(2, "samples"))
    found = editing.readings(tool.read, samples)
    low, high = float(tool.low[0]), float(tool.high[0])
    to = target_set.Histogram((low, (low + high) / 2, high), (1.0, 4.0))  # few are dense, and it asks for many
    made = target_set.draw_set(tool, samples, found, study.TRAIT, to, 40)
    sets = {"plain": found[:40, 0].numpy(), "set": target_set.read_of(tool, made.codes, study.TRAIT)}
    rows = target_set.compared(to, sets, seed=1, draws=10)
    assert rows[0]["value"] > 0.3 and rows[1]["value"] < 0.1 and 0 < made.moved.sum() < 40
    assert torch.equal(
        made.codes[~made.moved][0], samples[int((samples == made.codes[~made.moved][0]).all(1).nonzero())]
    )
    assert len(target_set.curves(sets)["set"][0]) == 40
    mean, size = target_set.checked(np.array([1.0, 2.0, 3.0]), np.array([3.0, 1.0, np.nan]), seed=1, draws=10)
    assert (mean["value"], size["value"], mean["N"]) == (0.5, 1.5, 2)
