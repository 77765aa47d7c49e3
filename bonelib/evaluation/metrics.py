"""Distances between a real and a generated set of feature vectors, and the stamp between generated interiors.

Feature arrays have shape (n, d), one row per sample. Distances are computed block by block in double
precision, so that memory follows the input and not its square.
"""

import numpy as np
from scipy import ndimage, stats

from bonelib import InputError
from bonelib.randomness import numpy_rng

ROWS, COLUMNS = 512, 2048  # of a block: 8 MB of distances, which a cache holds, and 32 MB of 2048-d features
PRUNED = -1.0  # reach of a real sample that realism leaves out: less than any
PATIENTS = 4  # with fewer there is no interval
LEAST_SHARED = 50  # voxels; a correlation over fewer is mostly its own noise


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to `a` (n, d) and `b` (m, d).

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), Heusel et al. 2017, with covariances over n -
    1. With C = F' F from symmetric eigenvalues, the last trace is the sum of the singular values of F_a F_b'.
    Its estimate grows as d / n even between equal distributions: print n, d and the real-against-real value
    beside it. Raises `InputError` for a bad shape, NaN, or fewer than 2 samples.
    """
    a, b = _pair(a, b, "a", "b", least=2)
    mean_a, factor_a = _moments(a)
    mean_b, factor_b = _moments(b)
    cross = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    spread = np.sum(factor_a**2) + np.sum(factor_b**2) - 2 * cross
    return float(np.sum((mean_a - mean_b) ** 2) + max(spread, 0.0))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of `a` (n, d) and `b` (m, d) under k(x, y) = (x.y / d + 1)^3.

    Binkowski et al. 2018, section 4: mean of k over pairs within a, plus within b (i != j), minus twice the
    mean of k across; it may be slightly negative. Raises `InputError` for a bad shape, NaN, or fewer than 2
    samples.
    """
    a, b = _pair(a, b, "a", "b", least=2)
    width = a.shape[1]

    def cubed(dot, norms):
        value = dot / width + 1
        return value * value * value  # a tenth of the time of a power

    return _discrepancy(a, b, cubed)


def rbf_mmd(real: np.ndarray, fake: np.ndarray, bandwidth: float | None = None) -> float:
    """Unbiased squared maximum mean discrepancy under k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)).

    Gretton et al. 2012, lemma 6, the MMD of Sun et al. 2022. `bandwidth` is the median distance within (at most
    a thousand of) `real` where none is given; `real` is (n, d), `fake` (m, d). Raises `InputError` as
    `kernel_distance`, and for a bandwidth that is not positive.
    """
    real, fake = _pair(real, fake, "real", "fake", least=2)
    centre = real.mean(axis=0, dtype=np.float64)  # a common offset would cost digits, and no distance knows of it
    bandwidth = _median_distance(real) if bandwidth is None else bandwidth
    if not bandwidth > 0:
        raise InputError(
            f"bandwidth is {bandwidth}; accepted are positive numbers (0 is found where all samples agree)"
        )
    scale = -0.5 / bandwidth**2
    return _discrepancy(real, fake, lambda dot, norms: np.exp(scale * np.maximum(norms - 2 * dot, 0)), centre)


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Share of `fake` (m, d) inside the real manifold, and share of `real` (n, d) inside the generated one.

    A manifold is the union of balls around its samples that reach to their k-th neighbour: Kynkaanniemi et
    al. 2019. Raises `InputError` for a bad shape, NaN, or a set with no more than k samples.
    """
    found = manifold(real, fake, k, k)
    return found["precision"], found["recall"]


def density_coverage(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Real balls per generated sample over k, and share of real balls that hold a generated sample.

    `real` is (n, d), `fake` (m, d); Naeem et al. 2020. Density is not bounded by one.
    Raises `InputError` for a bad shape, NaN, or a set with no more than k samples.
    """
    found = manifold(real, fake, k, k)
    return found["density"], found["coverage"]


