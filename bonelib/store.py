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
    """The files published under `name`, {path in its folder: file of the store}; raises `InputError` as `read`."""
    items = json.loads(read(stored(published_hash(name)), f"the list of files of {name}"))
    return {item["relpath"]: stored(item["md5"]) for item in items}


def read(path: Path, what: str) -> bytes:
    """The content of a file of the store; raises `InputError` where it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        raise InputError(f"{path}: no such file, {what}; it comes with the repository") from None
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != (path.parent.name + path.name).removesuffix(".dir"):
        raise InputError(f"{path}: damaged, {what}; it comes with the repository")
    return content


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
        (part / relative).parent.mkdir(parents=True, exist_ok=True)
        (part / relative).write_bytes(read(source, f"{relative} of {name}"))
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(part.rglob("*")):
        target = folder / path.relative_to(part)
        target.mkdir(parents=True, exist_ok=True) if path.is_dir() else path.replace(target)
    shutil.rmtree(part)
    return folder
