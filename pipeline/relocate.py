"""After the checkout was moved or copied: make MLflow's database find its artifacts here.

python -m pipeline.relocate [--from OLD_FOLDER]

MLflow stores absolute paths. Every one that leads to another checkout's ``mlruns`` is made to lead to this one's; with
``--from`` only those of that folder. Prints what was changed.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pipeline.config import Parser, fail, project_root

DATABASE = "mlflow.db"
COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
PLACE = re.compile(r"(?P<scheme>file://)?(?P<root>(/|[A-Za-z]:/).*?)/mlruns(?P<rest>(/.*)?)")
"""A path or a file URI; what has another scheme (``models:/``, ``mlflow-artifacts:/``, ``s3://``) is no place here."""


class RelocateError(Exception):
    """There is nothing to mend here; the message says why."""


def moved(value: str, root: Path, only: Path | None = None) -> str | None:
    """The place in ``root`` that answers to a stored one; None if it is there already, or is none of ours.

    Args:
        value: Path or URI as MLflow stored it.
        root: This checkout.
        only: Where the artifacts must have been, if that matters.
    """
    match = PLACE.fullmatch(value)
    if not match:
        return None
    as_stored = Path.as_uri if match["scheme"] else Path.as_posix
    old = (match["scheme"] or "") + match["root"]
    if old == as_stored(root) or (only is not None and old != as_stored(only)):
        return None
    return as_stored(root) + "/mlruns" + match["rest"]


def relocate(root: Path, only: Path | None = None) -> Counter[str]:
    """Mend the database of the checkout ``root``, all or nothing; returns how many values of which column changed.

    Raises:
        RelocateError: There is no database, or it is not MLflow's.
    """
    database = root / DATABASE
    if not database.is_file():
        raise RelocateError(f"{database}: no such file; runs that went to a server keep their artifacts there")
    changed: Counter[str] = Counter()
    try:
        with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
            for table, column in COLUMNS:
                for row, value in connection.execute(f"SELECT rowid, {column} FROM {table}").fetchall():
                    if value and (place := moved(value, root, only)):
                        connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (place, row))
                        changed[f"{table}.{column}"] += 1
    except sqlite3.Error as error:
        raise RelocateError(
            f"{database}: not a database of MLflow's, or in use ({error}); nothing is changed"
        ) from None
    return changed


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 2 for mistakes of the user."""
    parser = Parser(prog="python -m pipeline.relocate", description=__doc__)
    parser.add_argument("--from", type=Path, dest="only", metavar="OLD_FOLDER", help="where the checkout was")
    only: Path | None = parser.parse_args(argv).only
    try:
        changed = relocate(project_root(), only.absolute() if only else None)
    except RelocateError as error:
        fail(error)
    for column, count in changed.items():
        print(f"{column}: {count} changed")
    print(f"artifacts are looked for in {project_root() / 'mlruns'}")


if __name__ == "__main__":
    main()
