"""A resumed training is the uninterrupted one, to the bit; a damaged state is never taken for a good one."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from pipeline.agent import checkpoint
from pipeline.agent.build import build_model
from pipeline.agent.ppo import DrivingPPO
from pipeline.config import TrainParams, load
from pipeline.sim.training_env import make_training_env
from pipeline.sim.vec_env import SharedMemoryVecEnv

ROLLOUT = 4 * 32


@pytest.fixture(scope="module")
def params() -> TrainParams:
    small = {"n_envs": 4, "n_steps": 32, "batch_size": 64, "n_epochs": 2}
    return load(TrainParams, **small, num_threads=1, device="cpu", desired_kl=1e-4)  # so small that every update counts


def build(params: TrainParams, n_workers: int = 0) -> DrivingPPO:
    envs = [partial(make_training_env, params, index) for index in range(params.n_envs)]
    model = build_model(params, SharedMemoryVecEnv(envs, n_workers))
    model.set_logger(Logger(None, []))
    return model


class Capture(BaseCallback):
    """Keeps a copy of the state before every rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, checkpoint.State] = {}

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        state = checkpoint.capture(self.model, {})
        copies = {name: tensor.clone() for name, tensor in state.tensors.items()}
        self.states.setdefault(self.num_timesteps, dataclasses.replace(state, tensors=copies))


def train_on(model: DrivingPPO, rollouts: int) -> dict[int, checkpoint.State]:
    capture = Capture()
    begin = model.num_timesteps
    model.learn(rollouts * ROLLOUT - begin, capture, reset_num_timesteps=begin == 0)
    model.env.close()
    return capture.states


def differences(one: checkpoint.State, other: checkpoint.State) -> list[str]:
    names = one.tensors.keys() | other.tensors.keys()
    bits = [n for n in names if not th.equal(one.tensors[n], other.tensors[n])]
    return bits + [key for key in one.header if one.header[key] != other.header[key]]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_resumed_equals_uninterrupted(params: TrainParams, tmp_path: Path, n_workers: int) -> None:
    whole = train_on(build(params), 6)
    checkpoint.publish(tmp_path, whole[2 * ROLLOUT])
    assert whole[2 * ROLLOUT].header["slowdown"] < 1

    model = build(params, n_workers)
    model.policy.load_state_dict({k: v * 0 for k, v in model.policy.state_dict().items()})  # nothing may stay of it
    state = checkpoint.latest(tmp_path)
    assert state is not None
    checkpoint.restore(model, state)
    resumed = train_on(model, 6)

    for steps in (2 * ROLLOUT, 3 * ROLLOUT, 5 * ROLLOUT):
        assert differences(whole[steps], resumed[steps]) == []
    assert differences(whole[2 * ROLLOUT], whole[3 * ROLLOUT])  # the comparison sees a difference where there is one


@pytest.fixture
def state() -> checkpoint.State:
    return checkpoint.State(
        {"weights": th.arange(1000.0)}, {"format": checkpoint.FORMAT_VERSION, "num_timesteps": 7, "extra": {}}
    )


def at(state: checkpoint.State, steps: int) -> checkpoint.State:
    return dataclasses.replace(state, header={**state.header, "num_timesteps": steps})


def steps_of(state: checkpoint.State | None) -> Any:
    return state and state.header["num_timesteps"]


def test_keeps_the_newest_three(state: checkpoint.State, tmp_path: Path) -> None:
    for steps in (1, 20, 300, 4000, 50000):
        checkpoint.publish(tmp_path, at(state, steps))
    assert [steps_of(checkpoint.read(path)) for path in checkpoint.states(tmp_path)] == [50000, 4000, 300]
    assert steps_of(checkpoint.latest(tmp_path)) == 50000
    assert list(tmp_path.glob("*.tmp")) == []


def test_keeps_the_state_of_the_best_policy_too(state: checkpoint.State, tmp_path: Path) -> None:
    for steps in (1, 20, 300, 4000, 50000, 600000):
        checkpoint.publish(tmp_path, at(state, steps), best=20)
    assert [steps_of(checkpoint.read(path)) for path in checkpoint.states(tmp_path)] == [600000, 50000, 4000, 20]
    checkpoint.publish(tmp_path, at(state, 7000000), best=7000000)
    assert [steps_of(checkpoint.read(path)) for path in checkpoint.states(tmp_path)] == [7000000, 600000, 50000]


@pytest.mark.parametrize("length", [0, 1, 8, 100, 1000, 3000, 4200])
def test_truncated_newest_falls_back(state: checkpoint.State, tmp_path: Path, length: int) -> None:
    checkpoint.publish(tmp_path, at(state, 1))
    newest = checkpoint.publish(tmp_path, at(state, 2))
    assert newest.stat().st_size > length
    newest.write_bytes(newest.read_bytes()[:length])
    assert steps_of(checkpoint.latest(tmp_path)) == 1


def test_every_flipped_bit_is_noticed(state: checkpoint.State, tmp_path: Path) -> None:
    checkpoint.publish(tmp_path, at(state, 1))
    newest = checkpoint.publish(tmp_path, at(state, 2))
    good = newest.read_bytes()
    for position in range(0, len(good), len(good) // 50):
        newest.write_bytes(good[:position] + bytes([good[position] ^ 16]) + good[position + 1 :])
        assert steps_of(checkpoint.latest(tmp_path)) == 1, f"flipped bit at byte {position} was accepted"


def test_all_damaged_refuses_to_start_afresh(state: checkpoint.State, tmp_path: Path) -> None:
    for steps in (1, 2):
        checkpoint.publish(tmp_path, at(state, steps)).write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match="delete these files to train from the start"):
        checkpoint.latest(tmp_path)
    assert len(checkpoint.states(tmp_path)) == 2


def test_no_state_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
