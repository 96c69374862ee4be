"""The wrappers against the stock game, stepped by hand: same pictures, same rewards, same ends."""

from __future__ import annotations

import math
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest

from pipeline.config import ObservationParams
from pipeline.sim.env import (
    FrameSkip,
    FrameStack,
    Preprocess,
    find_wrapper,
    make_env,
    preprocess,
    to_pedals,
)
from pipeline.sim.shaping import Shaping
from tests.sim.games import held, steering, stock

OBSERVATION = ObservationParams(frame_skip=4, frames_stack=3, grayscale=True, resize=64, action_axes="steer_throttle")


# Frame skip


def test_frame_skip_equals_stepping_the_stock_game_four_times() -> None:
    theirs, ours = stock(), FrameSkip(gym.make("LazyCarRacing-v3", disable_env_checker=True), 4)
    np.testing.assert_array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    for action in to_pedals(steering(20)):
        picture, reward, *ends = held(theirs, action, 4)[:4]
        got = ours.step(action)
        np.testing.assert_array_equal(got[0], picture)
        assert got[1] == pytest.approx(reward, abs=1e-9)
        assert list(got[2:4]) == ends


def test_frame_skip_draws_the_last_frame_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    env = FrameSkip(gym.make("LazyCarRacing-v3", disable_env_checker=True), 4)
    env.reset(seed=0)
    drawn: list[int] = []
    game: Any = env.unwrapped
    picture = game.picture
    monkeypatch.setattr(game, "picture", lambda: (drawn.append(game.frames), picture())[1])
    for _ in range(3):
        env.step(np.array([0, 1, 0], np.float32))
    assert drawn == [3, 7, 11]  # frames counts what is done before: the 4th, 8th and 12th


def test_the_time_limit_is_1000_frames_whatever_the_skip() -> None:
    env = FrameSkip(gym.make("LazyCarRacing-v3", disable_env_checker=True), 3)
    theirs = stock()
    env.reset(seed=1)
    theirs.reset(seed=1)
    still = np.zeros(3, np.float32)
    steps = [env.step(still) for _ in range(334)]
    assert [step[2] or step[3] for step in steps] == [False] * 333 + [True]
    observation, reward, terminated, truncated, info = steps[-1]
    assert (terminated, truncated, info["lap_time"]) == (False, True, 20.0)
    game: Any = theirs.unwrapped
    game._render = lambda mode: None  # a stock frame costs 5 ms to draw; only the last is looked at
    for _ in range(999):
        theirs.step(still)
    del game._render
    last, *_, over, _ = theirs.step(still)
    assert over
    np.testing.assert_array_equal(observation, last)  # the end came after one frame of three, and was drawn
    assert reward == pytest.approx(-0.1)


# Preprocessing and stacking


@pytest.mark.parametrize(("grayscale", "size"), [(True, 64), (True, 96), (False, 84), (False, 96)])
def test_preprocessing_is_opencvs_on_the_stock_frame(grayscale: bool, size: int) -> None:
    picture, _ = stock().reset(seed=5)
    expected = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) if grayscale else picture
    if size != 96:
        expected = cv2.resize(expected, (size, size), interpolation=cv2.INTER_AREA)
    got = preprocess(picture, grayscale, size)
    assert (got.shape, got.dtype) == ((1 if grayscale else 3, size, size), np.uint8)
    np.testing.assert_array_equal(got[0] if grayscale else got.transpose(1, 2, 0), expected)


@pytest.mark.parametrize("grayscale", [True, False])
def test_the_stack_is_newest_last_and_starts_with_the_first_picture_repeated(grayscale: bool) -> None:
    plain = Preprocess(FrameSkip(gym.make("LazyCarRacing-v3", disable_env_checker=True), 2), grayscale, 48)
    stacked = FrameStack(
        Preprocess(FrameSkip(gym.make("LazyCarRacing-v3", disable_env_checker=True), 2), grayscale, 48), 3
    )
    pictures = [plain.reset(seed=2)[0]] * 3
    observation, _ = stacked.reset(seed=2)
    for action in to_pedals(steering(6)):
        np.testing.assert_array_equal(observation, np.concatenate(pictures[-3:]))
        assert observation.shape == stacked.observation_space.shape
        before, kept = observation, observation.copy()
        observation = stacked.step(action)[0]
        pictures.append(plain.step(action)[0])
        np.testing.assert_array_equal(before, kept)  # an observation handed out does not change later


def test_steer_and_throttle_never_press_both_pedals() -> None:
    axes = np.array([[-1, 0.5], [0.25, -0.75], [1, 0], [0, 1], [0, -1]], np.float32)
    expected = [[-1, 0.5, 0], [0.25, 0, 0.75], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    np.testing.assert_array_equal(to_pedals(axes), np.array(expected, np.float32))


def test_make_env_is_the_stock_game_step_for_step() -> None:
    env, theirs = make_env(OBSERVATION), stock()
    pictures = [preprocess(theirs.reset(seed=11)[0], True, 64)] * 3
    np.testing.assert_array_equal(env.reset(seed=11)[0], np.concatenate(pictures))
    for action in steering(12):
        picture, reward, terminated, truncated, _ = held(theirs, to_pedals(action), 4)
        pictures.append(preprocess(picture, True, 64))
        got = env.step(to_pedals(action))
        np.testing.assert_array_equal(got[0], np.concatenate(pictures[-3:]))
        assert got[1:4] == (pytest.approx(reward, abs=1e-9), terminated, truncated)


# Reversed laps


def test_a_reversed_lap_begins_at_the_same_place_the_other_way_round() -> None:
    ours, theirs = gym.make("FastCarRacing-v3", disable_env_checker=True), stock()
    picture, _ = ours.reset(seed=5, options={"reverse": True})
    theirs.reset(seed=5)
    game, other = (env.unwrapped for env in (ours, theirs))
    assert math.remainder(game.car.hull.angle - other.car.hull.angle - math.pi, math.tau) == pytest.approx(0, abs=0.03)
    assert tuple(game.car.hull.position) == pytest.approx(tuple(other.car.hull.position), abs=0.05)
    assert (game.frames, game.t) == (0, other.t)
    assert game.track == other.track
    assert np.abs(picture.astype(float) - game.stock_picture()).mean() < 0.5
    ours.reset(seed=5)  # and back
    assert tuple(game.car.hull.position) == tuple(other.car.hull.position)


def test_find_wrapper_names_what_is_missing() -> None:
    env = gym.make("LazyCarRacing-v3", disable_env_checker=True)
    with pytest.raises(LookupError, match="no Shaping in"):
        find_wrapper(env, Shaping)
