"""Runs in MLflow's store: begun once, found again, restored where the store doesn't have them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context import registry as context

from pipeline.tracking import provenance
from pipeline.tracking.store import experiment_id, is_missing

LOCAL = "local-"
"""Begins the ids of runs that began here before MLflow was told of them."""
LOCAL_ID = "local_id"
"""Tag of such a run, by which it is found again."""
RESTORED_FROM = "restored_from"
MAX_PARAM_LENGTH = 6000


def begin(
    client: MlflowClient, local_id: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str], began: int
) -> tuple[str, bool]:
    """Create the run of a local id, unless it is there; returns MLflow's id, and whether it is new.

    Args:
        client: Of the store.
        local_id: By which it is found again.
        name: Of the run.
        params: See :func:`log_params`.
        tags: Beside the local id.
        began: Unix time [ms].
    """
    known = find(client, local_id)
    if known:
        log_params(client, known, params)  # again: it may have been killed in between
        return known, False
    created = client.create_run(experiment_id(client), began, {**tags, LOCAL_ID: local_id}, name)
    log_params(client, created.info.run_id, params)
    return str(created.info.run_id), True


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Log parameters; lists as JSON."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in params.items()}
    batch = [Param(key, text[:MAX_PARAM_LENGTH]) for key, text in texts.items()]
    client.log_batch(run_id, params=batch, synchronous=True)


def log_metrics(client: MlflowClient, run_id: str, values: Mapping[str, float]) -> None:
    """Log one batch of metrics at step 0."""
    now = int(time.time() * 1000)
    client.log_batch(run_id, metrics=[Metric(key, float(value), now, 0) for key, value in values.items()])


def log_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags."""
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def known_or_restored(client: MlflowClient, run_id: str, name: str) -> str:
    """The run of this id, MLflow's or local, or its stand-in where the store doesn't have it (any more).

    The stand-in is made once and found again.
    """
    known = find(client, run_id)
    if known:
        return known
    tags = {**context.resolve_tags(), **provenance.tags(), RESTORED_FROM: run_id}
    created = client.create_run(experiment_id(client), tags=tags, run_name=f"{name} (restored)")
    client.set_terminated(created.info.run_id, "FINISHED")
    return str(created.info.run_id)


def find(client: MlflowClient, run_id: str) -> str | None:
    """MLflow's id of the run with this id, its own or local, or of its stand-in; None if there is neither."""
    if run_id.startswith(LOCAL):
        return _tagged(client, LOCAL_ID, run_id) or _tagged(client, RESTORED_FROM, run_id)
    return run_id if _is_known(client, run_id) else _tagged(client, RESTORED_FROM, run_id)


def _is_known(client: MlflowClient, run_id: str) -> bool:
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE)
    except MlflowException as error:
        if is_missing(error):
            return False
        raise  # a server in trouble is no reason for a second run


def _tagged(client: MlflowClient, key: str, value: str) -> str | None:
    found = client.search_runs([experiment_id(client)], f"tags.{key} = '{value}'", max_results=1)
    return str(found[0].info.run_id) if found else None
