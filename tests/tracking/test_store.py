"""Where runs are kept, against MLflow's own defaults read by another client."""

from __future__ import annotations

import importlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.tracking.store import (
    PRIMARY_METRIC,
    TrackingError,
    connect,
    experiment_id,
    in_one_message,
    refuse_impossible,
)
from tests.conftest import ROOT
from tests.tracking.runs import begun

BEGIN = "from pipeline.tracking.run import Run; print(Run.begin('one', {'seed': 0}, {}).flush())"


def begin_in_a_process(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_runs_go_to_the_real_checkout_not_to_dvcs_temporary_copy(project: Path, monkeypatch: pytest.MonkeyPatch):
    copy = project / "copy-of-dvc-exp-run-temp"
    copy.mkdir()
    monkeypatch.chdir(copy)
    run = begun("one", {"seed": 0})
    note = copy / "note.txt"
    note.write_text("kept")
    run.artifact(note)
    run.flush()
    stored = MlflowClient(f"sqlite:///{project}/mlflow.db").get_run(run.id)
    assert stored.info.artifact_uri == f"{(project / 'mlruns/CarRacing').as_uri()}/{run.id}/artifacts"
    assert (project / "mlruns/CarRacing" / run.id / "artifacts/note.txt").read_text() == "kept"
    assert {path.name for path in copy.rglob("*") if path.is_file()} == {"mlflow.json", "note.txt"}


def test_mlflow_without_any_setting_finds_the_same_runs(project: Path, monkeypatch: pytest.MonkeyPatch):
    run = begun("one", {"seed": 0})
    mlflow.set_tracking_uri(None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert MlflowClient().get_run(run.id).info.run_name == "one"


def test_the_experiment_says_what_it_is_and_is_made_once(project: Path):
    client = connect()
    first = experiment_id(client)
    assert experiment_id(client) == first
    tags = client.get_experiment(first).tags
    assert tags["mlflow.experiment.primaryMetric.name"] == PRIMARY_METRIC == "evaluate/mean"
    assert "CarRacing-v3" in tags["mlflow.note.content"]


@pytest.mark.slow
def test_four_processes_may_use_a_new_store_at_once(bare_project: Path):
    processes = [begin_in_a_process(bare_project) for _ in range(4)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, results
    client = connect()
    ids = {out.split()[-1] for out, _ in results}
    assert {run.info.run_id for run in client.search_runs([experiment_id(client)])} == ids
    assert len(ids) == 4


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:1", "nonsense://here", "file:./mlruns", "sqlite:////proc/nowhere/mlflow.db"]
)
def test_a_store_that_cannot_be_used_is_one_clear_message(
    uri: str, bare_project: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="can't be used") as raised:
        connect()
    assert uri in str(raised.value)
    assert "unset MLFLOW_TRACKING_URI" in str(raised.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://ann:hush-hush@127.0.0.1:1",
        "http://ann:hush@hush@127.0.0.1:1",
        "nonsense://ann:hush@here/db",
        "postgresql+asyncpg://ann:hush@127.0.0.1:1/db",  # a driver that is not installed
    ],
)
def test_no_message_shows_the_password_in_the_address(
    uri: str, bare_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"://\*\*\*@(127|here)") as raised:
        connect()
    assert "hush" not in str(raised.value)
    assert "ann" not in str(raised.value)


def test_a_server_that_goes_away_at_any_call_is_one_message(
    bare_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:hush@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    refuse_impossible()  # asks nobody
    expected = r"MLflow at http://\*\*\*@127\.0\.0\.1:1 can't be used"
    with pytest.raises(TrackingError, match=expected) as raised, in_one_message():
        MlflowClient().get_run("0" * 32)
    assert "hush" not in str(raised.value)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server on a free port, with a database of its own."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def wait_for(url: str, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} never answered; exit code {process.poll()}")


@pytest.mark.slow
def test_the_server_of_the_environment_wins(server: str, bare_project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    run = begun("one", {"seed": 7})
    note = bare_project / "note.txt"
    note.write_text("kept")
    run.artifact(note)
    run.flush()
    stored = MlflowClient(server).get_run(run.id)
    assert stored.data.params == {"seed": "7"}
    assert [file.path for file in MlflowClient(server).list_artifacts(run.id)] == ["note.txt"]
    assert not (bare_project / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("module", "work", "arguments"),
    [("demo", "demo", []), ("compare", "compare_policies", ["models/champion.safetensors", "b.safetensors"])],
)
def test_a_server_that_refuses_in_between_is_one_message(
    module: str, work: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise MlflowException("no permission")

    monkeypatch.chdir(ROOT)
    command = importlib.import_module(f"pipeline.{module}")
    monkeypatch.setattr(command, work, refused)
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert "can't be used: no permission" in capsys.readouterr().err
