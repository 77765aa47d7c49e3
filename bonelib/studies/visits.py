"""Patients scanned again and again: what their codes say of a visit to come, where the change is known."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bonelib import InputError
from bonelib.core.random import numpy_rng
from bonelib.evaluation.cohort_morphometry import COARSE_MM
from bonelib.evaluation.statistics import Interval, mean_rows, patient_interval, patient_mean, pivoted
from bonelib.latent.attribute_model import AttributeModel, readings
from bonelib.latent.inversion import Inverter, encode, refine
from bonelib.latent.models import Model
from bonelib.latent.target_optimisation import optimise_to_target
from bonelib.scans.config import Preprocess
from bonelib.scans.dataset import Stacks
from bonelib.scans.phantom.population import SLOW_CHANGE, Course
from bonelib.scans.phantom.stacks import draw_visits
from bonelib.studies.config import VisitsAndAtlases

FIRST = 200_000  # patients of the arm are the phantom's from this number on, whom no cohort holds
TRAIT = "Tb.BMD"
SAME, VOXELS, SAME_CODE = "no change, scan", "line of voxels", "no change, code"
OWN, OTHERS = "line of codes", "others' direction"
CHANGED, CHANGED_OTHERS, ASKED = "scan + line of codes", "scan + others' direction", "scan + asked density"
BEST = "code of last visit"
BIAS, DENSITY, VOXEL = f"{TRAIT}, mean error", f"{TRAIT}, error", "voxels, error"
Draw = Callable[[Tensor], Tensor]  # of codes (n, *code) volumes (n, 1, z, y, x)
Read = Callable[[Tensor], Tensor]  # of volumes (n, 1, z, y, x) trabecular densities (n,) in mg HA/cm3


class Arm(NamedTuple):
    """Patients with several visits: stacks (patient, visit, 1, z, y, x) in [0, 1], years since the first visit, and the
    true trabecular density (patient, visit) in mg HA/cm3, of all drawn voxels."""

    volumes: Tensor
    years: tuple[float, ...]
    density: np.ndarray
    patients: list[str]


def draw_arm(how: VisitsAndAtlases, given: Preprocess, spacing_mm: float, halvings: int, seed: int) -> Arm:
    """Phantoms with the first `how.known` yearly visits and the last, whose trabeculae change by `how.change` of their
    first thickness every year, on the grid of stacks of `spacing_mm`, preprocessed as `given` says, after so many
    halvings."""
    years = (*map(float, range(how.known)), how.visits - 1.0)
    course, numbers = Course(years, SLOW_CHANGE | {TRAIT: (how.change, how.spread)}), range(FIRST, FIRST + how.patients)
    visits = range(1, len(years) + 1)
    stacks, truths = draw_visits(numbers, visits, course, given, spacing_mm, halvings, COARSE_MM, seed)
    density = np.array([[truth[f"true_{TRAIT}"] for truth in of_patient] for of_patient in truths])
    return Arm(stacks, years, density, [f"phantom {number}" for number in numbers])


def invert_visits(volumes: Tensor, known: int, model: Model, inverter: Inverter, how, say=print) -> Tensor:
    """Codes (patient, visit, *code) of stacks (patient, visit, 1, z, y, x), each refined as `how` says from the mean
    of what the encoder reads in the patient's first `known`: where visits end then differs by what differs in their
    scans."""
    of, flat = volumes.shape[:2], volumes.flatten(0, 1)
    read = encode(inverter.encoder, flat).unflatten(0, of)[:, :known]
    start = read.mean(1, keepdim=True).expand(*of, *read.shape[2:]).flatten(0, 1).contiguous()
    found = refine(start, flat, model, how, latent_discriminator=inverter.latent_discriminator, say=say)
    return found.codes.unflatten(0, of)


def slopes(values: Tensor, years: Sequence[float]) -> Tensor:
    """Of values (patient, visit, ...) the slopes (patient, ...) of least-squares lines over the years of the visits."""
    t = torch.tensor(years, dtype=values.dtype)
    weights = (t - t.mean()) / (t - t.mean()).square().sum()
    return torch.einsum("v,nv...->n...", weights, values)


def line_at(values: Tensor, years: Sequence[float], year: float, slope: Tensor | None = None) -> Tensor:
    """What the lines through values (patient, visit, ...) say of a year, (patient, ...): with their own slopes, or
    with others (patient, ...)."""
    slope = slopes(values, years) if slope is None else slope
    return values.mean(1) + (year - float(np.mean(years))) * slope


def of_the_others(values: Tensor) -> Tensor:
    """For each patient of values (patient, ...) the mean of all others."""
    return (values.sum(0) - values) / (len(values) - 1)


def predict(
    arm: Arm, codes: Tensor, known: int, draw: Draw, read: Read, tool: AttributeModel, *, seed: int
) -> dict[str, Tensor]:
    """The last visit as every method has it from the first `known`, (patient, 1, z, y, x), and `BEST` from itself.

    `codes` (patient, visit, *code) are those of `invert_visits`, `draw` makes volumes of them, `read` densities of
    volumes. Methods that change the last known scan add to it what the change of the code changes. `ASKED` takes the
    nearest code that changes the density as much as the line through those read in the scans, where something is
    calibrated.
    """
    years, year = arm.years[:known], arm.years[-1]
    before, last, scans = codes[:, :known], codes[:, known - 1], arm.volumes[:, :known]
    others = of_the_others(slopes(before, years))
    own, common = line_at(before, years, year), line_at(before, years, year, others)
    there = draw(line_at(before, years, years[-1])), draw(line_at(before, years, years[-1], others))
    found = {
        SAME: scans[:, -1],
        VOXELS: line_at(scans, years, year),
        SAME_CODE: draw(last),
        OWN: draw(own),
        OTHERS: draw(common),
        CHANGED: scans[:, -1] + draw(own) - there[0],
        CHANGED_OTHERS: scans[:, -1] + draw(common) - there[1],
    }
    if tool.calibrated:
        density = torch.stack([read(scans[:, v]) for v in range(known)], 1)
        change = line_at(density, years, year) - density[:, -1]
        found[ASKED] = scans[:, -1] + draw(with_change(tool, last, change, seed)) - draw(last)
    return found | {BEST: draw(codes[:, -1])}


def with_change(tool: AttributeModel, codes: Tensor, change: Tensor, seed: int) -> Tensor:
    """The nearest codes to `codes` (n, *code) whose trabecular density differs by `change` (n,) in mg HA/cm3."""
    full = F.pad(codes, (0, len(tool.mean) - codes.shape[-1]))  # with the average texture, where codes have one
    k, wanted = tool.index(TRAIT), torch.full((len(codes), len(tool.names)), torch.nan)
    wanted[:, k] = readings(tool.read, full)[:, k] + change
    numbers = [int(n) for n in numpy_rng(seed, "changed density").integers(1 << 31, size=len(codes))]
    return optimise_to_target(tool, full, wanted, seeds=numbers).codes[..., : codes.shape[-1]]


# How good


def errors(real: Tensor, predicted: Tensor, read: Read, intensity) -> dict[str, np.ndarray]:
    """Of predicted visits (n, 1, z, y, x): error of the density read, and mean absolute error of voxels, (n,), both in
    mg HA/cm3. NaN where a bone cannot be read."""
    off = (read(predicted) - read(real)).double().numpy()
    voxels = (predicted - real).abs().flatten(1).mean(1).double().numpy() * (intensity[1] - intensity[0])
    return {BIAS: off, DENSITY: np.abs(off), VOXEL: voxels}


def table(found: dict[str, dict[str, np.ndarray]], patients: Sequence[str], *, seed: int, draws: int) -> list[dict]:
    """Of the `errors` of every method: a row a method and measure, with its interval by patient.

    Beside them how much smaller an error is than that of `SAME`, of the same patients, and for how many it is smaller.
    """
    rows = []
    for method, values in found.items():
        less = {}
        if method != SAME:
            for name in (DENSITY, VOXEL):
                gain = found[SAME][name] - values[name]
                less |= {f"{name}, less by": gain, f"{name}, smaller": np.where(np.isnan(gain), np.nan, gain > 0)}
        of_all = mean_rows(values | less, patients, "visits", seed=seed, draws=draws)
        rows += [dict(method=method) | row for row in of_all]
    return rows


def pivot(rows: list[dict]) -> list[dict]:
    """The rows of `table` as one to be read: a line a method, a column a measure."""
    return pivoted(rows, "method", "measure")


def seen_change(values: np.ndarray, true: np.ndarray, patients, *, seed: int, draws: int) -> Interval:
    """Of the change of `true` (patient, visit) within patients, how much `values` (patient, visit) show: a slope.

    1 where they show all of it, 0 where nothing. Patients with a value that is missing are left out.
    """
    kept = np.isfinite(values).all(1) & np.isfinite(true).all(1)
    if not kept.any():
        return Interval(np.nan, np.nan, np.nan, 0, 0)
    x, y = (v[kept] - v[kept].mean(1, keepdims=True) for v in (np.asarray(true, float), np.asarray(values, float)))
    names, rng = np.asarray(patients)[kept], numpy_rng(seed, "seen change")
    return patient_interval(lambda i: (x[i] * y[i]).sum() / (x[i] ** 2).sum(), names, rng=rng, draws=draws)


def alike(codes: Tensor, years: Sequence[float], patients, *, seed: int, draws: int) -> Interval:
    """Cosine of every patient's direction with the mean of the others', of codes (patient, visit, *code): the mean."""
    own = slopes(codes, years)
    cosine = F.cosine_similarity(own.flatten(1), of_the_others(own).flatten(1)).numpy()
    return patient_mean(cosine, patients, rng=numpy_rng(seed, "alike"), draws=draws)


def two_visits(data: Stacks, names: Sequence[str] | None) -> list[dict]:
    """The rows of two stacks of one patient at the same height, one a scan: of the scans `names`, by default of the
    first patient who has two. Raises `InputError` where there are none, or these are not of one patient."""
    patient, stacks = {row["scan"]: row["patient"] for row in data.rows}, {}
    for row in data.rows:
        stacks.setdefault(row["scan"], []).append(row)
    if names is None:
        pairs = ((a, b) for a, b in combinations(stacks, 2) if patient[a] == patient[b])
        names = next(pairs, None)
        if names is None:
            raise InputError("stacks.csv: no patient has two scans that can be used; name two with pair")
    if missing := [name for name in names if name not in stacks]:
        known = ", ".join(list(stacks)[:4])
        raise InputError(f"pair: scan {missing[0]} is not among the stacks; accepted are {known} ...")
    if patient[names[0]] != patient[names[1]]:
        says = f"{names[0]} is of {patient[names[0]]} and {names[1]} of {patient[names[1]]}"
        raise InputError(f"pair: {says}; accepted are two scans of one patient")
    return [stacks[name][len(stacks[name]) // 2] for name in names]
