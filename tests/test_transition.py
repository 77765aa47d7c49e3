"""Paths between codes: exact on maps whose geodesics are known, and on the oracle, whose attributes are."""

import numpy as np
import pytest
import torch
from oracle import Oracle

from bonelib import InputError
from bonelib.core.random import torch_rng
from bonelib.evaluation.compartments import overlap, read
from bonelib.latent import attribute_model as editing
from bonelib.latent import transition as tr
from bonelib.latent.codes import choose_pairs
from bonelib.latent.target_optimisation import TOLERANCE
from bonelib.scans.volumes import Volume


def test_the_published_weights():
    first, last = torch.randn(2, 3, 5)
    path = tr.line(first, last, (0, 0.25, 1))
    assert path.shape == (3, 3, 5) and torch.equal(path[0], first) and torch.equal(path[2], last)
    assert torch.allclose(path[1], 0.75 * first + 0.25 * last)


def test_an_arc_keeps_its_distance_from_the_middle_and_turns_evenly():
    middle, first, last = torch.randn(3, 2, 40, generator=torch_rng(4, "test"))
    path = tr.slerp(first, last, np.linspace(0, 1, 9), middle)
    away = (path - middle).flatten(1)
    assert torch.allclose(path[[0, -1]], torch.stack([first, last]), atol=1e-5)
    size = away.norm(dim=1)
    assert torch.allclose(size, torch.linspace(float(size[0]), float(size[-1]), 9), rtol=1e-4)
    turn = torch.arccos((away[1:] * away[:-1]).sum(1) / (size[1:] * size[:-1]))
    assert turn.std() < 1e-3 * turn.mean() and turn.mean() > 0.1
    assert (tr.line(first, last, [0.5])[0] - middle).norm() < 0.95 * size[4]  # where the straight line falls inwards
    assert torch.equal(tr.slerp(first, first, [0, 1], middle), tr.line(first, first, [0, 1]))


def test_codes_that_share_an_attribute_share_it_with_all_between_them():
    oracle = Oracle(latent=12)
    oracle.M = oracle.M.double()
    first, last = oracle.sample_latent(2, torch_rng(1, "test")).double()
    along = oracle.direction("Tb.BMD").double()
    last = last + (first - last) @ along * along  # as dense as the first, and another bone for all the rest
    found = oracle.attributes(tr.line(first, last, np.linspace(0, 1, 9)))
    assert (found["Tb.BMD"] / found["Tb.BMD"][0] - 1).abs().max() < 1e-6
    assert tr.overshoot(found["Tb.BMD"][None].numpy())[0] < 1e-6 * float(found["Tb.BMD"][0])
    assert found["Tt.Ar"].std() > 1


def test_a_geodesic_of_polar_coordinates_is_a_straight_line():
    def draw(codes):
        radius, angle = codes.T
        return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)

    straight = tr.line(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0]), np.linspace(0, 1, 17))
    found = tr.geodesic(draw, straight, 200)
    before, after = (tr.smoothness(draw(path).numpy()) for path in (straight, found))
    assert before["detour"] == pytest.approx(1 / np.sin(1), rel=2e-3)  # an arc of two radians over its chord
    assert before["path length"] == pytest.approx(before["detour"] ** 2, rel=1e-3) and before["jolt"] > 1
    assert after["detour"] == pytest.approx(1, abs=1e-3) and after["path length"] == pytest.approx(1, abs=2e-3)
    assert torch.equal(found[[0, -1]], straight[[0, -1]])


def test_a_geodesic_of_a_sphere_is_a_great_circle():
    def draw(codes):
        north, east = codes.T
        return torch.stack([north.cos() * east.cos(), north.cos() * east.sin(), north.sin()], 1)

    straight = tr.line(torch.tensor([0.9, 0.0]), torch.tensor([0.9, 2.0]), np.linspace(0, 1, 25))
    volumes = draw(tr.geodesic(draw, straight, 300))
    slerp = float(torch.acos(volumes[0] @ volumes[-1]))
    assert float(volumes.diff(dim=0).norm(dim=1).sum()) == pytest.approx(slerp, rel=1e-3)
    normal = torch.linalg.cross(volumes[0], volumes[-1])
    assert (volumes @ normal).abs().max() < 1e-2


