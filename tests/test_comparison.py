"""Real against drawn bones by the ruler, on tubes of known size."""

import numpy as np
import pytest

from bonelib.scans.volumes import Volume
from bonelib.studies import trait_comparison as comparison


def summary(volumes, seed):
    found = [comparison.measured(v) for v in volumes]
    of = comparison.summary(volumes, found, range(len(volumes)), seed=seed, draws=20)
    assert all(set(row) >= {"value", "low", "high", "n"} for row in of.values())
    return {"N": of["contours found"]["n"]} | {key: row["value"] for key, row in of.items()}


def ring(hole=True, gap=0, seed=0):
    z, y, x = np.indices((8, 80, 60))
    radius = np.hypot(y - 40, x - 30)
    bone = (radius < 22) & ((radius > 17) if hole else True) & ~((x > 30) & (abs(y - 40) < gap))
    density = 50.0 * (radius < 22) + 900.0 * bone + np.random.default_rng(seed).normal(0, 40, radius.shape)
    return Volume(density.astype(np.float32), (0.3, 0.3, 0.3), "mgHA")


def test_bones_without_contours_are_counted_not_measured():
    found = summary([ring(), ring(hole=False), ring(seed=1)], seed=1)
    assert found["N"] == 3 and found["contours found"] == pytest.approx(2 / 3) and abs(found["fixed pattern"]) < 0.1
    assert found["Tt.Ar"] == pytest.approx(np.pi * (22 * 0.3) ** 2, rel=0.05) and found["closed slices"] == 1
    assert summary([ring(), ring()], seed=1)["fixed pattern"] > 0.99
    nothing = summary([ring(hole=False)], seed=1)
    assert nothing["contours found"] == 0 and nothing["fixed pattern"] is None and nothing["Tt.Ar"] is None


def test_an_open_ring_has_contours_but_no_closed_slices():
    found = summary([ring(gap=3), ring()], seed=1)
    assert found["contours found"] == 1 and found["closed slices"] == 0.5


def test_a_summary_has_intervals_by_patients_and_numbers_beside_those_of_other_reals():
    rng = np.random.default_rng(2)
    found = [result(rng, shift=i // 10) | {"interior": np.ones((2, 8, 8), bool)} for i in range(40)]
    for one in found:
        one["traits"][comparison.CLOSED] = 1.0
    volumes = [Volume(rng.standard_normal((2, 8, 8)), (0.3,) * 3, "mgHA") for _ in found]
    alone = comparison.summary(volumes, found, range(40), seed=1, draws=200)
    patients = comparison.summary(volumes, found, [i // 10 for i in range(40)], seed=1, draws=200)
    trait = alone["Tb.N"]
    assert trait["low"] < trait["value"] < trait["high"] and trait["n"] == 40
    assert trait["value"] == pytest.approx(1.5, abs=0.5)
    assert patients["Tb.N"]["high"] - patients["Tb.N"]["low"] > 1.5 * (trait["high"] - trait["low"])
    assert alone["fixed pattern"]["low"] <= alone["fixed pattern"]["value"] <= alone["fixed pattern"]["high"]
    numbers = comparison.as_numbers({"other real": alone, "m 1": patients})
    assert numbers["m 1.Tb.N.real_against_real"] == trait["value"] == numbers["other real.Tb.N"]
    table = comparison.side_by_side({"other real": alone, "m 1": patients})
    assert [row[""] for row in table] == list(alone) and table[1]["m 1"].endswith("N=40")


def test_traits_are_features_if_enough_bones_were_measured():
    sets, patients = groups(shift=3.0), [f"p{i // 2}" for i in range(40)]
    sets["good"][5:] = [None] * 35
    features, owners = comparison.trait_features(sets, patients)
    assert list(features) == ["real", "other real", "bad"] and owners == patients
    np.testing.assert_allclose(features["real"].std(axis=0), 1)
    assert features["bad"].mean() == pytest.approx(3, abs=0.7) and features["bad"].shape == (40, len(comparison.TRAITS))
    assert comparison.trait_features(sets, [f"p{i // 5}" for i in range(40)])[0] == {}


def result(rng, shift=0.0, mix=0.0):
    """A measured volume of which the traits are drawn."""
    common = rng.standard_normal()
    traits = {t: shift + (1 - mix) * rng.standard_normal() + mix * common for t in comparison.TRAITS}
    power = dict.fromkeys(comparison.REGIONS, 4 + shift + 0.1 * rng.standard_normal(comparison.BINS))
    return dict(traits=traits, spectra=power)


def groups(**how):
    rng = np.random.default_rng(0)
    names = {"real": {}, "other real": {}, "good": {}, "bad": how}
    return {name: [result(rng, **given) for _ in range(40)] for name, given in names.items()}


def test_trait_distances_are_in_real_sds_and_see_lost_correlations():
    patients = [f"p{i // 2}" for i in range(40)]
    shifted = comparison.trait_distances(groups(shift=2.0), patients, seed=1, draws=20)
    for row in shifted:
        if row["setting"] == "bad" and row["trait"] != "correlations":
            assert row["value"] == pytest.approx(2, abs=0.7) and row["low"] > row["real_against_real"]
        if row["setting"] == "good":
            assert row["value"] < 0.6
    assert {row["trait"] for row in shifted} == {*comparison.TRAITS, "correlations"}
    mixed = comparison.trait_distances(groups(mix=0.9), patients, seed=1, draws=20)
    found = {row["setting"]: row["value"] for row in mixed if row["trait"] == "correlations"}
    assert found["bad"] > 0.8 > 0.3 > found["good"]


def test_spectral_distance_is_that_of_the_mean_log_power():
    patients = [f"p{i // 2}" for i in range(40)]
    rows, curves = comparison.spectral_distances(groups(shift=0.5), patients, seed=1, draws=20)
    for row in rows:
        expected = 0.5 if row["setting"] == "bad" else 0.0
        assert row["value"] == pytest.approx(expected, abs=0.06) and row["low"] <= row["value"] <= row["high"]
    assert len(curves) == comparison.BINS and curves[0]["background, real"] == pytest.approx(4, abs=0.1)


def test_volumes_without_contours_have_no_distances():
    assert comparison.trait_distances({"real": [None] * 9, "other real": [None] * 9}, ["p"] * 9, seed=1, draws=2) == []


def test_a_wave_is_in_its_bin_and_white_noise_has_its_variance_whatever_the_region():
    rng = np.random.default_rng(1)
    noise = Volume(rng.normal(0, 50, (6, 64, 56)).astype(np.float32), (0.1,) * 3, "mgHA")
    region = np.zeros(noise.shape, bool)
    region[:, 10:50, 8:40] = True
    for where in (region, np.ones_like(region)):
        np.testing.assert_allclose(comparison.spectrum(noise, where), np.log10(50**2), atol=0.25)
    wave = noise.with_voxels(300 * np.sin(2 * np.pi * 0.2 * np.arange(56)) + np.zeros(noise.shape, np.float32))
    assert comparison.spectrum(wave, region).argmax() == int(np.ceil(0.2 / 0.5 * comparison.BINS)) - 1
    assert np.isnan(comparison.spectrum(noise, region & False)).all()
