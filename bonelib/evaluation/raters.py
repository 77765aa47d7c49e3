"""Expert ratings: a blinded key, agreement of raters, and scores that are held against them (section 4.5, Figure 8).

A rating is 1 (best) to 5. Statistics work along the last axes of their arrays, so that all draws of a bootstrap are
one call.
"""

import html
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import integrate, optimize, stats

from bonelib import InputError
from bonelib.randomness import numpy_rng
from bonelib.scans.tables import read_table

LEVELS = 5
CRITERIA = ("sharpness", "valid image area", "artefacts", "contours", "repetitive patterns")
COLUMNS = ("form", "rater", "code", "score")
LETTERS = "bcdfghjkmnpqrstvwxz"  # no vowels, so that no code is a word
LEAST = 4  # samples below which no interval is given


def blinded(items: list[dict], repeats: int, seed: int, form: str = "") -> list[dict]:
    """The key of a form: a row for every one of `items` and for `repeats` of them once more, each under a new code.

    Rows are those of `items` with `code`, five random letters, `item`, its number, and `again`, 1 where it is a
    repeat. Rows are in the order of their codes, which says nothing; another `form` has others. Raises `InputError` for
    more repeats than items.
    """
    if not 0 <= repeats <= len(items):
        raise InputError(f"repeats is {repeats}; accepted is 0 to {len(items)}, the number of items")
    rng, codes = numpy_rng(seed, "blinding", form), set()
    while len(codes) < len(items) + repeats:
        codes.add("".join(rng.choice(list(LETTERS), 5)))
    codes = rng.permutation(sorted(codes))
    chosen = [*((i, 0) for i in range(len(items))), *((i, 1) for i in sorted(rng.permutation(len(items))[:repeats]))]
    rows = [
        {"code": str(code), **items[i], "item": i, "again": again}
        for code, (i, again) in zip(codes, chosen, strict=True)
    ]
    return sorted(rows, key=lambda row: row["code"])


