"""The rating form: one page that needs no server and no network, and keeps every answer at once."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from bonelib.core.files import write_whole
from bonelib.studies.raters import CRITERIA
from bonelib.views.figures import WINDOW

GAP = 4  # voxels between slices
PAGE = Path(__file__).with_name("form.html")


def panel(volume: np.ndarray) -> np.ndarray:
    """What a rater sees of (z, y, x) voxels in mg HA/cm3, as grey levels (rows, columns) uint8.

    Side by side: axial slices at a quarter, half and three quarters of the depth, then two slices along the bone, at
    two fifths and half of the width, with the axis of the bone from left to right.
    """
    z, _, x = volume.shape
    cuts = [volume[z * i // 4] for i in (1, 2, 3)] + [volume[:, :, at].T for at in (2 * x // 5, x // 2)]
    wide = sum(cut.shape[1] for cut in cuts) + GAP * (len(cuts) - 1)
    picture, left = np.full((max(cut.shape[0] for cut in cuts), wide), np.nan, np.float32), 0
    for cut in cuts:
        picture[: cut.shape[0], left : left + cut.shape[1]] = cut
        left += cut.shape[1] + GAP
    grey = (picture - WINDOW[0]) / (WINDOW[1] - WINDOW[0])
    return (255 * np.nan_to_num(grey, nan=0.0).clip(0, 1)).round().astype(np.uint8)


def png(picture: np.ndarray) -> bytes:
    """Grey levels (rows, columns) uint8, or colours (rows, columns, 3), as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return file.getvalue()


def write_form(pictures: dict[str, np.ndarray], orders: list[list[str]], path: str | Path, form: str) -> Path:
    """The form of `pictures` {code: grey levels (rows, columns)}, in one of `orders` by the rater's name.

    `form` names it, so that answers to another form are not mixed in. Nothing but codes and pictures is in the file.
    """
    images = {code: base64.b64encode(png(picture)).decode() for code, picture in sorted(pictures.items())}
    data = dict(form=form, criteria=CRITERIA, orders=orders, pictures=images)
    text = PAGE.read_text(encoding="utf-8").replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1)
    path = Path(path)
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
    return path
