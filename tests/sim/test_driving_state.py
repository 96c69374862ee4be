"""What the critic is told, against geometry done another way and against the game's own attributes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pipeline.config import TrainParams, load
from pipeline.sim.driving_state import CAR, KEY, PATH, STATE_SIZE, VISIBLE, DrivingState
from pipeline.sim.env import find_wrapper
from pipeline.sim.training_env import make_training_env
from tests.conftest import ROOT
from tests.sim.driving import follow_road


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(ROOT)
    return make_training_env(load(TrainParams, privileged_critic=True), 0)


def path(state: Any) -> Any:
    """(n, 2) points of the road in the car's frame, to the right and ahead [units]."""
    return state[CAR:].reshape(-1, 2) * (30, 50)


@pytest.mark.parametrize("reverse", [False, True])
def test_at_the_start_the_road_lies_straight_ahead(env: Any, reverse: bool) -> None:
    _, info = env.reset(seed=7, options={"reverse": reverse})
    state = info[KEY]
    assert state.shape == (STATE_SIZE,)
    assert state.dtype == np.float32
    right, ahead = path(state).T
    near = (PATH >= -6) & (PATH <= 6)
    assert np.abs(right[near]).max() < 3
    assert (
        np.abs(ahead[near] - 3.5 * PATH[near]).max() < 5
    )  # a tile is 3.5 units long; the car stands on the first ones
    assert np.all(np.diff(ahead[near]) > 0)
    assert state[CAR - 1] == reverse


@pytest.mark.parametrize("reverse", [False, True])
def test_points_are_the_roads_in_the_cars_frame(env: Any, reverse: bool) -> None:
    """Turned back into the world by complex numbers, they are the centres of the tiles that the game visits next."""
    env.reset(seed=3, options={"reverse": reverse})
    shaping = find_wrapper(env, DrivingState).env
    for _ in range(20 if reverse else 60):
        pedals = (0.05, 0.6, 0.0) if reverse else follow_road(env.unwrapped, 0)
        *_, info = env.step(np.array([pedals[0], pedals[1] - pedals[2]], np.float32))
    game = env.unwrapped
    right, ahead = path(info[KEY]).T.astype(np.float64)
    turned = (right + 1j * ahead) * np.exp(1j * game.car.hull.angle)
    world = turned + complex(*game.car.hull.position)
    direction = -1 if reverse else 1
    tiles = [game.track[direction * (shaping.front + offset) % len(game.track)] for offset in PATH]
    np.testing.assert_allclose(world, [complex(x, y) for _, _, x, y in tiles], atol=0.02)
    assert shaping.front > 5


def test_motion_and_wheels_are_the_games(env: Any) -> None:
    env.reset(seed=7)
    for _ in range(10):
        *_, info = env.step(np.array([0.1, 0.8], np.float32))
    game, state = env.unwrapped, info[KEY]
    assert math.hypot(state[0] * 20, state[1] * 50) == pytest.approx(game.speed(), rel=1e-5)
    assert state[1] > 0.2  # forward
    np.testing.assert_allclose(state[7:11] * 60 + 60, [wheel.omega for wheel in game.car.wheels], rtol=1e-4)
    assert state[11:15].mean() == game.wheels_on_grass()


def test_what_is_called_visible_can_be_seen() -> None:
    """Road points within the picture, which ends 12 units behind the car and 37 ahead, and nothing that is counted."""
    tiles = PATH[[(index - CAR) // 2 for index in VISIBLE if index >= CAR]]
    assert sorted(set(tiles)) == [tile for tile in PATH if -12 <= 3.5 * tile <= 37]
    assert [index for index in range(CAR) if index not in VISIBLE] == [15, 16, 17, 18]  # grass, stall, doubt, reverse


def test_pictures_and_rewards_are_the_same_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    told, plain = (make_training_env(load(TrainParams, privileged_critic=p, state_coef=0.0), 0) for p in (True, False))
    told.reset()
    plain.reset()
    for action in np.random.default_rng(1).uniform(-1, 1, (30, 2)).astype(np.float32):
        one, other = told.step(action), plain.step(action)
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:4] == other[1:4]
        assert KEY not in other[4]
