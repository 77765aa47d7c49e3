"""Slices in two contrasts and one latent space: samples by contrast, codes, and what tells attributes of codes apart
(Fetty et al. 2020)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import normaltest
from torch import Tensor

from bonelib import InputError
from bonelib.core.random import numpy_rng
from bonelib.evaluation.features import random3d, standardised
from bonelib.evaluation.metrics import frechet_distance, realism
from bonelib.evaluation.statistics import Interval, half_interval, mean_rows, of_rows, patient_mean
from bonelib.latent import directions, sefa
from bonelib.latent.directions import Direction
from bonelib.latent.inversion import Inverter, draw_codes, encode, evenly_spaced, losses, refine
from bonelib.latent.models import Model, draw
from bonelib.scans.dataset import Stacks
from bonelib.scans.phantom.contrasts import CONTRASTS, INTENSITY
from bonelib.studies.config import TwoContrasts

MINERAL, SOFT = CONTRASTS
ERROR = {MINERAL: "mean absolute error, mg HA/cm³", SOFT: "root mean square error, of [-1, 1]"}
ATTRIBUTES = ("contrast", "sex", "position")
ENDS = (0.4, 0.6)  # classes of position (Fetty et al. 2020)
BENT = ("mean", "SD", "p", "largest principal, median", "in spreads")  # what `bending` says of a surface
SEFA = 8  # directions without labels
OUTLYING = 0.01  # of real slices, whose realism is that of a pocket's border

Draw = Callable[[Tensor], Tensor]  # of codes (n, d) or (n, layers, d) slices (n, 1, 1, y, x)


def counted(people: list[dict], slices: int) -> list[dict]:
    """How many patients, women and slices there are in either split."""
    rows = []
    for split in ("train", "held-out"):
        sexes = [person["sex"] for person in people if person["split"] == split]
        row = {"split": split, "patients": len(sexes), "women": sexes.count("F")}
        rows.append(row | {"slices of each contrast": len(sexes) * slices})
    return rows


# Samples


class Extractor:
    """random3d features at mean 0 and SD 1 of training slices `rows` of both contrasts, which have `of_known`."""

    def __init__(self, data: Stacks, rows: list[dict]):
        self.raw = random3d(data.pooled(rows, 0)[:, 0].float().numpy())
        self.of_known = standardised(self.raw)[0]
        labels = torch.tensor([row["contrast"] == SOFT for row in rows])
        self.tells = directions.logistic(torch.from_numpy(self.of_known).float(), labels)

    def __call__(self, slices: Tensor) -> np.ndarray:
        return standardised(self.raw, random3d(slices[:, 0].float().numpy()))[1]

    def second(self, features: np.ndarray) -> np.ndarray:
        """Whether features (n, 256) are of a slice of the second contrast."""
        return (self.tells.value(torch.from_numpy(features).float()) > 0).numpy()


def quality(tool: Extractor, drawn: dict[str, Tensor], data: Stacks, rows: list[dict], *, seed: int, draws: int):
    """The Frechet distance on random3d of sets of slices (n, 1, 1, y, x) to real ones `rows` of held-out patients: a
    row a set and contrast, and both pooled, as Fetty et al. have it. Which contrast a sample has, features say; `share`
    is that of samples. `real against real` is that of training slices; intervals are by halves of the patients."""
    real, patients = tool(data.pooled(rows, 0)), np.array([row["patient"] for row in rows])
    second = {"real": np.array([row["contrast"] == SOFT for row in rows]), "known": tool.second(tool.of_known)}
    table = []
    for name, slices in drawn.items():
        features = tool(slices)
        of = tool.second(features)
        for contrast, kept in {"pooled": None, MINERAL: False, SOFT: True}.items():
            at = {key: np.full(len(v), True) if kept is None else v == kept for key, v in (second | {"": of}).items()}
            a, b, c = real[at["real"]], features[at[""]], tool.of_known[at["known"]]
            row = {"set": name, "contrast": contrast, "share": float(at[""].mean())}
            found = Interval(np.nan, None, None, len(a), 0)  # where nothing is drawn in this contrast
            if len(b) > 1:
                distance, rng = of_rows(frechet_distance, a, b), numpy_rng(seed, "interval", "contrasts", contrast)
                found = half_interval(distance, patients[at["real"]], range(len(b)), rng=rng, draws=draws)
            row |= dict(zip(("FD_random3d", "low", "high", "N real", "patients"), found, strict=True))
            table.append(row | {"N": len(b), "real against real": frechet_distance(a, c)})
    return table


def samples(model: Model, n: int, seed: int, truncation: float | None = None) -> Tensor:
    """Slices of a model with their noise, (n, 1, 1, y, x)."""
    return torch.from_numpy(draw(model, n, seed, truncation))[:, None]


# Codes


class Coded(NamedTuple):
    """Slices with their codes: mineral at even places, the soft tissue of the same slice behind it."""

    codes: Tensor
    images: Tensor
    rows: list[dict]

    @property
    def patients(self) -> np.ndarray:
        return np.array([row["patient"] for row in self.rows[::2]])

    def of(self, contrast: str) -> tuple[Tensor, Tensor]:
        """Codes and images of one contrast, pair by pair."""
        first = CONTRASTS.index(contrast)
        return self.codes[first::2], self.images[first::2]


def spread_rows(data: Stacks, split: str, patients: int, positions: int) -> list[dict]:
    """Pairs of slices at `positions` evenly spaced heights of evenly spaced patients of a split."""
    rows = data.of(split)
    names = set(evenly_spaced(list(dict.fromkeys(row["patient"] for row in rows)), patients))
    starts = set(evenly_spaced(sorted({row["start"] for row in rows}), positions))
    return [row for row in rows if row["patient"] in names and row["start"] in starts]


def coded(data: Stacks, rows: list[dict], model: Model, inverter: Inverter, how: TwoContrasts, *, say=print):
    """Codes of slices by encoder and refinement (`Coded`), and a table of what each leaves, by patient."""
    images = data.pooled(rows, 0).float()
    first = encode(inverter.encoder, images)
    found = Coded(refine(first, images, model, how.refine, say=say).codes, images, rows)
    before = losses(how.refine, model, images, first)
    after = losses(how.refine, model, images, found.codes)
    drift = (found.codes - first).norm(dim=1) / (found.codes - found.codes.mean(0)).norm(dim=1).mean()
    measures = {"loss of the encoder's code": before, "loss of the refined code": after, "drift, of the spread": drift}
    drawn = {"encoder": draw_codes(model, first), "refined": draw_codes(model, found.codes)}
    for c, contrast in enumerate(CONTRASTS):
        for way, slices in drawn.items():
            measures[f"{contrast}, {way}: {ERROR[contrast]}"] = error(slices[c::2], images[c::2], contrast)
    return found, measures


def slice_by_slice(data: Stacks, volumes: list[int], model: Model, inverter: Inverter) -> list[np.ndarray]:
    """Volumes (z, y, x) of the slices that the encoder's own code of every real slice draws."""
    found = []
    for number in volumes:
        real = torch.from_numpy(data.volumes[number].astype(np.float32))[:, None, None]
        found.append(draw_codes(model, encode(inverter.encoder, real))[:, 0, 0].numpy())
    return found


