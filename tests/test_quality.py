"""The quality table: a generator that copies the real distribution scores as real bones do, a bad one does not."""

import numpy as np
import pytest

from bonelib import InputError
from bonelib.evaluation.features import families, scaled, standardised
from bonelib.latent import sampling
from bonelib.scans.tables import as_markdown, read_table
from bonelib.studies import image_quality as iq


def textures(n, seed, smooth=False):
    rng = np.random.default_rng(seed)
    values = rng.normal(0.4, 0.1, (n, 8, 36, 28)) + rng.normal(0, 0.05, (n, 1, 1, 1))
    if smooth:
        values = values.mean(axis=1, keepdims=True).repeat(8, axis=1)
    return values.clip(0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def sets():
    return {"real": textures(24, 0), "other real": textures(24, 1), "progan 5": textures(24, 2)} | {
        "progan 1.8": textures(24, 3, True)
    }


PATIENTS = [f"p{i // 2}" for i in range(24)]


@pytest.fixture(scope="module")
def features(sets):
    return {name: scaled(name, {k: extract(v) for k, v in sets.items()}) for name, extract in families().items()}


@pytest.fixture(scope="module")
def rows(features):
    return iq.table(features, PATIENTS, seed=1, draws=10)


def test_a_perfect_generator_scores_as_real_bones_do(rows):
    found = {(r["setting"], r["features"], r["metric"]): r for r in rows}
    for family in ("random3d", "spectrum"):
        good, bad = ({k[2]: r for k, r in found.items() if k[:2] == (s, family)} for s in ("progan 5", "progan 1.8"))
        for metric in ("FD", "kernel distance", "RBF-MMD"):
            assert good[metric]["value"] < 0.4 * bad[metric]["value"], metric
        for metric in ("precision", "density", "coverage"):
            assert good[metric]["value"] > 2 * bad[metric]["value"], metric
        assert good["C2ST"]["value"] < 0.8 and bad["C2ST"]["value"] > 0.95
        row = good["kernel distance"]
        assert row["low"] <= row["value"] <= row["high"] and row["low"] <= row["real_against_real"] <= row["high"]
        assert (row["n_real"], row["n_fake"], row["n_other"]) == (24, 24, 24)


def test_features_of_networks_stay_in_their_unit(sets):
    means = {name: 7 + v.mean(axis=(2, 3)).astype(float) for name, v in sets.items()}
    assert scaled("vgs", means)["real"].mean() > 7
    found = scaled("random3d", means)
    assert abs(found["real"].mean()) < 1e-6 and list(found) == list(sets)
    np.testing.assert_allclose(found["real"].std(axis=0), 1)


def test_workers_extract_what_one_process_does(sets, features, tmp_path):
    few = {name: volumes[:12] for name, volumes in sets.items()}
    found = iq.extracted({"spectrum": families()["spectrum"]}, few, tmp_path)
    wanted = scaled("spectrum", {name: families()["spectrum"](volumes) for name, volumes in few.items()})
    assert list(found) == ["spectrum"] and list(found["spectrum"]) == list(few)
    for name in few:
        np.testing.assert_allclose(found["spectrum"][name], wanted[name], rtol=1e-3, atol=1e-3)  # threads round apart
    assert len(list(tmp_path.glob("spectrum-*.safetensors"))) == len(few)


def test_a_feature_that_is_flat_among_the_real_ones_does_not_rule():
    rng = np.random.default_rng(3)
    real, fake = rng.standard_normal((40, 6)), rng.standard_normal((40, 6))
    real[:, 0], fake[:, 0] = 0, 0.1  # a rectifier that no real bone opens
    a, b = standardised(real, fake)
    assert abs(b[:, 0]).max() < 15 and a[:, 0].std() == 0
    np.testing.assert_allclose(a[:, 1:].std(axis=0), 1)


def test_parity_has_an_interval_and_what_real_bones_reach():
    rng = np.random.default_rng(4)
    certain = np.eye(5)[np.arange(40) % 5]
    chances = {"real": certain, "other real": rng.dirichlet(np.ones(5), 40), "m 1": np.full((40, 5), 0.2)}
    similar = {
        name: dict(value=v, low=v, high=v, n=40, pairs=9) for name, v in zip(chances, (0.1, 0.2, 0.3), strict=True)
    }
    rows = iq.parity(chances, {"real": [f"p{i // 4}" for i in range(40)]}, similar, seed=1, draws=40)
    found = {(row["setting"], row["metric"]): row for row in rows}
    score = found["real", "inception score"]
    assert score["value"] == pytest.approx(5) and found["m 1", "inception score"]["value"] == pytest.approx(1)
    assert score["low"] <= 5 and score["n"] == 40 and score["d"] == 5
    other = found["other real", "inception score"]
    assert score["real_against_real"] == other["value"] and other["low"] < other["value"] < other["high"]
    assert found["m 1", "MS-SSIM"]["real_against_real"] == 0.2 and found["m 1", "MS-SSIM"]["pairs"] == 9


def test_table1_has_its_twelve_settings_and_our_numbers_beside_the_published(rows):
    found = iq.table1(rows, ["progan"], "random3d")
    assert len(found) == 12 and found[4]["published FID_inc"] == "21.59" and found[4]["published rec"] == "0.86"
    assert [r["setting"] for r in found[:2]] == ["progan 5", "progan 1.8"]
    fd = next(r for r in rows if (r["setting"], r["features"], r["metric"]) == ("progan 5", "random3d", "FD"))
    assert found[0]["FD_random3d"].startswith(f"{fd['value']:.3g} [") and "FID_inc" not in found[0]
    assert found[2]["FD_random3d"] == "not trained"
    partly = iq.table1([*rows, fd | {"features": "morphometry"}], ["progan"], "random3d")
    assert "[" in partly[0]["FD_morphometry"] and partly[1]["FD_morphometry"] == "not measured"
    with pytest.raises(InputError, match="'progan 3'"):
        iq.table1([fd | {"setting": "progan 3"}], ["progan"], "random3d")
    *twelve, last = iq.table1([*rows, fd | {"setting": "hagan 5"}], ["progan", "hagan"], "random3d")
    assert twelve == found and last["setting"] == "hagan 5" and not last["published FID_inc"]
    assert last["FD_random3d"] == found[0]["FD_random3d"] and last["rec_random3d"] == "not measured"


def test_the_published_table_obeys_the_law_of_truncation():
    published = read_table(iq.PUBLISHED)
    for wide, narrow in zip(published[::2], published[1::2], strict=True):
        assert wide["model"] == narrow["model"] and float(wide["tr"]) > float(narrow["tr"])
        assert float(narrow["prec"]) > float(wide["prec"]) and float(narrow["rec"]) < float(wide["rec"])


def test_the_law_is_found_where_samples_gather_in_the_middle():
    rng = np.random.default_rng(5)
    real, wide = rng.standard_normal((60, 3)), rng.standard_normal((60, 3))
    other = rng.standard_normal((60, 3))
    family = {"f": {"real": real, "other real": other, "m 5": 1.3 * wide, "m 1": 0.3 * wide}}
    found = iq.truncation_law(family, [("m 5", "m 1")], list(range(60)), seed=1, draws=20)
    assert [r["metric"] for r in found] == ["precision", "recall"] and all(r["as_published"] for r in found)
    assert found[0]["low"] > 0 > found[1]["high"]
    assert abs(found[0]["real_against_real"]) < found[0]["change"]
    none = iq.truncation_law(
        {"f": family["f"] | {"m 1": 1.3 * wide}}, [("m 5", "m 1")], list(range(60)), seed=1, draws=5
    )
    assert not any(r["as_published"] for r in none)


def test_a_plane_keeps_the_distances_of_a_plane_and_ellipses_overlap_by_their_areas():
    rng = np.random.default_rng(6)
    flat = rng.standard_normal((50, 2)) @ np.linalg.qr(rng.standard_normal((5, 2)))[0].T
    found = iq.embedded({"a": flat[:20], "b": flat[20:]})
    x, y = np.concatenate(list(found.values())), flat
    np.testing.assert_allclose(np.linalg.norm(x[3] - x[30]), np.linalg.norm(y[3] - y[30]))
    points = found["a"]
    assert iq.ellipse_overlap(points, points) == 1
    middle = points.mean(axis=0)
    assert iq.ellipse_overlap(points, middle + (points - middle) / 2) == pytest.approx(1 / 4, abs=0.02)
    assert iq.ellipse_overlap(points, points + 100) == 0
    outline = (iq.ellipse(points) - middle) @ np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T
    np.testing.assert_allclose(np.linalg.norm(outline, axis=1), 2, rtol=1e-6)


def test_as_many_patients_as_there_are_come_before_a_second_sample_of_one():
    patients = list("aaaabbbbccd")
    chosen = iq.over_patients(patients, 6, 1)
    assert len(set(chosen)) == 6 and {patients[i] for i in chosen[:4]} == set("abcd")
    assert len(iq.over_patients(patients, 99, 1)) == 11


def test_names_of_settings():
    assert sampling.setting("progan", 5.0) == "progan 5" and sampling.setting("stylegan", 0.8) == "stylegan 0.8"


def test_markdown_has_a_line_a_row():
    assert as_markdown([{"a": 0.12345, "b": 3}]).splitlines() == ["| a | b |", "| --- | --- |", "| 0.123 | 3 |"]


def test_of_three_patients_there_are_numbers_without_intervals():
    rng = np.random.default_rng(0)
    sets = {name: rng.normal(size=(9, 4)) for name in ("real", "other real", "a 1", "a 0.5")}
    patients = [f"p{i % 3}" for i in range(9)]
    rows = iq.table({"random3d": sets}, patients, seed=1, draws=5)
    rows += iq.truncation_law({"random3d": sets}, [("a 1", "a 0.5")], patients, seed=1, draws=5)
    assert all(row["low"] is None and row["high"] is None for row in rows)
    assert all(np.isfinite(row.get("value", row.get("change"))) for row in rows)
