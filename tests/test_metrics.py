import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import linalg, ndimage

from bonelib import InputError
from bonelib.evaluation import metrics
from bonelib.randomness import numpy_rng

STATISTICS = (
    metrics.frechet_distance,
    metrics.kernel_distance,
    metrics.precision_recall,
    metrics.density_coverage,
    metrics.realism,
)


def draws_rng(seed):
    return numpy_rng(seed, "draws")


def draw(name, n, d, shift=0.0, scale=1.0):
    return shift + scale * numpy_rng(0, "test metrics", name).standard_normal((n, d))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 7)
    monkeypatch.setattr(metrics, "COLUMNS", 5)


def radius(x, i, k):
    return sorted(math.dist(x[i], x[j]) for j in range(len(x)) if j != i)[k - 1]


def test_frechet_distance_of_whitened_samples_is_the_analytic_one():
    # exactly zero mean and unit covariance, so the distance is |shift|^2 + d (scale - 1)^2
    x = draw("white", 200, 6)
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    shift = np.array([3.0, -4, 0, 0, 0, 0])
    assert metrics.frechet_distance(x, x + shift) == pytest.approx(25)
    assert metrics.frechet_distance(x, 3 * x) == pytest.approx(6 * 4)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_agrees_with_the_matrix_square_root(small_blocks):
    a = draw("a", 60, 8)
    b = draw("b", 45, 8, shift=0.5) @ draw("mix", 8, 8)
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(ca + cb - 2 * np.real(linalg.sqrtm(ca @ cb)))
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_with_fewer_samples_than_features():
    few, many = draw("few", 10, 30), draw("many", 200, 30, scale=2)
    cf, cm = np.cov(few.T), np.cov(many.T)
    values, vectors = np.linalg.eigh(cm)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cf @ root).clip(0)).sum()
    expected = np.sum((few.mean(0) - many.mean(0)) ** 2) + np.trace(cf + cm) - 2 * cross
    assert metrics.frechet_distance(few, many) == pytest.approx(expected, rel=1e-5)


def test_kernel_distance_agrees_with_loops(small_blocks):
    a, b = draw("a", 23, 4), draw("b", 17, 4, shift=0.4)

    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / 4 + 1) ** 3

    within_a = np.mean([kernel(x, y) for x, y in itertools.permutations(a, 2)])
    within_b = np.mean([kernel(x, y) for x, y in itertools.permutations(b, 2)])
    across = np.mean([kernel(x, y) for x, y in itertools.product(a, b)])
    assert metrics.kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * across, rel=1e-10)


def test_kernel_distance_is_unbiased():
    values = [metrics.kernel_distance(draw(("x", i), 12, 16), draw(("y", i), 12, 16)) for i in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20
    assert min(values) < 0


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_agree_with_loops(small_blocks, k):
    real, fake = draw("real", 31, 3), draw("fake", 26, 3, shift=0.7)

    def share(points, centres):
        reach = [radius(centres, i, k) for i in range(len(centres))]
        balls = list(zip(centres, reach, strict=True))
        return np.mean([any(math.dist(p, c) <= r for c, r in balls) for p in points])

    precision, recall = metrics.precision_recall(real, fake, k)
    assert precision == pytest.approx(share(fake, real)) and recall == pytest.approx(share(real, fake))
    assert 0 < recall < 1 and 0 < precision < 1


def test_density_coverage_agree_with_loops(small_blocks):
    real, fake, k = draw("real", 31, 3), draw("fake", 26, 3, shift=0.7), 4
    reach = [radius(real, i, k) for i in range(31)]
    inside = [[math.dist(r, f) <= reach[i] for f in fake] for i, r in enumerate(real)]
    density, coverage = metrics.density_coverage(real, fake, k)
    assert density == pytest.approx(np.sum(inside) / (k * 26))
    assert coverage == pytest.approx(np.mean([any(row) for row in inside]))


def test_realism_agrees_with_loops(small_blocks):
    real, fake = draw("real", 30, 3), draw("fake", 12, 3, scale=2)
    reach = [radius(real, i, 3) for i in range(30)]
    kept = [i for i in range(30) if reach[i] <= np.median(reach)]
    expected = [max(reach[i] / math.dist(real[i], f) for i in kept) for f in fake]
    np.testing.assert_allclose(metrics.realism(real, fake), expected, rtol=1e-9)
    assert np.isinf(metrics.realism(real, real[kept[:1]])).all()


def test_equal_and_disjoint_sets():
    real = draw("real", 40, 5)
    assert metrics.precision_recall(real, real.copy()) == (1, 1)
    assert metrics.density_coverage(real, real.copy())[1] == 1
    assert metrics.precision_recall(real, real + 100) == (0, 0)
    assert metrics.density_coverage(real, real + 100) == (0, 0)
    assert metrics.realism(real, real + 100).max() < 0.1


def test_precision_and_recall_tell_mode_drop_from_poor_samples():
    real = np.vstack([draw("left", 40, 2), draw("right", 40, 2, shift=50)])
    precision, recall = metrics.precision_recall(real, draw("one mode", 40, 2))
    assert precision > 0.8 and 0.3 < recall <= 0.5


def test_neighbours_survive_a_large_common_offset():
    real, fake = draw("real", 40, 4), draw("fake", 40, 4, shift=0.5)
    assert metrics.precision_recall(real + 1e8, fake + 1e8) == metrics.precision_recall(real, fake)


def test_interval_of_a_mean_has_the_width_of_its_standard_error():
    patients, visits, fakes = 30, 4, 50
    level = np.repeat(draw("patient", patients, 1), visits, axis=0)
    real, fake = level + 0.1 * draw("visit", patients * visits, 1), draw("fake", fakes, 1)
    groups = np.repeat([f"P{i:02}" for i in range(patients)], visits)

    def difference(a, b):
        return a.mean() - b.mean()

    low, high = metrics.bootstrap_interval(difference, real, fake, groups, rng=draws_rng(1), draws=600)
    by_patient = real.reshape(patients, visits).mean(axis=1)
    error = math.sqrt(by_patient.var(ddof=1) / patients + fake.var(ddof=1) / fakes)
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.12)
    assert (high + low) / 2 == pytest.approx(difference(real, fake), abs=0.2 * error)


