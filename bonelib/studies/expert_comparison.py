"""What experts are shown and what their ratings are held against: samples, realism scores, and known faults.

The realism score (Kynkaanniemi et al. 2019) of every feature family there is, none of which pretends to be another.
"""

import numpy as np
from scipy import ndimage

from bonelib.core.random import numpy_rng
from bonelib.evaluation.features import standardised
from bonelib.evaluation.metrics import realism
from bonelib.latent.models import Model, draw_code, sampled_code
from bonelib.scans.preprocessing import to_density
from bonelib.scans.volumes import Volume
from bonelib.studies.corruption import blurred, moving

LEVELS = 3  # of every fault, beside none
LOST_SHARE = 0.25  # of the width, at most
JITTER_MM = 0.9  # SD of the displacement of a slice, at most
PERIOD_MM = 0.5  # of the piece that is repeated, at least


def drawn(model: Model, n: int, seed: int, truncation: float | None) -> np.ndarray:
    """The first sample of each of the seeds `seed`, `seed` + 1, ...: (n, z, y, x), float32 in [0, 1]."""
    return np.stack([draw_code(model, sampled_code(model, s, truncation), s) for s in range(seed, seed + n)])


def drawn_by_all(
    models: dict[str, Model], truncation: dict[str, float | None], n: int, seed: int
) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """`n` samples, as many of each of `models` as there is room for: volumes (n, z, y, x), and (model, seed) of each.

    What does not divide evenly falls to the first models.
    """
    counts = {name: (n - i + len(models) - 1) // len(models) for i, name in enumerate(models)}
    volumes = [drawn(models[name], count, seed, truncation[name]) for name, count in counts.items() if count]
    return np.concatenate(volumes), [(name, seed + i) for name, count in counts.items() for i in range(count)]


def compare(scores: np.ndarray, of_real: np.ndarray) -> dict[str, float]:
    """Realism of samples beside that of held-out bones: medians, numbers, and the share above the median real one."""
    middle = float(np.median(of_real))
    return {
        "N": len(scores),
        "samples, median": float(np.median(scores)) if len(scores) else None,
        "N real": len(of_real),
        "real, median": middle,
        "samples above the median real": float(np.mean(scores > middle)) if len(scores) else None,
    }


def one_a_patient(rows: list[dict], count: int, seed: int) -> list[dict]:
    """At most `count` stacks of `rows`, each of another patient, taken at random."""
    rng, patients = numpy_rng(seed, "one a patient"), {}
    for row in rows:
        patients.setdefault(row["patient"], []).append(row)
    chosen = rng.permutation(sorted(patients))[:count]
    return [patients[name][rng.integers(len(patients[name]))] for name in chosen]


def features(volumes, families: dict) -> dict[str, np.ndarray]:
    """Of volumes (n, z, y, x) in [0, 1], by every extractor of `features.families`: {family: (n * rows, d)}."""
    return {family: extract(volumes) for family, extract in families.items()}


def scores(reference: dict[str, np.ndarray], found: dict[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    """Realism of `n` volumes by their features, against the real ones of `reference`: {family: (n,)}.

    Where a family has several rows a volume, one after the other, theirs are averaged.
    """
    by_row = {family: realism(*standardised(reference[family], found[family])) for family in reference}
    return {family: values.reshape(n, -1).mean(1) for family, values in by_row.items()}


def degraded(volume: Volume, criterion: str, level: int, rng: np.random.Generator) -> Volume:
    """One bone, in mg HA/cm3, worse by `criterion`, one of `raters.CRITERIA`; level 0 is as given, `LEVELS` the worst.

    sharpness and artefacts: blur and motion of `corruption`. valid image area: a part of the width is empty. contours:
    slices are displaced in plane. repetitive patterns: a piece is repeated along z.
    """
    if level == 0:
        return volume
    share, voxels = level / LEVELS, volume.voxels
    if criterion in ("sharpness", "artefacts"):
        return (blurred if criterion == "sharpness" else moving)(volume, share, rng)
    if criterion == "valid image area":
        seen = voxels.copy()
        seen[:, :, : round(share * LOST_SHARE * voxels.shape[2])] = voxels.min()
    elif criterion == "contours":
        moves = share * JITTER_MM * rng.standard_normal((len(voxels), 2)) / volume.spacing[1:]
        seen = np.stack(
            [ndimage.shift(cut, move, order=1, mode="nearest") for cut, move in zip(voxels, moves, strict=True)]
        )
    else:
        period = max(1, round(PERIOD_MM * 2 ** (LEVELS - level) / volume.spacing[0]))
        seen = voxels[np.arange(len(voxels)) % period]
    return volume.with_voxels(seen)


def faults(real: np.ndarray, criterion: str, data: dict, seed: int) -> list[np.ndarray]:
    """`real` (n, z, y, x) in [0, 1] at every level of a criterion, from untouched: arrays of that shape.

    `data` is what a model's config.json says of its data: spacing, and densities at 0 and 1.
    """
    (low, high), spacing = data["intensity"], tuple(data["spacing_mm"])
    volumes = [Volume(to_density(values, data["intensity"]).astype(np.float32), spacing) for values in real]
    levels = []
    for level in range(LEVELS + 1):
        worse = [degraded(v, criterion, level, numpy_rng(seed, "fault", criterion, i)) for i, v in enumerate(volumes)]
        levels.append(np.stack([np.clip((v.voxels - low) / (high - low), 0, 1) for v in worse]))
    return levels
