"""Phantoms are drawn, scanned and measured: rows of truth and measurement, which `phantom_validation` judges."""

import json
import sys
import time
from concurrent.futures import as_completed
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.special import erf

from bonelib import InputError, core, scans
from bonelib.core.config import fingerprint
from bonelib.core.files import write_whole
from bonelib.core.parallel import workers
from bonelib.core.provenance import code_hash
from bonelib.core.random import numpy_rng
from bonelib.evaluation import contours as contouring
from bonelib.evaluation import morphometry, thickness
from bonelib.evaluation.contours import BONE, SMOOTHING_MM, bounding_box, contours, smoothed
from bonelib.evaluation.morphometry import fabric, measure, trabecular
from bonelib.scans.phantom import population
from bonelib.scans.phantom.motion import moved
from bonelib.scans.phantom.rendering import CORTICAL, TISSUE, TRABECULAR, ULNA, Drawn, draw_visit
from bonelib.scans.phantom.scanner import NATIVE_MM, PSF_SIGMA_MM, scan
from bonelib.scans.volumes import Volume
from bonelib.studies import crops
from bonelib.studies.crops import LAGS, marrow

CODE = code_hash(scans, contouring, morphometry, thickness, core, crops, sys.modules[__name__])
INNER = 0.6  # share of the trabecular compartment that counts as its centre
BORDER_MM = 0.5  # of the trabecular compartment that is left out of its structure, as the cortex shows there
MOTION_GRADES = (1, 2, 3, 4, 5)
MOVED = 20  # phantoms at most that are moved: each is scanned six times
PROGRESS_S = 15.0


def survey(count: int, voxel_mm: float, seed: int, *, first: int = 1, keep: str | Path | None = None) -> list[dict]:
    """One row a phantom: the traits asked of it, what its true compartments hold, and what its scan measures.

    Patients `first` and on of `seed`, first visit, at rest. `seen_...` is the density of the noise-free scan in the
    true compartments: the best that any contour could read. `measured_...` is read by the default segmentation; on the
    scanner's own grid `sharpened_...` is the same by Laplace-Hamming. In parallel; with a folder `keep`, a second call
    with equal code continues.
    """
    return _in_parallel(_one, count, voxel_mm, seed, first, keep)


def motion_survey(count: int, voxel_mm: float, seed: int, *, keep: str | Path | None = None) -> list[dict]:
    """One row a patient, `MOVED` at most, and motion grade: `motion` is 1 - correlation of the moved with the still
    scan. Both have a noise of their own, so that grade 1 shows the effect of noise alone."""
    return _in_parallel(_moved, min(count, MOVED), voxel_mm, seed, 1, keep)


def truth_survey(count: int, voxel_mm: float, seed: int, *, keep: str | Path | None = None) -> list[dict]:
    """One row a phantom, `MOVED` at most: how far the true cortex depends on the grid it is drawn on.

    The same bone is drawn on a grid twice as fine; a voxel counts as cortex where half of its eight parts do. Dice of
    the drawn cortex with the finer one, and of that found in the scan with either; the drawn volume over the finer one,
    less 1.
    """
    return _in_parallel(_redrawn, min(count, MOVED), voxel_mm, seed, 1, keep)


def graded(seed: int, patients: int, visits: int, scans: int | None, shares: tuple[float, ...]) -> list[dict]:
    """Patient, age and motion grade of every scan of the cohort with these settings, without drawing it."""
    rows = []
    for patient, own in population.visits_of(seed, patients, visits, scans).items():
        age = population.sample_patient(seed, patient)["age"]
        for visit in own:
            grade = population.motion_grade(seed, patient, visit, age, shares)
            rows.append({"patient": patient, "age": age, "grade": grade})
    return rows


def _in_parallel(one, count: int, voxel_mm: float, seed: int, first: int, keep) -> list[dict]:
    began = last = time.monotonic()
    patients, run = range(first, first + count), fingerprint(seed, voxel_mm, one.__name__, CODE)
    files = {p: Path(keep) / f"{run}-{p}.json" for p in patients} if keep else {}
    found = {p: json.loads(file.read_text(encoding="utf-8")) for p, file in files.items() if file.exists()}
    known = len(found)
    with workers() as pool:
        jobs = {pool.submit(one, seed, p, voxel_mm): p for p in patients if p not in found}
        for future in as_completed(jobs):
            patient = jobs[future]
            found[patient] = future.result()
            if keep:
                text = json.dumps(found[patient], default=float)
                write_whole(files[patient], lambda part, text=text: part.write_text(text, encoding="utf-8"))
            now = time.monotonic()
            if now - last >= PROGRESS_S or len(found) == count:
                last, left = now, (now - began) / (len(found) - known) * (count - len(found))
                print(f"measured {len(found)} of {count} phantoms of {voxel_mm} mm, {left:.0f} s left", flush=True)
    return [row for patient in patients for row in found[patient]]


