"""The explorer: a state means one bone, a recipe draws it again, nothing is left empty."""

import asyncio
import json
import shlex
import sys
import time

import ipywidgets as widgets
import numpy as np
import pytest
import torch

from bonelib import InputError
from bonelib.evaluation.features import random3d
from bonelib.latent import sampling
from bonelib.latent.models import Model, draw
from bonelib.networks.config import ProGANConfig, StyleGANConfig
from bonelib.networks.registry import build_generator
from bonelib.scans.volumes import Volume, read_volume
from bonelib.views import bone3d, explorer, form, scenes

DATA = dict(intensity=[-500.0, 1500.0], spacing_mm=[0.9, 0.8, 0.8], unit="mgHA", stack_slices=8)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    progan = ProGANConfig(widths=(8, 8, 8, 8), latent=16, noise=0.5)
    stylegan = StyleGANConfig(widths=(8, 8, 8, 8), latent=16, style=16, noise=0.1)
    made = {
        kind.kind: Model(build_generator(kind).requires_grad_(False), None, {"data": DATA})
        for kind in (progan, stylegan)
    }
    return {name: (f"models/{name}", model) for name, model in made.items()}


@pytest.fixture(scope="module")
def known():
    rng = np.random.default_rng(0)
    traits = {name: rng.normal(200, 20, 30) for name in scenes.TRAITS}
    features = np.concatenate([random3d(rng.random((1, 4, 36, 28), np.float32)) for _ in range(8)])
    return scenes.Cohort(traits, features, np.linspace(0.5, 1.5, 11))


def shell():
    """A bone of a cortex of 900 and an inside of 150 mg HA/cm3, as intensities."""
    z, y, x = np.mgrid[:8, :72, :56]
    radius = np.hypot((y - 36) / 26, (x - 28) / 20)
    density = np.where(radius < 0.85, 150.0, np.where(radius < 1, 900.0, 0.0))
    return ((density + 500) / 2000).astype(np.float32)


def test_a_state_means_one_bone_and_that_of_the_command_line(models):
    scene = scenes.synthesis(models)
    state = scenes.start(scene) | {"seed": 7, "truncation": 0.9}
    found = scenes.bone(scene, state)
    assert (found.values == scenes.bone(scene, dict(state)).values).all()
    assert (found.values == draw(models["progan"][1], 1, 7, 0.9)[0]).all()
    assert found.volume.spacing == (0.9, 0.8, 0.8) and found.volume.unit == "mgHA"
    for change in ({"seed": 8}, {"truncation": 1.0}, {"model": "stylegan"}):
        assert (scenes.bone(scene, state | change).values != found.values).any()


def test_each_model_begins_with_its_own_truncation(models):
    scene = scenes.synthesis(models, {"progan": 1.8, "stylegan": 0.7})
    assert scene.controls["truncation"].start == 1.8 and scene.presets["model", "stylegan"] == {"truncation": 0.7}

    async def session():
        box = explorer.controls(scene, None, (scenes.bone(scene, scenes.start(scene)), [{"what": ""}]))
        slider = {getattr(w, "description", ""): w for w in walk(box) if hasattr(w, "value")}
        slider["model"].value = "stylegan"
        assert slider["truncation ψ"].value == 0.7

    asyncio.run(session())


def test_a_preview_is_the_same_bone_on_a_coarser_grid(models):
    scene = scenes.synthesis(models)
    found, coarse = (scenes.bone(scene, scenes.start(scene), preview) for preview in (False, True))
    assert found.volume.shape == (8, 72, 56) and coarse.volume.shape == (2, 18, 14)
    assert coarse.volume.extent_mm == pytest.approx(found.volume.extent_mm)


