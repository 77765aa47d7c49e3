"""Generated bones beside scans, for a network that grades motion: style mixing as augmentation (proposed by Angermann
et al. 2023, section 5), and samples of a conditional HA-GAN in the share of Sun et al. 2022, Table V."""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bonelib.core.config import fingerprint
from bonelib.core.random import numpy_rng
from bonelib.evaluation.statistics import patient_interval, patient_mean
from bonelib.latent.codes import decode
from bonelib.latent.mixing import crossed
from bonelib.latent.models import Model, styles_of
from bonelib.scans.dataset import Stacks, halved
from bonelib.scans.preprocessing import to_unit
from bonelib.studies.config import Augmentation
from bonelib.training import grading
from bonelib.training.grading import GRADES

SCANS, REDRAWN, MIXED, ASKED = "scans alone", "with bones of their codes", "with mixed bones", "with bones of a grade"
ERROR, BALANCED = "absolute error, grades", "balanced accuracy"


class Mix(NamedTuple):
    """Two rows of one grade and different patients, by their places, and how many styles are the first one's."""

    source: int
    target: int
    styles: int


def graded(rows: list[dict]) -> list[dict]:
    """The rows of stacks whose scan has a grade."""
    return [row for row in rows if (row.get("grade") or "").strip()]


def count_of(rows: list[dict], share: float) -> int:
    """How many generated volumes make up `share` of a training set with these."""
    return round(share / (1 - share) * len(rows))


def mixes(rows: list[dict], styles: int, count: int, seed: int) -> list[Mix]:
    """`count` pairs of rows to cross, each of one grade and two patients; none where no grade has two patients."""
    partners = [
        [j for j, b in enumerate(rows) if a["grade"] == b["grade"] and a["patient"] != b["patient"]] for a in rows
    ]
    sources = [i for i, found in enumerate(partners) if found]
    if not sources or styles < 2:
        return []
    chosen = []
    for n in range(count):
        rng = numpy_rng(seed, "augmentation mix", n)
        source = int(rng.choice(sources))
        chosen.append(Mix(source, int(rng.choice(partners[source])), int(rng.integers(1, styles))))
    return chosen


def drawn(model: Model, codes: Tensor, halvings: int, seed: int) -> np.ndarray:
    """Bones of codes (n, *code) in [0, 1], averaged over blocks of 2^halvings voxels, each with its own noise."""
    data = model.config["data"]
    found = [decode(model, code, seed + i, min(data["spacing_mm"]) * 2**halvings) for i, code in enumerate(codes)]
    return np.stack([to_unit(volume.voxels, data["intensity"]) for volume in found]).astype(np.float16)


def training_sets(
    model: Model,
    codes: Tensor,
    data: Stacks,
    rows: list[dict],
    how: Augmentation,
    *,
    seed: int,
    conditional: Model | None = None,
) -> dict[str, tuple[Stacks, list[dict]]]:
    """Training sets by name, each as the volumes and scans that `grading.train_network` takes.

    `rows` are graded stacks of `data`, `codes` theirs (n, *code). The second set adds bones drawn of codes, as many as
    are mixed in the third, whose codes are crossed: what drawing alone changes is seen in the former. With a
    `conditional` model of motion grades, a fourth set adds samples of the same grades.
    """
    real = data.pooled(rows, how.grading.halvings)[:, 0].numpy()
    styles = codes.shape[1] if codes.dim() == 3 else 1
    chosen = mixes(rows, styles, count_of(rows, how.share), seed)
    sources = [mix.source for mix in chosen]
    added = {SCANS: real[:0]}
    if chosen:
        mixed = torch.stack([crossed(codes[m.source], codes[m.target], m.styles) for m in chosen])
        added |= {REDRAWN: drawn(model, codes[sources], how.grading.halvings, seed)}
        added |= {MIXED: drawn(model, mixed, how.grading.halvings, seed)}
    if chosen and conditional:
        asked = styles_of(conditional, [int(rows[i]["grade"]) - GRADES[0] for i in sources], seed)
        added |= {ASKED: drawn(conditional, asked, how.grading.halvings, seed)}
    sets = {}
    for name, more in added.items():
        names = [rows[i] for i in sources[: len(more)]]
        scans = [
            {"scan": row["scan"], "patient": row["patient"], "volume": i, "given": int(row["grade"])}
            for i, row in enumerate([*rows, *names])
        ]
        sets[name] = Stacks(np.concatenate([real, more]), [], data.meta), scans
    return sets


def graded_by(sets: dict, data: Stacks, tested: list[dict], how: Augmentation, state, *, seed: int, say):
    """Expected grades {set: (seeds, scans)} of scans `tested` by networks trained on each set with each seed."""
    unseen = halved(data, how.grading.halvings)
    found = {}
    for name, (volumes, scans) in sets.items():
        # Of what is learned from: generated volumes change with the encoder's weights as well as the generator's
        identity = fingerprint(how, hashlib.sha256(volumes.volumes.tobytes()).hexdigest(), scans, grading.CODE)
        expected = []
        for own in range(seed, seed + how.seeds):
            folder = state / f"{name}, seed {own}".replace(" ", "-")
            net = grading.train_network(how.grading, volumes, scans, folder, "augmentation", identity, own, say)
            chances = [
                grading.exceedance_probabilities(net, unseen.volumes[scan["volume"]], how.grading.depth)
                for scan in tested
            ]
            expected.append([1 + float(chance.sum()) for chance in chances])
        found[name] = np.array(expected)
    return found


def compared(expected: dict[str, np.ndarray], tested: list[dict], *, seed: int, draws: int) -> list[dict]:
    """How far grades (seeds, scans) of every set are from those given, the mean over seeds, and what a set changes of
    the first: a row each, with intervals by patient."""
    truth, patients = np.array([scan["given"] for scan in tested]), [scan["patient"] for scan in tested]
    errors = {name: np.abs(values - truth).mean(0) for name, values in expected.items()}
    rows = []
    for name, values in expected.items():
        rounded = np.rint(values).clip(GRADES[0], GRADES[-1])

        def balanced(i, rounded=rounded):
            right = rounded[:, i] == truth[i]
            return np.mean([right[:, truth[i] == grade].mean() for grade in np.unique(truth[i])])

        how = dict(rng=numpy_rng(seed, "augmentation", name), draws=draws)
        measures = {ERROR: patient_mean(errors[name], patients, **how)}
        measures[BALANCED] = patient_interval(balanced, patients, **how)
        if name != SCANS:
            measures[f"change of {ERROR}"] = patient_mean(errors[name] - errors[SCANS], patients, **how)
        spread = float(np.abs(values - truth).mean(1).std(ddof=1)) if len(values) > 1 else None
        rows += [
            {"trained on": name, "": measure}
            | found._asdict()
            | {"SD over seeds": spread if measure == ERROR else None}
            for measure, found in measures.items()
        ]
    return rows


def said(table: list[dict]) -> list[str]:
    """What `compared` shows of each set with generated bones, in words."""
    changes = [row for row in table if row[""] == f"change of {ERROR}"]
    return [
        "{trained on}: the error changes by {value:+.2f} grades ({low:+.2f} to {high:+.2f}): ".format(**row)
        + ("more is missed" if row["low"] > 0 else "less is missed" if row["high"] < 0 else "no effect is shown")
        for row in changes
    ]
