"""The way of a frame: CarRacing -> frame skip -> action axes -> preprocessing -> stack.

One wrapper is one transformation. :func:`make_env` names them all in order; what a training adds is in
:mod:`pipeline.sim.training_env`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from pipeline.config import ObservationParams
from pipeline.sim.car_racing import LazyCarRacing

Observation = NDArray[np.uint8]
Step = tuple[Any, float, bool, bool, dict[str, Any]]
OnFrame = Callable[[gym.Env[Any, Any], int, Any, float], None]


class FrameSkip(gym.Wrapper[Any, Any, Any, Any]):
    """Hold each action for ``skip`` physics frames, add up their rewards, draw the last picture only."""

    def __init__(self, env: gym.Env[Any, Any], skip: int) -> None:
        super().__init__(env)
        self.skip = skip
        self.muted = False  # a replay draws nothing until its last decisions
        self._car_racing: LazyCarRacing = env.unwrapped  # type: ignore[assignment]

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self._car_racing.drawing = not self.muted
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> Step:
        total = 0.0
        for frame in range(self.skip):
            self._car_racing.drawing = frame == self.skip - 1 and not self.muted
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                # The last picture of an episode that ended between decisions was not drawn yet.
                if not self._car_racing.drawing and not self.muted:
                    observation = self._car_racing.picture()
                break
        return observation, total, terminated, truncated, info


class FrameHook(gym.Wrapper[Any, Any, Any, Any]):
    """Call ``on_frame(env, track, action, reward)`` after every physics frame; ``env`` can render it."""

    def __init__(self, env: gym.Env[Any, Any], on_frame: OnFrame) -> None:
        super().__init__(env)
        self._on_frame = on_frame
        self._track = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._track = -1 if seed is None else seed
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Step:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._on_frame(self.env, self._track, action, float(reward))
        return observation, float(reward), terminated, truncated, info


class SteerThrottle(gym.ActionWrapper[Any, Any, Any]):
    """Two axes in [-1, 1]: steering, and throttle (> 0 is gas, < 0 is brake): never both pedals at once."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def action(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        return to_pedals(action)


def to_pedals(action: NDArray[np.float32]) -> NDArray[np.float32]:
    """(..., 2) steer and throttle -> (..., 3) steer [-1, 1], gas [0, 1], brake [0, 1]."""
    steer, throttle = action[..., 0], action[..., 1]
    return np.stack([steer, np.maximum(throttle, 0), np.maximum(-throttle, 0)], axis=-1).astype(np.float32)


class Preprocess(gym.ObservationWrapper[Any, Any, Any]):
    """(96, 96, 3) or (96, 96) uint8 -> (channels, size, size) uint8, gray if asked, scaled by area."""

    def __init__(self, env: gym.Env[Any, Any], grayscale: bool, size: int) -> None:
        super().__init__(env)
        self.grayscale, self.size = grayscale, size
        channels = 1 if grayscale else 3
        self.observation_space = spaces.Box(0, 255, (channels, size, size), np.uint8)

    def observation(self, observation: NDArray[np.uint8]) -> Observation:
        return preprocess(observation, self.grayscale, self.size)


def preprocess(picture: NDArray[np.uint8], grayscale: bool, size: int) -> Observation:
    """(96, 96, 3) or (96, 96) uint8 picture -> (1 or 3, size, size) uint8."""
    image: Any = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) if grayscale and picture.ndim == 3 else picture
    if size != picture.shape[0]:
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    result: Observation = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    return result


class FrameStack(gym.Wrapper[Any, Any, Any, Any]):
    """(c, h, w) -> (stack x c, h, w) uint8, newest last; an episode starts with its first picture repeated."""

    def __init__(self, env: gym.Env[Any, Any], stack: int) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Box)
        self.channels, height, width = env.observation_space.shape
        self.stack = stack
        self.observation_space = spaces.Box(0, 255, (stack * self.channels, height, width), np.uint8)
        self._frames: Observation = np.zeros(self.observation_space.shape, np.uint8)

    def reset(self, **kwargs: Any) -> tuple[Observation, dict[str, Any]]:
        picture, info = self.env.reset(**kwargs)
        self._frames = np.tile(picture, (self.stack, 1, 1))
        return self._frames, info

    def step(self, action: Any) -> Step:
        picture, reward, terminated, truncated, info = self.env.step(action)
        self._frames = np.concatenate([self._frames[self.channels :], picture])
        return self._frames, float(reward), terminated, truncated, info


def find_wrapper(env: gym.Env[Any, Any], kind: type[Any]) -> Any:
    """The wrapper of that class within ``env``."""
    while not isinstance(env, kind):
        if not isinstance(env, gym.Wrapper):
            raise LookupError(f"no {kind.__name__} in {env}")
        env = env.env
    return env


STOCK, FAST = "LazyCarRacing-v3", "FastCarRacing-v3"


def make_env(
    observation: ObservationParams, game: str = STOCK, render_mode: str | None = None, on_frame: OnFrame | None = None
) -> gym.Env[Any, Any]:
    """The game as a policy plays it: raw reward, stock rules and actions, and by default stock pictures."""
    env: gym.Env[Any, Any] = gym.make(game, render_mode=render_mode, disable_env_checker=True)
    env = FrameSkip(FrameHook(env, on_frame) if on_frame else env, observation.frame_skip)
    return observed(env, observation)


def observed(env: gym.Env[Any, Any], observation: ObservationParams) -> gym.Env[Any, Any]:
    """With the observations that a policy sees."""
    env = Preprocess(env, observation.grayscale, observation.resize)
    return FrameStack(env, observation.frames_stack)