def manifold(real: np.ndarray, fake: np.ndarray, k: int = 3, k_dense: int = 5) -> dict[str, float]:
    """`precision`, `recall` and median `realism` with `k` neighbours, `density` and `coverage` with `k_dense`.

    Of one pass: the distances of every pair are computed once. `real` is (n, d), `fake` (m, d). Raises `InputError`
    as `precision_recall`.
    """
    ks = _neighbours(k), _neighbours(k_dense)
    real, fake = _pair(real, fake, "real", "fake", least=max(ks) + 1)
    reach, reach_dense = _squared_radii(real, ks)
    (fake_reach,) = _squared_radii(fake, ks[:1])
    fake_hit, real_hit, covered = np.zeros(len(fake), bool), np.zeros(len(real), bool), np.zeros(len(real), bool)
    held, best = 0, np.zeros(len(fake))
    pruned = np.where(reach <= np.median(reach), reach, PRUNED)
    for i, j, squared in _squared_distances(fake, real):
        best[i] = np.maximum(best[i], _ratios(pruned[j], squared))
        fake_hit[i] |= (squared <= reach[j]).any(axis=1)
        real_hit[j] |= (squared <= fake_reach[i, None]).any(axis=0)
        inside = squared <= reach_dense[j]
        held += int(np.count_nonzero(inside))
        covered[j] |= inside.any(axis=0)
    shares = dict(precision=float(fake_hit.mean()), recall=float(real_hit.mean()))
    shares |= dict(density=held / (ks[1] * len(fake)), coverage=float(covered.mean()))
    return shares | dict(realism=float(np.median(np.sqrt(best))))


def realism(real: np.ndarray, fake: np.ndarray, k: int = 3) -> np.ndarray:
    """Realism of every row of `fake` (m, d) -> (m,); at least 1 inside the pruned manifold of `real` (n, d).

    Largest ratio, over the real samples, of the distance to their k-th real neighbour to the distance to the
    generated sample: Kynkaanniemi et al. 2019, section 5, whose pruning drops the real balls larger than the
    median. Infinite for an exact copy. Raises `InputError` for a bad shape, NaN, or no more than k samples.
    """
    real, fake = _pair(real, fake, "real", "fake", least=_neighbours(k) + 1, least_fake=1)
    (reach,) = _squared_radii(real, (k,))
    kept = reach <= np.median(reach)
    real, reach = real[kept], reach[kept]
    best = np.zeros(len(fake))
    for i, j, squared in _squared_distances(fake, real):
        best[i] = np.maximum(best[i], _ratios(reach[j], squared))
    return np.sqrt(best)


def _ratios(reach, squared):
    """The largest ratio (rows,) of a real sample's squared reach to its squared distance; infinite for its copy."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(squared > 0, reach / squared, np.where(reach == PRUNED, 0, np.inf)).max(axis=1)


def two_sample_auc(real: np.ndarray, fake: np.ndarray, real_groups, *, seed: int = 0, folds: int = 5) -> float:
    """How well a classifier tells `fake` (m, d) from `real` (n, d) that it has not seen: 0.5 not at all, 1 always.

    Classifier two-sample test (Lopez-Paz and Oquab 2017) by ridge regression on standardised features, with as much
    ridge as there is variance in all of them; `real_groups` names n patients, who are never in two of the `folds`.
    The mean over the folds of the area under the ROC curve. Raises `InputError` for a bad shape, NaN, or fewer
    patients or fake samples than folds.
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
        seen = [(x, np.flatnonzero(of != fold)) for x, of in ((real, fold_real), (fake, fold_fake))]
        mean, sd = _mean_sd(*seen[0])
        ridge = _ridge if sum(len(rows) for _, rows in seen) <= real.shape[1] else _ridge_of_many
        weight = ridge(*seen, mean, sd) / sd
        asked = [(x, np.flatnonzero(of == fold)) for x, of in ((real, fold_real), (fake, fold_fake))]
        areas.append(auc(*(np.concatenate([part @ weight for part in _parts(*one)]) for one in asked)))
    return float(np.mean(areas))


def _parts(x, rows):
    """The rows of x in blocks, so that no set is ever copied as a whole."""
    return (x[rows[i : i + COLUMNS]] for i in range(0, len(rows), COLUMNS))


def _mean_sd(x, rows):
    mean = sum(part.sum(axis=0, dtype=np.float64) for part in _parts(x, rows)) / len(rows)
    return mean, np.sqrt(sum(((part - mean) ** 2).sum(axis=0) for part in _parts(x, rows)) / len(rows)) + 1e-9


