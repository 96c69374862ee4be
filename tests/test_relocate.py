"""A moved checkout, read with MLflow's own client, and by searching the whole database for the old place."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from pipeline.relocate import RelocateError, moved, relocate
from pipeline.tracking.registry import CHAMPION, Registry, sha256
from tests.policies import write_policy
from tests.tracking.runs import begun


def places_of(database: Path, folder: str) -> set[str]:
    """Columns of any table in which that folder is named."""
    found = set()
    with closing(sqlite3.connect(database)) as connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for _, column, *_ in connection.execute(f"PRAGMA table_info('{table}')").fetchall():
                query = f"SELECT 1 FROM '{table}' WHERE CAST(\"{column}\" AS TEXT) LIKE ? LIMIT 1"
                if connection.execute(query, (f"%{folder}%",)).fetchone():
                    found.add(f"{table}.{column}")
    return found


@pytest.fixture
def checkout(project: Path) -> Path:
    """A project with a run that has an artifact, and a registered policy, moved as a whole to another place."""
    run = begun()
    (project / "note.txt").write_text("kept")
    run.artifact(project / "note.txt", "notes")
    run.flush()
    registry = Registry("carracing-ppo")
    version = registry.register(write_policy(project / "policy.safetensors", 0), (2, 36, 36), run.id, {})
    registry.point(CHAMPION, version)
    new = project.parent / f"{project.name} moved, with a space"
    mlflow.set_tracking_uri(None)
    shutil.move(project, new)
    project.mkdir()  # the fixtures' own; empty
    return new


def test_a_moved_checkout_finds_its_artifacts_again(checkout: Path, project: Path, tmp_path: Path) -> None:
    assert places_of(checkout / "mlflow.db", f"{project}/mlruns")
    changed = relocate(checkout.resolve())
    assert changed.total() >= 4
    assert places_of(checkout / "mlflow.db", f"{project}/mlruns") == set()

    mlflow.set_tracking_uri(f"sqlite:///{checkout}/mlflow.db")
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("CarRacing").experiment_id])
    (tmp_path / "out").mkdir()
    file = client.download_artifacts(run.info.run_id, "notes/note.txt", str(tmp_path / "out"))
    assert Path(file).read_text() == "kept"
    registry = Registry("carracing-ppo")
    champion = registry.champion()
    assert champion is not None
    policy = mlflow.artifacts.download_artifacts(
        f"models:/carracing-ppo@{CHAMPION}/artifacts/policy.safetensors", dst_path=str(tmp_path / "out")
    )
    assert sha256(Path(policy)) == champion.sha256 == sha256(checkout / "policy.safetensors")
    assert relocate(checkout.resolve()).total() == 0, "there is nothing left to do"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("file:///old/place/mlruns/CarRacing/1/artifacts", "file:///new%20place/mlruns/CarRacing/1/artifacts"),
        ("/old/place/mlruns/0", "/new place/mlruns/0"),
        ("/old/place/mlruns", "/new place/mlruns"),
        ("file:///new%20place/mlruns/0", None),
        ("models:/m-1234", None),
        ("mlflow-artifacts:/mlruns/0", None),
        ("s3://bucket/mlruns/0", None),
        ("/somewhere/else", None),
    ],
)
def test_only_places_in_another_checkout_are_changed(stored: str, expected: str | None) -> None:
    assert moved(stored, Path("/new place")) == expected


def test_from_leaves_other_checkouts_alone() -> None:
    assert moved("/old/mlruns/0", Path("/new"), Path("/old")) == "/new/mlruns/0"
    assert moved("/other/mlruns/0", Path("/new"), Path("/old")) is None


def test_without_a_database_it_says_so(bare_project: Path) -> None:
    (bare_project / "mlflow.db").write_text("no database, but long enough to be read as one" * 9)
    result = subprocess.run([sys.executable, "-m", "pipeline.relocate"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "not a database of MLflow's" in result.stderr
    with pytest.raises(RelocateError, match="no such file"):
        relocate(bare_project / "elsewhere")
