"""The training reward against the stock game's and the penalties by hand; the ends of an episode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.sim.env import find_wrapper, to_pedals
from pipeline.sim.training_env import make_training_env
from tests.sim.driving import drive_to
from tests.sim.games import Stock, held, steering, stock, train_params

NO_SHAPING = {
    "grass_penalty": 0.0, "grass_limit": 0, "stall_limit": 0, "early_end_penalty": 0.0, "time_penalty": 0.0,
    "steer_penalty": 0.0, "missed_tile_penalty": 0.0, "reverse_laps": 0.0,
    "bootstrap_lap": False,
}  # fmt: skip


def shaped_episode(env: Any, actions: Sequence[Any], seed: int = 7) -> list[Stock]:
    env.reset(seed=seed)
    steps = []
    for action in actions:
        steps.append(env.step(action))
        if steps[-1][2] or steps[-1][3]:
            break
    return steps


def test_without_penalties_the_reward_is_the_games(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_training_env(train_params(monkeypatch, **NO_SHAPING), 0)
    theirs = stock()
    theirs.reset(seed=7)
    actions = steering(10)
    expected = [held(theirs, to_pedals(action), 4)[1] for action in actions]
    assert [step[1] for step in shaped_episode(env, actions)] == pytest.approx(expected, abs=1e-9)


def test_time_and_steering_cost_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_training_env(train_params(monkeypatch, **NO_SHAPING), 0)
    shaped = make_training_env(
        train_params(monkeypatch, **{**NO_SHAPING, "time_penalty": 0.25, "steer_penalty": 2.0}), 0
    )
    actions = [np.array([steer, 0.2], np.float32) for steer in (0.5, 0.5, -0.25)]
    rewards = [step[1] for step in shaped_episode(plain, actions)]
    # 4 frames at 0.25, and 2 x the squared change of steering: from 0 to 0.5, none, by 0.75
    costs = [1.0 + 2 * 0.25, 1.0, 1.0 + 2 * 0.5625]
    expected = [r - c for r, c in zip(rewards, costs, strict=True)]
    assert [step[1] for step in shaped_episode(shaped, actions)] == pytest.approx(expected, abs=1e-6)


def test_grass_costs_by_share_of_wheels_and_way_and_ends_the_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {**NO_SHAPING, "grass_penalty": 0.5, "grass_limit": 20, "early_end_penalty": 30.0}
    env = make_training_env(train_params(monkeypatch, **params), 0)
    theirs = stock()
    theirs.reset(seed=7)
    game: Any = theirs.unwrapped
    action = np.array([1, 0.6], np.float32)  # a hard turn, off the road
    steps = shaped_episode(env, [action] * 100)
    on_grass, expected = 0, []
    for _ in steps:
        reward = held(theirs, to_pedals(action), 4)[1]
        share = sum(len(wheel.tiles) == 0 for wheel in game.car.wheels) / 4
        on_grass = on_grass + 4 if share >= 0.75 else 0
        speed = float(np.linalg.norm(game.car.hull.linearVelocity))
        expected.append(reward - 0.5 * share * speed / 50 * 4 - (30 if on_grass >= 20 else 0))
    assert on_grass == 20  # the episode ended with the decision that reached the limit
    assert [step[1] for step in steps] == pytest.approx(expected, abs=1e-6)
    assert [step[2] for step in steps] == [False] * (len(steps) - 1) + [True]
    assert not steps[-1][3]  # hopeless is an end of its own, not a time limit: nothing is bootstrapped


def test_standing_still_ends_the_episode_and_costs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_training_env(train_params(monkeypatch, **{**NO_SHAPING, "stall_limit": 40, "early_end_penalty": 5.0}), 0)
    steps = shaped_episode(env, [np.zeros(2, np.float32)] * 100)
    raw = [
        step[1]
        for step in shaped_episode(
            make_training_env(train_params(monkeypatch, **NO_SHAPING), 0), [np.zeros(2, np.float32)] * len(steps)
        )
    ]
    # the first decision finds the two tiles below the car; 10 decisions of 4 frames later it is hopeless
    assert len(steps) == 11
    assert [s[1] - r for s, r in zip(steps, raw, strict=True)] == pytest.approx([0.0] * 10 + [-5.0])
    # a new episode begins with clean counters
    assert len(shaped_episode(env, [np.zeros(2, np.float32)] * 100)) == 11


def test_info_tells_the_stock_games_return(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {**NO_SHAPING, "grass_penalty": 1.0, "time_penalty": 0.1, "stall_limit": 40, "early_end_penalty": 25.0}
    env = make_training_env(train_params(monkeypatch, **params), 0)
    theirs = stock()
    theirs.reset(seed=7)
    actions = steering(200, seed=4) * np.array([2.0, 0.5], np.float32)
    steps = shaped_episode(env, actions.clip(-1, 1))
    driven = [held(theirs, to_pedals(action), 4) for action in actions.clip(-1, 1)[: len(steps)]]
    episode = steps[-1][4]["episode"]
    assert all("episode" not in step[4] for step in steps[:-1])
    assert episode["r"] == pytest.approx(sum(step[1] for step in driven), abs=1e-6)
    assert episode["l"] == len(steps)
    assert episode["shaped_return"] == pytest.approx(sum(step[1] for step in steps))
    assert episode["lap_time"] == pytest.approx(len(steps) * 4 / 50)
    game: Any = theirs.unwrapped
    assert episode["tiles"] == game.tile_visited_count / len(game.track)
    assert episode["lap_finished"] == 0.0


def lap(
    env: Any, off_line: Callable[[int], float] = lambda frame: 0.0, frames: int = 1000, ahead: int = 5
) -> tuple[list[Stock], set[int]]:
    """Follow the road, ``off_line(frame)`` world units to the right of its middle, till the episode ends.

    Returns the steps, and the tiles that were ever unvisited five tiles behind the foremost visited one.
    """
    game: Any = env.unwrapped
    find_wrapper(env, gym.wrappers.TimeLimit)._max_episode_steps = frames + 1  # this driver is slow
    steps: list[Stock] = []
    missed: set[int] = set()
    while game.frames < frames:
        centres = np.array([(x, y, beta) for _, beta, x, y in game.track])
        nearest = int(np.argmin(np.linalg.norm(centres[:, :2] - game.car.hull.position, axis=1)))
        x, y, beta = centres[(nearest + ahead) % len(centres)]
        away = off_line(game.frames)
        steps.append(env.step(to_axes(drive_to(game, x + away * math.cos(beta), y + away * math.sin(beta)))))
        front = max(tile.idx for tile in game.road if tile.road_visited)
        missed |= {tile.idx for tile in game.road[: max(front - 5, 0)] if not tile.road_visited}
        if steps[-1][2] or steps[-1][3]:
            break
    return steps, missed


def to_axes(pedals: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.array([pedals[0], pedals[1] - pedals[2]], np.float32)


def test_each_tile_left_behind_costs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drive round the outside of some tiles, against the game's own count of the tiles it visited."""
    plain = make_training_env(train_params(monkeypatch, env_id="FastCarRacing-v3", **NO_SHAPING), 0)
    costly = {**NO_SHAPING, "missed_tile_penalty": 7.0}
    shaped = make_training_env(train_params(monkeypatch, env_id="FastCarRacing-v3", **costly), 0)
    detour: Callable[[int], float] = lambda frame: 16.0 if 200 < frame < 330 else 0.0  # noqa: E731
    drives = []
    for env in (plain, shaped):
        env.reset(seed=7)
        steps, missed = lap(env, detour, 600)
        drives.append(steps)
    assert len(missed) > 3
    assert sum(a[1] - b[1] for a, b in zip(*drives, strict=True)) == pytest.approx(7.0 * len(missed))


