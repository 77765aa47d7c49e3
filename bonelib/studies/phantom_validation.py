"""Is the phantom what it claims to be? The rows of `phantom_survey` held against the truth and published values.

Reference: Bern multi-stack XtremeCT II cohort, distal radius (Poncioni et al. 2026, hrpqct-multistack-db).
"""

from itertools import product
from types import MappingProxyType

import numpy as np

from bonelib.scans.phantom.population import FEMALE_K, MALE_PER_YEAR, PLATEAU_AGE, WITHIN_SEX, YOUNG_MEAN_AGE

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
TRABECULAR_TRAITS = ("BV/TV", "Tb.N", "Tb.Th", "Tb.Sp", "DA")
SEGMENTED = MappingProxyType({"measured": "Gaussian", "sharpened": "Laplace-Hamming"})  # columns of a survey, by name
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
)
LEAST_DICE = 0.95
MOST_BIAS = 3.0  # %
MEAN_SDS = 0.3  # a mean may be off by so many SDs
PAIR_R = 0.15  # and a correlation by so much
PARTS = ("total", "trabecular", "cortical")


def expected_at(sex: str, trait: str, ages: np.ndarray) -> np.ndarray:
    """The published age curve of a trait: women constant up to 37 and then falling with the square, men linear."""
    mean, _ = REFERENCE[sex][trait]
    late = np.clip(np.asarray(ages, float) - PLATEAU_AGE, 0, None)
    if sex == "M":
        return mean * (1 + MALE_RATES.get(trait, 0.0) * (np.asarray(ages, float) - YOUNG_MEAN_AGE))
    if trait in FEMALE_RATES:
        return mean * (1 + FEMALE_RATES[trait] * late)
    return mean - FEMALE_CURVES.get(trait, 0.0) * late**2


def against_reference(rows: list[dict], traits: tuple[str, ...], *, by: str = "measured") -> list[dict]:
    """Measured means and SDs of the young by sex beside the reference, and the mean difference at all ages.

    `off by SDs` is the difference of the young means in SDs of the reference, `SD ratio` that of their SDs; `off at
    all ages` is the mean of every phantom's difference from the age curve, with the half-width of its 95 % interval.
    `by` is one of `SEGMENTED`; a trait that no row of a sex has by it has no line.
    """
    table = []
    for sex, trait in product(("F", "M"), traits):
        own = [r for r in rows if r["sex"] == sex and f"{by}_{trait}" in r]
        if not own:
            continue
        mean, sd = REFERENCE[sex][trait]
        every = np.array([r[f"{by}_{trait}"] for r in own], float)
        values = every[[YOUNG[0] <= r["age"] <= YOUNG[1] for r in own]]
        off = off_curve(own, trait, by=by)
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


def off_curve(rows: list[dict], trait: str, *, by: str = "measured") -> np.ndarray:
    """How far each phantom (n,) lies from the age curve of its sex, in SDs of the reference."""
    wanted = [float(expected_at(r["sex"], trait, r["age"])) for r in rows]
    sds = [REFERENCE[r["sex"]][trait][1] for r in rows]
    return (np.array([r[f"{by}_{trait}"] for r in rows], float) - wanted) / sds


def by_segmentation(rows: list[dict]) -> list[dict]:
    """The trabecular traits of `against_reference` at all ages, by every one of `SEGMENTED` that the rows hold."""
    kept = ("sex", "trait", "reference", "N", "off at all ages", "+-")
    return [
        {"segmentation": name} | {key: line[key] for key in kept}
        for by, name in SEGMENTED.items()
        for line in against_reference(rows, TRABECULAR_TRAITS, by=by)
    ]


def discrepancies(lines: list[dict], pairs: list[dict]) -> str:
    """In a sentence or two: what is surely unlike published bones, the furthest off first.

    Of the `lines` of `by_segmentation` those whose interval lies beyond `MEAN_SDS`, of `pairs` (`correlations`) those
    whose interval leaves out everything within `PAIR_R` of what is expected.
    """
    far = {}
    for line in lines:
        if line["+-"] is not None and abs(line["off at all ages"]) - line["+-"] > MEAN_SDS:
            far.setdefault(line["segmentation"], []).append(line)
    said = []
    for name, own in far.items():
        own = sorted(own, key=lambda line: -abs(line["off at all ages"]))
        each = [f"{x['trait']} of {x['sex']} {x['off at all ages']:+.1f} (+-{x['+-']:.1f})" for x in own]
        said.append(f"By {name}, off in SDs of the reference: {', '.join(each)}.")
    unlike = [p for p in pairs if p["low"] > p["expected"] + PAIR_R or p["high"] < p["expected"] - PAIR_R]
    unlike = sorted(unlike, key=lambda p: -abs(p["measured"] - p["expected"]))
    if unlike:
        each = [f"{p['pair']} {p['measured']:.2f} for {p['expected']:.2f}" for p in unlike]
        said.append(f"Correlations: {'; '.join(each)}.")
    return " ".join(said) or "Nothing that was measured is surely unlike published bones."


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
    return table


def overlaps(sets: dict[str, list[dict]]) -> list[dict]:
    """Dice of the found with the true compartments: mean and lowest of the phantoms of each grid, and what is asked."""
    table = []
    for grid, rows in sets.items():
        for part in PARTS:
            values = [r[f"dice_{part}"] for r in rows if "refused" not in r]
            table.append(
                {
                    "compartment": part,
                    "voxel size": grid,
                    "N": len(values),
                    "mean": float(np.mean(values)),
                    "lowest": min(values),
                    "asked": f"at least {LEAST_DICE}",
                    "all met": "yes" if min(values) >= LEAST_DICE else "no",
                }
            )
    return table


def truth_table(rows: list[dict]) -> list[dict]:
    """Of `truth_survey`: mean and lowest over its phantoms of each comparison."""
    named = {
        "Dice of the true cortex with that of a finer grid": "truth_by_finer",
        "Dice of the found cortex with the true one": "found_by_own",
        "Dice of the found cortex with that of a finer grid": "found_by_finer",
        "volume of the true cortex by that of a finer grid, less 1": "volume_by_finer",
    }
    values = {name: [r[key] for r in rows] for name, key in named.items()}
    return [{"": name, "N": len(v), "mean": float(np.mean(v)), "lowest": min(v)} for name, v in values.items()]


def contour_verdict(bias: list[dict], overlap: list[dict]) -> str:
    """In a sentence a grid: whether densities are read within `MOST_BIAS` and contours found to `LEAST_DICE`."""
    said = []
    for grid in dict.fromkeys(row["grid"] for row in bias):
        own = [r for r in bias if r["grid"] == grid and r["trait"] in ("Tb.BMD", "Ct.BMD")]
        own = [r for r in own if r["compared"] == "measured against seen" and r["N"]]
        read = [f"{r['trait']} {r['off, %']:+.1f} % ({r['within 3 %']:.0%} of {r['N']} within 3 %)" for r in own]
        held = all(abs(r["off, %"]) <= MOST_BIAS for r in own)
        dice = [r for r in overlap if r["voxel size"] == grid]
        low = [f"{r['compartment']} {r['lowest']:.3f} (mean {r['mean']:.3f})" for r in dice if r["all met"] == "no"]
        said.append(
            f"At {grid}: {', '.join(read)}, on average {'within' if held else 'not within'} {MOST_BIAS:g} %; "
            + (f"lowest Dice below {LEAST_DICE}: {', '.join(low)}." if low else f"every Dice is at least {LEAST_DICE}.")
        )
    return " ".join(said)


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
