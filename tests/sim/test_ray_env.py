"""Environments on Ray actors against those in shared memory; actors and nodes are killed on the way."""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import psutil
import pytest

from pipeline.sim import ray_env
from pipeline.sim.ray_cluster import ClusterError
from pipeline.sim.ray_env import Actor, connected, needed, unpack
from pipeline.sim.supervisor import Worker, WorkerError
from pipeline.sim.vec_env import SharedMemoryVecEnv
from pipeline.sim.worker import Message, dumps
from tests.conftest import ROOT
from tests.sim.nodes import two_nodes
from tests.sim.test_vec_env import N_ENVS, actions_of, counters, drive, plainly, racing, run, unlucky

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Ray's test clusters and SIGKILL")


def mixed_run(venv: SharedMemoryVecEnv, misfortunes: dict[int, Callable[[], object]] | None = None) -> list[Any]:
    """Plain steps, steps by group, a reset, a restore; a misfortune strikes before the step of its number."""
    results = [plainly(venv.reset())]
    for step in range(40):
        (misfortunes or {}).get(step, bool)()
        if step % 3:
            results.append(plainly(venv.step(actions_of(step, venv.num_envs))))
        else:
            for group, span in enumerate(venv.groups):
                venv.send(group, actions_of(step, venv.num_envs)[span])
            results += [plainly(venv.receive(group)) for group in (0, 1)]
        if step == 15:
            results.append(plainly(venv.reset()))
        if step == 25:
            results.append(plainly(venv.restore(venv.state())))
    venv.close()
    return results


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    return mixed_run(SharedMemoryVecEnv(counters(), 2))


# Without a cluster


class Neighbour(Worker):
    """An actor of this process, for which only what is sent counts: all else is in arrays of its own."""

    def start(self) -> None:
        self.actor = Actor(self._shared.layout)
        self.replies: deque[Any] = deque()
        self.observations: list[list[Any]] = []  # sent after each step

    def post(self, message: Message) -> None:
        parcel = pickle.loads(pickle.dumps(needed(self._shared, message)))
        self.replies.append(self.actor.answer(dumps(message), parcel))

    def handles(self) -> list[Any]:
        return []

    def receive(self, ready: Collection[Any]) -> list[Any]:
        answer, parcel = self.replies.popleft()
        if any(name == "rewards" for name, *_ in parcel):
            self.observations.append([values for name, _, values in parcel if name in ("moved", "observations")])
        unpack(parcel, self._shared)
        return [pickle.loads(answer)]

    def hang_up(self) -> None: ...

    def stop(self, patience: float = 0.0) -> None: ...


def test_of_a_stack_the_newest_picture_alone_is_sent() -> None:
    local = SharedMemoryVecEnv(racing(), 0)
    expected = [plainly(local.reset()), *drive(local, range(9))]
    local.close()
    venv = SharedMemoryVecEnv(racing(), 1, make_worker=Neighbour)
    assert [plainly(venv.reset()), *drive(venv, range(9))] == expected
    (neighbour,) = venv._supervisor.workers
    assert isinstance(neighbour, Neighbour)
    done = [any(step[2][2]) for step in expected[1:]]
    assert True in done
    pictures = [sum(values[0].shape[0] * len(values) for values in step) for step in neighbour.observations]
    assert [n > 3 for n in pictures] == done, "the 3 newest pictures, or more where a new episode has begun"
    venv.close()


@pytest.mark.parametrize("n_actors", [1, 3])
def test_what_is_sent_is_all_that_an_actor_needs(n_actors: int, expected: list[Any]) -> None:
    assert mixed_run(SharedMemoryVecEnv(counters(), n_actors, make_worker=Neighbour)) == expected


def test_an_actor_that_raises_is_rebuilt_from_what_is_sent(expected: list[Any], tmp_path: Path) -> None:
    assert mixed_run(SharedMemoryVecEnv(unlucky("raise", tmp_path, times=2), 2, make_worker=Neighbour)) == expected
    assert len(list(tmp_path.iterdir())) == 2


def command_line(*flags: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{before}; from pipeline import train; train.main({list(flags)!r})"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("flags", "before", "error"),
    [
        (("--ray-actors", "2"), "", "--ray-actors says how many: expected --ray with it, which says where, got none"),
        (
            ("--ray", "local", "--visual"),
            "",
            "--visual trains in one environment: expected it without",
        ),
        (("--ray", "ray://head:10001"), "", "expected local, auto or HOST:PORT, got ray://head:10001"),
        (("--ray", "local"), "import sys; sys.modules['ray'] = None", "`pip install -r requirements-cluster.txt"),
    ],
)
def test_mistakes_are_told_before_anything_starts(flags: tuple[str, ...], before: str, error: str) -> None:
    ended = command_line(*flags, before=before or "pass")
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
    assert error in ended.stderr


# On a cluster


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def cluster(nodes: Any) -> Iterator[ray_env.Cluster]:
    with connected(nodes.address, 3, N_ENVS) as cluster:
        yield cluster


