"""Raters: blinding, files, and every statistic against an independent computation."""

import numpy as np
import pytest
from scipy import stats

from bonelib import InputError
from bonelib.scans.tables import write_table
from bonelib.studies import raters

ITEMS = [{"group": "progan", "name": f"sample {i}"} for i in range(20)] + [{"group": "real", "name": "scan 3"}] * 4


def test_a_key_shows_nothing_and_a_repeat_comes_late():
    key = raters.blinded(ITEMS, 6, seed=1)
    assert len({row["code"] for row in key}) == 30 and sum(row["again"] for row in key) == 6
    assert [row["item"] for row in key] != sorted(row["item"] for row in key)
    assert key == raters.blinded(ITEMS, 6, seed=1) != raters.blinded(ITEMS, 6, seed=2)
    assert {row["code"] for row in key}.isdisjoint(row["code"] for row in raters.blinded(ITEMS, 6, 1, "other model"))
    first = raters.order(key, 1, 0)
    assert sorted(first) == [row["code"] for row in key] and first != raters.order(key, 1, 1)
    place = {code: i for i, code in enumerate(first)}
    for row in (row for row in key if row["again"]):
        original = next(r for r in key if r["item"] == row["item"] and not r["again"])
        assert place[original["code"]] < 20 <= place[row["code"]]
    with pytest.raises(InputError, match="repeats is 25; accepted is 0 to 24"):
        raters.blinded(ITEMS, 25, seed=1)


def test_ratings_of_any_number_of_raters_are_read_and_mistakes_named(tmp_path):
    key = raters.blinded(ITEMS, 6, seed=1)
    for name in ("anna", "<b>b|c</b>"):
        rows = [{"form": "f", "rater": name, "code": row["code"], "score": 1 + i % 5} for i, row in enumerate(key)]
        write_table(tmp_path / f"{len(name)}.csv", [*rows, rows[0] | {"score": 5}, rows[1] | {"form": "old"}])
    ratings, others = raters.read_ratings(tmp_path, key, "f")
    names, first, again = raters.matrices(ratings, len(ITEMS))
    assert others == 2
    assert names == ["&lt;b&gt;b/c&lt;/b&gt;", "anna"] and first.shape == (2, 24)
    assert np.isfinite(first).all() and np.isfinite(again).sum() == 12
    changed = first[0, key[0]["item"]] if not key[0]["again"] else again[0, key[0]["item"]]
    assert changed == 5
    for bad, says in (
        ({"code": "zzzzz"}, "code 'zzzzz' is not in the key"),
        ({"score": "6"}, "score is '6'; accepted"),
    ):
        write_table(tmp_path / "z.csv", [{"form": "f", "rater": "z", "code": key[0]["code"], "score": 1} | bad])
        with pytest.raises(InputError, match=f"z.csv, line 2: {says}"):
            raters.read_ratings(tmp_path, key, "f")


def kappa_by_table(a, b):
    """Cohen's kappa from the table of counts, quadratic weights, as in the textbook."""
    counts = np.zeros((5, 5))
    for i, j in zip(a, b, strict=True):
        counts[int(i) - 1, int(j) - 1] += 1
    observed, weights = counts / counts.sum(), np.subtract.outer(range(5), range(5)) ** 2 / 16
    return 1 - (weights * observed).sum() / (weights * np.outer(observed.sum(1), observed.sum(0))).sum()


def icc_by_variances(scores):
    """ICC(2,1) from the sums of squares of a two-way analysis of variance, entry by entry."""
    k, n = scores.shape
    total = sum((scores[i, j] - scores.mean()) ** 2 for i in range(k) for j in range(n))
    rows = k * sum((scores[:, j].mean() - scores.mean()) ** 2 for j in range(n))
    columns = n * sum((scores[i].mean() - scores.mean()) ** 2 for i in range(k))
    msr, msc, mse = rows / (n - 1), columns / (k - 1), (total - rows - columns) / ((n - 1) * (k - 1))
    return (msr - mse) / (msr + (k - 1) * mse + k * (msc - mse) / n)


def test_statistics_agree_with_textbook_and_scipy():
    rng = np.random.default_rng(3)
    a = rng.integers(1, 6, 50)
    b = np.clip(a + rng.integers(-1, 2, 50), 1, 5)
    assert raters.weighted_kappa(a, b) == pytest.approx(kappa_by_table(a, b), abs=1e-12)
    assert raters.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    scores = np.stack([a, b, np.clip(a + 1, 1, 5)]).astype(float)
    assert raters.icc(scores) == pytest.approx(icc_by_variances(scores), abs=1e-12)
    # Shrout and Fleiss 1979, Table 2: six targets, four judges, ICC(2,1) = .29
    printed = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]).T
    assert raters.icc(printed) == pytest.approx(0.29, abs=0.005)
    assert np.isnan(raters.weighted_kappa(np.ones(9), np.ones(9))) and np.isnan(
        raters.spearman(np.ones(9), np.arange(9))
    )


def test_an_interval_is_near_the_normal_theory_of_a_mean():
    values = np.random.default_rng(0).normal(size=400)
    found = raters.estimate(np.mean, values, rng=np.random.default_rng(1), draws=4000)
    half = 1.96 * values.std() / 20
    assert found["N"] == 400 and found["high"] - found["low"] == pytest.approx(2 * half, rel=0.06)
    few = raters.estimate(raters.spearman, values[:3], values[:3], rng=np.random.default_rng(1))
    assert few["value"] == pytest.approx(1) and few["low"] is None
    same = raters.estimate(raters.spearman, np.ones(9), values[:9], rng=np.random.default_rng(1))
    assert same["value"] is None and same["N"] == 9


def test_known_degradation_calibrates_a_score():
    rng = np.random.default_rng(2)
    scores = 1 - 0.2 * np.arange(4) + 0.02 * rng.standard_normal((12, 4))
    rows = raters.calibration(scores, seed=1, draws=200)
    assert [row["level"] for row in rows] == [0, 1, 2, 3] and rows[0]["spearman"] == pytest.approx(-1)
    assert rows[2]["low"] < 0.6 < rows[2]["high"] and rows[2]["N"] == 12
    means = [row["value"] for row in rows]
    assert raters.equivalent_level(means, 0.7) == pytest.approx(1.5, abs=0.1)
    assert raters.equivalent_level(means, 2.0) == 0 and raters.equivalent_level(means, -1.0) == 3
    assert raters.equivalent_level([1.0, 0.5, 0.6, 0.2], 0.55) in (pytest.approx(1.0), pytest.approx(2.0))
    noise = raters.calibration(rng.standard_normal((12, 4)), seed=1, draws=200)[0]
    assert noise["spearman low"] < 0 < noise["spearman high"]
