"""Typed, frozen sections of params.yaml; an unknown key is refused with the nearest known one."""

import difflib
import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bonelib import InputError

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Voxel = Annotated[float, Field(ge=0.03, le=0.5)]
Shape = tuple[Count, Count, Count]


class Section(BaseModel):
    """A section of params.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def section(kind: type[Section], values: dict[str, Any], name: str) -> Any:
    """`values` checked as the section `kind`; `name` stands before the key in an error.

    Raises `InputError` naming the key, what was found and what is accepted (the nearest known key, if unknown).
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([name, *(str(part) for part in first["loc"])])
        if first["type"] == "extra_forbidden":
            known = _known_keys(kind, first["loc"][:-1])
            near = difflib.get_close_matches(str(first["loc"][-1]), known, 1, 0)
            raise InputError(f"params.yaml: unknown key {key}; did you mean {near[0]!r}?") from None
        raise InputError(f"params.yaml: {key}: {first['msg']} (found {first['input']!r:.80})") from None


def _known_keys(kind: type[Section], path: tuple) -> list[str]:
    for part in path:
        kind = kind.model_fields[part].annotation
        kind = next((k for k in getattr(kind, "__args__", ()) if isinstance(k, type)), kind)
    return list(kind.model_fields)


def fingerprint(*parts: Any) -> str:
    """A short hash of plain values and sections: equal if and only if they are equal."""
    plain = [part.model_dump(mode="json") if isinstance(part, Section) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