def on(
    cluster: ray_env.Cluster, n_actors: int, env_fns: list[Callable[[], gym.Env[Any, Any]]] | None = None
) -> SharedMemoryVecEnv:
    return SharedMemoryVecEnv(env_fns or counters(), n_actors, make_worker=cluster.make_worker)


@pytest.mark.slow
@pytest.mark.parametrize("n_actors", [1, 2, 3])
def test_any_number_of_actors_gives_the_same_bits(cluster: ray_env.Cluster, n_actors: int, expected: list[Any]) -> None:
    venv = on(cluster, n_actors)
    assert len(set(venv.env_method("pid")) - {os.getpid()}) == n_actors
    assert mixed_run(venv) == expected


@pytest.mark.slow
def test_actors_are_lean_and_gone_when_closed(cluster: ray_env.Cluster) -> None:
    venv = on(cluster, 2)
    pids = set(venv.env_method("pid"))
    assert not {"torch", "mlflow", "stable_baselines3"} & set(venv.env_method("modules")[0])
    assert venv.env_method("threads", indices=0) == [{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}]
    venv.close()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_actor_changes_nothing(cluster: ray_env.Cluster, expected: list[Any]) -> None:
    venv = on(cluster, 2)

    def kill(index: int) -> None:
        os.kill(venv.env_method("pid")[index], signal.SIGKILL)

    assert mixed_run(venv, {7: partial(kill, 0), 26: partial(kill, -1)}) == expected


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["die", "hang"])
def test_an_actor_lost_within_a_step_changes_nothing(
    cluster: ray_env.Cluster, fate: str, expected: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_env, "DEADLINE", 5.0)
    assert mixed_run(on(cluster, 2, [*unlucky(fate, tmp_path)])) == expected
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_an_exception_of_an_environment_reaches_the_user(cluster: ray_env.Cluster, tmp_path: Path) -> None:
    venv = SharedMemoryVecEnv(unlucky("raise", tmp_path, times=99), 1, make_worker=cluster.make_worker, max_restarts=0)
    venv.reset()
    with pytest.raises(WorkerError, match="in before_step"):
        run(venv)


@pytest.mark.slow
def test_another_release_on_a_node_is_refused(cluster: ray_env.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_env, "_release", lambda package: f"0.{len(package)}")  # of the learner alone
    with pytest.raises(ClusterError, match=r"has other packages than the learner: numpy \S+, expected 0.5"):
        on(cluster, 1)


@pytest.mark.slow
def test_a_killed_node_changes_nothing(nodes: Any, cluster: ray_env.Cluster) -> None:
    """CarRacing; all actors of one node are lost together, and find no free CPU to go to."""
    import ray

    local = SharedMemoryVecEnv(racing(), 2)
    expected = [plainly(local.reset()), *drive(local, range(20))]
    local.close()

    doomed = nodes.add_node(num_cpus=2)
    venv = on(cluster, 3, [*racing()])
    results = [plainly(venv.reset()), *drive(venv, range(9))]
    there = [psutil.Process(pid) for node, pid in actor_places(venv) if node == doomed.node_id]
    assert there
    nodes.remove_node(doomed, allow_graceful=False)
    psutil.wait_procs(there, timeout=60)  # a worker outlives its node by a moment
    results += drive(venv, range(9, 20))
    assert results == expected
    assert doomed.node_id not in {node for node, _ in actor_places(venv)}
    venv.close()
    until = time.monotonic() + 120  # the next test counts CPUs, and Ray those of the lost node until it is given up
    while sum(node["Alive"] for node in ray.nodes()) > 2:
        assert time.monotonic() < until
        time.sleep(0.2)


def actor_places(venv: SharedMemoryVecEnv) -> list[tuple[str, int]]:
    """Node and process of each actor."""
    import ray

    def place(_: Any) -> tuple[str, int]:
        return str(ray.get_runtime_context().get_node_id()), os.getpid()

    actors = [worker._actor for worker in venv._supervisor.workers if isinstance(worker, ray_env.ActorWorker)]
    return [ray.get(actor.__ray_call__.remote(place)) for actor in actors]


@pytest.mark.slow
def test_a_state_of_here_goes_on_there_and_back(cluster: ray_env.Cluster) -> None:
    local = SharedMemoryVecEnv(racing(), 2)
    local.reset()
    drive(local, range(6))
    states = local.state()
    expected = drive(local, range(6, 18))
    local.close()

    venv = on(cluster, 2, [*racing()])
    venv.restore(states)
    assert drive(venv, range(6, 12)) == expected[:6]
    states = venv.state()
    venv.close()
    local = SharedMemoryVecEnv(racing(), 1)
    local.restore(states)
    assert drive(local, range(12, 18)) == expected[6:]
    local.close()


@pytest.mark.slow
def test_more_actors_than_cpus_are_refused(nodes: Any) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = f"from pipeline import train; train.main(['--ray', '{nodes.address}', '--ray-actors', '99'])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "--ray-actors: expected 1 to 4, the cluster's CPUs, got 99" in ended.stderr


@pytest.mark.slow
def test_a_wrong_token_is_told(nodes: Any) -> None:
    environment = {**os.environ, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    code = f"from pipeline import train; train.main(['--ray', '{nodes.address}'])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "the token must be the cluster's" in ended.stderr
