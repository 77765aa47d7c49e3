"""Weights that come with the repository, in place of a training.

python -m bonelib.published MODEL_FOLDER NAME --audit METRICS_FILE

puts a model folder into dvc-store/, a small DVC remote that is committed with the code. It checks the folder, asks the
privacy audit of these very weights (metrics/S5_privacy.json of the profile they were made in), copies them to
published/NAME, lets DVC write its hash to published/NAME.dvc, and names it in the profile `published` of
params.yaml, which uses these weights for the model NAME. What it changed is then to be committed.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from bonelib import InputError
from bonelib.core.cli import command
from bonelib.core.config import section
from bonelib.core.files import digest
from bonelib.latent.models import load_model
from bonelib.training.config import Published, Train

LARGEST = 16_000_000  # bytes of a file
FILES = {"config.json", "curves.csv", "candidates.csv", "record.json", "superres-record.json"} | {
    f"{name}.safetensors" for name in ("generator", "critic", "superres", "superres-critic", "growth")
}
REMOTE = "published"  # in .dvc/config
STORE = Path("dvc-store/files/md5")
GRID = ("spacing_mm", "intensity", "shape")  # what a model and the stacks beside it must share


def fetch(name: str, given: dict, folder: str | Path, data: dict) -> Train:
    """Copy the published model `name` to `folder` and return how it was trained.

    `given` is its section of params.yaml (`Published`), `data` the `meta` of the stacks that it will be compared with.
    Raises `InputError` if there is no such model, if it is not the one that params.yaml names, if a file is damaged,
    or if it draws another grid than that of the stacks.
    """
    folder, wanted = Path(folder), section(Published, given, f"train.{name}").published
    found = _hash(name)
    if found != wanted:
        raise InputError(f"params.yaml: train.{name}.published: found {wanted}, but {_pointer(name)} holds {found}")
    import dvc.api

    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    dvc.api.DVCFileSystem().get(str(_pointer(name).with_suffix("")), str(folder), recursive=True)
    config = _checked(folder)
    for key in GRID:
        if config["data"][key] != data[key]:
            says = f"was trained on {key} {config['data'][key]}, but that of the stacks is {data[key]}"
            raise InputError(f"{_pointer(name)}: the model {says}; train one of your own in another profile")
    return section(Train, config["train"], f"{folder / 'config.json'}: train")


def publish(folder: str | Path, name: str, audit: str | Path, say=print) -> str:
    """Put the model in `folder` into the store of the repository that is the working folder; returns its hash.

    `audit` is the metrics file of the stage `privacy`, where the model bears the name of its folder. Raises
    `InputError` for a folder that is not one whole model, a file that is too large to be committed, and weights that
    `require_release` does not let pass.
    """
    folder, target = Path(folder), _pointer(name).with_suffix("")
    weights = _checked(folder)["sha256"]
    load_model(folder)
    for path in sorted(folder.iterdir()):
        if path.name not in FILES:
            raise InputError(f"{path}: not a part of a published model; accepted are {', '.join(sorted(FILES))}")
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: {path.stat().st_size / 1e6:.1f} MB; accepted are at most {LARGEST / 1e6:.0f} MB")
    try:
        values = json.loads(Path(audit).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{audit}: not the metrics of the stage `privacy`; weights are audited first") from None
    say(f"{name}: {require_release(values, folder.resolve().name, weights)}")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    _dvc("add", "--quiet", str(target))
    pointer = yaml.safe_load(_pointer(name).read_text(encoding="utf-8"))
    pointer["outs"][0]["remote"] = REMOTE  # so that `dvc push` and `dvc pull` of nothing else go there
    _pointer(name).write_text(yaml.safe_dump(pointer, sort_keys=False), encoding="utf-8")
    _dvc("push", "--quiet", str(_pointer(name)))
    for path in set(STORE.glob("*/*")) - {
        path for pointer in Path("published").glob("*.dvc") for path in stored(pointer)
    }:
        path.unlink()  # of a model that was replaced
    _name_in_params(Path("params.yaml"))
    return _hash(name)


def require_release(values: dict, model: str, weights: dict[str, str]) -> str:
    """The gate before weights are published, with the audit's metrics `values`; returns the reason to let them pass.

    `weights` {file: sha256} must be those that were audited. They pass if the audit says "released", or if the model
    was trained on phantoms only, so no personal data. Raises `InputError` if the gate is shut.
    """
    found = values.get(f"{model}.verdict", "not audited")
    audited = {name: values.get(f"{model}.sha256.{name}") for name in weights}
    if found != "not audited" and audited != weights:
        raise InputError(f"{model}: the weights are not those that were audited; run the stage `privacy` on them first")
    if found == "released":
        return "the privacy audit says 'released'"
    if found != "not audited" and values.get(f"{model}.phantoms only") is True:
        return f"the model was trained on phantoms and holds no person (the audit, as if it did: {found!r})"
    raise InputError(
        f"{model}: the privacy audit says {found!r}; weights are published if it says 'released', or of phantoms"
    )


def stored(pointer: Path) -> list[Path]:
    """The files of the store that belong to a published model, its list of files first."""
    listing = _at(yaml.safe_load(pointer.read_text(encoding="utf-8"))["outs"][0]["md5"])
    return [listing, *(_at(item["md5"]) for item in json.loads(listing.read_text(encoding="utf-8")))]


def _at(md5: str) -> Path:
    return STORE / md5[:2] / md5[2:]


def _pointer(name: str) -> Path:
    return Path("published") / f"{name}.dvc"


def _hash(name: str) -> str:
    try:
        return yaml.safe_load(_pointer(name).read_text(encoding="utf-8"))["outs"][0]["md5"]
    except (OSError, KeyError, yaml.YAMLError):
        raise InputError(f"{_pointer(name)}: no published model; see python -m bonelib.published --help") from None


def _checked(folder: Path) -> dict:
    """The config.json of a model folder whose weights have the hashes that it says."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        wrong = [n for n, value in config["sha256"].items() if digest(folder / f"{n}.safetensors") != value]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: not a whole model folder ({error})") from None
    if wrong:
        raise InputError(f"{folder / wrong[0]}.safetensors: not the weights whose hash config.json holds")
    return config


def _dvc(*command: str) -> None:
    done = subprocess.run(["dvc", *command], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"dvc {command[0]} failed: {' '.join(done.stderr.split())}")


def _name_in_params(path: Path) -> None:
    """Write the hashes of all published models to the line `train:` of the profile `published`."""
    known = {pointer.stem: {"published": _hash(pointer.stem)} for pointer in sorted(Path("published").glob("*.dvc"))}
    line = yaml.safe_dump(known, default_flow_style=True, width=1000).strip()
    text, count = re.subn(
        r"(?ms)(^  published:.*?^    train: )[^\n]*", lambda m: m[1] + line, path.read_text(encoding="utf-8"), count=1
    )
    if not count:
        raise InputError(f"{path}: no line `train:` in a profile `published` to write {line} to")
    path.write_text(text, encoding="utf-8")


@command
def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("folder", type=Path)
    cli.add_argument("name", help="of the model, as in `models` of params.yaml")
    cli.add_argument("--audit", type=Path, required=True, help="metrics/S5_privacy.json of these weights")
    args = cli.parse_args()
    found = publish(args.folder, args.name, args.audit)
    print(f"{args.folder} is published as {args.name}, {found}; commit dvc-store/, published/ and params.yaml")


if __name__ == "__main__":
    sys.exit(main())
