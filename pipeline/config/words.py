"""Types and ranges as a person says them; used by errors, ``--help`` and the tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo


def describe(field: FieldInfo) -> str:
    """Type and range of a field: ``integer, 1 to 16``."""
    if isinstance(field.json_schema_extra, dict) and "meaning" in field.json_schema_extra:
        return str(field.json_schema_extra["meaning"])
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: Sequence[Any]) -> str:
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _describe(inner, [*more, *metadata])
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is list:
        return f"list of {_length(metadata)}x {_describe(get_args(annotation)[0], [])}"
    names = {int: "integer", float: "number", bool: "true or false", str: "text"}
    return ", ".join(filter(None, [names[annotation], _bounds(list(_flatten(metadata)))]))


def _flatten(metadata: Sequence[Any]) -> Iterator[Any]:
    for m in metadata:
        yield from m.metadata if isinstance(m, FieldInfo) else [m]


def _length(metadata: Sequence[Any]) -> str:
    low = next((m.min_length for m in metadata if isinstance(m, MinLen)), 0)
    high = next((m.max_length for m in metadata if isinstance(m, MaxLen)), None)
    return f"{low} " if low == high else f"{low} to {high} "


def _bounds(metadata: Sequence[Any]) -> str:
    kinds: dict[type[Any], str] = {Gt: "> {}", Ge: ">= {}", Lt: "< {}", Le: "<= {}"}
    parts = {k: kinds[k].format(getattr(m, k.__name__.lower())) for m in metadata for k in kinds if isinstance(m, k)}
    if Ge in parts and Le in parts:
        return f"{parts[Ge][3:]} to {parts[Le][3:]}"
    return ", ".join(parts[k] for k in kinds if k in parts)