def _scanned(seed: int, patient: int, voxel_mm: float) -> tuple[Drawn, Volume]:
    """A phantom of the first visit, and its scan at rest."""
    drawn = draw_visit(seed, patient, 1, voxel_mm)
    return drawn, scan(drawn.volume, numpy_rng(seed, "noise", patient, 1), noise_sd=drawn.truth["noise_sd"])


def _one(seed: int, patient: int, voxel_mm: float) -> list[dict]:
    drawn, seen = _scanned(seed, patient, voxel_mm)
    clean = scan(drawn.volume, numpy_rng(seed, "noise", patient, 1), noise_sd=0.0)
    row = {"patient": patient, "voxel_mm": voxel_mm, **drawn.truth}
    for name, part in (("Tb", TRABECULAR), ("Ct", CORTICAL)):
        row[f"seen_{name}.BMD"] = float(clean.voxels[drawn.compartments == part].mean(dtype=float))
    row |= geometry(drawn, voxel_mm)
    try:
        outer, inner = contours(seen)
    except InputError as error:
        return [row | {"refused": str(error)}]
    found = measure(seen, compartments=(outer, inner))
    found["Rel.Ct.Th"] = float(found["Ct.Th"] / np.sqrt(found["Tt.Ar"] / np.pi))
    row |= {f"measured_{name}": value for name, value in found.items()}
    if np.isclose(voxel_mm, NATIVE_MM):
        sharpened = trabecular(seen, inner, segmentation="laplace-hamming")
        row |= {f"sharpened_{name}": value for name, value in sharpened.items()}
    row["dice_total"] = dice(outer, np.isin(drawn.compartments, (TRABECULAR, CORTICAL)))
    row["dice_trabecular"] = dice(inner, drawn.compartments == TRABECULAR)
    row["dice_cortical"] = dice(outer & ~inner, drawn.compartments == CORTICAL)
    return [row | directions(seen, inner) | _marrow_columns(marrow(seen, inner))]


def _moved(seed: int, patient: int, voxel_mm: float) -> list[dict]:
    drawn, still = _scanned(seed, patient, voxel_mm)
    rows = []
    for grade in MOTION_GRADES:
        blurred, _ = moved(drawn.volume, numpy_rng(seed, "motion", patient, 1), grade)
        seen = scan(blurred, numpy_rng(seed, "noise", patient, 2), noise_sd=drawn.truth["noise_sd"])
        alike = np.corrcoef(still.voxels.ravel(), seen.voxels.ravel())[0, 1]
        rows.append({"patient": patient, "grade": grade, "motion": float(1 - alike)})
    return rows


