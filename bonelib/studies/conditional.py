"""The conditional HA-GAN (Sun et al. 2022, section IV-C): bones of an asked motion grade, or of an asked part of the
cohort by an attribute, and how often an independent reader finds in them what was asked."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bonelib import InputError
from bonelib.core.parallel import workers
from bonelib.core.random import numpy_rng, torch_rng
from bonelib.evaluation.cohort_morphometry import COARSE_MM
from bonelib.evaluation.morphometry import measure_or_none
from bonelib.evaluation.statistics import patient_interval
from bonelib.latent.codes import decode
from bonelib.latent.inversion import halvings
from bonelib.latent.models import Model, calibrated, enlarge, load_model
from bonelib.networks.encoder import trunk
from bonelib.networks.registry import build_critic, build_generator
from bonelib.scans.dataset import Stacks, halved, load_stacks
from bonelib.scans.preprocessing import subsample, to_unit
from bonelib.scans.tables import read_table
from bonelib.scans.volumes import Volume
from bonelib.store import fetch_files
from bonelib.studies.config import Conditional
from bonelib.training import checkpoint, loop
from bonelib.training.config import HierarchicalTrain
from bonelib.training.grading import exceedance_probabilities, load_grader

GRADE = "motion grade"  # of 1 to 5; other classes are equal parts of the training scans by an attribute
CLASSES = 5
EDGES = "classes.json"


def labelled(stacks: Stacks, values: dict[str, float], edges) -> Stacks:
    """The stacks whose scan has one of `values`, each with its `class`: the interval between `edges` that it is in."""
    found = {scan: classes([value], edges)[0] for scan, value in values.items()}
    rows = [row | {"class": found[row["scan"]]} for row in stacks.rows if found.get(row["scan"], -1) >= 0]
    return Stacks(stacks.volumes, rows, stacks.meta)


def values_of(stacks: Stacks, by: str, attributes: str | Path) -> dict[str, float]:
    """What the classes of every scan go by: its grade, or its value in the table `attributes`; NaN where it has none.

    Raises `InputError` where that table has no such attribute.
    """
    if by == GRADE:
        return {row["scan"]: float(row.get("grade") or "nan") for row in stacks.rows}
    table = read_table(attributes)
    if by not in table[0]:
        raise InputError(f"{attributes}: holds no {by}; accepted are {GRADE} and its attributes")
    return {row["scan"]: float(row[by] or "nan") for row in table}


def edges_of(stacks: Stacks, values: dict[str, float], by: str) -> list[float]:
    """The values between classes: between grades, or between fifths of the training scans.

    Raises `InputError` where a class has no training stack.
    """
    scans = sorted({row["scan"] for row in stacks.of("train")})
    known = np.array([values.get(scan, np.nan) for scan in scans])
    edges = np.arange(CLASSES - 1) + 1.5
    if by != GRADE and np.isfinite(known).any():
        edges = np.nanquantile(known, np.arange(1, CLASSES) / CLASSES)
    if missing := sorted(set(range(CLASSES)) - set(classes(known, edges))):
        raise InputError(f"stacks.csv: no training scan has class {missing[0] + 1} of {CLASSES} by {by}")
    return edges.tolist()


def classes(values, edges) -> list[int]:
    """The classes of values (n,), -1 where there is none."""
    return [int(np.searchsorted(edges, v)) if np.isfinite(v) else -1 for v in values]


def conditional(how: HierarchicalTrain, samples: int) -> HierarchicalTrain:
    """The same training for a conditional network, from another one's weights on: of `samples`, without an encoder."""
    generator = how.generator.model_copy(update={"classes": CLASSES})
    return how.model_copy(update=dict(generator=generator, samples=samples, encode=False, snapshots=None))


def widened(model: Model, how: HierarchicalTrain, folder: str | Path, seed: int) -> Path:
    """Write the networks of `model` with inputs and outputs for classes, to start a `conditional` training from.

    The class changes nothing of what is drawn at first: its weights in the generator are zero; those of the classifiers
    in the discriminators are as they are initialised.
    """
    folder = Path(folder)
    torch.manual_seed(torch_rng(seed, "classes").initial_seed())
    generator = build_generator(how.generator, precision=how.precision)
    critic = build_critic(how.critic, generator=how.generator, precision=how.precision)
    torch.nn.init.zeros_(generator.dense.weight)
    pairs = {"generator": (generator, trunk(model.generator)), "critic": (critic, model.critic)}
    for name, (network, known) in pairs.items():
        state = network.state_dict()
        for key, value in known.state_dict().items():
            state[key][tuple(slice(n) for n in value.shape)] = value
        checkpoint.save_tensors(folder / f"{name}.safetensors", state)
    return folder


