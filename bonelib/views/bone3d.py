"""One bone to look at: three slices as a picture, a volume to turn, and a page that needs no server and no network."""

import base64
import html
import io
from pathlib import Path

import k3d
import numpy as np
from PIL import Image, ImageDraw

from bonelib.core.files import write_whole
from bonelib.views.figures import WINDOW, on_grid

MODES = ("bone", "soft tissue", "surface")
SURFACE = 320.0  # mg HA/cm3, where the morphometry says bone begins
RANGE = (-400.0, 1200.0)  # mg HA/cm3, fixed: another range for every bone would hide how they differ
# Opacity over mg HA/cm3, by what shall be seen
OPACITY = {
    "bone": [(-400, 0.0), (250, 0.0), (500, 0.25), (900, 0.9), (1200, 1.0)],
    "soft tissue": [(-400, 0.0), (-150, 0.0), (-50, 0.06), (200, 0.1), (400, 0.35), (1200, 0.6)],
}
# Colours (red, green, blue) over the same range
COLOURS = {
    "bone": [(-400, 0.25, 0.18, 0.14), (300, 0.55, 0.44, 0.34), (700, 0.86, 0.78, 0.65), (1200, 1.0, 0.98, 0.92)],
    "soft tissue": [(-400, 0.3, 0.05, 0.05), (0, 0.7, 0.3, 0.25), (400, 0.85, 0.65, 0.5), (1200, 1.0, 0.98, 0.92)],
}
SAMPLES = 96  # along a ray; the default of 512 stalls where a processor draws
SCALE = 2  # pixels of a voxel in the picture
GAP = 6  # voxels between slices
BARS_MM = (10, 5, 2, 1)  # of which the longest that fits is drawn


def slices_png(voxels: np.ndarray, spacing, shape=None, at=(0.5, 0.5, 0.5)) -> bytes:
    """Axial, coronal and sagittal slice of (z, y, x) voxels in mg HA/cm3 as a PNG, cut at the shares `at` of (z, y, x).

    In one grey window, each with a bar of some mm; `spacing` in mm (z, y, x) is that of the grid `shape`, onto which a
    coarser volume is laid, so that a preview has the size of what follows.
    """
    z, y, x = shape = shape or voxels.shape
    i, j, k = (min(n - 1, int(n * share)) for n, share in zip(voxels.shape, at, strict=True))
    cuts = voxels[i, :, :], voxels[:, j, :], voxels[:, :, k].T
    cuts = [on_grid(np.clip(c, *WINDOW), s) for c, s in zip(cuts, ((y, x), (z, x), (y, z)), strict=True)]
    page = np.full((y + GAP + z, x + GAP + z), 255, np.uint8)
    for cut, (top, left) in zip(cuts, ((0, 0), (y + GAP, 0), (0, x + GAP)), strict=True):
        grey = 255 * (cut - WINDOW[0]) / (WINDOW[1] - WINDOW[0])
        page[top : top + cut.shape[0], left : left + cut.shape[1]] = grey.round()
    picture = Image.fromarray(page.repeat(SCALE, 0).repeat(SCALE, 1))
    pen = ImageDraw.Draw(picture)
    steps = spacing[2], spacing[2], spacing[0]
    for (top, left), (high, wide), mm in zip(
        ((0, 0), (y + GAP, 0), (0, x + GAP)), ((y, x), (z, x), (y, z)), steps, strict=True
    ):
        length = next((bar for bar in BARS_MM if bar <= 0.6 * wide * mm), BARS_MM[-1])
        at_x, at_y = (left + 3) * SCALE, (top + high - 4) * SCALE
        pen.line([(at_x, at_y), (at_x + length / mm * SCALE, at_y)], fill=255, width=4)
        pen.text((at_x, at_y - 16), f"{length} mm", fill=255)
    file = io.BytesIO()
    picture.save(file, "png", compress_level=1)
    return file.getvalue()


