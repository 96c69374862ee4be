"""Claims about the vectorised environment, against stable-baselines3's own and against undisturbed runs."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize

from pipeline.config import TrainParams, load
from pipeline.sim.episodes import Episodes
from pipeline.sim.training_env import make_training_env
from pipeline.sim.vec_env import SharedMemoryVecEnv, WorkerError
from tests.sim.toys import Counter, Endless, Forgetful, Plain, Unlucky, plain

N_ENVS, N_STEPS = 5, 40
needs_signals = pytest.mark.skipif(os.name == "nt", reason="SIGKILL and SIGSTOP")


def counters(n_envs: int = N_ENVS, **kwargs: Any) -> list[Callable[[], Counter]]:
    return [partial(Counter, index, **kwargs) for index in range(n_envs)]


@pytest.fixture(params=[0, 2])
def venv(request: pytest.FixtureRequest) -> Iterator[SharedMemoryVecEnv]:
    venv = SharedMemoryVecEnv(counters(render_mode="rgb_array"), request.param)
    yield venv
    venv.close()


def actions_of(step: int, n_envs: int = N_ENVS, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng([seed, step]).uniform(-1, 1, (n_envs, 2)).astype(np.float32)


def plainly(value: Any) -> Any:
    """Arrays as bytes with dtype and shape, so that == compares everything."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plainly(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plainly(item) for item in value]
    return value


def run(venv: VecEnv, steps: Sequence[int] = range(N_STEPS)) -> list[Any]:
    return [plainly(venv.step(actions_of(step, venv.num_envs))) for step in steps]


def reset_and_run(venv: VecEnv) -> list[Any]:
    try:
        return [plainly(venv.reset()), *run(venv)]
    finally:
        venv.close()


def test_an_episode_that_goes_on_keeps_its_actions() -> None:
    episodes = Episodes(1, spaces.Box(-1, 1, (2,), np.float32), replayable=True)
    lengths = []
    for number, seed in ((3, None), (3, None), (4, None), (4, 7), (4, 7), (5, None)):
        episodes.begin(0, {"episode_index": number}, seed)
        episodes.append([0], np.zeros((1, 2), np.float32))
        lengths.append(len(episodes.state(0).actions))
    assert lengths == [1, 2, 1, 1, 1, 1]


# The same as stable-baselines3's own, and as without workers


@pytest.mark.parametrize("n_workers", [0, 1, 2, 4, 9])
def test_every_step_equals_dummy_vec_env(n_workers: int) -> None:
    expected = reset_and_run(DummyVecEnv(counters()))
    assert reset_and_run(SharedMemoryVecEnv(counters(), n_workers)) == expected
    infos = [info for _, _, _, step_infos in expected[1:] for info in step_infos]
    assert {info["TimeLimit.truncated"] for info in infos if "terminal_observation" in info} == {True, False}


@pytest.mark.parametrize("n_envs", [1, 2])
def test_few_environments(n_envs: int) -> None:
    expected = reset_and_run(DummyVecEnv(counters(n_envs)))
    assert reset_and_run(SharedMemoryVecEnv(counters(n_envs), 2)) == expected


def test_spawned_workers_equal_forkserver_workers() -> None:
    expected = reset_and_run(SharedMemoryVecEnv(counters(2), 1))
    assert reset_and_run(SharedMemoryVecEnv(counters(2), 1, start_method="spawn")) == expected


@pytest.mark.parametrize("n_workers", [0, 1])
def test_discrete_spaces_and_lambdas(n_workers: int) -> None:
    def fns() -> list[Callable[[], gym.Env[Any, Any]]]:
        return [lambda: gym.make("FrozenLake-v1") for _ in range(3)]

    venv, dummy = SharedMemoryVecEnv(fns(), n_workers), DummyVecEnv(fns())
    for each in (venv, dummy):
        each.seed(3)
    assert plainly(venv.reset()) == plainly(dummy.reset())
    for step in range(30):
        action = np.random.default_rng(step).integers(0, 4, 3)
        assert plainly(venv.step(action)) == plainly(dummy.step(action))
    venv.close()


