"""Who is scanned: sex, age and bone traits of a patient, and what changes from visit to visit.

Means, SDs and age curves: Bern multi-stack reference (Poncioni et al. 2026, hrpqct-multistack-db), distal radius.
"""

import difflib
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bonelib import InputError
from bonelib.core.random import numpy_rng

COPULA = ("Tt.Ar", "Ct.Th", "Tb.BMD", "Tb.Th", "Ct.BMD", "Ct.Po", "Tb.N")

# Mean and SD at the young plateau: mm2, mm, mg HA/cm3, mm, mg HA/cm3, fraction, 1/mm; of women, of men, and limits.
WOMEN = (277.0, 40.0), (1.057, 0.154), (145.0, 31.0), (0.215, 0.012), (926.0, 40.0), (0.003, 0.002), (1.456, 0.177)
MEN = (357.0, 55.0), (1.226, 0.207), (199.0, 34.0), (0.242, 0.017), (887.0, 35.0), (0.007, 0.006), (1.583, 0.234)
BOUNDS = (150.0, 520.0), (0.45, 2.2), (50.0, 330.0), (0.17, 0.31), (650.0, 1030.0), (0.0, 0.05), (0.7, 2.4)
REFERENCE = {sex: dict(zip(COPULA, values, strict=True)) for sex, values in (("F", WOMEN), ("M", MEN))}
LIMITS = dict(zip(COPULA, BOUNDS, strict=True))

# Pooled-sex correlations recovered from the reference; pairs that it does not give are bridged through Tb.BMD.
POOLED_R = {
    "Tt.Ar": {"Tb.BMD": 0.21, "Tb.Th": 0.30, "Ct.BMD": -0.42, "Ct.Po": 0.21, "Tb.N": 0.17},
    "Ct.Th": {"Tb.BMD": 0.42, "Tb.Th": 0.31, "Ct.BMD": 0.50, "Ct.Po": -0.18, "Tb.N": 0.34},
    "Tb.BMD": {"Tb.Th": 0.73, "Ct.BMD": 0.20, "Tb.N": 0.81},
    "Tb.Th": {"Tb.N": 0.39},
    "Ct.BMD": {"Ct.Po": -0.40},
}
WITHIN_SEX = 0.8  # share of a pooled correlation that remains within one sex

PLATEAU_AGE = 37.0  # y; women are constant up to here, then lose k (age - 37)^2
YOUNG_MEAN_AGE = 28.5  # y, the middle of 20-37; men change linearly about it, so that the young mean is the reference
AGE_RANGE = (20.0, 88.0)  # y
FEMALE_K = {"Ct.BMD": 0.06798, "BV/TV": 2.70e-5, "Rel.Ct.Th": 1.197e-5}
FEMALE_BVTV = 0.209  # reference BV/TV, which turns the curve of BV/TV into one of Tb.BMD
MALE_PER_YEAR = {"Ct.BMD": -0.00076, "Tb.BMD": -0.0052, "Ct.Th": -0.0008, "Tb.N": -0.0019, "Tb.Th": -0.0006}
FEMALE_PER_YEAR = {"Tb.N": -0.0042, "Tb.Th": 0.0008}
CT_PO_PER_YEAR = {"F": 0.053, "M": 0.0157}

MARROW = (-5.0, 5.0)  # mg HA/cm3, mean and SD over patients
NOISE = (105.0, 12.0, 80.0, 140.0)  # mg HA/cm3: mean, SD, bounds; genuine XtremeCT II crops read 107 and 110
NOISE_BETWEEN_VISITS = 3.0  # mg HA/cm3
POSE = {"rotation": 7.0}  # degrees in plane, SD over patients
BETWEEN_VISITS = {"rotation": (1.5, 4.0), "shift": (0.25, 0.5), "shift_z": (0.25, 0.6)}
VISIT_YEARS = (0.0, 1 / 52, 3 / 52, 0.25, 0.5, 1.0)  # Angermann et al. 2023, section 3.1
SLOW_CHANGE = {"Tb.BMD": (-0.005, 0.005), "Ct.BMD": (-0.002, 0.002), "Ct.Th": (-0.003, 0.004)}