def test_the_oracle_has_shorter_ways_than_the_straight_one():
    oracle = Oracle()
    path = tr.line(*oracle.sample_latent(2, torch_rng(2, "test")), np.linspace(0, 1, 9))
    found = tr.geodesic(oracle.synthesize, path, 20)
    assert tr.energy(oracle.synthesize(found)) < 0.98 * tr.energy(oracle.synthesize(path))


def test_smoothness_has_no_unit_and_sees_a_jump():
    even = np.linspace([0.0, 0.0], [3.0, 4.0], 9)
    assert tr.smoothness(even) == pytest.approx({"detour": 1, "path length": 1, "jolt": 0}, abs=1e-9)
    uneven = np.linspace(0, 1, 9)[:, None] ** 3 * [3.0, 4.0]
    found = tr.smoothness(uneven)
    assert found["detour"] == pytest.approx(1) and found["path length"] > 1.5 and found["jolt"] > 3
    assert tr.smoothness(7 * uneven) == pytest.approx(found)
    assert np.isnan(tr.smoothness(np.zeros((4, 2)))["detour"])
    with pytest.raises(InputError, match="2 points"):
        tr.smoothness(even[:2])


def test_beyond_the_ends():
    assert tr.overshoot([[1, 1.5, 2], [2, 0.5, 1], [1, 5, 2]]).tolist() == [0, 0.5, 3]


def test_pairs_are_low_and_of_two_patients():
    values = np.array([5.0, 1, 2, np.nan, 1.5, 9, 8, 7])
    patients = list("aabcdefg")
    pairs = choose_pairs(values, patients, 0.4, 10, np.random.default_rng(1))
    assert {frozenset(p) for p in pairs} == {frozenset(p) for p in ((1, 2), (1, 4), (2, 4))}
    assert len(choose_pairs(values, patients, 0.4, 2, np.random.default_rng(1))) == 2
    with pytest.raises(InputError, match="no two low ones of two patients"):
        choose_pairs(values[:2], "aa", 1, 3, np.random.default_rng(1))


def test_staying_is_counted_by_path_and_resampled_by_patient():
    inside, outside = [1.0, 1.2, 2.0], [1.0, 2.5, 2.0]
    values = np.array([inside] * 6 + [outside] * 3 + [[1, np.nan, 2]])
    patients = [(f"p{i}", f"q{i}") for i in range(10)]
    closed = np.ones((10, 3))
    closed[3:8, 1] = 0.2  # three paths within the ends, and two outside, have an open cortex
    table = tr.density_retention(values, closed, patients, low=2.0, margin=0.6, least=0.5, seed=1, draws=200)
    rows = {(row["paths"], row[""]): row for row in table}
    exact = rows["contours found", "share of paths within the ends"]
    assert exact["value"] == pytest.approx(6 / 9) and exact["N"] == 9 and exact["low"] < 6 / 9 < exact["high"]
    assert rows["contours found", "share of paths within the ends, up to 0.6"]["value"] == 1
    assert rows["contours found", "share of paths that stay low, up to 0.6"]["value"] == 1
    assert rows["contours found", "distance beyond the ends"]["value"] == pytest.approx(0.5 * 3 / 9)
    strict = tr.density_retention(values, closed, patients, low=2.0, margin=0.1, least=0.5, seed=1, draws=20)
    strict = {(row["paths"], row[""]): row["value"] for row in strict}
    assert strict["contours found", "share of paths that stay low, up to 0.1"] == pytest.approx(6 / 9)
    assert rows["contours found", "share of all paths"]["value"] == 0.9
    exact = rows["cortex closed", "share of paths within the ends"]
    assert exact["value"] == 0.75 and exact["N"] == 4 and rows["cortex closed", "share of all paths"]["value"] == 0.4