def test_interval_draws_whole_patients_and_never_a_sample_twice():
    groups = np.array(["a", "b", "c", "d", "e"] * 3)
    real, fake, seen = np.arange(15.0)[:, None], np.arange(9.0)[:, None], []

    def watch(a, b):
        seen.append((a.ravel().astype(int), b.ravel()))
        return [a.mean(), b.mean()]

    low, high = metrics.bootstrap_interval(watch, real, fake, groups, rng=draws_rng(0), draws=40)
    assert len(low) == len(high) == 2 and (low < high).all()
    drawn = [s for s in seen if len(s[0]) < 15]
    assert len(drawn) == 40 and len({tuple(a) for a, _ in drawn}) > 5
    for a, b in drawn:
        assert len(np.unique(a)) == len(a) == 6 and len(np.unique(b)) == len(b) == 4
        assert set(np.unique(groups[a], return_counts=True)[1]) == {3}


def test_interval_is_the_same_for_the_same_generator():
    real, fake = draw("real", 24, 3), draw("fake", 24, 3)
    ends = [
        metrics.bootstrap_interval(
            metrics.precision_recall, real, fake, np.arange(24) // 2, rng=draws_rng(seed), draws=20
        )
        for seed in (3, 3, 4)
    ]
    np.testing.assert_array_equal(ends[0], ends[1])
    assert not np.array_equal(ends[0], ends[2])


def textures(name, n, common):
    """Interiors of which a share of the variance is common to all."""
    rng = numpy_rng(0, "test stamp", name)
    fields = ndimage.gaussian_filter(rng.standard_normal((n + 1, 8, 24, 20)), (0, 1, 1, 1))
    inside = np.zeros((n, 8, 24, 20), bool)
    for i, mask in enumerate(inside):
        mask[1:-1, 3 + i % 3 : -3, 4:-3] = True
    bright_edge = np.where(inside, 0, 30)  # what lies outside of the mask must not matter
    return math.sqrt(common) * fields[:1] + math.sqrt(1 - common) * fields[1:] + bright_edge, inside


def test_stamp_is_the_share_of_texture_that_samples_have_in_common():
    found = [metrics.stamp(*textures("t", 12, common)) for common in (0, 0.5, 1)]
    assert found[0] == pytest.approx(0, abs=0.03)
    assert found[1] == pytest.approx(0.5, abs=0.05)
    assert found[2] == pytest.approx(1, abs=0.02)


def test_stamp_ignores_what_varies_slowly():
    volumes, inside = textures("t", 8, 0)
    sloped, both = volumes + np.linspace(-1, 1, 24)[:, None], inside[0] & inside[1]
    assert np.corrcoef(sloped[0][both], sloped[1][both])[0, 1] > 0.85
    assert metrics.stamp(sloped, inside) < 0.1


