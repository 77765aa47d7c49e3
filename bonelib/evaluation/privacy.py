"""The privacy audit: can an attacker tell whose bones a model was trained on, and does it repeat them?

Every attack gives each real stack a score that should be high for members, the stacks of patients in the training
set; patients count, not stacks, and a patient's score is that of the best stack. An attack is believed only beside
its controls: members against members must come to nothing, and a planted leak must be caught.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from bonelib import InputError
from bonelib.evaluation import features
from bonelib.evaluation.metrics import auc, tpr_at
from bonelib.networks import build_critic
from bonelib.networks.critic import Critic
from bonelib.params import Train, section
from bonelib.pyramid import downsample
from bonelib.randomness import numpy_rng, torch_rng

FPR = 0.01
CAUGHT = 0.9  # AUC that a planted leak must reach
TOLERATED = 0.05  # true positives at `FPR` above which weights are not released
LEVEL = 0.95
SHIFT = 3  # voxels in plane over which two bones are registered
COPY_NOISE = 0.005  # of the intensities, on a planted copy
RATE = 0.05  # of the inversion
OVERTRAINING = 600  # updates of the critic that is made to know its patients


def by_patient(scores: np.ndarray, patients) -> np.ndarray:
    """The highest score of each patient: any of the stacks may give a patient away."""
    names, index = np.unique(np.asarray(patients), return_inverse=True)
    best = np.full(len(names), -np.inf)
    np.maximum.at(best, index, scores)
    return best


def attack(members: np.ndarray, others: np.ndarray, *, seed: int, draws: int, level: float = LEVEL) -> dict:
    """How well scores of patients tell `members` from `others`: AUC and true positives at 1 % false ones.

    With intervals by resampled patients. Of fewer than a hundred others 1 % is none: true positives are then the
    members above all others, of which there are 1 / (n + 1) by chance.
    """
    rng, values = numpy_rng(seed, "attack interval"), []
    for _ in range(draws):
        m, o = (s[rng.integers(len(s), size=len(s))] for s in (members, others))
        values.append((auc(m, o), tpr_at(m, o, FPR)))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    found = {"AUC": auc(members, others), "AUC low": float(low[0]), "AUC high": float(high[0])}
    found |= {"TPR": tpr_at(members, others, FPR), "TPR low": float(low[1]), "TPR high": float(high[1])}
    return found | dict(n_members=len(members), n_others=len(others))


def nearness(real: np.ndarray, fake: np.ndarray) -> np.ndarray:
    """Minus the distance of every real sample (n, d) to the nearest drawn one (m, d), features of mean 0 and SD 1."""
    mean, sd = real.mean(axis=0), real.std(axis=0) + 1e-9
    real, fake = (real - mean) / sd, (fake - mean) / sd
    return -np.sqrt(np.maximum([((fake - row) ** 2).sum(axis=1).min() for row in real], 0))


def likeness(real: np.ndarray, fake: np.ndarray) -> np.ndarray:
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


def reconstruction(generator, volumes: torch.Tensor, stage: int, seed: int, steps: int) -> np.ndarray:
    """Minus the root mean squared error (n,) at which the generator can be made to draw volumes (n, 1, z, y, x).

    Styles are fitted by `steps` of Adam, starting from the mean of drawn ones, without noise inputs and at `stage`,
    whose grid the volumes have: what was memorised is met more closely.
    """
    mean = generator.to_styles(generator.sample_latent(256, torch_rng(seed, "reconstruction"))).mean(0, keepdim=True)
    found = []
    for part in volumes.float().split(16):
        styles = mean.detach().repeat(len(part), *[1] * (mean.ndim - 1)).requires_grad_(True)
        adam = torch.optim.Adam([styles], lr=RATE)
        for step in range(steps + 1):
            error = (generator.synthesize(styles, stage) - part).square().mean(dim=(1, 2, 3, 4))
            if step < steps:
                adam.zero_grad()
                error.sum().backward()
                adam.step()
        found.append(error.detach().sqrt().numpy())
    return -np.concatenate(found).astype(float)


def copies(volumes: np.ndarray, seed: int) -> np.ndarray:
    """A sampler that leaks: its volumes (n, z, y, x) in [0, 1], each with fresh noise and moved by up to two voxels."""
    out = []
    for i, volume in enumerate(volumes):
        rng = numpy_rng(seed, "copies", i)
        moved = np.roll(volume, tuple(rng.integers(-2, 3, 2)), (1, 2)).astype(np.float32)
        out.append((moved + COPY_NOISE * rng.standard_normal(volume.shape, np.float32)).clip(0, 1).astype(volume.dtype))
    return np.stack(out)


class Memory:
    """A generator that knows its training volumes (n, 1, z, y, x) by heart: all that lies between them, and no more."""

    def __init__(self, volumes: torch.Tensor):
        flat = volumes.float().flatten(1)
        self.mean, self.shape = flat.mean(0), volumes.shape[1:]
        self.basis = torch.linalg.svd(flat - self.mean, full_matrices=False).Vh[: len(volumes) - 1]

    def errors(self, volumes: torch.Tensor) -> np.ndarray:
        """The root mean squared error (n,) of the closest volumes that it can draw."""
        rest = volumes.float().flatten(1) - self.mean
        return (rest - rest @ self.basis.T @ self.basis).square().mean(1).sqrt().numpy().astype(float)


def overtrained(critic: Critic, build, known: torch.Tensor, strange: torch.Tensor, seed: int) -> Critic:
    """A critic that was trained far too long: a copy that scores the volumes `known` above the real ones `strange`.

    `build` makes an empty critic of the same kind.
    """
    own = build()
    own.load_state_dict(critic.state_dict())
    own.requires_grad_(True)
    adam = torch.optim.Adam(own.parameters(), lr=1e-3)
    rng = torch_rng(seed, "overtrained")
    for _ in range(OVERTRAINING):
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


def examine(model, data, members: list[dict], others: list[dict], samples, extractors, *, how, seed: int, cache=None):
    """The scores of every attack on a model, and of its planted leak: two dictionaries as `audit` wants them.

    `members` and `others` are rows of `data` (`scans.dataset.Stacks`), `samples` the model's volumes (m, z, y, x) on
    the same grid, `extractors` {family: volumes -> features}, `how` a section `Privacy`. The leak is planted with the
    first `how.planted` members: a sampler of copies, a generator that knows them by heart, an overtrained critic.
    """
    groups = {"members": members, "others": others}
    volumes = {name: data.pooled(rows, 0)[:, 0].numpy() for name, rows in groups.items()}
    patients = {name: [row["patient"] for row in rows] for name, rows in groups.items()}
    leaked = set(list(dict.fromkeys(patients["members"]))[: how.planted])
    known = np.array([patient in leaked for patient in patients["members"]])
    fake = {"scores": samples, "planted": copies(volumes["members"][known], seed)}
    scores, planted = {}, {}

    def compare(name, score):
        """`score` of (group, which fakes) -> a score a stack."""
        scores[name] = tuple(by_patient(score(group, "scores"), patients[group]) for group in groups)
        of_known = score("members", "planted")[known]
        names = np.asarray(patients["members"])[known]
        planted[name] = by_patient(of_known, names), by_patient(score("others", "planted"), patients["others"])

    for family, extract in extractors.items():
        real = {group: features.cached(family, extract, v, cache) for group, v in volumes.items()}
        drawn = {kind: features.cached(family, extract, v, cache) for kind, v in fake.items()}
        both, first = np.concatenate(list(real.values())), len(real["members"])
        near = {kind: nearness(both, f) for kind, f in drawn.items()}
        parts = {kind: {"members": n[:first], "others": n[first:]} for kind, n in near.items()}
        compare(f"nearest sample, {family}", lambda group, kind, parts=parts: parts[kind][group])
    coarse = {group: data.pooled(rows, how.halvings)[:, 0].numpy() for group, rows in groups.items()}
    small = {kind: _pooled(v, how.halvings)[:, 0].numpy() for kind, v in fake.items()}
    compare("nearest sample, registered voxels", lambda group, kind: likeness(coarse[group], small[kind]))

    params = section(Train, model.config["train"], "train")
    stage = len(params.schedule.samples)
    halvings = int(np.log2(volumes["members"].shape[1])) - stage - params.haar
    own = {group: _pooled(v, halvings) for group, v in volumes.items()}
    in_leak = torch.from_numpy(known)
    memory = Memory(own["members"][in_leak])
    errors = {
        "scores": lambda group: reconstruction(model.generator, own[group], stage, seed, how.steps),
        "planted": lambda group: -memory.errors(own[group]),
    }
    compare("reconstruction", lambda group, kind: errors[kind](group))
    build = partial(build_critic, params.critic, haar=params.haar, precision=params.precision)
    knows = overtrained(model.critic, build, own["members"][in_leak], own["members"][~in_leak], seed)
    critics = {"scores": model.critic, "planted": knows}
    compare("critic", lambda group, kind: critic_scores(critics[kind], own[group]))
    return scores, planted


def _pooled(volumes, halvings):
    parts = []
    for volume in volumes:
        x = torch.from_numpy(np.asarray(volume, np.float32))[None, None]
        for _ in range(halvings):
            x = downsample(x)
        parts.append(x)
    return torch.cat(parts)


def audit(scores: dict[str, tuple], planted: dict[str, tuple], *, seed: int, draws: int) -> list[dict]:
    """The table of the audit: one row an attack, with both of its controls.

    `scores` and `planted` are {attack: (scores of members, of others)}, a score a patient. `negative holds` if members
    against members have an AUC whose interval, at a level for all attacks together, holds 0.5; `positive holds` if the
    planted leak is caught with an AUC of at least 0.9; `leaks` if the interval of the true positives lies above
    what is tolerated, or of what is reached by chance where that is more.
    """
    rows = []
    for name, (members, others) in scores.items():
        found = attack(members, others, seed=seed, draws=draws)
        none = attack(*halves(members, seed), seed=seed, draws=draws, level=1 - (1 - LEVEL) / len(scores))
        leak = attack(*planted[name], seed=seed, draws=draws)
        control = {f"negative {key}": none[key] for key in ("AUC", "AUC low", "AUC high")}
        control |= {f"planted {key}": leak[key] for key in ("AUC", "AUC low", "AUC high", "n_members")}
        control |= {"negative holds": none["AUC low"] <= 0.5 <= none["AUC high"]}
        control |= {"positive holds": leak["AUC"] >= CAUGHT}
        bound = max(TOLERATED, 1 / (len(others) + 1))
        rows.append({"attack": name} | found | control | {"leaks": found["TPR low"] > bound})
    return rows


def verdict(rows: list[dict]) -> str:
    """ "released", "blocked", or "audit failed": a leak blocks, and no control may be missed."""
    if not all(row["negative holds"] and row["positive holds"] for row in rows):
        return "audit failed"
    return "blocked" if any(row["leaks"] for row in rows) else "released"


def require_release(values: dict, model: str) -> None:
    """The gate before weights are published, with the audit's metrics `values`. Raises `InputError` if it is shut."""
    found = values.get(f"{model}.verdict", "not audited")
    if found != "released":
        raise InputError(f"{model}: the privacy audit says {found!r}; weights are published only if it says 'released'")


