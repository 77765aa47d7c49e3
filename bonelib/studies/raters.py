"""Expert ratings: a blinded key, agreement of raters, and scores that are held against them (section 4.5, Figure 8).

A rating is 1 (best) to 5.
"""

import html
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import optimize, stats
from sklearn.metrics import cohen_kappa_score

from bonelib import InputError
from bonelib.core.random import numpy_rng
from bonelib.evaluation.statistics import patient_draws, quantiles
from bonelib.scans.tables import read_table

LEVELS = 5
CRITERIA = ("sharpness", "valid image area", "artefacts", "contours", "repetitive patterns")
COLUMNS = ("form", "rater", "code", "score")
LETTERS = "bcdfghjkmnpqrstvwxz"  # no vowels, so that no code is a word
LEAST = 4  # samples below which no interval is given


def blinded(items: list[dict], repeats: int, seed: int, form: str = "") -> list[dict]:
    """The key of a form: a row for every one of `items` and for `repeats` of them once more, each under a new code of
    five random letters, with its number (`item`) and whether it is a repeat (`again`).

    Rows are in the order of their codes, which says nothing; another `form` has others. Raises `InputError` for more
    repeats than items.
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
    """The codes of a key in the order in which rater `number` sees them: at random, but repeats in the last third, and
    what they repeat before it, as far as there is room."""
    rng = numpy_rng(seed, "order of rating", number)
    repeated = {row["item"] for row in key if row["again"]}
    early = [row["code"] for row in key if not row["again"] and row["item"] in repeated]
    late = [row["code"] for row in key if row["again"]]
    free = list(rng.permutation([row["code"] for row in key if row["item"] not in repeated]))
    split = min(len(free), max(0, 2 * len(key) // 3 - len(early)))
    halves = [rng.permutation(early + free[:split]), rng.permutation(late + free[split:])]
    return [str(code) for half in halves for code in half]


def read_ratings(folder: str | Path, key: list[dict], form: str) -> tuple[list[dict], int]:
    """The ratings of all CSV files in a folder: rows of `key` with rater (text) and score (int), and the number of
    answers to other forms, which are left out.

    Of two answers of a rater to one code the newer counts. Raises `InputError` naming file and line of a code that is
    not in the key, or a score that is not 1 to 5.
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


def weighted_kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights of ratings (n,) and (n,): Cohen 1968. NaN where nothing varies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn, that nothing varies
        return float(cohen_kappa_score(a.astype(int), b.astype(int), weights="quadratic"))


def icc(scores: np.ndarray) -> float:
    """ICC(2,1), absolute agreement of single ratings by random raters, of scores (raters, n).

    (MSR - MSE) / (MSR + (k - 1) MSE + k (MSC - MSE) / n): Shrout and Fleiss 1979. NaN where nothing varies.
    """
    k, n = scores.shape
    mean, sample, rater = scores.mean(), scores.mean(0, keepdims=True), scores.mean(1, keepdims=True)
    msr = k * ((sample - mean) ** 2).sum() / (n - 1)
    msc = n * ((rater - mean) ** 2).sum() / (k - 1)
    mse = ((scores - sample - rater + mean) ** 2).sum() / ((n - 1) * (k - 1))
    below = msr + (k - 1) * mse + k * (msc - mse) / n
    return float((msr - mse) / below) if below > 1e-12 else np.nan


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of (n,) and (n,), ties at their mean rank. NaN where nothing varies."""
    return float(stats.spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else np.nan


def estimate(statistic: Callable, *values: np.ndarray, rng: np.random.Generator, draws: int = 1000) -> dict:
    """`statistic` of `values` (..., n) with its 95 % interval: value, low, high, N. The bootstrap resamples the last
    axis. No interval for fewer than four samples, or where the statistic exists in fewer than half of the draws."""
    n = values[0].shape[-1]
    value = float(statistic(*values)) if n > 1 else np.nan
    if not np.isfinite(value):
        return dict(value=None, low=None, high=None, N=n)
    some = patient_draws(lambda i: statistic(*(v[..., i] for v in values)), range(n), rng=rng, draws=draws)
    if n < LEAST or np.isfinite(some).sum() < draws / 2:
        return dict(value=value, low=None, high=None, N=n)
    low, high = quantiles(some)
    return dict(value=value, low=float(low), high=float(high), N=n)


def study(
    raters: list[str], first: np.ndarray, again: np.ndarray, scores: dict[str, np.ndarray], *, seed: int, draws: int
) -> list[dict]:
    """Agreement between raters and of each with himself, and how each score follows each rater (Figure 8): rows.

    `first` and `again` are (raters, n), NaN where not rated; `scores` {name: (n,)} of the same samples, NaN for what
    shall not enter the correlation.
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


def calibration(scores: np.ndarray, *, seed: int, draws: int) -> list[dict]:
    """How a score falls along the levels of a degradation, `scores` (patients, levels) from untouched: mean with its
    interval over patients, and in the first row `spearman`, between score and level within a patient, with its
    interval."""
    rng, levels = numpy_rng(seed, "calibration"), np.arange(scores.shape[1])
    rows = []
    for level in levels:
        rows.append({"level": int(level)} | estimate(np.mean, scores[:, level], rng=rng, draws=draws))
    follows = np.array([spearman(of_patient, levels) for of_patient in scores])
    found = estimate(np.mean, follows, rng=rng, draws=draws)
    rows[0] |= {"spearman": found["value"], "spearman low": found["low"], "spearman high": found["high"]}
    return rows


def equivalent_level(means: list[float], value: float) -> float:
    """The level of degradation at which real samples have a score of `value`, between 0 and the last level.

    The mean scores of the levels are made to fall first (isotonic regression), then joined by lines.
    """
    falling = -optimize.isotonic_regression([-m for m in means]).x
    return float(np.interp(-value, -falling, np.arange(len(means))))
