"""Bones that change under the hand: the widgets of a scene, and what stays of it where nobody can move them.

`show` displays a scene: a picture and a page that need no kernel, and where somebody is there to move them, the
controls.
"""

import asyncio
import base64
import contextlib
import ctypes
import html
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ipywidgets as widgets
from IPython.display import HTML, Image, display

from bonelib import InputError
from bonelib.latent.models import draw
from bonelib.latent.sampling import write_samples
from bonelib.scans.volumes import write_volume
from bonelib.views import bone3d
from bonelib.views.scenes import FOLDER, Bone, Cohort, Control, Scene, bone, readings, recipe, start

PAUSE_S = 0.25  # without a change, after which a slider counts as released
KEPT = 4  # finished volumes, so that going back costs nothing
WIDE, HALF = dict(width="99%"), dict(width="50%")
LABELLED = dict(style={"description_width": "120px"}, layout=WIDE)


def interactive() -> bool:
    """Whether somebody may move a slider: not while a stage of the pipeline runs the notebook."""
    return "BONELIB_NOTEBOOK" not in os.environ


def show(scene: Scene, known: Cohort, page: str | Path, **options) -> list[dict]:
    """Display a scene: a picture, a link to `page`, which needs no kernel, and the controls where they can be moved.

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
        display(controls(scene, known, (found, rows), **options))
    return rows


def write_page(scene: Scene, state: dict, found: Bone, rows: list[dict], path: str | Path) -> Path:
    """The snapshot of a state: slices, readings, recipe and the volume to turn, in one file."""
    says = ", ".join(f"{scene.controls[key].label} {value}" for key, value in state.items())
    text = f"{recipe(scene, state)}\n\n{says}"
    return bone3d.page(found.volume.voxels, found.volume.spacing, scene.title, rows, text, path)


def controls(scene: Scene, known: Cohort, first: tuple | None = None, folder: str | Path = FOLDER) -> widgets.Widget:
    """The widgets of a scene: a row a control with its reset, slices, the volume, readings, recipe and files.

    While a slider moves, slices of a preview follow. Once it rests, the finished bone is drawn, then shown, then
    measured; a move in between is answered first. `first` is the bone it begins with and its readings, if known.
    """
    state = start(scene)
    found = first[0] if first else bone(scene, state)
    now = {"bone": found, "rows": first[1] if first else readings(found, known), "next": None}
    kept, shape, spacing = {tuple(state.values()): found}, found.volume.shape, found.volume.spacing
    plot, body, surface = bone3d.plot3d(found.volume.voxels, spacing)
    whole = dict(width="auto", height="auto", max_width="97%", align_self="flex-start")  # no slice is cut at the edge
    picture, table, status = widgets.Image(format="png", layout=whole), widgets.HTML(), widgets.HTML()
    line = widgets.Textarea(rows=3, description="draw it again", disabled=True, **LABELLED)
    cut = [
        widgets.FloatSlider(0.5, min=0, max=1, step=0.01, description=f"slice at {axis}", **LABELLED) for axis in "zyx"
    ]
    mode = widgets.Dropdown(options=bone3d.MODES, description="3D shows", **LABELLED)
    clip = widgets.FloatSlider(
        1, min=0.05, max=1, step=0.05, description="cut off above z", continuous_update=False, **LABELLED
    )

    def slices(of):
        picture.value = bone3d.slices_png(of.volume.voxels, spacing, shape, [c.value for c in cut])

    def in_3d(*_):
        bone3d.show_in_plot(plot, body, surface, now["bone"].volume.voxels, mode.value, clip.value)

    def then(seconds, step):
        """Do a step when the loop is free again, in place of whatever waited."""

        def run():
            now["next"] = None
            try:
                step()
            except Exception as error:
                status.value = f"<b>{html.escape(str(error))}</b>"
                raise

        if now["next"]:
            now["next"][0].cancel()
        now["next"] = asyncio.get_event_loop().call_later(seconds, run), run

    def settle():
        """Do at once what waits, so that bone, readings and recipe are those of the state."""
        while now["next"]:
            waits, run = now["next"]
            waits.cancel()
            run()

    def finish():
        key, seconds = tuple(state.values()), 0.0
        if key not in kept:
            kept[key] = bone(scene, state)
            seconds = kept[key].seconds
            kept.pop(next(iter(kept))) if len(kept) > KEPT else None
        now["bone"] = kept[key]
        slices(now["bone"])
        then(0, partial(turn, f"generator {seconds:.2f} s (preview {now['early']:.2f} s)"))

    def turn(said):
        began = time.perf_counter()
        in_3d()
        status.value = f"{said}, 3D view {time.perf_counter() - began:.2f} s"
        then(0, partial(tell, status.value))

    def tell(said):
        began = time.perf_counter()
        now["rows"] = readings(now["bone"], known)
        table.value, line.value = _html(now["rows"]), recipe(scene, state, folder)
        seconds = time.perf_counter() - began
        _give_back()
        status.value = f"{said}, measured in {seconds:.2f} s"

    def changed(name, change):
        state[name] = change["new"]
        for other, value in scene.presets.get((name, change["new"]), {}).items():
            sliders[other].value = value
        early = bone(scene, state, preview=True)
        slices(early)
        now["early"], status.value = early.seconds, "preview …"
        then(PAUSE_S, finish)

    sliders = {name: _slider(control) for name, control in scene.controls.items()}
    for name, slider in sliders.items():
        slider.observe(partial(changed, name), "value")
    for slider in cut:
        slider.observe(lambda _: slices(now["bone"]), "value")
    mode.observe(in_3d, "value")
    clip.observe(in_3d, "value")
    slices(found)
    table.value, line.value = _html(now["rows"]), recipe(scene, state, folder)
    status.value = f"generator {found.seconds:.2f} s"
    left = widgets.VBox([*map(_with_reset, sliders.values()), picture, *map(_with_reset, cut)], layout=HALF)
    right = widgets.VBox([plot, *map(_with_reset, (mode, clip)), table, status], layout=HALF)
    return widgets.VBox([widgets.HBox([left, right]), line, _files(scene, state, now, settle, folder)])


def _give_back() -> None:
    """Hand freed memory back to the system: glibc keeps hundreds of megabytes of passes and measures for itself."""
    with contextlib.suppress(OSError, AttributeError):  # another system has another way, and no harm is done
        ctypes.CDLL(None).malloc_trim(0)


def _slider(control: Control) -> widgets.Widget:
    named = dict(description=control.label, value=control.start, **LABELLED)
    if control.options:
        return widgets.Dropdown(options=list(control.options.items()), **named)
    kind = widgets.IntSlider if isinstance(control.start, int) else widgets.FloatSlider
    return kind(min=control.low, max=control.high, step=control.step, **named)


def _with_reset(slider: widgets.Widget) -> widgets.Widget:
    """A row: the control, and a button that is there to press as soon as it was moved."""
    first = slider.value
    button = widgets.Button(description="reset", layout=widgets.Layout(width="60px"), disabled=True)
    button.on_click(lambda _: setattr(slider, "value", first))
    slider.observe(lambda change: setattr(button, "disabled", change["new"] == first), "value")
    return widgets.HBox([slider, button])


def confined(folder: str | Path, name: str, ending: str) -> Path:
    """The file `name` + `ending` inside of `folder`, and never elsewhere. Raises `InputError` for any other name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}", name):
        raise InputError(f"file name {name!r:.80} is not taken; accepted are up to 60 letters, digits, - and _")
    return Path(folder) / f"{name}{ending}"


def _files(scene: Scene, state: dict, now: dict, settle: Callable, folder: str | Path) -> widgets.Widget:
    """Buttons that write the bone, a page of it, or a batch of new ones, into `folder` alone."""
    name = widgets.Text("bone", description="file name", layout=widgets.Layout(width="300px"))
    count = widgets.BoundedIntText(8, min=1, max=1000, description="batch of", layout=widgets.Layout(width="180px"))
    says = widgets.HTML()

    def guarded(work):
        def press(_):
            try:
                settle()
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
