"""The oracle is what it says: its attributes are in its volumes, and its layers carry what they should."""

import pytest
import torch
from oracle import GRID, INTENSITY, SPACING, TRAITS, Oracle, surface

from bonelib.core.random import torch_rng


def test_the_volumes_hold_the_attributes():
    bones = Oracle(entangled=True).double()
    z = bones.sample_latent(16, torch_rng(0, "codes")).double()
    density = bones.synthesize(z)[:, 0] * (INTENSITY[1] - INTENSITY[0]) + INTENSITY[0]
    assert density.shape == (16, *GRID) and density.min() > INTENSITY[0] and density.max() < INTENSITY[1]
    found = bones.attributes(z)
    # Mass of the middle slices: cortex and marrow of the two ellipses, by their areas
    area, thick = found["Tt.Ar"], found["Ct.Th"]
    short = (area / (torch.pi * found["aspect"])).sqrt()
    inner = torch.pi * (short - thick) * (short * found["aspect"] - thick)
    mass = (area - inner) * found["Ct.BMD"] + inner * found["Tb.BMD"]
    assert torch.allclose(density[:, 1:3].mean(1).sum((1, 2)) * SPACING**2, mass, rtol=0.02)
    # and the centre is marrow alone
    middle = density[:, 1:3, 16:20, 12:16].mean((1, 2, 3))
    assert torch.corrcoef(torch.stack([middle, found["Tb.BMD"]]))[0, 1] > 0.99


@pytest.mark.parametrize("latent", [8, 24])
def test_m_is_known_by_its_singular_vectors(latent):
    bones = Oracle(latent, entangled=True)
    _, s, v = torch.linalg.svd(bones.factorized_weight(), full_matrices=False)
    assert torch.allclose(s, bones.singular)
    assert torch.allclose((v @ bones.right).abs(), torch.eye(8).double(), atol=1e-9)


def test_every_code_has_its_own_bone():
    bones = Oracle().double()
    z = bones.sample_latent(1, torch_rng(0, "codes")).double()
    jacobian = torch.autograd.functional.jacobian(lambda z: bones.synthesize(z).flatten(), z)[:, 0]
    s = torch.linalg.svdvals(jacobian)
    assert s[-1] > 0.02 * s[0]


def test_a_layer_carries_its_attributes_and_no_other():
    bones = Oracle()
    styles = bones.sample_latent(2, torch_rng(0, "codes"))
    mixed = styles[:1, None].repeat(1, 3, 1)
    mixed[:, 1] = styles[1]
    source, target = bones.attributes(styles[:1]), bones.attributes(styles[1:])
    for name, value in bones.attributes(mixed).items():
        assert value == (target if TRAITS[name][2] == 1 else source)[name]
    assert not torch.equal(bones.synthesize(mixed), bones.synthesize(styles[:1]))


def test_a_direction_moves_its_attribute_alone_unless_entangled():
    z = torch.zeros(1, 8, dtype=torch.float64)
    for entangled in (False, True):
        bones = Oracle(entangled=entangled)
        before, after = bones.attributes(z), bones.attributes(z + bones.direction("Tb.BMD"))
        moved = {name for name in TRAITS if not torch.isclose(before[name], after[name], atol=1e-9)}
        assert after["Tb.BMD"] > before["Tb.BMD"] and (moved == {"Tb.BMD"}) is not entangled


@pytest.mark.parametrize(
    "kind, at, expected",
    [
        ("plane", [0.5 * 3**0.5, 0.0, 0.0], [0.0, 0.0]),
        ("sphere", [0.0, 2.0, 0.0], [0.5, 0.5]),
        ("saddle", [0.0, 0.0, 0.0], [-0.5, 0.5]),
    ],
)
def test_decision_surfaces_have_their_curvatures(kind, at, expected):
    f, at = surface(kind), torch.tensor(at, dtype=torch.float64)
    assert abs(f(at[None])) < 1e-12
    slope = torch.autograd.functional.jacobian(lambda x: f(x[None])[0], at)
    tangent = torch.linalg.svd(slope[None])[2][1:]
    hessian = torch.autograd.functional.hessian(lambda x: f(x[None])[0], at)
    found = torch.linalg.eigvalsh(tangent @ hessian @ tangent.T) / slope.norm()
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9)
