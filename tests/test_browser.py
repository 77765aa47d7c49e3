"""What a person sees: the rating form, the offline page and the explorer in JupyterLab, in a headless Chromium.

Screenshots are kept in scratch/browser/ to be looked at.
"""

import csv
import secrets
import urllib.error
import urllib.request

import numpy as np
import pytest
from browser import CHROMIUM, PICTURES, RECIPE, drawn, fetched, lab, run_all, used, write_notebook
from test_site import run_folder

from bonelib import site
from bonelib.scans.volumes import read_volume
from bonelib.views import bone3d, form

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium")

CODES = ["bcdfg", "ghjkm", "zzxxz"]
MODEL = """
import torch
from bonelib.evaluation.features import random3d
from bonelib.latent.models import Model
from bonelib.networks.registry import build_generator
from bonelib.networks.config import ProGANConfig
from bonelib.views import explorer, scenes
import numpy as np
torch.manual_seed(0)
data = dict(intensity=[-500.0, 1500.0], spacing_mm=[0.5, 0.5, 0.5], unit="mgHA", stack_slices=8)
how = ProGANConfig(widths=(8, 8, 8, 8), latent=16, noise=0.5)
model = Model(build_generator(how).requires_grad_(False), None, {"data": data})
rng = np.random.default_rng(0)
features = np.concatenate([random3d(rng.random((1, 4, 36, 28), np.float32)) for _ in range(8)])
traits = {name: rng.normal(200, 20, 30) for name in scenes.TRAITS}
known = scenes.Cohort(traits, features, np.linspace(0.5, 1.5, 11))
"""
SHOW = 'explorer.show(scenes.synthesis({"tiny": ("models/tiny", model)}), known, "scratch/explorer.html");'


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
    rows = list(csv.DictReader(fetched(tmp_path / "downloads/ratings-Anna-b.csv").open(newline="")))
    assert [(r["form"], r["rater"], r["code"], r["score"]) for r in rows] == [
        ("f1", "Anna <b>", code, score) for code, score in zip(CODES, "415", strict=True)
    ]
    assert rows[0]["faults"] == "sharpness" and rows[1]["note"] == '\'=1+1, "<i>5</i>"'
    begin("Bert")
    page.wait(f"{where} == '1 of 3'")  # another rater begins anew


def test_a_visitor_of_the_site_turns_a_bone(page, tmp_path):
    z, y, x = np.mgrid[:8, :72, :56]
    radius = np.hypot((y - 36) / 26, (x - 28) / 20)
    bone = np.where(radius < 0.85, 150.0, np.where(radius < 1, 900.0, 0.0)).astype(np.float32)
    run = run_folder(tmp_path / "out")
    told = [{"what": "Tb.BMD", "value": "150"}]
    bone3d.page(bone, (0.5, 0.4, 0.4), "A bone", told, "recipe", run / "figures/01/explorer.html")
    page.open((site.write_site(run) / "index.html").as_uri())
    link = "document.querySelector('a[href$=\"explorer.html\"]')"
    page.wait(f"!!{link}")
    page.js(f"{link}.click()")
    page.wait("!!document.querySelector('#canvasTarget canvas')")
    before = drawn(page, "#canvasTarget")
    page.drag("#canvasTarget", 150)
    drawn(page, "#canvasTarget", unlike=before)
    page.picture(PICTURES / "page.png")
    assert not page.foreign()


def test_the_explorer_in_jupyterlab(page, tmp_path):
    write_notebook(tmp_path / "explorer.ipynb", MODEL, SHOW)
    token = secrets.token_hex(16)
    with lab(tmp_path, token) as address:
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/api/contents", timeout=30)
        run_all(page, address, token, "explorer.ipynb")
        volume = used(page, tmp_path, "explorer")
        assert "--seed 2 " in page.js(RECIPE)
        assert volume.shape == (8, 72, 56) and volume.spacing == pytest.approx((0.5, 0.5, 0.5))
        again = read_volume(tmp_path / "scratch/explorer/bone.nii.gz", unit="mgHA")
        assert (again.voxels == volume.voxels).all()
