"""The training reward: the game's own, less penalties; and an early end of hopeless episodes."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.box2d.car_racing import FPS
from numpy.typing import NDArray

from pipeline.config import TrainParams
from pipeline.sim.car_racing import LazyCarRacing

TILES_BEHIND = 5
"""A tile so far behind the foremost wheel, 17 units, can't be visited any more without turning back."""


class Shaping(gym.Wrapper[Any, Any, Any, Any]):
    """The training reward: the game's own, less penalties; and an early end of hopeless episodes.

    Scores never see this wrapper. At its end an episode tells ``info["episode"]``: the game's own return ``r``, its
    length ``l`` in decisions (SB3's names), and what explains them. Speeds are in world units/s.

    Attributes:
        front: Tiles between the start and the foremost place that the car has reached.
        frames_on_grass: Frames since three wheels left the road.
        frames_stalled: Frames since the last new tile.
        mistake: Decisions until the car reached the first tile that it then missed, or until it was lost; else None.
    """

    def __init__(self, env: gym.Env[Any, Any], params: TrainParams) -> None:
        super().__init__(env)
        self.params = params
        self._car_racing: LazyCarRacing = env.unwrapped  # type: ignore[assignment]
        self._begin()

    def _begin(self) -> None:
        self._raw_return = self._shaped_return = self._steer = 0.0
        self._decisions = self._frames = self.frames_on_grass = self.frames_stalled = self._tiles = 0
        self.front = self._missed = 0
        self._fronts: list[int] = []  # after each decision
        self.mistake: int | None = None

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self._begin()
        return self.env.reset(**kwargs)

    def step(self, action: NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._decisions += 1
        self._raw_return += float(reward)
        shaped = float(reward) - self._penalties(action)
        if not (terminated or truncated) and self._hopeless():
            shaped -= self.params.early_end_penalty
            terminated = True
        self._lost = terminated and not info["lap_finished"]  # hopeless, or off the playfield
        if self._lost and self.mistake is None:
            astray = max(self.frames_on_grass, self.frames_stalled) // self.params.frame_skip
            self.mistake = max(self._decisions - astray, 0)
        if (info["lap_finished"] or self._lap_over()) and self.params.bootstrap_lap:
            # The car can't see that the lap ends here: to the learner the road goes on.
            terminated, truncated = False, True
        self._shaped_return += shaped
        if terminated or truncated:
            info["episode"] = self._summary(info)
        return observation, shaped, terminated, truncated, info

    def _summary(self, info: dict[str, Any]) -> dict[str, float]:
        return {
            "r": self._raw_return,
            "l": self._decisions,
            "shaped_return": self._shaped_return,
            "lap_finished": float(info["lap_finished"]),
            "lap_time": info["lap_time"],
            "tiles": info["tiles"] / info["n_tiles"],
            "missed_tiles": self._missed,
            "lost": float(self._lost),
        }

    def _penalties(self, action: NDArray[np.float32]) -> float:
        params, car = self.params, self._car_racing
        frames = car.frames - self._frames
        off_road = car.wheels_on_grass()
        self._frames = car.frames
        self.frames_on_grass = self.frames_on_grass + frames if off_road >= 0.75 else 0
        self.frames_stalled = 0 if car.tile_visited_count > self._tiles else self.frames_stalled + frames
        self._tiles = car.tile_visited_count
        steer_change = float(action[0]) - self._steer
        self._steer = float(action[0])
        missed = self._missed
        self._missed += self._newly_missed()
        return (
            params.missed_tile_penalty * (self._missed - missed)
            + params.grass_penalty * off_road * car.speed() / FPS * frames  # by distance: a beginner stands there a lot
            + params.time_penalty * frames
            + params.steer_penalty * steer_change**2
        )

    def _newly_missed(self) -> int:
        """Tiles that the car has now left behind unvisited: each will keep the lap from being finished."""
        n_tiles, game = len(self._car_racing.track), self._car_racing
        before = max(self.front - TILES_BEHIND, 0)
        self.front = game.progress(self.front)
        self._fronts.append(self.front)
        behind = min(self.front - TILES_BEHIND, n_tiles)
        missed = [place for place in range(before, behind) if not game.is_visited(place)]
        if missed and self.mistake is None:
            self.mistake = bisect_left(self._fronts, missed[0])
        return len(missed)

    def tiles_in_doubt(self) -> int:
        """Unvisited tiles just behind the foremost wheel, which the next decisions visit or miss."""
        n_tiles, game = len(self._car_racing.track), self._car_racing
        return sum(
            not game.is_visited(place) for place in range(max(self.front - TILES_BEHIND, 0), min(self.front, n_tiles))
        )

    def _lap_over(self) -> bool:
        """The car is round, whether or not it has visited every tile."""
        return self.front >= len(self._car_racing.track)

    def _hopeless(self) -> bool:
        grass, stall = self.params.grass_limit, self.params.stall_limit
        return bool((grass and self.frames_on_grass >= grass) or (stall and self.frames_stalled >= stall))