def test_ends_mixtures_and_edits_mean_what_they_say(models):
    model = models["stylegan"][1]
    codes = {name: sampling.sampled_code(model, i).repeat(9, 1) for i, name in enumerate("ab")}
    scene = scenes.transition("m", model, codes)
    for share, name in ((0.0, "a"), (1.0, "b")):
        assert torch.equal(scene.code(scenes.start(scene) | {"share": share})[1][0], codes[name])
    scene = scenes.mixing("m", model, codes)
    mixed = scene.code(scenes.start(scene) | {"crossover": 3})[1][0]
    assert torch.equal(mixed[:3], codes["a"][:3]) and torch.equal(mixed[3:], codes["b"][3:])
    direction = torch.ones_like(codes["a"])
    scene = scenes.editing("m", model, codes, {"Tb.BMD / mg": (direction, -20.0, 20.0)})
    assert torch.equal(scene.code(scenes.start(scene))[1][0], codes["a"])
    assert torch.allclose(scene.code(scenes.start(scene) | {"edit0": 5.0})[1][0], codes["a"] + 5)
    assert not torch.equal(codes["a"], codes["b"])  # no view has changed its codes
    flat = sampling.sampled_code(models["progan"][1], 1)[0]
    with pytest.raises(InputError, match="one row a style"):
        scenes.mixing("m", models["progan"][1], {"a": flat, "b": flat})
    with pytest.raises(InputError, match="a transition needs 2 codes, and 1"):
        scenes.transition("m", model, {"a": codes["a"]})


def test_a_recipe_draws_exactly_the_bone_again(models, tmp_path, monkeypatch):
    codes = {str(i): sampling.sampled_code(models["progan"][1], i)[0] for i in range(2)}
    monkeypatch.setattr(sampling, "load_model", lambda folder: models["progan"][1])
    for scene, name in (
        (scenes.synthesis(models, 1.3), "sample-1-0000.nii.gz"),
        (scenes.transition("models/progan", models["progan"][1], codes, seed=4), None),
    ):
        state = scenes.start(scene)
        command = shlex.split(scenes.recipe(scene, state, tmp_path))
        assert command[:4] == ["python", "-m", "bonelib.latent.sampling", "models/progan"]
        monkeypatch.setattr(sys, "argv", command[2:])
        assert sampling.main() == 0
        file = (
            tmp_path
            / "again"
            / (name or command[command.index("--codes") + 1].split("/")[-1].replace(".safetensors", "-0000.nii.gz"))
        )
        again = read_volume(file, unit="mgHA")
        assert (again.voxels == np.rint(scenes.bone(scene, state).volume.voxels)).all()
        assert again.spacing == pytest.approx((0.9, 0.8, 0.8))


def test_readings_measure_the_bone_and_say_where_it_stands(known):
    found = scenes.Bone(Volume(shell() * 2000 - 500, (0.9, 0.8, 0.8)), shell(), 0.1)
    rows = {row["what"]: row for row in scenes.readings(found, known)}
    assert float(rows["Tb.BMD"]["value"]) == pytest.approx(150, abs=40)
    assert float(rows["Ct.Th"]["value"]) == pytest.approx(2.7, abs=1.0)
    below = np.mean(known.traits["Tb.BMD"] < float(rows["Tb.BMD"]["value"]))
    assert rows["Tb.BMD"]["real ones below"] == f"{100 * below:.0f} % of 30"
    assert np.isfinite(float(rows[scenes.REALISM]["value"]))
    empty = scenes.Bone(found.volume.with_voxels(np.zeros((8, 72, 56), np.float32)), 0 * shell() + 0.25, 0.1)
    assert scenes.readings(empty, known)[0] == {
        "what": "Tb.BMD",
        "value": "nan",
        "unit": "mg HA/cm³",
        "real ones below": "no contour found",
    }


@pytest.mark.parametrize(
    "name", ["../bone", "a/b", "/tmp/bone", ".bone", "", "x" * 61, "a\\b", "bone.nii", "a b", "<b>"]
)
def test_a_file_name_stays_in_its_folder(name, tmp_path):
    with pytest.raises(InputError, match="file name"):
        explorer.confined(tmp_path, name, ".nii.gz")
    assert explorer.confined(tmp_path, "bone-1_a", ".html") == tmp_path / "bone-1_a.html"


def test_a_page_needs_nobody_and_escapes_what_it_is_told(tmp_path):
    rows = [{"what": "<script>x</script>", "value": "1"}]
    path = bone3d.page(shell() * 2000 - 500, (0.9, 0.8, 0.8), "<i>t</i>", rows, "a < b & c", tmp_path / "p.html")
    text = path.read_text()
    assert (
        "<script>x</script>" not in text
        and "&lt;script&gt;x" in text
        and "&lt;i&gt;t" in text
        and "a &lt; b &amp; c" in text
    )
    assert not any(part in text for part in ('src="http', "src='http", 'href="http', "@import"))
    assert [p.name for p in tmp_path.iterdir()] == ["p.html"]


