"""The train stage for real: small trainings on CarRacing, read back from disk, from TensorBoard and from MLflow."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.config import TrainParams, load
from tests.chaos import evidence

ROOT = Path(__file__).parent.parent
SMALL = {
    "n_envs": 4,
    "n_steps": 64,
    "batch_size": 64,
    "n_epochs": 2,
    "total_timesteps": 1024,
    "eval_freq": 512,
    "n_eval_episodes": 2,
    "save_freq": 256,
    "num_threads": 1,
    "n_workers": 2,
}
BEST, FINAL = Path("models/best_model.safetensors"), Path("models/final_model.safetensors")


@pytest.fixture
def trainer(project: Path) -> Path:
    """A project folder with the parameters, where the stage can run."""
    shutil.copy(ROOT / "params.yaml", project)
    return project


def command(**changes: object) -> list[str]:
    flags = [word for key, value in {**SMALL, **changes}.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "pipeline.train", *flags]


def start(folder: Path, **changes: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "DVC_ROOT": str(folder)}
    return subprocess.Popen(
        command(**changes), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> Path:
    """The first file of that name pattern in the run folder."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if found := sorted(folder.glob(pattern)):
            return found[0]
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"no {pattern} within 300 s")


def client(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{(folder / 'mlflow.db').as_posix()}")


def run_id(folder: Path) -> str:
    return str(json.loads((folder / "metrics/mlflow.json").read_text())["run_id"])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_training_leaves_what_it_promises(trainer: Path) -> None:
    output = finish(start(trainer))
    figures = json.loads((trainer / "metrics/train.json").read_text())
    run = client(trainer).get_run(run_id(trainer))

    assert re.search(r"on cpu , \w+, 1 torch threads, 4 environments in 2 workers", output)
    assert run.info.status == "FINISHED"
    assert run.data.params["n_epochs"] == "2"
    assert run.data.params["cnn_channels"] == str(load(TrainParams).cnn_channels)
    assert figures["agent_steps"] == 1024
    assert figures["frames"] == 4096
    assert figures["final_mean_reward"] == run.data.metrics["eval/mean_reward"]
    assert figures["best_mean_reward"] == run.data.metrics["best/mean_reward"]
    steps = [m.step for m in client(trainer).get_metric_history(run_id(trainer), "eval/mean_reward")]
    assert steps == [512, 1024]
    told = Counter((key, step) for key, step, _ in evidence.metrics(trainer))
    assert set(told.values()) == {1}, f"told twice: {told.most_common(3)}"
    artifacts = [a.path for a in client(trainer).list_artifacts(run_id(trainer), "checkpoints")]
    assert artifacts == [f"checkpoints/policy_{n:012}.safetensors" for n in (256, 512, 768, 1024)]
    strips = [a.path for a in client(trainer).list_artifacts(run_id(trainer), "images")]
    assert {name.split("+")[2] for name in strips} == {"512", "1024"}, "MLflow's slider reads the steps off the names"
    (folder,) = (trainer / "runs").iterdir()
    assert json.loads((folder / "config.json").read_text())["total_timesteps"] == 1024
    assert_tensorboard_agrees(folder, figures)
    assert not list(folder.glob("checkpoints/state_*.safetensors")), "a finished training must not be resumed"


def assert_tensorboard_agrees(folder: Path, figures: dict[str, float]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    keys = set(events.Tags()["scalars"])
    assert {f"eval/{k}" for k in ("mean_reward", "std_reward", "mean_length", "std_length")} <= keys
    assert {"train/approx_kl", "train/explained_variance", "rollout/shaped_return", "time/fps"} <= keys
    assert set(events.Tags()["histograms"]) == {"actions/steer", "actions/throttle"}
    strips = [strip.step for strip in events.Images("filmstrip")]
    assert strips == [event.step for event in events.Scalars("eval/mean_reward")], "one strip a validation"
    assert events.Scalars("eval/mean_reward")[-1].value == pytest.approx(figures["final_mean_reward"], rel=1e-5)


@pytest.mark.slow
def test_killed_again_and_again_ends_with_the_same_bits(
    trainer: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    for name in ("mlflow.db", "params.yaml"):
        shutil.copy(trainer / name, undisturbed)
    finish(start(undisturbed))

    for steps in (256, 512, 768):  # killed just after these states were saved
        process = start(trainer)
        wait_for(trainer, f"runs/*/checkpoints/state_{steps:012}.safetensors", process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)  # its output ends when no worker holds it any more: none may outlive it
    output = finish(start(trainer, n_workers=1))

    assert "resumed at" in output
    for name in (BEST, FINAL):
        assert digest(trainer / name) == digest(undisturbed / name)
    runs = client(trainer).search_runs([client(trainer).get_run(run_id(trainer)).info.experiment_id])
    assert [run.info.run_id for run in runs] == [run_id(trainer)], "a resumed training is one run"
    for key in ("eval/mean_reward", "train/loss", "rollout/ep_rew_mean"):
        history = client(trainer).get_metric_history(run_id(trainer), key)
        expected = client(undisturbed).get_metric_history(run_id(undisturbed), key)
        assert [(m.step, m.value) for m in history] == [(m.step, m.value) for m in expected], key


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_resumable(trainer: Path, number: int, code: int) -> None:
    process = start(trainer, total_timesteps=100_096, save_freq=256, eval_freq=0)
    wait_for(trainer, "runs/*/checkpoints/state_*.safetensors", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "Traceback" not in output
    assert client(trainer).get_run(run_id(trainer)).info.status == "KILLED"
    assert list(trainer.glob("runs/*/checkpoints/state_*.safetensors"))


@pytest.mark.slow
def test_a_second_trainer_is_told_who_holds_the_folder(trainer: Path) -> None:
    first = start(trainer, total_timesteps=100_096)
    wait_for(trainer, "runs/*/checkpoints/state_*.safetensors", first)
    second = start(trainer, total_timesteps=100_096)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"is being trained by process {first.pid} on" in output
    first.kill()
    first.communicate(timeout=10)


def test_a_store_that_is_none_is_told_at_once(trainer: Path) -> None:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "nonsense://here", "DVC_ROOT": str(trainer)}
    result = subprocess.run(command(), cwd=trainer, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "MLflow at nonsense://here can't be used" in result.stderr
    assert "unset MLFLOW_TRACKING_URI" in result.stderr
    assert "Traceback" not in result.stderr
