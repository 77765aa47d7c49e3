"""The conditional HA-GAN (Sun et al. 2022, section IV-C): bones of an asked motion grade, or of an asked fifth of the
cohort by an attribute, and how often a reader who has seen no generated bone finds in them what was asked."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bonelib import InputError
from bonelib.core.config import fingerprint
from bonelib.core.parallel import workers
from bonelib.core.random import numpy_rng, torch_rng
from bonelib.evaluation.cohort_morphometry import COARSE_MM
from bonelib.evaluation.morphometry import measure_or_none
from bonelib.evaluation.statistics import patient_interval
from bonelib.latent.inversion import halvings
from bonelib.latent.models import Model, calibrated, draw_code, enlarge, load_model, styles_of
from bonelib.networks.encoder import trunk
from bonelib.networks.registry import build_critic, build_generator
from bonelib.published import require_grid
from bonelib.scans.dataset import Stacks, load_stacks
from bonelib.scans.preprocessing import subsample, to_unit
from bonelib.scans.tables import read_table
from bonelib.scans.volumes import Volume
from bonelib.store import fetch_files
from bonelib.studies.hagan_config import Conditional
from bonelib.training import checkpoint, loop
from bonelib.training.config import HierarchicalTrain
from bonelib.training.grading import GRADES, exceedance_probabilities, known_grader, load_grader

GRADE = Conditional().by  # other classes are equal parts of the training scans, by an attribute
CLASSES = len(GRADES)
EDGES = "classes.json"


# Classes


class Classes(NamedTuple):
    """What classes go `by`, and the values between them (classes - 1,)."""

    by: str
    edges: list[float]


def read_classes(folder: str | Path) -> Classes:
    """The classes of the conditional model in `folder`; raises `InputError` where its classes.json is not one."""
    file = Path(folder) / EDGES
    try:
        return Classes(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{file}: not the classes of a conditional model; needed are by and edges") from None


def values_of(stacks: Stacks, by: str, attributes: str | Path) -> dict[str, float]:
    """What the classes of every scan go by, its grade or its value in the table `attributes`; NaN where it has none."""
    if by == GRADE:
        return {row["scan"]: float(row.get("grade") or "nan") for row in stacks.rows}
    return {row["scan"]: float(row[by] or "nan") for row in read_table(attributes)}


def edges_of(stacks: Stacks, values: dict[str, float], by: str) -> list[float] | None:
    """The values between grades, or between fifths of the training scans; None where a class has no training scan."""
    scans = sorted({row["scan"] for row in stacks.of("train")})
    known = np.array([value for scan in scans if np.isfinite(value := values.get(scan, np.nan))])
    edges = [grade + 0.5 for grade in GRADES[:-1]]
    if by != GRADE and len(known):
        edges = np.quantile(known, np.arange(1, CLASSES) / CLASSES).tolist()
    return edges if set(classes(known, edges)) == set(range(CLASSES)) else None


def classes(values, edges) -> list[int]:
    """The classes of values (n,), -1 where there is none."""
    return [int(np.searchsorted(edges, v)) if np.isfinite(v) else -1 for v in values]


def labelled(stacks: Stacks, values: dict[str, float], edges) -> Stacks:
    """The stacks whose scan has one of `values`, each with its `class`: the interval between `edges` that it is in."""
    found = {scan: classes([value], edges)[0] for scan, value in values.items()}
    rows = [row | {"class": found[row["scan"]]} for row in stacks.rows if found.get(row["scan"], -1) >= 0]
    told = [[row["scan"], row["start"], row["class"]] for row in rows]
    return Stacks(stacks.volumes, rows, stacks.meta | {"data_hash": fingerprint(stacks.meta["data_hash"], told)})


# Networks


def conditional(how: HierarchicalTrain, samples: int) -> HierarchicalTrain:
    """The same training for a conditional network, from another one's weights on: of `samples`, without an encoder."""
    generator = how.generator.model_copy(update={"classes": CLASSES})
    return how.lasting(samples).model_copy(update={"generator": generator, "encode": False})


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
    edges: list[float],
    folder: str | Path,
    *,
    state: str | Path,
    seed: int,
    superres: str | Path | None = None,
) -> None:
    """Train the model of the folder `base` further on stacks `data` of classes; write it, and them, to `folder`.

    `superres` is a folder with the network that draws the rest where it draws a coarser grid than that of the stacks.
    """
    state, model = Path(state), load_model(base)
    params = conditional(model.how, how.samples)
    start = widened(model, params, state / "start", seed)
    loop.train(params, data, folder, state=state / "training", seed=seed, superres=superres, start=start)
    checkpoint.write_json(Path(folder) / EDGES, Classes(how.by, edges)._asdict())


