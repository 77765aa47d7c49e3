"""The privacy audit: can an attacker tell whose bones a model was trained on, and does it repeat them?

Every attack gives each real stack a score that should be high for members, the stacks of patients in the training
set; patients count, not stacks, and a patient's score is that of the best stack. An attack counts only with
its controls: members against members must come to nothing, and a planted leak must be caught. What the same attack
finds with strangers' bones in place of the model's says how far the two groups differ by themselves.
"""

import copy

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.spatial.distance import cdist

from bonelib.core.pyramid import downsample
from bonelib.core.random import numpy_rng, torch_rng
from bonelib.evaluation import features
from bonelib.evaluation.features import standardised
from bonelib.evaluation.statistics import auc, of_rows, patient_interval, tpr_at
from bonelib.networks.critic import Critic
from bonelib.networks.encoder import trunk

FPR = 0.01
CAUGHT = 0.9  # AUC that a planted leak must reach
LEVEL = 0.95
SHIFT = 3  # voxels in plane over which two bones are registered
PHANTOM = "bonelib/scans/phantom/cohort.py"  # as `cohort.source`: such a cohort holds no person


def by_patient(scores: np.ndarray, patients) -> np.ndarray:
    """The highest score of each patient: any of the stacks may give a patient away."""
    return pd.Series(scores).groupby(np.asarray(patients)).max().to_numpy()


def attack(members: np.ndarray, others: np.ndarray, *, seed: int, draws: int, level: float = LEVEL) -> dict:
    """How well scores of patients tell `members` from `others`: AUC and true positives (TPR) at 1 % false ones.

    With intervals by resampled patients, and `by chance`, the probability of as many true positives if nobody could be
    told apart (`chance`). Of fewer than a hundred others 1 % is none: true positives are then the members above all
    others. The highest of few others is a matter of luck that resampling underrates: the interval of the TPR then lies
    too high, and `by chance` is what counts.
    """
    rates = of_rows(lambda a, b: (auc(a, b), tpr_at(a, b, FPR)), members, others)
    groups = range(len(members)), range(len(others))
    found = patient_interval(rates, *groups, rng=numpy_rng(seed, "attack interval"), draws=draws, level=level)
    counts = {"by chance": chance(members, others), "n_members": len(members), "n_others": len(others)}
    return found.columns("AUC", "TPR") | counts


def chance(members: np.ndarray, others: np.ndarray) -> float:
    """Probability of at least as many true positives at 1 % false ones where both groups are of one distribution.

    These and the false alarms allowed are then the top of a random order of all patients, of whom the number of others
    is hypergeometric: an exact test.
    """
    found, allowed = round(tpr_at(members, others, FPR) * len(members)), int(FPR * len(others))
    n = len(members) + len(others)
    return float(stats.hypergeom.cdf(allowed, n, len(others), found + allowed))


def nn_score(real: np.ndarray, fake: np.ndarray) -> np.ndarray:
    """Minus the distance of every real sample (n, d) to the nearest drawn one (m, d), features of mean 0 and SD 1."""
    return -cdist(*standardised(real, fake)).min(axis=1)


def max_ncc(real: np.ndarray, fake: np.ndarray) -> np.ndarray:
    """The highest correlation of every real volume (n, z, y, x) with a drawn one, best over shifts in plane."""

    def spectra(volumes):
        x = torch.as_tensor(np.asarray(volumes, np.float32))
        x = x - x.mean(dim=(1, 2, 3), keepdim=True)
        x = x / torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True).clamp(min=1e-9)
        return torch.fft.rfft2(F.pad(x, (0, SHIFT, 0, SHIFT)))

    drawn, size = spectra(fake), (real.shape[2] + SHIFT, real.shape[3] + SHIFT)
    best = []
    for one in spectra(real):
        found = torch.fft.irfft2((drawn * one.conj()).sum(dim=1), s=size)
        best.append(max(float(found.roll((SHIFT, SHIFT), (1, 2))[:, : 2 * SHIFT + 1, : 2 * SHIFT + 1].max()), -1.0))
    return np.array(best)


