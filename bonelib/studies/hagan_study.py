"""HA-GAN beside what it would be without its parts: sub-volumes' borders, empty slices, memory over size."""

from pathlib import Path

import numpy as np
import torch

from bonelib.core.config import fingerprint
from bonelib.core.parallel import map_large_blocks, peak_memory, workers
from bonelib.core.random import numpy_rng, torch_rng
from bonelib.evaluation.statistics import of_rows, patient_interval
from bonelib.latent.models import Model
from bonelib.networks.config import CriticNet, Generator, ProGANConfig
from bonelib.networks.hagan import Grid
from bonelib.scans.dataset import Stacks
from bonelib.scans.phantom.contrasts import CONTRASTS, draw_slices, grid_over_field, stacks_of
from bonelib.studies import ablation, cost, hagan_cost
from bonelib.studies import image_quality as iq
from bonelib.studies.config import Trials, TwoContrasts
from bonelib.studies.hagan_config import HAGANCost, HAGANStudy

BLANK = "empty slices"  # the trial whose stacks have some
SECOND = CONTRASTS[1]  # the second family of volumes
REAL = "further real stacks"
SHOWN = ("FD", "RBF-MMD", "precision", "recall")
MEASURES = (*SHOWN, "ellipse overlap", "jump")
HALO, ZEROS = "with a halo", "zeros beyond, as published"
EACH = "a million voxels more"


def blanked(data: Stacks, share: float, seed: int) -> Stacks:
    """Every stack with a share of its slices emptied, split at random between its two ends, as scans reach beyond what
    they are of. A stack is a volume of its own then."""
    slices, volumes, rows = data.meta["stack_slices"], [], []
    empty = round(share * slices)
    for i, row in enumerate(data.rows):
        one = np.array(data.volumes[row["volume"], row["start"] : row["start"] + slices])
        first = int(numpy_rng(seed, "empty slices", row["scan"], row["start"]).integers(empty + 1))
        one[:first], one[slices - (empty - first) :] = 0, 0
        volumes.append(one)
        rows.append(row | dict(volume=i, start=0))
    found = fingerprint(data.meta["data_hash"], share, seed)
    return Stacks(np.stack(volumes), rows, data.meta | dict(data_hash=found, shape=[slices, *data.meta["shape"][1:]]))


def trained(how: HAGANStudy, data: Stacks, folder: str | Path, *, seed: int) -> dict[str, tuple[Stacks, dict]]:
    """Stacks and the trials of `ablation.trials` on them: "", as they are; BLANK, of which some slices are empty; and
    SECOND, of another family, which has no mineral."""
    plain = dict(variants={BLANK: how.trials.variants[next(iter(how.trials.variants))]})
    second = dict(variants={SECOND: plain["variants"][BLANK]}, seeds=1, seconds=how.second.seconds)
    women = TwoContrasts.model_fields["women"].default
    drawn = draw_slices(seed, how.second.patients, grid_over_field(*data.volumes.shape[2:]), women)
    kinds = {
        "": (data, {}),
        BLANK: (blanked(data, how.blank, seed), plain),
        SECOND: (stacks_of(drawn, SECOND, data.meta["stack_slices"], how.second.stacks), second),
    }
    return {
        kind: (stacks, ablation.trials(Trials(**how.trials.model_dump() | change), stacks, folder, seed=seed))
        for kind, (stacks, change) in kinds.items()
    }