# Grades 4-5 are so much commoner from this age on (Arch Osteoporos 2023;18:142: 27 against 8 %)
MOTION_AGE, MOTION_RATIO = 65.0, 27 / 8

SIDES = ("left", "right")

TRAITS = ("sex", "age", "side", *COPULA, "marrow", "noise_sd", "rotation", "shift_z", "shift_y", "shift_x")


class Course(NamedTuple):
    """When visits are, in years since the first, and mean and SD over patients of what traits change by in a year.

    Of a trait that is not named nothing changes; those that can are Tb.BMD, Ct.BMD and Ct.Th.
    """

    years: tuple[float, ...] = VISIT_YEARS
    change: Mapping[str, tuple[float, float]] = SLOW_CHANGE


COURSE = Course()


def correlation() -> np.ndarray:
    """Within-sex correlation (7, 7) of the traits in `COPULA`."""
    r = np.eye(len(COPULA))
    for first, others in POOLED_R.items():
        for second, value in others.items():
            i, j = COPULA.index(first), COPULA.index(second)
            r[i, j] = r[j, i] = WITHIN_SEX * value
    return r


def sample_patient(seed: int, patient: int, **traits) -> dict:
    """Sex, age and traits of one patient: a Gaussian copula about the age curve of the sex.

    `traits` override what is drawn; names as in `TRAITS`, dots written as underscores if wanted (`tb_bmd=105`).
    Units: years, mm2, mm, mg HA/cm3, 1/mm, degrees; Ct.Po is a fraction. Raises `InputError` for an unknown trait.
    """
    given = _named(traits)
    rng = numpy_rng(seed, "patient", patient)
    sex = "F" if rng.random() < 0.5 else "M"
    age = float(rng.uniform(*AGE_RANGE))
    z = np.linalg.cholesky(correlation()) @ rng.standard_normal(len(COPULA))
    z = dict(zip(COPULA, np.clip(z, -2.5, 2.5), strict=True))
    sex, age = given.get("sex", sex), float(given.get("age", age))
    if sex not in REFERENCE:
        raise InputError(f"trait sex is {sex!r}; accepted are F and M")
    side = SIDES[int(numpy_rng(seed, "side", patient).integers(2))]
    values = {"sex": sex, "age": round(age, 1), "side": given.get("side", side)}
    if values["side"] not in SIDES:
        raise InputError(f"trait side is {values['side']!r}; accepted are left and right")
    for name, (mean, sd) in REFERENCE[sex].items():
        values[name] = _log_normal(mean, sd, z[name]) if name == "Ct.Po" else mean + sd * z[name]
    values = _aged(values)
    for name, bounds in LIMITS.items():
        values[name] = float(np.clip(values[name], *bounds))
    values["marrow"] = float(rng.normal(*MARROW))
    values["noise_sd"] = float(np.clip(rng.normal(*NOISE[:2]), *NOISE[2:]))
    values["rotation"] = float(np.clip(rng.normal(0, POSE["rotation"]), -18, 18))
    values |= {"shift_z": 0.0, "shift_y": 0.0, "shift_x": 0.0}
    for name, value in given.items():
        values[name] = value if name in ("sex", "side") else _number(name, value)
    return values


def at_visit(traits: dict, seed: int, patient: int, visit: int, course: Course = COURSE) -> dict:
    """What one visit adds to a patient: years since the first, pose, noise and slow change as factors.

    Behind the last visit of the course there is one every year.
    """
    rng = numpy_rng(seed, "visit", patient, visit)
    pace, count = numpy_rng(seed, "pace", patient), len(course.years)
    years = course.years[visit - 1] if visit <= count else course.years[-1] + float(visit - count)
    rates = {name: float(pace.normal(*course.change.get(name, (0.0, 0.0)))) for name in SLOW_CHANGE}
    change = {name: 1 + years * rate for name, rate in rates.items()}

    def move(kind: str) -> float:
        sd, bound = BETWEEN_VISITS[kind]
        return float(np.clip(rng.normal(0, sd), -bound, bound))

    return {
        "years": years,
        "rotation": traits["rotation"] + move("rotation"),
        "shift_z": traits["shift_z"] + move("shift_z"),
        "shift_y": traits["shift_y"] + move("shift"),
        "shift_x": traits["shift_x"] + move("shift"),
        "noise_sd": float(np.clip(traits["noise_sd"] + rng.normal(0, NOISE_BETWEEN_VISITS), *NOISE[2:])),
        "change": change,
    }


