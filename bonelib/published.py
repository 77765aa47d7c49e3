"""Weights that come with the repository, in place of a training.

python -m bonelib.published FOLDER NAME --audit METRICS_FILE

puts what a run trained into dvc-store/, a small DVC remote that is committed with the code. It checks the folder,
asks the privacy audit of that run (metrics/S5_privacy.json of the profile), copies the weights to published/NAME, lets
DVC write their hash to published/NAME.dvc, and names it in the profile `published` of params.yaml. What it changed is
then to be committed. One command for each part of a run:

python -m bonelib.published out/laptop/models/progan progan --audit out/laptop/metrics/S5_privacy.json
python -m bonelib.published out/laptop/grading grader --audit out/laptop/metrics/S5_privacy.json
python -m bonelib.published out/laptop/codes/progan encoder-progan --audit out/laptop/metrics/S5_privacy.json
python -m bonelib.published out/laptop/conditional/grades hagan-grades --audit out/laptop/metrics/S5_privacy.json
python -m bonelib.published scratch/state/laptop/two_contrasts/slices slices
python -m bonelib.published scratch/state/laptop/native/model native

The last two, generator and encoder of S9 and the model of S13, need no audit: they learn of phantoms alone, and the
super-resolution in that of S13 must be that of a published model.
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
from bonelib.store import STORE, fetch_files, listed, pointer, published_hash, stored
from bonelib.training.config import HierarchicalTrain, Published, Train, training_section

LARGEST = 16_000_000  # bytes of a file
MARKS = {  # by which a folder is known for what it is, the first that holds
    "slices": {"generator.safetensors", "encoder.safetensors"},  # of S9: a generator with its encoder
    "native": {"generator.safetensors", "finer.safetensors"},  # of S13
    "conditional": {"generator.safetensors", "classes.json"},  # of S8
    "model": {"generator.safetensors"},
    "grader": {"grader.safetensors"},
    "encoder": {"encoder.safetensors"},
}
PARTS = {
    "model": {"config.json", "curves.csv", "candidates.csv", "record.json", "superres-record.json"}
    | {f"{name}.safetensors" for name in ("generator", "critic", "superres", "superres-critic", "growth")},
    "grader": {"grader.safetensors", "config.json"},
    "encoder": {"encoder.safetensors", "encoder.json", "encoder-curves.csv", "refinement.json"},
}
PARTS["slices"] = PARTS["model"] | PARTS["encoder"] | {"trials.csv"}
PARTS["conditional"] = PARTS["model"] | {"classes.json"}
PARTS["native"] = PARTS["model"] | {"finer.safetensors", "finer-critic.safetensors", "finer-record.json"}
PARTS["native"] |= {"direct.safetensors", "direct-record.json"}
PLACES = {"grader": "grading", "slices": "two_contrasts", "native": "native"}
PLACES |= {"conditional": "hagan_uses.conditional.CLASSES"}
OF_PHANTOMS = {"slices", "native"}  # which learn of phantoms alone, but for the super-resolution of the latter
REMOTE = "published"  # in .dvc/config
GRID = ("spacing_mm", "intensity", "shape")  # what a model and the stacks beside it must share


def fetch(name: str, given: dict, folder: str | Path, data: dict) -> Train | HierarchicalTrain:
    """Copy the published model `name` to `folder` and return how it was trained.

    `given` is its section of params.yaml (`Published`), `data` the `meta` of the stacks that it will be compared with.
    Raises `InputError` if there is no such model, if it is not the one that params.yaml names, if a file is damaged,
    or if it draws another grid than that of the stacks.
    """
    folder, wanted = Path(folder), section(Published, given, f"train.{name}").published
    shutil.rmtree(folder, ignore_errors=True)
    fetch_files(name, wanted, folder, f"train.{name}.published")
    config = _checked(folder, "model")
    require_grid(name, config, data)
    return training_section(config["train"], "train", str(folder / "config.json"))


def require_grid(name: str, config: dict, data: dict) -> None:
    """Raise `InputError` where what is published under `name` draws another grid than that of the stacks' `data`."""
    for key in GRID:
        if config["data"][key] != data[key]:
            says = f"was trained on {key} {config['data'][key]}, but that of the stacks is {data[key]}"
            raise InputError(f"{pointer(name)}: the model {says}; train one of your own in another profile")


def kind_of(folder: Path) -> str:
    """Which of `PARTS` a folder holds; raises `InputError` where it is none."""
    kind = _kind({path.name for path in folder.glob("*")})
    if kind is None:
        raise InputError(f"{folder}: not a whole model folder; accepted are those of a model, a grader or an encoder")
    return kind


def _kind(names: set[str]) -> str | None:
    return next((kind for kind, marks in MARKS.items() if marks <= names), None)


def publish(folder: str | Path, name: str, audit: str | Path | None = None) -> str:
    """Put what `kind_of` knows into the store of the repository in the working folder; returns its hash.

    `audit` is the metrics file of the stage `privacy` of the same run. Of the folders of a grader and an encoder, what
    belongs to the scans of that run stays behind. Raises `InputError` for a folder that is not whole, a file that is
    too large to be committed, and weights that may not be published (`require_release`, `require_phantoms`). What is
    `OF_PHANTOMS` needs no `audit`.
    """
    folder, target = Path(folder), pointer(name).with_suffix("")
    kind = kind_of(folder)
    config = _checked(folder, kind)
    for path in sorted(folder.iterdir()):
        if kind not in ("grader", "encoder") and path.name not in PARTS[kind]:
            raise InputError(f"{path}: not a part of a published model; accepted are {', '.join(sorted(PARTS[kind]))}")
        if path.name in PARTS[kind] and path.stat().st_size > LARGEST:
            raise InputError(f"{path}: {path.stat().st_size / 1e6:.1f} MB; accepted are at most {LARGEST / 1e6:.0f} MB")
    print(f"{name}: {_of_phantoms(folder, config) if kind in OF_PHANTOMS else _audited(folder, kind, config, audit)}")
    before = published_hash(name) if pointer(name).is_file() else None
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name in PARTS[kind]:
            shutil.copy2(path, target / path.name)
    after = put(name)
    _name_in_params(Path("params.yaml"), kind, name, before, after)
    return after


