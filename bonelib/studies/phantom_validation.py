"""Is the phantom what it claims to be? The rows of `phantom_survey` against the truth and published values.

`CHECKS` is the table of all that is required: each property with the function that reads it, the range it must fall
in, and its source. Where a source gives a value and no tolerance, the tolerance is this project's judgement.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd

from bonelib.core.random import numpy_rng
from bonelib.evaluation.statistics import of_rows, patient_interval
from bonelib.scans.phantom.population import NOISE, WITHIN_SEX
from bonelib.scans.phantom.reference import LEAST_BMD_BVTV, POOLED, REFERENCE, YOUNG, expected_at
from bonelib.scans.phantom.scanner import NATIVE_MM

COARSE_TRAITS = ("Tt.Ar", "Tt.BMD", "Ct.BMD", "Tb.BMD", "Ct.Th", "Rel.Ct.Th")
FINE_TRAITS = (*COARSE_TRAITS, "BV/TV", "Tb.N", "Tb.Th", "Tb.Sp", "Ct.Po", "DA")
TRABECULAR_TRAITS = ("BV/TV", "Tb.N", "Tb.Th", "Tb.Sp", "DA")
SEGMENTED = {"measured": "Gaussian", "sharpened": "Laplace-Hamming"}  # columns of a survey, by name
AGED_TRAITS = ("Tt.BMD", "Ct.BMD", "Tb.BMD", "Rel.Ct.Th")
PAIRS = (
    ("Tt.Ar", "measured_Tt.Ar", "true_Tt.Ar", "measured against true"),
    ("Tb.BMD", "measured_Tb.BMD", "seen_Tb.BMD", "measured against noise-free"),
    ("Ct.BMD", "measured_Ct.BMD", "seen_Ct.BMD", "measured against noise-free"),
    ("Ct.Th", "measured_Ct.Th", "true_Ct.Th", "measured against true"),
    ("Tb.BMD", "seen_Tb.BMD", "true_Tb.BMD", "noise-free against true"),
    ("Ct.BMD", "seen_Ct.BMD", "true_Ct.BMD", "noise-free against true"),
    ("Tb.BMD", "measured_Tb.BMD", "Tb.BMD", "measured against requested"),
    ("Ct.BMD", "measured_Ct.BMD", "Ct.BMD", "measured against requested"),
)
MEAN_SDS = 0.3  # a mean may be off by so many SDs
SD_RATIO = np.array([0.7, 1.3])
PAIR_R = 0.15  # and a correlation by so much
LEAST_DICE = 0.95
MOST_BIAS = 3.0  # %
FEWEST = 3  # patients; of fewer nothing is said
POSITIVE = 1e-9  # stands for anything above 0
OLD = "sex == 'F' and age >= 60"  # women who stand for those of 70
MARROW = (-5.0, 12.0)  # mg HA/cm3: mean and SD over subjects
NOISE_LAGS = {1: (0.65, 0.75), 2: (0.18, 0.31), 3: (-0.14, 0.14)}  # autocorrelation by lag in voxels
EIGENVALUES = (0.18, 0.32, 0.50)  # of the structure tensor


class Check(NamedTuple):
    """One property: its row in the specification, the source of its range, and the column of a table that is judged by
    the statistic `of` the patients, which must lie from `low` to `high`; `where` is a query of rows."""

    row: int
    quantity: str
    source: str
    table: str
    column: str | list
    low: float = -np.inf
    high: float = np.inf
    of: Callable = np.mean
    where: str = ""


def _sd(values):
    return values.std(ddof=1)


def _median_step(both):
    return np.median(both[:, 1]) - np.median(both[:, 0])


def _separation(both):
    below, above = both.T
    return np.mean(above[:, None] > below)


VTKBONE, PONCIONI, SODE = "crops of the vtkbone tutorials", "Poncioni et al. 2026", "Sode et al. 2011"
SIZES, MOTION = "published sizes", "Arch Osteoporos 2023;18:142"
BOTH, WOMEN, MEN = "", "sex == 'F'", "sex == 'M'"
NEAR = (-MEAN_SDS, MEAN_SDS)
CHECKS = [
    # The genuine crop reads -3 or +1 by the mask that is taken, so that no closer mean is required
    Check(2, "marrow, mean", VTKBONE, "full", "marrow_mean", MARROW[0] - MARROW[1], MARROW[0] + MARROW[1]),
    Check(2, "marrow, SD of the patients' means", VTKBONE, "full", "marrow_mean", *SD_RATIO * MARROW[1], _sd),
    Check(3, "noise, mean SD", VTKBONE, "full", "marrow_sd", 0.95 * NOISE[0], 1.05 * NOISE[0]),
    Check(3, "noise, lowest SD of a scan", VTKBONE, "full", "marrow_sd", low=NOISE[2], of=min),
    Check(3, "noise, highest SD of a scan", VTKBONE, "full", "marrow_sd", high=NOISE[3], of=max),
    Check(3, "noise, worst difference of SD between thirds", VTKBONE, "full", "marrow_thirds", high=0.05, of=max),
    Check(11, "long axis, mm, women", SIZES, "coarse", "long_mm", 25, 26, where=WOMEN),
    Check(11, "long axis, mm, men", SIZES, "coarse", "long_mm", 29, 30, where=MEN),
    Check(11, "depth, mm, women", SIZES, "coarse", "short_mm", 14, 16, where=WOMEN),
    Check(11, "depth, mm, men", SIZES, "coarse", "short_mm", 16, 18, where=MEN),
    Check(11, "fill of the box", SIZES, "coarse", "fill", 0.70, 0.78),
    Check(11, "area, proximal by distal less 1", SIZES, "coarse", "area_change", -0.30, -0.20),
    Check(11, "trabecular density, outer by inner part", SIZES, "coarse", "outer_by_inner", 1),
    Check(12, "fabric, worst angle of its axis to z", VTKBONE, "full", "axis_off_z_deg", high=5, of=max),
    Check(12, "structure tensor, worst angle to z", VTKBONE, "full", "tensor_off_z_deg", high=5, of=max),
    Check(14, "motion, chance that a grade 3 shows more than a grade 2", SODE, "moved", [2, 3], 0.9, of=_separation),
    Check(14, "motion, chance that a grade 5 shows more than a grade 4", SODE, "moved", [4, 5], 0.9, of=_separation),
    Check(15, "grades, mean", MOTION, "grades", "grade", 2.7, 2.8),
    Check(15, "grades, SD", MOTION, "grades", "grade", *0.7 * SD_RATIO, _sd),
    Check(15, "grades 4 and 5, share", MOTION, "grades", "excluded", 0.15, 0.25),
    Check(15, "the same from 65 y on", MOTION, "grades", "excluded", 0.22, 0.32, where="age >= 65"),
    Check(15, "the same below 65 y", MOTION, "grades", "excluded", 0.03, 0.13, where="age < 65"),
]  # fmt: skip
for axis, (lag, ends) in product("zyx", NOISE_LAGS.items()):
    CHECKS.append(Check(4, f"noise, autocorrelation along {axis} at {lag}", VTKBONE, "full", f"acf_{axis}{lag}", *ends))
for trait, grid in (("Tt.BMD", "coarse"), ("Ct.BMD", "coarse"), ("Rel.Ct.Th", "coarse"), ("BV/TV", "full")):
    quantity = f"women from 60 y on, {trait} off its curve in SDs"
    CHECKS.append(Check(9, quantity, PONCIONI, grid, f"measured off {trait}", *NEAR, where=OLD))
for i, value in enumerate(EIGENVALUES, 1):
    ends = (value - 0.05, value + 0.05)
    CHECKS.append(Check(12, f"structure tensor, eigenvalue {i}", VTKBONE, "full", f"tensor_{i}", *ends))
for grade in (1, 2, 3, 4):
    quantity = f"motion, median of grade {grade + 1} less that of {grade}"
    CHECKS.append(Check(14, quantity, SODE, "moved", [grade, grade + 1], POSITIVE, of=_median_step))
for by, name in SEGMENTED.items():
    for trait in TRABECULAR_TRAITS:
        CHECKS.append(Check(6, f"{trait} off its curve in SDs, {name}", PONCIONI, "full", f"{by} off {trait}", *NEAR))
    CHECKS.append(Check(7, f"BV/TV by Tb.BMD/1200, {name}", PONCIONI, "full", f"{by} bone by density", 1.6, 1.9))
    quantity = f"Tb.N (Tb.Th + Tb.Sp), women, {name}"
    CHECKS.append(Check(8, quantity, PONCIONI, "full", f"{by} number by spacing", 1.17, 1.37, where=WOMEN))


def acceptance(full: list[dict], coarse: list[dict], moved: list[dict], grades: list[dict], tables: dict) -> list[dict]:
    """One line a property, in the order of the specification: what was measured, where it must fall, whether it does.

    `full` and `coarse` are rows of `survey` on the finest grid, which counts only if it is the scanner's own, and on
    the coarsest; `moved` are those of `motion_survey`, `grades` those of `graded`; `tables` has the `reference`,
    `pairs` and `plates` of the notebook. `met` is empty where fewer than three patients could be measured.
    """
    full, coarse, grades = (pd.DataFrame(rows) for rows in (full, coarse, grades))
    found = {
        "full": _with_ratios(measured(full[np.isclose(full["voxel_mm"], NATIVE_MM)])),
        "coarse": _with_ratios(measured(coarse)),
        "moved": pd.DataFrame(moved).pivot(index="patient", columns="grade", values="motion").reset_index(),
        "grades": grades.assign(excluded=grades["grade"] > 3),
    }
    lines = [judged(check, found[check.table]) for check in CHECKS] + _from_tables(**tables)
    return sorted(lines, key=lambda line: line["row"])


def _with_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with the columns that only `CHECKS` read."""
    more = {}
    for by in SEGMENTED:
        own = {trait: rows[f"{by}_{trait}"] for trait in FINE_TRAITS if f"{by}_{trait}" in rows}
        more |= {f"{by} off {trait}": _off_curve(rows, trait, by) for trait in own}
        if "BV/TV" in own:
            more[f"{by} bone by density"] = own["BV/TV"] / (own["Tb.BMD"] / 1200)
            more[f"{by} number by spacing"] = own["Tb.N"] * (own["Tb.Th"] + own["Tb.Sp"])
    return rows.assign(**more)


