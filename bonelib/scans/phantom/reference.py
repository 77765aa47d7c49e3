"""Published values of the distal radius: means and SDs of the young, change with age, correlations.

Bern multi-stack XtremeCT II cohort (Poncioni et al. 2026, hrpqct-multistack-db).
"""

import numpy as np

from bonelib.scans.phantom.population import FEMALE_K, FEMALE_PER_YEAR, MALE_PER_YEAR, PLATEAU_AGE, YOUNG_MEAN_AGE
from bonelib.scans.phantom.population import REFERENCE as DRAWN

# Mean and SD of the young, as measured in scans: the traits that are drawn, and those that follow from them.
FOLLOWING = ("Tt.BMD", "BV/TV", "Tb.Sp", "Rel.Ct.Th", "DA")
WOMEN = (297, 48), (0.209, 0.045), (0.655, 0.094), (0.113, 0.021), (1.82, 0.10)
MEN = (335, 51), (0.291, 0.050), (0.568, 0.072), (0.115, 0.025), (1.80, 0.11)
REFERENCE = {sex: DRAWN[sex] | dict(zip(FOLLOWING, more, strict=True)) for sex, more in (("F", WOMEN), ("M", MEN))}
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
FEMALE_CURVES = FEMALE_K | {"Tt.BMD": 0.04326, "DA": 7.82e-5, "Tb.BMD": FEMALE_K["BV/TV"] / 0.209 * 145}
FEMALE_CURVES |= {"Ct.Th": FEMALE_K["Rel.Ct.Th"] * (277 / np.pi) ** 0.5}
FEMALE_RATES = FEMALE_PER_YEAR | {"Tb.Sp": 0.0080, "Ct.Po": 0.053}
MALE_RATES = MALE_PER_YEAR | {"Tt.BMD": -0.0038, "BV/TV": -0.0056, "Tb.Sp": 0.0049, "Ct.Po": 0.0157}
MALE_RATES |= {"Rel.Ct.Th": -0.0019, "DA": -0.0020}
YOUNG = (20.0, PLATEAU_AGE)  # years
LEAST_BMD_BVTV = 0.95  # correlation of Tb.BMD and BV/TV, whose p-value was too small to be printed


def expected_at(sex: str, trait: str, ages: np.ndarray) -> np.ndarray:
    """The published age curve of a trait: women constant up to 37 and then falling with the square, men linear."""
    mean, _ = REFERENCE[sex][trait]
    late = np.clip(np.asarray(ages, float) - PLATEAU_AGE, 0, None)
    if sex == "M":
        return mean * (1 + MALE_RATES.get(trait, 0.0) * (np.asarray(ages, float) - YOUNG_MEAN_AGE))
    if trait in FEMALE_RATES:
        return mean * (1 + FEMALE_RATES[trait] * late)
    return mean - FEMALE_CURVES.get(trait, 0.0) * late**2
