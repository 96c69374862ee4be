"""Where values come from (``params.yaml``, ``--config`` files, flags), and every mistake in them at once."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from pipeline.config.params import STAGES, Params, all_fields
from pipeline.config.relations import RELATIONS
from pipeline.config.words import describe

PARAMS_FILE = Path("params.yaml")

P = TypeVar("P", bound=Params)


class ConfigError(Exception):
    """All mistakes of the parameters, one per line."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        self.mistakes = list(mistakes)
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__(f"{count} in the parameters\n" + "\n".join(f"  {m}" for m in mistakes))


@dataclass(frozen=True)
class Value:
    """A raw value and where it was written: ``params.yaml:12`` or ``--seed``."""

    value: Any
    origin: str


def read_file(path: Path, mistakes: list[str]) -> dict[str, Value]:
    """Read a flat YAML 1.2 or JSON mapping; duplicate keys and broken syntax are added to ``mistakes``."""
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        mistakes.append(f"{path}: no such file")
        return {}
    except UnicodeDecodeError:
        mistakes.append(f"{path}: not UTF-8 text; save it as UTF-8")
        return {}
    except OSError as error:
        mistakes.append(f"{path}: can't be read: {error.strerror}")
        return {}
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        mistakes.append(f"{path}{line}: not valid YAML: {_problem(error)}")
        return {}
    except Exception as error:  # ruamel raises several unrelated types for control characters and bad escapes
        mistakes.append(f"{path}: not valid YAML: {' '.join(str(error).split())}")
        return {}
    if not isinstance(node, MappingNode) or not node.value:
        kind = "a list" if isinstance(node, SequenceNode) else "text" if node and node.value else "nothing"
        mistakes.append(f"{path}: expected `key: value` lines, got {kind}")
        return {}
    return _read_mapping(path, node, yaml, mistakes)


def _problem(error: MarkedYAMLError) -> str:
    """What YAML's reader says, in a person's words where its own are the parser's."""
    problem = str(error.problem)
    if "'\\t'" in problem:
        return "a tab; YAML indents with spaces only"
    return f"{error.context} {problem}" if problem.startswith("but ") else problem


def _read_mapping(path: Path, node: MappingNode, yaml: Any, mistakes: list[str]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for key_node, value_node in node.value:
        origin = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, ScalarNode):
            mistakes.append(f"{origin}: expected a key, got a list or a mapping in its place")
            continue
        key = key_node.value
        if key in values:
            mistakes.append(f"{key} ({origin}): duplicate key; first given at {values[key].origin}")
            continue
        try:
            value = yaml.constructor.construct_object(value_node, deep=True)
        except Exception:  # tags such as !!python/object, bad timestamps: every one a user's mistake
            mistakes.append(f"{key} ({origin}): not a plain value, and nothing else is read or run")
            continue
        values[key] = Value(value, origin)
    return values


def read_sources(
    config_files: Sequence[Path], flags: dict[str, str], mistakes: list[str], params_file: Path = PARAMS_FILE
) -> dict[str, Value]:
    """Merge ``params.yaml``, ``--config`` files and flags; later sources win."""
    if not params_file.exists():
        raise ConfigError([f"{params_file}: no such file here; run this from the project's folder"])
    values = read_file(params_file, mistakes)
    readable = bool(values)
    for path in config_files:
        values.update(read_file(path, mistakes))
    if not readable:  # else every key would be called missing
        raise ConfigError(mistakes)
    values.update({key: Value(_read_flag(text), "--" + key.replace("_", "-")) for key, text in flags.items()})
    return values


def _read_flag(text: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except Exception:  # not YAML: the type check below says what was expected
        return text


@functools.cache
def _adapter(key: str, stages: tuple[type[Params], ...]) -> TypeAdapter[Any]:
    field = all_fields(stages)[key]
    annotation: Any = Annotated[field.annotation, field]
    return TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False))