def train_conditional(
    how: Conditional,
    base: str | Path,
    data: Stacks,
    values: dict[str, float],
    folder: str | Path,
    *,
    state: str | Path,
    seed: int,
) -> None:
    """Train the model of the folder `base` further on stacks `data` with classes by `values`; write it to `folder`.

    Its super-resolution is taken over; without one, stacks are averaged to the grid that the model draws. What lies
    between classes is written to classes.json. Raises `InputError` as `edges_of`.
    """
    base, state, model, edges = Path(base), Path(state), load_model(base), edges_of(data, values, how.by)
    params, data = conditional(model.how, how.samples), labelled(data, values, edges)
    start = widened(model, params, state / "start", seed)
    superres = base if (base / "superres.safetensors").is_file() else None
    if superres is None:
        data = halved(data, halvings(model, data.meta["stack_slices"]))
    loop.train(params, data, folder, state=state / "training", seed=seed, superres=superres, start=start)
    checkpoint.write_json(Path(folder) / EDGES, {"by": how.by, "edges": edges})


def known_edges(folder: str | Path) -> list[float]:
    """What lies between the classes of the conditional model in `folder`."""
    return json.loads((Path(folder) / EDGES).read_text(encoding="utf-8"))["edges"]


def of_grades(folder: str | Path) -> Model | None:
    """The model of motion grades among the conditional ones in `folder`, None where there is none."""
    for path in sorted(Path(folder).glob(f"*/{EDGES}")):
        if json.loads(path.read_text(encoding="utf-8"))["by"] == GRADE:
            return load_model(path.parent)
    return None


def styles_of(model: Model, wanted: list[int], seed: int) -> Tensor:
    """Styles (n, d) of samples of these classes, of the model's truncation; number i depends on (seed, i) alone."""
    own = trunk(model.generator)
    drawn = torch.cat([model.generator.sample_latent(1, torch_rng(seed, "sample", i)) for i in range(len(wanted))])
    drawn[:, own.latent : own.latent + own.classes] = F.one_hot(torch.tensor(wanted), own.classes).to(drawn)
    return model.generator.to_styles(drawn, model.how.generator.truncation)


class Reader(NamedTuple):
    """What tells the class of a bone in mg HA/cm3 of voxels up to `voxel_mm`: the number that `read` finds in it."""

    voxel_mm: float
    read: Callable[[Volume], float]


def reader_of(by: str, grading: str | Path) -> Reader:
    """The grader in the folder `grading` for grades, morphometry for attributes: neither has seen a generated bone."""
    if by != GRADE:
        return Reader(COARSE_MM, partial(_trait, by))
    grader = load_grader(grading)
    return Reader(grader[1]["data"]["spacing_mm"][0], partial(_grade, grader))


def _trait(name: str, bone: Volume) -> float:
    return (measure_or_none(bone, anisotropy=False) or {}).get(name, float("nan"))


def _grade(grader: tuple, bone: Volume) -> float:
    network, config = grader
    voxels = to_unit(bone.voxels, config["data"]["intensity"])
    return 1 + float(exceedance_probabilities(network, voxels, config["grading"]["depth"]).sum())


class Bones(NamedTuple):
    """Bones with the classes (n,) that they should have, and their groups: patients, or each by itself."""

    volumes: list[Volume]
    asked: list[int]
    groups: list[str]

    def of(self, wanted: int) -> list[Volume]:
        """Those that should have a class."""
        return [volume for volume, asked in zip(self.volumes, self.asked, strict=True) if asked == wanted]


def samples(model: Model, reader: Reader, count: int, seed: int) -> Bones:
    """Samples, as many of each class."""
    wanted = [i % CLASSES for i in range(count)]
    codes = styles_of(model, wanted, seed)
    volumes = [decode(model, code, seed + i, reader.voxel_mm) for i, code in enumerate(codes)]
    return Bones(volumes, wanted, [f"sample {i}" for i in range(count)])


