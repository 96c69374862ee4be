"""Nothing lost and nothing doubled on the way to MLflow, whatever is killed or away."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from stable_baselines3.common.logger import Logger

from pipeline.tracking.run import Run
from pipeline.tracking.sender import Sender, send
from pipeline.tracking.spool import Spool, sent_bytes, unsent
from pipeline.tracking.store import connect
from pipeline.tracking.writer import SpoolWriter
from tests.tracking.runs import begun

Batch = list[tuple[str, float, int]]


class Server:
    """Stands in for MLflow: keeps what it takes, and is away for given calls."""

    def __init__(self, away: Sequence[int] = ()) -> None:
        self.away, self.calls = set(away), 0
        self.taken: Batch = []
        self.files: list[tuple[str, str | None]] = []
        self.images: list[tuple[str, int, object]] = []

    def _answer(self) -> None:
        self.calls += 1
        if self.calls in self.away:
            raise ConnectionError("server is away")

    def log_batch(self, run_id: str, metrics: Sequence[Any]) -> None:
        assert len(metrics) <= 1000, "MLflow refuses more in one request"
        self._answer()
        self.taken += [(metric.key, metric.value, metric.step) for metric in metrics]

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        self._answer()
        self.files.append((Path(path).name, folder))

    def log_image(self, run_id: str, image: Image.Image, key: str, step: int, timestamp: int) -> None:
        self._answer()
        self.images.append((key, step, image.getpixel((1, 0))))


def spool_of(path: Path, n: int, run_id: str = "r", keys: int = 1) -> Spool:
    spool = Spool(path, run_id)
    for step in range(n):
        spool.metrics({f"k{key}": step + key / 10 for key in range(keys)}, step)
    return spool


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def test_all_is_sent_in_order_and_once(tmp_path: Path):
    spool, server = spool_of(tmp_path / "s.jsonl", 450), Server()
    assert send(server, spool.path) == 450  # type: ignore[arg-type]
    assert send(server, spool.path) == 0  # type: ignore[arg-type]
    assert server.taken == [("k0", float(step), step) for step in range(450)]


def test_a_metric_is_told_once_a_step_also_by_a_resumed_training(tmp_path: Path):
    spool, server = spool_of(tmp_path / "s.jsonl", 3), Server()
    spool.metrics({"k0": 77.0, "other": 1.0}, 2)
    Spool(spool.path, "r").metrics({"k0": 78.0, "other": 2.0, "new": 3.0}, 2)
    send(server, spool.path)  # type: ignore[arg-type]
    assert server.taken == [("k0", 0.0, 0), ("k0", 1.0, 1), ("k0", 2.0, 2), ("other", 1.0, 2), ("new", 3.0, 2)]


def test_a_long_training_that_goes_on_tells_each_step_once_and_remembers_none(tmp_path: Path):
    path, server = tmp_path / "s.jsonl", Server()
    for first in (0, 700):  # it was killed at step 1000, and goes on from its state at 700
        spool = Spool(path, "r")
        for step in range(first, first + 1000):
            spool.metrics({"k0": float(step)}, step, rising=True)
    assert spool._known == {"k0": {1699}}
    send(server, path)  # type: ignore[arg-type]
    assert server.taken == [("k0", float(step), step) for step in range(1700)]


def test_requests_stay_within_mlflows_limit(tmp_path: Path):
    spool, server = spool_of(tmp_path / "s.jsonl", 200, keys=12), Server()
    send(server, spool.path)  # type: ignore[arg-type]
    assert len(server.taken) == 2400


@pytest.mark.parametrize("away", [[1], [2], [3, 4], [1, 3, 5]])
def test_a_server_that_goes_away_in_the_middle_gets_all_of_it_later(away: list[int], tmp_path: Path):
    spool, server = spool_of(tmp_path / "s.jsonl", 900), Server(away)
    for _ in away:
        with pytest.raises(ConnectionError):
            send(server, spool.path)  # type: ignore[arg-type]
    send(server, spool.path)  # type: ignore[arg-type]
    assert set(server.taken) == {("k0", float(step), step) for step in range(900)}


def test_mlflow_keeps_what_is_sent_twice_once(project: Path):
    run, client = begun(), connect()
    spool = spool_of(project / "s.jsonl", 30, run.id)
    send(client, spool.path)
    spool.path.with_suffix(".sent").write_text("0")  # killed after sending, before noting it
    send(client, spool.path)
    assert history(client, run.id, "k0") == [(step, float(step)) for step in range(30)]


def test_the_sender_survives_an_outage_and_the_numbers_arrive_in_mlflow(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.tracking.sender.RETRY_SECONDS", 0.05)
    run = begun()
    real, outage = MlflowClient.log_batch, {"left": 3}

    def unsteady(client: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        if outage["left"]:
            outage["left"] -= 1
            raise ConnectionError("server is away")
        return real(client, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", unsteady)
    spool = Spool(project / "s.jsonl", run.id)
    sender = Sender(spool, client=connect(), interval=0.01)
    for step in range(100):
        spool.metrics({"k0": float(step)}, step)
        time.sleep(0.002)
    assert sender.close()
    assert outage["left"] == 0
    assert history(connect(), run.id, "k0") == [(step, float(step)) for step in range(100)]


def test_a_server_away_till_the_end_leaves_all_for_later(tmp_path: Path):
    spool, server = spool_of(tmp_path / "s.jsonl", 5), Server(away=range(1, 100))
    assert not Sender(spool, client=server, interval=60).close()  # type: ignore[arg-type]
    server.away.clear()
    assert send(server, spool.path) == 5  # type: ignore[arg-type]


def test_in_a_hurry_the_status_goes_first_and_the_rest_waits(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun()
    spool = Spool(project / "s.jsonl", run.id)
    spool.put({"tags": {"status": "a tag of that name"}})
    (project / "note.txt").write_text("kept")
    spool.artifact(project / "note.txt", "")
    spool.put({"status": "FINISHED", "time": 1})
    client = connect()

    def slow(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("time is up")

    monkeypatch.setattr(MlflowClient, "log_artifact", slow)
    monkeypatch.setattr(MlflowClient, "log_batch", slow)
    with pytest.raises(ConnectionError):
        send(client, spool.path, in_a_hurry=lambda: True)
    assert client.get_run(run.id).info.status == "FINISHED"
    assert sent_bytes(spool.path) == 0, "the rest is sent later, in its order"


def test_a_finished_run_that_is_told_to_stop_while_it_sends_hurries(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, real = [], Sender.close

    def interrupted(sender: Sender, in_a_hurry: bool = False) -> bool:
        closed.append(in_a_hurry)
        if len(closed) == 1:
            raise SystemExit(143)
        return real(sender, in_a_hurry)

    monkeypatch.setattr(Sender, "close", interrupted)
    with pytest.raises(SystemExit), Run.begin("one", {}, {}) as run:
        pass
    assert closed == [False, True]
    assert connect().get_run(run.id).info.status == "FINISHED"


def test_a_torn_last_line_waits_and_does_not_spoil_what_comes_after(tmp_path: Path):
    spool = spool_of(tmp_path / "s.jsonl", 2)
    with spool.path.open("a") as file:
        file.write('{"run_id": "r", "metr')
    server = Server()
    assert send(server, spool.path) == 2  # type: ignore[arg-type]
    again = Spool(spool.path, "r")  # the resumed run goes on in the same file
    again.metrics({"k0": 7.0}, 7)
    assert send(server, spool.path) == 1  # type: ignore[arg-type]
    assert server.taken == [("k0", 0.0, 0), ("k0", 1.0, 1), ("k0", 7.0, 7)]
    assert sent_bytes(spool.path) == spool.path.stat().st_size


def test_a_spoiled_line_is_left_out(tmp_path: Path):
    spool = spool_of(tmp_path / "s.jsonl", 1)
    with spool.path.open("ab") as file:
        file.write(b"\0" * 100 + b"\n")
    Spool(spool.path, "r").metrics({"k0": 2.0}, 2)
    server = Server()
    send(server, spool.path)  # type: ignore[arg-type]
    assert server.taken == [("k0", 0.0, 0), ("k0", 2.0, 2)]


def test_an_emptied_note_of_the_sent_bytes_means_sending_again(tmp_path: Path):
    spool = spool_of(tmp_path / "s.jsonl", 3)
    spool.path.with_suffix(".sent").write_text("")
    assert len(unsent(spool.path)[0]) == 3


def test_files_are_uploaded_and_a_deleted_one_holds_nothing_up(project: Path):
    run, client = begun(), connect()
    spool = Spool(project / "s.jsonl", run.id)
    kept, gone = project / "kept.txt", project / "gone.txt"
    kept.write_text("kept")
    spool.artifact(gone, "checkpoints")
    spool.artifact(kept, "checkpoints")
    spool.metrics({"k0": 1.0}, 1)
    send(client, spool.path)
    assert [file.path for file in client.list_artifacts(run.id, "checkpoints")] == ["checkpoints/kept.txt"]
    assert history(client, run.id, "k0") == [(1, 1.0)]


def test_pictures_and_curves_get_their_steps(project: Path):
    run, client = begun(), connect()
    for step in (100, 200):
        Image.new("RGB", (3, 2), (step, 0, 0)).save(project / f"{step}.png")
        run.spool.image(project / f"{step}.png", "filmstrip", step)
    run.spool.image(project / "gone.png", "filmstrip", 300)
    run.series("by_rank", [3.0, 5.0])
    run.flush()
    names = [Path(artifact.path).name for artifact in client.list_artifacts(run.id, "images")]
    # What MLflow's page reads the steps off: key, step, time and a number, divided by +.
    assert sorted(name.split("+")[:3] for name in names if name.endswith(".png")) == [
        ["filmstrip", "step", "100"],
        ["filmstrip", "step", "200"],
    ]
    assert history(client, run.id, "by_rank") == [(1, 3.0), (2, 5.0)]


KILLED = """
import sys
from pathlib import Path
from pipeline.tracking.spool import Spool
spool, step = Spool(Path(sys.argv[1]), "r"), 0
while True:
    spool.metrics({"k0": float(step), "padding": 0.123456789}, step)
    print(step, flush=True)
    step += 1
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_what_a_writer_said_before_it_was_killed_is_kept(bare_project: Path):
    path = bare_project / "s.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(500):
        writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    said = 499 + len(writer.stdout.read().split("\n")) - 1
    writer.wait(10)
    writer.stdout.close()
    server = Server()
    send(server, path)  # type: ignore[arg-type]
    steps = [step for key, _, step in server.taken if key == "k0"]
    assert steps == list(range(len(steps)))
    assert len(steps) > said


