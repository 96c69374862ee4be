"""The renderer's claim: its frames are near those of gym.make("CarRacing-v3") in the same states."""

from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

import pipeline.sim.car_racing  # noqa: F401  (registers FastCarRacing-v3)
from tests.sim.driving import Driver, donut, follow_road, leave, play, varied

Frames = NDArray[np.int16]


def frames_of(env_id: str, seed: int, driver: Driver, frames: int, **kwargs: Any) -> Frames:
    env = gym.make(env_id, disable_env_checker=True, **kwargs)
    pictures = [env.reset(seed=seed)[0]] + [step[0] for step in play(env, seed, driver, frames)]
    env.close()
    return np.array(pictures, np.int16)


def differences(seed: int, driver: Driver, frames: int, **kwargs: Any) -> Frames:
    """Absolute differences of our frames and stock ones, (frames, 96, 96, 3)."""
    ours = frames_of("FastCarRacing-v3", seed, driver, frames, **kwargs)
    stock = frames_of("CarRacing-v3", seed, driver, frames, **kwargs)
    assert ours.shape == stock.shape
    return np.abs(ours - stock)


def share_far_off(difference: Frames) -> float:
    """Share of pixels that are off by more than 32 levels in any channel."""
    return float((difference.max(axis=-1) > 32).mean())


@pytest.mark.parametrize(("seed", "driver"), [(0, follow_road), (1, varied(3)), (2, varied(1))])
def test_frames_are_near_stock_frames(seed: int, driver: Driver) -> None:
    difference = differences(seed, driver, 150)
    assert difference.mean() <= 0.25
    assert share_far_off(difference) <= 0.001


@pytest.mark.slow
def test_frames_are_near_stock_frames_on_twenty_tracks() -> None:
    found = [differences(seed, varied(seed), 1000) for seed in range(20)]
    sizes = [len(difference) for difference in found]
    mean = np.average([difference.mean() for difference in found], weights=sizes)
    far_off = np.average([share_far_off(difference) for difference in found], weights=sizes)
    print(f"{sum(sizes)} frames: mean absolute difference {mean:.3f}, {far_off:.3%} of pixels off by more than 32")
    assert mean <= 0.2
    assert far_off <= 0.001


def test_every_frame_of_the_zoom_is_near() -> None:
    difference = differences(4, follow_road, 50)
    assert difference.mean(axis=(1, 2, 3)).max() <= 1.0


def test_beyond_the_field_is_black() -> None:
    """Over the edge: the last frame of the episode looks beyond the edge."""
    stock = frames_of("CarRacing-v3", 5, leave, 400)[-1]
    ours = frames_of("FastCarRacing-v3", 5, leave, 400)[-1]
    outside = (stock[:80] == 0).all(axis=-1)
    assert outside.mean() > 0.3
    assert (ours[:80] == 0).all(axis=-1)[outside].mean() > 0.99


def test_random_colors_are_stock_colors() -> None:
    assert differences(6, donut, 60, domain_randomize=True).mean() <= 0.5


def test_bar_of_indicators_is_exact() -> None:
    """Score, speed, four wheels, steering and gyroscope while spinning, to 2 levels (truncation)."""
    difference = differences(7, donut, 120)[:, 84:]
    assert difference.mean() <= 0.01
    assert (difference > 2).mean() <= 1e-3


def test_visited_road_is_repainted() -> None:
    """Unvisited tiles are striped (102, 104, 107), visited ones are not; stock frames darken by 2 levels."""
    env = gym.make("FastCarRacing-v3", disable_env_checker=True)
    pictures = [step[0] for step in play(env, 0, follow_road, 150)]
    below_car = pictures[-1][79:84, 46:50].reshape(-1, 3)
    assert (below_car == 100).all()
    env.close()


def test_gray_is_rgb_in_gray() -> None:
    rgb = frames_of("FastCarRacing-v3", 8, varied(2), 150)
    gray = frames_of("FastCarRacing-v3", 8, varied(2), 150, grayscale=True)
    expected = [cv2.cvtColor(frame.astype(np.uint8), cv2.COLOR_RGB2GRAY) for frame in rgb]
    np.testing.assert_array_equal(gray, expected)