def compared(data: Stacks, count: int, seed: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Up to `count` stacks of held-out patients, "real", as many of training patients, "other real", (n, z, y, x); and
    the patient of each of the former."""
    volumes, patients = {}, {}
    for name, split in (("real", "held-out"), ("other real", "train")):
        rows = data.of(split)
        rows = [rows[i] for i in sorted(numpy_rng(seed, "compared", split).permutation(len(rows))[:count])]
        volumes[name], patients[name] = data.pooled(rows, 0)[:, 0].float().numpy(), [row["patient"] for row in rows]
    return volumes, patients["real"]


def junction_jump(volumes: np.ndarray, grid: Grid) -> np.ndarray:
    """Of volumes (n, z, y, x), how much neighbouring slices differ where two sub-volumes meet, over how much others
    do, (n,): 1 where borders have left no trace."""
    steps = np.abs(np.diff(volumes.astype(np.float32), axis=1)).mean((2, 3))
    meets = [r * grid.scale - 1 for r in grid.partition()[1:]]
    others = np.setdiff1d(np.arange(steps.shape[1]), meets)
    return steps[:, meets].mean(1) / np.maximum(steps[:, others].mean(1), 1e-9)


@torch.no_grad()
def seams(model: Model, count: int, seed: int) -> list[dict]:
    """How a sub-volume differs from the same part of the whole, at each slice before and behind where two meet: the RMS
    difference over `count` samples over the SD of the voxels, with a halo and with zeros beyond the borders, of the
    same weights."""
    generator, rows = model.generator, {}
    grid, halo, starts = generator.grid, generator.halo, generator.grid.partition()
    depth = grid.depth * grid.scale
    for i in range(count):
        a = generator.features(generator.to_styles(generator.sample_latent(1, torch_rng(seed, "seams", i))))
        whole = generator.draw_high(a)
        for name, generator.halo in ((HALO, True), (ZEROS, False)):
            for r in starts:
                off = (generator.draw_part(a, r) - grid.high(whole, r)).square().mean((0, 1, 3, 4)) / whole.var()
                for z, value in enumerate(off.tolist()):
                    behind = z < depth // 2
                    if r > 0 if behind else r + grid.depth < grid.cells:
                        at = z + 1 if behind else z - depth
                        rows.setdefault(at, {}).setdefault(name, []).append(value)
    generator.halo = halo
    return [
        {"slices from the meeting": at} | {name: float(np.mean(v) ** 0.5) for name, v in rows[at].items()}
        for at in sorted(rows)
    ]


def table(features: dict, patients: list[str], volumes: dict, grid: Grid, *, seed: int, draws: int) -> list[dict]:
    """What samples are worth beside real stacks: a row a set, first that of further real stacks, with intervals.

    `features` is {family: {set: (n, d)}} with "real" and "other real" (see `image_quality.table`), `volumes` {set: (n,
    z, y, x)}. Measures are `SHOWN`, the ellipses' overlap and `junction_jump`.
    """
    (family,) = features
    found = iq.table(features, patients, seed=seed, draws=draws)
    overlap = iq.overlaps(iq.embedded(features[family]), patients, seed=seed, draws=draws)
    rows = {REAL: {}} | {row["setting"]: {} for row in overlap}
    for row in [r for r in found if r["metric"] in SHOWN] + [r | {"metric": "ellipse overlap"} for r in overlap]:
        name, key = row["metric"], row["setting"]
        rows[key] |= {name: row["value"], f"{name} low": row["low"], f"{name} high": row["high"]}
        rows[REAL] |= {name: row["real_against_real"], f"{name} low": None, f"{name} high": None}
    for name, own in rows.items():
        jumps = junction_jump(volumes["other real" if name == REAL else name], grid)
        rng = numpy_rng(seed, "junctions")
        own |= patient_interval(of_rows(np.mean, jumps), range(len(jumps)), rng=rng, draws=draws).columns("jump")
    return [{"set": name} | own for name, own in rows.items()]


def readable(rows: list[dict]) -> list[dict]:
    """The rows of `table` with a measure and its interval in one cell."""

    def cell(row, name):
        ends = [row[f"{name} {end}"] for end in ("low", "high")]
        return f"{row[name]:.3g} " + ("(no interval)" if None in ends else "({:.3g} to {:.3g})".format(*ends))

    others = [key for key in dict.fromkeys(key for row in rows for key in row) if not key.startswith(MEASURES)]
    return [{key: row.get(key, "") for key in others} | {name: cell(row, name) for name in MEASURES} for row in rows]


def over_seeds(rows: list[dict], variants: list[str]) -> list[str]:
    """Sentences on what each variant is worth by its FD, beside the first one: by more than seeds differ, or not.

    `rows` are those of `table`, with variant and seed.
    """
    found = {name: [row["FD"] for row in rows if row["variant"] == name] for name in variants}
    wide, mean, said = max(map(np.ptp, found.values())), {name: np.mean(v) for name, v in found.items()}, []
    plain, *others = variants
    for name in others:
        if len(found[name]) < 2:
            says = "one seed, of which nothing follows"
        elif abs(mean[name] - mean[plain]) <= wide:
            says = f"seeds of one variant differ by up to {wide:.3g}, so that nothing follows"
        else:
            says = f"{'worse' if mean[name] > mean[plain] else 'better'} by more than seeds differ ({wide:.3g})"
        said.append(f"FD of {name}: {mean[name]:.3g}, {plain}: {mean[plain]:.3g}; {says}")
    return said


# Cost over size


def cost_over_size(how: HAGANCost, seed: int) -> list[dict]:
    """An iteration of every generator at every size, each in a process of its own with one thread: voxels of a volume,
    seconds, MB measured above the start, and for HA-GAN what was predicted."""
    rows, largest = [], how.networks or hagan_cost.LARGEST
    for stages in how.stages:
        own = hagan_cost.coarser(largest, stages)
        rows.append(dict(generator="hagan") | hagan_cost.memory_of_an_iteration(own, seed))
        for name, generator in how.generators.items():
            with workers(1) as pool:
                rows.append(pool.submit(_updated, name, generator, how.critic, stages, largest.batch, seed).result())
    return rows


def _updated(name: str, generator: Generator, critic: CriticNet, stage: int, batch: int, seed: int) -> dict:
    """An update of the critic and one of the generator, measured as `hagan_cost.memory_of_an_iteration` does."""
    map_large_blocks()
    once = dict(n_critic=1, rounds=1, seed=seed)
    small = ProGANConfig(widths=(8, 8), latent=8), CriticNet(widths=(8, 8))
    cost.update_times(*small, ("float32",), stage=1, batch=1, **once)
    start = peak_memory()
    (row,) = cost.update_times(generator, critic, ("float32",), stage=stage, batch=batch, **once)
    row = dict(generator=name, voxels=63 << 3 * stage, seconds=row["seconds"])
    return row | {"MB measured": peak_memory() - start}


def slopes(rows: list[dict]) -> list[dict]:
    """MB and seconds that a million voxels more take, of every generator, between its smallest and largest size."""
    found = []
    for name in dict.fromkeys(row["generator"] for row in rows):
        own = sorted((row for row in rows if row["generator"] == name), key=lambda row: row["voxels"])
        first, last = own[0], own[-1]
        millions = (last["voxels"] - first["voxels"]) / 1e6
        more = {key: (last[key] - first[key]) / millions for key in ("MB measured", "seconds")}
        sizes = {"MB at the smallest": first["MB measured"], "MB at the largest": last["MB measured"]}
        found.append({"generator": name, **{f"{key}, {EACH}": value for key, value in more.items()}, **sizes})
    return found


def advantage(found: list[dict]) -> str:
    """Whether the slope of memory over size is HA-GAN's advantage, by `slopes`."""
    mine, *others = (row[f"MB measured, {EACH}"] for row in found)
    told = ", ".join(f"{row['generator']} {value:.0f}" for row, value in zip(found[1:], others, strict=True))
    what = "is" if mine < min(others) else "is not"
    return f"The slope of memory over size {what} HA-GAN's advantage: {mine:.0f} MB {EACH}, {told}."
