"""A training whose environments are on a Ray cluster, against the same one on this machine."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from tests.sim.nodes import two_nodes
from tests.test_train import BEST, FINAL, client, digest, finish, run_id, start, trainer, wait_for

__all__ = ["trainer"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="Ray's test clusters and SIGKILL")]

TINY: dict[str, object] = {
    "n_steps": 16,
    "batch_size": 32,
    "total_timesteps": 512,
    "cnn_channels": "[8, 8, 8]",
    "features_dim": 32,
    "n_eval_episodes": 1,
    "save_freq": 64,
    "n_workers": 1,
}


def test_wherever_a_training_goes_on_it_ends_with_the_same_bits(
    trainer: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Begun on a cluster, gone on here, ended on the cluster, which loses a node; killed in between."""
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    for name in ("mlflow.db", "params.yaml"):
        shutil.copy(trainer / name, undisturbed)
    finish(start(undisturbed, **TINY))

    with two_nodes() as nodes:
        elsewhere: dict[str, object] = {**TINY, "ray": nodes.address, "ray_actors": 3}
        for steps, where in ((128, elsewhere), (256, TINY)):
            process = start(trainer, **where)
            wait_for(trainer, f"runs/*/checkpoints/state_{steps:012}.safetensors", process)
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=30)
        process = start(trainer, **elsewhere)
        wait_for(trainer, f"runs/*/checkpoints/state_{384:012}.safetensors", process)
        nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        output = finish(process)

    assert "4 environments in 3 Ray actors on a cluster of 2 nodes" in output
    assert client(trainer).get_run(run_id(trainer)).data.tags["resumed"] == "exact"
    for name in (BEST, FINAL):
        assert digest(trainer / name) == digest(undisturbed / name)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_cluster_of_its_own_ends_with_the_training(trainer: Path, number: int, code: int) -> None:
    process = start(trainer, **{**TINY, "total_timesteps": 100_096, "eval_freq": 0, "ray": "local", "ray_actors": 2})
    wait_for(trainer, "runs/*/checkpoints/state_*.safetensors", process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in child.name() for child in children)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    _, alive = psutil.wait_procs(children, timeout=180)  # Ray's agents notice it after a minute or two
    assert [child.cmdline() for child in alive] == []
    if number == signal.SIGTERM:
        assert client(trainer).get_run(run_id(trainer)).info.status == "KILLED"