def logged(values: Mapping[str, Any], tmp_path: Path) -> dict[str, float]:
    """What reaches the spool of values given to SB3's own logger."""
    spool = Spool(tmp_path / "s.jsonl", "r")
    logger = Logger(None, [SpoolWriter(spool)])
    for key, value in values.items():
        logger.record(key, value)
    logger.dump(8)
    (line,) = spool.path.read_text().splitlines()
    entry = json.loads(line)
    assert entry["step"] == 8
    return dict(entry["metrics"])


def test_the_writer_passes_numbers_and_keeps_back_the_rest(tmp_path: Path):
    values = {
        "train/loss": 0.5,
        "train/n_updates": 3,
        "train/numpy": np.float32(0.25),
        "train/array": np.array(4.0),
        "train/nan": math.nan,
        "train/inf": np.float32(-np.inf),
        "train/text": "words",
        "train/none": None,
    }
    assert logged(values, tmp_path) == {
        "train/loss": 0.5,
        "train/n_updates": 3.0,
        "train/numpy": 0.25,
        "train/array": 4.0,
    }


def test_the_writer_leaves_out_what_sb3_was_told_to_exclude(tmp_path: Path):
    spool = Spool(tmp_path / "s.jsonl", "r")
    logger = Logger(None, [SpoolWriter(spool)])
    logger.record("time/fps", np.float64(30.0), exclude="mlflow")
    logger.record("time/steps", 8, exclude="tensorboard")
    logger.record("time/picture", np.zeros((2, 2)))
    logger.dump(8)
    assert json.loads(spool.path.read_text())["metrics"] == {"time/steps": 8.0}


