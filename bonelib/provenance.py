"""Where a result comes from: a run id for figures, and the record beside each stage's metrics."""

import hashlib
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from bonelib.params import fingerprint

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


def write_metrics(path: str | Path, values: dict[str, Any], run: str) -> None:
    """One flat JSON of a stage's numbers (null: there is none), with the run id and the packages that made it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    made_by = {"run": run, "python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    known = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
    path.write_text(
        json.dumps({**known, **{f"made_by.{key}": value for key, value in made_by.items()}}, indent=1) + "\n",
        encoding="utf-8",
    )