@pytest.fixture
def _one_torch_thread() -> Iterator[None]:
    """Threads of a network this small only wait for each other, seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_torch_thread")
def test_ppo_learns_the_same_weights_as_on_dummy_vec_env() -> None:
    weights = []
    for venv in (DummyVecEnv(counters(4)), SharedMemoryVecEnv(counters(4), 2)):
        model = PPO("MlpPolicy", venv, n_steps=16, batch_size=32, n_epochs=2, seed=1, device="cpu")
        model.learn(128)
        weights.append({name: plainly(value.numpy()) for name, value in model.policy.state_dict().items()})
        venv.close()
    assert weights[0] == weights[1]


def test_wrappers_of_stable_baselines3(venv: SharedMemoryVecEnv) -> None:
    wrapped, dummy = (VecNormalize(VecMonitor(each), norm_obs=False) for each in (venv, DummyVecEnv(counters())))
    assert plainly(wrapped.reset()) == plainly(dummy.reset())
    for step in range(N_STEPS):
        (*arrays, infos), (*expected, expected_infos) = (each.step(actions_of(step)) for each in (wrapped, dummy))
        assert plainly(arrays) == plainly(expected)
        assert ["episode" in info for info in infos] == ["episode" in info for info in expected_infos]


def test_an_observation_outlives_the_next_step(venv: SharedMemoryVecEnv) -> None:
    previous = venv.reset()
    copy = previous.copy()
    for step in range(N_STEPS):
        observations = venv.step(actions_of(step))[0]
        assert np.array_equal(previous, copy)
        assert not np.shares_memory(previous, observations)
        previous, copy = observations, observations.copy()


def test_rewards_and_dones_are_the_callers(venv: SharedMemoryVecEnv) -> None:
    venv.reset()
    _, rewards, dones, infos = venv.step(actions_of(0))
    kept = plainly((rewards, dones, infos))
    venv.step(actions_of(1))
    assert plainly((rewards, dones, infos)) == kept


def test_observations_outlive_the_environment() -> None:
    venv = SharedMemoryVecEnv(counters(), 1)
    observations = venv.reset()
    copy = observations.copy()
    venv.close()
    del venv
    gc.collect()
    assert np.array_equal(observations, copy)


# Attributes, methods, seeds, options, pictures


def test_attributes(venv: SharedMemoryVecEnv) -> None:
    assert venv.get_attr("index") == [0, 1, 2, 3, 4]
    assert venv.get_attr("index", indices=[3, 0]) == [3, 0]
    assert venv.get_attr("index", indices=-1) == [4]
    venv.set_attr("difficulty", 7, indices=[1, 4])
    assert venv.get_attr("difficulty") == [1, 7, 1, 1, 7]
    assert venv.has_attr("difficulty")
    assert not venv.has_attr("nothing")
    with pytest.raises(AttributeError, match="nothing"):
        venv.get_attr("nothing")


def test_methods(venv: SharedMemoryVecEnv) -> None:
    assert venv.env_method("add", 10, b=100) == [110, 111, 112, 113, 114]
    assert venv.env_method("add", 10, indices=range(2)) == [10, 11]
    with pytest.raises(IndexError):
        venv.env_method("add", 10, indices=5)


def test_a_methods_exception_is_raised_with_the_workers_traceback(venv: SharedMemoryVecEnv) -> None:
    with pytest.raises(ZeroDivisionError, match="on request") as caught:
        venv.env_method("fail")
    assert "in fail" in str(caught.value.__cause__)
    assert venv.get_attr("index") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_env_is_wrapped(n_workers: int) -> None:
    venv = SharedMemoryVecEnv([partial(Counter, 0), partial(plain, 1), partial(Counter, 2)], n_workers)
    assert venv.env_is_wrapped(Plain) == [False, True, False]
    assert venv.env_is_wrapped(Plain, indices=1) == [True]
    venv.close()


def test_seeds_and_options_are_used_once(venv: SharedMemoryVecEnv) -> None:
    venv.seed(50)
    venv.set_options({"wind": 1})
    venv.reset()
    assert [info["seed"] for info in venv.reset_infos] == [50, 51, 52, 53, 54]
    assert venv.get_attr("options") == [{"wind": 1}] * N_ENVS
    venv.reset()
    assert [info["seed"] for info in venv.reset_infos] == [0, 1000, 2000, 3000, 4000]
    assert venv.get_attr("options") == [None] * N_ENVS


def test_options_of_each_environment(venv: SharedMemoryVecEnv) -> None:
    venv.set_options([{"wind": index} for index in range(N_ENVS)])
    venv.reset()
    assert venv.get_attr("options") == [{"wind": index} for index in range(N_ENVS)]


def test_reset_infos_are_of_the_present_episode(venv: SharedMemoryVecEnv) -> None:
    venv.reset()
    for step in range(N_STEPS):
        venv.step(actions_of(step))
        assert [info["episode_index"] for info in venv.reset_infos] == venv.get_attr("episode")


def test_reset_cancels_a_step_under_way(venv: SharedMemoryVecEnv) -> None:
    venv.reset()
    venv.step_async(actions_of(0))
    venv.reset()
    with pytest.raises(RuntimeError, match="no step was sent"):
        venv.step_wait()
    assert venv.get_attr("episode") == [1] * N_ENVS


def test_pictures(venv: SharedMemoryVecEnv) -> None:
    images = venv.get_images()
    assert [image.shape for image in images if image is not None] == [(4, 5, 3)] * N_ENVS
    tiled = venv.render()
    assert tiled is not None
    assert tiled.shape == (3 * 4, 2 * 5, 3)


def test_no_pictures_without_render_mode() -> None:
    venv = SharedMemoryVecEnv(counters(), 0)
    with pytest.warns(UserWarning, match="rgb_array"):
        assert list(venv.get_images()) == [None] * N_ENVS
    venv.close()


# Groups


@pytest.mark.parametrize("n_workers", [0, 1, 3])
def test_groups_in_turn_equal_plain_steps(n_workers: int) -> None:
    expected = reset_and_run(SharedMemoryVecEnv(counters(), 0))
    venv = SharedMemoryVecEnv(counters(), n_workers)
    observations = venv.reset()
    halves = [[plainly(observations[group])] for group in venv.groups]
    for group, span in enumerate(venv.groups):
        venv.send(group, actions_of(0)[span])
    for step in range(N_STEPS):
        for group, span in enumerate(venv.groups):
            halves[group].append(plainly(venv.receive(group)))
            if step + 1 < N_STEPS:
                venv.send(group, actions_of(step + 1)[span])
    for step in range(1, N_STEPS + 1):
        for part in range(3):
            joined = b"".join(half[step][part][2] for half in halves)
            assert joined == expected[step][part][2]
        assert halves[0][step][3] + halves[1][step][3] == expected[step][3]
    assert plainly(venv.step(actions_of(0))[0]) is not None  # both are at the same step again
    venv.close()


def test_groups_are_halves_spread_over_all_workers() -> None:
    venv = SharedMemoryVecEnv(counters(8), 2)
    pids = venv.env_method("pid")
    assert [sorted({pids[i] for i in range(8)[group]}) for group in venv.groups] == [sorted(set(pids))] * 2
    venv.close()


def test_misuse_of_groups_is_told(venv: SharedMemoryVecEnv) -> None:
    venv.reset()
    venv.send(0, actions_of(0)[venv.groups[0]])
    with pytest.raises(RuntimeError, match="not received yet"):
        venv.step_async(actions_of(0))
    with pytest.raises(RuntimeError, match="under way"):
        venv.state()
    venv.receive(0)
    with pytest.raises(RuntimeError, match="equally many steps"):
        venv.step_async(actions_of(0))
    venv.reset()
    venv.step(actions_of(0))


# Exact resume


@pytest.mark.parametrize("n_workers", [0, 2])
def test_restored_run_equals_the_uninterrupted(n_workers: int) -> None:
    venv = SharedMemoryVecEnv(counters(), n_workers)
    venv.reset()
    run(venv, range(17))
    observations = venv.step(actions_of(17))[0].copy()
    states = venv.state()
    expected = run(venv, range(18, N_STEPS))
    assert plainly(venv.restore(states)) == plainly(observations)  # on the same
    assert run(venv, range(18, N_STEPS)) == expected
    venv.close()
    other = SharedMemoryVecEnv(counters(), 1)
    other.seed(9)  # as PPO(seed=...) does: the states win
    assert plainly(other.restore(states)) == plainly(observations)  # on another
    assert run(other, range(18, N_STEPS)) == expected
    other.close()


def test_an_episode_begun_with_a_seed_is_restored(venv: SharedMemoryVecEnv) -> None:
    venv.seed(77)
    venv.reset()
    run(venv, range(2))
    states = venv.state()
    assert [state.seed for state in states] == [77, 78, 79, 80, 81]
    assert {len(state.actions) for state in states} == {2}
    expected = run(venv, range(2, N_STEPS))
    venv.restore(states)
    assert run(venv, range(2, N_STEPS)) == expected


def test_long_episodes_are_restored() -> None:
    venv = SharedMemoryVecEnv([partial(Endless, 0)], 0)
    venv.reset()
    run(venv, range(700))
    (state,) = venv.state()
    assert state.actions.shape == (700, 2)
    expected = run(venv, range(5))
    venv.restore([state])
    assert run(venv, range(5)) == expected
    venv.close()


def test_what_cannot_be_restored_is_told() -> None:
    venv = SharedMemoryVecEnv([partial(plain, 0)], 0)
    venv.reset()
    with pytest.raises(RuntimeError, match="environment 0 can't be brought back"):
        venv.state()
    with pytest.raises(ValueError, match="expected 1 replayable environments"):
        venv.restore([])
    venv.close()


# Misfortunes


def unlucky(fate: str, marks: Path, times: int = 1) -> list[Callable[[], Counter]]:
    return [partial(Unlucky, index, fate, marks, times) for index in range(N_ENVS)]


@needs_signals
@pytest.mark.parametrize(("fate", "n_workers"), [("die", 2), ("hang", 2), ("raise", 2), ("raise", 0), ("die", 1)])
def test_a_lost_worker_changes_nothing(fate: str, n_workers: int, tmp_path: Path) -> None:
    expected = reset_and_run(SharedMemoryVecEnv(counters(), 0))
    venv = SharedMemoryVecEnv(unlucky(fate, tmp_path, times=2), n_workers, deadline=1.0)
    assert reset_and_run(venv) == expected
    assert len(list(tmp_path.iterdir())) == 2


@needs_signals
def test_a_lost_worker_changes_nothing_for_groups(tmp_path: Path) -> None:
    results = []
    for fns in (counters(), unlucky("die", tmp_path)):
        venv = SharedMemoryVecEnv(fns, 2)
        venv.reset()
        results.append([])
        for step in range(N_STEPS):
            for group, span in enumerate(venv.groups):
                venv.send(group, actions_of(step)[span])
            results[-1] += [plainly(venv.receive(group)) for group in (1, 0)]
        venv.close()
    assert results[0] == results[1]
    assert len(list(tmp_path.iterdir())) == 1


@needs_signals
def test_a_worker_killed_between_steps_changes_nothing() -> None:
    expected = reset_and_run(SharedMemoryVecEnv(counters(), 0))
    venv = SharedMemoryVecEnv(counters(), 2)
    os.kill(venv.env_method("pid")[0], signal.SIGKILL)
    result = [plainly(venv.reset())]
    for step in range(N_STEPS):
        if step % 8 == 3:
            os.kill(venv.env_method("pid")[step % N_ENVS], signal.SIGKILL)
        result += run(venv, [step])
    venv.close()
    assert result == expected


@needs_signals
def test_a_worker_killed_while_restoring_changes_nothing() -> None:
    venv = SharedMemoryVecEnv(counters(), 2)
    venv.reset()
    run(venv, range(9))
    states = venv.state()
    expected = run(venv, range(9, 20))
    os.kill(venv.env_method("pid")[0], signal.SIGKILL)
    venv.restore(states)
    assert run(venv, range(9, 20)) == expected
    venv.close()


@needs_signals
def test_attributes_set_survive_their_worker() -> None:
    venv = SharedMemoryVecEnv(counters(), 2)
    venv.set_attr("difficulty", 3, indices=[0, 1])
    venv.reset()
    for pid in set(venv.env_method("pid")):
        os.kill(pid, signal.SIGKILL)
    venv.step(actions_of(0))
    assert venv.get_attr("difficulty") == [3, 3, 1, 1, 1]
    venv.close()


@needs_signals
@pytest.mark.parametrize(
    ("fate", "reason"), [("raise", "a bad day"), ("die", "died with exit code -9"), ("hang", "no answer within 0.5 s")]
)
def test_a_worker_that_fails_for_ever_is_given_up(fate: str, reason: str, tmp_path: Path) -> None:
    venv = SharedMemoryVecEnv(unlucky(fate, tmp_path, times=99), 2, deadline=0.5, max_restarts=2)
    venv.reset()
    with pytest.raises(WorkerError, match=f"3 failures in a row, 2 replacements: (?s:.*){reason}"):
        run(venv)
    venv.close()
    assert len(list(tmp_path.iterdir())) == 3


def test_the_environments_traceback_reaches_the_user(tmp_path: Path) -> None:
    venv = SharedMemoryVecEnv(unlucky("raise", tmp_path, times=99), 1, max_restarts=0)
    venv.reset()
    with pytest.raises(WorkerError, match="in before_step") as caught:
        run(venv)
    assert isinstance(caught.value.__cause__, ArithmeticError)
    venv.close()


@needs_signals
def test_death_is_noticed_at_once_and_raised_if_there_is_no_replay() -> None:
    venv = SharedMemoryVecEnv([partial(plain, 0), partial(plain, 1)], 2)
    venv.reset()
    os.kill(venv.env_method("pid")[1], signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"environment 1 can't be brought back.*died with exit code -9"):
        venv.step(actions_of(0, 2))
    assert time.monotonic() - start < 10  # the deadline is 60
    venv.close()


@needs_signals
def test_a_replay_that_is_not_exact_is_noticed() -> None:
    venv = SharedMemoryVecEnv([partial(Forgetful, 0)], 1, max_restarts=1)
    venv.reset()
    os.kill(venv.env_method("pid")[0], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"environment 0: replay\(\) leads to another observation"):
        venv.step(actions_of(0, 1))
    venv.close()


@pytest.mark.slow
@needs_signals
@pytest.mark.parametrize("n_workers", [2, 3])
def test_hundreds_of_lost_workers_change_nothing(n_workers: int) -> None:
    """Somebody kills or stops a worker every 50 ms on average, at any point of a step, a reset or a replacement."""
    expected = mixed_run(SharedMemoryVecEnv(counters(), 0))
    venv = SharedMemoryVecEnv(counters(), n_workers, deadline=0.3, max_restarts=1000)
    over = threading.Event()
    saboteur = threading.Thread(target=sabotage, args=(venv, over))
    saboteur.start()
    try:
        assert mixed_run(venv, pause=0.002) == expected
    finally:
        over.set()
        saboteur.join()
        venv.close()


def mixed_run(venv: SharedMemoryVecEnv, pause: float = 0.0) -> list[Any]:
    """Plain steps, steps by group, resets and restores."""
    results = [plainly(venv.reset())]
    for step in range(2000):
        time.sleep(pause)
        actions = actions_of(step)
        if step % 3:
            results.append(plainly(venv.step(actions)))
        else:
            for group, span in enumerate(venv.groups):
                venv.send(group, actions[span])
            results += [plainly(venv.receive(group)) for group in (0, 1)]
        if step % 500 == 250:
            results.append(plainly(venv.reset()))
        if step % 500 == 400:
            results.append(plainly(venv.restore(venv.state())))
    return results


def sabotage(venv: SharedMemoryVecEnv, over: threading.Event) -> None:
    dice = random.Random(1)
    while not over.wait(dice.random() * 0.1):
        with contextlib.suppress(ProcessLookupError):
            os.kill(dice.choice(venv.worker_pids), dice.choice([signal.SIGKILL] * 3 + [signal.SIGSTOP]))


# Processes


def test_workers_are_lean() -> None:
    venv = SharedMemoryVecEnv(counters(1), 1)
    VecMonitor(venv)  # asks whether the environments are wrapped by a class of stable-baselines3
    (modules,) = venv.env_method("modules")
    assert not {"torch", "mlflow", "stable_baselines3", "pytest"} & set(modules)
    assert venv.env_method("threads") == [{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}]
    venv.close()


def test_what_workers_import_is_lean() -> None:
    code = "import sys, pipeline.sim.worker, pipeline.sim.env; print(*sys.modules)"
    root = Path(__file__).parents[2]
    modules = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "mlflow", "stable_baselines3"} & set(modules.split())


def test_worker_pids(venv: SharedMemoryVecEnv) -> None:
    assert set(venv.worker_pids or [os.getpid()]) == set(venv.env_method("pid"))


@needs_signals
def test_workers_ignore_ctrl_c() -> None:
    venv = SharedMemoryVecEnv(counters(1), 1)
    venv.reset()
    (pid,) = venv.env_method("pid")
    os.kill(pid, signal.SIGINT)
    venv.step(actions_of(0, 1))
    assert venv.env_method("pid") == [pid]
    venv.close()


def gone(pids: Sequence[int], within: float = 10.0) -> bool:
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=within)
    return not alive


def test_close_ends_workers_and_may_be_called_twice() -> None:
    venv = SharedMemoryVecEnv(counters(), 2)
    venv.reset()
    pids = venv.env_method("pid")
    venv.step_async(actions_of(0))
    venv.close()
    venv.close()
    assert gone(pids)


@needs_signals
def test_a_forgotten_environment_takes_its_workers_along() -> None:
    venv = SharedMemoryVecEnv(counters(), 2)
    pids = venv.env_method("pid")
    os.kill(pids[0], signal.SIGSTOP)
    del venv
    gc.collect()
    assert gone(pids)


SCRIPT = """
import os, signal, sys
import numpy as np
from functools import partial
from pipeline.config import TrainParams, load
from pipeline.sim.training_env import make_training_env
from pipeline.sim.vec_env import SharedMemoryVecEnv
from tests.sim.toys import Counter

