"""Ablation at equal cost: short trainings of variants of one model, equal in CPU time, with several seeds."""

import json
import shutil
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from bonelib.core.config import fingerprint
from bonelib.core.files import write_json
from bonelib.core.parallel import workers
from bonelib.core.random import numpy_rng
from bonelib.evaluation.metrics import frechet_distance, precision_recall
from bonelib.evaluation.statistics import half_interval, of_rows
from bonelib.latent.models import draw, load_model
from bonelib.scans.dataset import Stacks, halved
from bonelib.studies.config import Trials, changed
from bonelib.training.config import HierarchicalTrain, Train, training_section
from bonelib.training.loop import CODE, train

COMPONENTS = 48  # principal components of the training stacks, at most, in which samples are compared with them
PILOT = 34  # steps of the training that tells how long one takes
LEAST_SD = 0.1  # of the first component's SD, to which the others are raised before they scale anything
LEVELS = np.linspace(0.2, 0.6, 41)  # of intensity, at one of which most real cortices are closed
HOLE = 0.06  # of a slice, that a closed cortex encloses at least
OF_TRAININGS = ("sklearn.linear_model", "torch._dynamo")  # else imported by every process anew, in seconds


def run(how: Trials, data: Stacks, folder: str | Path, *, seed: int, say=print) -> tuple[list[dict], dict]:
    """Train every variant with every seed; returns the table, of what `against` says of samples, and {variant: volumes
    of its first seed, (n, z, y, x)}. The row "real" holds one half of the training patients against the other."""
    data = on_grid(how, data)
    reference = data.pooled(data.of("train"), 0)[:, 0].float().numpy()
    patients = [row["patient"] for row in data.of("train")]
    level = ring_level(reference)

    drawn = trials(how, data, folder, seed=seed, say=say)
    rng = numpy_rng(seed, "halves of the patients")
    chosen = np.isin(patients, rng.permutation(sorted(set(patients)))[: len(set(patients)) // 2])
    one, other = reference[~chosen], reference[chosen]
    half = [p for p, c in zip(patients, chosen, strict=True) if not c]
    rows = [{"variant": "real", "seed": seed, **against(one, other, half, level, seed, how.draws)}]
    for (name, own), (row, volumes) in drawn.items():
        found = against(reference, volumes, patients, level, own, how.draws)
        rows.append({"variant": name, "seed": own, **row, **found})
    return rows, {name: volumes for (name, own), (_, volumes) in drawn.items() if own == seed}


def on_grid(how: Trials, data: Stacks) -> Stacks:
    """The stacks on the grid that the generator of `how.base` draws."""
    slices = training_section(how.base, "base").slices
    return halved(data, round(np.log2(data.meta["stack_slices"] / slices)))


def trials(how: Trials, data: Stacks, folder: str | Path, *, seed: int, say=print) -> dict[tuple[str, int], tuple]:
    """Train every variant with every seed: {(variant, seed): (samples and CPU seconds, volumes (n, z, y, x))}.

    A trial trains for `how.seconds` of CPU time on one thread: a short training first tells how many samples that is.
    What is done is not done again by equal code: each trial's model, row and volumes lie in `folder`.
    """
    data, jobs = on_grid(how, data), {}
    with workers(also=OF_TRAININGS) as pool:
        for own, name in product(range(seed, seed + how.seeds), how.variants):
            params = training_section(changed(how.base, how.variants[name]), name)
            place = Path(folder) / fingerprint(params, data.meta["data_hash"], own, how.seconds, how.samples, CODE)
            jobs[name, own] = pool.submit(_trained, params, data, place, own, how.seconds, how.samples)
        done = {}
        for i, (name, own) in enumerate(jobs, 1):
            done[name, own] = jobs[name, own].result()
            say(f"trial {i} of {len(jobs)}: {name}, seed {own}", flush=True)
    return done


def _trained(params: Train | HierarchicalTrain, data: Stacks, place: Path, seed: int, seconds: float, samples: int):
    """One trial: what it took, and the volumes it draws."""
    done = place / "row.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8")), np.load(place / "volumes.npy")
    times = []
    for count in (2, 2, PILOT):  # steps; the difference of the last two leaves out what is done once
        count = min(count, max(3, int(2 * seconds / times[-1]))) if len(times) == 2 else count  # steps may be slow
        begun = time.process_time()
        _train(params, count * params.step, data, place / "pilot", seed)
        times.append(time.process_time() - begun)
    pace = max(times[2] - times[1], 0.1 * times[2]) / (count - 2)
    seen = max(1, round(seconds / pace)) * params.step
    begun = time.process_time()
    _train(params, seen, data, place, seed)
    row = {"samples": seen, "CPU s": time.process_time() - begun}
    volumes = draw(load_model(place), samples, seed).astype(np.float16)
    shutil.rmtree(place / "pilot")
    np.save(place / "volumes.npy", volumes)
    write_json(done, row)
    return row, volumes


