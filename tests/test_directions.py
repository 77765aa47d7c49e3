"""Directions from labels, Fetty's networks and rule, and curvature, where the answers are known."""

import pytest
import torch

from bonelib import InputError
from bonelib.core.random import torch_rng
from bonelib.latent import directions as ds
from tests.oracle import Oracle, surface


def angle(a, b):
    cosine = float(a.double() @ b.double() / (a.norm() * b.norm()))
    return float(torch.rad2deg(torch.acos(torch.tensor(min(1.0, abs(cosine))))))


@pytest.fixture(scope="module")
def codes():
    return torch.randn(3000, 16, generator=torch_rng(0, "codes"))


@pytest.fixture(scope="module")
def oracle():
    return Oracle(latent=16, entangled=True).float()


@pytest.mark.parametrize("name", ["Tb.BMD", "Ct.Th"])
def test_planted_directions_are_found_within_two_degrees(oracle, codes, name):
    values = oracle.attributes(codes)[name].log()
    found, score = ds.ridge(codes, values)
    assert angle(found.vector, oracle.direction(name)) < 2 and score > 0.999
    assert torch.allclose(found.value(codes), values, atol=1e-2)
    labels = values > values.median()
    plane = ds.logistic(codes, labels, penalty=1e-4)
    assert angle(plane.vector, oracle.direction(name)) < 2 and ds.accuracy(plane.value(codes), labels) > 0.99


def test_a_ridge_on_noise_promises_nothing(codes):
    noise = torch.randn(200, generator=torch_rng(0, "noise"))
    assert ds.ridge(codes[:200], noise)[1] < 0.1
    patients = [str(i // 50) for i in range(200)]
    with pytest.raises(InputError, match="4 patients are too few"):
        ds.ridge(codes[:200], noise, patients)
    with pytest.raises(InputError, match="all the same"):
        ds.logistic(codes, torch.ones(3000, dtype=torch.bool))


def test_the_rule_of_selection():
    assert ds.chosen(0.98, 1.00, 0.98) == "logistic"  # Fetty's sex
    assert ds.chosen(0.98, 1.00, 0.99) == "logistic"  # and slice position
    assert ds.chosen(0.98, 1.00, 0.97) == "networks"
    assert ds.chosen(0.50, 1.00, 0.97) == "logistic"


def test_networks_learn_what_a_plane_cannot_and_find_their_way_back(codes):
    codes = codes[:1500, :2]
    labels = codes.norm(dim=1) > 1.18  # of half of the codes
    left_out = torch.arange(1500) % 5 == 0
    plain = ds.accuracy(ds.logistic(codes[~left_out], labels[~left_out]).value(codes[left_out]), labels[left_out])
    deep = ds.search(codes, labels, left_out, seed=1, tries=2, epochs=12)
    assert plain < 0.65 and deep.score > 0.85
    inner = ds.hidden(deep.network, codes)
    back = ds.search(inner, codes, left_out, seed=1, tries=2, epochs=12)
    assert back.score > 0.9 and ds.chosen(back.score, deep.score, plain) == "networks"
    again = ds.search(codes, labels, left_out, seed=1, tries=2, epochs=12)
    assert again.score == deep.score and again.widths == deep.widths


@pytest.mark.parametrize("d", [3, 32, 512])
def test_curvature_of_a_sphere(d):
    radius, sphere = 2.0, surface("sphere", 2.0)
    points = ds.surface_points(
        sphere,
        3 * torch.randn(64, d, generator=torch_rng(0, "p")) / d**0.5 * torch.linspace(0.1, 2, 64)[:, None],
        3,
        seed=1,
    )
    assert torch.allclose(points.norm(dim=1), torch.tensor(radius), rtol=1e-4)
    found = ds.curvature(sphere, points, seed=1, tangents=64)
    assert torch.allclose(found.mean, torch.tensor(1 / radius), rtol=0.02)
    assert torch.allclose(found.largest, torch.tensor(1 / radius), rtol=0.02)


def test_curvature_of_a_plane_and_a_saddle():
    points = torch.randn(64, 8, generator=torch_rng(0, "p"))
    flat = ds.curvature(surface("plane"), ds.surface_points(surface("plane"), points, 3, seed=1), seed=1)
    assert flat.mean.abs().max() < 1e-9 and flat.largest.abs().max() < 1e-9
    origin = torch.zeros(1, 8)
    saddle = ds.curvature(surface("saddle", 2.0), origin, seed=1)
    assert saddle.mean.abs().max() < 1e-6 and saddle.largest.abs() == pytest.approx(0.5, rel=0.02)
    uneven = ds.curvature(lambda x: x[:, -1] + x[:, 0].square(), origin, seed=1, tangents=4000)
    assert uneven.mean[0] == pytest.approx(2 / 7, rel=0.1) and uneven.largest[0] == pytest.approx(2, rel=0.02)
    with pytest.raises(InputError, match="one side"):
        ds.surface_points(lambda x: x.norm(dim=1) + 1, points, 3, seed=1)