def _of_phantoms(folder: Path, config: dict) -> str:
    """Why weights whose data say that they are phantoms pass without an audit."""
    if config["data"].get("phantoms") is not True:
        raise InputError(f"{folder}: config.json: data: not of phantoms; only what learned from phantoms passes")
    if "superres" in config["sha256"]:  # of a model of the run, which learned from whatever scans the run has
        models = [path.stem for path in Path("published").glob("*.dvc") if is_model(path.stem)]
        files = [listed(name).get("superres.safetensors") for name in models]
        if config["sha256"]["superres"] not in {digest(path) for path in files if path}:
            says = "is that of no published model, and may have learned from people; publish such a model first"
            raise InputError(f"{folder / 'superres.safetensors'}: the network {says}")
    return "it was trained on phantoms and holds no person"


def _audited(folder: Path, kind: str, config: dict, audit: str | Path | None) -> str:
    """Why an audit lets weights pass."""
    try:
        values = json.loads(Path(audit or "no audit").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{audit}: not the metrics of the stage `privacy`; weights are audited first") from None
    if kind != "model":
        return require_phantoms(values, folder, Path(audit))
    from bonelib.latent.models import load_model

    load_model(folder)
    return require_release(values, folder.resolve().name, config["sha256"])


def put(name: str) -> str:
    """Let DVC write the folder published/`name` to the store, and take out what nothing names any more."""
    target = pointer(name).with_suffix("")
    _dvc("add", "--quiet", str(target))
    content = yaml.safe_load(pointer(name).read_text(encoding="utf-8"))
    content["outs"][0]["remote"] = REMOTE  # so that `dvc push` and `dvc pull` of nothing else go there
    pointer(name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    _dvc("push", "--quiet", str(pointer(name)))
    names = [one.stem for one in Path("published").glob("*.dvc")]
    kept = {path for one in names for path in (stored(published_hash(one)), *listed(one).values())}
    for path in set(STORE.glob("*/*")) - kept:
        path.unlink()  # of what was replaced
    return published_hash(name)


def require_phantoms(values: dict, folder: Path, audit: Path) -> str:
    """The gate before a grader, an encoder or a conditional model, which no audit examines: all models of its run must
    hold no person."""
    where = folder.resolve().parents[0 if kind_of(folder) == "grader" else 1]
    if audit.resolve().parent.parent != where:
        raise InputError(f"{audit}: of another run than {folder}; accepted is {where / 'metrics' / audit.name}")
    found = [value for key, value in values.items() if key.endswith(".phantoms only")]
    if not found or not all(value is True for value in found):
        raise InputError(f"{folder}: trained on scans of people, or not known; only what learned from phantoms passes")
    return "it was trained on phantoms and holds no person"


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


def _checked(folder: Path, kind: str) -> dict:
    """The JSON of a folder of weights, which have the hashes that it says; an encoder's says those of its model."""
    file = folder / ("encoder.json" if kind == "encoder" else "config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        hashes = {} if kind == "encoder" and config["model"] else config["sha256"]
        wrong = [n for n, value in hashes.items() if digest(folder / f"{n}.safetensors") != value]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: not a whole model folder ({error})") from None
    if wrong:
        raise InputError(f"{folder / wrong[0]}.safetensors: not the weights whose hash config.json holds")
    return config


def _dvc(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dvc", *command], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"dvc {command[0]} failed: {' '.join(done.stderr.split())}")


def _name_in_params(path: Path, kind: str, name: str, before: str | None, after: str) -> None:
    """Write the hash to params.yaml: of models to the line `train:` of the profile `published`, else over the old one.

    Where another kind is published for the first time, it is said where its hash belongs.
    """
    text = path.read_text(encoding="utf-8")
    if kind != "model":
        key = PLACES.get(kind, "inversion.MODEL.encoder")
        if before is None or before not in text:
            print(f"{path}: write `published: {after}` into {key} of the profile published")
            return
        path.write_text(text.replace(before, after), encoding="utf-8")
        return
    models = [one.stem for one in sorted(Path("published").glob("*.dvc")) if is_model(one.stem)]
    line = yaml.safe_dump({m: {"published": published_hash(m)} for m in models}, default_flow_style=True, width=1000)
    text, count = re.subn(r"(?ms)(^  published:.*?^    train: )[^\n]*", lambda m: m[1] + line.strip(), text, count=1)
    if not count:
        raise InputError(f"{path}: no line `train:` in a profile `published` to write {line} to")
    path.write_text(text, encoding="utf-8")


def is_model(name: str) -> bool:
    """Whether what is published under a name is a model of `train`."""
    return _kind(set(listed(name))) == "model"


@command
def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("folder", type=Path)
    cli.add_argument("name", help="of the model, as in `models` of params.yaml")
    cli.add_argument(
        "--audit", type=Path, help="metrics/S5_privacy.json of the weights; slices and whole scans need none"
    )
    args = cli.parse_args()
    found = publish(args.folder, args.name, args.audit)
    print(f"{args.folder} is published as {args.name}, {found}; commit dvc-store/, published/ and params.yaml")


if __name__ == "__main__":
    sys.exit(main())
