"""One MLflow run per pipeline run, shared by the three stages.

``train`` begins it and writes its id to ``metrics/mlflow.json``, a metric that DVC keeps in git; ``evaluate`` and
``record-videos`` add to it without opening it again, which would reset its status and end time.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import DatasetInput, InputTag, LifecycleStage, Metric, Param, RunTag
from mlflow.entities.dataset import Dataset
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking.context import registry as context

from pipeline.tracking import provenance
from pipeline.tracking.spool import Spool
from pipeline.tracking.store import TrackingError, connect, experiment_id, first_line, is_missing

log = logging.getLogger(__name__)

RUN_ID_FILE = Path("metrics/mlflow.json")
RESTORED_FROM = "restored_from"
MAX_PARAM_LENGTH = 6000
MAX_BATCH = 1000
"""Metrics that MLflow takes in one request."""


class Run:
    """A run in MLflow. As a context manager it ends: FINISHED, FAILED on an error, KILLED on Ctrl-C or a signal.

    Attributes:
        id: MLflow's run id.
        spool: Where the end is kept if MLflow can't be told of it; open until the run has ended.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client, self.id = client, run_id
        self.spool: Spool | None = None
        self._system_metrics: SystemMetricsMonitor | None = None

    @classmethod
    def begin(
        cls, name: str, params: Mapping[str, Any], tags: Mapping[str, str], run_id_file: Path = RUN_ID_FILE
    ) -> Run:
        """Create a run with parameters and provenance, and leave its id for the next stages."""
        client = connect()
        all_tags = {**context.resolve_tags(), **provenance.tags(), **tags}
        created = client.create_run(experiment_id(client), tags=all_tags, run_name=name)
        run = cls(client, created.info.run_id)
        run.params(params)
        _write_run_id(run_id_file, run.id)
        return run

    @classmethod
    def resume(cls, run_id: str, run_id_file: Path = RUN_ID_FILE) -> Run | None:
        """Go on with a run that was interrupted; None where this store doesn't know it."""
        client = connect()
        try:
            client.update_run(run_id, status="RUNNING")
        except MlflowException:
            return None
        _write_run_id(run_id_file, run_id)
        return cls(client, run_id)

    @classmethod
    def attach(cls, name: str, run_id_file: Path = RUN_ID_FILE) -> Run:
        """The run that ``train`` began; a restored one where this store doesn't know it (fresh clone, other server)."""
        return cls.known_or_restored(connect(), read_run_id(run_id_file), name)

    @classmethod
    def known_or_restored(cls, client: MlflowClient, run_id: str, name: str) -> Run:
        """The run of this id, or its stand-in where the store doesn't have it (any more), made once and found again."""
        try:
            if client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE:
                return cls(client, run_id)
        except MlflowException as error:
            if not is_missing(error):  # a server in trouble is no reason for a second run
                raise
        return cls(client, _restored(client, run_id, name))

    @classmethod
    def of_folder(cls, folder: Path) -> Run | None:
        """The run that a run folder's training wrote to; None where this store doesn't know it."""
        client = connect()
        for spool in folder.glob("spool-*.jsonl"):
            try:
                return cls(client, client.get_run(spool.stem.removeprefix("spool-")).info.run_id)
            except MlflowException as error:
                if not is_missing(error):
                    raise
        return None

    def params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; lists as JSON."""
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in params.items()}
        batch = [Param(key, text[:MAX_PARAM_LENGTH]) for key, text in texts.items()]
        self.client.log_batch(self.id, params=batch, synchronous=True)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log one batch of metrics."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(k, float(v), now, step) for k, v in values.items()])

    def series(self, key: str, values: Sequence[float]) -> None:
        """Log a curve that MLflow draws, and lays over those of other runs: step 1 is the first value."""
        now = int(time.time() * 1000)
        for start in range(0, len(values), MAX_BATCH):
            batch = values[start : start + MAX_BATCH]
            self.client.log_batch(
                self.id, metrics=[Metric(key, float(v), now, start + n) for n, v in enumerate(batch, 1)]
            )

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self.client.log_batch(self.id, tags=[RunTag(key, value) for key, value in tags.items()])

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file."""
        self.client.log_artifact(self.id, str(path), folder or None)

    def table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Log rows as a table that MLflow's UI shows and compares between runs."""
        self.client.log_table(self.id, pd.DataFrame(rows), name)

    def image(self, picture: Any, key: str, step: int) -> None:
        """Log an (H, W, 3) uint8 picture; pictures of one key get a step slider."""
        self.client.log_image(self.id, picture, key=key, step=step)

    def track_set(self, tracks: Sequence[int], name: str, use: str) -> None:
        """Record a set of tracks as a dataset input of the run."""
        data = from_pandas(pd.DataFrame({"track": list(tracks)}), name=name)
        entity = Dataset(
            name=name,
            digest=data.digest,
            source_type="code",
            source="CarRacing-v3",
            schema=json.dumps({"tracks": f"{min(tracks)}..{max(tracks)}"}),
            profile=json.dumps({"n": len(tracks)}),
        )
        self.client.log_inputs(self.id, [DatasetInput(entity, [InputTag("mlflow.data.context", use)])])

    def __enter__(self) -> Run:
        self._system_metrics = SystemMetricsMonitor(self.id)  # type: ignore[no-untyped-call]
        self._system_metrics.start()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._system_metrics:
            self._system_metrics.finish()  # type: ignore[no-untyped-call]
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        try:
            self.client.set_terminated(self.id, status)
        except Exception as problem:  # the work is done whatever has become of the server
            log.warning("MLflow can't be told that the run is %s (%s)", status, first_line(problem))
            if self.spool:
                self.spool.end(status)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"run_id": run_id}) + "\n")


def _restored(client: MlflowClient, run_id: str, name: str) -> str:
    """Find or create the stand-in for a run that this store does not know."""
    experiment = experiment_id(client)
    known = client.search_runs([experiment], f"tags.{RESTORED_FROM} = '{run_id}'", max_results=1)
    if known:
        return str(known[0].info.run_id)
    tags = {**context.resolve_tags(), **provenance.tags(), RESTORED_FROM: run_id}
    created = client.create_run(experiment, tags=tags, run_name=f"{name} (restored)")
    client.set_terminated(created.info.run_id, "FINISHED")
    return str(created.info.run_id)