def error(drawn: Tensor, real: Tensor, contrast: str) -> Tensor:
    """Of slices (n, 1, 1, y, x) in [0, 1]: of mineral the mean absolute error in mg HA/cm3 (`INTENSITY`), of soft
    tissue the root mean square error as if the range were [-1, 1] (Fetty et al. 2020), (n,)."""
    off = (drawn - real).flatten(1)
    return float(np.ptp(INTENSITY)) * off.abs().mean(1) if contrast == MINERAL else 2 * off.square().mean(1).sqrt()


def by_patient(measures: dict[str, Tensor], patients, *, seed: int, draws: int) -> list[dict]:
    """A row a measure (n,): the mean over patients, with its interval. `patients` (n,), or of pairs, (n / 2,)."""
    names = {times * len(patients): np.repeat(patients, times) for times in (1, 2)}
    how = dict(seed=seed, draws=draws, column="")
    return [mean_rows({name: v.numpy()}, names[len(v)], "by patient", **how)[0] for name, v in measures.items()]


# What tells attributes apart


def labels(rows: list[dict], attribute: str) -> tuple[np.ndarray, np.ndarray]:
    """Of rows the labels (n,) of an attribute, and which rows have one: slices in the middle have no position."""
    if attribute == "position":
        position = np.array([row["position"] for row in rows])
        return position > ENDS[1], (position < ENDS[0]) | (position > ENDS[1])
    named = {"contrast": SOFT, "sex": "F"}[attribute]
    return np.array([row[attribute] == named for row in rows]), np.full(len(rows), True)