def test_stamp_over_some_pairs_is_close_to_that_over_all():
    volumes, inside = textures("t", 12, 0.5)
    assert metrics.stamp(volumes, inside, pairs=20) == pytest.approx(metrics.stamp(volumes, inside), abs=0.05)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("bad", ["one axis", "other d", "few", "nan", "bool"])
def test_bad_features_are_refused(statistic, bad):
    x = draw("x", 20, 4)
    a = {
        "one axis": x[0],
        "other d": x[:, :3],
        "few": x[:1],
        "nan": np.where(x > 2, np.nan, x) * np.nan,
        "bool": x > 0,
    }[bad]
    with pytest.raises(InputError):
        statistic(a, x)
    if bad != "few" or statistic is not metrics.realism:
        with pytest.raises(InputError):
            statistic(x, a)


def test_no_more_samples_than_neighbours_are_refused():
    x = draw("x", 20, 4)
    metrics.precision_recall(x[:4], x[:4], k=3)
    for statistic in (metrics.precision_recall, metrics.density_coverage, metrics.realism):
        with pytest.raises(InputError, match="at least 4"):
            statistic(x[:3], x, k=3)
        with pytest.raises(InputError, match="k is 0"):
            statistic(x, x, k=0)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"real_groups": np.arange(19)}, "has shape"),
        ({"draws": 1}, "draws is 1"),
        ({"level": 1.0}, "level 1.0"),
    ],
)
def test_bad_intervals_are_refused(change, text):
    x = draw("x", 20, 4)
    given = {"real_groups": np.arange(20), "rng": draws_rng(0)} | change
    with pytest.raises(InputError, match=text):
        metrics.bootstrap_interval(metrics.kernel_distance, x, x, **given)


def test_too_few_patients_or_samples_have_no_interval():
    x = draw("x", 20, 4)
    ends = metrics.bootstrap_interval(metrics.kernel_distance, x, x, np.arange(20) % 3, rng=draws_rng(0), draws=5)
    assert np.isnan(ends).all()
    ends = metrics.bootstrap_interval(metrics.precision_recall, x[:4], x, np.arange(4), rng=draws_rng(0), draws=5)
    assert np.shape(ends) == (2, 2) and np.isnan(ends).all()


def test_bad_stamps_are_refused():
    volumes, inside = textures("t", 3, 0)
    for v, m in (
        (volumes[0], inside[0]),
        (volumes[:1], inside[:1]),
        (volumes, inside[:2]),
        (volumes, inside.astype(float)),
        (volumes * np.nan, inside),
        (volumes, inside & False),
    ):
        with pytest.raises(InputError):
            metrics.stamp(v, m)


def test_manifold_gives_what_the_metrics_give_one_by_one(small_blocks):
    real, fake = draw("real", 31, 3), draw("fake", 26, 3, shift=0.7)
    found = metrics.manifold(real, fake, 3, 5)
    assert (found["precision"], found["recall"]) == metrics.precision_recall(real, fake, 3)
    assert (found["density"], found["coverage"]) == metrics.density_coverage(real, fake, 5)
    assert found["realism"] == pytest.approx(np.median(metrics.realism(real, fake, 3)), rel=1e-9)
    copied = metrics.manifold(real, np.concatenate([real, real]), 3, 5)["realism"]
    assert 1 < copied <= np.inf  # half of the real samples are pruned, and a copy of a pruned one is none


RECORDED = {  # prdc 0.2 (nearest_k 5) and torchmetrics 1.9.0 (float64, kid of all samples) on the arrays below
    "precision": 0.7325,
    "recall": 0.855,
    "density": 0.6150000000000001,
    "coverage": 0.92,
    "frechet": 1.8618536537170058,
    "kernel": 0.035327853957895616,
}


def test_independent_code_found_the_same_numbers():
    a, b = draw("recorded a", 400, 32), draw("recorded b", 400, 32, shift=0.1, scale=1.05)
    found = metrics.manifold(a, b, 5, 5)
    for name in ("precision", "recall", "density", "coverage"):
        assert found[name] == pytest.approx(RECORDED[name], rel=1e-14)
    assert metrics.frechet_distance(a, b) == pytest.approx(RECORDED["frechet"], rel=1e-9)
    assert metrics.kernel_distance(a, b) == pytest.approx(RECORDED["kernel"], rel=1e-9)


