from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage

from bonelib import InputError
from bonelib.core.random import numpy_rng
from bonelib.evaluation import features, metrics
from bonelib.networks import resnet

FAMILIES = (features.random3d, features.spectrum)
GRID = (8, 40, 32)


def tubes(n, grid=GRID, *, name="tubes", blur=0.0, noise=0.05, stretch=1.0):
    """Bright rings around a textured inside, in the intensities of a network."""
    rng = numpy_rng(0, "test features", name)
    _, y, x = np.meshgrid(*(np.linspace(-1, 1, k) for k in grid), indexing="ij")
    volumes = np.empty((n, *grid), np.float32)
    for volume in volumes:
        high, wide = (0.75 * (1 + 0.05 * rng.standard_normal(2))) * (stretch, 1 / stretch)
        distance = np.hypot(y / high, x / wide)
        texture = ndimage.gaussian_filter(rng.standard_normal(grid), 1)
        clean = np.where(distance < 1, 0.9, 0.2)
        clean = np.where(distance < 0.85, 0.3 + 0.1 * texture / texture.std(), clean)
        volume[:] = ndimage.gaussian_filter(clean + noise * rng.standard_normal(grid), blur)
    return volumes.clip(0, 1)


@pytest.mark.parametrize("grid", [(4, 36, 28), (8, 72, 56), (32, 288, 224)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_grid_gives_finite_features_of_one_width(family, grid):
    found = family(numpy_rng(0, "any").random((2, *grid), dtype=np.float32))
    assert found.ndim == 2 and len(found) == 2 and np.isfinite(found).all()
    if family is features.random3d:
        assert found.shape[1] == 256


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_kinds_of_input_and_repeats_agree(family, monkeypatch):
    volumes = tubes(5)
    whole = family(volumes)
    np.testing.assert_array_equal(family(volumes), whole)
    np.testing.assert_array_equal(family(torch.from_numpy(volumes)), whole)
    np.testing.assert_allclose(family(volumes.astype(float)), whole, atol=1e-6)
    monkeypatch.setattr(features, "VOXELS_AT_ONCE", 2 * volumes[0].size)
    np.testing.assert_allclose(family(volumes), whole, atol=1e-4)


def test_the_random_network_is_its_seed_and_leaves_the_global_state():
    volumes, state = tubes(2), torch.get_rng_state()
    first = features.random3d(volumes, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not np.allclose(first, features.random3d(volumes, seed=2), atol=0.01)
    assert first.std(axis=0).min() > 0  # no dead channel


def test_every_other_filter_is_blind_to_brightness():
    dark, bright = features.random3d(np.stack([np.full(GRID, 0.2), np.full(GRID, 0.8)]))
    change = np.abs(bright - dark)[: features.CHANNELS[0]]
    assert change[::2].max() < 1e-5 and change[1::2].min() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "corruption",
    [
        [{"blur": s} for s in (0.5, 0.8, 1.2)],
        [{"noise": s} for s in (0.08, 0.12, 0.2)],
        [{"stretch": s} for s in (1.05, 1.1, 1.2)],
    ],
    ids=["blur", "noise", "shape"],
)
def test_distance_grows_with_every_corruption(family, corruption):
    real = family(tubes(24, name="real"))
    others = [family(tubes(24, name="other", **c)) for c in [{}, *corruption]]
    distances = [metrics.frechet_distance(real, other) for other in others]
    assert distances == sorted(distances)
    assert distances[-1] > 1.5 * distances[0]


def test_spectrum_puts_a_wave_into_its_bin():
    z, y, x = np.meshgrid(np.arange(16), np.arange(64), np.arange(64), indexing="ij")
    for cycles in (8, 20, 27):
        in_plane = features.spectrum(0.5 + 0.4 * np.sin(2 * np.pi * cycles / 64 * y)[None])[0]
        across = features.spectrum(0.5 + 0.4 * np.sin(2 * np.pi * cycles / 64 * x)[None])[0]
        assert in_plane[:16].argmax() == across[:16].argmax() == int(np.ceil(cycles / 64 / 0.5 * 16)) - 1
    along = features.spectrum(0.5 + 0.4 * np.sin(2 * np.pi * 5 / 16 * z)[None])[0]
    assert len(along) == 16 + 8
    assert along[16:].argmax() == 5 - 1
    assert along[:16].max() < -6  # nothing in-plane


def test_spectrum_falls_by_the_square_of_the_contrast():
    volumes = numpy_rng(0, "contrast").random((1, *GRID))
    drop = features.spectrum(volumes) - features.spectrum(0.5 + (volumes - 0.5) / 10)
    np.testing.assert_allclose(drop, 2, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_bad_volumes_are_refused(family):
    good = tubes(2)
    bad_voxel = good.copy()
    bad_voxel[0, 0, 0, 0] = np.nan
    for volumes, text in (
        (good[0], "shape"),
        (good[:0], "shape"),
        (1000 * good, "reach"),
        (-good, "reach"),
        (bad_voxel, "NaN"),
        ((good > 0.5).astype(int), "type"),
    ):
        with pytest.raises(InputError, match=text):
            family(volumes)


def test_a_grid_without_frequencies_is_refused():
    with pytest.raises(InputError, match="grid"):
        features.spectrum(np.zeros((1, 1, 8, 8)))


@pytest.fixture(scope="module")
def grader():
    config = {"grading": {"halvings": 1, "depth": 4}}
    torch.manual_seed(0)
    network = resnet.ResNet((8, 16), (1, 1)).eval()
    torch.nn.init.normal_(network.head.weight)
    return network, config


def test_grader_features_are_means_over_its_windows_on_its_grid(grader):
    volumes = torch.from_numpy(tubes(2, (24, 40, 32)))
    halves = volumes.reshape(2, 12, 2, 20, 2, 16, 2).mean(dim=(2, 4, 6))
    with torch.no_grad():
        expected = torch.stack([grader[0].features(halves[:, None, s : s + 4]) for s in (0, 4, 8)]).mean(0)
    np.testing.assert_allclose(features.graded(volumes, grader), expected, rtol=1e-4, atol=1e-5)
    assert features.families(grader)["vgs"](volumes).shape == (2, 32)


def test_chances_of_the_grades_are_probabilities(grader):
    found = features.grade_chances(tubes(3), grader)
    assert found.shape == (3, 5) and found.min() >= 0
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


def test_features_of_the_same_content_are_computed_once(tmp_path, grader):
    asked = []

    def count(volumes, seed=0):
        asked.append(seed)
        return features.random3d(volumes, seed)

    volumes = tubes(2)
    first = features.cached("random3d", partial(count, seed=1), volumes, tmp_path)
    again = features.cached("random3d", partial(count, seed=1), volumes.copy(), tmp_path)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, features.random3d(volumes, 1))
    assert asked == [1]
    features.cached("random3d", partial(count, seed=2), volumes, tmp_path)
    features.cached("random3d", partial(count, seed=1), volumes * np.float32(0.999), tmp_path)
    features.cached("random3d", partial(count, seed=1), volumes, None)
    assert asked == [1, 2, 1, 1] and len(list(tmp_path.iterdir())) == 3
    vgs = features.cached("vgs", features.families(grader)["vgs"], volumes, tmp_path)
    with torch.no_grad():
        grader[0].windows.add_(0.1)
    assert not np.allclose(vgs, features.cached("vgs", features.families(grader)["vgs"], volumes, tmp_path))
