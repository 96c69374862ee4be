"""Runs that still say RUNNING although their process is gone: killed without a chance to end them."""

from __future__ import annotations

import platform

import mlflow
import psutil
from mlflow import MlflowClient
from mlflow.entities import Run

SESSION_START = "session_start"
"""Tag: when the process named by the tag ``pid`` took the run up [Unix time, ms]; a resumed run began before it."""
CLOCK_TOLERANCE = 10.0
"""Seconds by which the kernel's start of a process and the wall clock may disagree."""


def mark_killed(client: MlflowClient, experiment: str) -> list[str]:
    """End the runs of this machine's dead processes as KILLED, at their last sign of life; returns their names."""
    found: list[Run] = mlflow.search_runs(
        [experiment], "attributes.status = 'RUNNING'", output_format="list", max_results=10_000
    )
    dead = [run for run in found if process_is_dead(run.data.tags.get("pid", ""), taken_up(run))]
    for run in dead:
        client.set_terminated(run.info.run_id, "KILLED", last_sign_of_life(client, run))
    return [run.info.run_name for run in dead]


def taken_up(run: Run) -> float:
    """When the process that last worked on a run took it up [Unix time, s]."""
    return int(run.data.tags.get(SESSION_START, run.info.start_time)) / 1000


def process_is_dead(tag: str, begun: float) -> bool:
    """Whether the process ``PID@host`` that took up a run at ``begun`` (Unix time, seconds) is gone.

    False for other machines' processes, of which nothing is known. A process younger than the run is another one that
    was given the same number.
    """
    number, _, host = tag.partition("@")
    if not number.isdecimal() or host != platform.node():
        return False
    try:
        process = psutil.Process(int(number))
        return bool(process.status() == psutil.STATUS_ZOMBIE or process.create_time() > begun + CLOCK_TOLERANCE)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def last_sign_of_life(client: MlflowClient, run: Run) -> int:
    """Time of the newest metric, or of the run's start without any [Unix time, ms]."""
    newest = [client.get_metric_history(run.info.run_id, key)[-1].timestamp for key in run.data.metrics]
    return int(max(newest, default=run.info.start_time))