def test_rbf_mmd_agrees_with_loops(small_blocks):
    a, b = draw("a", 23, 4) + 100, draw("b", 17, 4, shift=0.4) + 100

    def mean(pairs):
        return np.mean([math.exp(-(math.dist(x, y) ** 2) / (2 * 1.3**2)) for x, y in pairs])

    expected = (
        mean(itertools.permutations(a, 2)) + mean(itertools.permutations(b, 2)) - 2 * mean(itertools.product(a, b))
    )
    assert metrics.rbf_mmd(a, b, 1.3) == pytest.approx(expected, rel=1e-9)


def test_rbf_mmd_takes_the_median_distance_within_the_reals():
    a, b = draw("a", 40, 4), draw("b", 30, 4, shift=0.4)
    median = np.median([math.dist(x, y) for x, y in itertools.combinations(a, 2)])
    assert metrics.rbf_mmd(a, b) == pytest.approx(metrics.rbf_mmd(a, b, median), rel=1e-9)
    with pytest.raises(InputError, match="bandwidth is 0"):
        metrics.rbf_mmd(np.ones((5, 3)), b[:, :3])


def test_blocks_keep_the_memory_small():
    a, b = draw("many a", 3500, 16).astype(np.float32), draw("many b", 3500, 16).astype(np.float32)
    patients = np.arange(3500) // 4
    pairs = (metrics.kernel_distance, metrics.rbf_mmd, metrics.manifold, metrics.realism, metrics.frechet_distance)
    for statistic in (*pairs, lambda a, b: metrics.two_sample_auc(a, b, patients)):
        tracemalloc.start()
        statistic(a, b)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 60e6  # all pairs would take 98 MB


def test_auc_counts_pairs():
    positives, negatives = np.array([3, 1, 2, 2]), np.array([2, 0, 1])
    wins = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert metrics.auc(positives, negatives) == pytest.approx(np.mean(wins))
    assert metrics.auc([1, 2], [-1, 0]) == 1 and metrics.auc([0], [0]) == 0.5


def test_true_positives_at_a_false_positive_rate():
    negatives = np.arange(100)
    assert metrics.tpr_at([98.5, 99.5, 97.5, 3], negatives, 0.01) == 0.5  # one of 100 negatives may exceed
    assert metrics.tpr_at([98.5, 99.5], negatives[:50], 0.01) == 1
    assert metrics.tpr_at(negatives, negatives, 0.01) <= 0.01


def test_two_samples_of_one_distribution_are_not_told_apart_and_shifted_ones_are():
    patients = np.arange(120) // 2
    same = [
        metrics.two_sample_auc(draw(("r", i), 120, 20), draw(("f", i), 90, 20), patients, seed=i) for i in range(12)
    ]
    assert np.mean(same) == pytest.approx(0.5, abs=4 * np.std(same) / math.sqrt(12))
    shifted = metrics.two_sample_auc(draw("r", 120, 20), draw("f", 90, 20, shift=0.5), patients)
    # the best classifier of two Gaussians a distance d apart reaches Phi(d / sqrt 2)
    best = 0.5 * (1 + math.erf(0.5 * math.sqrt(20) / 2))
    assert best - 0.06 < shifted < best + 0.04


def test_the_classifier_is_the_same_by_samples_and_by_features(small_blocks):
    a, b = draw("ridge a", 40, 7), draw("ridge b", 30, 7, shift=0.4)
    some = (a, np.arange(3, 40)), (b, np.arange(28))
    mean, sd = metrics._mean_sd(*some[0])
    np.testing.assert_allclose([mean, sd], [a[3:].mean(axis=0), a[3:].std(axis=0)])
    by_samples, by_features = metrics._ridge(*some, mean, sd), metrics._ridge_of_many(*some, mean, sd)
    np.testing.assert_allclose(by_features, by_samples, rtol=1e-9)
    assert by_samples @ (a.mean(axis=0) - b.mean(axis=0)) > 0


def test_a_patient_is_in_one_fold_of_the_two_sample_test():
    level = np.repeat(draw("patient", 20, 400), 6, axis=0)  # patients that anyone would know again
    fake = np.repeat(draw("fake patient", 20, 400), 6, axis=0)
    by_patient = metrics.two_sample_auc(level, draw("single fakes", 120, 400), np.arange(120) // 6)
    leaking = metrics.two_sample_auc(level, fake, np.arange(120))
    assert leaking > 0.95 and by_patient < 0.75


def test_inception_score_of_certain_and_of_undecided_classes():
    assert metrics.inception_score(np.eye(4)[np.arange(40) % 4]) == pytest.approx(4)
    assert metrics.inception_score(np.full((9, 5), 0.2)) == pytest.approx(1)
    with pytest.raises(InputError, match="sum"):
        metrics.inception_score(np.ones((3, 2)))
