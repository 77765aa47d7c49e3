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
    return _Panel(scene, known, first, folder).layout()


class _Panel:
    """The widgets of one scene, and the steps by which they follow its state."""

    def __init__(self, scene, known, first, folder):
        self.scene, self.known, self.folder, self.state, self.waiting = scene, known, folder, start(scene), None
        self.bone = first[0] if first else bone(scene, self.state)
        self.rows = first[1] if first else readings(self.bone, known)
        self.kept = {tuple(self.state.values()): self.bone}
        self.shape, self.spacing = self.bone.volume.shape, self.bone.volume.spacing
        self.plot, *self.objects = bone3d.plot3d(self.bone.volume.voxels, self.spacing)
        whole = dict(width="auto", height="auto", max_width="97%", align_self="flex-start")  # cut at no edge
        self.picture, self.table = widgets.Image(format="png", layout=whole), widgets.HTML()
        self.status = widgets.HTML(f"generator {self.bone.seconds:.2f} s")
        self.line = widgets.Textarea(rows=3, description="draw it again", disabled=True, **LABELLED)
        at = dict(min=0, max=1, step=0.01)
        self.cuts = [widgets.FloatSlider(0.5, description=f"slice at {axis}", **at, **LABELLED) for axis in "zyx"]
        self.mode = widgets.Dropdown(options=bone3d.MODES, description="3D shows", **LABELLED)
        once = dict(min=0.05, max=1, step=0.05, continuous_update=False)
        self.clip = widgets.FloatSlider(1, description="cut off above z", **once, **LABELLED)
        self.sliders = {name: _slider(control) for name, control in scene.controls.items()}
        for name, slider in self.sliders.items():
            slider.observe(partial(self.changed, name), "value")
        for slider in self.cuts:
            slider.observe(lambda _: self.show_slices(self.bone), "value")
        for widget in (self.mode, self.clip):
            widget.observe(lambda _: self.show_volume(), "value")
        self.show_slices(self.bone)
        self.show_numbers()

    def layout(self) -> widgets.Widget:
        left = [*map(_with_reset, self.sliders.values()), self.picture, *map(_with_reset, self.cuts)]
        right = [self.plot, *map(_with_reset, (self.mode, self.clip)), self.table, self.status]
        columns = widgets.HBox([widgets.VBox(left, layout=HALF), widgets.VBox(right, layout=HALF)])
        return widgets.VBox([columns, self.line, _files(self)])

    def show_slices(self, of: Bone) -> None:
        cuts = [cut.value for cut in self.cuts]
        self.picture.value = bone3d.slices_png(of.volume.voxels, self.spacing, self.shape, cuts)

    def show_volume(self) -> None:
        voxels = self.bone.volume.voxels
        bone3d.show_in_plot(self.plot, *self.objects, voxels, self.mode.value, self.clip.value)

    def show_numbers(self) -> None:
        self.table.value, self.line.value = bone3d.table(self.rows), recipe(self.scene, self.state, self.folder)

    def then(self, seconds: float, step: Callable) -> None:
        """Do a step when the loop is free again, in place of whatever waited."""

        def run():
            self.waiting = None
            try:
                step()
            except Exception as error:
                self.status.value = f"<b>{html.escape(str(error))}</b>"
                raise

        if self.waiting:
            self.waiting[0].cancel()
        self.waiting = asyncio.get_event_loop().call_later(seconds, run), run

    def settle(self) -> None:
        """Do at once what waits, so that bone, readings and recipe are those of the state."""
        while self.waiting:
            waits, run = self.waiting
            waits.cancel()
            run()

    def changed(self, name: str, change: dict) -> None:
        """A control was moved: show slices of a preview, and the finished bone once it rests."""
        self.state[name] = change["new"]
        for other, value in self.scene.presets.get((name, change["new"]), {}).items():
            self.sliders[other].value = value
        early = bone(self.scene, self.state, preview=True)
        self.show_slices(early)
        self.status.value = "preview …"
        self.then(PAUSE_S, partial(self.finish, early.seconds))

    def finish(self, preview_s: float) -> None:
        key, seconds = tuple(self.state.values()), 0.0
        if key not in self.kept:
            self.kept[key] = bone(self.scene, self.state)
            seconds = self.kept[key].seconds
            self.kept.pop(next(iter(self.kept))) if len(self.kept) > KEPT else None
        self.bone = self.kept[key]
        self.show_slices(self.bone)
        self.then(0, partial(self.turn, f"generator {seconds:.2f} s (preview {preview_s:.2f} s)"))

    def turn(self, said: str) -> None:
        began = time.perf_counter()
        self.show_volume()
        self.status.value = f"{said}, 3D view {time.perf_counter() - began:.2f} s"
        self.then(0, partial(self.measure, self.status.value))

    def measure(self, said: str) -> None:
        began = time.perf_counter()
        self.rows = readings(self.bone, self.known)
        self.show_numbers()
        seconds = time.perf_counter() - began
        _give_back()
        self.status.value = f"{said}, measured in {seconds:.2f} s"


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


def _files(panel: _Panel) -> widgets.Widget:
    """Buttons that write the bone, a page of it, or a batch of new ones, into the panel's folder alone."""
    scene, state, folder = panel.scene, panel.state, panel.folder
    name = widgets.Text("bone", description="file name", layout=widgets.Layout(width="300px"))
    count = widgets.BoundedIntText(8, min=1, max=1000, description="batch of", layout=widgets.Layout(width="180px"))
    says = widgets.HTML()

    def guarded(work):
        def press(_):
            try:
                panel.settle()
                says.value = work()
            except InputError as error:
                says.value = f"<b>{html.escape(str(error))}</b>"

        return press

    def nifti():
        file = write_volume(panel.bone.volume, confined(folder, name.value, ".nii.gz"))
        data = base64.b64encode(file.read_bytes()).decode()
        link = f'<a download="{file.name}" href="data:application/gzip;base64,{data}">download {file.name}</a>'
        return f"{link}; it also is {html.escape(str(file))}"

    def snapshot():
        file = write_page(scene, state, panel.bone, panel.rows, confined(folder, name.value, ".html"))
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