def order(key: list[dict], seed: int, number: int) -> list[str]:
    """The codes of a key in the order in which rater `number` sees them: at random, a repeat long after its first.

    Repeats come in the last third and what they repeat in the first two thirds, or as near to that as there is room.
    """
    rng = numpy_rng(seed, "order of rating", number)
    repeated = {row["item"] for row in key if row["again"]}
    early = [row["code"] for row in key if not row["again"] and row["item"] in repeated]
    late = [row["code"] for row in key if row["again"]]
    free = list(rng.permutation([row["code"] for row in key if row["item"] not in repeated]))
    split = min(len(free), max(0, 2 * len(key) // 3 - len(early)))
    halves = [rng.permutation(early + free[:split]), rng.permutation(late + free[split:])]
    return [str(code) for half in halves for code in half]


def read_ratings(folder: str | Path, key: list[dict], form: str) -> tuple[list[dict], int]:
    """The ratings of all CSV files in a folder, any number of raters: rows of `key` with rater (text) and score (int).

    Answers to other forms than `form` are left out; their number is the second value. Of two answers of a rater to one
    code that of the newer file counts, and in one file the later row. Raises `InputError` naming file and line of a
    code that is not in the key, or a score that is not 1 to 5.
    """
    known, found, others = {row["code"]: row for row in key}, {}, 0
    for path in sorted(Path(folder).glob("*.csv"), key=lambda p: (p.stat().st_mtime, p.name)):
        for line, row in enumerate(read_table(path), 2):
            if missing := [c for c in COLUMNS if row.get(c) is None]:
                raise InputError(f"{path}, line {line}: no column {missing[0]}; accepted are files that the form saves")
            if row["form"] != form:
                others += 1
                continue
            if row["code"] not in known:
                raise InputError(f"{path}, line {line}: code {row['code']!r:.40} is not in the key of this form")
            if row["score"] not in (accepted := [str(n) for n in range(1, LEVELS + 1)]):
                raise InputError(
                    f"{path}, line {line}: score is {row['score']!r:.40}; accepted are {', '.join(accepted)}"
                )
            rater = html.escape(row["rater"].strip().replace("|", "/")) or path.stem
            found[rater, row["code"]] = {"rater": rater, **known[row["code"]], "score": int(row["score"])}
    return list(found.values()), others


def matrices(ratings: list[dict], items: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Raters, and their scores (raters, items) at first sight and again; NaN where there is none."""
    raters = sorted({row["rater"] for row in ratings})
    scores = np.full((2, len(raters), items), np.nan)
    for row in ratings:
        scores[int(row["again"]), raters.index(row["rater"]), int(row["item"])] = row["score"]
    return raters, scores[0], scores[1]


def weighted_kappa(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cohen's kappa with quadratic weights of ratings (..., n) and (..., n): Cohen 1968. NaN where nothing varies.

    1 - E(a - b)^2 over samples / E(a - b)^2 over all pairs of ratings.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    chance = a.var(-1) + b.var(-1) + (a.mean(-1) - b.mean(-1)) ** 2
    return 1 - _ratio(np.mean((a - b) ** 2, -1), chance)


def icc(scores: np.ndarray) -> np.ndarray:
    """ICC(2,1), absolute agreement of single ratings by random raters, of scores (..., raters, n).

    (MSR - MSE) / (MSR + (k - 1) MSE + k (MSC - MSE) / n): Shrout and Fleiss 1979. NaN where nothing varies.
    """
    scores = np.asarray(scores, float)
    k, n = scores.shape[-2:]
    mean = scores.mean((-2, -1), keepdims=True)
    sample, rater = scores.mean(-2, keepdims=True), scores.mean(-1, keepdims=True)
    msr = k * ((sample - mean) ** 2).sum((-2, -1)) / (n - 1)
    msc = n * ((rater - mean) ** 2).sum((-2, -1)) / (k - 1)
    mse = ((scores - sample - rater + mean) ** 2).sum((-2, -1)) / ((n - 1) * (k - 1))
    return _ratio(msr - mse, msr + (k - 1) * mse + k * (msc - mse) / n)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of (..., n) and (..., n), ties at their mean rank. NaN where nothing varies."""
    a, b = (stats.rankdata(x, axis=-1) for x in (a, b))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return _ratio((a * b).sum(-1), np.sqrt((a**2).sum(-1) * (b**2).sum(-1)))


def _ratio(above, below):
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=np.asarray(below) > 1e-12)


def estimate(statistic: Callable, *values: np.ndarray, rng: np.random.Generator, draws: int = 1000) -> dict:
    """`statistic` of `values` (..., n) with its 95 % interval: value, low, high, N.

    The bootstrap resamples the last axis, on which samples are independent: of real bones one a patient. Its
    quantiles are taken of the draws in which the statistic exists.
    """
    n = values[0].shape[-1]
    value = float(statistic(*values)) if n > 1 else np.nan
    if not np.isfinite(value):
        return dict(value=None, low=None, high=None, N=n)
    drawn = rng.integers(n, size=(draws, n))
    resampled = statistic(*(np.moveaxis(v[..., drawn], -2, 0) for v in values))
    known = resampled[np.isfinite(resampled)]
    if n < LEAST or len(known) < draws / 2:
        return dict(value=value, low=None, high=None, N=n)
    low, high = np.quantile(known, [0.025, 0.975])
    return dict(value=value, low=float(low), high=float(high), N=n)


def study(
    raters: list[str], first: np.ndarray, again: np.ndarray, scores: dict[str, np.ndarray], *, seed: int, draws: int
) -> list[dict]:
    """Agreement between raters and of each with himself, and how each score follows each rater (Figure 8).

    `first` and `again` are (raters, n), NaN where not rated; `scores` {name: (n,)} of the same samples, NaN for what
    shall not enter the correlation. Rows: quantity, of, value, low, high, N.
    """
    rows = []

    def add(quantity, of, statistic, *values):
        kept = np.isfinite(np.stack([v for value in values for v in np.atleast_2d(value)])).all(0)
        rng = numpy_rng(seed, "raters", quantity, of)
        rows.append(
            dict(quantity=quantity, of=of) | estimate(statistic, *(v[..., kept] for v in values), rng=rng, draws=draws)
        )

    for i in range(len(raters)):
        for j in range(i):
            add("weighted kappa between raters", f"{raters[j]}, {raters[i]}", weighted_kappa, first[j], first[i])
    if len(raters) > 1:
        add("ICC(2,1) between raters", "all", icc, first)
    for name, one, other in zip(raters, first, again, strict=True):
        add("weighted kappa of repeats", name, weighted_kappa, one, other)
    for label, values in scores.items():
        for name, one in zip(raters, first, strict=True):
            add(f"Spearman, realism {label}", name, spearman, values, one)
    return rows


# A study of raters who are simulated, whose agreement and correlation are planted and therefore known


def simulated(rng: np.random.Generator, n: int, repeats: int, *, rho: float, agreement: float, repeatability: float):
    """Two simulated raters and a score: (first (2, n), again (2, n), score (n,)).

    Every sample has a visible badness from N(0, 1), with which the score correlates by -`rho`. What a rater perceives
    correlates with it so that two raters correlate by `agreement`, and with what the same rater perceives on another
    day by `repeatability`. It is cut into five ratings, a fifth of all samples each. All but the first `repeats`
    samples are NaN in `again`.
    """
    badness, taste, noise = rng.standard_normal(n), rng.standard_normal((2, n)), rng.standard_normal((2, 2, n))
    score = -rho * badness + np.sqrt(1 - rho**2) * rng.standard_normal(n)
    kept = np.sqrt(agreement) * badness + np.sqrt(repeatability - agreement) * taste
    first, again = 1.0 + np.searchsorted(_cuts(), kept + np.sqrt(1 - repeatability) * noise)
    again[:, repeats:] = np.nan
    return first, again, score


def planted(*, rho: float, agreement: float, repeatability: float) -> dict[str, float]:
    """What `study` estimates of `simulated` raters, in the limit of many samples; by integrals, not by simulation.

    With equal marginals ICC(2,1) and quadratic kappa are both the correlation of the ratings (Fleiss and Cohen 1973).
    """
    between, within = _rating_correlation(agreement), _rating_correlation(repeatability)
    return {
        "weighted kappa between raters": between,
        "ICC(2,1) between raters": between,
        "weighted kappa of repeats": within,
        "Spearman, realism simulated": _rank_correlation(-rho * np.sqrt(agreement)),
    }


def recovery(studies: int, n: int, repeats: int, *, seed: int, draws: int, **how: float) -> list[dict]:
    """Many `simulated` studies, analysed by `study`: does it find what was `planted`?

    Rows: quantity, planted, mean of the estimates, share of the 95 % intervals that hold the planted value, the number
    of studies with an estimate, and N, the samples of a study's estimate. Of the raters the first one's rows count, so
    that every study gives one value.
    """
    truth, found = planted(**how), {}
    for i in range(studies):
        first, again, score = simulated(numpy_rng(seed, "simulated raters", i), n, repeats, **how)
        rows = study(["1", "2"], first, again, {"simulated": score}, seed=seed + i, draws=draws)
        for row in rows:
            if row["of"] != "2" and row["low"] is not None:
                found.setdefault(row["quantity"], []).append(row)
    return [
        {
            "quantity": name,
            "planted": truth[name],
            "mean estimate": float(np.mean([row["value"] for row in rows])),
            "intervals that hold it": float(np.mean([row["low"] <= truth[name] <= row["high"] for row in rows])),
            "studies": len(rows),
            "N": rows[0]["N"],
        }
        for name, rows in found.items()
    ]


def _cuts():
    return stats.norm.ppf(np.arange(1, LEVELS) / LEVELS)


def _integral(at):
    """Of `at`(y) over the standard normal density of y, between the cuts."""
    edges = [-8, *_cuts(), 8]
    parts = [
        integrate.quad(lambda y: stats.norm.pdf(y) * at(y), *ends)[0] for ends in zip(edges, edges[1:], strict=False)
    ]
    return np.array(parts)


def _rating_correlation(r):
    """Of two ratings cut from normal variables that correlate by `r`."""
    if r >= 1:
        return 1.0
    cuts, slope, spread = _cuts(), r, np.sqrt(1 - r**2)
    # The expected rating given the other variable, then its mean over each interval of that one
    given = _integral(lambda y: 1 + stats.norm.sf(cuts, slope * y, spread).sum())
    levels = np.arange(1, LEVELS + 1)
    return float((levels @ given - levels.mean() ** 2) / levels.var())


def _rank_correlation(r):
    """Spearman's, with mean ranks, of a normal variable and a rating cut from one that correlates by `r` with it."""
    given = _integral(lambda y: stats.norm.cdf(r * y / np.sqrt(2 - r**2)))  # E(rank of x | y)
    ranks = (np.arange(LEVELS) + 0.5) / LEVELS
    return float((ranks @ given - 0.25) / np.sqrt(ranks.var() / 12))


# Real samples of known degradation calibrate a score


def calibration(scores: np.ndarray, *, seed: int, draws: int) -> list[dict]:
    """How a score falls along the levels of a degradation: `scores` (patients, levels), level 0 untouched.

    Rows: level, mean score with its 95 % interval over patients, N, and in the first row `spearman`, between score and
    level within a patient, averaged over patients, with its interval.
    """
    levels = np.arange(scores.shape[1])

    def follows(values):  # (..., levels, patients)
        by_patient = np.moveaxis(values, -2, -1)
        return spearman(by_patient, np.broadcast_to(levels, by_patient.shape)).mean(-1)

    rng = numpy_rng(seed, "calibration")
    rows = []
    for level in levels:
        found = estimate(lambda x: x.mean(-1), scores[:, level], rng=rng, draws=draws)
        rows.append({"level": int(level)} | found)
    found = estimate(follows, scores.T, rng=rng, draws=draws)
    rows[0] |= {"spearman": found["value"], "spearman low": found["low"], "spearman high": found["high"]}
    return rows


def equivalent_level(means: list[float], value: float) -> float:
    """The level of degradation at which real samples have a score of `value`, between 0 and the last level.

    The mean scores of the levels are made to fall first (isotonic regression), then joined by lines.
    """
    falling = -optimize.isotonic_regression([-m for m in means]).x
    return float(np.interp(-value, -falling, np.arange(len(means))))
