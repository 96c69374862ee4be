"""One MLflow run per pipeline run, shared by the three stages.

``train`` begins it and leaves its id in ``metrics/mlflow.json``, a metric that DVC keeps in git; ``evaluate`` and
``record-videos`` add to it without opening it again, which would reset its status and end time. All of them tell it
to a spool, which is sent from the background: no stage waits for the server, or needs one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from mlflow.data.pandas_dataset import from_pandas
from mlflow.tracking.context import registry as context
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from pipeline import durable
from pipeline.config import project_root
from pipeline.tracking import provenance, spool
from pipeline.tracking.lost import SESSION_START
from pipeline.tracking.sender import Sender, send
from pipeline.tracking.spool import Spool
from pipeline.tracking.store import TrackingError, connect, first_line, refuse_impossible
from pipeline.tracking.stored import LOCAL
from pipeline.tracking.system_metrics import SystemMetrics

log = logging.getLogger(__name__)

RUN_ID_FILE = Path("metrics/mlflow.json")
OUTBOX = "mlruns/unsent"
"""Folder of what stages without a run folder have to tell MLflow, in the real checkout; empty when all is sent."""


class Run:
    """A run in MLflow, told by way of a spool.

    As a context manager it sends from the background what it is told, and at the end waits a while for the server. A
    run that began here (and was not attached to) ends: FINISHED, FAILED on an error, KILLED on Ctrl-C or a signal.

    Attributes:
        spool: What the run is told.
        id: MLflow's id; a local one until MLflow has the run.
    """

    def __init__(self, spool: Spool, began_here: bool, run_id_file: Path | None = None) -> None:
        self.spool, self.id = spool, spool.run_id
        self._held = _holding(spool.path)
        if _in_outbox(spool.path):  # a run folder has one writer anyway
            self._held.acquire()
        self._began_here = began_here
        self._run_id_file = run_id_file and run_id_file.resolve()
        self._sender: Sender | None = None
        self._system_metrics = SystemMetrics(spool) if began_here else None

    @classmethod
    def begin(
        cls,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        folder: Path | None = None,
        resumed: str | None = None,
        run_id_file: Path | None = RUN_ID_FILE,
    ) -> Run:
        """Begin a run with parameters and provenance, or go on with an interrupted one; needs no server.

        Args:
            name: Of the run.
            params: Numbers, texts and lists.
            tags: Beside provenance.
            folder: For the spool; what is uploaded from it is not copied.
            resumed: ``spool.run_id`` of the run to go on with, if its spool is in ``folder``.
            run_id_file: Where the id is left for the next stages; None leaves it nowhere.

        Raises:
            TrackingError: ``MLFLOW_TRACKING_URI`` names no store of MLflow's.
        """
        refuse_impossible()
        local_id = resumed or LOCAL + uuid.uuid4().hex
        path = (folder or _outbox(name)) / f"spool-{local_id}.jsonl"
        goes_on = path.exists()
        run = cls(Spool(path, local_id), True, run_id_file)
        all_tags = {**context.resolve_tags(), **provenance.tags(), SESSION_START: str(spool.now()), **tags}
        if goes_on:
            run.spool.put({"status": "RUNNING"})
            run.tags(all_tags)
        else:
            run.spool.put({"begin": {"name": name, "params": dict(params), "tags": all_tags, "began": spool.now()}})
        if run_id_file:
            _write_run_id(run_id_file, run.id)
        return run

    @classmethod
    def attach(cls, stage: str, run_id_file: Path = RUN_ID_FILE) -> Run:
        """The run that ``train`` began; a restored one where this store doesn't know it (fresh clone, other server).

        Raises:
            TrackingError: There is none, or ``MLFLOW_TRACKING_URI`` names no store of MLflow's.
        """
        refuse_impossible()
        return cls._attached(stage, read_run_id(run_id_file))

    @classmethod
    def of_folder(cls, stage: str, folder: Path) -> Run | None:
        """The run that a run folder's training began, to add to; None where the folder has none."""
        refuse_impossible()
        for path in folder.glob("spool-*.jsonl"):
            return cls._attached(stage, path.stem.removeprefix("spool-"))
        return None

    @classmethod
    def _attached(cls, stage: str, run_id: str) -> Run:
        run = cls(Spool(_outbox(stage) / f"spool-{run_id}.jsonl", run_id), False)
        run.spool.put({"attach": stage})
        return run

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log one batch of metrics."""
        self.spool.metrics({key: float(value) for key, value in values.items()}, step)

    def series(self, key: str, values: Sequence[float]) -> None:
        """Log a curve that MLflow draws, and lays over those of other runs: step 1 is the first value."""
        for step, value in enumerate(values, start=1):
            self.metrics({key: value}, step)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self.spool.put({"tags": dict(tags)})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file; a copy of it, unless it lies beside the spool: the workspace may be gone when it is sent."""
        if not path.resolve().is_relative_to(self.spool.path.parent.resolve()):
            copy = self._files(folder) / path.name
            path = Path(shutil.copyfile(path, copy))
        self.spool.artifact(path, folder)

    def text(self, content: str, name: str) -> None:
        """Upload a text as a file of this name."""
        folder, _, file = name.rpartition("/")
        path = self._files(folder) / file
        path.write_text(content, encoding="utf-8")
        self.spool.artifact(path, folder)

    def table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Log rows as a table that MLflow's UI shows and compares between runs; replaces the one of that name.

        As ``MlflowClient.log_table`` does, which needs the server, and adds to a table that is there.
        """
        folder, _, file = name.rpartition("/")
        path = self._files(folder) / file
        pd.DataFrame(rows).to_json(path, orient="split", index=False, date_format="iso")
        self.spool.artifact(path, folder)
        self.tags({MLFLOW_LOGGED_ARTIFACTS: json.dumps([{"path": name, "type": "table"}])})

    def _files(self, folder: str) -> Path:
        files = self.spool.path.parent / "files" / folder
        files.mkdir(parents=True, exist_ok=True)
        return files

    def track_set(self, tracks: Sequence[int], name: str, use: str) -> None:
        """Record a set of tracks as a dataset input of the run."""
        dataset = {
            "name": name,
            "digest": from_pandas(pd.DataFrame({"track": list(tracks)}), name=name).digest,
            "source_type": "code",
            "source": "CarRacing-v3",
            "schema": json.dumps({"tracks": f"{min(tracks)}..{max(tracks)}"}),
            "profile": json.dumps({"n": len(tracks)}),
        }
        self.spool.put({"inputs": dataset, "use": use})

    def flush(self) -> str:
        """Send what there is, now, and raise what MLflow raises; returns MLflow's id of the run."""
        send(connect(), self.spool.path, self._note_id)
        return self.id

    def _note_id(self, run_id: str) -> None:
        if run_id != self.id:
            self.id = run_id
            if self._run_id_file:
                _write_run_id(self._run_id_file, run_id)

    def __enter__(self) -> Run:
        self._sender = Sender(self.spool, self._note_id)
        if self._system_metrics:
            self._system_metrics.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._system_metrics:
            self._system_metrics.finish()
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        try:
            if self._began_here:
                self.spool.put({"status": status, "time": spool.now()})
        except OSError as problem:  # the disk is full, which is what ended the work
            log.warning("MLflow can't be told that the run is %s (%s)", status, first_line(problem))
        assert self._sender
        try:
            self._sender.close(in_a_hurry=status == "KILLED")
        except BaseException:  # told to stop while the last of a finished training is sent
            self._sender.close(in_a_hurry=True)
            raise
        with self.spool:
            pass
        self._held.release()
        discard_sent(self.spool.path)


