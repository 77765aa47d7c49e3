"""Where a result comes from: a run id for figures, and the record beside each stage's metrics."""

import hashlib
import math
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from bonelib.core.config import fingerprint
from bonelib.core.files import write_json

PACKAGES = ("torch", "numpy", "scipy", "nibabel", "dvc")


def run_id(*parts: Any) -> str:
    """A short id, equal for equal parameters and inputs (the commit would be wrong on a dirty tree)."""
    return fingerprint(*parts)[:8]


def code_hash(*modules: ModuleType) -> str:
    """A hash of the source of modules, and of all modules of packages among them."""
    files = [Path(m.__file__) for m in modules]
    files = [f for f in files if f.name != "__init__.py"] + [
        g for f in files if f.name == "__init__.py" for g in sorted(f.parent.glob("*.py"))
    ]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def keyed(rows: list[dict], *names: str, only: Iterable[str] | None = None) -> dict[str, dict]:
    """Rows of a table as {"value of a name.value of the next": the other columns, or those of `only`}."""
    return {
        ".".join(str(row[name]) for name in names): {
            key: value for key, value in row.items() if (key not in names if only is None else key in only)
        }
        for row in rows
    }


def write_metrics(path: str | Path, values: dict[str, Any], run: str) -> None:
    """One flat JSON of a stage's numbers, with the run id and the packages that made it.

    Nested dictionaries become keys joined by dots; NaN becomes null.
    """
    made_by = {"run": run, "python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    write_json(Path(path), dict(flat(values | {"made_by": made_by})))


def flat(values: dict, before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dictionaries as pairs of a key joined by dots and a value, None for one that is not finite."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{key}.")
        else:
            none = isinstance(value, float) and not math.isfinite(value)
            yield f"{before}{key}", None if none else value
