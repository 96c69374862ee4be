"""Rows of the chaos table about MLflow: a real server that goes away, and a registration that is cut short."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from pipeline import promote
from tests.chaos import evidence, failpoints
from tests.chaos.conftest import FULL, Reference
from tests.chaos.victims import Victim, new_project, result
from tests.policies import write_policy

OUTAGE_SECONDS = 60.0
SECONDS_BETWEEN_ROLLOUTS = 6.0
"""16 rollouts: the training begins before the outage and ends after it, on whatever machine."""


class Server:
    """A real MLflow server on loopback, with a project's database (or a PostgreSQL one) behind it."""

    def __init__(self, project: Path, store: str | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._project, self._store = project, store or f"sqlite:///{project}/mlflow.db"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--workers", "1", "--backend-store-uri", self._store, "--artifacts-destination", "artifacts"),
        ]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._project / "server.txt").open("ab") as output:
            self._process = subprocess.Popen(
                command, cwd=self._project, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        until = time.monotonic() + 300
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.3)
        raise AssertionError("MLflow's server never answered")

    def stop(self) -> None:
        """As a failing machine would: no goodbye."""
        assert self._process
        family = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        for process in family:
            process.kill()
        self._process.wait(10)


def test_server_away(reference: Reference, project: Path, database: Path, row: Callable[..., Any]) -> None:
    n = int(os.environ.get("CHAOS_OUTAGES", "10" if FULL else "1"))
    with row("MLflow server stopped for 60 s") as figures:
        longest = 0.0
        for done in range(n):
            folder = new_project(project.parent / f"outage-{done}", database)
            server = Server(folder)
            server.start()
            try:
                longest = max(longest, train_through_an_outage(folder, server))
            finally:
                server.stop()
            assert result(folder) == reference.result
            lost, doubled = evidence.compare(evidence.metrics(folder), reference.metrics)
            figures |= {"outages": done + 1, "lost": lost, "doubled": doubled, "longest stall [s]": round(longest, 3)}
            assert (lost, doubled) == (0, 0)
            assert evidence.statuses(folder) == {"FINISHED": 1}
            assert longest < 1


def train_through_an_outage(folder: Path, server: Server) -> float:
    """Returns the longest time that telling MLflow something has taken the training [s]."""
    stall = folder / "stall.txt"

    def prepare() -> None:
        failpoints.slow_rollouts(SECONDS_BETWEEN_ROLLOUTS)
        failpoints.time_the_spool(stall)

    victim = Victim(folder, prepare, MLFLOW_TRACKING_URI=server.uri)
    victim.wait_for("runs/*/checkpoints/policy_*.safetensors", count=2)
    server.stop()
    time.sleep(OUTAGE_SECONDS)
    assert psutil.pid_exists(victim.pid), "the training ended before the outage did"
    server.start()
    victim.finish()
    return float(stall.read_text())


def test_registration(database: Path, project: Path, row: Callable[..., Any]) -> None:
    with row("crash during registration") as figures:
        for count, point in enumerate(failpoints.REGISTRATION_POINTS, start=1):
            folder = new_project(project.parent / point.__name__, database, tracks="10000:10002")
            digest = hashlib.sha256(write_policy(folder / promote.POLICY, 1).read_bytes()).hexdigest()
            work = partial(promote.main, [])
            killed = Victim(folder, partial(point, 1), work)
            assert killed.wait() == -signal.SIGKILL, killed.said()[-3000:]
            Victim(folder, work=work).finish()
            versions = evidence.query(folder, "SELECT name, version FROM model_versions")
            assert versions == [("carracing-ppo", 1)], "one policy is one version"
            aliases = dict(evidence.query(folder, "SELECT alias, version FROM registered_model_aliases"))
            assert aliases == {"challenger": 1, "champion": 1}
            (tag,) = evidence.query(folder, "SELECT value FROM model_version_tags WHERE key = 'sha256'")
            assert tag == (digest,)
            figures["points"] = count