class Mine(Counter):  # sent by value: a worker does not run this file again
    pass

venv = SharedMemoryVecEnv([partial(Mine, index) for index in range(4)], 2, start_method=sys.argv[1])
venv.reset()
for _ in range(20):
    venv.step(np.zeros((4, 2), np.float32))
print(*venv.env_method("pid"), flush=True)
{end}
"""


ENDS = {
    "parent killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "worker stopped": "os.kill(venv.worker_pids[0], signal.SIGSTOP)",
}


def run_script(tmp_path: Path, start_method: str, end: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(end=ENDS[end]))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), start_method]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@needs_signals
@pytest.mark.parametrize("start_method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("end", ENDS)
def test_nothing_outlives_the_parent(tmp_path: Path, start_method: str, end: str) -> None:
    done = run_script(tmp_path, start_method, end)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 4
    assert gone(pids)
    assert done.stderr == ""


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_closed_environment_says_so(n_workers: int) -> None:
    venv = SharedMemoryVecEnv(counters(), n_workers)
    venv.reset()
    venv.close()
    for use in (venv.reset, partial(venv.step, actions_of(0)), partial(venv.get_attr, "index")):
        with pytest.raises(RuntimeError, match="closed"):
            use()


# CarRacing


def racing(n_envs: int = 3) -> list[Callable[[], gym.Env[Any, Any]]]:
    """Stock pictures; standing still for 24 frames, or 6 decisions, ends an episode, so that a test sees several."""
    params = load(TrainParams, env_id="CarRacing-v3", stall_limit=24)
    return [partial(make_training_env, params, index) for index in range(n_envs)]


def drive(venv: VecEnv, steps: Sequence[int]) -> list[Any]:
    """Some environments brake at the start and are reset soon; others drive on."""
    results = []
    for step in steps:
        actions = actions_of(step, venv.num_envs)
        actions[:, 1] = [0.5, -1, 0.3][: venv.num_envs]
        results.append(plainly(venv.step(actions)))
    return results


@needs_signals
def test_car_racing_is_restored_and_survives_its_workers() -> None:
    venv = SharedMemoryVecEnv(racing(), 0)
    first = plainly(venv.reset())
    expected = drive(venv, range(20))
    assert any(done for _, _, dones, _ in expected[10:] for done in dones[2])
    venv.close()

    venv = SharedMemoryVecEnv(racing(), 2)
    assert plainly(venv.reset()) == first
    assert drive(venv, range(10)) == expected[:10]
    states = venv.state()
    os.kill(venv.worker_pids[1], signal.SIGKILL)
    assert drive(venv, range(10, 20)) == expected[10:]
    venv.close()

    venv = SharedMemoryVecEnv(racing(), 1)
    assert plainly(venv.restore(states)) == expected[9][0]
    assert drive(venv, range(10, 20)) == expected[10:]
    venv.close()


# Bad arguments


def test_bad_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="forkserver or spawn, got 'fork'"):
        SharedMemoryVecEnv(counters(), 1, start_method="fork")
    with pytest.raises(ValueError, match="n_workers=-1"):
        SharedMemoryVecEnv(counters(), -1)
    counter = Counter(0)
    with pytest.raises(WorkerError, match="the same one twice"):
        SharedMemoryVecEnv([lambda: counter, lambda: counter], 0)


def test_actions_of_a_wrong_shape_are_told(venv: SharedMemoryVecEnv) -> None:
    venv.reset()
    with pytest.raises(ValueError, match=r"expected shape \(5, 2\), got \(2,\)"):
        venv.step(actions_of(0)[0])
    venv.step(actions_of(0))


def test_spaces_without_one_shape_are_told() -> None:
    class Dictionary(Counter):
        observation_space = spaces.Dict({"a": Counter.observation_space})  # type: ignore[assignment]

    with pytest.raises(TypeError, match="a space of arrays of one shape"):
        SharedMemoryVecEnv([partial(Dictionary, 0)], 0)


def test_a_constructor_that_raises_is_told() -> None:
    with pytest.raises(WorkerError, match="TypeError"):
        SharedMemoryVecEnv([partial(Counter, 0), partial(Counter, 1, wheels=3)], 1)  # type: ignore[call-arg]
