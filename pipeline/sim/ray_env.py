"""Environments on a Ray cluster: each actor holds several, the learner stays where it is.

``SharedMemoryVecEnv(env_fns, cluster.n_actors, make_worker=cluster.make_worker)`` steps them. An actor carries out the
same orders in the same way as a worker process of this machine; what that one finds in shared memory travels with the
order and the reply. Which actor has which environments, and where it is, decides no bit of the result.

Actors step, and nothing else: the network's last bits depend on the batch, so the learner decides for all environments.
"""

from __future__ import annotations

import logging
import pickle
import platform
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.sim.ray_cluster import ClusterError, import_ray, joined
from pipeline.sim.supervisor import START_ALLOWANCE, Worker
from pipeline.sim.worker import (
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

DEADLINE = 60.0
"""Seconds after which an actor that does not answer counts as hung, or its node as gone."""

DECIDING = ("numpy", "gymnasium", "box2d", "opencv-python", "pygame-ce")
"""Packages whose release decides what an environment shows."""

Parcel = list[tuple[str, Any, NDArray[Any]]]
"""Parts of :class:`Arrays` on their way: name, index, values."""


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
    """Join a cluster, or start one here (:func:`joined`); ``n_actors`` None means one per free CPU.

    Raises:
        ClusterError: It can't be joined, or has fewer CPUs than ``n_actors``.
    """
    with joined(address, n_actors) as ray:
        yield _cluster(ray, n_actors, n_envs)


def _cluster(ray: Any, n_actors: int | None, n_envs: int) -> Cluster:
    cpus, free = (int(kind().get("CPU", 0)) for kind in (ray.cluster_resources, ray.available_resources))
    if (n_actors or 1) > cpus:
        raise ClusterError(f"--ray-actors: expected 1 to {cpus}, the cluster's CPUs, got {n_actors or 'none of them'}")
    nodes = sum(node["Alive"] for node in ray.nodes())
    return Cluster(min(n_actors or max(free, 1), n_envs), nodes)


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
        ray = import_ray()
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
        ray = import_ray()
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
        ray = import_ray()
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
        ray = import_ray()
        if ray.is_initialized():  # else the cluster's end has ended it
            ray.kill(self._actor)