def critic_scores(critic: Critic, volumes: torch.Tensor) -> np.ndarray:
    """The critic's score (n,) of volumes (n, 1, z, y, x) on its grid: training raises it for what was trained on."""
    with torch.inference_mode():
        return np.concatenate([critic(part.float()).numpy() for part in volumes.split(16)]).astype(float)


def reconstruction(generator, volumes: torch.Tensor, stage: int, seed: int, steps: int, rate: float) -> np.ndarray:
    """Minus the root mean squared error (n,) at which the generator can be made to draw volumes (n, 1, z, y, x) of the
    grid of `stage`: what was memorised is met more closely. Styles are fitted by Adam, from the mean of drawn ones and
    without noise inputs."""
    mean = generator.to_styles(generator.sample_latent(256, torch_rng(seed, "reconstruction"))).mean(0, keepdim=True)
    found = []
    for part in volumes.float().split(16):
        styles = mean.detach().repeat(len(part), *[1] * (mean.ndim - 1)).requires_grad_(True)
        adam = torch.optim.Adam([styles], lr=rate)
        for step in range(steps + 1):
            error = (generator.synthesize(styles, stage) - part).square().mean(dim=(1, 2, 3, 4))
            if step < steps:
                adam.zero_grad()
                error.sum().backward()
                adam.step()
        found.append(error.detach().sqrt().numpy())
    return -np.concatenate(found).astype(float)


def copies(volumes: np.ndarray, seed: int, noise: float) -> np.ndarray:
    """A sampler that leaks: its volumes (n, z, y, x) in [0, 1], each moved by up to two voxels, with fresh noise of the
    SD `noise`."""
    out = []
    for i, volume in enumerate(volumes):
        rng = numpy_rng(seed, "copies", i)
        moved = np.roll(volume, tuple(rng.integers(-2, 3, 2)), (1, 2)).astype(np.float32)
        out.append((moved + noise * rng.standard_normal(volume.shape, np.float32)).clip(0, 1).astype(volume.dtype))
    return np.stack(out)


class MemorisingGenerator:
    """A generator that knows its training volumes (n, 1, z, y, x) by heart: all that lies between them, and no more."""

    def __init__(self, volumes: torch.Tensor):
        flat = volumes.float().flatten(1)
        self.mean, self.shape = flat.mean(0), volumes.shape[1:]
        self.basis = torch.linalg.svd(flat - self.mean, full_matrices=False).Vh[: len(volumes) - 1]

    def errors(self, volumes: torch.Tensor) -> np.ndarray:
        """The root mean squared error (n,) of the closest volumes that it can draw."""
        rest = volumes.float().flatten(1) - self.mean
        return (rest - rest @ self.basis.T @ self.basis).square().mean(1).sqrt().numpy().astype(float)


def overtrained(critic: Critic, known: torch.Tensor, strange: torch.Tensor, seed: int, updates: int) -> Critic:
    """A critic that was trained `updates` too long: a copy that scores volumes `known` above real ones `strange`."""
    own = copy.deepcopy(critic).requires_grad_(True).train()
    adam = torch.optim.Adam(own.parameters(), lr=1e-3)
    rng = torch_rng(seed, "overtrained")
    for _ in range(updates):
        a, b = (v[torch.randperm(len(v), generator=rng)[:8]].float() for v in (known, strange))
        gap = own(a)[:, None] - own(b)[None]
        adam.zero_grad()
        F.softplus(-gap).mean().backward()
        adam.step()
    return own.requires_grad_(False)


