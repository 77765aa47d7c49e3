"""What a person sees: the rating form and the offline page, in a headless Chromium.

Screenshots are kept in scratch/browser/ to be looked at.
"""

import csv
import time
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, browser

from bonelib.views import bone3d, form

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "scratch/browser"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium")

CODES = ["bcdfg", "ghjkm", "zzxxz"]


@pytest.fixture
def page(tmp_path):
    PICTURES.mkdir(parents=True, exist_ok=True)
    with browser(tmp_path) as page:
        yield page
        assert not page.foreign() and not page.errors


def shown(number):
    rng = np.random.default_rng(number)
    return (120 + 60 * rng.random((72, 200))).astype(np.uint8)


def test_the_form_keeps_every_answer_and_goes_on_where_it_was(page, tmp_path):
    file = form.write_form({c: shown(i) for i, c in enumerate(CODES)}, [CODES] * 3, tmp_path / "form.html", "f1")

    def begin(name):
        page.open(file.as_uri())
        page.wait("!!document.getElementById('name') && document.readyState == 'complete'")
        page.js("document.getElementById('name').focus()")
        page.type(name)
        page.js("document.querySelector('#who button').click()")

    begin("Anna <b>")
    where = "document.getElementById('where').textContent"
    page.wait(f"{where} == '1 of 3'")
    first = page.js("document.getElementById('picture').src")
    assert page.js("document.getElementById('picture').naturalWidth") == 200
    page.js("document.querySelector('#faults input').click()")
    page.key("4")
    page.js("document.getElementById('next').click()")
    page.wait(f"{where} == '2 of 3'")
    assert page.js("document.getElementById('picture').src") != first
    page.js("document.getElementById('note').focus()")
    page.type('=1+1, "<i>5</i>"')
    page.js("document.querySelectorAll('#scores button')[0].click()")
    page.picture(PICTURES / "form.png")
    begin("Anna <b>")  # the page was closed and is opened again
    page.wait(f"{where} == '3 of 3'")
    page.key("5")
    page.wait("!document.getElementById('end').hidden")
    page.js("document.getElementById('save').click()")
    saved, end = tmp_path / "downloads/ratings-Anna-b.csv", time.time() + 20
    while not saved.is_file() and time.time() < end:
        time.sleep(0.1)
    rows = list(csv.DictReader(saved.open(newline="")))
    assert [(r["form"], r["rater"], r["code"], r["score"]) for r in rows] == [
        ("f1", "Anna <b>", code, score) for code, score in zip(CODES, "415", strict=True)
    ]
    assert rows[0]["faults"] == "sharpness" and rows[1]["note"] == '\'=1+1, "<i>5</i>"'
    begin("Bert")
    page.wait(f"{where} == '1 of 3'")  # another rater begins anew


def test_the_offline_page_shows_a_volume(page, tmp_path):
    z, y, x = np.mgrid[:8, :72, :56]
    radius = np.hypot((y - 36) / 26, (x - 28) / 20)
    bone = np.where(radius < 0.85, 150.0, np.where(radius < 1, 900.0, 0.0)).astype(np.float32)
    file = bone3d.page(
        bone, (0.5, 0.4, 0.4), "A bone", [{"what": "Tb.BMD", "value": "150"}], "recipe", tmp_path / "p.html"
    )
    page.open(file.as_uri())
    page.wait("!!document.querySelector('#canvasTarget canvas')")
    picture = drawn(page, "#canvasTarget")
    page.picture(PICTURES / "page.png")
    assert len(colours(picture)) > 50


def colours(png):
    from io import BytesIO

    from PIL import Image

    return {tuple(c) for c in np.asarray(Image.open(BytesIO(png)).convert("RGB")).reshape(-1, 3)[::7]}


def drawn(page, of, unlike=None, seconds=60):
    """A picture of an element as soon as it shows more than a few colours, and does not look like `unlike`."""
    end = time.time() + seconds
    while time.time() < end:
        picture = page.picture(of=of)
        if len(colours(picture)) > 50 and picture != unlike:
            return picture
        time.sleep(0.3)
    raise AssertionError(f"{of} did not change within {seconds} s")
