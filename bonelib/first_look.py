"""The first picture of `make repro`: a bone of each published model of the active profile (`... first_look OUT`)."""

import sys
from pathlib import Path

from bonelib.core.cli import command
from bonelib.core.config import fingerprint, section
from bonelib.core.parallel import die_with_parent
from bonelib.params import check_file
from bonelib.store import fetch_files
from bonelib.training.config import Published, training_section

BONES = 1  # of each model; more would keep a reader waiting
FILE = "figures/first_look.png"


def first_look(out: str | Path, values: dict) -> Path:
    """Draw `BONES` bones of each published model, truncated; returns the picture's path."""
    from bonelib.latent.models import calibrated, read_config
    from bonelib.latent.sampling import draw_settings, setting
    from bonelib.views import figures

    own = values["profiles"][values["profile"]]
    known = {m: section(Published, own["train"][m], f"train.{m}").published for m in values["models"]}
    folders = {
        name: fetch_files(name, wanted, Path("scratch/first_look") / name, f"train.{name}.published")
        for name, wanted in known.items()
    }
    configs = {name: read_config(folder, "train", "data") for name, folder in folders.items()}
    how = {name: training_section(config["train"], "train", name) for name, config in configs.items()}
    chosen = {name: (name, how[name].generator.truncation) for name in folders}
    drawn = draw_settings(folders, {key: BONES for key in chosen.values()}, values["seed"])
    data = {name: config["data"] for name, config in configs.items()}
    rows = [
        (name, [calibrated(v.astype("float32"), data[name]).voxels for v in drawn[setting(*key)]])
        for name, key in chosen.items()
    ]
    spacing = next(iter(data.values()))["spacing_mm"]
    path = Path(out) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = figures.bones(rows, spacing, width=2.5 * BONES)
    figures.save(picture, str(path), fingerprint(known, values["seed"])[:8])
    return path


@command
def main() -> None:
    die_with_parent()
    print(f"a first picture: {first_look(sys.argv[1], check_file())}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