def judged(check: Check, rows: pd.DataFrame) -> dict:
    """The line of one check: its statistic of the finite values of its column, with the bootstrap of their patients."""
    rows = rows.query(check.where) if check.where else rows
    known = rows[["patient"]].assign(**{str(i): rows[c] for i, c in enumerate(np.ravel(check.column)) if c in rows})
    known = known.dropna() if len(known.columns) > 1 else known[:0]
    patients, values = known["patient"].to_numpy(), known.drop(columns="patient").to_numpy(float)
    values = values if isinstance(check.column, list) else values.reshape(-1)
    n, ends = len(np.unique(patients)), ("", "")
    if n < FEWEST:
        return _line(check.row, check.quantity, n, "", "", "", check.low, check.high)
    if check.of not in (min, max):
        rng = numpy_rng(0, "acceptance", check.quantity)
        ends = patient_interval(of_rows(check.of, values), patients, rng=rng)[1:3]
    return _line(check.row, check.quantity, n, float(check.of(values)), *ends, check.low, check.high)


def _line(row, quantity, n, measured, low, high, least, most) -> dict:
    bounds = f"{least:.3g} to {most:.3g}" if np.isfinite([least, most]).all() else ""
    bounds = bounds or (f"at most {most:.3g}" if np.isfinite(most) else f"at least {least:.3g}")
    bounds = "above 0" if least == POSITIVE else bounds
    met = "" if measured == "" else "yes" if least <= measured <= most else "no"
    line = {"row": row, "quantity": quantity, "N": n, "measured": measured, "low": low, "high": high}
    return line | {"must fall in": bounds, "met": met}


