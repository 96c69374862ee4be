"""After ``dvc repro``: the policy drives, the figures are there, the film plays, and MLflow has all of it.

Each is read with something other than what wrote it: the film with OpenCV's decoder, MLflow's run with its own client.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mlflow import MlflowClient

sys.path.insert(0, str(Path.cwd()))  # a script's own folder is on the path, the project's is not

from pipeline.agent.policy import load
from pipeline.sim.env import make_env


def read(path: str) -> Any:
    """A JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def check_policy() -> None:
    """The policy file loads and answers a real picture."""
    policy = load(Path("models/best_model.safetensors"))
    observation, _ = make_env(policy.observation).reset(seed=1)
    action = policy.predict(observation[None])
    assert action.shape[0] == 1, action.shape
    assert np.isfinite(action).all(), action
    assert (np.abs(action) <= 1).all(), action
    print(f"policy: sees {observation.shape}, answers {action[0].round(3).tolist()}")


def check_figures() -> dict[str, float]:
    """The evaluation has figures."""
    figures: dict[str, float] = read("metrics/evaluate.json")
    assert np.isfinite(figures["mean"]), figures
    assert figures["n_tracks"] >= 1, figures
    print(f"figures: mean {figures['mean']} on {figures['n_tracks']} tracks")
    return figures


def check_film() -> None:
    """Every film decodes to as many frames as were driven."""
    for rank, expected in read("metrics/record_videos.json").items():
        film, frames, loudest = cv2.VideoCapture(f"videos/{rank}.mp4"), 0, 0.0
        while (answer := film.read())[0]:
            frames, loudest = frames + 1, max(loudest, float(answer[1].std()))
        assert frames == expected["frames"], (frames, expected)
        assert loudest > 10, "the film is all of one colour"
        print(f"film: videos/{rank}.mp4 decodes, {frames} frames")


def check_mlflow(figures: dict[str, float]) -> None:
    """The run is finished, with the same mean and the films."""
    client = MlflowClient(f"sqlite:///{Path('mlflow.db').resolve().as_posix()}")
    run = client.get_run(read("metrics/mlflow.json")["run_id"])
    assert run.info.status == "FINISHED", run.info.status
    assert run.data.metrics["evaluate/mean"] == figures["mean"], run.data.metrics
    films = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "videos")]
    assert [f for f in films if f.endswith(".mp4")], films
    print(f"MLflow: run {run.info.run_id} {run.info.status}, evaluate/mean {figures['mean']}, {', '.join(films)}")


check_policy()
check_film()
check_mlflow(check_figures())
