"""Static pages of a run, and results that come with the repository."""

import json
import re
import subprocess
from base64 import b64decode, b64encode
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from bonelib import InputError, results, site


def png(picture):
    """A picture in base64."""
    found = BytesIO()
    picture.save(found, "PNG")
    return b64encode(found.getvalue()).decode()


GREY = png(Image.linear_gradient("L").convert("RGBA"))


def pixels_and_rest(notebook):
    """The values of every picture of a notebook, and all else that it holds."""
    found, values = json.loads(notebook), []
    for output in (output for cell in found["cells"] for output in cell.get("outputs", [])):
        if picture := output.get("data", {}).pop("image/png", None):
            values.append(list(Image.open(BytesIO(b64decode(picture))).convert("RGB").tobytes()))
    assert values
    return values, found


def run_folder(folder):
    """A run with one executed notebook, a film of three frames, a page of a bone, and a paper."""
    cells = [
        {"cell_type": "markdown", "source": ["# A title\n", "and *text*"]},
        {
            "cell_type": "code",
            "source": ["x = 1 < 2"],
            "outputs": [
                {"output_type": "stream", "text": ["a <b> line\n"]},
                {"output_type": "display_data", "data": {"image/png": GREY, "text/plain": ["<Figure>"]}},
                {
                    "output_type": "execute_result",
                    "data": {"text/markdown": ["| a | b |\n", "|---|---|\n", "| 1 | 2 |"]},
                },
                {
                    "output_type": "display_data",
                    "data": {"text/html": ['<a href="../figures/01/explorer.html">turn</a>']},
                },
            ],
        },
    ]
    (folder / "notebooks").mkdir(parents=True)
    (folder / "notebooks/01_some.ipynb").write_text(json.dumps({"cells": cells}))
    (folder / "figures/01").mkdir(parents=True)
    (folder / "figures/01/explorer.html").write_text("<html></html>")
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 100, 200)]
    frames[0].save(folder / "figures/01/film.gif", save_all=True, append_images=frames[1:])
    (folder / "metrics").mkdir()
    (folder / "metrics/01_some.json").write_text("{}")
    (folder / "paper.pdf").write_bytes(b"%PDF")
    return folder


def test_pages_hold_what_a_notebook_showed_and_ask_for_nothing_elsewhere(tmp_path):
    made = site.write_site(run_folder(tmp_path / "out"))
    page = (made / "notebooks/01_some.html").read_text()
    for part in (
        "A title",
        "<em>text</em>",
        "x = 1 &lt; 2",
        "a &lt;b&gt; line",
        "data:image/png;base64,iVBOR",
        "<td>1</td>",
    ):
        assert part in page
    for file in made.glob("**/*.html"):
        text = file.read_text()
        assert not re.search(r"(?:src|href)=[\"'](?:https?:)?//", text)
        for link in re.findall(r'href="([^"#]+)"', text):
            assert (file.parent / link).is_file(), (file, link)


def test_a_slider_has_every_frame_of_a_film(tmp_path):
    made = site.write_site(run_folder(tmp_path / "out"))
    text = (made / "films/01-film.html").read_text()
    assert 'max="2"' in text and len(set(re.findall(r"data:image/png;base64,[\w+/=]+", text))) == 3


def test_without_notebooks_there_is_no_site(tmp_path):
    with pytest.raises(InputError, match="no executed notebooks"):
        site.write_site(tmp_path)


def test_packed_results_are_laid_out_as_they_were(tmp_path, monkeypatch):
    out = run_folder(tmp_path / "repository/out/laptop")
    monkeypatch.chdir(tmp_path / "repository")
    (tmp_path / "repository/.dvc").mkdir()
    (tmp_path / "repository/.dvc/config").write_text("['remote \"published\"']\n    url = ../dvc-store\n")
    subprocess.run(["git", "init", "-q"], check=True)
    notebook = out / "notebooks/01_some.ipynb"
    warning = {"output_type": "stream", "text": [f"{tmp_path}/repository/bonelib/x.py:1: a warning"]}
    cells = [*json.loads(notebook.read_text())["cells"], {"cell_type": "code", "source": [], "outputs": [warning]}]
    notebook.write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(results, "LARGEST", 10)
    with pytest.raises(InputError, match="accepted are at most"):
        results.pack("out/laptop")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "repository")
    results.pack("out/laptop")
    laid = results.lay_out("out/results")
    names = {path.relative_to(out) for path in out.rglob("*") if path.is_file() and path.name != "explorer.html"}
    assert names == {path.relative_to(laid) for path in laid.rglob("*") if path.is_file()}
    assert "bonelib/x.py:1: a warning" in (laid / "notebooks/01_some.ipynb").read_text()
    for name in names:
        was = (out / name).read_bytes().replace(f"{tmp_path}/repository/".encode(), b"")
        if name.suffix == ".ipynb":
            (packed, rest), (values, others) = (pixels_and_rest(one) for one in ((laid / name).read_bytes(), was))
            assert rest == others and len(packed) == len(values)
            changes = np.concatenate([np.subtract(a, b) for a, b in zip(packed, values, strict=True)])
            assert np.abs(changes).max() <= results.ALIKE
        else:
            assert (laid / name).read_bytes() == was
        assert str(tmp_path).encode() not in (laid / name).read_bytes()
    (out / "paper.pdf").unlink()
    with pytest.raises(InputError, match="only a run that reached the paper"):
        results.pack("out/laptop")
