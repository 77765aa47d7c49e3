"""Metric sensitivity: how each metric responds to graded corruptions of real scans.

Held-out stacks are corrupted in eight ways (`corruption`) at rising strength and compared with stacks of training
patients. Every metric is turned so that it rises with damage.
"""

from functools import partial

import numpy as np
from scipy import stats

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

SEEN, NOISE = 0.9, 2.0  # Spearman correlation, and rise in standard deviations between real sets, of what is seen
LEAST = 1e-3  # of a metric that is the same in all sets of real stacks, as the share of repeats
SETS = ("duplicated patients", "dropped mode", "memorised copies")
CORRUPTIONS = (*corruption.VOLUMES, *SETS)
CONNECTIVITY = "Conn.D"  # per mm3, of the trabecular interior
# What a metric is meant for; one that does not see it fails. What else is seen or not is found, not claimed.
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
    gaps = _distances(fake, reference)
    own = _distances(reference, reference) + np.diag(np.full(len(reference), np.inf))
    nearest = gaps.argmin(axis=1)
    within = _distances(fake, fake) + np.diag(np.full(len(fake), np.inf))
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


def _distances(a, b):
    return np.linalg.norm(a[:, None] - b[None], axis=2)


def connectivity(volume: Volume, interior: np.ndarray) -> float:
    """Loops of the largest piece of bone in a mask, per mm3 of it: the connectivity density."""
    return loops((smoothed(volume) > BONE) & interior) / float(interior.sum() * np.prod(volume.spacing))


def corrupt(values: np.ndarray, data: dict, number: int, strengths: tuple, grading_dir, seed: int) -> list[dict]:
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


def described(values: np.ndarray, data: dict, grading_dir, seed: int, with_connectivity: bool = True) -> dict:
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
    """The ladder: one row a corruption, metric and strength, 0 among them, with `value` and `noise`.

    `reference` (n, z, y, x) are stacks of training patients, `pool` those of held-out ones, of which the first
    `volumes` in a random order (or as many as there are) are spoiled. `noise` is the SD of the metric between `draws`
    random sets of as many real stacks of the pool.
    """
    volumes = min(volumes, len(pool), len(reference))
    start = numpy_rng(seed, "ladder").permutation(len(pool))
    base = start[:volumes]
    with workers() as pool_of_workers:
        how = (data, grading_dir, seed)
        jobs = [pool_of_workers.submit(corrupt, pool[i], data, int(i), strengths, *how[1:]) for i in base]
        clean = [pool_of_workers.submit(described, pool[i], *how) for i in range(len(pool))]
        known = [pool_of_workers.submit(described, v, *how, i < volumes) for i, v in enumerate(reference)]
        jobs, clean, known = ([job.result() for job in group] for group in (jobs, clean, known))

    families = [key for key in known[0] if key != CONNECTIVITY]
    unscaled = {f: np.array([k[f] for k in known]) for f in families}

    def matrix(found):
        """As `image_quality.extracted` scales them."""
        sets = {f: {"real": unscaled[f], "these": np.array([row[f] for row in found])} for f in families}
        return {f: scaled(f, of_family)["these"] for f, of_family in sets.items()}

    training, real = matrix(known), matrix(clean)
    loops = np.array([k[CONNECTIVITY] for k in known[:volumes]])
    real_loops = np.array([c[CONNECTIVITY] for c in clean])

    def measured(sets, of_loops):
        found = {
            f"{f} {k}": v for f in families for k, v in set_distances(training[f], sets[f], patients, seed).items()
        }
        return found | {"Conn.D distance": float(stats.wasserstein_distance(loops, of_loops))}

    rngs = (numpy_rng(seed, "ladder noise", i) for i in range(draws))
    chosen = [rng.choice(len(pool), volumes, replace=False) for rng in rngs]
    between = [measured({f: real[f][c] for f in families}, real_loops[c]) for c in chosen]
    noise = {key: float(np.std([b[key] for b in between])) for key in between[0]}
    rows = []

    def add(name, strength, sets, of_loops):
        for key, value in measured(sets, of_loops).items():
            rows.append(dict(corruption=name, metric=key, strength=strength, value=value, noise=noise[key]))

    for name in corruption.VOLUMES:
        add(name, 0.0, {f: real[f][base] for f in families}, real_loops[base])
        for strength in strengths:
            step = [next(r for r in job if (r["corruption"], r["strength"]) == (name, strength)) for job in jobs]
            add(name, strength, matrix(step), np.array([r[CONNECTIVITY] for r in step]))
    for strength in (0.0, *strengths):
        picks = {
            SETS[0]: corruption.duplicated(base, strength, numpy_rng(seed, "corruption", SETS[0])),
            SETS[1]: corruption.dropped(real_loops, volumes, strength, numpy_rng(seed, "corruption", SETS[1])),
        }
        for name, pick in picks.items():
            add(name, strength, {f: real[f][pick] for f in families}, real_loops[pick])
        # copies of those training stacks whose connectivity is known as well
        where, source = corruption.copied(volumes, volumes, strength, numpy_rng(seed, "corruption", SETS[2]))
        sets, of_loops = {f: real[f][base].copy() for f in families}, real_loops[base].copy()
        for f in families:
            sets[f][where] = training[f][source]
        of_loops[where] = loops[source]
        add(SETS[2], strength, sets, of_loops)
    return rows


def verdicts(rows: list[dict]) -> list[dict]:
    """One row a metric and corruption: `spearman` of strength and value, `rise` in SDs between real sets, `sees`.

    A metric sees a corruption that it follows (Spearman >= 0.9) and by more than two SDs; `claims` says whether it is
    meant to, and `holds` whether it then does.
    """
    out = []
    for metric in dict.fromkeys(r["metric"] for r in rows):
        for name in CORRUPTIONS:
            steps = sorted(
                (r["strength"], r["value"], r["noise"])
                for r in rows
                if (r["metric"], r["corruption"]) == (metric, name)
            )
            x, y, noise = np.array(steps).T
            rho = float(stats.spearmanr(x, y).statistic) if np.ptp(y) > 0 else 0.0
            rise = float((y[-1] - y[0]) / max(noise[0], LEAST))
            sees, claims = rho >= SEEN and rise > NOISE, name in CLAIMS.get(metric, ())
            row = dict(metric=metric, corruption=name, spearman=rho, rise=rise, sees=sees, claims=claims)
            out.append(row | dict(holds=sees or not claims, n_steps=len(steps)))
    return out


def chart(found: list[dict]) -> list[dict]:
    """A row a metric, a column a corruption: sees, blind, or FAILS where sight is claimed, with the correlation."""
    rows = []
    for metric in dict.fromkeys(r["metric"] for r in found):
        cells = {r["corruption"]: r for r in found if r["metric"] == metric}
        words = {c: "sees" if r["sees"] else "FAILS" if r["claims"] else "blind" for c, r in cells.items()}
        rows.append({"metric": metric} | {c: f"{w} ({cells[c]['spearman']:.2f})" for c, w in words.items()})
    return rows