def halves(scores: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of members, dealt at random into two groups: nothing may tell them apart."""
    order = numpy_rng(seed, "member halves").permutation(len(scores))
    return scores[order[::2]], scores[order[1::2]]


def examine(
    model,
    data,
    members: list[dict],
    others: list[dict],
    strangers: list[dict],
    samples,
    extractors,
    *,
    how,
    seed,
    cache,
) -> dict[str, dict[str, tuple]]:
    """The scores of every attack on a model, and of its controls that need scores of their own.

    Returns {"scores", "planted", "strangers"}, each {attack: (scores of members, of others)}, a score a patient; the
    critic has no strangers, and no attack has if none are given. `members`, `others` and `strangers` are rows of `data`
    (`scans.dataset.Stacks`), `samples` the model's volumes (m, z, y, x) on the same grid, `extractors` {family: volumes
    -> features}, `how` a section `Privacy`. The leak is planted with the first `how.planted` members: a sampler of
    copies, a generator that memorised them, an overtrained critic. Strangers are in neither group: their bones stand
    for samples, and a generator that memorised them for the model's.
    """
    groups = {"members": members, "others": others}
    volumes = {name: data.pooled(rows, 0)[:, 0].numpy() for name, rows in groups.items()}
    patients = {name: np.array([row["patient"] for row in rows]) for name, rows in groups.items()}
    known = np.isin(patients["members"], list(dict.fromkeys(patients["members"]))[: how.planted])
    fake = {"scores": samples, "planted": copies(volumes["members"][known], seed, how.copy_noise)}
    if strangers:
        fake["strangers"] = data.pooled(strangers, 0)[:, 0].numpy()
    found = {
        f"nearest sample, {family}": _nearest(family, extract, volumes, fake, cache)
        for family, extract in extractors.items()
    }
    coarse = {name: data.pooled(rows, how.halvings)[:, 0].numpy() for name, rows in groups.items()}
    small = {kind: _pooled(v, how.halvings)[:, 0].numpy() for kind, v in fake.items()}
    found["nearest sample, registered voxels"] = {
        kind: {name: max_ncc(v, other) for name, v in coarse.items()} for kind, other in small.items()
    }
    found |= _of_networks(model, volumes, fake, known, how, seed)
    out = {kind: {} for kind in ("scores", "planted", "strangers")}
    for attack, by_kind in found.items():
        for kind, scores in by_kind.items():
            kept = known if kind == "planted" else np.ones(len(known), bool)
            mine = by_patient(scores["members"][kept], patients["members"][kept])
            out[kind][attack] = mine, by_patient(scores["others"], patients["others"])
    return out


def _nearest(family, extract, volumes, fake, cache):
    """By kind of fake and group, minus the distance of every stack to the nearest fake, in features."""
    real = {name: features.cached(family, extract, v, cache) for name, v in volumes.items()}
    both, first = np.concatenate(list(real.values())), len(real["members"])
    near = {kind: nn_score(both, features.cached(family, extract, v, cache)) for kind, v in fake.items()}
    return {kind: {"members": scores[:first], "others": scores[first:]} for kind, scores in near.items()}


def _of_networks(model, volumes, fake, known, how, seed):
    """The attacks on the generator (reconstruction) and on the critic, by kind of control and group."""
    stage, halvings = trunk(model.generator).stages, int(np.log2(volumes["members"].shape[1] / model.how.slices))
    own = {name: _pooled(v, halvings) for name, v in volumes.items()}
    leaked, rest = own["members"][torch.from_numpy(known)], own["members"][torch.from_numpy(~known)]
    memories = {"planted": MemorisingGenerator(leaked)}
    if "strangers" in fake:
        memories["strangers"] = MemorisingGenerator(_pooled(fake["strangers"], halvings))
    fitted = {name: reconstruction(model.generator, v, stage, seed, how.steps, how.rate) for name, v in own.items()}
    fits = {"scores": fitted}
    fits |= {kind: {name: -memory.errors(v) for name, v in own.items()} for kind, memory in memories.items()}
    too_long = overtrained(model.critic, leaked, rest, seed, how.overtraining)
    critics = {"scores": model.critic, "planted": too_long}
    judged = {kind: {name: critic_scores(critic, v) for name, v in own.items()} for kind, critic in critics.items()}
    return {"reconstruction": fits, "critic": judged}


def _pooled(volumes, halvings):
    parts = []
    for volume in volumes:  # all of them at full size would not fit into memory
        x = torch.from_numpy(np.asarray(volume, np.float32))[None, None]
        for _ in range(halvings):
            x = downsample(x)
        parts.append(x)
    return torch.cat(parts)


def audit(found: dict[str, dict[str, tuple]], *, tolerated: float, seed: int, draws: int) -> list[dict]:
    """The table of the audit of what `examine` has `found`: one row an attack, with its controls.

    `negative holds` if members against members have an AUC whose interval, at a level for all attacks together, holds
    0.5; `positive holds` if the planted leak is caught with an AUC of `CAUGHT`. An attack `leaks` if more than
    `tolerated` of the members are true positives at 1 % false ones, and more than chance explains: less probable than
    the one end of the interval. It `can tell` if a share of `tolerated` is more than is expected by chance.
    """
    rows = []
    for name, (members, others) in found["scores"].items():
        row = attack(members, others, seed=seed, draws=draws)
        none = attack(*halves(members, seed), seed=seed, draws=draws, level=1 - (1 - LEVEL) / len(found["scores"]))
        leak = attack(*found["planted"][name], seed=seed, draws=draws)
        control = {f"negative {key}": none[key] for key in ("AUC", "AUC low", "AUC high")}
        control |= {f"planted {key}": leak[key] for key in ("AUC", "AUC low", "AUC high", "n_members")}
        if name in found["strangers"]:
            by_itself = attack(*found["strangers"][name], seed=seed, draws=draws)
            control |= {f"strangers {key}": by_itself[key] for key in ("AUC", "AUC low", "AUC high")}
        control |= {"negative holds": none["AUC low"] <= 0.5 <= none["AUC high"]}
        control |= {"positive holds": leak["AUC"] >= CAUGHT}
        leaks = row["TPR"] > tolerated and row["by chance"] < (1 - LEVEL) / 2
        can_tell = (int(FPR * len(others)) + 1) / (len(others) + 1) <= tolerated
        rows.append({"attack": name} | row | control | {"leaks": leaks, "can tell": can_tell})
    return rows


def verdict(rows: list[dict]) -> str:
    """What the audit says: "released", "blocked", "undecided" or "audit failed".

    No control may be missed, a leak blocks, and with too few others to tell what is tolerated from chance nothing is
    decided.
    """
    if not all(row["negative holds"] and row["positive holds"] for row in rows):
        return "audit failed"
    if any(row["leaks"] for row in rows):
        return "blocked"
    return "released" if all(row["can tell"] for row in rows) else "undecided"


def phantom_only(source: str, trained_on: str, stacks: str) -> bool:
    """Whether a model knows no person: `cohort.source` is the phantom generator, and it was trained on those stacks.

    `trained_on` and `stacks` are the data hashes of the model and of the stacks at hand.
    """
    return source == PHANTOM and trained_on == stacks


def evidence(rows: list[dict]) -> list[dict]:
    """The rows of `audit` as a table to be read: each attack with its intervals and its controls."""
    table = []
    for row in rows:
        line = {"attack": row["attack"]}
        line["AUC"] = f"{row['AUC']:.2f} [{row['AUC low']:.2f}, {row['AUC high']:.2f}]"
        line["recognised at 1 % false alarms"] = f"{row['TPR']:.0%} [{row['TPR low']:.0%}, {row['TPR high']:.0%}]"
        line["by chance"] = f"{row['by chance']:.3f}"
        line["members alone"] = f"{row['negative AUC']:.2f}" + ("" if row["negative holds"] else " MISSED")
        line["non-members"] = f"{row['strangers AUC']:.2f}" if "strangers AUC" in row else "none"
        line["planted leak"] = f"{row['planted AUC']:.2f}" + ("" if row["positive holds"] else " MISSED")
        table.append(line)
    return table


def members_by_chance(rows: list[dict]) -> float:
    """The share of members that score above all others by chance alone, at 1 % false alarms."""
    n = rows[0]["n_others"]
    return (int(FPR * n) + 1) / (n + 1)
