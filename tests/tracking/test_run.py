"""The life of a run, read back with MLflow's own client."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.sync import send_spools
from pipeline.tracking import provenance
from pipeline.tracking.run import OUTBOX, Run, read_run_id
from pipeline.tracking.store import TrackingError, connect, experiment_id
from pipeline.tracking.stored import LOCAL, RESTORED_FROM
from tests.tracking.runs import begun, stored

UNKNOWN = "0" * 32


def status(run: Run) -> str:
    return str(stored(run).info.status)


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
    assert stored(run).info.end_time > 0


def test_a_run_is_running_within_its_block(project: Path):
    with Run.begin("one", {}, {}) as run:
        run.flush()
        assert status(run) == "RUNNING"


def test_a_run_knows_its_parameters_and_where_it_came_from(project: Path):
    data = stored(
        begun("one", {"learning_rate": 1e-5, "net_arch": [64], "device": "cpu"}, {"fingerprint": "abcd"})
    ).data
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
    before = stored(run).info
    time.sleep(0.01)
    with Run.attach("evaluate") as evaluate:
        evaluate.metrics({"evaluate/mean": 901.5})
    after = stored(run)
    assert after.data.metrics["evaluate/mean"] == 901.5
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.end_time)


def unknown_run(project: Path) -> None:
    (project / "metrics").mkdir(exist_ok=True)
    (project / "metrics/mlflow.json").write_text(json.dumps({"run_id": UNKNOWN}))


def test_an_unknown_run_gets_one_stand_in_for_all_later_stages(project: Path):
    unknown_run(project)
    evaluate, record = (Run.attach(stage).flush() for stage in ("evaluate", "record-videos"))
    assert evaluate == record != UNKNOWN
    found = connect().search_runs([experiment_id(connect())])
    assert [(run.info.run_id, run.data.tags[RESTORED_FROM], run.info.status) for run in found] == [
        (evaluate, UNKNOWN, "FINISHED")
    ]


def test_a_deleted_run_gets_a_stand_in(project: Path):
    run = end_with(None)
    connect().delete_run(run.id)
    restored = Run.attach("evaluate")
    restored.metrics({"evaluate/mean": 1.0})
    assert restored.flush() != run.id
    assert stored(restored).data.metrics == {"evaluate/mean": 1.0}


def test_a_store_in_trouble_is_no_reason_for_a_second_run(project: Path, monkeypatch: pytest.MonkeyPatch):
    from mlflow.exceptions import MlflowException

    end_with(None)

    def fail(self: MlflowClient, run_id: str) -> None:
        raise MlflowException("internal error")

    monkeypatch.setattr(MlflowClient, "get_run", fail)
    with pytest.raises(MlflowException, match="internal error"):
        Run.attach("evaluate").flush()


@pytest.mark.parametrize("text", [None, "", "{}", "[]", "null"])
def test_a_missing_or_damaged_run_id_file_says_what_to_do(text: str | None, project: Path):
    if text is not None:
        (project / "metrics").mkdir()
        (project / "metrics/mlflow.json").write_text(text)
    with pytest.raises(TrackingError, match=r"metrics/mlflow\.json: .*dvc repro train"):
        Run.attach("evaluate")


# A server that is away or never answers


@pytest.fixture(params=["away", "silent"])
def no_answer(request: pytest.FixtureRequest, project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody listens on the server's port, or somebody does and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "silent":
            server.listen(16)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr("pipeline.tracking.sender.STOPPING_SECONDS", 0.2)
        yield
    monkeypatch.delenv("MLFLOW_TRACKING_URI")


def tell_all(folder: Path) -> tuple[Run, float]:
    """A training's run, told everything; and how long that held up the training [s]."""
    (folder / "note.txt").write_text("kept")
    began = time.monotonic()
    run = Run.begin("one", {"seed": 3}, {"fingerprint": "abcd"})
    waited = time.monotonic() - began
    with contextlib.suppress(KeyboardInterrupt), run:
        began = time.monotonic()
        for step in range(200):
            run.metrics({"loss": step / 2}, step)
        run.artifact(folder / "note.txt", "notes")
        run.track_set([5000, 5001], "validation", "validation")
        run.table([{"track": 1, "score": 2.5}], "evaluate/tracks.json")
        waited += time.monotonic() - began
        raise KeyboardInterrupt
    return run, waited


