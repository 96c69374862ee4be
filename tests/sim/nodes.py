"""A Ray cluster of two nodes on this machine, for tests."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.conftest import ROOT


@contextmanager
def two_nodes() -> Iterator[Any]:
    """``ray.cluster_utils.Cluster``, two CPUs a node; it asks for a token, which this process's children know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("PYTHONPATH", str(ROOT))  # the tests' environments are not sent along
        cluster_utils = pytest.importorskip("ray.cluster_utils")
        from ray._raylet import AuthenticationTokenLoader

        AuthenticationTokenLoader.instance().reset_cache()  # of a token that another test has used in this process
        nodes = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        nodes.add_node(num_cpus=2)
        yield nodes
        nodes.shutdown()
