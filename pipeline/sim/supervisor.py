"""The parent side: worker processes, what each was asked, and their replacement when they die, hang or raise."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import types
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from typing import Any, NamedTuple

from pipeline.sim.worker import ONE_THREAD, Arrays, Context, EnvSlice, Failure, Message, SharedArrays, dumps, serve

CALLS = frozenset({"get_attr", "set_attr", "env_method", "is_wrapped"})
"""Orders whose exceptions are the caller's: a missing attribute is no reason to replace a worker."""

START_ALLOWANCE = 60.0
"""Seconds beyond the deadline for a new worker's first order: interpreter, imports, building the environments."""

CLOSING_TIME = 5.0
"""Seconds that workers get to close their environments."""


class WorkerError(RuntimeError):
    """A worker failed and could not be replaced; the message ends with the environment's own traceback if it raised."""


class Order(NamedTuple):
    """What a worker was asked.

    Attributes:
        serial: Grows from one request to the next; 0 for what a new worker is told before it repeats its orders.
        message: Method of :class:`EnvSlice` and arguments.
        done: Called with the reply.
    """

    serial: int
    message: Message
    done: Callable[[Any], None]


def _ignore(reply: None) -> None:
    pass


class Worker(ABC):
    """Holds some of the environments and carries out orders on them.

    Attributes:
        indices: Its environments.
        orders: Orders without a reply yet, oldest first; kept by the supervisor.
        failures: Failures since it last carried out an order; kept by the supervisor.
        due: Time (``time.monotonic``) at which it counts as hung if it owes a reply.
        pid: Its process, if it has one of its own.
    """

    due = 0.0
    pid: int | None = None

    def __init__(self, indices: Sequence[int], shared: Arrays) -> None:
        self.indices = indices
        self.orders: deque[Order] = deque()
        self.failures = 0
        self._shared = shared

    def __str__(self) -> str:
        return f"the worker of environments {', '.join(map(str, self.indices))}"

    @abstractmethod
    def start(self) -> None:
        """Begin, without environments; returns at once."""

    @abstractmethod
    def post(self, message: Message) -> None:
        """Give one order."""

    @abstractmethod
    def handles(self) -> list[Any]:
        """What becomes ready with a reply or the worker's end, for :meth:`wait`."""

    @staticmethod
    def wait(handles: Sequence[Any], patience: float) -> Collection[Any]:
        """Those of some workers' handles that are ready, as soon as there are any, or none after so many seconds."""
        return connection.wait(handles, patience)

    @abstractmethod
    def receive(self, ready: Collection[Any]) -> list[Any]:
        """One reply, none yet, or a :class:`Failure` if there will be none because the worker died or hangs."""

    @abstractmethod
    def stop(self, patience: float = 0.0) -> None:
        """Make sure that it has ended, with force after ``patience`` seconds."""

    @abstractmethod
    def hang_up(self) -> None:
        """Tell it to close its environments and end."""


class LocalWorker(Worker):
    """A worker without a process, for ``n_workers=0``: orders are carried out in this process, when they are posted."""

    def start(self) -> None:
        self._envs = EnvSlice(self._shared)
        self._replies: deque[Any] = deque()

    def post(self, message: Message) -> None:
        self._replies.append(self._envs.answer(message))

    def handles(self) -> list[Any]:
        return []

    def receive(self, ready: Collection[Any]) -> list[Any]:
        return [self._replies.popleft()]

    def hang_up(self) -> None:
        pass

    def stop(self, patience: float = 0.0) -> None:
        self._envs.close()


class ProcessWorker(Worker):
    """A worker process; ``deadline`` is the time in seconds for a reply."""

    _shared: SharedArrays

    def __init__(self, indices: Sequence[int], shared: SharedArrays, context: Context, deadline: float) -> None:
        super().__init__(indices, shared)
        self._context, self._deadline = context, deadline

    def start(self) -> None:
        self._pipe, remote = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(remote, self._shared), daemon=True)
        with _lean_start():
            self._process.start()
        remote.close()
        self.pid = self._process.pid
        self.due = time.monotonic() + START_ALLOWANCE + self._deadline

    def post(self, message: Message) -> None:
        self.due = max(self.due, time.monotonic() + self._deadline)
        with suppress(OSError):  # a dead process is noticed when its reply is waited for
            self._pipe.send_bytes(dumps(message))

    def handles(self) -> list[Any]:
        return [self._pipe, self._process.sentinel]

    def receive(self, ready: Collection[Any]) -> list[Any]:
        if self._pipe in ready:
            with suppress(EOFError, OSError):
                reply = pickle.loads(self._pipe.recv_bytes())
                self.due = time.monotonic() + self._deadline
                return [reply]
        if any(handle in ready for handle in self.handles()):
            self._process.join(1)
            return [Failure(f"died with exit code {self._process.exitcode}", lost=True)]
        if time.monotonic() >= self.due:
            return [Failure(f"gave no answer within {self._deadline:g} s", lost=True)]
        return []

    def hang_up(self) -> None:
        self._pipe.close()

    def stop(self, patience: float = 0.0) -> None:
        self.hang_up()
        self._process.join(patience)
        self._process.kill()
        self._process.join()


