"""Weights that come with the repository: fetched from dvc-store/ by the hash that params.yaml names."""

import hashlib
import json
import shutil
from pathlib import Path

import yaml

from bonelib import InputError

STORE = Path("dvc-store/files/md5")


def pointer(name: str) -> Path:
    """The file that says which weights are published under a name."""
    return Path("published") / f"{name}.dvc"


def published_hash(name: str) -> str:
    """The hash of what is published under a name. Raises `InputError` if nothing is."""
    try:
        return yaml.safe_load(pointer(name).read_text(encoding="utf-8"))["outs"][0]["md5"]
    except (OSError, KeyError, yaml.YAMLError):
        raise InputError(f"{pointer(name)}: no published model; see python -m bonelib.published --help") from None


def stored(md5: str) -> Path:
    """Where the store has the file, or the list of files, of a hash."""
    return STORE / md5[:2] / md5[2:]


def listed(name: str) -> dict[str, Path]:
    """The files published under `name`, {path in its folder: file of the store}."""
    items = json.loads(stored(published_hash(name)).read_text(encoding="utf-8"))
    return {item["relpath"]: stored(item["md5"]) for item in items}


def fetch_files(name: str, wanted: str, folder: str | Path, key: str) -> Path:
    """Copy the files that are published under `name` to `folder`, and return it; other files there stay.

    `wanted` is the hash that params.yaml gives under `key`. Raises `InputError` where another one is published, or a
    file of the store is missing or damaged.
    """
    folder, found = Path(folder), published_hash(name)
    if found != wanted:
        raise InputError(f"params.yaml: {key}: found {wanted}, but {pointer(name)} holds {found}")
    part = folder.with_name(f".part-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    for relative, source in listed(name).items():
        target = part / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            content = source.read_bytes()
        except OSError:
            raise InputError(
                f"{source}: no such file, which {name}/{relative} is; it comes with the repository"
            ) from None
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != source.parent.name + source.name:
            raise InputError(f"{source}: damaged; it should be {name}/{relative}")
        target.write_bytes(content)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(part.rglob("*")):
        target = folder / path.relative_to(part)
        target.mkdir(parents=True, exist_ok=True) if path.is_dir() else path.replace(target)
    shutil.rmtree(part)
    return folder