def held_out(data: Stacks, reader: Reader, model: Model | None = None, seed: int = 0) -> Bones:
    """The middle stack of every scan that was held out; with a `model`, as its super-resolution draws it of its coarse
    volume, which is all that the generator itself draws."""
    by_scan: dict[str, list[dict]] = {}
    for row in data.of("held-out"):
        by_scan.setdefault(row["scan"], []).append(row)
    rows = [every[len(every) // 2] for _, every in sorted(by_scan.items())]
    times = halvings(model, data.meta["stack_slices"]) if model else 0
    stacks = data.pooled(rows, times)[:, 0].float().numpy()
    if model:
        stacks = enlarge(model.generator.superres, stacks, seed)
    step = int(max(1.0, reader.voxel_mm / min(data.meta["spacing_mm"])))
    volumes = [subsample(calibrated(stack, data.meta), step) for stack in stacks]
    return Bones(volumes, [row["class"] for row in rows], [row["patient"] for row in rows])


class Arm(NamedTuple):
    """A conditional model, its stacks with their classes, the values between classes, and who reads them."""

    model: Model
    stacks: Stacks
    edges: list[float]
    reader: Reader


def _arm(name: str, how: Conditional, base: str | Path, out: str | Path, *, state: str | Path, seed: int) -> Arm:
    """One arm; where its model is not published, it is trained from that in the folder `base`.

    All scans count where classes are grades, those that a generator learns from where they are not. Raises `InputError`
    where there is no grader for grades, or no training scan of a class.
    """
    out, place = Path(out), Path(out) / "conditional" / name
    reader = reader_of(how.by, out / "grading")
    data = load_stacks(out / "stacks", None if how.by == GRADE else out / "grading/grades.csv")
    values = values_of(data, how.by, out / "stacks/attributes.csv")
    if not how.published:
        train_conditional(how, base, data, values, place, state=state, seed=seed)
    edges = known_edges(place)
    return Arm(load_model(place), labelled(data, values, edges), edges, reader)


def arms(
    how: dict[str, Conditional], base: str | Path, out: str | Path, *, state: str | Path, seed: int, say=print
) -> dict[str, Arm]:
    """The arm of each name, its model in the folder `conditional` of `out`; those that the scans do not allow, without
    a grader or a training scan of a class, are left out, and why is said."""
    found = {}
    (Path(out) / "conditional").mkdir(parents=True, exist_ok=True)
    for name, one in how.items():
        if one.published:
            key = f"hagan_uses.conditional.{name}.published"
            fetch_files(f"hagan-{name}", one.published, Path(out) / "conditional" / name, key)
        try:
            found[name] = _arm(name, one, base, out, state=Path(state) / name, seed=seed)
        except InputError as error:
            say(f"no conditional network of {name}: {error}", flush=True)
    return found


def sets_of(given: Arm, count: int, seed: int) -> dict[str, Bones]:
    """What is read: samples, and the held-out scans as they are and, after super-resolution, as their grid has them."""
    model, stacks, _, reader = given
    sets = {"samples": samples(model, reader, count, seed), "held-out scans": held_out(stacks, reader)}
    if trunk(model.generator) is not model.generator:
        sets["drawn of their coarse volumes"] = held_out(stacks, reader, model, seed)
    return sets


def read(bones: Bones, reader: Reader) -> list[float]:
    """What a reader finds in every bone."""
    with workers() as pool:
        return list(pool.map(reader.read, bones.volumes))


def obeyed(asked, found, groups, edges, *, seed: int, draws: int) -> dict:
    """How often what a reader `found` (n,), NaN where it can say nothing, lies in the class `asked` (n,), how often in
    it or one beside it, and the correlation of both; with intervals by group (patients, or samples each by itself)."""
    asked, found = np.asarray(asked), np.asarray(found, float)
    known = np.isfinite(found)
    read = np.array(classes(found, edges))
    row = {"N": len(asked), "read": int(known.sum())}

    def measures(i):
        i = i[known[i]]
        apart = np.abs(read[i] - asked[i])
        r = np.corrcoef(asked[i], found[i])[0, 1] if np.ptp(asked[i]) and np.ptp(found[i]) else np.nan
        return np.array([(apart == 0).mean(), (apart <= 1).mean(), r])

    names = ("right", "right or beside", "r")
    if known.sum() < 2:
        return row | {f"{name}{end}": None for name in names for end in ("", " low", " high")}
    ends = patient_interval(measures, list(groups), rng=numpy_rng(seed, "obeyed"), draws=draws)
    return row | ends.columns(*names)
