"""Distances between a real and a generated set of feature vectors (n, d), one row a sample, and the correlation of
generated interiors that betrays a fixed pattern."""

import numpy as np
from scipy import ndimage
from scipy.spatial.distance import cdist, pdist
from sklearn.linear_model import Ridge

from bonelib import InputError
from bonelib.core.random import numpy_rng
from bonelib.evaluation.statistics import auc, pairs_between

MEDIAN_OF = 512  # samples whose distances give the bandwidth of `rbf_mmd`
FEWEST_SHARED = 50  # voxels; a correlation over fewer is mostly its own noise


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to `a` (n, d) and `b` (m, d).

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), Heusel et al. 2017, with covariances over n - 1. With
    C = F' F, the last trace is the sum of the singular values of F_a F_b'. The estimate grows as d / n even between
    equal distributions: print n, d and the real-against-real value beside it. Raises `InputError` for a bad shape, NaN,
    or fewer than 2 samples.
    """
    a, b = _pair(a, b, "a", "b", least=2)
    (mean_a, factor_a), (mean_b, factor_b) = _moments(a), _moments(b)
    cross = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    spread = np.sum(factor_a**2) + np.sum(factor_b**2) - 2 * cross
    return float(np.sum((mean_a - mean_b) ** 2) + max(spread, 0.0))


def _moments(x):
    """Mean (d,) and a factor F (r, d) with F' F the covariance, r = min(n, d)."""
    mean = x.mean(axis=0)
    factor = (x - mean) / np.sqrt(len(x) - 1)
    return mean, np.linalg.qr(factor, mode="r") if len(x) > x.shape[1] else factor


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of `a` (n, d) and `b` (m, d) under k(x, y) = (x.y / d + 1)^3.

    Binkowski et al. 2018, section 4: mean of k over pairs within a, plus within b (i != j), minus twice the mean of k
    across; it may be slightly negative. Raises `InputError` for a bad shape, NaN, or fewer than 2 samples.
    """
    a, b = _pair(a, b, "a", "b", least=2)

    def kernel(x, y):
        value = x @ y.T / a.shape[1] + 1
        return value * value * value  # a tenth of the time of a power

    return _discrepancy(a, b, kernel)


def rbf_mmd(real: np.ndarray, fake: np.ndarray, bandwidth: float | None = None) -> float:
    """Unbiased squared maximum mean discrepancy under k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)).

    Gretton et al. 2012, lemma 6, the MMD of Sun et al. 2022. `bandwidth` is the median distance within (at most 512 of)
    `real` where none is given; `real` is (n, d), `fake` (m, d). Raises `InputError` as `kernel_distance`, and for a
    bandwidth that is not positive.
    """
    real, fake = _pair(real, fake, "real", "fake", least=2)
    if bandwidth is None:
        some = real[np.linspace(0, len(real) - 1, min(len(real), MEDIAN_OF)).astype(int)]
        bandwidth = float(np.median(pdist(some)))
    if not bandwidth > 0:
        raise InputError(
            f"bandwidth is {bandwidth}; accepted are positive numbers (0 is found where all samples agree)"
        )
    return _discrepancy(real, fake, lambda x, y: np.exp(cdist(x, y, "sqeuclidean") * (-0.5 / bandwidth**2)))


def _discrepancy(a, b, kernel):
    def within(x):
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Share of `fake` (m, d) inside the real manifold, and share of `real` (n, d) inside the generated one.

    A manifold is the union of balls around its samples that reach to their k-th neighbour: Kynkaanniemi et
    al. 2019. Raises `InputError` for a bad shape, NaN, or a set with no more than k samples.
    """
    found = manifold(real, fake, k, k)
    return found["precision"], found["recall"]