@pytest.mark.parametrize(("bootstrap", "reverse"), [(True, False), (False, False), (True, True)])
def test_a_lap_is_an_end_or_a_cut(bootstrap: bool, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    params = train_params(
        monkeypatch, env_id="FastCarRacing-v3", **{**NO_SHAPING, "frame_skip": 1, "bootstrap_lap": bootstrap}
    )
    env = make_training_env(params, 0)
    env.reset(seed=7, options={"reverse": reverse})
    (*_, last), _ = lap(env, frames=2000, ahead=-5 if reverse else 5)
    assert last[4]["lap_finished"]
    assert (last[2], last[3]) == (not bootstrap, bootstrap)
    assert last[4]["episode"]["missed_tiles"] == 0


def test_a_lap_with_a_missed_tile_ends_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_training_env(
        train_params(monkeypatch, env_id="FastCarRacing-v3", **{**NO_SHAPING, "frame_skip": 1, "bootstrap_lap": True}),
        0,
    )
    env.reset(seed=7)
    (*_, last), missed = lap(env, lambda frame: 16.0 if 200 < frame < 330 else 0.0, 4000)
    game: Any = env.unwrapped
    assert (last[2], last[3], last[4]["lap_finished"]) == (False, True, False)
    assert last[4]["episode"]["missed_tiles"] == len(missed) > 3
    assert any(tile.idx < 3 for wheel in game.car.wheels for tile in wheel.tiles)
