"""Bones that change under the hand: one flat state, a pure function from state to bone, and widgets on top.

A view (`synthesis`, `transition`, `mixing`, `editing`) says which controls there are and what code a state means; all
else is the same for every view. `show` displays one: a picture and a page that need no kernel, and where somebody is
there to move them, the controls.
"""

import asyncio
import base64
import hashlib
import html
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets as widgets
import numpy as np
from IPython.display import HTML, Image, display
from safetensors.torch import save_file
from torch import Tensor

from bonelib import InputError
from bonelib.evaluation.attributes import COARSE_MM, by_patient
from bonelib.evaluation.features import random3d
from bonelib.evaluation.metrics import realism
from bonelib.evaluation.morphometry import measure
from bonelib.evaluation.quality import standardised
from bonelib.latent.models import Model, calibrated, draw
from bonelib.latent.sampling import draw_code, sampled_code, write_samples
from bonelib.randomness import numpy_rng
from bonelib.scans.dataset import Stacks
from bonelib.scans.preprocessing import subsample
from bonelib.scans.tables import read_table
from bonelib.scans.volumes import Volume, write_volume
from bonelib.views import bone3d

TRAITS = {"Tb.BMD": "mg HA/cm³", "Ct.BMD": "mg HA/cm³", "Ct.Th": "mm"}
REALISM = "realism (random3d)"
PAUSE_S = 0.25  # without a change, after which a slider counts as released
PREVIEW = 2  # stages below the last, at which slices follow the hand
KEPT = 4  # finished volumes, so that going back costs nothing
DOWNLOADS = "scratch/explorer"


class Control(NamedTuple):
    """One entry of the state: a number between `low` and `high`, or one of `options` {label: value}."""

    label: str
    start: Any
    low: float = 0
    high: float = 1
    step: float = 0.01
    options: dict | None = None


class Scene(NamedTuple):
    """What a view is.

    `code(state)` is (model's name, code (1, *style shape), noise seed) of a flat state {name: value}; `recipe(state)`
    the arguments with which `bonelib.latent.sampling` draws it, or None where the code must be given as a file.
    """

    title: str
    models: dict[str, tuple[str, Model]]
    controls: dict[str, Control]
    code: Callable[[dict], tuple[str, Tensor, int]]
    recipe: Callable[[dict], str | None]


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


# Views


