"""Effects of directions, and targets asked of bones, on a renderer whose attributes are known."""

import numpy as np
import pytest
import torch

from bonelib import InputError
from bonelib.core.random import torch_rng
from bonelib.latent import atlas, directions, effects
from bonelib.latent import attribute_model as editing
from bonelib.latent import target_search as asking
from bonelib.latent.target_optimisation import move
from bonelib.scans.volumes import Volume
from tests.oracle import TRAITS, Oracle

NAMES = ("Tt.Ar", "Tb.BMD", "Ct.BMD", "Ct.Th")
ORACLE = Oracle(latent=12).float()


def read(codes):
    found = ORACLE.attributes(codes)
    return torch.stack([found[name] for name in NAMES], 1)


def blind(codes):
    return read(codes) * torch.nan


def codes(n):
    return 0.5 * torch.randn(n, 12, generator=torch_rng(0, "codes of effects"))


@pytest.fixture(scope="module")
def calibrated():
    return editing.calibrate(read, NAMES, ORACLE, seed=1, samples=300)


def test_an_effect_is_what_the_renderer_does_and_nothing_else(calibrated):
    tool, some, step = calibrated[0], codes(6), 0.5
    groups = ["a", "a", "b", "c", "d", "e"]
    vectors = {name: ORACLE.direction(name) for name in NAMES}
    rows = effects.effect_matrix(tool, some, vectors, groups, step=step, seed=1, draws=50)
    assert len(rows) == 16
    for row in rows:
        k = NAMES.index(row["attribute"])
        if row["direction"] != row["attribute"]:
            assert abs(row["share of range"]) < 1e-4  # the renderer's attributes lie at right angles
            continue
        per_unit = float(ORACLE.M[list(TRAITS).index(row["attribute"])].norm()) * TRAITS[row["attribute"]][1]
        expected = float(read(some)[:, k].mean()) * np.sinh(per_unit * step) / step
        assert row["effect"] == pytest.approx(expected, rel=1e-3) and row["N"] == 6 and row["cross-talk"] < 1e-3
        assert row["low"] < row["effect"] < row["high"]
        assert row["share of range"] == pytest.approx(row["effect"] / float(tool.span[k]), rel=1e-5)


def test_a_response_is_linear_as_far_as_it_is():
    steps = np.array([-4.0, -2, -1, 0, 1, 2, 4])
    assert effects.linear_range(steps, 3 * steps) == 4
    assert effects.linear_range(steps, 3 * steps.clip(-2, 2)) == 2
    assert effects.linear_range(steps, np.where(steps > 3, np.nan, 3 * steps)) == 2
    assert effects.linear_range(steps, np.full(7, np.nan)) == 0


def test_the_reach_of_a_direction_is_that_of_the_attribute_it_moves_most(calibrated):
    tool, some = calibrated[0], codes(3)
    vectors = {"wide": ORACLE.direction("Tt.Ar"), "dense": ORACLE.direction("Tb.BMD")}
    matrix = effects.effect_matrix(tool, some, vectors, ["a", "b", "c"], step=0.1, seed=1, draws=10)
    found = effects.reaches(tool, some, vectors, matrix, (0.05, 0.1, 4.0))
    assert [row["attribute"] for row in found] == ["Tt.Ar", "Tb.BMD"]
    assert all(row["linear up to"] == pytest.approx(0.1) for row in found)  # the attributes are exponentials


def test_effects_go_with_the_rank_of_their_directions(calibrated):
    some, groups = codes(5), list("abcde")
    vectors = torch.linalg.svd(ORACLE.M)[2]  # of length one, the strongest first; the last four do nothing
    size, rows = effects.by_rank(calibrated[0], some, vectors, groups, seed=1, draws=20)
    assert size.shape == (12, 4) and [row["N"] for row in rows] == [5] * 4
    carrier = [int((vectors @ ORACLE.direction(name)).abs().argmax()) for name in NAMES]
    assert size.argmax(0).tolist() == carrier and np.abs(size[8:]).max() < 1e-4
    for row in rows:
        assert row["effect, low"] <= row["effect, high"] and -1 <= row["effect, rank"] <= 1


def test_targets_are_met_by_the_loop_held_apart_and_refused_beyond_the_range(calibrated):
    tool, samples, found = calibrated
    straight, scores = directions.ridges(samples, found, NAMES)
    assert all(row["R2, left out"] > 0.9 for row in scores)
    bones = effects.subjects(tool, codes(5), list("abcde"), samples, 4)
    assert bones.sources == ["scan"] * 4 + ["sample"] * 4 and bones.groups[:4] == list("abcd")
    shrunk = {name: direction._replace(slope=1.0) for name, direction in straight.items()}
    lines = {f"ridge {name}": straight[name].vector for name in NAMES}
    matrix = effects.effect_matrix(tool, samples[:40], lines, list(range(40)), step=0.1, seed=1, draws=5)
    again = effects.scaled(shrunk, matrix)
    assert all(again[name].slope == pytest.approx(straight[name].slope, rel=0.1) for name in NAMES)
    hand = effects.sliders(tool, straight, {"n1": ORACLE.right[:, 0]}, 3.0)
    assert list(hand)[1] == "Tb.BMD, mg HA/cm3" and hand["n1"][1:] == (-3, 3)
    vector, low, high = hand["Tb.BMD, mg HA/cm3"]
    assert float((read(0.1 * (high - low) * vector[None]) - read(torch.zeros(1, 12)))[0, 1]) == pytest.approx(
        0.1 * float(tool.span[1]), rel=0.15
    )
    rows, ends = asking.search_targets(tool, *bones, 8, straight, seed=1)
    for row, end in zip(rows, ends, strict=True):
        k = NAMES.index(row["attribute"])
        assert tool.low[k] <= row["asked"] <= tool.high[k]
        assert float(read(end[None])[0, k]) == pytest.approx(row["closed measured"], rel=1e-4)
    columns = asking.asked_table(rows, seed=1, draws=30)
    assert list(columns) == ["all", "scan", "sample"] and columns["all"]["N"] == 8
    assert columns["all"]["closed loop within 2 %"] == np.mean([r["closed error"] <= 0.02 for r in rows]) > 0.8
    assert columns["all"]["side effect, closed over open"] < 0.5
    assert asking.with_intervals(columns)[2]["all"].count("to") == 1
    no = asking.infeasible_targets(tool, bones.codes, 8, NAMES, seed=1)
    assert [row["refused"] for row in no] == [True] * 8 and all("calibrated range" in row["reason"] for row in no)