def _train(params: Train | HierarchicalTrain, samples: int, data: Stacks, place: Path, seed: int) -> None:
    """Train for `samples` in all."""
    shutil.rmtree(place / "state", ignore_errors=True)
    train(params.lasting(samples), data, place, state=place / "state", seed=seed, say=lambda *_, **__: None)
    shutil.rmtree(place / "state")


def against(real: np.ndarray, fake: np.ndarray, patients: list[str], level: float, seed: int, draws: int) -> dict:
    """What samples (n, z, y, x) are worth beside real stacks (m, z, y, x), the m names of whose patients are given.

    `closed rings`: the share of slices whose cortex closes at `level`. Frechet distance, precision and recall are those
    in principal components of the real stacks, `residual` is how far a volume lies from what these can say (RMS), and
    `relative SD` that over samples at a voxel, over that of the real ones. Intervals are by halves.
    """
    components, mean, scale = _components(real)
    a, b = (((v.reshape(len(v), -1) - mean) @ components.T) / scale for v in (real, fake.astype(np.float32)))
    ring, of_real = closed_rings(fake, level), closed_rings(real, level)
    rng = numpy_rng(seed, "rings")
    closed, low, high, *_ = half_interval(of_rows(np.mean, ring), range(len(ring)), rng=rng, draws=draws)
    rng = numpy_rng(seed, "interval", "trials")
    found = half_interval(of_rows(frechet_distance, a, b), patients, range(len(b)), rng=rng, draws=draws)
    precision, recall = precision_recall(a, b)
    row = {"N": len(fake), "closed rings": closed, "low": low, "high": high}
    row |= {"closed rings, real": float(of_real.mean()), "N real": len(real), "Frechet distance": found.value}
    row |= {"FD low": found.low, "FD high": found.high, "precision": precision, "recall": recall}
    row |= {"residual": _residual(fake, components, mean), "residual, real": _residual(real, components, mean)}
    return row | {"relative SD": float(fake.astype(np.float32).std(0).mean() / real.std(0).mean())}


def over_seeds(rows: list[dict]) -> list[dict]:
    """The table of `run` averaged over seeds, and a last row: the widest difference between seeds of one variant."""
    keys = ["samples", "closed rings", "Frechet distance", "precision", "recall", "residual", "relative SD"]
    groups = pd.DataFrame(rows).groupby("variant", sort=False)
    table = groups[keys].mean()
    table.insert(0, "seeds", groups.size())
    table.loc["widest difference of two seeds"] = (groups[keys].max() - groups[keys].min()).max()
    return table.rename_axis("variant").reset_index().astype(object).fillna("").to_dict("records")


def _components(real):
    flat = real.reshape(len(real), -1).astype(np.float32)
    mean = flat.mean(0)
    _, values, vectors = np.linalg.svd(flat - mean, full_matrices=False)
    count = min(COMPONENTS, len(flat) // 2)
    sd = values[:count] / len(flat) ** 0.5
    return vectors[:count], mean, np.maximum(sd, LEAST_SD * sd[0])


def _residual(volumes, components, mean) -> float:
    flat = volumes.reshape(len(volumes), -1).astype(np.float32) - mean
    return float(np.sqrt(np.mean((flat - flat @ components.T @ components) ** 2)))


def ring_level(real: np.ndarray) -> float:
    """The intensity at which most slices of real stacks show a closed cortex; of several such, the middle one."""
    some = real[:: max(1, len(real) // 64)]
    shares = np.array([closed_rings(some, level).mean() for level in LEVELS])
    return float(np.median(LEVELS[shares == shares.max()]))


def closed_rings(volumes: np.ndarray, level: float) -> np.ndarray:
    """Of each volume (n, z, y, x), the share of its slices in which what lies above `level` encloses a wide hole."""

    def closed(part):
        holes, _ = ndimage.label(ndimage.binary_fill_holes(part) & ~part)
        return np.bincount(holes.ravel())[1:].max(initial=0) >= HOLE * part.size

    return np.array([np.mean([closed(part) for part in volume > level]) for volume in volumes])
