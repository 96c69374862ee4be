"""What MLflow's store holds, read with SQL: a second source beside MLflow's own client."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

Rows = list[tuple[Any, ...]]
Store = Path | Callable[[str], Rows]
"""A project's folder, whose database is SQLite's, or what runs a query elsewhere."""
Point = tuple[str, int, float]
TIMES = ("time/", "system/")
"""Metrics that depend on the clock."""


def query(store: Store, sql: str) -> Rows:
    """Rows of MLflow's database."""
    if not isinstance(store, Path):
        return store(sql)
    with closing(sqlite3.connect(store / "mlflow.db", timeout=30)) as connection:
        return connection.execute(sql).fetchall()


def statuses(store: Store) -> Counter[str]:
    """How many runs are in which state."""
    return Counter(str(status) for (status,) in query(store, "SELECT status FROM runs"))


def last_status(store: Store) -> str:
    """State of the run that began last."""
    rows = query(store, "SELECT status FROM runs ORDER BY start_time DESC LIMIT 1")
    return str(rows[0][0]) if rows else "none"


def metrics(store: Store) -> list[Point]:
    """All of the last run's metrics that the clock doesn't decide, sorted."""
    last = "SELECT run_uuid FROM runs ORDER BY start_time DESC LIMIT 1"
    rows = query(store, f"SELECT key, step, value FROM metrics WHERE run_uuid = ({last})")
    points = [(str(key), int(step), float(value)) for key, step, value in rows]
    return sorted(point for point in points if not point[0].startswith(TIMES))


def compare(found: list[Point], expected: list[Point]) -> tuple[int, int]:
    """How many points are lost (or have another value), and how many doubled."""
    places = Counter((key, step) for key, step, _ in found)
    doubled = sum(count - 1 for count in places.values())
    return len(set(expected) - set(found)), doubled