def _redrawn(seed: int, patient: int, voxel_mm: float) -> list[dict]:
    drawn, seen = _scanned(seed, patient, voxel_mm)
    finer = draw_visit(seed, patient, 1, voxel_mm / 2)
    outer, inner = contours(seen)
    shape = [min(n, m // 2) for n, m in zip(seen.shape, finer.volume.shape, strict=True)]
    turn = (..., slice(None, None, -1 if drawn.volume.side == "left" else 1))  # a left bone was mirrored when drawn
    both, twice = (tuple(slice(n * parts) for n in shape) for parts in (1, 2))
    found, own = (mask[turn][both] for mask in (outer & ~inner, drawn.compartments == CORTICAL))
    parts = (finer.compartments == CORTICAL)[turn][twice]
    parts = parts.reshape(shape[0], 2, shape[1], 2, shape[2], 2).mean((1, 3, 5))
    row = {"patient": patient, "truth_by_finer": dice(own, parts >= 0.5), "found_by_own": dice(found, own)}
    row |= {"found_by_finer": dice(found, parts >= 0.5), "volume_by_finer": float(own.sum() / parts.sum() - 1)}
    return [row]


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Overlap of two masks: twice their intersection over the sum of their volumes."""
    return float(2 * (first & second).sum() / max(1, first.sum() + second.sum()))


def geometry(drawn: Drawn, voxel_mm: float) -> dict[str, float]:
    """Shape of the true bone: axes in mm, fill of its box, changes along z, and whether the network is one piece."""
    radius = np.isin(drawn.compartments, (TRABECULAR, CORTICAL))
    area = radius.sum((1, 2)) * voxel_mm**2
    ends, middle = max(1, len(area) // 10), len(area) // 2
    points = np.argwhere(radius[middle]).astype(float) * voxel_mm
    along = (points - points.mean(0)) @ np.linalg.eigh(np.cov(points.T))[1]  # columns: short axis, long axis
    short, long = np.ptp(along, axis=0) + voxel_mm
    trabecular = drawn.compartments[middle] == TRABECULAR
    inside = ndimage.distance_transform_edt(trabecular)[trabecular]
    trabeculae = drawn.bone[middle][trabecular]
    centre = inside >= np.quantile(inside, 1 - INNER)
    labels, _ = ndimage.label((drawn.bone > 0.5) & radius, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())[1:]
    return {
        "long_mm": float(long),
        "short_mm": float(short),
        "fill": float(area[middle] / (long * short)),
        "area_change": float(area[-ends:].mean() / area[:ends].mean() - 1),
        "outer_by_inner": float(trabeculae[~centre].mean() / max(trabeculae[centre].mean(), 1e-6)),
        "largest_part": float(sizes.max() / sizes.sum()),
        "ulna_mm2": float((drawn.compartments == ULNA).sum() / len(area) * voxel_mm**2),
    }


def directions(volume: Volume, inner: np.ndarray) -> dict[str, float]:
    """Main direction of the trabeculae in the mask `inner` (z, y, x): degrees off z, by fabric and structure tensor.

    `axis_off_z_deg` is of the longest mean intercept length, `tensor_off_z_deg` of the direction in which density
    changes least; `tensor_1` to `tensor_3` are the eigenvalues of the structure tensor, rising and of sum 1.
    """
    lengths, axes = fabric(volume, inner)
    values, vectors = _structure_tensor(volume, inner)
    return {
        "axis_off_z_deg": _off_z(axes[np.argmax(lengths)]),
        "tensor_off_z_deg": _off_z(vectors[0]),
        **{f"tensor_{i}": float(value) for i, value in enumerate(values, 1)},
    }


def _structure_tensor(volume, inner):
    """Eigenvalues (3), rising and of sum 1, and eigenvectors (3, 3) of the products of the density's gradients."""
    density = smoothed(volume)
    box = bounding_box(inner)
    # The ends of the scan are no border of the compartment
    padded = np.pad(inner[box], ((1, 1), (0, 0), (0, 0)), mode="edge")
    padded = np.pad(padded, ((0, 0), (1, 1), (1, 1)))
    deep = ndimage.distance_transform_edt(padded, volume.spacing)[1:-1, 1:-1, 1:-1] > BORDER_MM
    if deep.sum() < 2:
        return np.full(3, np.nan), np.full((3, 3), np.nan)
    gradients = np.stack([g[deep] for g in np.gradient(density[box], *volume.spacing)])
    values, vectors = np.linalg.eigh(np.asarray(gradients @ gradients.T, float))
    return values / values.sum(), vectors.T


def _off_z(axis):
    """Degrees between a unit axis (z, y, x) and z; an axis has no sign."""
    return float(np.degrees(np.arccos(min(1.0, abs(axis[0])))))


def _marrow_columns(found: dict | None) -> dict[str, float]:
    """`marrow` as columns of a row; `marrow_thirds` is the largest over the least SD, less 1."""
    if found is None:
        return {}
    row = {"marrow_mean": found["mean"], "marrow_sd": found["sd"]}
    row["marrow_thirds"] = max(found["thirds"]) / min(found["thirds"]) - 1
    for name, values in zip("zyx", found["noise"], strict=True):
        row |= {f"acf_{name}{lag}": value for lag, value in zip(LAGS, values, strict=True)}
    return row


def plates(thicknesses=(0.10, 0.12, 0.14, 0.16, 0.18, 0.20, 0.25)) -> list[dict]:
    """Apparent thickness in mm of endless plates of known thickness, scanned without noise on the scanner's grid.

    The expected value is analytic: a slab of tissue blurred by the point spread and by the smoothing before the
    threshold is as wide as the threshold cuts it.
    """
    spread = float(np.hypot(PSF_SIGMA_MM, SMOOTHING_MM))
    far, table = np.linspace(0, 0.6, 60001), []
    for true in thicknesses:
        x = np.arange(48) * NATIVE_MM
        voxels = np.full((24, 24, 48), 0.0, np.float32)
        for centre in (0.73, 2.17):  # at two places within a voxel
            voxels += TISSUE * np.clip(0.5 + (true / 2 - np.abs(x - centre)) / NATIVE_MM, 0, min(1, true / NATIVE_MM))
        clean = scan(Volume(voxels, (NATIVE_MM,) * 3), numpy_rng(0, "plates"), noise_sd=0.0)
        profile = TISSUE / 2 * (erf((true / 2 - far) / spread / 2**0.5) + erf((true / 2 + far) / spread / 2**0.5))
        analytic = 2 * float(far[profile >= BONE].max(initial=0.0))
        found = measure(clean, compartments="trabecular")["Tb.Th"]
        table.append({"true mm": true, "expected mm": analytic, "measured mm": found, "off mm": found - analytic})
    return table