def density_coverage(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Real balls per generated sample over k, and share of real balls that hold a generated sample.

    `real` is (n, d), `fake` (m, d); Naeem et al. 2020. Density is not bounded by one. Raises `InputError` for a bad
    shape, NaN, or a set with no more than k samples.
    """
    found = manifold(real, fake, k, k)
    return found["density"], found["coverage"]


def manifold(real: np.ndarray, fake: np.ndarray, k: int = 3, k_dense: int = 5) -> dict[str, float]:
    """`precision`, `recall` and median `realism` with `k` neighbours, `density` and `coverage` with `k_dense`.

    `real` is (n, d), `fake` (m, d). Raises `InputError` as `precision_recall`.
    """
    ks = _neighbours(k), _neighbours(k_dense)
    real, fake = _pair(real, fake, "real", "fake", least=max(ks) + 1)
    reach, reach_dense = _squared_radii(real, ks)
    (fake_reach,) = _squared_radii(fake, ks[:1])
    squared = cdist(fake, real, "sqeuclidean")
    inside = squared <= reach_dense
    return {
        "precision": float((squared <= reach).any(axis=1).mean()),
        "recall": float((squared <= fake_reach[:, None]).any(axis=0).mean()),
        "density": float(inside.sum() / (ks[1] * len(fake))),
        "coverage": float(inside.any(axis=0).mean()),
        "realism": float(np.median(_realism(reach, squared))),
    }


def realism(real: np.ndarray, fake: np.ndarray, k: int = 3) -> np.ndarray:
    """Realism of every row of `fake` (m, d) -> (m,); at least 1 inside the pruned manifold of `real` (n, d).

    Largest ratio of the distance of a real sample to its k-th real neighbour to that to the generated one, over the
    half with the smaller balls (Kynkaanniemi et al. 2019, section 5). Infinite for an exact copy. Raises `InputError`
    as `precision_recall`.
    """
    real, fake = _pair(real, fake, "real", "fake", least=_neighbours(k) + 1, least_fake=1)
    (reach,) = _squared_radii(real, (k,))
    return _realism(reach, cdist(fake, real, "sqeuclidean"))


def _realism(reach, squared):
    kept = reach <= np.median(reach)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(squared[:, kept] > 0, reach[kept] / squared[:, kept], np.inf)
    return np.sqrt(ratios.max(axis=1))


def _squared_radii(x, ks):
    """For every k of `ks`, the squared distance (n,) of every sample to its k-th nearest other sample."""
    squared = cdist(x, x, "sqeuclidean")
    np.fill_diagonal(squared, np.inf)
    nearest = np.partition(squared, [k - 1 for k in ks], axis=1)
    return [nearest[:, k - 1] for k in ks]


def two_sample_auc(real: np.ndarray, fake: np.ndarray, real_groups, *, seed: int = 0, folds: int = 5) -> float:
    """How well a classifier tells `fake` (m, d) from `real` (n, d) that it has not seen: 0.5 not at all, 1 always.

    Classifier two-sample test (Lopez-Paz and Oquab 2017): mean area under the ROC curve of ridge regression on
    standardised features over `folds`; `real_groups` names n patients, who are never in two. Raises `InputError` for a
    bad shape, NaN, or fewer patients or fake samples than folds.
    """
    real, fake = _pair(real, fake, "real", "fake", least=2 * folds)
    names, patient = np.unique(np.asarray(real_groups), return_inverse=True)
    if np.shape(real_groups) != (len(real),) or len(names) < folds:
        says = f"{np.shape(real_groups)} with {len(names)} patients"
        raise InputError(f"real_groups has shape {says}; accepted is ({len(real)},) and at least {folds}")
    rng = numpy_rng(seed, "two-sample folds")
    fold_real = (rng.permutation(len(names)) % folds)[patient]
    fold_fake = rng.permutation(len(fake)) % folds
    areas = []
    for fold in range(folds):
        known_real, known_fake = fold_real != fold, fold_fake != fold
        seen, new = (real[known_real], fake[known_fake]), (real[~known_real], fake[~known_fake])
        sd = seen[0].std(axis=0) + 1e-9
        x = np.concatenate(seen) / sd
        side = np.repeat([1 / len(part) * sign for part, sign in zip(seen, (1, -1), strict=True)], [*map(len, seen)])
        ridge = Ridge(((x - x.mean(axis=0)) ** 2).sum() / len(x), solver="cholesky").fit(x, side)
        areas.append(auc(*(ridge.predict(part / sd) for part in new)))
    return float(np.mean(areas))


def inception_score(probabilities: np.ndarray) -> float:
    """exp of the mean KL divergence of each row of class probabilities (n, classes) from their mean.

    Salimans et al. 2016, of all samples at once; for parity with Sun et al. 2022 alone, as it never looks at a real
    bone. 1 at least, the number of classes at most. Raises `InputError` for rows that do not add up to 1.
    """
    p = _checked(probabilities, "probabilities", 1)
    if p.min() < 0 or abs(p.sum(axis=1) - 1).max() > 1e-4:
        raise InputError(
            f"probabilities reach from {p.min():.3g} and their rows sum to up to {p.sum(axis=1).max():.3g}"
        )
    mean = p.mean(axis=0)
    terms = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(mean, 1e-300))), 0)
    return float(np.exp(terms.sum(axis=1).mean()))


def fixed_pattern_correlation(
    volumes: np.ndarray, inside: np.ndarray, *, groups=None, sigma: float = 3.0, pairs: int = 500, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correlations of two samples' high-passed interiors at the same voxels: (first, second, values) of the pairs. 0
    means independent interiors, 1 one pattern in every sample, which Frechet distance and precision do not see.

    Of at most `pairs` pairs of different `groups` (each sample its own if None). `volumes` is (n, z, y, x), `inside`
    the boolean mask of each eroded trabecular interior, within which a sample is twice freed of its Gaussian mean
    (`sigma` voxels); NaN where two share less than 50 voxels. Raises `InputError` for a bad shape or NaN.
    """
    volumes, inside = np.asarray(volumes), np.asarray(inside)
    if volumes.ndim != 4 or len(volumes) < 2:
        raise InputError(f"volumes has shape {volumes.shape}; accepted is (n, z, y, x) with n >= 2")
    if inside.shape != volumes.shape or inside.dtype != bool:
        raise InputError(f"inside is {inside.dtype} {inside.shape}; accepted is bool {volumes.shape}")
    if not np.isfinite(volumes).all():
        raise InputError("volumes holds NaN or infinite voxels; every voxel must be a number")
    texture = np.stack([_texture(v, m, sigma) for v, m in zip(volumes, inside, strict=True)])
    groups = np.arange(len(volumes)) if groups is None else groups
    first, second = pairs_between(groups, pairs, numpy_rng(seed, "stamp"))
    values = [_correlation(texture[i], texture[j], inside[i] & inside[j]) for i, j in zip(first, second, strict=True)]
    return first, second, np.array(values, float)


def _texture(volume, mask, sigma):
    weight = ndimage.gaussian_filter(mask.astype(np.float32), sigma)
    texture = np.where(mask, volume, 0).astype(np.float32)
    for _ in range(2):  # once leaves the slope of a density gradient along the border of the mask
        smooth = ndimage.gaussian_filter(texture, sigma) / np.maximum(weight, 1e-6)
        texture = np.where(mask, texture - smooth, 0)
    return texture


def _correlation(a, b, where):
    if where.sum() < FEWEST_SHARED:
        return np.nan
    a, b = a[where] - a[where].mean(), b[where] - b[where].mean()
    size = np.sqrt(np.sum(a**2) * np.sum(b**2))
    return np.sum(a * b) / size if size > 0 else np.nan


def _neighbours(k):
    if k != int(k) or k < 1:
        raise InputError(f"k is {k}; accepted is a whole number of neighbours from 1")
    return int(k)


def _pair(a, b, name_a, name_b, *, least, least_fake=None):
    a, b = _checked(a, name_a, least), _checked(b, name_b, least if least_fake is None else least_fake)
    if a.shape[1] != b.shape[1]:
        raise InputError(f"{name_a} has {a.shape[1]} features and {name_b} {b.shape[1]}; both need the same")
    return a, b


def _checked(features, name, least):
    """Features in double precision."""
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] < 1 or features.dtype.kind not in "fiu":
        raise InputError(f"{name} is {features.dtype} of shape {features.shape}; accepted are numbers (n, d)")
    if len(features) < least:
        raise InputError(f"{name} has {len(features)} samples, but at least {least} are needed")
    if not np.isfinite(features).all():
        raise InputError(f"{name} holds NaN or infinite features; every feature must be a number")
    return features.astype(np.float64)