def test_provenance_is_that_of_the_code_wherever_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = provenance.tags()
    monkeypatch.chdir(tmp_path)
    keys = ("mlflow.source.git.commit", "code_dirty")
    assert [provenance.tags().get(key) for key in keys] == [expected.get(key) for key in keys]


@pytest.mark.usefixtures("no_answer")
def test_a_run_begins_and_goes_on_without_a_server_and_gets_there_whole(project: Path, monkeypatch: pytest.MonkeyPatch):
    provenance.tags()  # not of this test: the first use asks git and the processor's name
    run, waited = tell_all(project)
    assert waited < 5, "a single call to a server that is away takes 2.3 s, to a silent one 60 s"
    assert run.id.startswith(LOCAL)
    assert read_run_id() == run.id
    (project / "note.txt").unlink()  # as DVC's temporary folders are

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # the server is back: here, the store of this folder
    for _ in range(2):  # nothing is doubled
        send_spools(connect(), project / OUTBOX)
    client = connect()
    (run_id,) = [found.info.run_id for found in client.search_runs([experiment_id(client)])]
    found = client.get_run(run_id)
    assert (found.info.run_name, found.info.status) == ("one", "KILLED")
    assert found.data.params == {"seed": "3"}
    assert found.data.tags["fingerprint"] == "abcd"
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == [(s, s / 2) for s in range(200)]
    assert [a.path for a in client.list_artifacts(run_id, "notes")] == ["notes/note.txt"]
    assert found.inputs.dataset_inputs[0].dataset.name == "validation"
    assert client.load_table(experiment_id(client), "evaluate/tracks.json", [run_id]).to_dict("list") == {
        "track": [1],
        "score": [2.5],
    }
    assert list((project / OUTBOX).iterdir()) == []


@pytest.mark.usefixtures("no_answer")
def test_a_stage_that_adds_to_a_run_not_sent_yet_waits_for_it(project: Path, monkeypatch: pytest.MonkeyPatch):
    run, _ = tell_all(project)
    with contextlib.suppress(KeyboardInterrupt), Run.attach("evaluate") as evaluate:
        evaluate.metrics({"evaluate/mean": 901.5})
        raise KeyboardInterrupt
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    with pytest.raises(TrackingError, match=r"pipeline\.sync"):
        evaluate.flush()
    run.flush()
    evaluate.flush()
    assert run.id == evaluate.id
    assert stored(run).data.metrics["evaluate/mean"] == 901.5


def test_a_store_that_lost_the_run_gets_all_of_it_again(project: Path):
    run = Run.begin("one", {"seed": 3}, {}, project / "runs/one")
    run.metrics({"loss": 0.5}, 7)
    run.flush()
    connect().delete_run(run.id)
    again = Run.begin("one", {"seed": 3}, {}, run.spool.path.parent, resumed=run.spool.run_id)
    assert again.flush() != run.id
    assert stored(again).data.params == {"seed": "3"}
    assert stored(again).data.metrics == {"loss": 0.5}


def test_a_resumed_run_is_the_same_one_and_running(project: Path):
    folder = project / "runs/one"
    with contextlib.suppress(KeyboardInterrupt), Run.begin("one", {"seed": 0}, {}, folder) as run:
        raise KeyboardInterrupt
    assert status(run) == "KILLED"
    again = Run.begin("one", {"seed": 0}, {"fingerprint": "new"}, folder, resumed=run.spool.run_id)
    assert again.flush() == run.id == read_run_id()
    assert (status(again), stored(again).data.tags["fingerprint"]) == ("RUNNING", "new")


def test_the_machines_load_is_sampled_and_goes_on_counting(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    folder = project / "runs/one"
    for resumed in (None, LOCAL + "one"):
        with Run.begin("one", {}, {}, folder, resumed or LOCAL + "one") as run:
            time.sleep(0.5)
    steps = [m.step for m in connect().get_metric_history(run.id, "system/cpu_utilization_percentage")]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 4


TERMINATED = """
import time
from pipeline import interrupts
from pipeline.tracking.run import Run
interrupts.GRACE = 0.1
with interrupts.Interrupts(), Run.begin("one", {}, {}) as run:
    print(run.flush(), flush=True)
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
