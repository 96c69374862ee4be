"""Environments on a Ray cluster: each actor holds several, the learner stays where it is.

``SharedMemoryVecEnv(env_fns, cluster.n_actors, make_worker=cluster.make_worker)`` steps them. An actor carries out the
same orders in the same way as a worker process of this machine; what that one finds in shared memory travels with the
order and the reply. Which actor has which environments, and where it is, decides no bit of the result.

Actors step, and nothing else: the network's last bits depend on the batch, so the learner decides for all environments.
Ray is imported when it is used: nobody else needs to have it installed.
"""

from __future__ import annotations

import logging
import os
import pickle
import platform
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import cores
from pipeline.sim.supervisor import START_ALLOWANCE, Worker
from pipeline.sim.worker import (
    ONE_THREAD,
    TERMINAL,
    Arrays,
    EnvSlice,
    Failure,
    Layout,
    Message,
    dumps,
    encoded,
    limit_threads,
)

log = logging.getLogger(__name__)

LOCAL = "local"
"""The address of a cluster that is started on this machine and ends with the training."""

DEADLINE = 60.0
"""Seconds after which an actor that does not answer counts as hung, or its node as gone."""

DECIDING = ("numpy", "gymnasium", "box2d", "opencv-python", "pygame-ce")
"""Packages whose release decides what an environment shows."""

Parcel = list[tuple[str, Any, NDArray[Any]]]
"""Parts of :class:`Arrays` on their way: name, index, values."""


class ClusterError(Exception):
    """The cluster can't be used; the message says what was expected, what came and what to do."""


@dataclass(frozen=True)
class Cluster:
    """A cluster this process is connected to.

    Attributes:
        n_actors: Actors that share the environments.
        n_nodes: Nodes of the cluster.
    """

    n_actors: int
    n_nodes: int

    def __str__(self) -> str:
        actors, nodes = ("" if n == 1 else "s" for n in (self.n_actors, self.n_nodes))
        return f"{self.n_actors} Ray actor{actors} on a cluster of {self.n_nodes} node{nodes}"

    def make_worker(self, indices: list[int], arrays: Arrays) -> Worker:
        """A worker for ``SharedMemoryVecEnv`` that lives in this cluster."""
        return ActorWorker(indices, arrays)


@contextmanager
def connected(address: str, n_actors: int | None, n_envs: int) -> Iterator[Cluster]:
    """Connect to a cluster, or start one here; ``n_actors`` None means one per free CPU.

    A cluster started here listens on the loopback address, asks for a token of this process's own, has no dashboard
    and ends with the block. For one elsewhere, Ray finds the token as that one's nodes do: ``RAY_AUTH_TOKEN``,
    ``RAY_AUTH_TOKEN_PATH`` or ``~/.ray/auth_token``.

    Raises:
        ClusterError: Ray is not installed, the cluster does not answer, or it has fewer CPUs than ``n_actors``.
    """
    if address == LOCAL:
        close_to_others()
    ray = _ray()
    if address.startswith("ray://"):
        raise ClusterError(
            f"--ray: expected local, auto or HOST:PORT, got {address}: pictures would go by way of a proxy. "
            "Start the training on a node of the cluster"
        )
    try:
        with _own_signal_handlers():
            _init(ray, address, n_actors)
        yield _cluster(ray, n_actors, n_envs)
    finally:
        ray.shutdown()


def close_to_others() -> None:
    """Before Ray is imported to be started here: the loopback address alone, and a token of this process's own."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's name for what may leave the machine
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would put its processes behind all else here
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _ray() -> Any:
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ClusterError(
            "--ray: Ray is not installed; `pip install -r requirements-cluster.txt -c constraints.txt` installs it"
        ) from None
    return ray


def _init(ray: Any, address: str, n_actors: int | None) -> None:
    """``ray.init``; nodes elsewhere get this checkout's code sent, whatever lies there."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options |= {"num_cpus": n_actors or cores(), "num_gpus": 0, "include_dashboard": False}
    else:
        package = str(Path(__file__).parents[1])
        options["runtime_env"] = {"py_modules": [package], "excludes": ["**/__pycache__"], "env_vars": ONE_THREAD}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"--ray: no cluster at {address} ({error}). `ray status --address {address}` says whether it runs; the "
            "token must be the cluster's (RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)"
        ) from error