class Told(NamedTuple):
    """What tells one attribute of codes, and how well: the plane, the network, and the network's way back."""

    plane: Direction
    network: torch.nn.Module
    back: torch.nn.Module
    row: dict

    def way(self) -> directions.Way:
        """What the rule chose to walk with."""
        bent = self.row["taken"] == "networks"
        return directions.bent(self.network, self.back) if bent else directions.straight(self.plane)


def tell(known: Coded, other: Coded, attribute: str, how: TwoContrasts, *, seed: int) -> Told:
    """The models of one attribute, learned of the codes of `known` patients, every fourth of whom is left out for the
    choice of networks, and tested on all `other` patients, with an interval by patient.

    `balanced` is the mean of both classes' accuracies. Raises `InputError` where a class is empty.
    """
    y, has = labels(known.rows, attribute)
    names = known.patients.repeat(2)
    apart = np.isin(names, _evenly_apart(names, y if attribute == "sex" else None))
    if not all(0 < y[has & part].mean() < 1 for part in (apart, ~apart)):
        raise InputError(f"two_contrasts: {attribute}: a class is empty among the patients; take more")
    labelled = known.codes[has], torch.from_numpy(y[has]), torch.from_numpy(apart[has])
    budget = dict(seed=seed, tries=how.tries, epochs=how.epochs)
    plane, deep, back, scores = directions.told_apart(*labelled, known.codes, torch.from_numpy(apart), **budget)
    row = {"attribute": attribute, "N": int((~apart[has]).sum()), "N left out": int(apart[has].sum())} | scores
    row |= {"product": back.score * deep.score, "hidden": "-".join(map(str, deep.widths))}
    truth, tested = labels(other.rows, attribute)
    right = (plane.value(other.codes).numpy() > 0) == truth
    patients, rng = other.patients.repeat(2)[tested], numpy_rng(seed, "told", attribute)
    found = patient_mean(right[tested], patients, rng=rng, draws=how.draws)
    row |= {f"unknown.{key}": value for key, value in found._asdict().items()}
    sides = [right[tested & (truth == side)].mean() for side in (False, True) if (tested & (truth == side)).any()]
    return Told(plane, deep.network, back.network, row | {"unknown.balanced": float(np.mean(sides))})


def _evenly_apart(names: np.ndarray, classes: np.ndarray | None = None) -> list[str]:
    """Every fourth of the patients named, of each class by itself where `classes` (n,) are given."""
    groups = [np.full(len(names), True)] if classes is None else [classes, ~classes]
    return [name for group in groups for name in list(dict.fromkeys(names[group]))[1::4]]