def page(rows: list[dict], model: str, samples: int) -> str:
    """One page for a data-protection officer, in Markdown: the verdict, the evidence, the limits."""
    says = {
        "released": "No attack tells the patients of the training set from others beyond what is tolerated, and the "
        "audit was able to find a leak where one was planted. The weights may be released.",
        "blocked": "At least one attack recognises patients of the training set. The weights must not be released.",
        "audit failed": "A control was missed, so that the audit proves nothing, neither safety nor a leak. The "
        "weights must not be released on its strength.",
    }[verdict(rows)]
    n_members, n_others = rows[0]["n_members"], rows[0]["n_others"]
    lines = [
        f"## Verdict on {model}: {verdict(rows)}",
        says,
        "## Evidence",
        f"{samples} samples of the model, {n_members} patients it was trained on, {n_others} it never saw. Each attack "
        "tries to tell the two groups apart; 0.5 is a coin, 1 is certainty. In brackets the 95 % interval. The columns "
        "on the right show that the attack finds nothing where nothing is (members against members, near 0.5) and "
        f"finds a leak that was planted (at least {CAUGHT:g}).",
    ]
    table = [
        "| attack | AUC | recognised at 1 % false alarms | nothing there | planted leak |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['AUC']:.2f} [{row['AUC low']:.2f}, {row['AUC high']:.2f}]"]
        cells += [f"{row['TPR']:.0%} [{row['TPR low']:.0%}, {row['TPR high']:.0%}]"]
        cells += [f"{row['negative AUC']:.2f}{'' if row['negative holds'] else ' MISSED'}"]
        cells += [f"{row['planted AUC']:.2f}{'' if row['positive holds'] else ' MISSED'}"]
        table.append(f"| {row['attack']} | " + " | ".join(cells) + " |")
    limits = [
        "## Limits",
        f"With {n_others} patients outside of the training set, 1 % of false alarms cannot be told from none: by "
        f"chance alone {1 / (n_others + 1):.0%} of the members score above all of them. The audit is of the attacks "
        "named above and of no others; a stronger one may exist. Attributes of a person that are not in the image are "
        "not looked at. A distance to the nearest sample alone is no proof of privacy. Models trained on synthetic "
        "phantoms, as in the default profiles, hold no patients at all: here the audit shows that it works.",
    ]
    return "\n\n".join([*lines, "\n".join(table), *limits])
