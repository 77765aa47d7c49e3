"""Is the phantom what it claims to be? Phantoms are drawn, scanned and measured, and held against published values.

Reference: Bern multi-stack XtremeCT II cohort, distal radius (Poncioni et al. 2026, hrpqct-multistack-db).
"""

import json
import time
from concurrent.futures import as_completed
from importlib import resources
from types import MappingProxyType

import numpy as np
from scipy import ndimage
from scipy.special import erf

from bonelib import InputError
from bonelib.evaluation.contours import BONE, SMOOTHING_MM, contours, smoothed
from bonelib.evaluation.morphometry import fabric, measure
from bonelib.processes import workers
from bonelib.randomness import numpy_rng
from bonelib.scans.population import FEMALE_K, MALE_PER_YEAR, PLATEAU_AGE, WITHIN_SEX, YOUNG_MEAN_AGE
from bonelib.scans.rendering import CORTICAL, TISSUE, TRABECULAR, ULNA, Drawn, draw_visit
from bonelib.scans.scanner import NATIVE_MM, PSF_SIGMA_MM, scan
from bonelib.scans.volumes import Volume

# Mean and SD of the young, as measured in scans: the traits that are drawn and those that follow from them.
REFERENCE = MappingProxyType(
    {
        "F": {
            "Tt.Ar": (277, 40), "Tt.BMD": (297, 48), "Ct.BMD": (926, 40), "Tb.BMD": (145, 31), "BV/TV": (0.209, 0.045),
            "Tb.N": (1.456, 0.177), "Tb.Th": (0.215, 0.012), "Tb.Sp": (0.655, 0.094), "Ct.Th": (1.057, 0.154),
            "Ct.Po": (0.003, 0.002), "Rel.Ct.Th": (0.113, 0.021), "DA": (1.82, 0.10),
        },
        "M": {
            "Tt.Ar": (357, 55), "Tt.BMD": (335, 51), "Ct.BMD": (887, 35), "Tb.BMD": (199, 34), "BV/TV": (0.291, 0.050),
            "Tb.N": (1.583, 0.234), "Tb.Th": (0.242, 0.017), "Tb.Sp": (0.568, 0.072), "Ct.Th": (1.226, 0.207),
            "Ct.Po": (0.007, 0.006), "Rel.Ct.Th": (0.115, 0.025), "DA": (1.80, 0.11),
        },
    }
)  # fmt: skip
# Correlations of the pooled sexes, recovered from the published p-values; those of at least .3 in size.
POOLED = (
    ("Tt.BMD", "Ct.BMD", 0.56), ("Tt.BMD", "Ct.Th", 0.84), ("Tt.BMD", "Tb.BMD", 0.80), ("Tt.BMD", "Tb.N", 0.60),
    ("Tt.BMD", "Tb.Th", 0.59), ("Tt.BMD", "Tb.Sp", -0.60), ("Ct.BMD", "Ct.Th", 0.50), ("Ct.BMD", "Ct.Po", -0.40),
    ("Ct.BMD", "Tt.Ar", -0.42), ("Tb.BMD", "BV/TV", 1.0), ("Tb.BMD", "Tb.N", 0.81), ("Tb.BMD", "Tb.Th", 0.73),
    ("Tb.BMD", "Tb.Sp", -0.77), ("Tb.BMD", "Rel.Ct.Th", 0.42), ("BV/TV", "Tb.N", 0.77), ("BV/TV", "Tb.Th", 0.75),
    ("BV/TV", "Tb.Sp", -0.73), ("Tb.N", "Tb.Sp", -0.92), ("Tb.N", "Tb.Th", 0.39), ("Tb.Th", "Tb.Sp", -0.36),
    ("Tb.Th", "Tt.Ar", 0.30), ("DA", "Tt.Ar", 0.40),
)  # fmt: skip
AT_70 = MappingProxyType({"Tt.BMD": 250.0, "Ct.BMD": 852.0, "BV/TV": 0.180, "Rel.Ct.Th": 0.0995})  # women
# Change with age: women lose k (age - 37)^2 from 37 on, or change by a rate; men change by a rate from the young mean.
FEMALE_CURVES = MappingProxyType(
    {
        **FEMALE_K,
        "Tt.BMD": 0.04326,
        "DA": 7.82e-5,
        "Tb.BMD": FEMALE_K["BV/TV"] / 0.209 * 145,
        "Ct.Th": FEMALE_K["Rel.Ct.Th"] * (277 / np.pi) ** 0.5,
    }
)
FEMALE_RATES = MappingProxyType({"Tb.N": -0.0042, "Tb.Th": 0.0008, "Tb.Sp": 0.0080, "Ct.Po": 0.053})
MALE_RATES = MappingProxyType(
    {**MALE_PER_YEAR, "Tt.BMD": -0.0038, "BV/TV": -0.0056, "Tb.Sp": 0.0049, "Ct.Po": 0.0157}
    | {"Rel.Ct.Th": -0.0019, "DA": -0.0020}
)
YOUNG = (20.0, PLATEAU_AGE)  # years
LEAST_BMD_BVTV = 0.95  # correlation of Tb.BMD and BV/TV, whose p-value was too small to be printed
COARSE_TRAITS = ("Tt.Ar", "Tt.BMD", "Ct.BMD", "Tb.BMD", "Ct.Th", "Rel.Ct.Th")
FINE_TRAITS = (*COARSE_TRAITS, "BV/TV", "Tb.N", "Tb.Th", "Tb.Sp", "Ct.Po", "DA")
AGED_TRAITS = ("Tt.BMD", "Ct.BMD", "Tb.BMD", "Rel.Ct.Th")
PAIRS = (
    ("Tt.Ar", "measured_Tt.Ar", "true_Tt.Ar", "measured against true"),
    ("Tb.BMD", "measured_Tb.BMD", "seen_Tb.BMD", "measured against seen"),
    ("Ct.BMD", "measured_Ct.BMD", "seen_Ct.BMD", "measured against seen"),
    ("Ct.Th", "measured_Ct.Th", "true_Ct.Th", "measured against true"),
    ("Tb.BMD", "seen_Tb.BMD", "true_Tb.BMD", "seen against drawn"),
    ("Ct.BMD", "seen_Ct.BMD", "true_Ct.BMD", "seen against drawn"),
    ("Tb.BMD", "measured_Tb.BMD", "Tb.BMD", "measured against asked"),
    ("Ct.BMD", "measured_Ct.BMD", "Ct.BMD", "measured against asked"),
)
SHAPE = (
    ("long axis, mm", "long_mm", {"F": "25-26", "M": "29-30"}),
    ("depth, mm", "short_mm", {"F": "14-16", "M": "16-18"}),
    ("fill of the box", "fill", ".74"),
    ("area, proximal to distal", "area_change", "-.20 to -.30"),
    ("trabecular density, outer by inner part", "outer_by_inner", "above 1"),
    ("largest connected part of the true bone", "largest_part", "1"),
    ("area of the ulna, mm2", "ulna_mm2", "10-40 % of about 130"),
    ("main axis off z, degrees", "axis_off_z_deg", "4 (genuine crop)"),
    ("marrow far from bone, mg HA/cm3", "marrow_mean", "-3 (genuine crops)"),
    ("its SD, mg HA/cm3", "marrow_sd", "107, 110 (genuine crops)"),
    ("autocorrelation of noise at one voxel along z", "acf_z1", ".67-.71 (genuine crops)"),
    ("and at two", "acf_z2", ".22-.29 (genuine crops)"),
)
QUIET_VOXELS = 5  # from the nearest bone, where noise is read
NOISE_SD = 105.0  # mg HA/cm3
HISTOGRAM = np.arange(-500.0, 1201.0, 50.0)  # mg HA/cm3
INNER = 0.6  # share of the trabecular compartment that counts as its centre
PROGRESS_S = 15.0