def test_pictures_go_with_their_step_and_a_lost_one_stops_nothing(tmp_path: Path) -> None:
    server, spool = Server(), spool_of(tmp_path / "spool.jsonl", 0)
    for step in (100, 200):
        picture = Image.new("RGB", (3, 2), (step, 0, 0))
        picture.save(tmp_path / f"{step}.png")
        spool.image(tmp_path / f"{step}.png", "filmstrip", step)
    spool.image(tmp_path / "gone.png", "filmstrip", 300)
    spool.metrics({"k": 1.0}, 400)
    assert send(server, spool.path) == 4
    assert server.images == [("filmstrip", 100, (100, 0, 0)), ("filmstrip", 200, (200, 0, 0))]
    assert server.taken == [("k", 1.0, 400)]


def test_pictures_get_a_slider_in_mlflow(project: Path) -> None:
    run = begun()
    for step in (100, 200):
        Image.new("RGB", (3, 2), (step, 0, 0)).save(project / f"{step}.png")
        run.spool.image(project / f"{step}.png", "filmstrip", step)
    run.flush()
    names = [artifact.path for artifact in connect().list_artifacts(run.id, "images")]
    # What MLflow's page reads the steps off: key, step, time and a number, divided by +.
    assert sorted(int(name.split("+")[2]) for name in names if name.endswith(".png")) == [100, 200]
    assert all(Path(name).name.startswith("filmstrip+step+") for name in names)
