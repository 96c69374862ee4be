"""Runs that MLflow knows at once, for tests that are not about the way to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Run as StoredRun

from pipeline.tracking.run import RUN_ID_FILE, Run
from pipeline.tracking.store import connect


def begun(
    name: str = "one",
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    run_id_file: Path = RUN_ID_FILE,
) -> Run:
    """A run in MLflow, begun and not ended."""
    run = Run.begin(name, params or {}, tags or {}, run_id_file=run_id_file)
    run.flush()
    return run


def stored(run: Run) -> StoredRun:
    """The run as MLflow's own client reads it."""
    return connect().get_run(run.id)