def _from_tables(reference, pairs, plates) -> list[dict]:
    off = [abs(r["off mm"]) for r in plates]
    lines = [_line(5, "plates, largest error in mm", len(off), max(off), "", "", -np.inf, 0.01)]
    young = [r for r in reference if r["off by SDs"] is not None]
    means = [abs(r["off by SDs"]) <= MEAN_SDS for r in young]
    spreads = [SD_RATIO[0] <= r["SD ratio"] <= SD_RATIO[1] for r in young]
    near = [abs(p["measured"] - p["expected"]) <= PAIR_R and p["measured"] * p["expected"] > 0 for p in pairs]
    for row, quantity, held in (
        (6, "the young, share of traits: means within 0.3 SD", means),
        (6, "the young, share of traits: SDs within 0.7 to 1.3 of it", spreads),
        (10, "share of correlations within 0.15", near),
    ):
        lines.append(_line(row, quantity, len(held), float(np.mean(held)) if held else "", "", "", 1, np.inf))
    by_name = {p["pair"]: p for p in pairs}
    for name, ends in (("Tb.BMD, BV/TV", (0.95, np.inf)), ("Tb.N, Tb.Sp", (-np.inf, -0.7))):
        p = by_name[name]
        lines.append(_line(10, f"correlation of {name}", p["N"], p["measured"], p["low"], p["high"], *ends))
    return lines