def _cluster(ray: Any, n_actors: int | None, n_envs: int) -> Cluster:
    cpus, free = (int(kind().get("CPU", 0)) for kind in (ray.cluster_resources, ray.available_resources))
    if (n_actors or 1) > cpus:
        raise ClusterError(f"--ray-actors: expected 1 to {cpus}, the cluster's CPUs, got {n_actors or 'none of them'}")
    nodes = sum(node["Alive"] for node in ray.nodes())
    return Cluster(min(n_actors or max(free, 1), n_envs), nodes)


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep what this process does on signals: ``ray.init`` puts an exit of its own in SIGTERM's place."""
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if main else {}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# What travels


def needed(arrays: Arrays, message: Message) -> Parcel:
    """What a worker reads in the arrays to carry out an order."""
    match message:
        case ("step", indices, _):
            return [("actions", indices, arrays.actions[indices])]
        case ("verify", _, pages):
            where = list(pages.values()), list(pages)
            return [("observations", where, arrays.observations[where])]
    return []


def written(arrays: Arrays, message: Message, reply: Any) -> Parcel:
    """What a worker wrote in the arrays when it carried out an order."""
    match message:
        case _ if isinstance(reply, Failure):
            return []
        case ("step", indices, page):
            ended = [index for index, (_, reset_info) in zip(indices, reply, strict=True) if reset_info is not None]
            last = [("observations", (TERMINAL, ended), arrays.observations[TERMINAL, ended])] if ended else []
            rewards = ("rewards", indices, arrays.rewards[indices])
            return [rewards, ("dones", indices, arrays.dones[indices]), *_stepped(arrays, page, indices), *last]
        case ("reset" | "restore", starts, page):
            indices = list(starts)
            return [("observations", (page, indices), arrays.observations[page, indices])]
    return []


def _stepped(arrays: Arrays, page: int, indices: Sequence[int]) -> Parcel:
    """Observations after a step: of a stack of pictures that has moved on by one, the newest alone.

    Of four pictures that is a quarter, and more: replies above 100 KB go by way of Ray's object store, and cost the
    learner twice as much (measured with ``pipeline.bench --ray``).
    """
    new, old = arrays.observations[page], arrays.observations[1 - page]
    moved: dict[int, list[int]] = {}
    for index in indices:
        moved.setdefault(_moved_by(new[index], old[index]), []).append(index)
    return [("moved", (page, group, by), new[group][:, -by:] if by else new[group]) for by, group in moved.items()]


def _moved_by(new: NDArray[Any], old: NDArray[Any]) -> int:
    """How many channels came into the stack ``old`` at its end to make it ``new``, 1 or 3; 0 if it is another."""
    deep = len(new) if new.ndim else 0
    return next((by for by in (1, 3) if deep > by and np.array_equal(new[:-by], old[by:])), 0)


def unpack(parcel: Parcel, arrays: Arrays) -> None:
    """Put what came into its places."""
    for name, where, values in parcel:
        if name == "moved":
            page, indices, by = where
            stacks = arrays.observations[1 - page, indices]
            arrays.observations[page, indices] = np.concatenate([stacks[:, by:], values], axis=1) if by else values
        else:
            getattr(arrays, name)[where] = values


# There: an actor