def discard_sent(path: Path) -> None:
    """Delete a stage's spool with its files when MLflow has all and nobody adds to it; run folders keep theirs."""
    if not (_in_outbox(path) and spool.is_sent(path)):
        return
    try:
        with _holding(path).acquire(timeout=0):
            pass
    except Timeout:
        return  # its stage has more to tell
    shutil.rmtree(path.parent, ignore_errors=True)


def _in_outbox(path: Path) -> bool:
    return path.parent.parent == project_root() / OUTBOX


def _holding(path: Path) -> FileLock:
    """The lock that a run holds as long as it may add to its spool."""
    return FileLock(path.with_suffix(".held"))


def _outbox(stage: str) -> Path:
    return project_root() / OUTBOX / f"{stage}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{uuid.uuid4().hex[:4]}"


def read_run_id(path: Path = RUN_ID_FILE) -> str:
    """The run that ``train`` left for the next stages.

    Raises:
        TrackingError: There is none, or the file is damaged.
    """
    try:
        return str(json.loads(path.read_text())["run_id"])
    except FileNotFoundError:
        raise TrackingError(f"{path}: no such file; it names the MLflow run. Train first: `dvc repro train`") from None
    except (KeyError, TypeError, ValueError):
        raise TrackingError(f'{path}: expected {{"run_id": "..."}}. Train again: `dvc repro train`') from None


def _write_run_id(path: Path, run_id: str) -> None:
    durable.publish(path, (json.dumps({"run_id": run_id}) + "\n").encode())
