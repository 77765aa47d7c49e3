"""The first picture of `make repro`: a bone of each published model, drawn before anything else is computed.

python -m bonelib.first_look OUT

draws from the weights that the active profile names and prints the path of the picture.
"""

import sys
from pathlib import Path

from bonelib import InputError
from bonelib.core.config import fingerprint, section
from bonelib.core.parallel import die_with_parent
from bonelib.params import Published, Quality, check_file
from bonelib.store import fetch_files

BONES = 3  # of each model
FILE = "figures/first_look.png"


def first_look(out: str | Path, values: dict) -> Path:
    """Draw `BONES` bones of each published model of the active profile, truncated; returns the picture's path."""
    from bonelib.latent.models import calibrated, draw, load_model
    from bonelib.latent.sampling import of_kind
    from bonelib.views import figures

    own = values["profiles"][values["profile"]]
    quality = section(Quality, own["quality"], "quality")
    rows, spacing, known = [], None, []
    for name in values["models"]:
        wanted = section(Published, own["train"][name], f"train.{name}").published
        folder = fetch_files(name, wanted, Path("scratch/first_look") / name, f"train.{name}.published")
        model = load_model(folder)
        volumes = draw(model, BONES, values["seed"], of_kind(quality.truncation, name))
        drawn = [calibrated(v, model.config["data"]) for v in volumes]
        rows.append((name, [v.voxels for v in drawn]))
        spacing = drawn[0].spacing
        known.append(wanted)
    path = Path(out) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    figures.save(figures.bones(rows, spacing, width=5), str(path), fingerprint(known, values["seed"])[:8])
    return path


def main() -> int:
    die_with_parent()
    try:
        print(f"a first picture: {first_look(sys.argv[1], check_file())}", flush=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
