"""Races: the drives are the evaluated ones, gaps are counted by hand, ghosts stand where the game draws things."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import pytest

from pipeline.agent.policy import load
from pipeline.evaluation import drive
from pipeline.media.canvas import BACKGROUND
from pipeline.media.ghost import draw_ghost, to_picture
from pipeline.media.race import COLORS, MAX_RACERS, gap_words, race_size
from pipeline.policy_source import labels, load_policies
from pipeline.racing import Gap, Moment, Racer, _standing, draw_race, gap, leader, policy_moments, race
from pipeline.tracking.registry import Registry
from tests.conftest import ROOT
from tests.policies import OBSERVATION, write_policy

TRACK = 10_000
AT_REST = Moment(0, 0, 0, 0, 0, 0, 100, 0, lap_finished=False)


def racer(name: str, progress: list[int], **last: object) -> Racer:
    found = Racer(name)
    for tiles in progress:
        found.add(dataclasses.replace(AT_REST, progress=tiles))
    found.moments[-1] = dataclasses.replace(found.now, **last)
    return found


def test_a_race_is_the_evaluated_drive(tmp_path: Path) -> None:
    policy = load(write_policy(tmp_path / "one.safetensors", seed=3))
    episode = drive(policy, TRACK)
    moments = list(policy_moments(policy, TRACK, draw=False))
    assert len(moments) == episode.frames
    last = moments[-1]
    assert (round(last.episode_return, 6), last.tiles, last.n_tiles) == (
        episode.episode_return, episode.tiles, episode.n_tiles
    )  # fmt: skip
    assert all(before.progress <= after.progress for before, after in pairwise(moments))


def test_gaps_counted_by_hand() -> None:
    ahead = racer("ahead", [0, 2, 4, 6, 8, 10])  # at tile 4 after 3 frames
    behind = racer("behind", [0, 1, 2, 3, 4, 4])  # there after 5, and still there after 6
    assert leader([behind, ahead]) is ahead
    assert gap(behind, ahead) == Gap(tiles=6, seconds=pytest.approx((6 - 3) / 50))
    assert gap(ahead, ahead) == Gap(tiles=0, seconds=0.0)
    behind.out = True  # it reached tile 4 two frames after the other, and that is that
    assert gap(behind, ahead) == Gap(tiles=6, seconds=pytest.approx((5 - 3) / 50))


def test_of_those_equally_far_the_first_there_leads() -> None:
    slow, fast = racer("slow", [0, 1, 2, 5]), racer("fast", [0, 3, 5, 5])
    assert leader([slow, fast]) is fast
    assert gap(slow, fast).seconds == pytest.approx(1 / 50)


def test_what_is_written_of_the_gap() -> None:
    ahead, behind = racer("ahead", [0, 3, 4]), racer("behind", [0, 2, 3])
    said = [gap_words(_standing(each, ahead, None))[0] for each in (ahead, behind)]
    assert said == ["leads", "+0.02 s   1 tile behind"]
    ahead.out, behind.out = True, True
    ahead.moments[-1] = dataclasses.replace(ahead.now, lap_finished=True)
    assert gap_words(_standing(ahead, ahead, None))[0] == "first"
    assert gap_words(_standing(behind, ahead, None))[0] == "out, 1 tile behind"


def test_a_point_of_the_world_is_where_the_game_draws_it() -> None:
    env = gym.make("LazyCarRacing-v3", render_mode="rgb_array")
    env.reset(seed=TRACK)
    for _ in range(70):
        env.step(np.array([0.3, 0.5, 0.0], np.float32))
    game = env.unwrapped
    picture, hull = env.render(), game.car.hull
    camera = (*hull.position, hull.angle)
    centers = np.array([np.mean(corners, axis=0) for corners, _ in game.road_poly[: len(game.track)]])
    pixels = to_picture(centers, camera, game.t) * [0.6, 0.5]
    seen = pixels[(pixels > 2).all(axis=1) & (pixels < [598, 340]).all(axis=1)].astype(int)
    seen = [(x, y) for x, y in seen if np.hypot(x - 300, y - 300) > 40]  # not under the car
    assert len(seen) > 4
    for x, y in seen:
        red, green, blue = picture[y, x].astype(int)
        assert max(red, green, blue) - min(red, green, blue) < 12, "road is gray"
    ghost = picture.copy()
    draw_ghost(ghost, camera, camera, game.t, (255, 255, 0))
    reds = (picture[:, :, 0] > 150) & (picture[:, :, 1] < 30)
    reds[350:] = False  # the indicators
    changed = (ghost != picture).any(axis=2)
    assert (changed & reds).sum() > 0.9 * reds.sum(), "a ghost at the car's place covers the car"


def test_the_picture_of_a_race(tmp_path: Path) -> None:
    policies = [load(write_policy(tmp_path / f"{seed}.safetensors", seed=seed)) for seed in (3, 4)]
    racers = [Racer("three"), Racer("four")]
    frames = list(islice(race(racers, [policy_moments(p, TRACK) for p in policies]), 24))
    assert frames == list(range(1, 25))
    picture = draw_race(racers, "Track 10000")
    assert picture.shape == (*reversed(race_size(2, 2)), 3)
    for color in COLORS[:2]:
        assert (picture == color).all(axis=2).sum() > 464, "a line under the picture, and a lane"
    assert (picture[:, :8] == BACKGROUND).all()
    assert racers[0].moments[0].picture is None, "pictures are let go"


@pytest.mark.parametrize("n", range(1, MAX_RACERS + 1))
def test_any_number_of_racers_fits(n: int) -> None:
    racers = [racer(str(i), [0, i + 1], picture=np.zeros((400, 600, 3), np.uint8)) for i in range(n)]
    assert draw_race(racers, "all").shape == (*reversed(race_size(n, n)), 3)


# Where policies come from


def test_labels_are_as_short_as_they_can_be() -> None:
    sources = ["a/best.safetensors", "b/best.safetensors", "other.zip", "models:/car@champion"]
    assert list(labels(sources).values()) == ["a/best", "b/best", "other", "car@champion"]


def test_policies_of_files_and_of_the_registry(project: Path) -> None:
    policy, other = (write_policy(Path(f"models/{seed}.safetensors"), seed=seed) for seed in (3, 4))
    registry = Registry("car")
    registry.point("champion", registry.register(policy, (2, 36, 36), None, {}))
    found = load_policies([str(other), "models:/car@champion", "models:/car/1"])
    assert list(found) == ["4", "car@champion", "car/1"]
    assert found["car@champion"].observation == OBSERVATION
    picture = np.random.default_rng(0).integers(0, 256, (1, 2, 36, 36), np.uint8)
    actions = [each.predict(picture).tolist() for each in found.values()]
    assert actions[1] == actions[2] == load(policy).predict(picture).tolist() != actions[0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a.safetensors", "b.safetensors", "--race", "--fresh"], "expected one of the two"),
        (["a.safetensors", "--race"], "expected 2 to 6 policies, got 1"),
        (["a.safetensors", "a.safetensors", "--race"], "one of them twice"),
        (["a.safetensors", "b.safetensors", "--race"], "a.safetensors: no such file"),
        (["a.safetensors", "b.safetensors", "--race", "--track", "-1"], "--track: expected 0 to"),
    ],
)
def test_mistakes_are_told(params_here: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "pipeline.compare", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert told in done.stderr


@pytest.mark.slow
def test_the_film_of_a_race(params_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    paths = [write_policy(Path(f"{seed}.safetensors"), seed=seed) for seed in (3, 4)]
    command = [sys.executable, "-m", "pipeline.compare", *map(str, paths), "--race", "--track", str(TRACK)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    episodes = [drive(load(path), TRACK) for path in paths]
    for episode in episodes:
        assert f"{episode.episode_return:8.1f}" in done.stdout
    film = cv2.VideoCapture(f"videos/race-{TRACK}.mp4")
    assert int(film.get(cv2.CAP_PROP_FRAME_COUNT)) == max(e.frames for e in episodes) + 100