def visits_of(seed: int, patients: int, most: int, scans: int | None = None) -> dict[int, list[int]]:
    """The visits of every patient, numbered from 1: of `patients` x `most`, those left when `scans` were made.

    Who missed which visit is drawn; nobody missed the first. Raises `InputError` if `scans` do not fit.
    """
    if scans is not None and not patients <= scans <= patients * most:
        raise InputError(f"scans is {scans}; accepted are {patients} to {patients * most}, one to {most} a patient")
    later = [(p, v) for p in range(1, patients + 1) for v in range(2, most + 1)]
    count = len(later) if scans is None else scans - patients
    kept = {later[i] for i in numpy_rng(seed, "visits").permutation(len(later))[:count]}
    return {p: [1, *(v for v in range(2, most + 1) if (p, v) in kept)] for p in range(1, patients + 1)}


def motion_grade(seed: int, patient: int, visit: int, age: float, shares: tuple[float, ...]) -> int:
    """Visual grade (1-5) of one scan, drawn with `shares`; grades 4 and 5 are commoner in the old.

    Over the cohort's ages the shares hold; their ratio between old and young is `MOTION_RATIO`.
    """
    old = (AGE_RANGE[1] - MOTION_AGE) / (AGE_RANGE[1] - AGE_RANGE[0])
    bad = sum(shares[3:])
    young_bad = bad / (old * MOTION_RATIO + 1 - old)
    own = min(young_bad * MOTION_RATIO if age >= MOTION_AGE else young_bad, 1.0)
    scale = (1 - own) / (1 - bad) if bad < 1 else 0.0, own / bad if bad > 0 else 0.0
    chances = np.array([share * scale[grade >= 3] for grade, share in enumerate(shares)])
    return 1 + int(numpy_rng(seed, "grade", patient, visit).choice(5, p=chances / chances.sum()))


def _aged(values: dict) -> dict:
    age, aged = values["age"], dict(values)
    late = max(age - PLATEAU_AGE, 0.0)
    if values["sex"] == "F":
        aged["Ct.BMD"] -= FEMALE_K["Ct.BMD"] * late**2
        aged["Tb.BMD"] *= 1 - FEMALE_K["BV/TV"] / FEMALE_BVTV * late**2
        aged["Ct.Th"] -= FEMALE_K["Rel.Ct.Th"] * late**2 * math.sqrt(values["Tt.Ar"] / math.pi)
        for name, rate in FEMALE_PER_YEAR.items():
            aged[name] *= 1 + rate * late
    else:
        for name, rate in MALE_PER_YEAR.items():
            aged[name] *= 1 + rate * (age - YOUNG_MEAN_AGE)
    aged["Ct.Po"] *= 1 + CT_PO_PER_YEAR[values["sex"]] * late
    return aged


def _log_normal(mean: float, sd: float, z: float) -> float:
    width = math.sqrt(math.log1p((sd / mean) ** 2))
    return mean * math.exp(width * z - width**2 / 2)


def _number(name: str, value) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    low, high = LIMITS.get(name, (-math.inf, math.inf))
    if not (math.isfinite(number) and low <= number <= high):
        raise InputError(f"trait {name} is {value!r}; accepted are numbers from {low:g} to {high:g}")
    return number


def _named(traits: dict) -> dict:
    known = {name.lower().replace(".", "_"): name for name in TRAITS}
    named = {}
    for key, value in traits.items():
        plain = key.lower().replace(".", "_")
        if plain not in known:
            near = difflib.get_close_matches(plain, known, n=1, cutoff=0.0)[0]
            raise InputError(f"trait {key!r} is not known; the nearest is {known[near]!r}")
        named[known[plain]] = value
    return named