def test_the_slow_ruler_confirms_what_it_sees_and_counts_what_it_does_not():
    rows = [{"attribute": "Ct.Th", "start": 1.0, "closed measured": 1.0 + change} for change in (-0.2, 0.2, 0.4, 0.1)]
    before = [{"Ct.Th": 1.0, "Tt.Ar": 1.0, "closed slices": share} for share in (1, 1, 0.3, 1)]
    after = [{"Ct.Th": thick, "Tt.Ar": 1.0, "closed slices": 1.0} for thick in (0.9, 1.1, 1.4)] + [None]
    thick, closed, area, _ = asking.verified_by_morphometry(rows, before, after, ("Ct.Th", "Tt.Ar"), least=0.5)
    assert (thick["bones"], thick["N"], thick["of"]) == ("contours found", 3, 4)
    assert thick["measured over read"] == pytest.approx((0.02 + 0.02 + 0.16) / 0.24)
    assert (closed["bones"], closed["N"]) == ("cortex closed", 2)
    assert closed["measured over read"] == pytest.approx(0.5) and np.isnan(closed["r"])
    assert area["N"] == 0 and np.isnan(area["measured over read"])
    nothing = [row | {"Ct.Th": np.nan} for row in before]
    assert asking.verified_by_morphometry(rows, before, nothing, ("Ct.Th",), least=0.5)[0]["N"] == 0


def test_the_slow_ruler_tells_whether_a_cortex_is_closed():
    z, y, x = np.indices((6, 80, 60))
    radius = np.hypot(y - 40, x - 30)
    ring = (200.0 * (radius < 22) + 700.0 * ((radius < 22) & (radius > 18))).astype(np.float32)
    found = asking.measure_with_closure(Volume(ring, (0.3, 0.3, 0.3), "mgHA"))
    assert found["closed slices"] == 1 and found["Tt.Ar"] == pytest.approx(np.pi * (22 * 0.3) ** 2, rel=0.05)
    assert asking.measure_with_closure(Volume(np.zeros_like(ring), (0.3, 0.3, 0.3), "mgHA")) is None


def test_an_atlas_of_a_density_has_it(calibrated):
    some = codes(40)
    people = {str(i): {"age": str(50 + i), "sex": "FM"[i % 2]} for i in range(40)}
    rows = [{"patient": str(i)} for i in range(40)]
    known = atlas.conditions(rows, people, read(some)[:, 1])
    assert list(known) == ["age", "sex", "Tb.BMD"] and "age" not in atlas.conditions(rows, {}, read(some)[:, 1])
    means, table = atlas.atlases(calibrated[0], some, known)
    assert {name: len(part) for name, part in means.items()} == {"mean": 1, "age": 3, "sex": 2, "Tb.BMD": 3}
    assert torch.allclose(means["mean"][0], some.mean(0), atol=1e-6)
    for row in table[-3:]:
        assert row["Tb.BMD"] == pytest.approx(row["at"], rel=0.05)
    line = torch.linspace(0, 1, 5)[:, None] * torch.ones(5, 12)
    assert torch.allclose(atlas.atlas(line, np.arange(5.0)[:, None], np.array([[6.0]])), torch.full((1, 12), 1.5))


def test_where_nothing_can_be_read_nothing_is_asked_and_all_is_said():
    tool, samples, found = editing.calibrate(blind, NAMES, ORACLE, seed=1, samples=40)
    assert not tool.calibrated and found.isnan().all()
    with pytest.raises(InputError, match="nothing can be asked for"):
        move(tool, samples[:1], {"Tb.BMD": 150})
    straight, scores = directions.ridges(samples[:0], found[:0], NAMES)
    assert straight == {} and all(np.isnan(row["R2, left out"]) for row in scores)
    assert directions.compare_linear_nonlinear(
        samples[:0], found[:0, 0], seed=1, tries=1, epochs=1, points=1, tangents=1
    ) == {"N": 0}
    bones = effects.subjects(tool, codes(3), list("abc"), samples, 2)
    vectors = {"dense": ORACLE.direction("Tb.BMD")}
    matrix = effects.effect_matrix(tool, bones.codes, vectors, bones.groups, step=1.0, seed=1, draws=5)
    assert [row["N"] for row in matrix] == [0] * 4 and all(np.isnan(row["effect"]) for row in matrix)
    assert effects.reaches(tool, bones.codes, vectors, matrix, (1.0,))[0]["linear up to"] == 0
    size, rows = effects.by_rank(tool, bones.codes, torch.eye(12), bones.groups, seed=1, draws=5)
    assert np.isnan(size).all() and [row["N"] for row in rows] == [0] * 4
    rows, ends = asking.search_targets(tool, *bones, 4, {}, seed=1)
    assert rows == [] and len(ends) == 0 and asking.infeasible_targets(tool, bones.codes, 4, NAMES, seed=1) == []
    assert asking.with_intervals(asking.asked_table(rows, seed=1, draws=5)) == [{"": "N", "all": "0"}]
