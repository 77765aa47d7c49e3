"""How fast the explorer follows a hand at full size, and what 200 updates leave in memory: in JupyterLab and Chromium.

python tests/bench_explorer.py [MODEL_FOLDER] [--moves 10] [--updates 200]

Without a model folder a small generator with random weights draws 32x288x224 voxels. Prints a table; nothing is judged,
as the seconds are those of the machine.
"""

import argparse
import os
import re
import secrets
import statistics
import tempfile
import time
from pathlib import Path

from browser import browser, lab, run_all, write_notebook

SETUP = """
import os
from pathlib import Path
import numpy as np
import torch
from bonelib.evaluation.features import random3d
from bonelib.latent.models import Model, load_model
from bonelib.networks import build_generator
from bonelib.params import Generator
from bonelib.core.parallel import map_large_blocks
from bonelib.views import explorer, scenes
map_large_blocks()  # as `nb.root` has it in every notebook
Path("kernel.pid").write_text(str(os.getpid()))
torch.manual_seed(0)
folder = {folder!r}
data = dict(intensity=[-500.0, 1500.0], spacing_mm=[0.1214] * 3, unit="mgHA", stack_slices=32)
how = Generator(kind="progan", widths=(8,) * 6, latent=16, noise=0.5)
model = load_model(folder) if folder else Model(build_generator(how).requires_grad_(False), None, {{"data": data}})
rng = np.random.default_rng(0)
features = np.concatenate([random3d(rng.random((1, 16, 144, 112), np.float32)) for _ in range(8)])
known = scenes.Cohort({{name: rng.normal(200, 20, 30) for name in scenes.TRAITS}}, features, np.linspace(0.5, 1.5, 11))
explorer.show(scenes.synthesis({{"model": (folder or "models/small", model)}}), known, "scratch/explorer.html");
"""
# When keys were pressed, pictures were loaded, and a new volume was drawn to the end, by the page's clock
WATCH = """
window.seen = {keys: [], pictures: [], volumes: []};
addEventListener("keydown", () => seen.keys.push(performance.now()), true);
document.addEventListener("load", e => {
    if (e.target.tagName === "IMG" && e.target.closest(".jp-OutputArea")) seen.pictures.push(performance.now());
}, true);
for (const name of ["texImage3D", "texSubImage3D"]) {
    const upload = WebGL2RenderingContext.prototype[name];
    WebGL2RenderingContext.prototype[name] = function (...given) {
        if (!this.fresh) {
            this.fresh = performance.now();
            queueMicrotask(() => {  // all of this frame has been asked for; reading waits until it is drawn
                this.readPixels(0, 0, 1, 1, this.RGBA, this.UNSIGNED_BYTE, new Uint8Array(4));
                seen.volumes.push([this.fresh, performance.now()]);
                this.fresh = 0;
            });
        }
        return upload.apply(this, given);
    };
}
"""
STATUS = "[...document.querySelectorAll('.jp-OutputArea .widget-html-content')].map(c => c.textContent).join(' ')"
RECIPE = "document.querySelector('.jp-OutputArea textarea').value"


def descendants(pid):
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def megabytes(pid):
    """Memory of a process, its share of shared pages included."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+)", text, re.M)[1]) / 1024


def seconds(pid):
    """Processor time of a process so far, which does not depend on what else the machine does."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def of_each(page, kernel, what):
    """`what`(process id) of the kernel, of the page's own processes and of the one that draws for it."""
    found = {"kernel": what(kernel), "page": 0.0, "drawing": 0.0}
    for pid in descendants(page.process):
        command = Path(f"/proc/{pid}/cmdline").read_text()
        if "--type=renderer" in command:
            found["page"] += what(pid)
        elif "--type=gpu-process" in command:
            found["drawing"] += what(pid)
    return found


def memory(page, kernel):
    page.call("HeapProfiler.collectGarbage")
    return of_each(page, kernel, megabytes)


def update(page, kernel, key="ArrowRight", code=39):
    """Press a key on the first slider and wait until the bone is drawn, shown and measured; what it took."""
    before = page.js(RECIPE)
    page.js("seen.keys = []; seen.pictures = []; seen.volumes = []")
    page.js("document.querySelector('.noUi-handle').focus()")
    spent = of_each(page, kernel, seconds)
    page.key(key, code)
    for there in (f"{RECIPE} != {before!r}", f"/measured in/.test({STATUS})", "seen.volumes.length > 0"):
        page.wait(there, 120)  # one after the other, so that a failure names what has not come
    seen = page.js("seen")
    said = [float(s) for s in re.findall(r"([\d.]+) s", page.js(STATUS))]
    key, (finished, preview, shown, measured) = seen["keys"][-1], said[-4:]
    times = {
        "slices, key to picture": (seen["pictures"][0] - key) / 1000,
        "  of which the generator's preview": preview,
        "3D view, key to drawn": (seen["volumes"][-1][1] - key) / 1000,
        "  of which the page draws": sum(end - begin for begin, end in seen["volumes"]) / 1000,
        "  of which the generator": preview + finished,
        "  of which handing over the volume": shown,
        "readings": measured,
    }
    times["slices without the generator"] = times["slices, key to picture"] - preview
    times["3D view without the generator"] = times["3D view, key to drawn"] - preview - finished
    spent = {name: value - spent[name] for name, value in of_each(page, kernel, seconds).items()}
    return times | {f"processor time, {name}": value for name, value in spent.items()}


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("model", nargs="?", type=Path)
    cli.add_argument("--moves", type=int, default=10)
    cli.add_argument("--updates", type=int, default=200)
    cli.add_argument("--picture", type=Path)
    args = cli.parse_args()
    token, place = secrets.token_hex(16), tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with place as folder, lab(folder := Path(folder), token) as address, browser(folder / "browser") as page:
        text = SETUP.format(folder=str(args.model.resolve()) if args.model else "")
        write_notebook(folder / "bench.ipynb", text)
        page.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        run_all(page, address, token, "bench.ipynb")
        page.wait("!!document.querySelector('.jp-OutputArea canvas') && window.seen.volumes.length > 0", 240)
        kernel = int((folder / "kernel.pid").read_text())
        found = [update(page, kernel) for _ in range(args.moves + 1)][1:]  # the first one warms up
        for name in found[0] if found else ():
            values = [row[name] for row in found]
            print(f"{name:40} median {statistics.median(values):5.2f} s, worst {max(values):5.2f} s of {len(values)}")
        if args.picture:
            page.picture(args.picture)
        for _ in range(3):
            update(page, kernel)
        first = memory(page, kernel)
        for i in range(1, args.updates + 1):  # to and fro, as kept volumes cost no drawing; now and then a new one
            update(page, kernel, *(("ArrowLeft", 37) if i % 2 == 0 and i % 10 else ("ArrowRight", 39)))
            if i % 25 == 0 or i == args.updates:
                grown = {name: size - first[name] for name, size in memory(page, kernel).items()}
                says = ", ".join(f"{name} {first[name]:.0f} {by:+.0f} MB" for name, by in grown.items())
                print(f"{time.strftime('%H:%M:%S')} after {i} updates: {says}", flush=True)
        print(f"errors in the console: {page.errors}, requests elsewhere: {page.foreign()}")


if __name__ == "__main__":
    main()
