"""The effective parameters, a partial file applied to ``params.yaml``, and a JSON schema.

python -m pipeline.config show  [--config FILE] [--KEY VALUE]   effective parameters and where each came from
python -m pipeline.config apply FILE                            write a partial file's values into params.yaml
python -m pipeline.config schema                                JSON schema, for editors
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from pipeline.config.cli import Parser, add_flags, fail
from pipeline.config.params import STAGES, all_fields
from pipeline.config.sources import PARAMS_FILE, ConfigError, check, read_sources, shown_value


def schema() -> dict[str, Any]:
    """JSON schema of a (partial) parameter file, for completion and checks in editors."""
    properties: dict[str, Any] = {}
    for stage in STAGES:
        properties |= stage.model_json_schema()["properties"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "CarRacing pipeline parameters",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def show(config_files: Sequence[Path], flags: dict[str, str]) -> str:
    """A table of the effective parameters and where each came from."""
    mistakes: list[str] = []
    values = read_sources(config_files, flags, mistakes)
    valid = check(values, mistakes)
    if mistakes:
        raise ConfigError(mistakes)
    width, shown = max(map(len, valid)), {key: shown_value(value) for key, value in valid.items()}
    value_width = max(map(len, shown.values()))
    return "\n".join(f"{key:<{width}}  {shown[key]:<{value_width}}  {values[key].origin}" for key in valid)


def apply(path: Path) -> list[str]:
    """Write a partial file's values into ``params.yaml``, which keeps its comments; returns the keys that changed."""
    mistakes: list[str] = []
    values = read_sources([path], {}, mistakes)
    valid = check(values, mistakes)
    if mistakes:
        raise ConfigError(mistakes)
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    document = yaml.load(PARAMS_FILE)
    changed = [key for key, value in valid.items() if document[key] != value]
    for key in changed:
        document[key] = _as_written_by_hand(valid[key])
    yaml.dump(document, PARAMS_FILE)
    return changed


def _as_written_by_hand(value: Any) -> Any:
    """Lists as ``[a, b]``: the other way pushes the comment off its line. ``"1:2"`` quoted: YAML 1.1 has base 60."""
    if isinstance(value, str) and ":" in value:
        return DoubleQuotedScalarString(value)
    if not isinstance(value, list):
        return value
    line = CommentedSeq(value)
    line.fa.set_flow_style()
    return line


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the three commands."""
    parser = Parser(prog="python -m pipeline.config", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    add_flags(commands.add_parser("show", help="effective parameters and where each came from"), list(all_fields()))
    commands.add_parser("apply", help="write a partial file's values into params.yaml").add_argument("file", type=Path)
    commands.add_parser("schema", help="JSON schema for editors")
    arguments = vars(parser.parse_args(argv))
    try:
        if arguments["command"] == "show":
            print(show(arguments["config"], {key: arguments[key] for key in all_fields() if key in arguments}))
        elif arguments["command"] == "apply":
            print("changed: " + (", ".join(apply(arguments["file"])) or "nothing"))
        else:
            print(json.dumps(schema(), indent=2))
    except ConfigError as error:
        fail(error)


if __name__ == "__main__":
    main()
