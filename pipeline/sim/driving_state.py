"""What the simulator knows of a drive: for the critic of the training, never for the policy."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from pipeline.sim.car_racing import LazyCarRacing
from pipeline.sim.shaping import Shaping

PATH = np.array([-6, -3, 0, 2, 4, 6, 8, 10, 12, 15, 18, 21, 25, 30, 35, 40, 50, 60])
"""Road tiles whose places are told, counted from the foremost that the car has reached; a tile is 3.5 units long."""
CAR = 19
STATE_SIZE = CAR + 2 * len(PATH)
VISIBLE = [*range(15), *range(CAR + 2, CAR + 16)]
"""What the picture shows of a state: the car and its wheels, as they stand and as bars, and the road from 10 units
behind to 35 ahead."""
KEY = "driving_state"


class DrivingState(gym.Wrapper[Any, Any, Any, Any]):
    """Add ``info["driving_state"]`` to every step and reset: (STATE_SIZE,) float32, each number of the order of 1.

    The road from 20 units behind to 210 units ahead as points in the car's own frame, the car's motion, its wheels, and
    what the shaping counts. The picture shows 37 units of road ahead, and speed as a bar of a few pixels.
    """

    def __init__(self, env: Shaping) -> None:
        super().__init__(env)
        self._shaping = env
        self._game: LazyCarRacing = env.unwrapped  # type: ignore[assignment]

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**kwargs)
        self._road = np.array([place[2:4] for place in self._game.track])  # (n_tiles, 2) units
        if self._game.reverse:
            self._road = np.roll(self._road[::-1], 1, axis=0)  # tile k of a reversed lap is tile -k
        return observation, {**info, KEY: self.state()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(reward), terminated, truncated, {**info, KEY: self.state()}

    def state(self) -> NDArray[np.float32]:
        """The present state, (STATE_SIZE,) float32."""
        car: Any = self._game.car
        hull, shaping = car.hull, self._shaping
        (x, y), (v_x, v_y) = hull.position, hull.linearVelocity
        sin, cos = math.sin(hull.angle), math.cos(hull.angle)
        wheels = car.wheels
        state = np.empty(STATE_SIZE, np.float32)
        state[:CAR] = (
            (cos * v_x + sin * v_y) / 20,
            (cos * v_y - sin * v_x) / 50,
            hull.angularVelocity / 2,
            wheels[0].joint.angle * 2,
            wheels[0].steer,
            wheels[2].gas,
            wheels[2].brake,
            *((wheel.omega - 60) / 60 for wheel in wheels),
            *(float(not wheel.tiles) for wheel in wheels),
            shaping.frames_on_grass / 50,
            shaping.frames_stalled / 100,
            shaping.tiles_in_doubt(),
            float(self._game.reverse),
        )
        path = self._road[(shaping.front + PATH) % len(self._road)] - (x, y)
        state[CAR::2] = (path @ (cos, sin)) / 30
        state[CAR + 1 :: 2] = (path @ (-sin, cos)) / 50
        return state
