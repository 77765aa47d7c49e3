"""Pictures in the house style: one grey window for all bones, a scale bar in mm, and the run id."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import PillowWriter

from bonelib.scans.tables import write_table
from bonelib.scans.volumes import Volume

WINDOW = (-200.0, 1000.0)  # mg HA/cm3 shown from black to white
LABEL_INCH, GAP_INCH, SCALE_MM = 0.26, 0.06, 10.0
INK, PAPER, ACCENTS = "#1b1e23", "#ffffff", ("#0b6e99", "#d9730d", "#448361", "#9065b0")
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "axes.prop_cycle": plt.cycler(color=ACCENTS),
    "savefig.facecolor": PAPER,
    "legend.frameon": False,
}


def plane(volume: np.ndarray | Volume, which: str) -> np.ndarray:
    """A middle slice of (z, y, x) voxels: "axial" (y, x), or "coronal" (z, y), cut along the bone's long side."""
    volume = volume.voxels if isinstance(volume, Volume) else volume
    z, _, x = volume.shape
    return volume[z // 2] if which == "axial" else volume[:, :, x // 2]


def on_grid(volume: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A coarse volume repeated onto a finer grid, so that stages can be shown at one scale."""
    for axis, n in enumerate(shape):
        volume = np.repeat(volume, n // volume.shape[axis], axis)
    return volume


def bones(
    rows: list[tuple[str, list[np.ndarray]]],
    spacing,
    *,
    which="axial",
    columns=None,
    titles=(),
    window=WINDOW,
    colours="gray",
    width=10.0,
):
    """A figure of middle slices in true proportion, above a scale bar of 10 mm: `rows` of (label, volumes).

    Volumes are a sequence of `Volume` or of voxels (z, y, x); spacing is in mm (z, y, x).
    """
    columns = columns or max(len(volumes) for _, volumes in rows)
    lines = [
        (label if i == 0 else "", volumes[i : i + columns])
        for label, volumes in rows
        for i in range(0, len(volumes), columns)
    ]
    step_y, step_x = (spacing[1], spacing[2]) if which == "axial" else (spacing[0], spacing[1])
    heights = [max(plane(v, which).shape[0] for v in volumes) * step_y for _, volumes in lines]
    cell = max(plane(v, which).shape[1] * step_x for _, volumes in lines for v in volumes)
    inch = width / (columns * cell)  # on paper, of a millimetre
    above = [LABEL_INCH if label or (i == 0 and titles) else GAP_INCH for i, (label, _) in enumerate(lines)]
    total = sum(above) + inch * sum(heights) + LABEL_INCH
    with plt.rc_context(STYLE):
        fig, top = plt.figure(figsize=(width, total)), total
        for i, ((label, volumes), gap, height) in enumerate(zip(lines, above, heights, strict=True)):
            top -= gap + inch * height
            for j, volume in enumerate(volumes):
                picture = plane(volume, which)
                box = (j / columns + 0.003, top / total, 1 / columns - 0.006, inch * height / total)
                axis = fig.add_axes(box, anchor="NW")
                extent = (0, picture.shape[1] * step_x, picture.shape[0] * step_y, 0)
                axis.imshow(picture, cmap=colours, vmin=window[0], vmax=window[1], extent=extent, interpolation="none")
                axis.set(xlim=(0, cell), ylim=(height, 0))
                axis.axis("off")
                if (j == 0 and label) or (i == 0 and j < len(titles)):
                    axis.set_title(label if j == 0 and label else titles[j], loc="left", pad=3)
        margin = fig.add_axes((0.003, 0, 0.997, LABEL_INCH / total))  # below the pictures, where it hides nothing
        margin.set(xlim=(0, 0.997 * width / inch), ylim=(0, 1))
        margin.axis("off")
        margin.plot([0, SCALE_MM], [0.55, 0.55], color=INK, linewidth=2, solid_capstyle="butt")
        margin.text(SCALE_MM + 0.01 * width / inch, 0.5, f"{SCALE_MM:.0f} mm", fontsize=7, va="center")
    return fig


ROW_INCH = 0.13  # of a legend
FEW = 12  # points of a curve, up to which each is marked: of a single one there is no line


def _finish(axis, legend=True, size=7) -> None:
    """Above the axis, where it hides nothing, what its colours mean; in it, if nothing is there to be seen, so much."""
    drawn = [v for line in axis.lines for v in np.asarray(line.get_ydata(), float)]
    if not np.isfinite(drawn).any() and not axis.patches and not axis.containers:
        axis.text(0.5, 0.5, "nothing could be read", ha="center", va="center", color="0.6", transform=axis.transAxes)
        axis.set(xticks=[], yticks=[])
    labels = axis.get_legend_handles_labels()[1]
    if not legend or not labels:
        return
    inches = axis.get_figure().get_figwidth() / axis.get_subplotspec().get_gridspec().ncols  # with what stands aside
    columns = max(1, min(len(labels), int(inches * 54 / (max(map(len, labels)) * 0.55 * size + 30))))
    rows = -(-len(labels) // columns)
    where = dict(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, columnspacing=1, labelspacing=0.2)
    axis.legend(fontsize=size, ncols=columns, **where)
    if axis.get_title():
        axis.set_title(axis.get_title(), pad=6 + 1.5 * size * rows)


def matrix(table: np.ndarray, rows: list[str], columns: list[str], label: str):
    """A table of signed numbers (rows, columns) as a picture, blue below and red above 0, the numbers written in it."""
    limit = np.nanmax(np.abs(table), initial=0.01)

    def ink(value):
        return "white" if abs(value) > 0.6 * limit else INK

    with plt.rc_context(STYLE):
        fig, axis = plt.subplots(figsize=(6, 0.3 * len(rows) + 0.9), layout="constrained")
        shown = axis.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink(value))
        axis.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows)
        axis.tick_params(length=0)
        fig.colorbar(shown, label=label)
    return fig


def curves(table: list[dict], x: str, groups: list[tuple[str, list[str]]], marks: list[float] = (), width=10.0):
    """Line plots side by side: `groups` of (axis label, columns) of `table` over its column `x`."""
    with plt.rc_context(STYLE):
        height = width * 0.26 + ROW_INCH * max((len(columns) for _, columns in groups if len(columns) > 1), default=0)
        fig, axes = plt.subplots(1, len(groups), figsize=(width, height), layout="constrained")
        for axis, (label, columns) in zip(np.atleast_1d(axes), groups, strict=True):
            for mark in marks:
                axis.axvline(mark, color="0.85", linewidth=1)
            for column in columns:
                points = [float(r[x]) for r in table], [float(r[column]) for r in table]
                marker = "o" if np.isfinite(points[1]).sum() <= FEW else None
                axis.plot(*points, linewidth=1, marker=marker, markersize=3, label=column)
            axis.set(xlabel=x, ylabel=label)
            _finish(axis, len(columns) > 1)
    return fig


def histograms(groups: dict[str, dict[str, np.ndarray]], width=10.0):
    """One histogram an entry of `groups`, {axis label: {name: values}}; names are compared in one picture."""
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, len(groups), figsize=(width, width * 0.24), layout="constrained")
        for axis, (label, sets) in zip(np.atleast_1d(axes), groups.items(), strict=True):
            every = np.concatenate([np.asarray(values, float) for values in sets.values()])
            bins = np.linspace(*((every.min(), every.max()) if every.size else (0, 1)), 25)
            for name, values in sets.items():
                if len(values):
                    said = dict(label=f"{name}, N={len(values)}", density=True)
                    axis.hist(values, bins, histtype="stepfilled", alpha=0.45, **said)
            axis.set(xlabel=label, yticks=[])
            _finish(axis)
    return fig


def scatter(panels: list[dict], columns=None, width=10.0):
    """Dots side by side. A panel has `title`, `x` and `y` (axis labels), `sets` {name: (x values, y values)}, and may
    have `lines` {name: (x values, y values)}; `lines` named "" are grey, as for identity.
    """
    columns = columns or len(panels)
    count = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            count, columns, figsize=(width, count * width / columns * 0.85), layout="constrained", squeeze=False
        )
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for axis, panel in zip(axes.flat, panels, strict=False):
            for color, (name, (x, y)) in zip(ACCENTS, panel["sets"].items(), strict=False):
                axis.plot(x, y, "o", markersize=2.5, alpha=0.6, markeredgewidth=0, color=color, label=name)
            for color, (name, (x, y)) in zip(ACCENTS, panel.get("lines", {}).items(), strict=False):
                axis.plot(x, y, color=color if name else "0.6", linewidth=1.5 if name else 1, label=name or None)
            axis.set(title=panel.get("title", ""), xlabel=panel["x"], ylabel=panel["y"])
            _finish(axis, any(name for name in (*panel["sets"], *panel.get("lines", {}))), size=6)
    return fig


def crops(pictures: dict[str, np.ndarray], spacing, panels: list[dict]):
    """Small volumes (z, y, x), a row each: two slices across the bone's axis and two along it, over line plots.

    In true proportion and the house's grey window, `spacing` in mm (z, y, x), with a scale bar of 1 mm. `panels` are
    as for `scatter`, of which the lines are drawn.
    """
    ratio = max((v.shape[1] * spacing[1] + 0.6) / (v.shape[2] * spacing[2]) for v in pictures.values())
    rows = [2.5 * ratio] * len(pictures) + [2.5] * bool(panels)
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(10, sum(rows)), layout="constrained")
        fig.get_layout_engine().set(w_pad=0.1)  # inches; with less, the longest label of the line plots is cut
        grid = fig.add_gridspec(len(rows), 4 * max(len(panels), 1), height_ratios=rows)
        for i, (name, volume) in enumerate(pictures.items()):
            thirds = [[n // 3, 2 * n // 3] for n in volume.shape]
            cuts = [("across", volume[z]) for z in thirds[0]] + [("along", volume[:, y]) for y in thirds[1]]
            for j, (way, cut) in enumerate(cuts):
                axis = fig.add_subplot(grid[i, j * max(len(panels), 1) : (j + 1) * max(len(panels), 1)])
                high, wide = cut.shape[0] * spacing[1 if way == "across" else 0], cut.shape[1] * spacing[2]
                extent = (0, wide, high, 0)
                axis.imshow(cut, cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1], extent=extent, interpolation="none")
                axis.plot([0, 1], [high + 0.2] * 2, color=INK, linewidth=2, solid_capstyle="butt", clip_on=False)
                axis.text(1.1, high + 0.2, "1 mm", fontsize=7, va="center")
                axis.set(xlim=(0, wide), ylim=(high, 0), title=f"{name}, {way} the axis")
                axis.axis("off")
        for j, panel in enumerate(panels):
            axis = fig.add_subplot(grid[-1, 4 * j : 4 * j + 4])
            for color, (name, (x, y)) in zip(ACCENTS, panel["lines"].items(), strict=False):
                axis.plot(x, y, color=color, linewidth=1.5, label=name)
            axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
            _finish(axis)
    return fig


def paths(panels: list[dict], width=10.0):
    """Many lines side by side. A panel has `title`, `x` and `y` (axis labels), `at` (points,) and `lines` (n, points),
    thin but for the first of them, and may have `band` (low, high), a range in grey.
    """
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, len(panels), figsize=(width, width * 0.3), layout="constrained", squeeze=False)
        for axis, panel in zip(axes.flat, panels, strict=True):
            if "band" in panel:
                axis.axhspan(*panel["band"], color="0.93")
            for i, values in reversed(list(enumerate(panel["lines"]))):
                color, size = (ACCENTS[1], 2) if i == 0 else (ACCENTS[0], 0.7)
                axis.plot(panel["at"], values, "o-", color=color, linewidth=size, markersize=2 + (i == 0))
            axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
            _finish(axis, legend=False)
    return fig


def bands(panels: list[dict], at: str, width=10.0):
    """Curves with their intervals side by side. A panel has `title`, `x` and `y` (axis labels) and `lines`, {name: rows
    with value, low and high over the column `at`}; rows without a value are left out.
    """
    with plt.rc_context(STYLE):
        height = width / len(panels) * 0.62 + ROW_INCH * max(len(panel["lines"]) for panel in panels)
        fig, axes = plt.subplots(1, len(panels), figsize=(width, height), layout="constrained", squeeze=False)
        for axis, panel in zip(axes.flat, panels, strict=True):
            for i, (name, rows) in enumerate(panel["lines"].items()):
                kept = [row for row in rows if row["low"] is not None]
                known = [[float(row[key]) for key in (at, "value", "low", "high")] for row in kept]
                x, value, low, high = np.array(known).reshape(-1, 4).T
                style = dict(color=ACCENTS[i % len(ACCENTS)], linestyle=("-", "--")[i // len(ACCENTS) % 2])
                axis.plot(x, value, "o", markersize=3, linewidth=1.2, label=name, **style)
                if len(x) > 1:
                    axis.fill_between(x, low, high, alpha=0.15, color=style["color"], linewidth=0)
                else:
                    axis.vlines(x, low, high, color=style["color"], linewidth=1)
            axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
            axis.xaxis.get_major_locator().set_params(integer=True)
            _finish(axis)
    return fig


def film(path: str | Path, rows: list[tuple[str, list[np.ndarray]]], spacing, run: str) -> None:
    """Middle axial slices as an endless animated GIF: `rows` of (title, volumes (z, y, x)), side by side in a frame.

    The house's grey window, and as many frames as every row has volumes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = plane(rows[0][1][0], "axial").shape
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, len(rows), squeeze=False, layout="constrained")
        fig.set_size_inches(7, 7 / len(rows) * y * spacing[1] / (x * spacing[2]) + LABEL_INCH)
        fig.text(0.998, 0.002, run, ha="right", va="bottom", fontsize=5, color="0.6")
        shown = []
        for axis, (title, volumes) in zip(axes.flat, rows, strict=True):
            extent = (0, x * spacing[2], y * spacing[1], 0)
            first = plane(volumes[0], "axial")
            shown.append(axis.imshow(first, cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1], extent=extent))
            axis.set_title(title, loc="left", pad=3)
            axis.axis("off")
        writer = PillowWriter(fps=6)
        with writer.saving(fig, path, dpi=80):
            for i in range(len(rows[0][1])):
                for picture, (_, volumes) in zip(shown, rows, strict=True):
                    picture.set_data(plane(volumes[i], "axial"))
                writer.grab_frame()
        plt.close(fig)