def _ridge(a, b, mean, sd):
    """Weights (d,) of a ridge regression on which of two sets (x, rows) a row is in; classes weigh the same."""
    x = (np.concatenate([of[rows] for of, rows in (a, b)]) - mean) / sd
    side = np.repeat([1 / len(a[1]), -1 / len(b[1])], [len(a[1]), len(b[1])])
    rows = x - x.mean(axis=0)
    gram = rows @ rows.T
    return rows.T @ np.linalg.solve(gram + np.trace(gram) / len(x) * np.eye(len(x)), side)


def _ridge_of_many(a, b, mean, sd):
    """The same weights from sums over blocks of rows, where there are more of them than features."""
    total, apart, squares = np.zeros(len(mean)), np.zeros(len(mean)), np.zeros((len(mean),) * 2)
    for of_set, side in ((a, 1 / len(a[1])), (b, -1 / len(b[1]))):
        for part in _parts(*of_set):
            x = (part - mean) / sd
            total += x.sum(axis=0)
            apart += side * x.sum(axis=0)
            squares += x.T @ x
    n = len(a[1]) + len(b[1])
    squares -= np.outer(total, total) / n
    return np.linalg.solve(squares + np.trace(squares) / n * np.eye(len(mean)), apart)


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counted half."""
    positives, negatives = np.asarray(positives, float), np.asarray(negatives, float)
    ranks = stats.rankdata(np.concatenate([positives, negatives]))[: len(positives)]
    return float((ranks.mean() - (len(positives) + 1) / 2) / len(negatives))


def tpr_at(positives: np.ndarray, negatives: np.ndarray, fpr: float = 0.01) -> float:
    """Share of positives above the threshold that at most a share `fpr` of the negatives exceeds."""
    negatives = np.sort(np.asarray(negatives, float))[::-1]
    threshold = negatives[min(int(fpr * len(negatives)), len(negatives) - 1)]
    return float(np.mean(np.asarray(positives) > threshold))


def inception_score(probabilities: np.ndarray) -> float:
    """exp of the mean KL divergence of each row of class probabilities (n, classes) from their mean.

    Salimans et al. 2016, of all samples at once; for parity with Sun et al. 2022 alone, as it never looks at a real
    bone. 1 at least, the number of classes at most. Raises `InputError` for rows that do not add up to 1.
    """
    p = _checked(probabilities, "probabilities", 1).astype(np.float64)
    if p.min() < 0 or abs(p.sum(axis=1) - 1).max() > 1e-4:
        raise InputError(
            f"probabilities reach from {p.min():.3g} and their rows sum to up to {p.sum(axis=1).max():.3g}"
        )
    mean = p.mean(axis=0)
    terms = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(mean, 1e-300))), 0)
    return float(np.exp(terms.sum(axis=1).mean()))


def bootstrap_interval(
    statistic,
    real: np.ndarray,
    fake: np.ndarray,
    real_groups,
    *,
    rng: np.random.Generator,
    draws: int = 200,
    level: float = 0.95,
):
    """Interval (low, high) of `statistic(real, fake)` by random halves of patients and of fake samples.

    Halves without replacement are used for every statistic, because the duplicates of a draw with replacement
    collapse k-NN radii to zero and lift FD and KID; the deviations of the draws from their own mean are laid
    about the full-sample value, scaled by sqrt(m / (n - m)) for m of n patients, which is one for halves
    (Shao and Wu 1989). An interval of a share may therefore end beyond 0 or 1. `real` is (n, d), `fake` (m,
    d), `real_groups` n patient names; the ends have the shape of the statistic. They are NaN for fewer than 4
    patients, and where halves are too few for the statistic. Raises `InputError` for fewer than 4 samples, names that
    do not fit, NaN, draws < 2 or a level outside (0, 1).
    """
    real, fake = _pair(real, fake, "real", "fake", least=4)
    names, patient = np.unique(np.asarray(real_groups), return_inverse=True)
    if np.shape(real_groups) != (len(real),):
        raise InputError(f"real_groups has shape {np.shape(real_groups)}, but real needs ({len(real)},)")
    if draws < 2 or not 0 < level < 1:
        raise InputError(f"draws is {draws} and level {level}; accepted are draws >= 2 and 0 < level < 1")
    point, half, half_fake = statistic(real, fake), len(names) // 2, len(fake) // 2
    values = []
    try:
        for _ in range(draws if len(names) >= PATIENTS else 0):
            chosen = np.isin(patient, rng.choice(len(names), half, replace=False))
            values.append(statistic(real[chosen], fake[np.sort(rng.choice(len(fake), half_fake, replace=False))]))
    except InputError:  # a half has too few samples
        values = []
    none = np.full(np.shape(point), np.nan)
    low, high = _about(point, values, half, len(names), level) if values else (none, none)
    return (float(low), float(high)) if low.ndim == 0 else (low, high)


def half_interval(statistic, groups, *, rng: np.random.Generator, draws: int = 200, level: float = 0.95):
    """Interval (low, high) of `statistic(rows)` of one set by random halves of its `groups`, as `bootstrap_interval`.

    `groups` names the patient of each of n rows, or the sample itself where it is a drawn one; `rows` are numbers from
    0 to n - 1. Draws whose statistic is NaN are left out. (None, None) for fewer than 4 groups, or if nothing is left.
    """
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < PATIENTS:
        return None, None
    half = len(names) // 2
    halves = (np.flatnonzero(np.isin(group, rng.choice(len(names), half, replace=False))) for _ in range(draws))
    values = np.array([statistic(rows) for rows in halves], float)
    values, point = values[~np.isnan(values)], statistic(np.arange(len(group)))
    if len(values) < 2 or np.isnan(point):
        return None, None
    low, high = _about(point, values, half, len(names), level)
    return float(low), float(high)


def pair_mean(first: np.ndarray, second: np.ndarray, values: np.ndarray, groups, *, rng, draws: int = 200) -> dict:
    """Mean of `values` (p,) of the pairs of samples `first`, `second`, with its interval by halves of `groups` (n,).

    A half has the pairs both of whose samples are in it: samples vary and not pairs. NaN values are left out. Returns
    value, low, high, n (samples) and pairs.
    """

    def mean(rows):
        kept = values[np.isin(first, rows) & np.isin(second, rows)]
        return float(np.mean(kept[~np.isnan(kept)])) if np.isfinite(kept).any() else np.nan

    low, high = half_interval(mean, groups, rng=rng, draws=draws)
    every = mean(np.arange(len(groups)))
    found = dict(value=None if np.isnan(every) else every, low=low, high=high)
    return found | dict(n=len(groups), pairs=int(np.isfinite(values).sum()))


def pairs_between(groups, most: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` random pairs (first, second) of samples of different `groups` (n,)."""
    names = np.asarray(groups)
    first, second = np.triu_indices(len(names), 1)
    apart = names[first] != names[second]
    first, second = first[apart], second[apart]
    order = rng.permutation(len(first))[:most]
    return first[order], second[order]