def ring(gap, noise=1):
    z, y, x = np.indices((8, 80, 60))
    radius = np.hypot(y - 40, x - 30)
    bone = (radius < 22) & (radius > 17) & ~((x > 30) & (abs(y - 40) < gap))
    density = 150.0 * (radius < 22) + 700.0 * bone + noise * np.random.default_rng(1).normal(0, 40, radius.shape)
    return Volume(density.astype(np.float32), (0.3, 0.3, 0.3), "mgHA")


def test_a_reading_tells_area_densities_and_whether_the_cortex_is_closed():
    found = read(ring(0))
    assert found.traits["Tt.Ar"] == pytest.approx(np.pi * (22 * 0.3) ** 2, rel=0.03)
    assert found.traits["Tb.BMD"] == pytest.approx(150, rel=0.1) and found.traits["Ct.BMD"] == pytest.approx(
        850, rel=0.1
    )
    assert found.traits["closed slices"] == 1 and read(ring(3)).traits["closed slices"] == 0
    assert overlap(found.outline, found.outline) == 1 > overlap(found.outline, np.roll(found.outline, 9, 1)) > 0.5
    nothing = read(Volume(np.zeros((8, 80, 60), np.float32), (0.3, 0.3, 0.3), "mgHA"))
    assert not nothing.outline.any() and all(np.isnan(value) for value in nothing.traits.values())
    assert np.isnan(overlap(found.outline, nothing.outline))


@pytest.mark.parametrize("layers", [False, True])
def test_a_path_is_held_to_its_ends(layers):
    oracle = Oracle(latent=12, entangled=True).float()
    names = ("Tt.Ar", "Tb.BMD")

    def read(codes):
        found = oracle.attributes(codes if codes.dim() == 2 else codes.mean(1))
        return torch.stack([found[name] for name in names], 1)

    tool, codes, _ = editing.calibrate(read, names, oracle, seed=1, samples=400)
    weights, ends = (0, 0.25, 0.5, 1), codes[:8].unflatten(0, (2, 4))
    ends = ends[:, :, None].expand(-1, -1, 3, -1) if layers else ends
    paths = torch.stack([tr.line(a, b, weights) for a, b in ends.transpose(0, 1)])
    paths[:, 2] += 0.5 * oracle.direction("Tb.BMD").float()  # off the line
    found = tr.density_constrained_path(tool, paths, weights, "Tb.BMD")
    values = torch.stack([read(path)[:, 1] for path in found])
    straight = torch.stack([tr.line(*row[[0, -1]], weights) for row in values])
    assert ((values - straight).abs() <= TOLERANCE * tool.span[1]).all()
    assert torch.equal(found[:, [0, -1]], paths[:, [0, -1]]) and not torch.equal(found, paths)

    def blind(codes):  # the first path ends at a bone that cannot be read
        values = read(codes)
        return torch.where((values - read(paths[0, :1])).abs() < 1e-3, torch.nan, values)

    assert torch.equal(tr.density_constrained_path(tool._replace(read=blind), paths, weights, "Tb.BMD")[0], paths[0])


def test_every_path_and_density_is_judged_alike():
    rng = np.random.default_rng(1)
    found = {path: {t: (rng.random((5, 3)), np.ones((5, 3))) for t in ("Tb.BMD", "Ct.BMD")} for path in ("a", "b")}
    names = {t: [(str(i), str(i + 1)) for i in range(5)] for t in ("Tb.BMD", "Ct.BMD")}
    limits, how = {t: dict(low=0.5, margin=0.1) for t in names}, dict(least=0.5, seed=1, draws=20)
    rows = tr.all_density_retention(found, names, limits, **how)
    alone = tr.density_retention(*found["b"]["Ct.BMD"], names["Ct.BMD"], **limits["Ct.BMD"], **how)
    assert [row for row in rows if (row["path"], row["density"]) == ("b", "Ct.BMD")] == [
        {"path": "b", "density": "Ct.BMD"} | row for row in alone
    ]
    assert len(rows) == 4 * len(alone)