def of_grades(folder: str | Path) -> Model | None:
    """The model of motion grades among the conditional ones in `folder`, the first by name, or None."""
    found = [path.parent for path in sorted(Path(folder).glob(f"*/{EDGES}"))]
    return next((load_model(place) for place in found if read_classes(place).by == GRADE), None)


# What is read


class Reader(NamedTuple):
    """What tells the class of a bone in mg HA/cm3 of voxels up to `voxel_mm`: the number that `read` finds in it."""

    voxel_mm: float
    read: Callable[[Volume], float]


def reader_of(by: str, grading: str | Path) -> Reader:
    """The grader in the folder `grading` for grades, which must be there; morphometry for attributes."""
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


class Arm(NamedTuple):
    """A conditional model with its `Classes`, the stacks of a cohort with their `class`, who reads bones and whether
    that reader has not seen these scans (`unseen`), and the grades {scan: expected grade} by graders that did not know
    the patient (`predicted`)."""

    model: Model
    classes: Classes
    stacks: Stacks
    reader: Reader
    predicted: dict[str, float]
    unseen: bool


def arms(
    how: dict[str, Conditional],
    base: str | Path,
    out: str | Path,
    to: str | Path,
    *,
    state: str | Path,
    seed: int,
    say=print,
) -> dict[str, Arm]:
    """The arm of each name, its model fetched to the folder `to`, or trained there from that in the folder `base`.

    `out` is that of the profile. All scans count where classes are grades, those that a generator learns from where
    they are not. An arm that cannot be trained on these scans is left out, and why is said. Raises `InputError` for
    published weights that are not what is asked for, and as a training does.
    """
    found, out = {}, Path(out)
    Path(to).mkdir(parents=True, exist_ok=True)
    for name, one in how.items():
        place, grades = Path(to) / name, out / "grading/grades.csv"
        data = load_stacks(out / "stacks", None if one.by == GRADE else grades)
        values = values_of(data, one.by, out / "stacks/attributes.csv")
        if one.published:
            _fetch(name, one, place, data.meta)
        else:
            places = (Path(base), out / "superres")
            superres = next((p for p in places if (p / "superres.safetensors").is_file()), None)
            edges = edges_of(data, values, one.by)
            coarse = halvings(load_model(base), data.meta["stack_slices"]) > 0 and superres is None
            if one.by == GRADE and known_grader(out / "grading") is None:
                say(f"no HA-GAN is told {name}: no grader was trained", flush=True)
                continue
            if edges is None or coarse:
                says = "it would draw coarser voxels than the scans'" if edges else "a class has no training scan"
                say(f"no HA-GAN is told {name}: {says}", flush=True)
                continue
            stacks = labelled(data, values, edges)
            train_conditional(one, base, stacks, edges, place, state=Path(state) / name, seed=seed, superres=superres)
        known = read_classes(place)
        found[name] = Arm(
            load_model(place),
            known,
            labelled(data, values, known.edges),
            reader_of(one.by, out / "grading"),
            {row["scan"]: float(row["predicted"] or "nan") for row in read_table(grades)},
            one.by != GRADE or one.published is not None,
        )
    return found


