"""Scripted drivers for tests: on the road, across the grass, in circles, off the field."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.envs.box2d.car_racing import CarRacing
from numpy.typing import NDArray

Action = NDArray[np.float32]
Driver = Callable[[CarRacing, int], Action]


def follow_road(env: CarRacing, frame: int) -> Action:
    """Towards the middle of the road five tiles ahead."""
    centres = np.array([(x, y) for _, _, x, y in env.track])
    assert env.car is not None
    nearest = int(np.argmin(np.linalg.norm(centres - env.car.hull.position, axis=1)))
    return drive_to(env, *centres[(nearest + 5) % len(centres)])


def leave(env: CarRacing, frame: int) -> Action:
    """Away from the middle of the field, across the grass and over the edge."""
    assert env.car is not None
    x, y = env.car.hull.position
    return drive_to(env, 9 * x, 9 * y)


def drive_to(env: CarRacing, x: float, y: float) -> Action:
    """Towards a point, at about 50 units/s."""
    assert env.car is not None
    hull = env.car.hull
    error = math.remainder(math.atan2(hull.position[0] - x, y - hull.position[1]) - hull.angle, math.tau)
    speed = hull.linearVelocity.length
    return np.array([np.clip(-1.5 * error, -1, 1), 0.4 * (speed < 45), 0.2 * (speed > 60)], np.float32)


def donut(env: CarRacing, frame: int) -> Action:
    return np.array([1, 1, 0], np.float32)


def erratic(seed: int) -> Driver:
    """Random actions held for 15 frames each, hard braking among them."""
    plan = np.random.default_rng(seed).uniform((-1, 0, -1), (1, 1, 1), (100, 3)).clip((-1, 0, 0)).astype(np.float32)
    return lambda env, frame: plan[frame // 15 % len(plan)]


def varied(seed: int) -> Driver:
    """Another driver every 125 frames, the road being the commonest."""
    drivers = [follow_road, erratic(seed), follow_road, donut, follow_road, follow_road, leave, leave]
    return lambda env, frame: drivers[(frame // 125 + seed) % len(drivers)](env, frame)


def play(env: Any, seed: int, driver: Driver, frames: int) -> list[tuple[Any, float, bool, bool, dict[str, Any]]]:
    """What ``step`` returns in one episode of ``frames`` at most."""
    env.reset(seed=seed)
    steps: list[tuple[Any, float, bool, bool, dict[str, Any]]] = []
    for frame in range(frames):
        steps.append(env.step(driver(env.unwrapped, frame)))
        if steps[-1][2] or steps[-1][3]:
            break
    return steps
