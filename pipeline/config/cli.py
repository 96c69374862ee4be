"""A stage's command line: a flag per key, ``--config``, help with types and defaults, exit code 2 for mistakes."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.config.params import all_fields
from pipeline.config.sources import PARAMS_FILE, ConfigError, P, build, read_file, read_sources, shown_value
from pipeline.config.words import describe


def add_flags(parser: argparse.ArgumentParser, keys: Sequence[str]) -> None:
    """Add ``--config`` and a flag per key, each with type, range, meaning and default in its help."""
    parser.add_argument(
        "--config", type=Path, action="append", default=[], metavar="FILE", help="YAML or JSON; overrides params.yaml"
    )
    defaults = read_file(PARAMS_FILE, [])
    group = parser.add_argument_group("parameters (they win over --config and params.yaml)")
    for key in keys:
        field = all_fields()[key]
        default = f" [default {shown_value(defaults[key].value)}]" if key in defaults else ""
        text = f"{field.description}; {describe(field)}{default}".replace("%", "%%")
        group.add_argument("--" + key.replace("_", "-"), dest=key, default=argparse.SUPPRESS, metavar="X", help=text)


class Parser(argparse.ArgumentParser):
    """argparse without guessed abbreviations; a wrong flag names the nearest right one and exits with 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        wrong = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
        known = ["--" + key.replace("_", "-") for key in all_fields()]
        known += [option for action in self._actions for option in action.option_strings]
        near = [m for flag in wrong for m in difflib.get_close_matches(flag, known, n=1, cutoff=0.5)]
        self.exit(2, f"error: {message}{'; did you mean ' + ', '.join(near) + '?' if near else ''}\n")


def integer(low: int, high: int) -> Callable[[str], int]:
    """The type of a flag that is no parameter: an integer from ``low`` to ``high``."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {text}")
        return int(text)

    return read


track_seed = integer(0, 2**31 - 1)
"""The type of a flag that names a track."""


def parse_args(stage: type[P], parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[P, Any]:
    """Parse a stage's command line: its parameters and its other arguments. Exits with 2 and all mistakes."""
    add_flags(parser, list(stage.model_fields))
    arguments = vars(parser.parse_args(argv))
    flags = {key: arguments.pop(key) for key in stage.model_fields if key in arguments}
    mistakes: list[str] = []
    try:
        values = read_sources(arguments.pop("config"), flags, mistakes)
        return build(stage, values, mistakes), argparse.Namespace(**arguments)
    except ConfigError as error:
        fail(error)


def fail(error: object) -> NoReturn:
    """Tell a user's mistake and exit with 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
