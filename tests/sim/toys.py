"""Small environments for the tests of the vectorised environment; workers import this module, so it imports little."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Counter(gym.Env[Any, Any]):
    """Observations and rewards mix a hidden state with the actions, so that any lost or doubled step shows for ever.

    Episodes have their own lengths and seeds; even ones end by termination, odd ones by truncation.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = spaces.Box(0, 255, (2, 3), np.uint8)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, index: int, render_mode: str | None = None) -> None:
        self.index, self.render_mode = index, render_mode
        self.episode = -1
        self.difficulty = 1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.options = options
        if seed is None:
            self.episode += 1
            seed = 1000 * self.index + self.episode
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.state, self.t = self.rng.random(6) * 256, 0
        self.length = int(self.rng.integers(3, 12))
        return self._observation(), {"episode_index": self.episode, "seed": seed}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.before_step()
        self.t += 1
        self.state = (self.state * 1.1 + 100 * float(action @ np.array([0.3, 0.7])) + self.rng.random(6)) % 256
        over = self.t >= self.length
        terminated = over and self.episode % 2 == 0
        info = {"t": self.t, "difficulty": self.difficulty}
        return self._observation(), float(self.state[0]) * self.difficulty, terminated, over and not terminated, info

    def replay(self, episode: int, actions: Any) -> Any:
        self.episode = episode - 1
        observation, _ = self.reset()
        for action in actions:
            observation, *_ = self.step(action)
        return observation

    def before_step(self) -> None:
        """For misfortunes."""

    def render(self) -> Any:
        return np.full((4, 5, 3), self.index, np.uint8)

    def add(self, a: int, b: int = 0) -> int:
        return self.index + a + b

    def fail(self) -> None:
        raise ZeroDivisionError("on request")

    def pid(self) -> int:
        return os.getpid()

    def modules(self) -> list[str]:
        return sorted(sys.modules)

    def threads(self) -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}

    def _observation(self) -> Any:
        return self.state.astype(np.uint8).reshape(2, 3)


class Unlucky(Counter):
    """Environment 1 meets its fate the first ``times`` times it comes to step 2 of episode 1; ``marks`` counts them."""

    def __init__(self, index: int, fate: str, marks: Path, times: int = 1) -> None:
        super().__init__(index)
        self.fate, self.marks, self.times = fate, marks, times

    def before_step(self) -> None:
        if (self.index, self.episode, self.t) != (1, 1, 2) or len(list(self.marks.iterdir())) >= self.times:
            return
        (self.marks / str(time.monotonic_ns())).touch()
        if self.fate == "raise":
            raise ArithmeticError("a bad day")
        os.kill(os.getpid(), {"die": signal.SIGKILL, "hang": signal.SIGSTOP}[self.fate])


class Endless(Counter):
    """One episode that never ends."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        result = super().reset(**kwargs)
        self.length = 10**9
        return result


class Forgetful(Counter):
    """Its replay is not exact."""

    def replay(self, episode: int, actions: Any) -> Any:
        return super().replay(episode, actions) + 1


class Plain(gym.Wrapper[Any, Any, Any, Any]):
    """Hides ``replay``."""


def plain(index: int) -> Plain:
    return Plain(Counter(index))
