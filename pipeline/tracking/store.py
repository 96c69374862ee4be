"""Where runs are kept: MLflow's own default, anchored to the real checkout, or the server that the environment names.

With nothing set, ``mlflow ui`` without flags in the checkout shows what is written here: ``mlflow.db`` and ``mlruns/``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from sqlalchemy.exc import SQLAlchemyError

from pipeline.config import project_root

EXPERIMENT = "CarRacing"
PRIMARY_METRIC = "evaluate/mean"
DESCRIPTION = """Cars trained from pixels on Gymnasium's `CarRacing-v3`.

One run is one pipeline run: `train` -> `evaluate` -> `record-videos`. **`evaluate/mean`** is the mean raw return over
100 held-out tracks of the stock game, deterministic policy; 900 counts as solved. `eval/*` are validations during
training, `rollout/ep_rew_mean` is the raw return of the exploring policy, `rollout/shaped_return` what it was trained
on.
"""

USERINFO = re.compile(r"(?<=://)[^/\s]*@")
"""User and password in a URL (RFC 3986, 3.2.1); to the last ``@``: a password may hold one."""
_ENVIRONMENT = {
    # A server that is away is noticed in seconds, not in MLflow's default of four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class TrackingError(Exception):
    """MLflow could not be reached or used; the message says what to do."""


def connect() -> MlflowClient:
    """A client of the store, which exists and is of MLflow's present version when this returns.

    Raises:
        TrackingError: The store can't be reached.
    """
    uri = _choose_store()
    try:
        with _one_at_a_time():
            client = MlflowClient()
            client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:  # the last: a database's driver
        raise _unusable(uri, error) from None
    return client


def refuse_impossible() -> None:
    """Tell, without asking a server or a database, that the environment names something that is no store of MLflow's.

    Raises:
        TrackingError: It does.
    """
    uri = _choose_store()
    if uri.partition(":")[0].partition("+")[0] not in DATABASE_ENGINES:  # those are opened at once, and slowly
        try:
            MlflowClient()
        except MlflowException as error:
            raise _unusable(uri, error) from None


def _choose_store() -> str:
    """Name the store to MLflow; returns its URI."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(project_root() / 'mlflow.db').as_posix()}"
    if USERINFO.search(uri):
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # the link to a run would show the password
    mlflow.set_tracking_uri(uri)
    return uri


def _one_at_a_time() -> AbstractContextManager[object]:
    """The first use of a database file creates its tables: several processes doing so at once break each other.

    A server does that by itself, and one that never answers must not keep others from the file.
    """
    if _is_local():
        return FileLock(project_root() / "mlflow.db.lock")
    return nullcontext()


def _is_local() -> bool:
    return str(mlflow.get_tracking_uri()).startswith("sqlite")


@contextmanager
def in_one_message() -> Iterator[None]:
    """Raise what MLflow raises inside as a :class:`TrackingError`: a server may go away at any call."""
    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        raise _unusable(str(mlflow.get_tracking_uri()), error) from None


def _unusable(uri: str, error: Exception) -> TrackingError:
    return TrackingError(
        f"MLflow at {without_password(uri)} can't be used: {first_line(error)}\n"
        "Start that server, or unset MLFLOW_TRACKING_URI to keep runs in this folder."
    )


def is_missing(error: MlflowException) -> bool:
    """Whether MLflow says that it doesn't have the thing asked for, and not that something went wrong."""
    return str(error.error_code) == "RESOURCE_DOES_NOT_EXIST"


def first_line(error: BaseException) -> str:
    """An error's message, without the pages that some libraries add to it and the passwords of URLs in it."""
    return without_password((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]


def without_password(text: str) -> str:
    """A text in which ``scheme://user:password@`` has become ``scheme://***@``: it may go to a log."""
    return USERINFO.sub("***@", text)


def experiment_id(client: MlflowClient) -> str:
    """The id of the project's experiment, created with description and primary metric when missing."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    with _one_at_a_time():
        experiment: Experiment | None = client.get_experiment_by_name(name)
        if experiment is None:
            return str(client.create_experiment(name, _artifact_location(name), _tags()))
        if experiment.lifecycle_stage != LifecycleStage.ACTIVE:  # deleted in the UI: its runs are only hidden
            client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _artifact_location(name: str) -> str | None:
    if _is_local():
        return (project_root() / "mlruns" / name).as_uri()
    return None  # a server knows its own place


def _tags() -> dict[str, str]:
    return {
        "mlflow.note.content": DESCRIPTION,
        "mlflow.experimentKind": "custom_model_development",  # the UI opens on runs and models, not on chats
        "mlflow.experiment.primaryMetric.name": PRIMARY_METRIC,
        "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
    }
