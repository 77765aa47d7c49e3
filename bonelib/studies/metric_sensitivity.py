"""Metric sensitivity: how each metric responds to graded corruptions of real scans.

Held-out stacks are corrupted in eight ways (`corruption`) at rising strength and compared with stacks of training
patients. Every metric is turned so that it rises with damage.
"""

from functools import partial

import numpy as np
import pandas as pd
from scipy import stats
from scipy.spatial.distance import cdist

from bonelib.core.parallel import workers
from bonelib.core.random import numpy_rng
from bonelib.evaluation import features, metrics
from bonelib.evaluation.contours import BONE, smoothed
from bonelib.evaluation.features import scaled
from bonelib.evaluation.morphometry import connectivity as loops
from bonelib.latent.models import calibrated
from bonelib.scans.preprocessing import to_unit
from bonelib.scans.volumes import Volume
from bonelib.studies import corruption
from bonelib.training.grading import known_grader

FOLLOWS, NOISE = 0.9, 2.0  # least Spearman correlation, and rise in SDs between real sets
LEAST = 1e-3  # of a metric that is the same in all sets of real stacks, as the share of repeats
SETS = ("duplicated patients", "dropped mode", "memorised copies")
CORRUPTIONS = (*corruption.VOLUMES, *SETS)
CONNECTIVITY = "Conn.D"  # per mm3, of the trabecular interior
# What a metric is meant to be sensitive to; all else is found, not claimed.
CLAIMS = {
    # not motion: it moves mass about, and the means and spreads over a whole volume of random filters hardly change
    "random3d kernel distance": ("blur", "noise"),
    "random3d FD": ("blur", "noise"),
    "spectrum kernel distance": ("blur", "noise", "motion"),
    "spectrum FD": ("blur", "noise", "motion"),
    "vgs kernel distance": ("motion",),
    "vgs FD": ("motion",),
    "random3d copies": ("memorised copies",),
    "spectrum copies": ("memorised copies",),
    "random3d repeats": ("duplicated patients",),
    "spectrum repeats": ("duplicated patients",),
    "Conn.D distance": ("perforated plates",),
}


def stillest(rows: list[dict], grade: dict[str, int], seed: int) -> list[dict]:
    """Stacks in the order in which they are taken: by the motion `grade` of their scan, then the first of every scan.

    Among equals at random.
    """
    order = numpy_rng(seed, "ladder order").permutation(len(rows))
    return sorted((rows[i] for i in order), key=lambda row: (grade[row["scan"]], row["start"]))


