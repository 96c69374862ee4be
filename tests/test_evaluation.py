"""Figures against values computed by hand, and an episode against one driven on the stock game without our wrappers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from numpy.typing import NDArray

from pipeline import evaluate
from pipeline.agent.policy import build_network, load, save
from pipeline.config import NetworkParams, ObservationParams
from pipeline.evaluation import Episode, Evaluator, drive, interval, iqm, read_table, summarize, write_table
from tests.conftest import ROOT

OBSERVATION = ObservationParams(frame_skip=5, frames_stack=3, grayscale=True, resize=48, action_axes="steer_throttle")
NETWORK = NetworkParams(
    cnn_channels=[4, 4, 4], features_dim=16, net_arch=[], activation="relu", ortho_init=True, action_head="beta",
    log_std_init=0.0,
)  # fmt: skip


def episode(track: int, episode_return: float, frames: int = 1000, lap: bool = False, tiles: int = 100) -> Episode:
    return Episode(track, episode_return, frames, lap, tiles, n_tiles=200)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that steers and drives by what it sees."""
    th.manual_seed(0)
    module = build_network(OBSERVATION, NETWORK)
    with th.no_grad():
        for weights in module.parameters():
            weights.add_(th.randn_like(weights) * 0.05)
        module.action_net.bias.copy_(th.tensor([0.0, 1.0, 0.0, -1.0]))  # more gas than brake
    path = tmp_path_factory.mktemp("policy") / "a.safetensors"
    save(path, module, OBSERVATION, NETWORK, 0)
    return path


# Figures


def test_figures_are_those_computed_by_hand() -> None:
    returns = [100.0, 200.0, 300.0, 400.0, 500.0, 600.0, 700.0, 800.0]
    laps = [False] * 6 + [True] * 2
    episodes = [
        episode(i, r, frames=1000 - 100 * lap, lap=lap, tiles=25 * (i + 1))
        for i, (r, lap) in enumerate(zip(returns, laps, strict=True))
    ]
    figures = summarize(episodes)
    intervals = {name: (figures.pop(f"{name}_ci_low"), figures.pop(f"{name}_ci_high")) for name in ("mean", "iqm")}
    assert figures == {
        "n_tracks": 8,
        "mean": 450.0,
        "std": 229.1288,  # sqrt((350^2 + 250^2 + 150^2 + 50^2) x 2 / 8) = sqrt(52500)
        "min": 100.0,
        "p10": 170.0,  # 0.7 of the way from the first to the second of eight
        "median": 450.0,
        "max": 800.0,
        "iqm": 450.0,  # (300 + 400 + 500 + 600) / 4
        "laps_finished": 0.25,
        "mean_frames": 975.0,
        "mean_tiles": 0.5625,  # mean of 1/8 ... 8/8
    }
    assert all(low < 450 < high for low, high in intervals.values())


def test_iqm_drops_a_quarter_on_either_side() -> None:
    assert iqm(np.array([-1e9, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1e9])) == pytest.approx((2 + 3 + 4 + 5) / 4)
    np.testing.assert_allclose(iqm(np.array([[0, 1, 2, 9], [4, 4, 6, 100]], float), axis=1), [1.5, 5.0])


def test_the_interval_is_a_percentile_bootstrap_and_repeatable() -> None:
    returns = np.random.default_rng(1).normal(900, 20, 40)
    found = interval(returns, 4000, iqm)
    assert found == interval(returns, 4000, iqm)
    rng = np.random.default_rng(99)  # other random numbers, written out
    resampled = [np.sort(rng.choice(returns, 40))[10:30].mean() for _ in range(4000)]
    np.testing.assert_allclose(found, np.percentile(resampled, [2.5, 97.5]), atol=1.0)
    assert interval(np.array([5.0]), 100, iqm) == (5.0, 5.0)
    low, high = interval(returns, 4000, np.mean)  # near the normal one, 1.96 standard errors to either side
    error = 1.96 * returns.std() / 40**0.5
    np.testing.assert_allclose([low, high], [returns.mean() - error, returns.mean() + error], atol=1.0)


def test_the_table_comes_back_as_it_was(tmp_path: Path) -> None:
    episodes = [episode(10000, -12.345678, 1000), Episode(10001, 921.4, 786, True, 291, 291)]
    write_table(tmp_path / "new/tracks.csv", episodes)
    assert read_table(tmp_path / "new/tracks.csv") == episodes
    assert (tmp_path / "new/tracks.csv").read_bytes().splitlines()[:2] == [
        b"track,episode_return,frames,lap_finished,tiles,n_tiles,rank",
        b"10000,-12.345678,1000,False,100,200,1",
    ]


# Episodes


def drive_by_hand(policy: Path, track: int) -> tuple[Episode, int]:
    """One episode on the stock game with OpenCV, numpy and the policy's ``predict``; and its number of decisions."""
    driver, env = load(policy), gym.make("CarRacing-v3", disable_env_checker=True)
    picture, info = env.reset(seed=track)
    seen = [small_gray(picture)] * 3
    total, frames, decisions, over = 0.0, 0, 0, False
    while not over:
        action = driver.predict(np.stack(seen[-3:])[None])[0]
        decisions += 1
        for _ in range(5):
            picture, reward, terminated, truncated, info = env.step(action)
            total, frames, over = total + float(reward), frames + 1, terminated or truncated
            if over:
                break
        seen.append(small_gray(picture))
    game: Any = env.unwrapped
    finished = bool(info.get("lap_finished", False))
    return Episode(track, round(total, 6), frames, finished, game.tile_visited_count, len(game.track)), decisions


def small_gray(picture: NDArray[np.uint8]) -> Any:
    return cv2.resize(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), (48, 48), interpolation=cv2.INTER_AREA)


def test_an_episode_is_the_one_driven_by_hand_on_the_stock_game(policy: Path) -> None:
    expected, decisions = drive_by_hand(policy, 10007)
    seen: list[Any] = []
    assert drive(load(policy), 10007, on_decision=seen.append) == expected
    assert len(seen) == decisions
    assert all((picture.shape, picture.dtype) == ((3, 48, 48), np.uint8) for picture in seen)
    assert expected.tiles > 3  # it drove somewhere


@pytest.mark.slow
def test_episodes_do_not_depend_on_the_number_of_workers(policy: Path) -> None:
    tracks = [10003, 10001, 10002]
    told: list[Episode] = []
    with Evaluator(1) as one, Evaluator(3) as three:
        alone = one.play(policy, tracks, on_episode=told.append)
        assert three.play(policy, tracks) == alone
    assert [e.track for e in alone] == tracks
    assert sorted(told, key=lambda e: e.track) == sorted(alone, key=lambda e: e.track)
    assert drive(load(policy), 10002) == alone[2]


def test_the_folder_of_the_figures_is_there_before_the_driving(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "new/figures.json"

    def driven(*_: Any) -> list[Episode]:
        assert place.parent.is_dir()
        return [episode(1, 500.0), episode(2, 700.0)]

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluate, "drive_tracks", driven)
    evaluate.main(["--policy", str(policy), "--json", str(place)])
    assert json.loads(place.read_text())["mean"] == 600.0