def measured(rows: list[dict]) -> pd.DataFrame:
    """The phantoms in which contours were found."""
    frame = pd.DataFrame(rows)
    return frame[frame["refused"].isna()] if "refused" in frame else frame


def _off_curve(rows: pd.DataFrame, trait: str, by: str) -> np.ndarray:
    """How far each phantom (n,) lies from the age curve of its sex, in SDs of the reference."""
    wanted = [float(expected_at(sex, trait, age)) for sex, age in zip(rows["sex"], rows["age"], strict=True)]
    return (rows[f"{by}_{trait}"].to_numpy(float) - wanted) / [REFERENCE[sex][trait][1] for sex in rows["sex"]]


def against_reference(rows: list[dict], traits: tuple[str, ...], *, by: str = "measured") -> list[dict]:
    """Measured means and SDs of the young by sex beside the reference, and the mean difference at all ages from the age
    curve with the half-width of its 95 % interval, in SDs of the reference.

    `by` is one of `SEGMENTED`; a trait that no row of a sex has by it has no line.
    """
    table, frame = [], pd.DataFrame(rows)
    for sex, trait in product(("F", "M"), traits):
        column = f"{by}_{trait}"
        own = frame[(frame["sex"] == sex) & frame[column].notna()] if column in frame else frame[:0]
        if own.empty:
            continue
        (mean, sd), off = REFERENCE[sex][trait], _off_curve(own, trait, by)
        values = own.loc[own["age"].between(*YOUNG), column]
        row = {"sex": sex, "trait": trait, "N young": len(values)}
        row |= {"measured": f"{values.mean():.4g} ({values.std():.3g})", "reference": f"{mean:.4g} ({sd:.3g})"}
        row |= {"off by SDs": float((values.mean() - mean) / sd), "SD ratio": float(values.std() / sd)}
        row |= dict.fromkeys(("measured", "off by SDs", "SD ratio")) if len(values) < FEWEST else {}
        half = float(1.96 * off.std(ddof=1) / np.sqrt(len(off))) if len(off) > 1 else None
        table.append(row | {"N": len(off), "off at all ages": float(off.mean()), "+-": half})
    return table


def by_segmentation(rows: list[dict]) -> list[dict]:
    """The trabecular traits of `against_reference` at all ages, by every one of `SEGMENTED` that the rows hold."""
    kept = ("sex", "trait", "reference", "N", "off at all ages", "+-")
    return [
        {"segmentation": name} | {key: line[key] for key in kept}
        for by, name in SEGMENTED.items()
        for line in against_reference(rows, TRABECULAR_TRAITS, by=by)
    ]


def correlations(rows: list[dict]) -> list[dict]:
    """For each published pair: the correlation within sex at all ages (mean of both by Fisher's z) and .8 r."""
    frame, table = measured(rows), []
    half = 1.96 / np.sqrt(max(len(frame) - 6, 1))
    for first, second, pooled in POOLED:
        pair = [f"measured_{first}", f"measured_{second}"]
        r = [np.corrcoef(frame.loc[frame["sex"] == sex, pair].T)[0, 1] for sex in ("F", "M")]
        z = np.arctanh(np.clip(r, -0.9999, 0.9999)).mean()
        row = {"pair": f"{first}, {second}", "N": len(frame), "pooled r": pooled}
        row["expected"] = WITHIN_SEX * pooled if abs(pooled) < 1 else LEAST_BMD_BVTV
        row |= {key: float(np.tanh(v)) for key, v in (("measured", z), ("low", z - half), ("high", z + half))}
        table.append(row)
    return table


