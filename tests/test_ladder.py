"""Corruptions do what they are named for, more of it the stronger they are."""

import numpy as np
import pytest
from scipy import ndimage

from bonelib import InputError
from bonelib.evaluation import corruption
from bonelib.evaluation.contours import BONE
from bonelib.randomness import numpy_rng
from bonelib.scans.volumes import Volume

STRENGTHS = (0, 0.25, 0.5, 0.75, 1)


def bone():
    """A tube of cortex around a sponge, .2 mm voxels, and its interior."""
    _, y, x = np.indices((12, 80, 64))
    radius = np.hypot(y - 40, x - 32)
    sponge = ndimage.gaussian_filter(numpy_rng(0, "sponge").standard_normal(radius.shape), 1.2)
    density = np.where(radius < 26, np.where(sponge > 0.4 * sponge.std(), 600.0, 50.0), 0.0)
    density[(radius > 22) & (radius < 26)] = 1000
    return Volume(density.astype(np.float32), (0.2, 0.2, 0.2), "mgHA"), radius < 20


def damage(name, strength):
    volume, interior = bone()
    return corruption.VOLUMES[name](volume, strength, numpy_rng(1, "corruption", name), interior).voxels - volume.voxels


@pytest.mark.parametrize("name", corruption.VOLUMES)
def test_damage_grows_with_strength_from_none_and_comes_again(name):
    sizes = [float(np.square(damage(name, s)).mean()) for s in STRENGTHS]
    assert sizes[0] < 1e-6 and (np.diff(sizes) > 0).all()
    np.testing.assert_array_equal(damage(name, 0.5), damage(name, 0.5))


def test_noise_has_its_sd_and_motion_is_a_share_of_one_residual():
    assert damage("noise", 0.5).std() == pytest.approx(0.5 * corruption.NOISE_MG, rel=0.02)
    np.testing.assert_allclose(damage("motion", 0.5), 0.5 * damage("motion", 1), atol=0.01)


@pytest.mark.parametrize("name", ["thinned trabeculae", "perforated plates"])
def test_trabecular_damage_takes_bone_and_leaves_the_cortex(name):
    volume, interior = bone()
    change = damage(name, 1)
    assert not change[~interior].any() and change.max() <= 0
    before, after = (interior & (v > BONE) for v in (volume.voxels, volume.voxels + change))
    assert 0 < after.sum() < 0.9 * before.sum()


def test_thinning_takes_the_voxels_at_the_surface():
    volume, interior = bone()
    core = ndimage.binary_erosion(volume.voxels > BONE)
    assert not damage("thinned trabeculae", 1)[core].any()


def test_weaker_perforation_is_part_of_the_stronger_one():
    weak, strong = damage("perforated plates", 0.25), damage("perforated plates", 1)
    assert (strong[weak < 0] < 0).all()


def test_sets_lose_patients_modes_and_privacy():
    chosen = np.arange(100, 124)
    kinds = [len(set(corruption.duplicated(chosen, s, numpy_rng(1, "sets")))) for s in STRENGTHS]
    assert kinds[0] == 24 and (np.diff(kinds) < 0).all() and kinds[-1] == corruption.REPEATED
    trait = numpy_rng(2, "trait").standard_normal(90)
    sets = [corruption.dropped(trait, 24, s, numpy_rng(1, "sets")) for s in STRENGTHS]
    assert all(len(set(s)) == 24 for s in sets)
    assert trait[sets[-1]].max() <= np.sort(trait)[29] and trait[sets[0]].max() > np.sort(trait)[60]
    copies = [corruption.copied(24, 80, s, numpy_rng(1, "sets")) for s in STRENGTHS]
    assert [len(c[0]) for c in copies] == [0, 3, 6, 9, 12] and set(copies[1][0]) < set(copies[2][0])
    assert all(len(set(source)) == len(source) for _, source in copies)


def test_bad_strengths_and_sets_are_refused():
    with pytest.raises(InputError, match="strength is 1.5"):
        damage("noise", 1.5)
    with pytest.raises(InputError, match="3 values"):
        corruption.dropped(np.arange(3.0), 24, 0.5, numpy_rng(1, "sets"))
