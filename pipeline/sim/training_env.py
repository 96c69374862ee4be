"""What a training drives: shaped rewards, a sequence of tracks of its own, and its mistakes once more.

The state of an environment is the number of its episode and the actions since it began: :class:`TrackSequence` brings
it back exactly.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from pipeline.config import FIRST_TRAINING_TRACK, TrainParams
from pipeline.sim.driving_state import DrivingState
from pipeline.sim.env import (
    FAST,
    STOCK,
    FrameSkip,
    FrameStack,
    Observation,
    SteerThrottle,
    Step,
    find_wrapper,
    observed,
)
from pipeline.sim.shaping import Shaping

BEFORE = (10, 25)
"""Decisions between the start of another try and the mistake, least and most: 1 to 2 s, 70 to 170 units at speed."""
AFTER = 15
"""Decisions beyond the place of the mistake after which another try has succeeded."""


class TrackSequence(gym.Wrapper[Any, Any, Any, Any]):
    """Each ``reset()`` starts the next episode of this environment's own sequence of training tracks.

    Episode ``k`` of environment ``index`` drives the track of :func:`training_track` whatever came before. If the car
    misses a tile or is lost, the next ``reset()`` goes back to a second or two before that, by the same actions, for
    another try, up to ``retries`` times: the places where laps are lost are few, and a policy that is nearly safe sees
    them once in twenty laps. Such a try ends, as cut short, when the place is behind the car; it has no
    ``info["episode"]``, since it is no drive from the start, but ``info["retry"]``, 1 if it went well and else 0.

    Tries belong to their episode, so ``(episode, all actions since it began)`` is the whole state, which :meth:`replay`
    brings back. ``reset(seed=n)`` drives track ``n``, without another try, and does not advance the sequence.
    """

    def __init__(
        self, env: gym.Env[Any, Any], seed: int, index: int, reverse_laps: float = 0.0, retries: int = 0
    ) -> None:
        super().__init__(env)
        self.seed, self.index, self.reverse_laps, self.retries = seed, index, reverse_laps, retries
        self.episode = -1
        self._frame_skip = find_wrapper(env, FrameSkip)
        self._shaping: Shaping = find_wrapper(env, Shaping)
        self._stack = find_wrapper(env, FrameStack).stack
        self._begin(retries)

    def _begin(self, tries: int) -> None:
        self._tries, self._over = tries, False
        self._actions: list[NDArray[np.float32]] = []  # since the start of the lap, those of other tries left out
        self._goal: int | None = None  # decisions after which this try has succeeded

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        if seed is not None:
            self._begin(self.retries)
            observation, info = self.env.reset(seed=seed, options=options)
        elif self._over and self._tries < self.retries and self._shaping.mistake is not None:
            observation, info = self._try_again(self._shaping.mistake)
        else:
            self.episode += 1
            self._begin(0)
            observation, info = self._to_start()
        return observation, {**info, "episode_index": self.episode, "track": self.track if seed is None else seed}

    @property
    def track(self) -> int:
        """Track of the present episode of the sequence."""
        return training_track(self.seed, self.index, self.episode)

    def _to_start(self) -> tuple[Observation, dict[str, Any]]:
        return self.env.reset(seed=self.track, options={"reverse": is_reversed(self.track, self.reverse_laps)})

    def _try_again(self, mistake: int) -> tuple[Observation, dict[str, Any]]:
        """Back to the road before the decision ``mistake``."""
        tries = self._tries + 1
        before = int(np.random.default_rng([self.track, tries]).integers(*BEFORE, endpoint=True))
        way = self._actions[: max(mistake - before, 0)]
        self._begin(tries)
        self._mute(len(way))
        observation, info = self._to_start()
        for t, action in enumerate(way):
            self._mute(len(way) - t - 1)
            observation, _, _, _, info = self.step(action)
        self._goal = mistake + AFTER
        return observation, info

    def _mute(self, decisions: int) -> None:
        """Draw only the pictures that are still in the stack so many decisions later."""
        self._frame_skip.muted = decisions >= self._stack

    def step(self, action: NDArray[np.float32]) -> Step:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._actions.append(np.array(action))
        if self._goal is not None:
            well = self._shaping.mistake is None
            truncated = truncated or (well and len(self._actions) >= self._goal and not terminated)
            info.pop("episode", None)
            if terminated or truncated:
                info["retry"] = float(well)
        self._over = terminated or truncated
        return observation, float(reward), terminated, truncated, info

    def replay(self, episode: int, actions: NDArray[np.float32]) -> Observation:
        """Return to the state after ``actions`` (t, action_dim) in ``episode``; returns its observation.

        Only the pictures that are still in the stack are drawn, so a replay costs physics alone (0.05 ms a frame).
        """
        self.episode, self._over = episode - 1, False
        self._mute(len(actions))
        observation, _ = self.reset()
        for t, action in enumerate(actions):
            self._mute(len(actions) - t - 1)
            observation, *_ = self.step(action)
            if self._over:
                observation, _ = self.reset()  # to the next try: the episode went on
        return observation


def training_track(seed: int, index: int, episode: int) -> int:
    """Track of an episode: a hash of all three, at or above ``FIRST_TRAINING_TRACK``."""
    word = int(np.random.SeedSequence([seed, index, episode]).generate_state(1)[0])
    return FIRST_TRAINING_TRACK + word % (2**31 - FIRST_TRAINING_TRACK)


def is_reversed(track: int, share: float) -> bool:
    """Whether a track is among the ``share`` that is driven the other way round.

    The game's tracks turn left: right-hand hairpins are so rare that a policy cuts them and misses their tiles.
    """
    return bool(np.random.default_rng(track).random() < share)


def make_training_env(params: TrainParams, index: int) -> TrackSequence:
    """Environment ``index`` of a training: shaped reward, its own endless sequence of tracks."""
    gray = {"grayscale": params.grayscale} if params.env_id == FAST else {}
    game = FAST if params.env_id == FAST else STOCK
    env: gym.Env[Any, Any] = FrameSkip(gym.make(game, disable_env_checker=True, **gray), params.frame_skip)
    if params.action_axes == "steer_throttle":
        env = SteerThrottle(env)
    env = shaped = Shaping(env, params)
    if params.privileged_critic or params.state_coef:
        env = DrivingState(shaped)
    return TrackSequence(observed(env, params), params.seed, index, params.reverse_laps, params.retries)