def test_slices_follow_the_cut_and_keep_their_size():
    voxels = shell() * 2000 - 500
    middle, aside = (bone3d.slices_png(voxels, (0.9, 0.8, 0.8), at=at) for at in ((0.5, 0.5, 0.5), (0.5, 0.1, 0.5)))
    assert middle != aside and middle[:4] == b"\x89PNG"
    coarse = bone3d.slices_png(voxels[::2, ::4, ::4], (0.9, 0.8, 0.8), voxels.shape)
    assert middle[16:24] == coarse[16:24]  # width and height


def walk(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from walk(child)


def test_the_widgets_follow_a_slider_and_write_into_one_folder(models, known, tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "PAUSE_S", 0.01)
    scene = scenes.synthesis({"progan": models["progan"]})

    async def until(there):
        end = time.time() + 20
        while not there():
            assert time.time() < end
            await asyncio.sleep(0.02)

    async def session():
        box = explorer.controls(scene, known, folder=tmp_path)
        found = list(walk(box))
        picture = next(w for w in found if isinstance(w, widgets.Image))
        seed = next(w for w in found if isinstance(w, widgets.IntSlider))
        text = next(w for w in found if isinstance(w, widgets.Textarea))
        reset = next(w for w in found if isinstance(w, widgets.Button))
        before = picture.value
        seed.value = 12
        preview = picture.value
        assert preview != before and "--seed 1 " in text.value
        await until(lambda: "--seed 12 " in text.value)
        assert picture.value not in (before, preview) and not reset.disabled
        reset.click()
        await until(lambda: "--seed 1 " in text.value)
        assert seed.value == 1 and picture.value == before and reset.disabled
        press = {w.description: w for w in found if isinstance(w, widgets.Button)}
        name = next(w for w in found if isinstance(w, widgets.Text) and w.description == "file name")
        says = [w for w in found if isinstance(w, widgets.HTML)][-1]
        seed.value = 30
        for label in ("NIfTI", "page"):  # pressed before the bone is drawn, they wait for it
            press[label].click()
        assert "--seed 30 " in text.value and "--seed 30 " in (tmp_path / "bone.html").read_text()
        next(w for w in found if isinstance(w, widgets.BoundedIntText)).value = 2
        press["batch"].click()
        assert "2 volumes" in says.value
        name.value = "../<b>out</b>"
        press["NIfTI"].click()
        assert "&lt;b&gt;" in says.value and "<b>out" not in says.value

    asyncio.run(session())
    made = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert made == {
        "bone.nii.gz",
        "bone.html",
        *(f"bone/{n}" for n in ("morphometry.tsv", "sample-30-0000.nii.gz", "sample-30-0001.nii.gz")),
    }
    kept = read_volume(tmp_path / "bone.nii.gz", unit="mgHA")
    assert (kept.voxels == np.rint(scenes.bone(scene, scenes.start(scene) | {"seed": 30}).volume.voxels)).all()
    assert kept.spacing == pytest.approx((0.9, 0.8, 0.8))


def test_without_anybody_there_a_picture_and_a_link_are_left(models, known, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(explorer, "display", shown.append)
    monkeypatch.setenv("BONELIB_NOTEBOOK", str(tmp_path / "notebooks/04.ipynb"))
    scene = scenes.synthesis(models)
    explorer.show(scene, known, tmp_path / "figures/04/explorer.html")
    assert [type(s).__name__ for s in shown] == ["Image", "HTML"] and 'href="../figures/04/explorer.html"' in shown[
        1
    ].data
    assert (tmp_path / "figures/04/explorer.html").stat().st_size > 1e6


def test_the_form_holds_pictures_under_codes_and_nothing_of_the_key(tmp_path):
    picture = form.panel(shell() * 2000 - 500)
    assert picture.dtype == np.uint8 and picture.shape == (72, 3 * 56 + 2 * 8 + 4 * form.GAP)
    path = form.write_form(
        {"bcdfg": picture, "zzzzz": picture}, [["zzzzz", "bcdfg"]], tmp_path / "form.html", "</script>"
    )
    text = path.read_text()
    data = text.split('type="application/json">')[1].split("</script>")[0]
    assert json.loads(data)["orders"] == [["zzzzz", "bcdfg"]] and json.loads(data)["form"] == "</script>"
    assert not any(word in text for word in ("progan", "phantom", "http:", "https:"))
