"""A Ray cluster: joined, or started here and closed to others.

Ray is imported when it is used: nobody else needs to have it installed.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import cores
from pipeline.sim.worker import ONE_THREAD

LOCAL = "local"
"""The address of a cluster that is started on this machine and ends with the training."""


class ClusterError(Exception):
    """The cluster can't be used; the message says what was expected, what came and what to do."""


@contextmanager
def joined(address: str, n_cpus: int | None = None) -> Iterator[Any]:
    """Ray, connected to a cluster, or to one started here with ``n_cpus``, by default all.

    A cluster started here listens on the loopback address, asks for a token of this process's own, has no dashboard
    and ends with the block. For one elsewhere, Ray finds the token as that one's nodes do: ``RAY_AUTH_TOKEN``,
    ``RAY_AUTH_TOKEN_PATH`` or ``~/.ray/auth_token``.

    Raises:
        ClusterError: Ray is not installed, or the cluster does not answer.
    """
    if address == LOCAL:
        close_to_others()
    ray = import_ray()
    if address.startswith("ray://"):
        raise ClusterError(
            f"--ray: expected local, auto or HOST:PORT, got {address}: pictures would go by way of a proxy. "
            "Start the training on a node of the cluster"
        )
    try:
        with _own_signal_handlers():
            _init(ray, address, n_cpus)
        yield ray
    finally:
        ray.shutdown()


def close_to_others() -> None:
    """Before Ray is imported to be started here: the loopback address alone, and a token of this process's own."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's name for what may leave the machine
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would put its processes behind all else here
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def import_ray() -> Any:
    """Ray, if it is installed; else :class:`ClusterError`."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ClusterError(
            "--ray: Ray is not installed; `pip install -r requirements-cluster.txt -c constraints.txt` installs it"
        ) from None
    return ray


def _init(ray: Any, address: str, n_cpus: int | None) -> None:
    """``ray.init``; nodes elsewhere get this checkout's code sent, whatever lies there."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options |= {"num_cpus": n_cpus or cores(), "num_gpus": 0, "include_dashboard": False}
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


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep what this process does on signals: ``ray.init`` puts an exit of its own in SIGTERM's place."""
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if main else {}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
