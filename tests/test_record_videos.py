"""The films show the drives that were evaluated, whole and in time; read back with other decoders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

from pipeline import record_videos
from pipeline.agent.policy import Policy, load
from pipeline.config import RecordParams, track_list
from pipeline.evaluation import Episode, drive, write_table
from pipeline.tracking.run import read_run_id
from pipeline.tracking.store import connect
from tests.policies import write_policy
from tests.tracking.runs import begun

TRACK = track_list("10000:10001")[0]
PARAMS = RecordParams(video_tracks=["best"], video_fps=50, gif_seconds=4)


@pytest.fixture
def evaluated(project: Path) -> tuple[Policy, Episode]:
    """A policy file and the table of its one evaluated track, in a project with an MLflow run."""
    policy = load(write_policy(record_videos.POLICY, seed=3))
    episode = drive(policy, TRACK)
    write_table(record_videos.TABLE, [episode])
    begun()
    return policy, episode


def frames_of(path: Path) -> int:
    film, count = cv2.VideoCapture(str(path)), 0
    while film.read()[0]:
        count += 1
    return count


def test_the_stage_leaves_films_stills_and_pictures_of_the_drive(evaluated: tuple[Policy, Episode]) -> None:
    _, episode = evaluated
    figures = record_videos.record(PARAMS)

    assert figures == {"best": {"track": TRACK, "episode_return": episode.episode_return, "frames": episode.frames}}
    assert frames_of(Path("videos/best.mp4")) == episode.frames
    with Image.open(record_videos.GIF) as gif:
        times = [gif.info["duration"] for frame in range(gif.n_frames) if gif.seek(frame) is None]
    assert sum(times) == pytest.approx(PARAMS.gif_seconds * 1000, abs=100)
    for picture in (record_videos.STRIP, record_videos.MAP, record_videos.ACTIONS):
        assert cv2.imread(str(picture)).std() > 10
    logged = [a.path for folder in ("videos", "plots") for a in connect().list_artifacts(read_run_id(), folder)]
    names = ("videos/best.mp4", "videos/drive.gif", "videos/filmstrip.png", "plots/actions.png", "plots/track_map.png")
    assert sorted(logged) == sorted(names)


def test_the_camera_sees_the_stock_drive(evaluated: tuple[Policy, Episode]) -> None:
    policy, episode = evaluated
    camera = record_videos.film_evaluated(policy, episode, Path("videos/one.mp4"), 50, "a film")
    drive_log = np.array(camera.drive)
    stock = gym.make("CarRacing-v3")
    stock.reset(seed=TRACK)
    for frame, action in enumerate(drive_log[:120, 3:6].astype(np.float32)):
        stock.step(action)
        assert tuple(stock.unwrapped.car.hull.position) == tuple(drive_log[frame, :2])
    assert len(drive_log) == episode.frames
    assert len(camera.stills) == -(-episode.frames // 4), "one still in four frames, with and without a progress bar"


def test_another_drive_than_the_evaluated_is_refused(evaluated: tuple[Policy, Episode]) -> None:
    policy, episode = evaluated
    other = dataclasses.replace(episode, episode_return=episode.episode_return + 1)
    with pytest.raises(record_videos.RecordError, match="Evaluate again"):
        record_videos.film_evaluated(policy, other, Path("videos/one.mp4"), 50, "a film")


def test_ranks() -> None:
    episodes = [Episode(track, score, 1, False, 1, 2) for track, score in enumerate([3.0, 9.0, 1.0, 7.0, 5.0])]
    picked = dict(record_videos.pick(episodes, ["best", "median", "worst"]))
    assert {rank: e.episode_return for rank, e in picked.items()} == {"best": 9.0, "median": 5.0, "worst": 1.0}