def estimates(rows: list[dict], label: str, value: str, low: str, high: str, mark: str, xlabel: str):
    """One line a row: `value` with its interval `low` to `high` as a dot, and what was expected (`mark`) as a tick."""
    with plt.rc_context(STYLE):
        fig, axis = plt.subplots(figsize=(6, 0.19 * len(rows) + 0.6), layout="constrained")
        places = np.arange(len(rows))[::-1]
        values = np.array([[float(r[key]) for key in (value, low, high)] for r in rows])
        spread = np.abs(values[:, 1:].T - values[:, 0])
        axis.errorbar(values[:, 0], places, xerr=spread, fmt="o", markersize=3, linewidth=1, label=value)
        axis.plot([float(r[mark]) for r in rows], places, "|", markersize=9, markeredgewidth=2, label=mark)
        axis.axvline(0, color="0.85", linewidth=1, zorder=0)
        axis.set(yticks=places, yticklabels=[r[label] for r in rows], xlabel=xlabel)
        _finish(axis)
    return fig


def confusion(table: list[dict]):
    """Counts of `given` (rows) by the other columns of `table`, shaded by their share of the row."""
    columns = [key for key in table[0] if key != "given"]
    counts = np.array([[float(row[key]) for key in columns] for row in table])
    with plt.rc_context(STYLE):
        fig, axis = plt.subplots(figsize=(4, 3.4), layout="constrained")
        axis.imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1.3)
        for (i, j), count in np.ndenumerate(counts):
            axis.text(j, i, f"{count:.0f}", ha="center", va="center", color=INK if count else "0.7")
        names = [key.removeprefix("predicted ") for key in columns]
        axis.set(xticks=range(len(columns)), yticks=range(len(table)), xticklabels=names)
        axis.set(yticklabels=[row["given"] for row in table], xlabel="predicted", ylabel="given")
        axis.tick_params(length=0)
    return fig


def save(fig, path: str | Path, run: str, rows: list[dict] | None = None) -> None:
    """Write the figure as a PNG with its run id, and beside it the CSV of what it draws; the figure is closed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.text(0.998, 0.002, run, ha="right", va="bottom", fontsize=5, color="0.6")
    fig.savefig(path, dpi=130, metadata={"Software": None})
    if rows:
        write_table(path.with_suffix(".csv"), rows)
    plt.close(fig)
