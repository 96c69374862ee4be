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
    to_pedals,
)
from pipeline.sim.shaping import Shaping

BEFORE = (10, 25)
"""Decisions between the start of another try and the mistake, least and most: 1 to 2 s, 70 to 170 units at speed."""
BEFORE_OR_ASTRAY = (-20, 25)
"""The same where the car was lost: up to 20 decisions after that it stands beside the road, and has to come back."""
AFTER = 15
"""Decisions beyond the mistake, or beyond the start of the try, after which a car on new tiles has succeeded."""
SEIZED, BRAKED = (6, 14), (0, 12)
"""Decisions for which the controls of a thrown car are seized, and then the brake held, least and most."""
THROWN = 1000
"""Tells the random numbers of a throw from those of the tries, which are fewer."""


class TrackSequence(gym.Wrapper[Any, Any, Any, Any]):
    """Each ``reset()`` starts the next episode of this environment's own sequence of training tracks.

    Episode ``k`` of environment ``index`` drives the track of :func:`training_track` whatever came before. If the car
    misses a tile or is lost, the next ``reset()`` goes back to a second or two before that, by the same actions, for
    another try, up to ``retries`` times: the places where laps are lost are few, and a policy that is nearly safe sees
    them once in twenty laps. Where the car was lost, every other try begins beside the road, for the way back to be
    learned. A try ends, as cut short, when the place is behind the car and new tiles are below it; it has no
    ``info["episode"]``, since it is no drive from the start, but ``info["retry"]``, 1 if it went well and else 0.

    After a share ``thrown_starts`` of the episodes the next ``reset()`` goes back to any moment of the drive and throws
    the car off the road: hard steering for half a second to a second, and mostly the brake. What follows is a try, too.
    A policy that hardly ever leaves the road would else not learn to come back, and stand there until the end.

    Tries belong to their episode, so ``(episode, all actions since it began)`` is the whole state, which :meth:`replay`
    brings back. ``reset(seed=n)`` drives track ``n``, without another try, and does not advance the sequence.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        seed: int,
        index: int,
        reverse_laps: float = 0.0,
        retries: int = 0,
        thrown_starts: float = 0.0,
    ) -> None:
        super().__init__(env)
        self.seed, self.index, self.reverse_laps = seed, index, reverse_laps
        self.retries, self.thrown_starts = retries, thrown_starts
        self.episode = -1
        self._frame_skip = find_wrapper(env, FrameSkip)
        self._shaping: Shaping = find_wrapper(env, Shaping)
        self._stack = find_wrapper(env, FrameStack).stack
        self._begin(retries)

    def _begin(self, tries: int) -> None:
        self._tries, self._over = tries, False
        self._actions: list[NDArray[np.float32]] = []  # since the start of the lap, those of other tries left out
        self._goal: int | None = None  # decisions after which this try has succeeded
        self._astray = False  # this try began off the road
        self._may_throw = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        if seed is not None:
            self._begin(self.retries)
            self._may_throw = False
            observation, info = self.env.reset(seed=seed, options=options)
        elif self._over and self._tries < self.retries and self._shaping.mistake is not None:
            observation, info = self._try_again(self._shaping.mistake)
        elif self._over and self._may_throw and self._is_to_be_thrown() and (start := self._throw()):
            observation, info = start
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
        """Back to the road before the decision ``mistake``, or to the grass beside it."""
        tries = self._tries + 1
        bounds = BEFORE_OR_ASTRAY if self._shaping.strayed else BEFORE
        before = int(np.random.default_rng([self.track, tries]).integers(*bounds, endpoint=True))
        return self._follow(self._actions[: max(mistake - before, 0)], tries, mistake, before < 0)

    def _is_to_be_thrown(self) -> bool:
        return bool(np.random.default_rng([self.track, THROWN]).random() < self.thrown_starts)

    def _throw(self) -> tuple[Observation, dict[str, Any]] | None:
        """To any moment of the drive that is over, and off the road from there; None if that was the car's end."""
        random = np.random.default_rng([self.track, THROWN, len(self._actions)])
        way = self._actions[: int(random.integers(len(self._actions), endpoint=True))]
        seized, braked = (int(random.integers(*bounds, endpoint=True)) for bounds in (SEIZED, BRAKED))
        steer, gas = random.choice([-1.0, 1.0]) * random.uniform(0.5, 1), random.uniform(0, 1)
        way += [self._axes(steer, gas)] * seized + [self._axes(0.0, -0.8)] * braked
        start = self._follow(way, self.retries, len(way), True)
        self._may_throw = False
        return None if self._over else start

    def _axes(self, steer: float, throttle: float) -> NDArray[np.float32]:
        """The action on the environment's own axes, two or three."""
        axes = np.array([steer, throttle], np.float32)
        return axes if self.action_space.shape == (2,) else to_pedals(axes)

    def _follow(
        self, way: list[NDArray[np.float32]], tries: int, mistake: int, astray: bool
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a try at the end of ``way`` from the start of the lap."""
        self._begin(tries)
        self._mute(len(way))
        observation, info = self._to_start()
        for t, action in enumerate(way):
            self._mute(len(way) - t - 1)
            observation, _, _, _, info = self.step(action)
            if self._over:
                break
        if astray:
            self._shaping.forgive()
        self._goal, self._astray = max(mistake, len(way)) + AFTER, astray
        return observation, info

    def _mute(self, decisions: int) -> None:
        """Draw only the pictures that are still in the stack so many decisions later."""
        self._frame_skip.muted = decisions >= self._stack

    def step(self, action: NDArray[np.float32]) -> Step:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._actions.append(np.array(action))
        if self._goal is not None:
            well = self._shaping.mistake is None or (self._astray and not terminated)
            on_the_way = len(self._actions) >= self._goal and self._shaping.frames_stalled == 0
            truncated = truncated or (well and on_the_way and not terminated)
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
    if params.privileged_critic:
        env = DrivingState(shaped)
    return TrackSequence(
        observed(env, params), params.seed, index, params.reverse_laps, params.retries, params.thrown_starts
    )