def _about(point, values, half, n, level):
    """The deviations of the draws from their own mean, scaled and laid about the full-sample value."""
    values = np.asarray(values, float)
    tail = (1 - level) / 2
    spread = np.quantile(values - values.mean(axis=0), [tail, 1 - tail], axis=0)
    return np.asarray(point, float) + np.sqrt(half / (n - half)) * spread


def stamp(
    volumes: np.ndarray, inside: np.ndarray, *, groups=None, sigma: float = 3.0, pairs: int = 500, seed: int = 0
) -> float:
    """Mean of `stamps`: 0 means independent interiors, 1 one pattern stamped into every bone.

    Own measure: Frechet distance and precision do not see a stamp. Raises `InputError` as `stamps`, and if no pair
    shares 50 voxels.
    """
    values = stamps(volumes, inside, groups=groups, sigma=sigma, pairs=pairs, seed=seed)[2]
    if np.isnan(values).all():
        raise InputError(f"no two interiors share {LEAST_SHARED} voxels with texture; more overlap is needed")
    return float(np.nanmean(values))


def stamps(
    volumes: np.ndarray, inside: np.ndarray, *, groups=None, sigma: float = 3.0, pairs: int = 500, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correlations of two samples' high-passed interiors at the same voxels: (first, second, values) of the pairs.

    Of at most `pairs` pairs of different `groups` (each sample its own if None). `volumes` is (n, z, y, x), `inside`
    the boolean mask of each eroded trabecular interior, same shape; a sample twice freed of its Gaussian mean
    (`sigma` voxels) within its own mask is its texture, and a pair is compared where both masks hold, NaN where they
    share less than 50 voxels. Raises `InputError` for a bad shape or NaN.
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
    if where.sum() < LEAST_SHARED:
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
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] < 1 or features.dtype.kind not in "fiu":
        raise InputError(f"{name} is {features.dtype} of shape {features.shape}; accepted are numbers (n, d)")
    if len(features) < least:
        raise InputError(f"{name} has {len(features)} samples, but at least {least} are needed")
    if not np.isfinite(features).all():
        raise InputError(f"{name} holds NaN or infinite features; every feature must be a number")
    return features


