"""The harness's size, what its rows share, and the table of what came out."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.chaos.evidence import Point
from tests.conftest import ROOT

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # its threads would not survive the fork

collect_ignore_glob = ["test_*.py"] if platform.system() == "Windows" else []  # no fork, no signals, no limits

RESULTS = Path(os.environ.get("CHAOS_RESULTS", ROOT / "metrics/chaos.json"))
FULL = os.environ.get("CHAOS", "short") == "full"
Row = dict[str, object]
_rows: dict[str, Row] = {}


class Reference(NamedTuple):
    """The undisturbed training.

    Attributes:
        result: Digests of what it learned.
        metrics: What MLflow got.
        seconds: How long it took.
    """

    result: dict[str, str]
    metrics: list[Point]
    seconds: float


def pytest_collection_finish() -> None:
    """Break what ``tests.chaos.mutations`` asks for, before anything runs."""
    if name := os.environ.get("CHAOS_MUTATION"):
        from tests.chaos.mutations import MUTATIONS

        MUTATIONS[name].apply()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.chaos)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, made by another process: this one forks, which SQLite's connections do not survive."""
    import subprocess
    import sys

    path = tmp_path_factory.mktemp("database")
    code = "from pipeline.tracking.store import connect, experiment_id; experiment_id(connect())"
    environment = {**os.environ, "DVC_ROOT": str(path), "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    subprocess.run([sys.executable, "-c", code], cwd=path, env=environment, check=True)
    return path / "mlflow.db"


@pytest.fixture(scope="session")
def reference(database: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The undisturbed training, once for all rows."""
    from tests.chaos.evidence import metrics
    from tests.chaos.victims import Victim, new_project, result

    kept = Path(os.environ.get("CHAOS_REFERENCE", os.devnull))
    if kept.is_file():  # of an earlier run of the same code, to save a minute when single rows are worked on
        digests, points, seconds = json.loads(kept.read_text())
        return Reference(digests, [(key, step, value) for key, step, value in points], seconds)
    project = new_project(tmp_path_factory.mktemp("reference") / "project", database)
    victim = Victim(project)
    victim.finish()
    found = Reference(result(project), metrics(project), victim.seconds)
    if kept.name != "null":
        kept.write_text(json.dumps(found))
    return found


@pytest.fixture
def project(database: Path, tmp_path: Path) -> Path:
    """A new project folder with the tiny training's parameters."""
    from tests.chaos.victims import new_project

    return new_project(tmp_path / "project", database)


@pytest.fixture
def row() -> Callable[..., object]:
    """``with row(name) as figures``: a row of the table; figures may be added, and it fails if the block does."""

    @contextmanager
    def record(name: str) -> Iterator[Row]:
        figures: Row = {}
        began = time.monotonic()
        _rows[name] = {"passed": False}
        try:
            yield figures
            _rows[name]["passed"] = True
        finally:
            _rows[name] |= {
                **figures,
                "form": "full" if FULL else "short",
                "seconds": round(time.monotonic() - began, 1),
                "day": datetime.now(timezone.utc).date().isoformat(),
            }

    return record


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not _rows:
        return
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    text = json.dumps({"machine": machine, "rows": {**known, **_rows}}, indent=2) + "\n"
    RESULTS.write_text(text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _rows:
        terminalreporter.section("chaos")
        terminalreporter.write_line(table(_rows))


def table(rows: dict[str, Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| row | result | form | seconds | figures |", "|---|---|---|---|---|"]
    for name, figures in rows.items():
        rest = ", ".join(f"{k} {v}" for k, v in figures.items() if k not in ("passed", "form", "seconds", "day"))
        result = "held" if figures["passed"] else "**FAILED**"
        lines.append(f"| {name} | {result} | {figures['form']} | {figures['seconds']} | {rest} |")
    return "\n".join(lines)