def set_distances(reference: np.ndarray, fake: np.ndarray, patients, seed: int = 0) -> dict[str, float]:
    """Metrics of a set of features (m, d) against `reference` (n, d) of `patients`, each rising with damage.

    `copies` is the share of samples nearer to a training sample than that one is to any other (one minus the
    authenticity of Alaa et al. 2022), `repeats` the share of samples that another one of the set equals.
    """
    shares = metrics.manifold(reference, fake)
    realism, folds = shares.pop("realism"), min(5, len(set(patients)), len(fake) // 2)
    gaps, own, within = cdist(fake, reference), cdist(reference, reference), cdist(fake, fake)
    np.fill_diagonal(own, np.inf)
    np.fill_diagonal(within, np.inf)
    nearest = gaps.argmin(axis=1)
    return {
        "FD": metrics.frechet_distance(reference, fake),
        "kernel distance": metrics.kernel_distance(reference, fake),
        "RBF-MMD": metrics.rbf_mmd(reference, fake),
        **{f"1 - {name}": 1 - value for name, value in shares.items()},
        "- realism": -realism,
        "C2ST": metrics.two_sample_auc(reference, fake, patients, seed=seed, folds=folds),
        "copies": float(np.mean(gaps.min(axis=1) < own.min(axis=1)[nearest])),
        "repeats": float(np.mean(within.min(axis=1) < 1e-6 * np.median(within[np.isfinite(within)]))),
    }


def connectivity(volume: Volume, interior: np.ndarray) -> float:
    """Loops of the largest piece of bone in a mask, per mm3 of it: the connectivity density."""
    return loops((smoothed(volume) > BONE) & interior) / float(interior.sum() * np.prod(volume.spacing))


def _corrupted(values: np.ndarray, data: dict, number: int, strengths: tuple, grading_dir, seed: int) -> list[dict]:
    """One stack (z, y, x) in [0, 1], spoiled in the five ways that change a volume: one row a way and strength.

    Rows: corruption, strength, `Conn.D`, and under the name of each family the features (d,) of the spoiled stack.
    """
    volume = calibrated(np.asarray(values, np.float32), data)
    interior, rows = corruption.interior_of(volume), []
    extractors = _extractors(grading_dir, seed)
    for name, spoil in corruption.VOLUMES.items():
        for strength in strengths:
            now = spoil(volume, strength, numpy_rng(seed, "corruption", name, number), interior)
            row = dict(corruption=name, strength=strength) | {CONNECTIVITY: connectivity(now, interior)}
            stack = to_unit(now.voxels, data["intensity"]).astype(np.float16)[None]  # as real stacks are kept
            rows.append(row | {family: extract(stack)[0] for family, extract in extractors.items()})
    return rows


def _described(values: np.ndarray, data: dict, grading_dir, seed: int, with_connectivity: bool = True) -> dict:
    """Features of one stack as it is, by family, and its `Conn.D`, None where it is not asked for."""
    found = {family: extract(values[None])[0] for family, extract in _extractors(grading_dir, seed).items()}
    volume = calibrated(np.asarray(values, np.float32), data)
    loops = connectivity(volume, corruption.interior_of(volume)) if with_connectivity else None
    return found | {CONNECTIVITY: loops}


def _extractors(grading_dir, seed):
    own = dict(random3d=partial(features.random3d, seed=seed), spectrum=features.spectrum)
    grader = known_grader(grading_dir)
    return own | (dict(vgs=partial(features.graded, grader=grader)) if grader else {})


def run(
    reference: np.ndarray,
    patients: list[str],
    pool: np.ndarray,
    data: dict,
    *,
    volumes: int,
    strengths: tuple,
    draws: int,
    grading_dir,
    seed: int,
) -> list[dict]:
    """One row a corruption, metric and strength, 0 among them, with `value` and `noise`.

    `reference` (n, z, y, x) are stacks of training patients, `pool` those of held-out ones, of which the first
    `volumes` in a random order are corrupted. `noise` is the SD of the metric between `draws` random sets of as many
    real stacks of the pool.
    """
    volumes = min(volumes, len(pool), len(reference))
    base = numpy_rng(seed, "ladder").permutation(len(pool))[:volumes]
    how = (data, grading_dir, seed)
    with workers() as processes:
        damaged = [processes.submit(_corrupted, pool[i], data, int(i), strengths, *how[1:]) for i in base]
        clean = [processes.submit(_described, stack, *how) for stack in pool]
        known = [processes.submit(_described, stack, *how, i < volumes) for i, stack in enumerate(reference)]
        damaged, clean, known = ([job.result() for job in jobs] for jobs in (damaged, clean, known))
    training, real = _arrays(known, known), _arrays(clean, known)
    training[CONNECTIVITY] = training[CONNECTIVITY][:volumes]

    def distances(found):
        of = {
            f"{family} {key}": value
            for family in training
            if family != CONNECTIVITY
            for key, value in set_distances(training[family], found[family], patients, seed).items()
        }
        return of | {f"{CONNECTIVITY} distance": _wasserstein(training[CONNECTIVITY], found[CONNECTIVITY])}

    chosen = [numpy_rng(seed, "ladder noise", i).choice(len(pool), volumes, replace=False) for i in range(draws)]
    noise = pd.DataFrame([distances(_taken(real, index)) for index in chosen]).std(ddof=0).to_dict()
    rows = []
    for name, strength, found in (
        *_damaged_sets(damaged, known, _taken(real, base), strengths),
        *_rearranged_sets(training, real, base, strengths, seed),
    ):
        for key, value in distances(found).items():
            rows.append(dict(corruption=name, metric=key, strength=strength, value=value, noise=noise[key]))
    return rows


def _wasserstein(a, b):
    return float(stats.wasserstein_distance(a.astype(float), b.astype(float)))


def _taken(sets, index):
    return {name: values[index] for name, values in sets.items()}


def _arrays(found: list[dict], known: list[dict]) -> dict[str, np.ndarray]:
    """Features (n, d) by family, scaled by those of `known` as `image_quality.extracted` does, and `Conn.D` (n,)."""
    out = {CONNECTIVITY: np.array([one[CONNECTIVITY] for one in found])}
    for family in [key for key in known[0] if key != CONNECTIVITY]:
        sets = {"real": np.array([one[family] for one in known]), "these": np.array([one[family] for one in found])}
        out[family] = scaled(family, sets)["these"]
    return out


def _damaged_sets(damaged, known, start, strengths):
    """Name, strength and set of every corruption that changes volumes."""
    for name in corruption.VOLUMES:
        yield name, 0.0, start
        for strength in strengths:
            step = [row for rows in damaged for row in rows if (row["corruption"], row["strength"]) == (name, strength)]
            yield name, strength, _arrays(step, known)


def _rearranged_sets(training, real, base, strengths, seed):
    """Name, strength and set of every corruption that chooses which volumes are in a set."""
    repeated, lost, memorised = SETS
    for strength in (0.0, *strengths):
        yield (
            repeated,
            strength,
            _taken(real, corruption.duplicated(base, strength, numpy_rng(seed, "corruption", repeated))),
        )
        left = corruption.dropped(real[CONNECTIVITY], len(base), strength, numpy_rng(seed, "corruption", lost))
        yield lost, strength, _taken(real, left)
        # copies of those training stacks whose connectivity is known as well
        where, source = corruption.copied(len(base), len(base), strength, numpy_rng(seed, "corruption", memorised))
        copies = {name: values.copy() for name, values in _taken(real, base).items()}
        for name, values in copies.items():
            values[where] = training[name][source]
        yield memorised, strength, copies


def verdicts(rows: list[dict]) -> list[dict]:
    """One row a metric and corruption: `spearman` of strength and value, `rise` in SDs between real sets;
    `sensitive` where it follows by `FOLLOWS` and rises by `NOISE`, `claimed` whether it is meant to be, `holds`
    whether it then is."""
    out = []
    for (metric, name), steps in pd.DataFrame(rows).groupby(["metric", "corruption"], sort=False):
        steps = steps.sort_values("strength")
        x, y, noise = (steps[key].to_numpy() for key in ("strength", "value", "noise"))
        rho = float(stats.spearmanr(x, y).statistic) if np.ptp(y) > 0 else 0.0
        rise = float((y[-1] - y[0]) / max(noise[0], LEAST))
        sensitive, claimed = rho >= FOLLOWS and rise > NOISE, name in CLAIMS.get(metric, ())
        row = dict(metric=metric, corruption=name, spearman=rho, rise=rise, sensitive=sensitive, claimed=claimed)
        out.append(row | dict(holds=sensitive or not claimed, n_steps=len(steps)))
    return out


def chart(found: list[dict]) -> list[dict]:
    """A row a metric, a column a corruption: sensitive, no, or FAILS where it was claimed, with the correlation."""
    table = pd.DataFrame(found)
    words = np.where(table["sensitive"], "sensitive", np.where(table["claimed"], "FAILS", "no"))
    table["cell"] = [f"{word} ({rho:.2f})" for word, rho in zip(words, table["spearman"], strict=True)]
    table = table.pivot(index="metric", columns="corruption", values="cell")
    return table[[c for c in CORRUPTIONS if c in table]].reset_index().to_dict("records")
