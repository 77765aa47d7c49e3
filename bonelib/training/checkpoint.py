"""Training state that continues bit for bit, and models as safetensors with a JSON beside them."""

import json
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from bonelib import InputError
from bonelib.core.files import digest, write_json, write_whole

KEEP = 2  # states kept, so that a damaged newest one costs no more than an interval


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file; tensors are copied to plain contiguous memory first."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_whole(path, lambda part: save_file(plain, part))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for one trainer; a second one is refused. The lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"{folder}: another training is running in this folder; wait for it or stop it") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def stop_requested() -> Iterator[list[int]]:
    """A list that holds a signal once SIGTERM has come, so that a training can save itself before it ends.

    Outside of the main thread, which alone may listen to signals, it stays empty.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def save_state(folder: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """Keep a state of the training at `meta["seen"]` samples: tensors first, then the JSON that makes them valid.

    Of the same training, by its `meta["fingerprint"]`, the newest are kept, and the newest with a true `meta["mark"]`,
    to which it may go back; those of others, which nothing would continue in this folder any more, go, however far
    they had come.
    """
    name = f"state-{meta['seen']:010d}"
    save_tensors(folder / f"{name}.safetensors", tensors)
    write_json(folder / f"{name}.json", {**meta, "sha256": digest(folder / f"{name}.safetensors")})
    states = {path: _meta(path) for path in sorted(folder.glob("state-*.json"))}
    own = [path for path, its in states.items() if its.get("fingerprint") == meta["fingerprint"]]
    marked = [path for path in own if states[path].get("mark")]
    _remove(set(states) - set(own[-KEEP:] + marked[-1:]))


def _meta(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _remove(states: Iterable[Path]) -> None:
    for path in states:
        path.unlink()
        path.with_suffix(".safetensors").unlink(missing_ok=True)


def load_state(folder: Path, fingerprint: str, *, marked: bool = False) -> tuple[dict[str, Tensor], dict] | None:
    """The newest whole state of the same parameters and data, or None. Damaged ones and others' are passed over.

    `marked` asks for the newest with a mark, and removes those that are newer: the training goes back for good.
    """
    newer = []
    for path in sorted(folder.glob("state-*.json"), reverse=True):
        tensors, meta = path.with_suffix(".safetensors"), _meta(path)
        own = meta.get("fingerprint") == fingerprint and (meta.get("mark") or not marked)
        if own and tensors.is_file() and digest(tensors) == meta.get("sha256"):
            if marked:
                _remove(newer)
            return load_file(tensors), meta
        newer.append(path)
    return None


def start_from(folder: str | Path | None, parts: dict[str, torch.nn.Module], say=print) -> dict[str, str]:
    """Fill `parts` from NAME.safetensors in `folder`, where earlier weights are; returns the digests of those found.

    What is missing there starts anew, and is said. Raises `InputError` if nothing is there or if a file does not fit.
    """
    files = {name: Path(folder) / f"{name}.safetensors" for name in parts} if folder is not None else {}
    found = {name: path for name, path in files.items() if path.is_file()}
    if files and not found:
        raise InputError(f"{folder}: holds none of {', '.join(path.name for path in files.values())}")
    for name, path in files.items():
        if name not in found:
            say(f"{path}: no such file; the {name} starts anew")
            continue
        try:
            parts[name].load_state_dict(load_file(path))
        except RuntimeError as error:
            raise InputError(f"{path}: does not fit this network: {str(error).splitlines()[-1].strip()}") from None
    return {name: digest(path) for name, path in found.items()}


def pack(**objects) -> dict[str, Tensor]:
    """Modules and optimisers as one flat dictionary of tensors."""
    flat = {}
    for name, thing in objects.items():
        if isinstance(thing, torch.optim.Optimizer):
            for index, state in thing.state_dict()["state"].items():
                flat |= {f"{name}.{index}.{key}": value for key, value in state.items()}
        else:
            flat |= {f"{name}.{key}": value for key, value in thing.state_dict().items()}
    return flat


def unpack(flat: dict[str, Tensor], **objects) -> None:
    """The inverse of `pack`, into the given modules and optimisers."""
    for name, thing in objects.items():
        own = {key.removeprefix(f"{name}."): value for key, value in flat.items() if key.startswith(f"{name}.")}
        if isinstance(thing, torch.optim.Optimizer):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in own.items():
                index, field = key.split(".")
                state.setdefault(int(index), {})[field] = value
            thing.load_state_dict({**thing.state_dict(), "state": state})
        else:
            thing.load_state_dict(own)