class Actor:
    """The environments of one Ray actor, and the part of the arrays that they use."""

    def __init__(self, layout: Layout) -> None:
        self._arrays = Arrays(layout)
        self._envs = EnvSlice(self._arrays)

    def machine(self) -> dict[str, str]:
        """What decides the bits of its environments."""
        return machine()

    def answer(self, order: bytes, parcel: Parcel) -> tuple[bytes, Parcel]:
        """Carry out one order; returns the encoded reply and what was written in the arrays."""
        unpack(parcel, self._arrays)
        message = pickle.loads(order)
        reply = self._envs.answer(message)
        limit_threads()
        return encoded(reply), written(self._arrays, message, reply)


def machine() -> dict[str, str]:
    """Releases of the :data:`DECIDING` packages, instruction set and C library of this process."""
    instructions = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    return {
        **{package: _release(package) for package in DECIDING},
        "instructions": f"{platform.machine()} {' '.join(instructions)}",
        "C library": " ".join(platform.libc_ver()),
    }


def _release(package: str) -> str:
    for name in (package, f"{package}-headless"):  # OpenCV without windows is the same otherwise
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


# Here: what the supervisor knows of it


class ActorWorker(Worker):
    """A worker in a Ray cluster. It takes a CPU; one that replaces another takes what is there, free or not."""

    def __init__(self, indices: Sequence[int], arrays: Arrays) -> None:
        super().__init__(indices, arrays)
        self._actor: Any = None

    def start(self) -> None:
        ray = _ray()
        free = self._actor is None or ray.available_resources().get("CPU", 0) >= 1
        options = {"num_cpus": 1 if free else 0, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        self._actor = ray.remote(Actor).options(**options).remote(self._shared.layout)
        self._machine: Any = self._actor.machine.remote()
        self._replies: deque[Any] = deque()
        self.due = time.monotonic() + START_ALLOWANCE + DEADLINE

    def post(self, message: Message) -> None:
        self.due = max(self.due, time.monotonic() + DEADLINE)
        self._replies.append(self._actor.answer.remote(dumps(message), needed(self._shared, message)))

    def handles(self) -> list[Any]:
        return [self._replies[0]]

    @staticmethod
    def wait(handles: Sequence[Any], patience: float) -> Collection[Any]:
        ray = _ray()
        # For all: who settles a step needs every reply, and each call of ray.wait costs 0.1 ms.
        ready, _ = ray.wait(list(handles), num_returns=len(handles), timeout=patience)
        return set(ready)

    def receive(self, ready: Collection[Any]) -> list[Any]:
        if self._replies[0] in ready:
            return [self._opened(self._replies.popleft())]
        if time.monotonic() >= self.due:
            started = self._machine is None
            lack = "gave no answer" if started else "was not started (is a CPU of the cluster free?)"
            return [Failure(f"{lack} within {DEADLINE + START_ALLOWANCE * (not started):g} s", lost=True)]
        return []

    def _opened(self, reply: Any) -> Any:
        ray = _ray()
        try:
            answer, parcel = ray.get(reply)
            if self._machine is not None:
                self._compare(ray.get(self._machine))
                self._machine = None
        except ray.exceptions.RayError as error:
            return Failure(f"was lost\n{error}", lost=True)
        self.due = time.monotonic() + DEADLINE
        unpack(parcel, self._shared)
        return pickle.loads(answer)

    def _compare(self, there: dict[str, str]) -> None:
        """Refuse a node whose packages show other pictures; say so if only the last bits may differ."""
        here = machine()
        differ = {key: f"{key} {there[key]}, expected {here[key]}" for key in here if there[key] != here[key]}
        if any(package in differ for package in DECIDING):
            raise ClusterError(
                f"a node of the cluster has other packages than the learner: {'; '.join(differ.values())}"
            )
        if differ:
            log.warning("a node of the cluster is of another kind (%s): last bits may differ", ", ".join(differ))

    def hang_up(self) -> None:
        pass  # its environments hold nothing that outlives their process

    def stop(self, patience: float = 0.0) -> None:
        ray = _ray()
        if ray.is_initialized():  # else the cluster's end has ended it
            ray.kill(self._actor)
