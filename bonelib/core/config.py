"""Typed, frozen sections of params.yaml; an unknown key is refused with the nearest known one."""

import difflib
import hashlib
import json
from typing import Annotated, Any, get_args

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


def section(kind: type[Section], values: dict[str, Any], name: str, file: str = "params.yaml") -> Any:
    """`values` checked as the section `kind`; `file` and `name` stand before the key in an error.

    Raises `InputError` naming the key, what was found and what is accepted (the nearest known key, if unknown).
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        # A part with a blank says which class of a union was meant, and is no key
        loc = [str(part) for part in first["loc"] if not str(part).startswith(" ")]
        key = ".".join([name, *loc] if name else loc)
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(loc[-1], _known_keys(kind, loc[:-1]), 1, 0)
            raise InputError(f"{file}: unknown key {key}; did you mean {near[0]!r}?") from None
        says = first["msg"].removeprefix("Value error, ")
        found = f" (found {first['input']!r:.80})" if loc else ""
        raise InputError(f"{file}: {f'{key}: ' if key else ''}{says}{found}") from None


def _known_keys(kind: type[Section], path: list[str]) -> list[str]:
    kinds = [kind]
    for part in path:  # a part that is no field is a key of a dictionary of sections
        inner = [s for k in kinds if part in k.model_fields for s in _sections(k.model_fields[part].annotation)]
        kinds = inner or kinds
    return [key for k in kinds for key in k.model_fields]


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _sections(inner)]


def fingerprint(*parts: Any) -> str:
    """A short hash of plain values and sections: equal if and only if they are equal."""
    plain = [part.model_dump(mode="json") if isinstance(part, Section) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
