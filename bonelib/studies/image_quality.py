"""Image quality of models against held-out bones: scores with N, an interval and what real bones reach.

A setting is a model at a truncation of its codes, and is named for both, as in "progan 1.8".
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from bonelib import InputError
from bonelib.core.parallel import workers
from bonelib.core.random import numpy_rng
from bonelib.evaluation import metrics
from bonelib.evaluation.features import cached, scaled
from bonelib.evaluation.statistics import against_real, bounded, half_interval, of_rows
from bonelib.latent.sampling import setting
from bonelib.scans.tables import read_table

PUBLISHED = Path(__file__).with_name("published_table1.csv")  # Table 1 of Angermann et al. 2023
COLUMNS = {"inception": "FID_inc", "medicalnet": "FID_res", "vgs": "FID_vgs"}  # others are FD_ and their name
# Distances, shares, the median of the samples, and the area under the curve of a classifier, .5 where none can tell
METRICS = ("FD", "kernel distance", "RBF-MMD", "precision", "recall", "density", "coverage", "realism", "C2ST")
ELLIPSE_SD = 2.0
SIGNS = {"precision": 1, "recall": -1}  # of what truncation does to them, as published
NONE = (-np.inf, np.inf)
LIMITS = {"density": (0.0, np.inf)} | dict.fromkeys(("precision", "recall", "coverage", "C2ST"), (0.0, 1.0))
GRID = 160  # points a side on which ellipses are compared


def over_patients(patients: list[str], n: int, seed: int) -> np.ndarray:
    """Numbers of `n` of the samples of `patients`, at random, but a second one of nobody before the first of all."""
    order = numpy_rng(seed, "over patients").permutation(len(patients))
    turn = pd.Series(patients)[order].groupby(pd.Series(patients)).cumcount()
    return turn.sort_values(kind="stable").index.to_numpy()[:n]


def extracted(
    extractors: dict[str, Callable], volumes: dict[str, np.ndarray], cache=None
) -> dict[str, dict[str, np.ndarray]]:
    """{family: {set: features (n, d)}} of every set of `volumes` by worker processes, brought to scale (`scaled`)."""
    with workers() as pool:
        jobs = {key: pool.submit(_features, extractors, values, cache) for key, values in volumes.items()}
        found = {key: job.result() for key, job in jobs.items()}
    return {name: scaled(name, {key: of_set[name] for key, of_set in found.items()}) for name in extractors}


def _features(extractors, values, cache):
    return {name: cached(name, extract, values, cache) for name, extract in extractors.items()}


def _scores(real: np.ndarray, fake: np.ndarray, patients, seed: int) -> list[float]:
    """`METRICS` of a pair of feature sets (n, d), (m, d); `patients` are those of `real`."""
    distances = (metrics.frechet_distance, metrics.kernel_distance, metrics.rbf_mmd)
    shares = metrics.manifold(real, fake)
    folds = min(5, len(set(patients)), len(real) // 2, len(fake) // 2)
    told = metrics.two_sample_auc(real, fake, patients, seed=seed, folds=folds)
    return [*(distance(real, fake) for distance in distances), *(shares[key] for key in METRICS[3:-1]), told]


def table(features: dict[str, dict[str, np.ndarray]], patients: list[str], *, seed: int, draws: int) -> list[dict]:
    """One row a setting, family and one of `METRICS`, with its 95 % interval and what further real bones reach.

    `features` is {family: {"real": (n, d), "other real": (m, d), setting: (m, d), ...}}; `patients` names the patient
    of each volume of "real", whose patients are resampled. "other real" are real bones of further patients: what a
    perfect generator would get at this N. Intervals end at the `LIMITS` of a metric. Rows: setting, features, metric,
    the numbers of `against_real`, d.
    """
    rows = []
    for family, sets in features.items():
        names = _by_row(sets["real"], patients)
        values = partial(_scores, seed=seed)
        for name, k, found in against_real(values, sets, names, "interval", family, seed=seed, draws=draws):
            found["low"], found["high"] = bounded(found["low"], found["high"], LIMITS.get(METRICS[k], NONE))
            row = dict(setting=name, features=family, metric=METRICS[k])
            rows.append(row | found | dict(d=sets["real"].shape[1]))
    return rows


def _by_row(real: np.ndarray, patients) -> np.ndarray:
    """The patient of each row of features, of which some families have more than one a volume."""
    return np.repeat(np.asarray(patients), len(real) // len(patients))


def table1(rows: list[dict], models: list[str], judge: str) -> list[dict]:
    """Table 1: its twelve settings with the published values and, where the model was trained here, ours beside them,
    each with its interval and, after a stroke, that of real against real.

    FD columns are named for the features that were used; precision and recall are those of the features `judge`.
    Settings of `models` that the table does not have follow, without published values.
    """
    found = {(r["setting"], r["features"], r["metric"]): r for r in rows}
    trained, families, _ = (list(dict.fromkeys(keys)) for keys in zip(*found, strict=True))
    published = read_table(PUBLISHED)
    lines = {setting(line["model"], float(line["tr"])): line for line in published}
    own = {name: name.rsplit(" ", 1)[0] for name in trained if name not in lines}
    own = {name: model for name, model in own.items() if model in models}
    if stray := sorted(name for name, model in own.items() if model in {line["model"] for line in published}):
        raise InputError(f"quality: {stray} are no settings of Table 1; accepted are {sorted(lines)}")
    out = []
    for name, line in (lines | dict.fromkeys(own, dict.fromkeys(published[0], ""))).items():
        row = {"setting": name, **{k: line[k] for k in ("c_c", "c_g", "alpha", "n_c")}}
        row |= {f"published {k}": line[k] for k in ("FID_inc", "FID_res", "FID_vgs", "prec", "rec")}
        wanted = {COLUMNS.get(f, f"FD_{f}"): (name, f, "FD") for f in families}
        wanted |= {f"prec_{judge}": (name, judge, "precision"), f"rec_{judge}": (name, judge, "recall")}
        none = "not measured" if name in trained else "not trained"
        out.append(row | {key: _cell(found[where]) if where in found else none for key, where in wanted.items()})
    return out


def _cell(row):
    ends = "(no interval)" if row["low"] is None else f"[{row['low']:.3g}, {row['high']:.3g}]"
    return f"{row['value']:.3g} {ends} / {row['real_against_real']:.3g}"


def parity(chances: dict[str, np.ndarray], groups: dict, similar: dict[str, dict], *, seed: int, draws: int):
    """Inception score and MS-SSIM of every set, those metrics that look at no real bone: a row a set and metric.

    `chances` are class probabilities {set: (n, classes)}, empty where there is no grader; `groups` {set: patient of
    each sample, or None for drawn ones}, `similar` {set: `similarity.diversity`}.
    """
    found = {}
    for name, p in chances.items():
        rng, own = numpy_rng(seed, "inception score interval"), groups.get(name)
        own = np.arange(len(p)) if own is None else own
        value, low, high, *_ = half_interval(of_rows(metrics.inception_score, p), own, rng=rng, draws=draws)
        found[name, "inception score"] = dict(value=value, low=low, high=high, n=len(p), pairs=None, d=p.shape[1])
    found |= {(name, "MS-SSIM"): one | dict(d=1) for name, one in similar.items()}
    rows = []
    for (name, metric), numbers in found.items():
        ends = {key: numbers[key] for key in ("value", "low", "high")}
        ends["real_against_real"] = found["other real", metric]["value"]
        rows.append(dict(setting=name, metric=metric) | ends | {key: numbers[key] for key in ("n", "pairs", "d")})
    return rows


def truncation_law(
    features: dict[str, dict[str, np.ndarray]], pairs: list[tuple[str, str]], patients, *, seed: int, draws: int
) -> list[dict]:
    """What truncation does: precision and recall of the truncated setting minus those of the other one.

    `pairs` are (setting without, setting with truncation). Rows have the sign that was published or not, and as
    `real_against_real` the change between two halves of "other real", between which nothing was truncated.
    """
    rows = []
    for family, sets in features.items():
        names = _by_row(sets["real"], patients)
        for wide, narrow in pairs:
            both = np.stack([sets[wide], sets[narrow]], 1)  # of the same codes
            part = max(6, len(sets["other real"]) // 2)  # as few as neighbours can be counted among
            halves = np.stack([sets["other real"][:part], sets["other real"][-part:]], 1)
            change, rng = of_rows(_change, sets["real"], both), numpy_rng(seed, "truncation interval", family)
            found = half_interval(change, names, range(len(both)), rng=rng, draws=draws).parts()
            numbers = zip(SIGNS.items(), found, _change(sets["real"], halves), strict=True)
            for (metric, sign), (value, low, high), of_real in numbers:
                what = dict(settings=f"{wide} to {narrow}", features=family, metric=metric, change=value)
                ends = dict(low=low, high=high, real_against_real=of_real, as_published=bool(value * sign > 0))
                rows.append(what | ends | dict(n_real=len(names), n_fake=len(both), d=both.shape[2]))
    return rows


def _change(real: np.ndarray, pair: np.ndarray) -> list[float]:
    """How precision and recall change from the first to the last of a pair of sets (n, 2, d)."""
    first, last = (metrics.manifold(real, fake) for fake in pair.swapaxes(0, 1))
    return [last[key] - first[key] for key in SIGNS]


def embedded(sets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every set (n, d) in one plane (n, 2) that keeps distances as well as it can: classical MDS (Torgerson 1952).

    Sun et al. 2022, Figure 4. With Euclidean distances it is the plane of the two first principal components.
    """
    x = np.concatenate(list(sets.values()))
    x = x - x.mean(axis=0)
    left, sizes, _ = np.linalg.svd(x, full_matrices=False)
    flat = left[:, :2] * sizes[:2]
    return dict(zip(sets, np.split(flat, np.cumsum([len(s) for s in sets.values()])[:-1]), strict=True))


