"""What MLflow remembers of a run: parameters, figures, curves, the table of its tracks, its films and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run as Entity
from mlflow.exceptions import MlflowException

from pipeline.tracking.store import TrackingError, connect, experiment_id, is_missing

CURVES = {
    "ep_rew_mean": "rollout/ep_rew_mean",
    "eval_mean": "eval/mean_reward",
    "eval_std": "eval/std_reward",
    "eval_low": "eval/ci_low",
    "eval_high": "eval/ci_high",
}
"""Column of a learning curve -> metric."""
TABLE = "evaluate/tracks.json"
POLICY = "models/best_model.safetensors"
PARENT = "mlflow.parentRunId"


@dataclass(frozen=True)
class PastRun:
    """A run as MLflow's store holds it.

    Attributes:
        id: MLflow's.
        name: As it was given; not unique.
        status: RUNNING, FINISHED, FAILED or KILLED.
        begun: Unix time, seconds.
        params: As texts, lists as JSON.
        metrics: The latest value of each.
        tags: Provenance among them.
        curve: One row per step with ``step`` and any of :data:`CURVES`, and ``seconds`` since the start.
        tracks: One row per evaluated track, with the fields of an ``Episode``; empty before ``evaluate``.
    """

    id: str
    name: str
    status: str
    begun: float
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    curve: list[dict[str, float | None]]
    tracks: list[dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    """A run in short.

    Attributes:
        id: MLflow's.
        name: As it was given; not unique.
        params: As texts, lists as JSON.
        metrics: The latest value of each.
    """

    id: str
    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]


def _short(entity: Entity) -> Trained:
    return Trained(entity.info.run_id, entity.info.run_name, entity.data.params, entity.data.metrics)


class History:
    """Reads runs.

    Raises:
        TrackingError: MLflow can't be reached.
    """

    def __init__(self) -> None:
        self.client: MlflowClient = connect()

    def run(self, reference: str) -> PastRun:
        """The run of this id, or the newest of this name.

        Raises:
            TrackingError: There is none.
        """
        entity = self._find(reference)
        info, data = entity.info, entity.data
        return PastRun(
            id=info.run_id,
            name=info.run_name,
            status=info.status,
            begun=info.start_time / 1000,
            params=data.params,
            metrics=data.metrics,
            tags=data.tags,
            curve=self._curve(info.run_id, info.start_time),
            tracks=self._table(info.run_id),
        )

    def short(self, reference: str) -> Trained:
        """As :meth:`run`, without curve and tracks, which take longer to read."""
        return _short(self._find(reference))

    def policy(self, run_id: str, path: str, folder: Path) -> Path:
        """A policy file among a run's artifacts, in ``folder``.

        Raises:
            TrackingError: The run has none there.
        """
        if path not in self.artifacts(run_id, path.rpartition("/")[0]):
            raise TrackingError(
                f"run {run_id} has no {path}: expected a run that was trained to its end; see `make ui`"
            )
        return self.download(run_id, path, folder)

    def children(self, run_id: str) -> list[Trained]:
        """The runs below a parent run, such as a sweep's."""
        return self._search(f"tags.`{PARENT}` = '{run_id}'")

    def evaluated(self) -> list[Trained]:
        """All runs that have a score on the held-out tracks."""
        return self._search("metrics.`evaluate/mean` > -1000")

    def _search(self, condition: str) -> list[Trained]:
        found = self.client.search_runs([experiment_id(self.client)], condition, max_results=1000)
        return [_short(entity) for entity in found]

    def _find(self, reference: str) -> Entity:
        entity = self._by_id(reference) or self._newest(reference)
        if entity is None:
            raise TrackingError(f"{reference}: expected the id or the name of a run; MLflow has none; see `make ui`")
        return entity

    def _by_id(self, reference: str) -> Entity | None:
        try:
            return self.client.get_run(reference)
        except MlflowException as error:
            if is_missing(error) or error.error_code == "INVALID_PARAMETER_VALUE":
                return None
            raise

    def _newest(self, name: str) -> Entity | None:
        quote = (
            '"' if "'" in name else "'"
        )  # MLflow's filters know no escape: a name with both is found by its id alone
        if quote in name:
            return None
        experiment = experiment_id(self.client)
        found = self.client.search_runs([experiment], f"attributes.run_name = {quote}{name}{quote}", max_results=1)
        return found[0] if found else None

    def _curve(self, run_id: str, begun: int) -> list[dict[str, float | None]]:
        rows: dict[int, dict[str, float | None]] = {}
        for column, metric in CURVES.items():
            for point in self.client.get_metric_history(run_id, metric):
                row = rows.setdefault(point.step, {"step": point.step, "seconds": 0.0})
                row[column] = point.value
                row["seconds"] = max(row["seconds"] or 0.0, (point.timestamp - begun) / 1000)  # its validation's end
        return [rows[step] for step in sorted(rows)]

    def _table(self, run_id: str) -> list[dict[str, Any]]:
        if TABLE not in self.artifacts(run_id, "evaluate"):
            return []
        table = json.loads(mlflow.artifacts.load_text(f"runs:/{run_id}/{TABLE}"))
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]

    def artifacts(self, run_id: str, folder: str) -> list[str]:
        """Paths of a run's files in one of its folders."""
        return sorted(file.path for file in self.client.list_artifacts(run_id, folder) if not file.is_dir)

    def download(self, run_id: str, path: str, folder: Path) -> Path:
        """One of a run's files, in ``folder``."""
        return Path(self.client.download_artifacts(run_id, path, str(folder)))
