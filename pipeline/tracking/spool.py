"""Metrics and files on their way to MLflow: first to a local file, then sent from the background.

Training never waits for the server. What it could not take stays in the spool, and ``python -m pipeline.sync`` sends it
later. A line sent twice does no harm: MLflow keeps equal (key, step, time, value) once.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image

from pipeline.tracking.store import first_line

log = logging.getLogger(__name__)

BATCH = 200
RETRY_SECONDS = 10.0


class Spool:
    """An append-only JSONL file of what a run has to tell MLflow, and the number of its bytes already sent.

    Attributes:
        path: The spool; beside it, ``<name>.sent`` holds the offset of the first line not sent yet.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self.path, self.run_id = path, run_id
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._known = _metrics_in(path)  # a resumed training says again what it said after its last checkpoint
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._sent = path.with_suffix(".sent")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Append one batch of metrics, each (metric, step) once."""
        new = {key: value for key, value in values.items() if (key, step) not in self._known}
        if new:
            self._put({"metrics": new, "step": step, "time": int(time.time() * 1000)})

    def artifact(self, path: Path, folder: str) -> None:
        """Append a file to upload; until it is sent it must stay where it is, beside the spool or anywhere."""
        self._put({"artifact": self._place(path), "folder": folder})

    def _place(self, path: Path) -> str:
        """A file's place as seen from the spool, so that the folder can be moved."""
        place, beside = path.resolve(), self.path.parent.resolve()
        return str(place.relative_to(beside) if place.is_relative_to(beside) else place)

    def image(self, path: Path, key: str, step: int) -> None:
        """Append a picture; those of one key get a step slider. It must stay where it is until it is sent."""
        self._put({"image": self._place(path), "key": key, "step": step, "time": int(time.time() * 1000)})

    def end(self, status: str) -> None:
        """Append how the run ended, where MLflow could not be told at once."""
        self._put({"status": status, "time": int(time.time() * 1000)})

    def _put(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps({"run_id": self.run_id, **entry}) + "\n")
        self._file.flush()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the file; unsent lines stay."""
        self._file.close()


def sent_bytes(path: Path) -> int:
    """How many bytes of a spool MLflow has taken."""
    sent = path.with_suffix(".sent")
    return int(sent.read_text() or 0) if sent.exists() else 0  # empty: killed while writing it


def _metrics_in(path: Path) -> set[tuple[str, int]]:
    if not path.exists():
        return set()
    entries = [_parse(path, line) for line in path.read_bytes().splitlines()]
    return {(key, entry["step"]) for entry in entries for key in entry.get("metrics", ())}


def unsent(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The next entries not sent yet, at most a batch, and the offset behind them. A torn last line is left."""
    offset = sent_bytes(path)
    entries: list[dict[str, Any]] = []
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n") or len(entries) == BATCH:
                break
            offset += len(line)
            entries.append(_parse(path, line))
    return entries, offset


def _parse(path: Path, line: bytes) -> dict[str, Any]:
    """An entry; an empty one for a line that a crash of the machine spoiled."""
    try:
        return dict(json.loads(line))
    except ValueError:
        log.warning("%s: a spoiled line is left out: %.80r", path, line)
        return {}


def _drop_torn_line(path: Path) -> None:
    """Take away half a line that a killed process left, lest the next one is glued to it."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def send(client: MlflowClient, path: Path) -> int:
    """Send everything unsent in order; returns the number of entries. Raises what MLflow raises, losing nothing."""
    count = 0
    while True:
        entries, offset = unsent(path)
        if offset == sent_bytes(path):
            return count
        _send_metrics(client, [e for e in entries if "metrics" in e])
        _send_artifacts(client, path.parent, [e for e in entries if "artifact" in e])
        _send_images(client, path.parent, [e for e in entries if "image" in e])
        for entry in entries:
            if "status" in entry:
                client.set_terminated(entry["run_id"], entry["status"], entry["time"])
        path.with_suffix(".sent").write_text(str(offset))
        count += len(entries)


def _send_metrics(client: MlflowClient, entries: list[dict[str, Any]]) -> None:
    by_run: dict[str, list[Metric]] = {}
    for e in entries:
        by_run.setdefault(e["run_id"], []).extend(Metric(k, v, e["time"], e["step"]) for k, v in e["metrics"].items())
    for run_id, metrics in by_run.items():
        for start in range(0, len(metrics), 1000):  # MLflow's limit for one request
            client.log_batch(run_id, metrics=metrics[start : start + 1000])


def _send_artifacts(client: MlflowClient, beside: Path, entries: list[dict[str, Any]]) -> None:
    for e in entries:
        file = beside / e["artifact"]
        if file.exists():
            client.log_artifact(e["run_id"], str(file), e["folder"] or None)
        else:  # what comes after it must not wait for ever
            log.warning("%s was deleted before it could be sent to MLflow; left out", e["artifact"])


def _send_images(client: MlflowClient, beside: Path, entries: list[dict[str, Any]]) -> None:
    for e in entries:
        file = beside / e["image"]
        if not file.exists():
            log.warning("%s was deleted before it could be sent to MLflow; left out", e["image"])
            continue
        with Image.open(file) as picture:
            client.log_image(e["run_id"], picture, key=e["key"], step=e["step"], timestamp=e["time"])


class Sender:
    """A background thread that sends a spool as it grows, and tries again after failures."""

    def __init__(self, client: MlflowClient, spool: Spool, interval: float = 1.0) -> None:
        self._client, self._spool, self._interval = client, spool, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow-sender", daemon=True)
        self._thread.start()

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self) -> None:
        pause = self._interval
        while not self._stop.wait(pause):
            pause = self._interval if self._try() else RETRY_SECONDS

    def _try(self) -> bool:
        try:
            send(self._client, self._spool.path)
        except Exception as error:  # whatever the server or the network did: training goes on
            log.warning("MLflow does not take metrics (%s); kept in %s", first_line(error), self._spool.path)
            return False
        return True

    def close(self, timeout: float = 30.0) -> bool:
        """Send the rest. Returns whether all is sent; if not, the spool keeps it for ``pipeline.sync``."""
        self._stop.set()
        self._thread.join(timeout)
        done = not self._thread.is_alive() and self._try()
        if not done:
            log.warning("not all metrics reached MLflow; send them later with `python -m pipeline.sync`")
        return done
