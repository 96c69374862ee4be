"""A Ray cluster of several nodes on this machine, in a process of its own: its settings must not reach other tests.

python -m tests.sweep.cluster NODES    prints the address, then obeys ``kill N``, ``kill head``, ``add`` and ``end``
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from pathlib import Path

import psutil

from tests.conftest import ROOT

MIB = 2**20


class RayCluster:
    """The cluster; a node is killed with all its processes, as when a machine is lost.

    Args:
        n_nodes: Beside the head, which trains nothing; each has one core for trainings.
        scratch: For Ray's own files; a short path, since its sockets' names are limited.
    """

    def __init__(self, n_nodes: int, scratch: Path) -> None:
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the loopback address alone
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # else a busy machine starves them
            "RAY_TMPDIR": str(scratch),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.sweep.cluster", str(n_nodes)],
            cwd=ROOT,
            env={**os.environ, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(scratch / "cluster.log").open("ab"),
            text=True,
        )
        self.address = self._answer()

    def _answer(self) -> str:
        assert self._process.stdout
        while line := self._process.stdout.readline():
            if line.startswith("answer "):
                return line.removeprefix("answer ").strip()
        raise AssertionError("the cluster's process has ended")

    def tell(self, order: str) -> str:
        """Carry out an order; returns the answer to it."""
        assert self._process.stdin
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        return self._answer()

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.tell("end")
        family = [self._process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [child.pid for child in psutil.Process(self._process.pid).children(recursive=True)]
        for pid in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        self._process.wait(30)


def kill_with_children(pid: int) -> int:
    """End a process and all below it at once, as when the power goes; returns how many there were."""
    top = psutil.Process(pid)
    family = [top, *top.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()  # none may act on the end of another
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return len(family)


def main(n_nodes: int) -> None:
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 80 * MIB}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.1", **store},
    )
    nodes = [cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1", **store) for _ in range(n_nodes)]
    print(f"answer {cluster.address}", flush=True)
    for line in sys.stdin:
        word, _, which = line.strip().partition(" ")
        if word == "kill" and which == "head":
            for kind in ("raylet", "gcs_server"):
                for info in cluster.head_node.all_processes.get(kind, []):
                    kill_with_children(info.process.pid)
            print("answer head", flush=True)
        elif word == "kill":
            (raylet,) = nodes[int(which)].all_processes["raylet"]
            print(f"answer {kill_with_children(raylet.process.pid)}", flush=True)
        elif word == "add":
            nodes.append(cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1", **store))
            print(f"answer {len(nodes) - 1}", flush=True)
        elif word == "end":
            break
    cluster.shutdown()
    print("answer ended", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