def check(values: dict[str, Value], mistakes: list[str]) -> dict[str, Any]:
    """Check every key by itself, then the relations; returns the valid ones."""
    valid = check_each(values, mistakes)
    mistakes += [
        f"{key}: missing in {PARAMS_FILE}; expected {describe(field)}"
        for key, field in all_fields().items()
        if key not in values
    ]
    for (key, *_), problem in broken_relations(valid):
        mistakes.append(f"{key} = {shown_value(valid[key])} ({values[key].origin}): {problem}")
    return valid


def check_each(
    values: Mapping[str, Value], mistakes: list[str], stages: tuple[type[Params], ...] = STAGES
) -> dict[str, Any]:
    """Check every key by itself, as a field of one of these classes; returns the valid ones."""
    fields = all_fields(stages)
    valid: dict[str, Any] = {}
    for key, given in values.items():
        if key not in fields:
            mistakes.append(f"{key} ({given.origin}): unknown key{_suggestion(key, fields)}")
            continue
        try:
            valid[key] = _adapter(key, stages).validate_python(given.value)
        except ValidationError:
            hint = _hint(given.value, fields[key])
            mistakes.append(
                f"{key} = {shown_value(given.value)} ({given.origin}): expected {describe(fields[key])}{hint}"
            )
    return valid


def broken_relations(values: Mapping[str, Any]) -> Iterator[tuple[list[str], str]]:
    """The keys of each rule that these values break, the one to change first, and what is wrong."""
    for keys, rule in rules():
        if all(key in values for key in keys) and (problem := rule(*(values[key] for key in keys))):
            yield keys, problem


def rules() -> Iterator[tuple[list[str], Callable[..., str | None]]]:
    """Every rule between keys, with the keys that it takes."""
    for rule in RELATIONS:
        yield list(inspect.signature(rule).parameters), rule


def _hint(value: object, field: FieldInfo) -> str:
    """What YAML made of the value, where that surprises people."""
    if value is None:
        return "; nothing is written after the colon"
    if not isinstance(value, str):
        return ""
    if field.annotation is bool and value.lower() in ("yes", "no", "on", "off", "true", "false"):
        return f"; {value} is a text in YAML 1.2"
    if field.annotation in (int, float) and isinstance(_read_flag(value), (int, float)):
        return "; in quotes it is a text"
    return ""


def _suggestion(key: str, known: dict[str, FieldInfo]) -> str:
    near = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "; `python -m pipeline.config show` lists the known ones"


def shown_value(value: object) -> str:
    """A value as it stands in the file, cut to 60 characters."""
    text = json.dumps(_outline(value), default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _outline(value: object, levels: int = 2) -> object:
    """The beginning of nested lists and mappings: by YAML's aliases a short file can hold billions of items."""
    if not isinstance(value, (list, dict)):
        return value
    if not levels:
        return "..."
    if isinstance(value, dict):
        return {str(key): _outline(item, levels - 1) for key, item in list(value.items())[:20]}
    return [_outline(item, levels - 1) for item in value[:20]]


def load(stage: type[P], config_files: Sequence[Path] = (), **flags: Any) -> P:
    """The stage's effective parameters; ``flags`` override by key. Raises :class:`ConfigError` with all mistakes."""
    mistakes: list[str] = []
    values = read_sources(config_files, {}, mistakes)
    values.update({key: Value(value, key) for key, value in flags.items()})
    return build(stage, values, mistakes)


def build(stage: type[P], values: dict[str, Value], mistakes: list[str]) -> P:
    """Check all keys, keep the stage's own. Raises :class:`ConfigError` with all mistakes."""
    valid = check(values, mistakes)
    if mistakes:
        raise ConfigError(mistakes)
    return stage(**{key: valid[key] for key in stage.model_fields})


def project_root() -> Path:
    """The real checkout, also in the temporary copies of ``dvc exp run --temp`` and ``--queue``."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()
