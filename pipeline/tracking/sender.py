"""From the spool to MLflow, in the background: the server may be away, slow or full, and nobody waits for it."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, InputTag, Metric
from mlflow.entities.dataset import Dataset
from PIL import Image

from pipeline.tracking import spool as spools
from pipeline.tracking.spool import Spool
from pipeline.tracking.store import TrackingError, connect, first_line
from pipeline.tracking.stored import LOCAL, begin, find, known_or_restored, log_tags

log = logging.getLogger(__name__)

RETRY_SECONDS = 10.0
FINISHING_SECONDS = 30.0
"""Patience of a finished run with the server; what is left then is sent by ``python -m pipeline.sync``."""
STOPPING_SECONDS = 3.0
"""Patience of an interrupted one, which must be gone within 10 s."""


def send(
    client: MlflowClient,
    path: Path,
    on_run: Callable[[str], None] = lambda run_id: None,
    in_a_hurry: Callable[[], bool] = lambda: False,
) -> int:
    """Send everything unsent in order; returns the number of entries. Raises what MLflow raises, losing nothing.

    Args:
        client: Of the store.
        path: The spool.
        on_run: Called with MLflow's id of the run as soon as the run is there.
        in_a_hurry: Asked on the way; once it says so, the run's status goes before all that is left.
    """
    count, hurried = 0, False
    with FileLock(path.with_suffix(".lock"), timeout=60):  # `sync` and the run itself must not begin it twice
        run_id = _run_of(client, path)
        if run_id is None:
            return 0
        on_run(run_id)
        while True:
            entries, offset = spools.unsent(path)
            if offset == spools.sent_bytes(path):
                return count
            for kind, group in itertools.groupby(entries, _kind):
                if in_a_hurry() and not hurried:
                    statuses = [entry for entry in spools.read_all(path, b'"status"') if "status" in entry]
                    _send_status(client, run_id, path.parent, statuses[-1:])
                    hurried = True
                _SENDERS[kind](client, run_id, path.parent, group)
            spools.note_sent(path, offset)
            count += len(entries)


def _run_of(client: MlflowClient, path: Path) -> str | None:
    """MLflow's id of the run a spool is about: begun, found again or restored, as its first entry says."""
    first = spools.header(path)
    if not first:
        return None
    if "attach" in first:
        return _attached(client, first["run_id"], first["attach"])
    if "begin" not in first:
        return str(first["run_id"])
    run_id, is_new = begin(client, first["run_id"], **first["begin"])
    if is_new:
        spools.note_sent(path, 0)  # also for a store that has lost the run: it gets all of it again
    return run_id


def _attached(client: MlflowClient, run_id: str, name: str) -> str:
    if run_id.startswith(LOCAL) and not find(client, run_id):  # it has a spool of its own, which must go first
        raise TrackingError(f"{run_id} began while MLflow was away; `python -m pipeline.sync` sends it first")
    return known_or_restored(client, run_id, name)


def _kind(entry: Mapping[str, Any]) -> str:
    return next((kind for kind in _SENDERS if kind in entry), "")


Entries = Iterable[Mapping[str, Any]]


def _nothing(client: MlflowClient, run_id: str, beside: Path, entries: Entries) -> None:
    """The first entry, whose work is done, and spoiled lines."""


def _send_metrics(client: MlflowClient, run_id: str, beside: Path, entries: Entries) -> None:
    metrics = [Metric(key, value, e["time"], e["step"]) for e in entries for key, value in e["metrics"].items()]
    for start in range(0, len(metrics), 1000):  # MLflow's limit for one request
        client.log_batch(run_id, metrics=metrics[start : start + 1000])


def _send_tags(client: MlflowClient, run_id: str, beside: Path, entries: Entries) -> None:
    log_tags(client, run_id, {key: value for e in entries for key, value in e["tags"].items()})


def _send_inputs(client: MlflowClient, run_id: str, beside: Path, entries: Entries) -> None:
    for e in entries:
        tag = InputTag("mlflow.data.context", e["use"])
        client.log_inputs(run_id, [DatasetInput(Dataset(**e["inputs"]), [tag])])


def _send_artifacts(client: MlflowClient, run_id: str, beside: Path, entries: Entries) -> None:
    for e in entries:
        if file := _still_there(beside / e["artifact"]):
            client.log_artifact(run_id, str(file), e["folder"] or None)


def _send_images(client: MlflowClient, run_id: str, beside: Path, entries: Entries) -> None:
    for e in entries:
        if file := _still_there(beside / e["image"]):
            with Image.open(file) as picture:
                client.log_image(run_id, picture, key=e["key"], step=e["step"], timestamp=e["time"])


def _still_there(file: Path) -> Path | None:
    if file.exists():
        return file
    log.warning("%s was deleted before it could be sent to MLflow; left out", file)  # what comes after it must not wait
    return None


def _send_status(client: MlflowClient, run_id: str, beside: Path, entries: Entries) -> None:
    for e in entries:
        if e["status"] == "RUNNING":  # a training that goes on
            client.update_run(run_id, status="RUNNING")
        else:
            client.set_terminated(run_id, e["status"], e["time"])


_SENDERS: dict[str, Callable[[MlflowClient, str, Path, Entries], None]] = {
    "metrics": _send_metrics,
    "tags": _send_tags,
    "inputs": _send_inputs,
    "artifact": _send_artifacts,
    "image": _send_images,
    "status": _send_status,
    "": _nothing,
}


class Sender:
    """A background thread that sends a spool as it grows, and tries again after failures."""

    def __init__(
        self,
        spool: Spool,
        on_run: Callable[[str], None] = lambda run_id: None,
        client: MlflowClient | None = None,
        interval: float = 1.0,
    ) -> None:
        self._spool, self._on_run, self._client, self._interval = spool, on_run, client, interval
        self._stop, self._hurry = threading.Event(), threading.Event()
        self._complained = self._done = self._given_up = False
        # A daemon: the process may end while the server makes this thread wait.
        self._thread = threading.Thread(target=self._run, name="mlflow-sender", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pause = 0.0  # the run is begun at once
        while not self._stop.wait(pause):
            pause = self._interval if self._try() else RETRY_SECONDS
        if not self._given_up:
            self._done = self._try()

    def _try(self) -> bool:
        try:
            self._client = self._client or connect()
            send(self._client, self._spool.path, self._on_run, self._hurry.is_set)
        except Exception as error:  # whatever the server or the network did: training goes on
            level = logging.DEBUG if self._complained else logging.WARNING  # an outage is told once, not every 10 s
            log.log(level, "MLflow takes nothing at present (%s); kept in %s", first_line(error), self._spool.path)
            self._complained = True
            return False
        if self._complained:
            log.info("MLflow has all there is again")
        self._complained = False
        return True

    def close(self, in_a_hurry: bool = False) -> bool:
        """Send the rest; returns whether all is sent. If not, it stays in the spool.

        Waits ``FINISHING_SECONDS``, or ``STOPPING_SECONDS`` in a hurry and where the server is in trouble already.
        May be called again, in a hurry, when the first call was interrupted.
        """
        if in_a_hurry:
            self._hurry.set()
        self._stop.set()
        self._thread.join(STOPPING_SECONDS if in_a_hurry or self._complained else FINISHING_SECONDS)
        if not self._done:
            self._given_up = True
            log.warning("not all reached MLflow; send it later with `python -m pipeline.sync`")
        return self._done
