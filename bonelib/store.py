"""Weights that come with the repository: fetched from dvc-store/ by the hash that params.yaml names."""

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


def fetch_files(name: str, wanted: str, folder: str | Path, key: str) -> Path:
    """Copy the files that are published under `name` to `folder`, and return it; other files there stay.

    `wanted` is the hash that params.yaml gives under `key`. Raises `InputError` where another one is published.
    """
    folder, found = Path(folder), published_hash(name)
    if found != wanted:
        raise InputError(f"params.yaml: {key}: found {wanted}, but {pointer(name)} holds {found}")
    import dvc.api

    part = folder.with_name(f".part-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    dvc.api.DVCFileSystem().get(str(pointer(name).with_suffix("")), str(part), recursive=True)
    folder.mkdir(parents=True, exist_ok=True)
    for path in part.iterdir():
        path.replace(folder / path.name)
    part.rmdir()
    return folder
