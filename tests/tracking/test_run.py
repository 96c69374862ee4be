"""The life of a run, read back with MLflow's own client."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.tracking.run import RESTORED_FROM, Run
from pipeline.tracking.store import TrackingError, connect, experiment_id

UNKNOWN = "0" * 32


def status(run: Run) -> str:
    return str(run.client.get_run(run.id).info.status)


def end_with(error: BaseException | None) -> Run:
    run = Run.begin("one", {"seed": 0}, {})
    with contextlib.suppress(BaseException), run:
        if error:
            raise error
    return run


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, "FINISHED"),
        (ValueError("broken"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
    ],
)
def test_a_run_ends_as_its_block_did(error: BaseException | None, expected: str, project: Path):
    run = end_with(error)
    assert status(run) == expected, error
    assert run.client.get_run(run.id).info.end_time > 0


def test_a_run_is_running_within_its_block(project: Path):
    with Run.begin("one", {}, {}) as run:
        assert status(run) == "RUNNING"


def test_a_run_knows_its_parameters_and_where_it_came_from(project: Path):
    run = Run.begin("one", {"learning_rate": 1e-5, "net_arch": [64], "device": "cpu"}, {"fingerprint": "abcd"})
    data = run.client.get_run(run.id).data
    assert {key: json.loads(data.params[key]) for key in ("learning_rate", "net_arch")} == {
        "learning_rate": 1e-5,
        "net_arch": [64],
    }
    assert data.params["device"] == "cpu"
    assert data.tags["fingerprint"] == "abcd"
    assert data.tags["pid"] == f"{os.getpid()}@{platform.node()}"
    assert data.tags["version.mlflow"].startswith("3.")


def test_the_next_stage_adds_to_the_run_and_leaves_its_end_alone(project: Path):
    run = end_with(None)
    before = run.client.get_run(run.id).info
    time.sleep(0.01)
    Run.attach("evaluate").metrics({"evaluate/mean": 901.5})
    after = run.client.get_run(run.id)
    assert after.data.metrics["evaluate/mean"] == 901.5
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.end_time)


def unknown_run(project: Path) -> None:
    (project / "metrics").mkdir(exist_ok=True)
    (project / "metrics/mlflow.json").write_text(json.dumps({"run_id": UNKNOWN}))


def test_an_unknown_run_gets_one_stand_in_for_all_later_stages(project: Path):
    unknown_run(project)
    evaluate, record = Run.attach("evaluate"), Run.attach("record-videos")
    assert evaluate.id == record.id != UNKNOWN
    stored = connect().search_runs([experiment_id(connect())])
    assert [(run.info.run_id, run.data.tags[RESTORED_FROM], run.info.status) for run in stored] == [
        (evaluate.id, UNKNOWN, "FINISHED")
    ]


def test_a_deleted_run_gets_a_stand_in(project: Path):
    run = end_with(None)
    run.client.delete_run(run.id)
    restored = Run.attach("evaluate")
    restored.metrics({"evaluate/mean": 1.0})
    assert restored.id != run.id


def test_a_store_in_trouble_is_no_reason_for_a_second_run(project: Path, monkeypatch: pytest.MonkeyPatch):
    from mlflow.exceptions import MlflowException

    end_with(None)

    def fail(self: MlflowClient, run_id: str) -> None:
        raise MlflowException("internal error")

    monkeypatch.setattr(MlflowClient, "get_run", fail)
    with pytest.raises(MlflowException, match="internal error"):
        Run.attach("evaluate")


@pytest.mark.parametrize("text", [None, "", "{}", "[]", "null"])
def test_a_missing_or_damaged_run_id_file_says_what_to_do(text: str | None, project: Path):
    if text is not None:
        (project / "metrics").mkdir()
        (project / "metrics/mlflow.json").write_text(text)
    with pytest.raises(TrackingError, match=r"metrics/mlflow\.json: .*dvc repro train"):
        Run.attach("evaluate")


TERMINATED = """
import signal, sys, time
from pipeline.train import _terminate
from pipeline.tracking.run import Run
signal.signal(signal.SIGTERM, _terminate)
with Run.begin("one", {}, {}) as run:
    print(run.id, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM")
def test_sigterm_ends_a_run_as_killed(project: Path):
    process = subprocess.Popen([sys.executable, "-c", TERMINATED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert connect().get_run(run_id).info.status == "KILLED"
    process.stdout.close()