def survey(count: int, voxel_mm: float, seed: int, *, first: int = 1) -> list[dict]:
    """One row a phantom: what is asked of it, what its true compartments hold, and what its scan measures.

    Patients `first` and on of `seed`, first visit, still, scanned with their own noise. `seen_...` is the density that
    the noise-free scan has in the true compartments: the best that any contour could read. In parallel, with a line of
    progress. Rows are in the order of the patients.
    """
    began = last = time.monotonic()
    rows = []
    with workers() as pool:
        jobs = [pool.submit(_one, seed, patient, voxel_mm) for patient in range(first, first + count)]
        for future in as_completed(jobs):
            rows.append(future.result())
            now = time.monotonic()
            if now - last >= PROGRESS_S or len(rows) == count:
                last, left = now, (now - began) / len(rows) * (count - len(rows))
                print(f"measured {len(rows)} of {count} phantoms of {voxel_mm} mm, {left:.0f} s left", flush=True)
    return sorted(rows, key=lambda row: row["patient"])


def _one(seed: int, patient: int, voxel_mm: float) -> dict:
    drawn = draw_visit(seed, patient, 1, voxel_mm)
    clean = scan(drawn.volume, numpy_rng(seed, "noise", patient, 1), noise_sd=0.0)
    seen = scan(drawn.volume, numpy_rng(seed, "noise", patient, 1), noise_sd=drawn.truth["noise_sd"])
    row = {"patient": patient, "voxel_mm": voxel_mm, **drawn.truth}
    for name, part in (("Tb", TRABECULAR), ("Ct", CORTICAL)):
        row[f"seen_{name}.BMD"] = float(clean.voxels[drawn.compartments == part].mean(dtype=float))
    row |= geometry(drawn, voxel_mm)
    try:
        outer, inner = contours(seen)
    except InputError as error:
        return row | {"refused": str(error)}
    found = measure(seen, compartments=(outer, inner))
    found["Rel.Ct.Th"] = found["Ct.Th"] / np.sqrt(found["Tt.Ar"] / np.pi)
    row |= {f"measured_{name}": value for name, value in found.items()}
    radius = np.isin(drawn.compartments, (TRABECULAR, CORTICAL))
    row["dice_total"] = dice(outer, radius)
    row["dice_trabecular"] = dice(inner, drawn.compartments == TRABECULAR)
    row["dice_cortical"] = dice(outer & ~inner, drawn.compartments == CORTICAL)
    values, vectors = fabric(seen, inner)
    main = vectors[np.argmax(values)]
    row["axis_off_z_deg"] = float(np.degrees(np.arccos(min(1.0, abs(main[0])))))
    return row | noise_in_marrow(drawn, seen, clean)


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Overlap of two masks: twice what they share over what they hold."""
    return float(2 * (first & second).sum() / max(1, first.sum() + second.sum()))


def geometry(drawn: Drawn, voxel_mm: float) -> dict[str, float]:
    """Shape of the true bone: axes in mm, fill of its box, what changes along z, and whether the network is one."""
    radius = np.isin(drawn.compartments, (TRABECULAR, CORTICAL))
    area = radius.sum((1, 2)) * voxel_mm**2
    ends = max(1, len(area) // 10)
    points = np.argwhere(radius[len(area) // 2]).astype(float) * voxel_mm
    centred = points - points.mean(0)
    along = centred @ np.linalg.eigh(np.cov(centred.T))[1]  # columns: short axis, long axis
    short, long = np.ptp(along, axis=0) + voxel_mm
    trabecular = drawn.compartments == TRABECULAR
    depth = ndimage.distance_transform_edt(trabecular[len(area) // 2])
    inside = depth[trabecular[len(area) // 2]]
    spongy = drawn.bone[len(area) // 2][trabecular[len(area) // 2]]
    centre = inside >= np.quantile(inside, 1 - INNER)
    labels, _ = ndimage.label((drawn.bone > 0.5) & radius, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())[1:]
    ulna = drawn.compartments == ULNA
    return {
        "long_mm": float(long),
        "short_mm": float(short),
        "fill": float(area[len(area) // 2] / (long * short)),
        "area_change": float(area[-ends:].mean() / area[:ends].mean() - 1),
        "outer_by_inner": float(spongy[~centre].mean() / max(spongy[centre].mean(), 1e-6)),
        "largest_part": float(sizes.max() / sizes.sum()),
        "ulna_mm2": float(ulna.sum() / len(area) * voxel_mm**2),
    }


def noise_in_marrow(drawn: Drawn, seen: Volume, clean: Volume) -> dict[str, float]:
    """Mean, SD and autocorrelation (lags 1-3 voxels, per axis) of a scan where marrow is far from bone."""
    bone = drawn.bone > 0.02
    far = ndimage.distance_transform_edt(~bone) >= QUIET_VOXELS
    quiet = far & (drawn.compartments == TRABECULAR)
    if quiet.sum() < 500:
        return {}
    noise = seen.voxels - clean.voxels
    row = {
        "marrow_mean": float(seen.voxels[quiet].mean(dtype=float)),
        "marrow_sd": float(seen.voxels[quiet].std(dtype=float)),
    }
    for axis, name in enumerate("zyx"):
        for lag in (1, 2, 3):
            row[f"acf_{name}{lag}"] = correlation_at(noise, axis, lag)
    return row


def correlation_at(noise: np.ndarray, axis: int, lag: int) -> float:
    """Autocorrelation of noise (z, y, x) of mean 0 at `lag` voxels along `axis`."""
    ahead = np.take(noise, range(lag, noise.shape[axis]), axis)
    behind = np.take(noise, range(noise.shape[axis] - lag), axis)
    return float((ahead * behind).mean(dtype=float) / (noise**2).mean(dtype=float))


def expected_at(sex: str, trait: str, ages: np.ndarray) -> np.ndarray:
    """The published age curve of a trait: women constant up to 37 and then falling with the square, men linear."""
    mean, _ = REFERENCE[sex][trait]
    late = np.clip(np.asarray(ages, float) - PLATEAU_AGE, 0, None)
    if sex == "M":
        return mean * (1 + MALE_RATES.get(trait, 0.0) * (np.asarray(ages, float) - YOUNG_MEAN_AGE))
    if trait in FEMALE_RATES:
        return mean * (1 + FEMALE_RATES[trait] * late)
    return mean - FEMALE_CURVES.get(trait, 0.0) * late**2


def against_reference(rows: list[dict], traits: tuple[str, ...]) -> list[dict]:
    """Measured means and SDs of the young by sex beside the reference, and the mean difference at all ages.

    `off by SDs` is the difference of the young means in SDs of the reference, `SD ratio` that of their SDs; `off at
    all ages` is the mean of every phantom's difference from the age curve, with the half-width of its 95 % interval.
    """
    table = []
    for sex in ("F", "M"):
        own = [r for r in rows if r["sex"] == sex and "refused" not in r]
        young = [r for r in own if YOUNG[0] <= r["age"] <= YOUNG[1]]
        for trait in traits:
            mean, sd = REFERENCE[sex][trait]
            values = np.array([r[f"measured_{trait}"] for r in young], float)
            every = np.array([r[f"measured_{trait}"] for r in own], float)
            off = (every - expected_at(sex, trait, [r["age"] for r in own])) / sd
            few = len(values) < 3
            table.append(
                {
                    "sex": sex,
                    "trait": trait,
                    "N young": len(values),
                    "measured": None if few else f"{values.mean():.4g} ({values.std(ddof=1):.3g})",
                    "reference": f"{mean:.4g} ({sd:.3g})",
                    "off by SDs": None if few else float((values.mean() - mean) / sd),
                    "SD ratio": None if few else float(values.std(ddof=1) / sd),
                    "N": len(off),
                    "off at all ages": float(off.mean()),
                    "+-": float(1.96 * off.std(ddof=1) / np.sqrt(len(off))) if len(off) > 1 else None,
                }
            )
    return table


def correlations(rows: list[dict]) -> list[dict]:
    """For each published pair: the correlation within sex at all ages (mean of both by Fisher's z) and .8 r."""
    kept, table = [r for r in rows if "refused" not in r], []
    for first, second, pooled in POOLED:
        zs = []
        for sex in ("F", "M"):
            a, b = ([r[f"measured_{t}"] for r in kept if r["sex"] == sex] for t in (first, second))
            zs.append(np.arctanh(np.clip(np.corrcoef(a, b)[0, 1], -0.9999, 0.9999)))
        z, half = np.mean(zs), 1.96 / np.sqrt(max(len(kept) - 6, 1))
        table.append(
            {
                "pair": f"{first}, {second}",
                "N": len(kept),
                "pooled r": pooled,
                "expected": WITHIN_SEX * pooled if abs(pooled) < 1 else LEAST_BMD_BVTV,
                "measured": float(np.tanh(z)),
                "low": float(np.tanh(z - half)),
                "high": float(np.tanh(z + half)),
            }
        )
    return table


def biases(sets: dict[str, list[dict]]) -> list[dict]:
    """How far measurements lie from what they should read, in %: mean, SD and N of every pair in `PAIRS`, by grid."""
    table = []
    for grid, rows in sets.items():
        kept = [r for r in rows if "refused" not in r]
        for name, found, wanted, what in PAIRS:
            off = 100 * np.array([r[found] / r[wanted] - 1 for r in kept])
            inside = float(np.mean(np.abs(off) <= 3)) if len(off) else None
            table.append(
                {
                    "grid": grid,
                    "trait": name,
                    "compared": what,
                    "N": len(off),
                    "off, %": float(off.mean()),
                    "SD, %": float(off.std(ddof=1)) if len(off) > 1 else None,
                    "within 3 %": inside,
                }
            )
        for part in ("total", "trabecular", "cortical"):
            values = np.array([r[f"dice_{part}"] for r in kept])
            table.append(
                {
                    "grid": grid,
                    "trait": f"{part} compartment",
                    "compared": f"Dice with the true one, least {values.min():.3f}",
                    "N": len(values),
                    "off, %": 100 * float(values.mean() - 1),
                    "SD, %": 100 * float(values.std(ddof=1)) if len(values) > 1 else None,
                    "within 3 %": float(np.mean(values >= 0.97)),
                }
            )
    return table


def agreement(sets: dict[str, list[dict]]) -> list[dict]:
    """Panels for `figures.scatter`: measured against seen, drawn or asked values, one set a grid."""
    panels = []
    for name, found, wanted, what in PAIRS:
        kept = {grid: [r for r in rows if "refused" not in r] for grid, rows in sets.items()}
        points = {grid: ([r[wanted] for r in rows], [r[found] for r in rows]) for grid, rows in kept.items()}
        ends = [f(v for pair in points.values() for values in pair for v in values) for f in (min, max)]
        axes = what.split(" against ")
        panels.append({"title": name, "x": axes[1], "y": axes[0], "sets": points, "lines": {"": (ends, ends)}})
    return panels


def age_panels(rows: list[dict], traits: tuple[str, ...]) -> list[dict]:
    """Panels for `figures.scatter`: measured traits against age by sex, with the published curves."""
    panels, ages = [], np.linspace(20, 88, 69)
    for trait in traits:
        own = {sex: [r for r in rows if r["sex"] == sex and "refused" not in r] for sex in ("F", "M")}
        points = {sex: ([r["age"] for r in o], [r[f"measured_{trait}"] for r in o]) for sex, o in own.items()}
        lines = {f"{sex}, published": (ages, expected_at(sex, trait, ages)) for sex in own}
        panels.append({"title": trait, "x": "age, years", "y": "measured", "sets": points, "lines": lines})
    return panels


def ratios(sets: dict[str, list[dict]]) -> list[dict]:
    """Two ratios that blur and the definition of Tb.N decide, mean and SD over the phantoms, by grid and sex."""
    table = []
    for grid, rows in sets.items():
        for sex in ("F", "M"):
            own = [{k[9:]: v for k, v in r.items() if k.startswith("measured_")} for r in rows if r["sex"] == sex]
            own = [m for m in own if m]
            apparent = [m["BV/TV"] / (m["Tb.BMD"] / 1200) for m in own]
            spaced = [m["Tb.N"] * (m["Tb.Th"] + m["Tb.Sp"]) for m in own]
            table.append({"grid": grid, "sex": sex, "N": len(own)})
            for name, values in (("BV/TV by Tb.BMD/1200", apparent), ("Tb.N (Tb.Th + Tb.Sp)", spaced)):
                table[-1] |= {name: float(np.mean(values)), f"SD of {name}": float(np.std(values))}
    return table


def shape_table(rows: list[dict]) -> list[dict]:
    """Mean and range over phantoms of shape, network and noise, by sex, beside what is published or was measured."""
    table = []
    for name, key, wanted in SHAPE:
        for sex in ("F", "M"):
            values = np.array([r[key] for r in rows if r["sex"] == sex and key in r], float)
            if len(values):
                spread = f"{values.min():.3g} to {values.max():.3g}"
                table.append(
                    {"": name, "sex": sex, "N": len(values), "mean": float(values.mean()), "range": spread}
                    | {"published": wanted[sex] if isinstance(wanted, dict) else wanted}
                )
    return table


def plates(thicknesses=(0.10, 0.12, 0.14, 0.16, 0.18, 0.20, 0.25)) -> list[dict]:
    """Apparent thickness in mm of endless plates of known thickness, scanned without noise on the scanner's grid.

    Beside it the analytic value: a slab of tissue blurred by the point spread and by the smoothing before the
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


def crop_statistics(volume: Volume) -> dict:
    """What can be said of a crop inside trabecular bone (mg HA/cm3) without showing it: plain numbers and lists.

    Morphometry, density histogram over `HISTOGRAM` (share per bin), autocorrelation of the density along z, y, x at
    lags 0-8, and mean, SD and autocorrelation (lags 1-3) of voxels far from bone.
    """
    bone = smoothed(volume) > BONE
    quiet = ndimage.distance_transform_edt(~bone) >= QUIET_VOXELS
    values = volume.voxels[quiet]
    counts, _ = np.histogram(volume.voxels, HISTOGRAM)
    centred = volume.voxels - volume.voxels.mean(dtype=float)
    return {
        "shape": list(volume.shape),
        "traits": measure(volume, compartments="trabecular"),
        "histogram": (counts / volume.voxels.size).tolist(),
        "autocorrelation": [[correlation_at(centred, axis, lag) for lag in range(9)] for axis in range(3)],
        "marrow_mean": float(values.mean(dtype=float)),
        "marrow_sd": float(values.std(dtype=float)),
        "noise": [[_masked_correlation(volume.voxels, quiet, axis, lag) for lag in (1, 2, 3)] for axis in range(3)],
    }


def _masked_correlation(voxels: np.ndarray, mask: np.ndarray, axis: int, lag: int) -> float:
    pairs = [np.take(part, range(lag, part.shape[axis]), axis) for part in (voxels, mask)]
    both = [np.take(part, range(part.shape[axis] - lag), axis) for part in (voxels, mask)]
    inside = pairs[1] & both[1]
    return float(np.corrcoef(pairs[0][inside], both[0][inside])[0, 1])


def genuine_statistics() -> dict:
    """`crop_statistics` of a genuine scan, as recorded: a human distal radius in vivo (vtkbone tutorials)."""
    return json.loads(resources.files(__package__).joinpath("genuine_crop.json").read_text())


def phantom_crop(seed: int, density: float, shape: tuple[int, int, int]) -> Volume:
    """A crop of `shape` voxels from inside the trabecular bone of a full-size phantom of mean density `density`.

    Of the places along the bone's middle axis, the one whose mean density is nearest to that wanted.
    """
    drawn = draw_visit(seed, 1, 1, NATIVE_MM, sex="F", age=60.0, tb_bmd=density, side="right")
    seen = scan(drawn.volume, numpy_rng(seed, "noise", 1, 1), noise_sd=NOISE_SD)
    inside = ndimage.minimum_filter(drawn.compartments == TRABECULAR, 3)
    best = None
    for start in np.ndindex(*[max(1, (n - m) // 12 + 1) for n, m in zip(seen.shape, shape, strict=True)]):
        part = tuple(slice(12 * s, 12 * s + m) for s, m in zip(start, shape, strict=True))
        if inside[part].shape == tuple(shape) and inside[part].all():
            off = abs(float(seen.voxels[part].mean(dtype=float)) - density)
            if best is None or off < best[0]:
                best = off, part
    if best is None:
        raise InputError(f"no place of {tuple(shape)} voxels lies wholly inside trabecular bone")
    return Volume(np.ascontiguousarray(seen.voxels[best[1]]), seen.spacing)


def beside(genuine: dict, phantom: dict) -> list[dict]:
    """Panels for `figures.scatter` of two `crop_statistics`: histograms, and autocorrelations along z, y and x."""
    middle = (HISTOGRAM[1:] + HISTOGRAM[:-1]) / 2
    both = {"genuine": genuine, "phantom": phantom}
    panels = [
        {"title": "density", "x": "mg HA/cm3", "y": "share of voxels", "sets": {}}
        | {"lines": {name: (middle, of["histogram"]) for name, of in both.items()}}
    ]
    for axis, name in enumerate("zyx"):
        lines = {of: (range(9), both[of]["autocorrelation"][axis]) for of in both}
        panels.append({"title": f"autocorrelation along {name}", "x": "voxels", "y": "", "sets": {}, "lines": lines})
    return panels
