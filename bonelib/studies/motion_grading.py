"""How far predicted motion grades can be trusted: agreement with given ones, and with noise, out of fold."""

import warnings

import numpy as np
from sklearn.metrics import accuracy_score, balanced_accuracy_score, cohen_kappa_score, confusion_matrix

from bonelib.core.random import numpy_rng
from bonelib.evaluation.statistics import of_rows, patient_interval
from bonelib.scans.dataset import EXCLUDED_GRADES
from bonelib.training.grading import GRADES

MEASURES = {
    "balanced accuracy": balanced_accuracy_score,
    "accuracy": accuracy_score,
    "within one grade": lambda given, predicted: (abs(given - predicted) <= 1).mean(),
    "exclude or keep": lambda given, predicted: (_excluded(given) == _excluded(predicted)).mean(),
    "quadratic kappa": lambda given, predicted: cohen_kappa_score(given, predicted, weights="quadratic"),
}


def confusion(rows: list[dict]) -> list[dict]:
    """Counts of scans by given grade (rows) and predicted grade (columns), of those that have both."""
    given, expected, _ = _both(rows)
    empty = np.zeros((len(GRADES),) * 2, int)
    counts = confusion_matrix(given, _rounded(expected), labels=GRADES) if len(given) else empty
    return [
        {"given": g, **{f"predicted {p}": int(n) for p, n in zip(GRADES, line, strict=True)}}
        for g, line in zip(GRADES, counts, strict=True)
    ]


def scores(rows: list[dict], seed: int, draws: int) -> list[dict]:
    """How well the predicted grades meet the given ones, out of fold: one row a measure, with its interval by patient
    and chance, the best that one grade for all scans reaches."""
    given, expected, patients = _both(rows)
    if not len(given):
        return []
    predicted = _rounded(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn, that a draw lacks a grade, or holds one alone
        rows = []
        for name, measure in MEASURES.items():
            chance = float(np.nanmax([measure(given, np.full_like(given, g)) for g in GRADES]))
            rows.append(_scored(name, measure, given, predicted, patients, chance, seed, draws))
        return rows


def noise_scores(rows: list[dict], noise: np.ndarray, seed: int, draws: int) -> list[dict]:
    """Correlation of the expected grade with the noise among scans of the same given grade, as a row of `scores`.

    It is near 0 if the grader reads motion and not noise. `noise` has one value for each row with both grades.
    """
    given, expected, patients = _both(rows)
    if len(given) < 3:
        return []
    within = [v - np.array([v[given == g].mean() for g in given]) for v in (expected, np.asarray(noise, float))]

    def correlation(a, b):
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.corrcoef(a, b)[0, 1]

    return [_scored("expected grade against noise", correlation, *within, patients, 0.0, seed, draws)]


def noise_level(volume: np.ndarray, block: int = 8) -> float:
    """SD of the noise of a volume (z, y, x), in its unit, from the change between slices in soft tissue: the lowest
    fifth of blocks of 8 x 8 voxels. Among phantoms of .24 mm it follows the true noise with r = .98 at every motion
    grade."""
    change = np.diff(np.asarray(volume, np.float32), axis=0)
    z, y, x = change.shape[0], change.shape[1] // block, change.shape[2] // block
    blocks = change[:, : y * block, : x * block].reshape(z, y, block, x, block)
    return float(np.quantile(blocks.std(axis=(2, 4)), 0.2) / np.sqrt(2))


def _scored(name, measure, a, b, patients, chance, seed, draws) -> dict:
    rng = numpy_rng(seed, "grading interval")
    found = patient_interval(of_rows(measure, a, b), patients, rng=rng, draws=draws)
    numbers = {"value": found.value, "low": found.low, "high": found.high, "chance": chance}
    numbers = {key: float(v) if np.isfinite(v) else None for key, v in numbers.items()}
    return {"measure": name, **numbers, "n_scans": found.N, "n_patients": found.patients}


def _both(rows: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Given and expected grades, and patients, of scans that have both."""
    both = [r for r in rows if r["given"] != "" and r["predicted"] != ""]
    given, expected = (np.array([float(r[key]) for r in both]) for key in ("given", "predicted"))
    return given.astype(int), expected, np.array([r["patient"] for r in both])


def _rounded(expected: np.ndarray) -> np.ndarray:
    return np.rint(expected).astype(int).clip(GRADES[0], GRADES[-1])


def _excluded(grades: np.ndarray) -> np.ndarray:
    return np.isin(grades, EXCLUDED_GRADES)
