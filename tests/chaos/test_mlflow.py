"""Rows of the chaos table about MLflow: a real server that goes away, and a registration that is cut short."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import promote, sync
from tests.chaos import evidence, failpoints
from tests.chaos.conftest import FULL, Reference
from tests.chaos.victims import Victim, new_project, result
from tests.policies import write_policy
from tests.services import NO_POSTGRES, Mlflow, Postgres, Service, postgres_tools

OUTAGE_SECONDS = 60.0
SECONDS_BETWEEN_ROLLOUTS = 6.0
"""16 rollouts: the training begins before the outage and ends after it, on whatever machine."""
KILLS_IN_A_TRAINING = 4
ROLLOUTS = 16
"""Of the tiny training."""
rng = random.Random(int(os.environ.get("CHAOS_SEED", "0")))


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    if postgres_tools() is None:
        pytest.skip(NO_POSTGRES)
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.remove()


def embedded(project: Path) -> Mlflow:
    """A server before a project's own database."""
    return Mlflow(project, f"sqlite:///{project}/mlflow.db")


def test_server_away(reference: Reference, project: Path, database: Path, row: Callable[..., Any]) -> None:
    n = int(os.environ.get("CHAOS_OUTAGES", "10" if FULL else "1"))
    with row("MLflow server stopped for 60 s") as figures:
        longest = 0.0
        for done in range(n):
            folder = new_project(project.parent / f"outage-{done}", database)
            server = embedded(folder)
            server.start()
            try:
                longest = max(longest, train_through_an_outage(folder, server))
            finally:
                server.kill()
            assert result(folder) == reference.result
            lost, doubled = evidence.compare(evidence.metrics(folder), reference.metrics)
            figures |= {"outages": done + 1, "lost": lost, "doubled": doubled, "longest stall [s]": round(longest, 3)}
            assert (lost, doubled) == (0, 0)
            assert evidence.statuses(folder) == {"FINISHED": 1}
            assert longest < 1


def train_through_an_outage(folder: Path, server: Mlflow) -> float:
    """Returns the longest time that telling MLflow something has taken the training [s]."""
    stall = folder / "stall.txt"

    def prepare() -> None:
        failpoints.slow_rollouts(SECONDS_BETWEEN_ROLLOUTS)
        failpoints.time_the_spool(stall)

    victim = Victim(folder, prepare, MLFLOW_TRACKING_URI=server.uri)
    victim.wait_for("runs/*/checkpoints/policy_*.safetensors", count=2)
    server.kill()
    time.sleep(OUTAGE_SECONDS)
    assert psutil.pid_exists(victim.pid), "the training ended before the outage did"
    server.start()
    victim.finish()
    return float(stall.read_text())


def test_postgres_killed(
    reference: Reference, project: Path, database: Path, postgres: Postgres, row: Callable[..., Any]
) -> None:
    n = int(os.environ.get("CHAOS_DATABASE_KILLS", "40" if FULL else "4"))
    with row("MLflow server or its PostgreSQL killed") as figures:
        longest, done = 0.0, 0
        while done < n:
            folder = new_project(project.parent / f"postgres-{done}", database)
            store = postgres.create(folder.name)
            server = Mlflow(folder, store, environment=postgres.environment)
            server.start()
            try:
                longest = max(longest, train_through_kills(folder, (server, postgres), server.uri))
                Victim(folder, work=partial(sync.main, []), MLFLOW_TRACKING_URI=server.uri).finish()
            finally:
                server.kill()
            assert result(folder) == reference.result
            query = partial(postgres.query, database=folder.name)
            lost, doubled = evidence.compare(evidence.metrics(query), reference.metrics)
            done += KILLS_IN_A_TRAINING
            figures |= {"kills": done, "lost": lost, "doubled": doubled, "longest stall [s]": round(longest, 3)}
            assert (lost, doubled) == (0, 0)
            assert evidence.statuses(query) == {"FINISHED": 1}
            assert longest < 1


def train_through_kills(folder: Path, services: tuple[Service, ...], uri: str) -> float:
    """Kill one service after another at any moment; returns the longest time that telling has taken [s].

    Rollouts are let through in as many parts as there are kills, so that each kill finds the training at work. The
    last one of a part is saved when the next part begins.
    """
    stall, gate = folder / "stall.txt", folder / "gate"
    gate.touch()

    def prepare() -> None:
        failpoints.held_rollouts(gate)
        failpoints.time_the_spool(stall)

    victim = Victim(folder, prepare, MLFLOW_TRACKING_URI=uri)
    try:
        for kill in range(KILLS_IN_A_TRAINING):
            kill_amid_part(kill, victim, gate, services[kill % len(services)])
        let_through(gate, ROLLOUTS)
        victim.finish()
    finally:
        victim.kill()  # where something failed before its end
    return float(stall.read_text())


def kill_amid_part(number: int, victim: Victim, gate: Path, service: Service) -> None:
    policies, part = "runs/*/checkpoints/policy_*.safetensors", ROLLOUTS // KILLS_IN_A_TRAINING
    let_through(gate, part)
    victim.wait_for(policies, count=part * number + 1)  # the training has begun to tell of this part,
    time.sleep(rng.uniform(0.0, 1.0))
    service.kill()
    victim.wait_for(policies, count=part * (number + 1) - 1)  # and tells more of it while nobody listens,
    time.sleep(rng.uniform(5.0, 9.0))  # which its sender has noticed by then
    service.start()


def let_through(gate: Path, rollouts: int) -> None:
    with gate.open("ab") as file:
        file.write(b"." * rollouts)


@pytest.mark.parametrize("place", ["embedded", "PostgreSQL"])
def test_registration(
    place: str, database: Path, project: Path, row: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    postgres: Postgres | None = None if place == "embedded" else request.getfixturevalue("postgres")
    with row("crash during registration" + (" on PostgreSQL" if postgres else "")) as figures:
        for count, point in enumerate(failpoints.REGISTRATION_POINTS, start=1):
            folder = new_project(project.parent / point.__name__, database, tracks="10000:10002")
            if postgres is None:
                assert_registered_once(folder, point, folder)
            else:
                server = Mlflow(folder, postgres.create(point.__name__), environment=postgres.environment)
                server.start()
                try:
                    query = partial(postgres.query, database=point.__name__)
                    assert_registered_once(folder, point, query, MLFLOW_TRACKING_URI=server.uri)
                finally:
                    server.kill()
            figures["points"] = count


def assert_registered_once(
    folder: Path, point: Callable[[int], None], store: evidence.Store, **environment: str
) -> None:
    """Crash a promotion at a point, repeat it, and look for one version, with both aliases."""
    digest = hashlib.sha256(write_policy(folder / promote.POLICY, 1).read_bytes()).hexdigest()
    work = partial(promote.main, [])
    killed = Victim(folder, partial(point, 1), work, **environment)
    assert killed.wait() == -signal.SIGKILL, killed.said()[-3000:]
    Victim(folder, work=work, **environment).finish()
    versions = evidence.query(store, "SELECT name, version FROM model_versions")
    assert versions == [("carracing-ppo", 1)], "one policy is one version"
    aliases = dict(evidence.query(store, "SELECT alias, version FROM registered_model_aliases"))
    assert aliases == {"challenger": 1, "champion": 1}
    (tag,) = evidence.query(store, "SELECT value FROM model_version_tags WHERE key = 'sha256'")
    assert tag == (digest,)