def discrepancies(lines: list[dict], pairs: list[dict]) -> list[dict]:
    """What is surely unlike published bones, the furthest off first: `lines` of `by_segmentation` whose interval
    lies beyond `MEAN_SDS`, and `pairs` (`correlations`) whose interval leaves out all within `PAIR_R` of what is
    expected."""
    far, unlike = [], []
    for x in lines:
        if x["+-"] is not None and abs(x["off at all ages"]) - x["+-"] > MEAN_SDS:
            row = {"what": f"{x['trait']} of {x['sex']}, SDs off", "by": x["segmentation"]}
            far.append(row | {"measured": x["off at all ages"], "expected": 0.0})
    for p in pairs:
        if p["low"] > p["expected"] + PAIR_R or p["high"] < p["expected"] - PAIR_R:
            row = {"what": f"correlation of {p['pair']}", "by": "Gaussian"}
            unlike.append(row | {"measured": p["measured"], "expected": p["expected"]})
    return [x for rows in (far, unlike) for x in sorted(rows, key=lambda r: -abs(r["measured"] - r["expected"]))]


def biases(sets: dict[str, list[dict]]) -> list[dict]:
    """How far measurements lie from what they should read, in %: mean, SD and N of every pair in `PAIRS`, by grid.

    `met` is said of the two densities that judge the contours: whether the mean lies within `MOST_BIAS`.
    """
    table = []
    for (grid, rows), (trait, found, wanted, compared) in product(sets.items(), PAIRS):
        frame = measured(rows)
        off = 100 * (frame[found] / frame[wanted] - 1)
        row = {"grid": grid, "trait": trait, "compared": compared, "N": len(off), "off, %": float(off.mean())}
        row |= {"SD, %": float(off.std()), "within 3 %": float((off.abs() <= MOST_BIAS).mean())}
        judges = compared == "measured against noise-free" and len(off)
        table.append(row | {"met": ("yes" if abs(off.mean()) <= MOST_BIAS else "no") if judges else ""})
    return table


def overlaps(sets: dict[str, list[dict]]) -> list[dict]:
    """Dice of the found with the true compartments: mean and lowest of the phantoms of each grid, and its bound."""
    table = []
    for (grid, rows), part in product(sets.items(), ("total", "trabecular", "cortical")):
        dice = measured(rows)[f"dice_{part}"]
        row = {"compartment": part, "voxel size": grid, "N": len(dice), "mean": float(dice.mean())}
        row |= {"lowest": float(dice.min()), "must be": f"at least {LEAST_DICE}"}
        table.append(row | {"all met": "yes" if dice.min() >= LEAST_DICE else "no"})
    return table


def agreement(sets: dict[str, list[dict]]) -> list[dict]:
    """Panels for `figures.scatter` of `PAIRS`: one set a grid."""
    panels, frames = [], {grid: measured(rows) for grid, rows in sets.items()}
    for name, found, wanted, what in PAIRS:
        points = {grid: (frame[wanted], frame[found]) for grid, frame in frames.items()}
        every = np.concatenate([values for pair in points.values() for values in pair])
        ends = [every.min(), every.max()]
        axes = what.split(" against ")
        panels.append({"title": name, "x": axes[1], "y": axes[0], "sets": points, "lines": {"": (ends, ends)}})
    return panels


def age_panels(rows: list[dict], traits: tuple[str, ...]) -> list[dict]:
    """Panels for `figures.scatter`: measured traits against age by sex, with the published curves."""
    by_sex, ages, panels = dict(list(measured(rows).groupby("sex"))), np.linspace(20, 88, 69), []
    for trait in traits:
        points = {sex: (own["age"], own[f"measured_{trait}"]) for sex, own in by_sex.items()}
        lines = {f"{sex}, published": (ages, expected_at(sex, trait, ages)) for sex in by_sex}
        panels.append({"title": trait, "x": "age, years", "y": "measured", "sets": points, "lines": lines})
    return panels
