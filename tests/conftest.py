"""Project folders in temporary places, so that no test touches the checkout's files or its MLflow database."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MLFLOW_AND_DVC = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_RUN_ID",
    "DVC_EXP_NAME",
    "DVC_EXP_BASELINE_REV",
)

# Tests that open no window must not look for a screen either.
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


@pytest.fixture
def params_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the project's ``params.yaml``, which is the current one for the test."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database of the installed version; creating one takes 3 to 7 s, copying it nothing."""
    import mlflow
    from mlflow import MlflowClient

    path: Path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path.as_posix()}").search_experiments(max_results=1)
    mlflow.set_tracking_uri(None)
    return path


@pytest.fixture
def bare_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The project folder, as DVC names it, in a temporary place; MLflow isn't used there yet."""
    import mlflow

    mlflow.set_tracking_uri(None)
    for name in MLFLOW_AND_DVC:
        monkeypatch.setenv(name, "")  # first, so that it is taken back: MLflow sets variables itself
        monkeypatch.delenv(name)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for processes that a test starts
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    mlflow.set_tracking_uri(None)


@pytest.fixture
def project(bare_project: Path, migrated_database: Path) -> Path:
    """A project folder with an empty MLflow database."""
    shutil.copy(migrated_database, bare_project / "mlflow.db")
    return bare_project
