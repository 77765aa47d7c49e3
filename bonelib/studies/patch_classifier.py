"""What gives samples away: a classifier of fixed budget learns to tell patches of generated volumes from real ones.

A classifier two-sample test (Lopez-Paz and Oquab 2017) at full resolution. Its accuracy on patients and samples that it
did not learn from is .5 where nothing tells them apart, and the patches it is surest of show what does.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonelib import InputError
from bonelib.core.random import numpy_rng, torch_rng
from bonelib.evaluation.statistics import Interval, patient_interval
from bonelib.scans.dataset import Stacks
from bonelib.studies.config import Quality

SIZE = 64  # voxels a side, in plane; a coronal patch is as high as the volume, at most
BONE = 0.31  # mean intensity of a patch that shows bone
TRIES = 20  # for one of these; the last one is taken as it is
WIDTHS = (24, 48, 96)
BATCH = 32  # of either kind
RATE = 2e-3
TESTED = 24  # patches of a volume, half of them coronal
FEWEST = 4  # patients, or samples


class Found(NamedTuple):
    """Accuracy on unseen volumes with its interval, and the patches of `fake` it is surest of, surest first."""

    accuracy: Interval
    surest: np.ndarray  # (n, y, x), axial ones


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)]
        )
        self.norms = nn.ModuleList([nn.GroupNorm(8, outputs), nn.GroupNorm(8, outputs)])
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.convs[0](x)))
        return F.relu(self.shortcut(x) + self.norms[1](self.convs[1](y)))


class Classifier(nn.Module):
    """Logits (n,) of patches (n, 3, rows, columns) of any size being generated; the channels are adjacent slices."""

    def __init__(self, widths=WIDTHS):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1)
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.blocks = nn.Sequential(*(_Block(i, o, 1 if k == 0 else 2) for k, (i, o) in enumerate(pairs)))
        self.out = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(F.relu(self.stem(4 * (x - 0.35)))).mean((2, 3)))[:, 0]


def patch(volume: np.ndarray, plane: str, rng: np.random.Generator) -> np.ndarray:
    """One patch (3, rows, columns) with bone in it of a volume (z, y, x) in [0, 1], "axial" or "coronal"."""
    volume = volume if plane == "axial" else volume.transpose(1, 0, 2)
    shape = (3, *(min(SIZE, n) for n in volume.shape[1:]))
    for _ in range(TRIES):
        corner = [rng.integers(have - n + 1) for have, n in zip(volume.shape, shape, strict=True)]
        found = volume[tuple(slice(c, c + n) for c, n in zip(corner, shape, strict=True))]
        if found.mean() > BONE:
            break
    return np.ascontiguousarray(found, np.float32)


def classify(
    real: np.ndarray, patients: list[str], fake: np.ndarray, *, updates: int, seed: int, draws: int = 500
) -> Found:
    """Train the classifier for `updates` on half of the patients of `real` and half of `fake`; test it on the rest.

    Volumes are (n, z, y, x) in [0, 1]. The accuracy is the mean of both kinds, by patient and by sample. Raises
    `InputError` for fewer than `FEWEST` patients or samples.
    """
    names = sorted(set(patients))
    if min(len(names), len(fake)) < FEWEST:
        raise InputError(f"{len(names)} patients and {len(fake)} samples: at least {FEWEST} of each are needed")
    order = numpy_rng(seed, "classifier split").permutation(len(names))
    learned = {names[i] for i in order[: len(names) // 2]}
    inside = [i for i, name in enumerate(patients) if name in learned]
    outside = [i for i, name in enumerate(patients) if name not in learned]
    half = len(fake) // 2
    torch.manual_seed(torch_rng(seed, "classifier weights").initial_seed())
    network = Classifier()
    adam = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.05)
    for update in range(updates):
        adam.param_groups[0]["lr"] = RATE * min(1.0, (update + 1) / 50) * (1 - update / updates)
        rng, plane = numpy_rng(seed, "classifier batch", update), ("axial", "coronal")[update % 2]
        parts = [patch(real[inside[rng.integers(len(inside))]], plane, rng) for _ in range(BATCH)]
        parts += [patch(fake[rng.integers(half)], plane, rng) for _ in range(BATCH)]
        x = torch.from_numpy(np.stack(parts))
        x = x.flip(3) if rng.random() < 0.5 else x
        wanted = torch.cat([torch.zeros(BATCH), torch.ones(BATCH)])
        loss = F.binary_cross_entropy_with_logits(network(x), wanted)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
    network.eval()
    scores = [_scores(network, real[i], seed, "real", i)[0] for i in outside]
    results = [_scores(network, fake[i], seed, "fake", i) for i in range(half, len(fake))]
    right_real = np.array([(s < 0).mean() for s in scores])
    right_fake = np.array([(s > 0).mean() for s, _ in results])
    accuracy = patient_interval(
        lambda a, b: (right_real[a].mean() + right_fake[b].mean()) / 2,
        [patients[i] for i in outside],
        list(range(len(right_fake))),
        rng=numpy_rng(seed, "classifier interval"),
        draws=draws,
    )
    every, seen = np.concatenate([s[::2] for s, _ in results]), np.concatenate([p[::2] for _, p in results])
    return Found(accuracy, np.stack([p[1] for p in seen[np.argsort(-every)]]) if len(seen) else seen)


def _scores(network, volume, seed, kind, number):
    """Logits of patches of a volume, axial and coronal in turn, and the axial patches at their places."""
    rng, logits, shown = numpy_rng(seed, "classifier test", kind, int(number)), [], []
    with torch.no_grad():
        for i in range(TESTED):
            found = patch(volume, ("axial", "coronal")[i % 2], rng)
            logits.append(float(network(torch.from_numpy(found)[None])))
            shown.append(found if i % 2 == 0 else shown[-1])
    return np.array(logits), np.stack(shown)


def compare_stacks(data: Stacks, groups: dict[str, np.ndarray], how: Quality, *, seed: int):
    """`compare` groups of generated volumes with one stack of each of `how.classified` patients, by `how`; nothing
    where it asks for no classifier."""
    if how.classifier is None:
        return [], {}
    one = {row["patient"]: row for row in (*data.of("train"), *data.of("held-out"))}
    owners = sorted(one)[:: max(1, len(one) // how.classified)]
    real = data.pooled([one[name] for name in owners], 0)[:, 0].numpy()
    return compare(real, owners, groups, updates=how.classifier, seed=seed, draws=how.draws)


def compare(
    real: np.ndarray, patients: list[str], groups: dict[str, np.ndarray], *, updates: int, seed: int, draws: int = 500
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """`classify` for every group of generated volumes, and for real volumes against those of other patients: one row a
    comparison, and the surest patches of each group. What has too few patients is left out."""
    names = sorted(set(patients))
    first = [i for i, name in enumerate(patients) if name in set(names[::2])]
    second = [i for i, name in enumerate(patients) if name not in set(names[::2])]
    pairs = {name: (range(len(patients)), volumes) for name, volumes in groups.items()}
    pairs["real against real"] = (first, real[second])
    rows, surest = [], {}
    for name, (index, volumes) in pairs.items():
        owners = [patients[i] for i in index]
        if min(len(set(owners)), len(volumes)) >= FEWEST:
            found = classify(real[list(index)], owners, volumes, updates=updates, seed=seed, draws=draws)
            rows.append({"setting": name} | found.accuracy._asdict())
            surest |= {name: found.surest} if name in groups else {}
    return rows, surest