def regression(known: Coded, other: Coded, how: TwoContrasts, *, seed: int) -> list[dict]:
    """The position itself, by ridge regression and by a network, which failed in Fetty et al.: R2 on other patients."""
    position, truth = (torch.tensor([row["position"] for row in c.rows]) for c in (known, other))
    names = known.patients.repeat(2)
    left = torch.from_numpy(np.isin(names, _evenly_apart(names)))
    plane, _ = directions.ridge(known.codes, position, names)
    budget = dict(seed=seed, tries=how.tries, epochs=how.epochs)
    network = directions.search(known.codes, position[:, None], left, **budget).network
    said = {"ridge": plane.value(other.codes), "network": network(other.codes)[:, 0]}
    return [
        {"": f"position by {name}", "R2 of unknown patients": directions.r2(v, truth)}
        | {"mean absolute error": float((v - truth).abs().mean()), "N": len(truth)}
        for name, v in said.items()
    ]


def bending(told: dict[str, Told], known: Coded, how: TwoContrasts, *, seed: int) -> list[dict]:
    """How bent the networks' decision surfaces are, a row an attribute, in 1 / unit of the codes: `p` is that of
    D'Agostino and Pearson for normal mean curvatures; `in spreads` is the median of the largest principal curvature
    times the spread of the codes, 1 where the surface turns within their cloud. A network for which all codes are of
    one class has no surface among them: None."""
    rows, spread = [], float((known.codes - known.codes.mean(0)).norm(dim=1).mean())
    for attribute, found in told.items():
        if not directions.parted(found.network(known.codes)[:, 0] > 0):
            rows.append({"attribute": attribute, "points": 0} | dict.fromkeys(BENT))
            continue
        bent = directions.bending(found.network, known.codes, how.points, seed=seed, tangents=how.tangents)
        p = float(normaltest(bent.mean.numpy()).pvalue) if how.points >= 20 else float("nan")
        largest = bent.largest.abs().median()
        numbers = (float(bent.mean.mean()), float(bent.mean.std()), p, float(largest), float(largest * spread))
        rows.append({"attribute": attribute, "points": how.points} | dict(zip(BENT, numbers, strict=True)))
    return rows


def unlabelled(model: Model, told: dict[str, Told]) -> list[dict]:
    """How near the directions of the weights alone (SeFa) come to the planes: the largest cosine, and of which."""
    found = sefa.directions(model.generator.factorized_weight(), SEFA).vectors
    rows = []
    for attribute, models in told.items():
        largest, place = (found @ models.plane.vector).abs().max(0)
        rows.append({"attribute": attribute, "largest cosine": float(largest), "direction": int(place) + 1})
    chance = numpy_rng(0, "chance").standard_normal((1000, SEFA, found.shape[1]))
    chance = np.abs(chance[:, :, 0] / np.linalg.norm(chance, axis=2)).max(1).mean()
    return [*rows, {"attribute": "by chance", "largest cosine": float(chance), "direction": ""}]


# Pockets


def pockets(model: Model, tool: Extractor, real: Tensor, how: TwoContrasts, *, seed: int) -> list[dict]:
    """The share of straight walks between two samples that pass a slice less like real ones than nearly all of these (1
    %). `far` walks go on to three times as far from the mean as samples lie, where there are no codes: the measure must
    fail there."""
    border = np.quantile(realism(tool.of_known, tool(real)), OUTLYING)
    generator, rng = model.generator, torch.Generator().manual_seed(seed)
    ends = generator.to_styles(generator.sample_latent(2 * how.walks, rng)).detach().reshape(2, how.walks, -1)
    shares = torch.linspace(0, 1, how.walk_points)[:, None, None]
    between = torch.lerp(ends[0], ends[1], shares)
    far = generator.mean_style + 3 * (ends[:1] - generator.mean_style)
    rows = []
    for name, codes in {"between samples": between, "samples": ends[:1], "far": far}.items():
        found = realism(tool.of_known, tool(draw_codes(model, codes.flatten(0, 1)))).reshape(codes.shape[:2])
        missed = (found < border).any(0)
        interval = patient_mean(missed, range(len(missed)), rng=numpy_rng(seed, "pockets", name), draws=how.draws)
        row = {"walks": name, "share in a pocket": interval.value, "low": interval.low, "high": interval.high}
        rows.append(row | {"N": len(missed), "points": len(found), "border": float(border)})
    return rows