def synthesis(models: dict[str, tuple[str, Model]], truncation: float | dict = 1.8, most: float = 3.0) -> Scene:
    """New bones under truncation (section 4.1). `models` is {name: (folder, model)}; `truncation` where it begins."""
    first = next(iter(models))
    start = truncation if isinstance(truncation, (int, float)) else truncation.get(first, most)
    controls = {
        "seed": Control("seed", 1, 0, 9999, 1),
        "truncation": Control("truncation ψ", float(start), 0.05, most, 0.05),
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

    return Scene("New bones", models, controls, code, recipe)


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
    """The state in which a view begins."""
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


def cohort(stacks: Stacks, attributes: str | Path, *, count: int = 96, seed: int = 1) -> Cohort:
    """Traits of all patients of a table of `evaluation.attributes`, and what `count` real stacks look like.

    Half of the stacks are the reference of the realism score, half show what real bones score against it.
    """
    rows = read_table(attributes)
    chosen = numpy_rng(seed, "explorer").permutation(len(stacks.rows))[:count]
    values = stacks.pooled([stacks.rows[i] for i in sorted(chosen)], 0)[:, 0]
    patients = np.array([stacks.rows[i]["patient"] for i in sorted(chosen)])
    known = set(np.unique(patients)[::2])  # no patient on both sides
    features = np.stack([_features(v.float().numpy()) for v in values])
    reference = np.array([p in known for p in patients])
    scores = realism(*standardised(features[reference], features[~reference]))
    return Cohort({trait: by_patient(rows, trait) for trait in TRAITS}, features[reference], np.sort(scores))


def _features(values: np.ndarray) -> np.ndarray:
    """Of intensities (z, y, x), averaged over blocks of two voxels a side: in a tenth of the time."""
    z, y, x = (n // 2 * 2 for n in values.shape)
    blocks = values[:z, :y, :x].reshape(z // 2, 2, y // 2, 2, x // 2, 2)
    return random3d(np.ascontiguousarray(blocks.mean((1, 3, 5)))[None])[0]


def readings(found: Bone, known: Cohort) -> list[dict]:
    """What a ruler says of a bone and where it stands: rows of what, value, unit, and the share of real ones below.

    Measured as the cohort's table is, on means over blocks of up to 0.25 mm. A bone without contours has no traits.
    """
    volume = found.volume
    step = max(1, int(COARSE_MM / min(volume.spacing)))
    whole = volume.with_voxels(volume.voxels)
    try:
        traits = measure(subsample(whole, step) if step > 1 else whole)
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


def recipe(scene: Scene, state: dict, folder: str | Path = DOWNLOADS) -> str:
    """The command that draws exactly this bone. A code that has no name is written to `folder` for it."""
    name, code, seed = scene.code(state)
    given = scene.recipe(state)
    if given is None:
        file = Path(folder) / f"code-{hashlib.sha256(code.numpy().tobytes()).hexdigest()[:12]}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"codes": code.contiguous()}, file)
        given = f"--codes {file} --seed {seed}"
    return f"python -m bonelib.latent.sampling {scene.models[name][0]} {given} --to {Path(folder) / 'again'}"


def confined(folder: str | Path, name: str, ending: str) -> Path:
    """The file `name` + `ending` inside of `folder`, and never elsewhere. Raises `InputError` for any other name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}", name):
        raise InputError(f"file name {name!r:.80} is not taken; accepted are up to 60 letters, digits, - and _")
    return Path(folder) / f"{name}{ending}"


# On the page


def interactive() -> bool:
    """Whether somebody may move a slider: not while a stage of the pipeline runs the notebook."""
    return "BONELIB_NOTEBOOK" not in os.environ


def show(scene: Scene, known: Cohort, page: str | Path, **options) -> list[dict]:
    """Display a view: a picture, a link to `page`, which needs no kernel, and the controls where they can be moved.

    Returns the readings of the bone it begins with.
    """
    state = start(scene)
    found = bone(scene, state)
    rows = readings(found, known)
    write_page(scene, state, found, rows, page)
    near = Path(os.environ.get("BONELIB_NOTEBOOK", "notebooks/any.ipynb")).parent
    link = html.escape(Path(os.path.relpath(page, near)).as_posix())
    if not interactive():
        display(Image(bone3d.slices_png(found.volume.voxels, found.volume.spacing), width=640))
    display(HTML(f'<a href="{link}" target="_blank">turn this bone</a> (a page that needs no server and no network)'))
    if interactive():
        display(controls(scene, known, (state, found, rows), **options))
    return rows


def write_page(scene: Scene, state: dict, found: Bone, rows: list[dict], path: str | Path) -> Path:
    """The snapshot of a state: slices, readings, recipe and the volume to turn, in one file."""
    says = ", ".join(f"{scene.controls[key].label} {value}" for key, value in state.items())
    text = f"{recipe(scene, state)}\n\n{says}"
    return bone3d.page(found.volume.voxels, found.volume.spacing, scene.title, rows, text, path)


def controls(scene: Scene, known: Cohort, first: tuple | None = None, folder: str | Path = DOWNLOADS) -> widgets.Widget:
    """The widgets of a view: a row a control with its reset, slices, the volume, readings, recipe and files.

    While a slider moves, slices of a preview follow; once it rests, the finished bone is drawn, shown and measured.
    """
    state = start(scene)
    found, rows = first[1:] if first else (bone(scene, state), None)
    rows, kept = rows or readings(found, known), {tuple(state.values()): found}
    now = {"bone": found, "rows": rows, "waits": None}
    shape, spacing = found.volume.shape, found.volume.spacing
    plot, body, surface = bone3d.plot3d(found.volume.voxels, spacing)
    picture, table, status = widgets.Image(format="png", width=620), widgets.HTML(), widgets.HTML()
    line = widgets.Textarea(rows=3, layout=widgets.Layout(width="620px"), disabled=True)
    cut = [widgets.FloatSlider(0.5, min=0, max=1, step=0.01, description=f"cut {axis}") for axis in "zyx"]
    mode = widgets.Dropdown(options=bone3d.MODES, description="3D shows")
    clip = widgets.FloatSlider(1, min=0.05, max=1, step=0.05, description="cut off at z", continuous_update=False)

    def slices(of):
        picture.value = bone3d.slices_png(of.volume.voxels, spacing, shape, [c.value for c in cut])

    def in_3d(*_):
        bone3d.show_in_plot(plot, body, surface, now["bone"].volume.voxels, mode.value, clip.value)

    def told(drawn, shown, measured):
        table.value = _html(now["rows"])
        line.value = recipe(scene, state, folder)
        status.value = f"generator {drawn:.2f} s, 3D view {shown:.2f} s, measured in {measured:.2f} s"

    def finish():
        now["waits"] = None
        key, began = tuple(state.values()), time.perf_counter()
        if key not in kept:
            kept[key] = bone(scene, state)
            kept.pop(next(iter(kept))) if len(kept) > KEPT else None
        now["bone"] = kept[key]
        drawn = time.perf_counter()
        slices(now["bone"])
        in_3d()
        shown = time.perf_counter()
        now["rows"] = readings(now["bone"], known)
        told(drawn - began, shown - drawn, time.perf_counter() - shown)

    def changed(name, change):
        state[name] = change["new"]
        slices(bone(scene, state, preview=True))
        status.value = "preview …"
        if now["waits"]:
            now["waits"].cancel()
        now["waits"] = asyncio.get_event_loop().call_later(PAUSE_S, finish)

    lines = []
    for name, control in scene.controls.items():
        slider = _slider(control)
        slider.observe(partial(changed, name), "value")
        reset = widgets.Button(description="reset", layout=widgets.Layout(width="80px"))
        reset.on_click(lambda _, slider=slider, value=control.start: setattr(slider, "value", value))
        lines.append(widgets.HBox([slider, reset]))
    for slider in cut:
        slider.observe(lambda _: slices(now["bone"]), "value")
    mode.observe(in_3d, "value")
    clip.observe(in_3d, "value")
    slices(found)
    told(found.seconds, 0, 0)
    files = _files(scene, state, now, folder)
    left = widgets.VBox([*lines, picture, widgets.HBox(cut[:1] + [mode]), widgets.HBox(cut[1:2] + [clip]), cut[2]])
    right = widgets.VBox([plot, table, status], layout=widgets.Layout(width="560px"))
    return widgets.VBox([widgets.HBox([left, right]), line, files])


def _slider(control: Control) -> widgets.Widget:
    wide = dict(style={"description_width": "160px"}, layout=widgets.Layout(width="540px"))
    if control.options:
        return widgets.Dropdown(
            options=list(control.options.items()), value=control.start, description=control.label, **wide
        )
    kind = widgets.IntSlider if isinstance(control.start, int) else widgets.FloatSlider
    span = dict(value=control.start, min=control.low, max=control.high, step=control.step)
    return kind(**span, description=control.label, **wide)


def _files(scene: Scene, state: dict, now: dict, folder: str | Path) -> widgets.Widget:
    """Buttons that write the bone, a page of it, or a batch of new ones, into `folder` alone."""
    name = widgets.Text("bone", description="file name", layout=widgets.Layout(width="300px"))
    count = widgets.BoundedIntText(8, min=1, max=1000, description="batch of", layout=widgets.Layout(width="180px"))
    says = widgets.HTML()

    def guarded(work):
        def press(_):
            try:
                says.value = work()
            except InputError as error:
                says.value = f"<b>{html.escape(str(error))}</b>"

        return press

    def nifti():
        file = write_volume(now["bone"].volume, confined(folder, name.value, ".nii.gz"))
        data = base64.b64encode(file.read_bytes()).decode()
        link = f'<a download="{file.name}" href="data:application/gzip;base64,{data}">download {file.name}</a>'
        return f"{link}; it also is {html.escape(str(file))}"

    def snapshot():
        file = write_page(scene, state, now["bone"], now["rows"], confined(folder, name.value, ".html"))
        return f"{html.escape(str(file))} opens without a server"

    def batch():
        model_folder, model = scene.models[scene.code(state)[0]]
        seed, truncation = int(state["seed"]), state["truncation"]
        target = confined(folder, name.value, "")
        write_samples(model, draw(model, count.value, seed, truncation), target, f"sample-{seed}", seed)
        again = f"{model_folder} -n {count.value} --seed {seed} --truncation {truncation:g} --to {target}"
        return f"{count.value} volumes and morphometry.tsv are in {target}; again: <code>{html.escape(again)}</code>"

    buttons = [("NIfTI", nifti), ("page", snapshot)] + [("batch", batch)] * ("truncation" in scene.controls)
    row = [name]
    for label, work in buttons:
        button = widgets.Button(description=label, layout=widgets.Layout(width="90px"))
        button.on_click(guarded(work))
        row.append(button)
    return widgets.VBox([widgets.HBox(row + [count] * ("truncation" in scene.controls)), says])


def _html(rows: list[dict]) -> str:
    cells = [
        "".join(f"<td style='padding:0 10px 0 0'>{html.escape(str(v))}</td>" for v in row.values()) for row in rows
    ]
    names = "".join(f"<th style='text-align:left;padding:0 10px 0 0'>{html.escape(name)}</th>" for name in rows[0])
    return f"<table><tr>{names}</tr>" + "".join(f"<tr>{cell}</tr>" for cell in cells) + "</table>"
