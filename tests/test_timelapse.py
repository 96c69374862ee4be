"""The time-lapse holds every checkpoint's drive, at its speed, and lies in the training's MLflow run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from pipeline.agent.policy import load
from pipeline.evaluation import drive
from pipeline.timelapse import RunFolderMistake, checkpoints, newest_run, timelapse
from pipeline.tracking.run import Run
from pipeline.tracking.store import connect
from tests.conftest import ROOT
from tests.policies import write_policy


def run_folder(folder: Path, steps: list[int]) -> Path:
    for place, step in enumerate(steps):
        write_policy(folder / "checkpoints" / f"policy_{step:012}.safetensors", seed=3 + place)
    return folder


def test_evenly_spread_checkpoints_with_the_first_and_the_last(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [100 * n for n in range(1, 8)])
    assert list(checkpoints(folder, 3)) == [100, 400, 700]
    assert list(checkpoints(folder, 20)) == [100, 200, 300, 400, 500, 600, 700]
    assert newest_run(tmp_path) == folder
    with pytest.raises(RunFolderMistake, match="expected checkpoints/policy_"):
        checkpoints(tmp_path, 3)
    with pytest.raises(RunFolderMistake, match="train first"):
        newest_run(tmp_path / "run")


@pytest.mark.slow
def test_the_film_and_its_run(project: Path) -> None:
    (project / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    folder = run_folder(project / "runs/one", [100, 200])
    run = Run.begin("one", {}, {}, folder)
    run.flush()
    command = [sys.executable, "-m", "pipeline.timelapse", "--speed", "10", "--track", "10000"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    episodes = [drive(load(path), 10_000) for path in checkpoints(folder, 8).values()]
    frames = sum(-(-episode.frames // 10) + 40 for episode in episodes)
    assert int(cv2.VideoCapture("videos/timelapse.mp4").get(cv2.CAP_PROP_FRAME_COUNT)) == frames
    assert f"after       100 steps: {episodes[0].episode_return:7.1f}" in said
    assert [artifact.path for artifact in connect().list_artifacts(run.id, "videos")] == ["videos/timelapse.mp4"]


def test_mistakes_are_told(project: Path) -> None:
    (project / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    command = [sys.executable, "-m", "pipeline.timelapse", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nowhere: expected checkpoints/policy_" in done.stderr


def test_every_speedth_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_policy(tmp_path / "one.safetensors", seed=3)
    (episode,) = timelapse({100: path}, 10_000, 100, tmp_path / "film.mp4").values()
    assert episode == drive(load(path), 10_000)
    assert int(cv2.VideoCapture("film.mp4").get(cv2.CAP_PROP_FRAME_COUNT)) == -(-episode.frames // 100) + 40
