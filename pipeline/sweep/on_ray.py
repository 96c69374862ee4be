"""Trainings on the machines of a Ray cluster. A task starts the same process as this machine alone would.

Ray places the tasks and notices lost machines; that a training goes on elsewhere is the runner's doing, from its run
folder, which must lie where all machines see it.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.config import cores
from pipeline.sweep.definition import SweepError
from pipeline.sweep.job import AGAIN, Job
from pipeline.sweep.launch import CODE, end, how_it_ended, launch

log = logging.getLogger(__name__)

LOCAL = "local"
PASSED_ON = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "OMP_WAIT_POLICY")
"""Variables that trainings elsewhere need of this process; credentials are the machines' own."""
PROBE_SECONDS = 60.0
HEAD_TRIES, HEAD_PAUSE = 5, 3.0
"""The head counts as gone when it took no connection so many times, so many seconds apart."""
STORE_BYTES = 100 * 2**20
"""Nothing goes through Ray's object store but words; its default is a third of the memory."""
remote: Any = ray.remote
"""Ray's own types know no options that are made at run time."""


class RayUnusable(SweepError):
    """The cluster can't do it; the message says what to do."""


def supervise(folder: str, root: str, cores: int, environment: Mapping[str, str]) -> str:
    """Ray's task: a job's process on this machine, from beginning to end; returns how it ended."""
    if not (Path(folder) / "job.json").exists():
        return f"{socket.gethostname()} doesn't see {folder}"
    process = launch(Path(folder), Path(root), cores, environment)
    try:
        return how_it_ended(process.wait())
    finally:
        if process.poll() is None:  # cancelled
            end(process)


def probe(place: str) -> str:
    """Ray's task: what is wrong with this machine; empty where nothing is."""
    if not Path(place).exists():
        return f"{socket.gethostname()} doesn't see {place}"
    import pipeline

    here = Path(str(pipeline.__file__)).resolve().parents[1]
    return "" if here == CODE else f"{socket.gethostname()} has the code in {here}, not in {CODE}"


class OnRay:
    """Jobs as tasks of a Ray cluster, as many at a time as it has room for.

    Args:
        address: Of the cluster, or ``local``: one of this machine alone, which ends with this process.
        root: The project's folder, seen by all machines.
        cores: Of each training.
        gpus: Of each training; Ray shows it no others.
        most: Trainings at a time, whatever the cluster has.

    Raises:
        RayUnusable: The cluster can't be reached, or its machines don't see the project.
    """

    def __init__(self, address: str, root: Path, cores: int, gpus: float, most: int | None) -> None:
        self._root, self._cores, self._gpus, self._most = root, cores, gpus, most
        self._environment = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
        self._running: dict[Any, str] = {}
        _connect(address)
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._head = (host, int(port))
        # One attempt a task: the runner decides on the next, and knows how far the training had come.
        options = {"num_cpus": cores, "num_gpus": gpus, "max_retries": 0}
        self._supervise = remote(**options)(supervise)
        self._check_machines()

    def _check_machines(self) -> None:
        """Refuse machines that don't see the project's folder or have other code, before anything is trained."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = [
            remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))(
                probe
            ).remote(str(self._root))
            for node in _alive()
        ]
        try:
            wrong = sorted({answer for answer in ray.get(asked, timeout=PROBE_SECONDS) if answer})
        except (RayError, ImportError) as error:
            raise RayUnusable(f"a machine of the cluster can't run our code: {_first_line(error)}") from None
        if wrong:
            raise RayUnusable(
                f"{'; '.join(wrong)}. Trainings go on on other machines from their folders: put the project, or its "
                "log_root, on a path that all machines share"
            )
        if not self._capacity():
            raise RayUnusable(
                f"no machine of the cluster has {self._cores} cores and {self._gpus:g} GPUs for a training"
            )

    def _capacity(self) -> int:
        """Trainings that the living machines have room for."""
        total = 0
        for node in _alive():
            has = node["Resources"]
            room = int(has.get("CPU", 0) // self._cores)
            total += min(room, int(has.get("GPU", 0) / self._gpus + 1e-9)) if self._gpus else room
        return total if self._most is None else min(total, self._most)

    def room(self) -> int:
        self._insist_on_head()
        return self._capacity() - len(self._running)

    def _insist_on_head(self) -> None:
        """End in an orderly way when the head has been away for a while; Ray would end this process a minute later.

        Raises:
            SystemExit: It has.
        """
        for _ in range(HEAD_TRIES):
            try:
                socket.create_connection(self._head, timeout=5).close()
                return
            except OSError:
                time.sleep(HEAD_PAUSE)
        self._running.clear()  # Ray's machines end their tasks themselves, when they notice
        log.error("the cluster's head at %s:%d is gone; with a new one, the same command goes on", *self._head)
        raise SystemExit(AGAIN)

    def start(self, job: Job) -> None:
        task = self._supervise.remote(str(job.folder), str(self._root), self._cores, self._environment)
        self._running[task] = job.key

    def ended(self) -> list[tuple[str, str]]:
        self._insist_on_head()
        if not self._running:
            return []
        tasks = list(self._running)
        over, _ = ray.wait(tasks, num_returns=len(tasks), timeout=0)
        return [(self._running.pop(task), _how(task)) for task in over]

    def stop(self) -> None:
        tasks = list(self._running)
        for task in tasks:
            ray.cancel(task)
        if tasks:
            ray.wait(tasks, num_returns=len(tasks), timeout=8)


def _connect(address: str) -> None:
    """Join a cluster, or start one here, which :func:`pipeline.sim.ray_cluster.close_to_others` has to precede.

    Raises:
        RayUnusable: It can't be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.WARNING,
        "runtime_env": {"env_vars": {"PYTHONPATH": str(CODE)}},
    }
    if address == LOCAL:
        options |= {"address": LOCAL, "num_cpus": cores(), "object_store_memory": STORE_BYTES}
    else:
        options["address"] = address
        del options["include_dashboard"]
        if os.environ.get("RAY_AUTH_MODE") != "token":
            log.warning("RAY_AUTH_MODE is not token: who reaches the ports of this cluster can run code on it")
    try:
        ray.init(**options)
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise RayUnusable(
            f"Ray at {address} can't be used: {_first_line(error)}. Is it running, and are RAY_AUTH_MODE and the token "
            "those of the cluster? docs/sweeping.md says how to start one"
        ) from None


def _alive() -> list[dict[str, Any]]:
    nodes: Any = ray.nodes
    return [node for node in nodes() if node["Alive"]]


def _how(task: Any) -> str:
    try:
        return str(ray.get(task))
    except RayError as error:
        return _first_line(error)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
