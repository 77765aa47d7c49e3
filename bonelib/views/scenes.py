"""What an interactive view is: one flat state, and pure functions from a state to a bone and what is known of it.

A scene (`synthesis`, `transition`, `mixing`, `editing`) says which controls there are and what code a state means; all
else is the same for every scene. Nothing here knows of a page; `views.explorer` puts a scene on one.
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from bonelib import InputError
from bonelib.core.random import numpy_rng
from bonelib.evaluation.cohort_morphometry import COARSE_MM, by_patient
from bonelib.evaluation.features import random3d, standardised
from bonelib.evaluation.metrics import realism
from bonelib.evaluation.morphometry import measure
from bonelib.latent.models import Model, calibrated, draw_code, sampled_code
from bonelib.scans.dataset import Stacks
from bonelib.scans.preprocessing import block_means, subsample
from bonelib.scans.tables import read_table
from bonelib.scans.volumes import Volume

TRAITS = {"Tb.BMD": "mg HA/cm³", "Ct.BMD": "mg HA/cm³", "Ct.Th": "mm"}
REALISM = "realism (random3d)"
PREVIEW = 2  # stages below the last, at which slices follow the hand
FOLDER = "scratch/explorer"


class Control(NamedTuple):
    """One entry of the state: a number between `low` and `high`, or one of `options` {label: value}."""

    label: str
    start: Any
    low: float = 0
    high: float = 1
    step: float = 0.01
    options: dict | None = None


class Scene(NamedTuple):
    """What a view shows.

    `code(state)` is (model's name, code (1, *style shape), noise seed) of a flat state {name: value}; `recipe(state)`
    the arguments with which `bonelib.latent.sampling` draws it, or None where the code must be given as a file.
    `presets` {(name, value): {other name: value}} is what else changes when a control is set to a value.
    """

    title: str
    models: dict[str, tuple[str, Model]]
    controls: dict[str, Control]
    code: Callable[[dict], tuple[str, Tensor, int]]
    recipe: Callable[[dict], str | None]
    presets: dict[tuple, dict] = {}


class Cohort(NamedTuple):
    """What a bone is compared with: traits by patient, features of real stacks, realism of others, and how to scale."""

    traits: dict[str, np.ndarray]
    features: np.ndarray
    realism: np.ndarray


class Bone(NamedTuple):
    """A drawn bone: calibrated, as intensities in [0, 1], and the seconds that the generator took."""

    volume: Volume
    values: np.ndarray
    seconds: float


# Scenes


def synthesis(models: dict[str, tuple[str, Model]], truncation: float | dict = 1.8, most: float = 3.0) -> Scene:
    """New bones under truncation (section 4.1). `models` is {name: (folder, model)}.

    `truncation` is where it begins, for all models or {model: value}, as it means another thing in each.
    """
    first, same = next(iter(models)), isinstance(truncation, (int, float))
    begins = {name: float(truncation if same else truncation.get(name, most)) for name in models}
    controls = {
        "seed": Control("seed", 1, 0, 9999, 1),
        "truncation": Control("truncation ψ", begins[first], 0.05, most, 0.05),
    }
    if len(models) > 1:
        controls["model"] = Control("model", first, options={name: name for name in models})

    def chosen(state):
        return state.get("model", first)

    def code(state):
        seed = int(state["seed"])
        return chosen(state), sampled_code(models[chosen(state)][1], seed, state["truncation"]), seed

    def recipe(state):
        return f"-n 1 --seed {int(state['seed'])} --truncation {state['truncation']:g}"

    presets = {("model", name): {"truncation": value} for name, value in begins.items()}
    return Scene("New bones", models, controls, code, recipe, presets)


def transition(folder: str, model: Model, codes: dict[str, Tensor], seed: int = 1) -> Scene:
    """From one bone to another (section 4.2): `codes` {name: code (*style shape)}, own scans' codes among them."""
    if len(codes) < 2:
        raise InputError(f"a transition needs 2 codes, and {len(codes)} were given")
    names = {name: name for name in codes}
    first, second = list(codes)[:2]
    controls = {
        "share": Control("from → to", 0.5),
        "from": Control("from", first, options=names),
        "to": Control("to", second, options=names),
    }

    def code(state):
        a, b, share = codes[state["from"]], codes[state["to"]], state["share"]
        return "model", ((1 - share) * a + share * b)[None], seed

    return Scene("From one bone to another", {"model": (folder, model)}, controls, code, lambda state: None)


def mixing(folder: str, model: Model, codes: dict[str, Tensor], seed: int = 1) -> Scene:
    """One bone's coarse styles and another's fine ones (section 4.3): `codes` {name: code (styles, d)}, a row a style.

    Raises `InputError` for a generator without styles.
    """
    rows = {code.shape for code in codes.values()}
    if len(codes) < 2 or len(rows) > 1 or len(next(iter(rows))) != 2:
        raise InputError(f"style mixing needs 2 codes of one row a style; found {len(codes)} of shapes {sorted(rows)}")
    count, names = next(iter(rows))[0], {name: name for name in codes}
    first, second = list(codes)[:2]
    controls = {
        "crossover": Control("styles of the first", count // 2, 0, count, 1),
        "first": Control("coarse from", first, options=names),
        "second": Control("fine from", second, options=names),
    }

    def code(state):
        mixed, at = codes[state["second"]].clone(), int(state["crossover"])
        mixed[:at] = codes[state["first"]][:at]
        return "model", mixed[None], seed

    return Scene("Style mixing", {"model": (folder, model)}, controls, code, lambda state: None)


def editing(folder: str, model: Model, codes: dict[str, Tensor], directions: dict[str, tuple], seed: int = 1) -> Scene:
    """Attributes under sliders (section 4.4). `directions` is {label: (direction (*style shape), low, high)}.

    A slider's number times the direction is added to the code: a direction scaled to one unit of an attribute has a
    slider in that unit, and SeFa's directions have one in multiples.
    """
    names, first = {name: name for name in codes}, next(iter(codes))
    controls = {"bone": Control("bone", first, options=names)}
    for i, (label, (_, low, high)) in enumerate(directions.items()):
        controls[f"edit{i}"] = Control(label, 0.0, low, high, (high - low) / 100)

    def code(state):
        edited = codes[state["bone"]].clone()
        for i, (direction, _, _) in enumerate(directions.values()):
            edited += state[f"edit{i}"] * direction
        return "model", edited[None], seed

    return Scene("Attribute editing", {"model": (folder, model)}, controls, code, lambda state: None)


# From state to bone


def start(scene: Scene) -> dict:
    """The state in which a scene begins."""
    return {name: control.start for name, control in scene.controls.items()}


def bone(scene: Scene, state: dict, preview: bool = False) -> Bone:
    """The bone of a state, the same for the same state; as a preview, on a coarser grid."""
    name, code, seed = scene.code(state)
    model = scene.models[name][1]
    stage = max(1, model.generator.stages - PREVIEW) if preview else None
    began = time.perf_counter()
    values = draw_code(model, code, seed, stage)
    seconds, data = time.perf_counter() - began, model.config["data"]
    if preview:
        fine, coarse = data["stack_slices"], len(values)
        data = data | dict(spacing_mm=[mm * fine / coarse for mm in data["spacing_mm"]])
    return Bone(calibrated(values, data), values, seconds)


def cohort(stacks: Stacks, attributes: str | Path, *, seed: int) -> Cohort:
    """Traits of all patients of a table of `evaluation.cohort_morphometry`, and what 96 real stacks look like.

    Half of the stacks are the reference of the realism score, half show what real bones score against it.
    """
    rows = read_table(attributes)
    chosen = numpy_rng(seed, "explorer").permutation(len(stacks.rows))[:96]
    values = stacks.pooled([stacks.rows[i] for i in sorted(chosen)], 0)[:, 0]
    patients = np.array([stacks.rows[i]["patient"] for i in sorted(chosen)])
    known = set(np.unique(patients)[::2])  # no patient on both sides
    features = np.stack([_features(v.float().numpy()) for v in values])
    reference = np.array([p in known for p in patients])
    scores = realism(*standardised(features[reference], features[~reference]))
    return Cohort({trait: by_patient(rows, trait) for trait in TRAITS}, features[reference], np.sort(scores))


def _features(values: np.ndarray) -> np.ndarray:
    """Of intensities (z, y, x), averaged over blocks of two voxels a side: in a tenth of the time."""
    return random3d(np.ascontiguousarray(block_means(values, 2))[None])[0]


def readings(found: Bone, known: Cohort) -> list[dict]:
    """Traits of a bone and where it stands: rows of what, value, unit, and the share of real ones below.

    Measured as the cohort's table is, on means over blocks of up to 0.25 mm. A bone without contours has no traits.
    """
    volume = found.volume
    step = max(1, int(COARSE_MM / min(volume.spacing)))
    try:
        traits = measure(subsample(volume, step) if step > 1 else volume, anisotropy=False)
    except InputError:
        traits = {}
    rows = []
    score = realism(*standardised(known.features, _features(found.values)[None]))[0]
    for name, value, unit, others in (
        *((name, traits.get(name, np.nan), unit, known.traits[name]) for name, unit in TRAITS.items()),
        (REALISM, score, "", known.realism),
    ):
        place = f"{100 * np.mean(others < value):.0f} % of {len(others)}" if np.isfinite(value) else "no contour found"
        rows.append({"what": name, "value": f"{value:.4g}", "unit": unit, "real ones below": place})
    return rows


def recipe(scene: Scene, state: dict, folder: str | Path = FOLDER) -> str:
    """The command that draws exactly this bone. A code that has no name is written to `folder` for it."""
    name, code, seed = scene.code(state)
    given = scene.recipe(state)
    if given is None:
        file = Path(folder) / f"code-{hashlib.sha256(code.numpy().tobytes()).hexdigest()[:12]}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"codes": code.contiguous()}, file)
        given = f"--codes {file} --seed {seed}"
    return f"python -m bonelib.latent.sampling {scene.models[name][0]} {given} --to {Path(folder) / 'again'}"