def _moments(x):
    """Mean (d,) and a factor F (r, d) with F' F the covariance, r = min(n, d)."""
    mean = x.mean(axis=0, dtype=np.float64)
    n, d = x.shape
    if n <= d:
        return mean, (x - mean) / np.sqrt(n - 1)
    covariance = np.zeros((d, d))
    for i in range(0, n, COLUMNS):
        centred = x[i : i + COLUMNS] - mean
        covariance += centred.T @ centred
    values, vectors = np.linalg.eigh(covariance / (n - 1))
    return mean, np.sqrt(np.maximum(values, 0))[:, None] * vectors.T


def _discrepancy(a, b, kernel, centre=0.0):
    """Unbiased squared mean discrepancy under `kernel`, a function of dot products and summed squared norms."""
    return _kernel_mean(a, kernel, centre) + _kernel_mean(b, kernel, centre) - 2 * _kernel_across(a, b, kernel, centre)


def _kernel_mean(x, kernel, centre):
    """Mean of the kernel over the pairs i != j within x."""
    total = 0.0
    for i, j, dot, norms in _dots(x, None, centre):
        values = kernel(dot, norms)
        total += 2 * values.sum()
        if j.start == i.start:  # the block's own square holds every pair twice, and each sample with itself
            square = values[:, : len(values)]
            total -= square.sum() + np.trace(square)
    return float(total / (len(x) * (len(x) - 1)))


def _kernel_across(a, b, kernel, centre):
    total = sum(kernel(dot, norms).sum() for _, _, dot, norms in _dots(a, b, centre))
    return float(total / (len(a) * len(b)))


def _median_distance(x):
    some = x[np.linspace(0, len(x) - 1, min(len(x), ROWS)).astype(int)]
    squared = next(_squared_distances(some, some))[2]
    return float(np.median(np.sqrt(squared[np.triu_indices(len(squared), 1)])))


def _dots(a, b, centre):
    """Blocks (rows, columns, dot products, summed squared norms) that cover a x b in double precision.

    Without `b`, of the pairs within `a` those of each block of rows with itself and with what follows it.
    """
    other, step = a if b is None else b, max(ROWS, COLUMNS)
    for i in range(0, len(a), ROWS):
        rows = a[i : i + ROWS] - np.float64(centre)
        row_norms = np.einsum("nd,nd->n", rows, rows)[:, None]
        for j in range(i if b is None else 0, len(other), step):
            columns = other[j : j + step] - np.float64(centre)
            norms = row_norms + np.einsum("nd,nd->n", columns, columns)
            yield slice(i, i + len(rows)), slice(j, j + len(columns)), rows @ columns.T, norms


def _squared_distances(a, b):
    """Blocks (rows, columns, squared distances) that cover a x b, or if `b` is None the pairs of `_dots`."""
    centre = (a if b is None else b).mean(axis=0, dtype=np.float64)
    for i, j, dot, norms in _dots(a, b, centre):
        dot *= -2
        dot += norms
        dot[dot < 1e-13 * norms] = 0  # rounding of the expanded square; these are copies
        yield i, j, dot


def _squared_radii(x, ks):
    """For every k of `ks`, the squared distance (n,) of every sample to its k-th nearest other sample."""
    most = max(ks)
    nearest = np.full((len(x), most), np.inf)
    for i, j, squared in _squared_distances(x, None):
        if j.start == i.start:
            np.fill_diagonal(squared, np.inf)
        nearest[i] = _least(np.hstack([nearest[i], squared]), most)
        after = slice(max(i.stop, j.start), j.stop)  # to them the rows are new neighbours, too
        if after.start < after.stop:
            turned = squared[:, after.start - j.start :].T
            nearest[after] = _least(np.hstack([nearest[after], turned]), most)
    nearest.sort(axis=1)
    return [nearest[:, k - 1] for k in ks]


def _least(values, k):
    return np.partition(values, k - 1, axis=1)[:, :k]
