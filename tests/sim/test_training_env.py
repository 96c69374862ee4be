"""What a training drives: its own tracks, other tries at its mistakes, and the way back to any state of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.config import FIRST_TRAINING_TRACK, track_list
from pipeline.sim.env import find_wrapper
from pipeline.sim.shaping import Shaping
from pipeline.sim.training_env import AFTER, BEFORE, TrackSequence, is_reversed, make_training_env, training_track
from tests.conftest import ROOT
from tests.sim.driving import drive_to
from tests.sim.games import steering, train_params


def test_reversed_laps_are_a_share_of_the_tracks() -> None:
    assert np.mean([is_reversed(track, 0.25) for track in range(4000)]) == pytest.approx(0.25, abs=0.03)
    assert not any(is_reversed(track, 0.0) for track in range(100))


def test_training_tracks_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    params = train_params(monkeypatch)
    tracks = [training_track(seed, index, k) for seed in range(3) for index in range(16) for k in range(50)]
    assert len(set(tracks)) > 0.999 * len(tracks)
    assert FIRST_TRAINING_TRACK <= min(tracks) <= max(tracks) < 2**31
    validation = range(params.validation_seed, params.validation_seed + params.n_eval_episodes)
    files = [ROOT / "params.yaml", *(ROOT / "configs").glob("*.yaml")]
    test = {t for path in files for t in tracks_in(path)}
    assert not (set(validation) | test) & set(tracks)
    assert max(validation, default=0) < FIRST_TRAINING_TRACK
    assert max(test) < FIRST_TRAINING_TRACK


def tracks_in(path: Path) -> list[int]:
    lines = [line.split('"')[1] for line in path.read_text().splitlines() if line.startswith("tracks:")]
    return [track for line in lines for track in track_list(line)]


def test_an_environments_tracks_follow_from_seed_index_and_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    params = train_params(monkeypatch)
    env = make_training_env(params, 3)
    infos = [env.reset()[1], env.reset()[1], env.reset(seed=12)[1], env.reset()[1]]
    assert [info["episode_index"] for info in infos] == [0, 1, 1, 2]
    expected = [training_track(params.seed, 3, k) for k in (0, 1)]
    assert [info["track"] for info in infos] == [*expected, 12, training_track(params.seed, 3, 2)]


@pytest.mark.parametrize("game", ["CarRacing-v3", "FastCarRacing-v3"])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 30])
def test_replay_equals_driving_there(game: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    params = train_params(monkeypatch, env_id=game, reverse_laps=float(length % 2))
    driven, replayed = make_training_env(params, 1), make_training_env(params, 1)
    actions = steering(length + 4)
    driven.reset()
    observation, _ = driven.reset()  # episode 1
    for action in actions[:length]:
        observation = driven.step(action)[0]
    np.testing.assert_array_equal(replayed.replay(1, actions[:length]), observation)
    for action in actions[length:]:
        expected, got = driven.step(action), replayed.step(action)
        np.testing.assert_array_equal(got[0], expected[0])
        assert got[1:4] == expected[1:4]
        np.testing.assert_equal(got[4], expected[4])
    np.testing.assert_array_equal(replayed.reset()[0], driven.reset()[0])  # and the next episode


def test_a_replay_draws_no_more_than_the_stack_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_training_env(train_params(monkeypatch), 0)
    game: Any = env.unwrapped
    drawn: list[int] = []
    picture = game.picture
    monkeypatch.setattr(game, "picture", lambda: (drawn.append(game.frames), picture())[1])
    env.replay(0, steering(10))
    assert drawn == [7 * 4 + 3, 8 * 4 + 3, 9 * 4 + 3]


# Other tries


def on_road(env: TrackSequence, swerve: range = range(0)) -> NDArray[np.float32]:
    """Towards the road five tiles ahead; while the foremost tile is in ``swerve``, 16 units beside it."""
    game: Any = env.unwrapped
    front = find_wrapper(env, Shaping).front
    _, beta, x, y = game.track[(front + 5) % len(game.track)]
    aside = 16.0 if front in swerve else 0.0
    steer, gas, brake = drive_to(game, x + aside * np.cos(beta), y + aside * np.sin(beta))
    return np.array([steer, gas - brake], np.float32)


def drive(env: TrackSequence, swerve: range = range(0)) -> tuple[list[NDArray[np.float32]], list[Any]]:
    """Actions and steps until the end of the episode, or of this try."""
    actions, steps = [], []
    while not steps or not (steps[-1][2] or steps[-1][3]):
        actions.append(on_road(env, swerve))
        steps.append(env.step(actions[-1]))
    return actions, steps


SWERVE = range(40, 50)


@pytest.fixture
def swerved(monkeypatch: pytest.MonkeyPatch) -> tuple[TrackSequence, list[NDArray[np.float32]], list[Any]]:
    """An environment at the end of an episode in which tiles were missed."""
    env = make_training_env(train_params(monkeypatch, env_id="FastCarRacing-v3", retries=2, stall_limit=60), 0)
    env.reset()
    return env, *drive(env, SWERVE)


def test_the_mistake_is_where_the_first_missed_tile_was_reached(swerved: Any) -> None:
    env, actions, steps = swerved
    game: Any = env.unwrapped
    first = min(tile.idx for tile in game.road if not tile.road_visited and tile.idx > 2)
    assert first in range(40, 60)
    again = make_training_env(env.get_wrapper_attr("params"), 0)
    again.reset()
    fronts = []  # on the same way again
    for action in actions:
        again.step(action)
        fronts.append(find_wrapper(again, Shaping).front)
    assert find_wrapper(env, Shaping).mistake == next(t for t, front in enumerate(fronts) if front >= first)
    assert "retry" not in steps[-1][4]
    assert steps[-1][4]["episode"]["missed_tiles"] > 0


def test_a_try_goes_back_to_the_road_before_the_mistake(swerved: Any) -> None:
    env, actions, _ = swerved
    mistake = find_wrapper(env, Shaping).mistake
    observation, info = env.reset()
    assert (info["episode_index"], info["track"]) == (0, training_track(env.seed, 0, 0))
    before = mistake - (find_wrapper(env, Shaping)._decisions)
    assert BEFORE[0] <= before <= BEFORE[1]
    other = make_training_env(env.get_wrapper_attr("params"), 0)
    expected = other.replay(0, np.array(actions[: mistake - before]))  # the way there, from the start
    np.testing.assert_array_equal(observation, expected)
    _, steps = drive(env)
    last = steps[-1]
    assert (last[2], last[3], last[4]["retry"]) == (False, True, 1.0)
    assert len(steps) == before + AFTER
    assert "episode" not in last[4]
    assert env.reset()[1]["episode_index"] == 1


def test_tries_are_counted(swerved: Any) -> None:
    env, _, _ = swerved
    for _ in range(2):
        assert env.reset()[1]["episode_index"] == 0
        last = drive(env, SWERVE)[1][-1]
        assert last[4]["retry"] == 0.0
        assert "episode" not in last[4]
    assert env.reset()[1]["episode_index"] == 1


def test_without_retries_the_next_track_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_training_env(train_params(monkeypatch, env_id="FastCarRacing-v3", retries=0, stall_limit=60), 0)
    env.reset()
    drive(env, SWERVE)
    assert env.reset()[1]["episode_index"] == 1


def test_a_track_of_ones_own_is_not_tried_again(swerved: Any) -> None:
    env, _, _ = swerved
    env.reset(seed=5)
    drive(env, SWERVE)
    assert find_wrapper(env, Shaping).mistake is not None
    assert env.reset()[1]["episode_index"] == 1


@pytest.mark.parametrize("into", [-3, -1, 0, 1, 2, 30])
def test_replay_goes_through_the_tries(swerved: Any, into: int) -> None:
    env, actions, _ = swerved
    env.reset()
    actions = [*actions, *drive(env, SWERVE)[0]]
    n = len(actions) + into
    observation, _ = env.reset()  # the second try
    driven = [on_road(env)]
    for _ in range(into):
        observation, *_ = env.step(driven[-1])
        driven.append(on_road(env))
    other = make_training_env(env.get_wrapper_attr("params"), 0)
    got = other.replay(0, np.array([*actions, *driven])[:n])
    if into < 0:
        for action in actions[n:]:
            got, *_ = other.step(action)
        got, _ = other.reset()
    np.testing.assert_array_equal(got, observation)
    expected, replayed = drive(env)[1][-1], drive(other)[1][-1]
    np.testing.assert_array_equal(replayed[0], expected[0])
    np.testing.assert_equal(replayed[1:], expected[1:])
    np.testing.assert_array_equal(other.reset()[0], env.reset()[0])