def _fetch(name: str, how: Conditional, place: Path, data: dict) -> None:
    key = f"hagan_uses.conditional.{name}"
    fetch_files(f"hagan-{name}", how.published, place, f"{key}.published")
    if (by := read_classes(place).by) != how.by:
        raise InputError(f"params.yaml: {key}.by: found {how.by!r}, but the classes of what is published go by {by!r}")
    require_grid(f"hagan-{name}", load_model(place).config, data)


class Read(NamedTuple):
    """Bones by their classes (n,), what is read in each, NaN where nothing can be said, and their groups: patients, or
    each by itself; with the bones that were drawn."""

    asked: list[int]
    found: list[float]
    groups: list[str]
    volumes: list[Volume]

    def of(self, wanted: int) -> list[Volume]:
        """Those that should have a class."""
        return [volume for volume, asked in zip(self.volumes, self.asked, strict=True) if asked == wanted]


def read_all(given: Arm, count: int, seed: int) -> dict[str, Read]:
    """What is read in samples, as many of each class; and, where scans were held out, in these and in what
    super-resolution draws of their coarse volumes, which are all that the generator draws.

    Of grades, scans as they are have those by networks that knew none of their patients; a grader of the same cohort
    has seen them all, and reads none of their volumes.
    """
    model, (by, _), stacks, reader, predicted, unseen = given
    data = model.config["data"]
    wanted = [i % CLASSES for i in range(count)]
    codes = styles_of(model, wanted, seed)
    drawn = [draw_code(model, code[None], seed, number=i) for i, code in enumerate(codes)]
    sets = {"samples": _read(drawn, data, reader, wanted, [f"sample {i}" for i in range(count)])}
    by_scan: dict[str, list[dict]] = {}
    for row in stacks.rows:
        if row["split"] == "held-out":
            by_scan.setdefault(row["scan"], []).append(row)
    rows = [every[len(every) // 2] for _, every in sorted(by_scan.items())]
    if not rows:
        return sets
    asked, patients = [row["class"] for row in rows], [row["patient"] for row in rows]
    if by == GRADE:
        sets["held-out scans"] = Read(asked, [predicted[row["scan"]] for row in rows], patients, [])
    else:
        volumes = stacks.pooled(rows, 0)[:, 0].float().numpy()
        sets["held-out scans"] = _read(volumes, data, reader, asked, patients)
    if (times := halvings(model, stacks.meta["stack_slices"])) and unseen:
        coarse = stacks.pooled(rows, times)[:, 0].float().numpy()
        again = enlarge(model.generator.superres, coarse, seed)
        sets["drawn of their coarse volumes"] = _read(again, data, reader, asked, patients)
    return sets


def _read(volumes, data: dict, reader: Reader, asked: list[int], groups: list[str]) -> Read:
    """What a reader finds in volumes (z, y, x) in [0, 1] of the grid that `data` says."""
    step = int(max(1.0, reader.voxel_mm / min(data["spacing_mm"])))
    bones = [subsample(calibrated(volume, data), step) for volume in volumes]
    with workers() as pool:
        return Read(asked, list(pool.map(reader.read, bones)), groups, bones)


def obeyed(read: Read, edges, *, seed: int, draws: int) -> dict:
    """How often what is read lies in the class that was asked, in it or one beside it, of all bones, and the
    correlation of both, of those that can be read; with intervals by group."""
    asked, found = np.asarray(read.asked), np.asarray(read.found, float)
    known = np.isfinite(found)
    apart = np.where(known, np.abs(np.array(classes(found, edges)) - asked), np.inf)

    def measures(i):
        x, y = asked[i[known[i]]], found[i[known[i]]]
        r = np.corrcoef(x, y)[0, 1] if len(x) and np.ptp(x) and np.ptp(y) else np.nan
        return np.array([(apart[i] == 0).mean(), (apart[i] <= 1).mean(), r])

    ends = patient_interval(measures, list(read.groups), rng=numpy_rng(seed, "obeyed"), draws=draws)
    return {"N": len(asked), "read": int(known.sum())} | ends.columns("right", "right or beside", "r")
