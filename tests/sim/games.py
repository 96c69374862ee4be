"""The stock game stepped by hand, and parameters for small environments."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.config import TrainParams, load
from tests.conftest import ROOT

Stock = tuple[Any, float, bool, bool, dict[str, Any]]


def stock() -> gym.Env[Any, Any]:
    return gym.make("CarRacing-v3", disable_env_checker=True)


def held(env: gym.Env[Any, Any], action: Any, frames: int) -> Stock:
    """Stock steps with the same action: the last picture, the sum of rewards."""
    total = 0.0
    for _ in range(frames):
        observation, reward, terminated, truncated, info = env.step(action)
        total += float(reward)
        if terminated or truncated:
            break
    return observation, total, terminated, truncated, info


def steering(n: int, seed: int = 0) -> NDArray[np.float32]:
    """(n, 2) steer and throttle: mostly forward, some braking."""
    return np.random.default_rng(seed).uniform([-0.4, -0.3], [0.4, 1.0], (n, 2)).astype(np.float32)


def train_params(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> TrainParams:
    monkeypatch.chdir(ROOT)
    plain = {"env_id": "CarRacing-v3", "frame_skip": 4, "frames_stack": 3, "grayscale": True, "resize": 48}
    return load(TrainParams, **{**plain, "action_axes": "steer_throttle", **changes})
