"""Typed, frozen sections of params.yaml; an unknown key is refused with the nearest known one."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from bonelib import InputError

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Voxel = Annotated[float, Field(ge=0.03, le=0.5)]
Shape = tuple[Count, Count, Count]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}\.dir$")]  # of a folder in dvc-store/
_NO_KIND = FieldInfo()


class Section(BaseModel):
    """A section of params.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def read_params(path: str | Path = "params.yaml") -> dict[str, Any]:
    """The values of a params.yaml, not checked. Raises `InputError` for a file that is not readable as YAML."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None


def section(kind: type[Section], values: dict[str, Any], name: str, file: str = "params.yaml") -> Any:
    """`values` checked as the section `kind`; `file` and `name` stand before the key in an error.

    Raises `InputError` naming the key, what was found and what is accepted (the nearest known key, if unknown).
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        found, kinds, path = values, [kind], []
        for place, part in enumerate(first["loc"], 1):
            missing = first["type"] == "missing" and place == len(first["loc"])
            if isinstance(found, dict) and part not in found and not missing:
                # No key, but the tag of one class of a union
                kinds = [k for k in kinds if k.model_fields.get("kind", _NO_KIND).default == part] or kinds
                continue
            path.append(str(part))
            found = found.get(part) if isinstance(found, dict) else found[part] if isinstance(part, int) else None
            known = [k for k in kinds if part in k.model_fields]
            last, kinds = kinds, [s for k in known for s in _sections(k.model_fields[part].annotation)] or kinds
        key = ".".join([name, *path] if name else path)
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(path[-1], [key for k in last for key in k.model_fields], 1, 0)
            raise InputError(f"{file}: unknown key {key}; did you mean {near[0]!r}?") from None
        says = first["msg"].removeprefix("Value error, ")
        found = f" (found {first['input']!r:.80})" if path else ""
        raise InputError(f"{file}: {f'{key}: ' if key else ''}{says}{found}") from None


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _sections(inner)]


def fingerprint(*parts: Any) -> str:
    """A short hash of plain values and sections: equal if and only if they are equal."""
    plain = [part.model_dump(mode="json") if isinstance(part, Section) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
