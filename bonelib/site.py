"""Static pages of a run in OUT/site: notebooks, interactive volumes, films with a slider, and the paper (`make site`).

python -m bonelib.site [OUT], by default of the active profile. Nothing in them asks for anything elsewhere.
"""

import base64
import html
import io
import json
import re
import shutil
import sys
from pathlib import Path

from bonelib import InputError
from bonelib.core.cli import command
from bonelib.params import check_file

TITLE = "Synthetic HR-pQCT bones"
STYLE = """<style>
body {max-width: 980px; margin: 2em auto; padding: 0 1em; font: 16px/1.5 sans-serif; color: #1b1e23}
img {max-width: 100%} pre {overflow: auto; background: #f5f5f3; padding: .6em; font-size: 13px}
table {border-collapse: collapse; font-size: 14px; display: block; overflow: auto}
td, th {padding: .2em .6em; border-bottom: 1px solid #ddd; text-align: left} summary {color: #777; cursor: pointer}
</style>"""
KEPT = ("figures", "paper.pdf", "paper.csv")  # of a run, beside the pages


def render(notebook: dict, title: str) -> str:
    """An executed notebook as one HTML page; code is folded away, outputs are shown as they were kept."""
    from nbconvert.filters import markdown2html

    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(markdown2html(source))
            continue
        parts.append(f"<details><summary>code</summary><pre>{html.escape(source)}</pre></details>")
        parts += [_output(output, markdown2html) for output in cell.get("outputs", [])]
    return _page(title, '<p><a href="../index.html">all pages</a></p>' + "\n".join(parts))


def _output(output: dict, markdown2html) -> str:
    if output["output_type"] == "stream":
        return f"<pre>{html.escape(''.join(output['text']))}</pre>"
    data = {kind: "".join(value) for kind, value in output.get("data", {}).items() if isinstance(value, str | list)}
    for kind in ("image/png", "image/gif"):
        if kind in data:
            return f'<img src="data:{kind};base64,{data[kind].strip()}">'
    if "text/html" in data:
        return data["text/html"]
    if "text/markdown" in data:
        return markdown2html(data["text/markdown"])
    return f"<pre>{html.escape(data['text/plain'])}</pre>" if "text/plain" in data else ""


def _page(title: str, body: str) -> str:
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return f'<!doctype html><html lang="en"><head>{head}{STYLE}</head><body>{body}</body></html>\n'


def slider(film: Path, title: str) -> str:
    """A page on which a slider chooses among the frames of a film (GIF)."""
    from PIL import Image, ImageSequence

    frames = []
    with Image.open(film) as moving:
        for frame in ImageSequence.Iterator(moving):
            file = io.BytesIO()
            frame.convert("RGB").save(file, "png")
            frames.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    script = (
        f"<script>const frames = {json.dumps(frames)};"
        "document.getElementById('at').oninput = e => "
        "document.getElementById('frame').src = frames[e.target.value];</script>"
    )
    body = (
        f'<p><a href="../index.html">all pages</a></p><h1>{html.escape(title)}</h1>'
        f'<input id="at" type="range" min="0" max="{len(frames) - 1}" value="0" style="width:100%">'
        f'<img id="frame" src="{frames[0]}" style="width:100%">{script}'
    )
    return _page(title, body)


def write_site(out: str | Path) -> Path:
    """Write the pages of the run in `out` to `out`/site and return that folder.

    Raises `InputError` where no notebook was executed.
    """
    out = Path(out)
    notebooks = sorted((out / "notebooks").glob("*.ipynb"))
    if not notebooks:
        raise InputError(f"{out / 'notebooks'}: no executed notebooks; `make repro` or `make results` makes them")
    site = out / "site"
    shutil.rmtree(site, ignore_errors=True)
    (site / "notebooks").mkdir(parents=True)
    (site / "films").mkdir()
    for name in KEPT:
        if (out / name).is_dir():
            shutil.copytree(out / name, site / name)
        elif (out / name).is_file():
            shutil.copy2(out / name, site / name)
    pages = []
    for path in notebooks:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        target = site / "notebooks" / f"{path.stem}.html"
        target.write_text(_linked(render(notebook, path.stem), site), encoding="utf-8")
        pages.append((path.stem.replace("_", " "), f"notebooks/{target.name}"))
    bones = [_named(path, site) for path in sorted(site.glob("figures/**/explorer*.html"))]
    films = []
    for film in sorted(site.glob("figures/**/*.gif")):
        name = "-".join(film.relative_to(site / "figures").with_suffix("").parts)
        (site / "films" / f"{name}.html").write_text(slider(film, name.replace("_", " ")), encoding="utf-8")
        films.append((name.replace("_", " ").replace("-", ", "), f"films/{name}.html"))
    paper = [("the paper", "paper.pdf")] if (site / "paper.pdf").is_file() else []
    heads = {
        "Text": paper,
        "Interactive volumes": bones,
        "From one bone to another, with a slider": films,
        "Executed notebooks": pages,
    }
    lists = "".join(f"<h2>{head}</h2>{_links(links)}" for head, links in heads.items() if links)
    body = f"<h1>{TITLE}</h1>{lists}"
    (site / "index.html").write_text(_page(TITLE, body), encoding="utf-8")
    return site


def _linked(page: str, site: Path) -> str:
    """A page of a notebook without its links to pages that packed results leave out."""

    def kept(link):
        return link[0] if (site / link[1]).exists() else link[2]

    return re.sub(r'<a href="\.\./(figures/[^"]+)"[^>]*>(.*?)</a>', kept, page)


def _links(links):
    return "<ul>" + "".join(f'<li><a href="{to}">{html.escape(name)}</a></li>' for name, to in links) + "</ul>"


def _named(path: Path, site: Path) -> tuple[str, str]:
    where = path.relative_to(site)
    return ", ".join(part.replace("_", " ") for part in where.with_suffix("").parts[1:]), where.as_posix()


@command
def main() -> None:
    out = sys.argv[1] if len(sys.argv) > 1 else f"out/{check_file()['profile']}"
    print(f"{write_site(out) / 'index.html'}: open it in a browser")


if __name__ == "__main__":
    sys.exit(main())
