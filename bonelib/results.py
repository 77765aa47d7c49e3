"""Results of a long run that come with the repository: packed by whoever ran it, laid out by `make results`.

python -m bonelib.results                lays them out in out/results, without running anything
python -m bonelib.results --pack OUT     puts notebooks, metrics, papers and films of a run into dvc-store/
"""

import argparse
import fnmatch
import json
import shutil
import sys
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from bonelib import InputError
from bonelib.core.cli import command
from bonelib.store import fetch_files, pointer, published_hash

NAME = "results"  # in published/
TARGET = Path("out/results")
PARTS = ("notebooks", "figures", "metrics", "*.pdf", "paper*.csv")
TURNED = "04_image_quality"  # whose bone to turn is packed; another page of that kind is 6 MB each
LARGEST = 60_000_000  # bytes in all
ALIKE = 4  # of 255


def pack(out: str | Path) -> str:
    """Put the results of a run into the store, to be committed; returns their hash.

    Raises `InputError` where a run is not whole or more than `LARGEST`.
    """
    from bonelib.published import put

    out, folder = Path(out), pointer(NAME).with_suffix("")
    if not (out / "paper.pdf").is_file():
        raise InputError(f"{out / 'paper.pdf'}: no such file; only a run that reached the paper is packed")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in (path for pattern in PARTS for path in sorted(out.glob(pattern))):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=_left_out)
        else:
            shutil.copy2(path, folder / path.name)
    root = f"{out.resolve().parents[1]}/"  # which warnings name, and which is of this machine alone
    for path in folder.glob("notebooks/*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8").replace(root, ""))
        for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = _smaller(output["data"]["image/png"])
        path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if (size := sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())) > LARGEST:
        shutil.rmtree(folder)
        raise InputError(f"{out}: {size / 1e6:.0f} MB of results; accepted are at most {LARGEST / 1e6:.0f} MB")
    return put(NAME)


def _smaller(picture: str) -> str:
    """A PNG in base64 in fewer bytes: without an alpha channel, and of fewer levels, which change no value by more than
    `ALIKE`, as a palette where that is enough."""
    values, step = np.asarray(Image.open(BytesIO(b64decode(picture))).convert("RGB")), 2 * ALIKE + 1
    rounded = (values.astype(int) + ALIKE) // step * step
    pixels, found = Image.fromarray(np.where(values > 255 - ALIKE, 255, rounded).astype(np.uint8)), BytesIO()
    if colours := pixels.getcolors(256):
        pixels = pixels.quantize(len(colours), dither=Image.Dither.NONE)
    pixels.save(found, "PNG", optimize=True)
    return min(picture, b64encode(found.getvalue()).decode(), key=len)


def _left_out(folder: str, names: list[str]) -> set[str]:
    """Pictures, which the notebooks hold already, and bones to turn but for those of one stage."""
    pages = [] if Path(folder).name == TURNED else fnmatch.filter(names, "explorer*.html")
    return {*fnmatch.filter(names, "*.png"), *pages}


def lay_out(target: str | Path = TARGET) -> Path:
    """Copy the packed results to `target`, in place of what was there; returns it."""
    shutil.rmtree(target, ignore_errors=True)
    return fetch_files(NAME, published_hash(NAME), target, NAME)


@command
def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--pack", type=Path, metavar="OUT")
    args = cli.parse_args()
    if args.pack:
        print(f"{args.pack} is packed as {pack(args.pack)}; commit dvc-store/ and published/{NAME}.dvc")
    else:
        print(f"results are in {lay_out()}: paper.pdf, notebooks/, figures/, metrics/")


if __name__ == "__main__":
    sys.exit(main())