def replies(workers: Sequence[Worker]) -> list[tuple[Worker, Any]]:
    """Wait for some of ``workers``, all of one kind, which all owe a reply; a reply is what the order returned or a
    :class:`Failure`."""
    handles = [handle for worker in workers for handle in worker.handles()]
    patience = min(worker.due for worker in workers) - time.monotonic()
    ready = workers[0].wait(handles, max(patience, 0)) if handles else []
    return [(worker, reply) for worker in workers for reply in worker.receive(ready)]


def shut_down(workers: list[Worker], patience: float = 0.0) -> None:
    """Stop all workers, each at its own pace for ``patience`` seconds in all, and empty the list."""
    until = time.monotonic() + patience
    for worker in workers:
        worker.hang_up()
    while workers:
        workers.pop().stop(max(until - time.monotonic(), 0))


class Supervisor:
    """Orders to workers, and their replies, whatever befalls the workers.

    Args:
        workers: Not yet started.
        recovery: Messages that bring a new worker to the state after the last order it replied to; raises
            ``RuntimeError`` where that can't be done.
        max_restarts: Failures in a row after which a worker is given up.
    """

    def __init__(self, workers: list[Worker], recovery: Callable[[Worker], list[Message]], max_restarts: int) -> None:
        self.workers = workers
        self.serial = 0
        self._recovery = recovery
        self._max_restarts = max_restarts

    def start(self) -> None:
        """Start all workers; returns before they are up."""
        for worker in self.workers:
            self._start(worker, self._recovery(worker), [])

    def _start(self, worker: Worker, recovery: Iterable[Message], orders: Iterable[Order]) -> None:
        worker.start()
        worker.orders = deque([*(Order(0, message, _ignore) for message in recovery), *orders])
        for order in worker.orders:
            worker.post(order.message)

    def ask(self, worker: Worker, message: Message, done: Callable[[Any], None] = _ignore) -> None:
        """Send one order of the present request."""
        worker.orders.append(Order(self.serial, message, done))
        worker.post(message)

    def request(self) -> int:
        """Begin a new request, one or several orders; returns its number."""
        if not self.workers:
            raise RuntimeError("the environments are closed")
        self.serial += 1
        return self.serial

    def settle(self, serial: int) -> None:
        """Wait until all orders up to that request are carried out."""
        while owing := [worker for worker in self.workers if worker.orders and worker.orders[0].serial <= serial]:
            for worker, reply in replies(owing):
                self._take(worker, reply)

    def _take(self, worker: Worker, reply: Any) -> None:
        order = worker.orders[0]
        if isinstance(reply, Failure) and (reply.lost or order.message[0] not in CALLS):
            self._replace(worker, reply)
            return
        worker.orders.popleft()
        if order.serial:
            worker.failures = 0
        order.done(reply)

    def _replace(self, worker: Worker, failure: Failure) -> None:
        worker.stop()
        worker.failures += 1
        try:
            if worker.failures > self._max_restarts:
                raise RuntimeError(f"{worker.failures} failures in a row, {self._max_restarts} replacements")
            recovery = self._recovery(worker)
        except RuntimeError as error:
            shut_down(self.workers)
            raise WorkerError(f"{error}: {worker} {failure}") from failure.error
        self._start(worker, recovery, [order for order in worker.orders if order.serial])


def process_context(start_method: str | None) -> Context:
    """``forkserver`` where there is one, else ``spawn``; ``fork`` would copy the parent's threads, locks and pipes."""
    available = multiprocessing.get_all_start_methods()
    start_method = start_method or ("forkserver" if "forkserver" in available else "spawn")
    if start_method not in {"forkserver", "spawn"}:
        raise ValueError(f"start_method: expected forkserver or spawn, got {start_method!r}")
    context = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        context.set_forkserver_preload([serve.__module__])
    return context


@contextmanager
def _lean_start() -> Iterator[None]:
    """Start processes with one thread per numeric library and without the main module, which imports torch and more."""
    environment = {name: os.environ.get(name) for name in ONE_THREAD}
    main = sys.modules["__main__"]
    os.environ.update(ONE_THREAD)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in environment.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
