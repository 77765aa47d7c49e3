import numpy as np
import pytest
from scipy import ndimage

from bonelib import InputError
from bonelib.core.random import numpy_rng
from bonelib.evaluation.similarity import diversity, ms_ssim


def textures(n, seed=0, grid=(8, 20, 16)):
    fields = ndimage.gaussian_filter(numpy_rng(seed, "test similarity").standard_normal((n, *grid)), (0, 1, 1, 1))
    return (0.5 + 0.3 * fields / fields.std()).clip(0, 1).astype(np.float32)


def test_one_scale_agrees_with_a_computation_voxel_by_voxel():
    a, b = textures(1)[0].astype(float), textures(1, seed=1)[0].astype(float)
    taps = np.exp(-0.5 * (np.arange(-3, 4) / 1.5) ** 2)
    window = taps[:, None, None] * taps[:, None] * taps
    window /= window.sum()
    values = []
    for z, y, x in np.ndindex(2, 14, 10):
        p, q = (v[z : z + 7, y : y + 7, x : x + 7] for v in (a, b))
        mp, mq = (window * p).sum(), (window * q).sum()
        vp, vq, c = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum(), (window * (p - mp) * (q - mq)).sum()
        luminance = (2 * mp * mq + 1e-4) / (mp**2 + mq**2 + 1e-4)
        values.append(luminance * (2 * c + 9e-4) / (vp + vq + 9e-4))
    expected = max(np.mean(values), 0)
    assert ms_ssim(a[None], b[None])[0] == pytest.approx(expected, abs=1e-5)


def test_equal_volumes_score_one_and_noise_lowers_the_score():
    a = textures(2, grid=(16, 32, 28))
    rng = numpy_rng(3, "noise")
    noise = rng.standard_normal(a.shape).astype(np.float32)
    scores = [ms_ssim(a, a + level * noise).mean() for level in (0, 0.05, 0.1, 0.2, 0.4)]
    assert scores[0] == pytest.approx(1, abs=1e-6) and (np.diff(scores) < 0).all()


def test_a_set_that_repeats_itself_is_less_various():
    volumes = textures(6)
    repeated = volumes[[0, 0, 0, 1, 1, 1]]
    assert diversity(volumes)["high"] < diversity(repeated)["value"] < 1
    assert (diversity(volumes)["n"], diversity(volumes)["pairs"], diversity(volumes, pairs=4)["pairs"]) == (6, 15, 4)
    assert diversity(volumes, pairs=4, seed=2) == diversity(volumes, pairs=4, seed=2)


def test_two_volumes_of_one_patient_are_no_pair():
    volumes = textures(4)[[0, 0, 1, 1, 2, 2, 3, 3]]
    found = diversity(volumes, list("aabbccdd"))
    assert found["pairs"] == 24 and found["value"] == pytest.approx(diversity(textures(4))["value"], abs=1e-6)
    assert found["low"] < found["value"] < found["high"]
    assert diversity(volumes)["value"] > found["value"] + 0.05
    none = diversity(volumes[:2], ["a", "a"])
    assert none["value"] is None and none["low"] is None and none["pairs"] == 0


def test_volumes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="from 7 on"):
        ms_ssim(textures(2), textures(3))
    with pytest.raises(InputError, match="from 7 on"):
        ms_ssim(textures(2)[:, :6], textures(2)[:, :6])