def plot3d(voxels: np.ndarray, spacing):
    """A k3d plot of (z, y, x) voxels in mg HA/cm3, spacing in mm: (plot, volume, surface); of the last two one is seen.

    Axes are in mm. The objects stay; `show_in_plot` gives them other voxels.
    """
    extent = [n * mm for n, mm in zip(voxels.shape[::-1], spacing[::-1], strict=True)]
    plot = k3d.plot(height=460, menu_visibility=False, camera_auto_fit=False, grid_auto_fit=False, axes_helper=0)
    plot.axes, plot.grid = ["x / mm", "y / mm", "z / mm"], [0, 0, 0, *extent]
    bounds, empty = [0, extent[0], 0, extent[1], 0, extent[2]], np.zeros((2, 2, 2), np.float16)
    body = k3d.volume(
        empty, color_range=list(RANGE), bounds=bounds, samples=SAMPLES, alpha_coef=60, compression_level=1, name="bone"
    )
    surface = k3d.marching_cubes(
        empty.astype(np.float32), SURFACE, color=0xE8DCC4, bounds=bounds, flat_shading=False, compression_level=1
    )
    plot += body
    plot += surface
    middle, far = np.array(extent) / 2, 1.5 * max(extent)  # clear of the colour bar
    plot.camera = [*(middle + far * np.array([0.35, -0.6, 0.75])), *middle, 0, 0, 1]
    show_in_plot(plot, body, surface, voxels, "bone")
    return plot, body, surface


def show_in_plot(plot, body, surface, voxels: np.ndarray, mode: str, clip: float = 1.0) -> None:
    """Give the objects of `plot3d` other voxels, or another look; what lies above the share `clip` of z is cut off.

    The surface is found in the browser, on every second voxel.
    """
    body.visible, surface.visible = mode != "surface", mode == "surface"
    if mode == "surface":
        surface.scalar_field = np.ascontiguousarray(voxels[::2, ::2, ::2], np.float32)
    else:
        if not np.array_equal(body.color_map, colours := _over_range(COLOURS[mode])):  # else the page draws thrice
            body.opacity_function, body.color_map = _over_range(OPACITY[mode]), colours
        body.volume = np.ascontiguousarray(voxels, np.float16)  # bytes would be sent as four times as many
    plot.clipping_planes = [[0, 0, -1, clip * plot.grid[5]]] if clip < 1 else []


def _over_range(points) -> np.ndarray:
    """Points (mg HA/cm3, ...) as k3d wants them: one row of numbers, the first of each a share of `RANGE`."""
    low, high = RANGE
    return np.array([n for density, *rest in points for n in ((density - low) / (high - low), *rest)], np.float32)


def table(rows: list[dict]) -> str:
    """Rows as a table in HTML."""
    names = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0]) if rows else ""
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f'<table style="text-align:left;border-spacing:8px 2px"><tr>{names}</tr>{cells}</table>'


def page(voxels: np.ndarray, spacing, title: str, rows: list[dict], recipe: str, path: str | Path) -> Path:
    """One HTML file with slices, numbers (`rows`, a table) and the volume to turn, without a request to anywhere."""
    plot, _, _ = plot3d(voxels, spacing)
    plot.snapshot_type, plot.menu_visibility, plot.name = "full", True, html.escape(title)
    try:
        text = plot.get_snapshot(9)
    finally:
        plot.close()
    picture = base64.b64encode(slices_png(voxels, spacing)).decode()
    side = (
        f'<div style="position:fixed;left:0;top:0;bottom:0;width:380px;overflow:auto;padding:12px;'
        f'box-sizing:border-box;background:#fff;font:13px sans-serif;z-index:9">'
        f'<h1 style="font-size:17px">{html.escape(title)}</h1>'
        f'<img style="width:100%" src="data:image/png;base64,{picture}">'
        f'{table(rows)}<pre style="white-space:pre-wrap">{html.escape(recipe)}</pre></div>'
    )
    text = text.replace("<body>", "<body>" + side, 1)
    text = text.replace("#canvasTarget {", "#canvasTarget { left: 380px; max-width: calc(100% - 380px);", 1)
    path = Path(path)
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
    return path