def ellipse(points: np.ndarray) -> np.ndarray:
    """The outline (100, 2) of `ELLIPSE_SD` standard deviations of points (n, 2)."""
    turn = np.linspace(0, 2 * np.pi, 100)
    root = np.linalg.cholesky(np.cov(points.T) + 1e-12 * np.eye(2))
    return points.mean(axis=0) + ELLIPSE_SD * np.stack([np.cos(turn), np.sin(turn)], 1) @ root.T


def ellipse_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of the ellipses of two sets of points (n, 2): 1 where they agree."""
    outlines = np.concatenate([ellipse(a), ellipse(b)])
    axes = [np.linspace(outlines[:, i].min(), outlines[:, i].max(), GRID) for i in range(2)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    inside = []
    for points in (a, b):
        offset = grid - points.mean(axis=0)
        form = np.linalg.inv(np.cov(points.T) + 1e-12 * np.eye(2))
        inside.append(np.einsum("xyi,ij,xyj->xy", offset, form, offset) <= ELLIPSE_SD**2)
    return float((inside[0] & inside[1]).sum() / max(1, (inside[0] | inside[1]).sum()))


def overlaps(sets: dict[str, np.ndarray], patients, *, seed: int, draws: int) -> list[dict]:
    """`ellipse_overlap` of every embedded setting with "real": value, interval, and that of "other real" with it."""

    def overlap(real, fake, _):
        return ellipse_overlap(real, fake)

    names, rows = _by_row(sets["real"], patients), []
    for name, _, found in against_real(overlap, sets, names, "overlap interval", seed=seed, draws=draws):
        del found["n_other"]
        rows.append(dict(setting=name) | found | dict(d=2))
    return rows


def picture_of(sets: dict[str, np.ndarray], title: str) -> dict:
    """The panel of `views.figures.scatter` of embedded sets and their ellipses; "other real" is left out."""
    shown = {name: points for name, points in sets.items() if name != "other real"}
    dots = {name: (points[:, 0], points[:, 1]) for name, points in shown.items()}
    lines = {f"_{name}": ellipse(points).T for name, points in shown.items()}  # a legend leaves such names out
    return dict(title=title, x="first axis", y="second axis", sets=dots, lines=lines)
