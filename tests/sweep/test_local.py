"""Whole sweeps on this machine, with real trainings: killed and gone on with, failing, pruned, written down."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.config import TrainParams, load
from pipeline.sweep.job import Job
from pipeline.sweep.winner import OUTPUTS, save_experiment
from tests.conftest import ROOT
from tests.policies import NETWORK, OBSERVATION, write_policy
from tests.sweep import projects

# The second choice can't begin with the policy's weights: a trial that fails, with a traceback, whatever the luck.
MISFIT = """name: hunt
sampler: grid
pruner: none
confirm_seeds: 1
baseline: false
parameters: {warm_start: start.safetensors}
space:
  cnn_channels: {choice: [[2, 2, 2], [4, 2, 2]]}
"""
OF_LATER_STAGES = (
    "plots/returns.png", "plots/lap_times.png", "plots/drive.gif", "plots/filmstrip.png", "plots/track_map.png",
    "plots/actions.png", "videos/one.mp4",
)  # fmt: skip
OF_THE_POLICY = {**OBSERVATION.model_dump(), **NETWORK.model_dump()}


@pytest.mark.slow
def test_a_killed_search_goes_on_and_a_failed_trial_does_not_stop_it(tmp_path: Path, migrated_database: Path) -> None:
    project = projects.new_project(tmp_path / "p", migrated_database, {**projects.TINY, **OF_THE_POLICY})
    write_policy(project / "start.safetensors", seed=0)
    (project / "s.yaml").write_text(MISFIT)
    first = projects.Driver(project, "--config", "s.yaml", "--jobs", "1")
    first.wait_until(lambda: max(projects.progress(project).values(), default=0) >= 64)
    first.process.send_signal(signal.SIGKILL)
    first.wait()
    projects.wait_for_no_job(project)
    before = projects.progress(project)

    said = projects.Driver(project, "--config", "s.yaml", "--jobs", "1").finish()

    assert projects.trial_states(project) == {"COMPLETE": 1, "FAIL": 1}
    assert projects.doubled(project) == 0
    for name, steps in before.items():
        assert projects.resumed(project)[name][0] >= steps - 32, "at most one state is lost"
    assert {status for _, status, _ in projects.runs(project)} == {"FINISHED"}  # the failed one never began
    ((_, status, _),) = projects.runs(project, parent=True)
    assert status == "FINISHED"
    folder = projects.sweep_folder(project)
    assert "PolicyError" in (folder / "failures.txt").read_text()
    assert "no DVC experiment: this folder is no repository of git and DVC" in said
    best = YAML(typ="safe", pure=True).load(project / "configs/hunt-best.yaml")
    assert best == {"run_name": "hunt-best", "warm_start": "start.safetensors"}, "what differs from params.yaml"

    noted = {path: path.stat().st_mtime_ns for path in folder.glob("jobs/*/outcome.json")}
    projects.Driver(project, "--config", "s.yaml").finish()
    assert {path: path.stat().st_mtime_ns for path in folder.glob("jobs/*/outcome.json")} == noted
    assert len(projects.runs(project)) == 2, "nothing is trained again"


@pytest.mark.slow
def test_ctrl_c_ends_it_with_its_trainings_and_a_second_one_is_told_who_works(
    tmp_path: Path, migrated_database: Path
) -> None:
    project = projects.new_project(tmp_path / "p", migrated_database, {**projects.TINY, "total_timesteps": 100_000})
    first = projects.Driver(project, "--seeds", "0:2")
    first.wait_until(lambda: max(projects.progress(project).values(), default=0) >= 32)
    second = projects.Driver(project, "--seeds", "0:3")
    assert second.wait(120) == 2
    assert f"process {first.process.pid} on" in second.said()
    first.process.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    projects.wait_for_no_job(project)
    assert "Traceback" not in first.said()
    assert {status for _, status, _ in projects.runs(project)} == {"KILLED"}
    assert list(project.glob("runs/*/runs/*/checkpoints/state_*"))


@pytest.mark.slow
def test_a_pruned_training_ends_cleanly_and_is_tagged(project: Path) -> None:
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    params.update({**projects.TINY, "total_timesteps": 100_000})
    yaml.dump(params, project / "params.yaml")
    job = Job.of(project / "s", load(TrainParams), "bad", {"sweep": "s"})
    (job.folder / "workspace").mkdir()
    job.pruned.touch()
    subprocess.run(
        [sys.executable, "-m", "pipeline.sweep.job", str(job.folder), str(os.getpid())],
        cwd=job.folder / "workspace", check=True, timeout=300,
    )  # fmt: skip
    outcome = job.outcome
    assert outcome is not None
    assert outcome["state"] == "pruned"
    assert outcome["agent_steps"] == 32, "the rollout that had begun"
    assert not list(job.run_folder.glob("checkpoints/state_*"))
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        (status,) = database.execute("SELECT status FROM runs").fetchone()
        tags = dict(database.execute("SELECT key, value FROM tags WHERE key LIKE 'sweep%'"))
    assert status == "FINISHED"
    assert tags == {"sweep": "s", "sweep.state": "pruned", "sweep.why": "after 32 agent steps"}


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git repository")
def test_the_winner_becomes_an_experiment_that_can_be_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(checkout)], check=True)
    monkeypatch.chdir(checkout)
    dvc = [sys.executable, "-m", "dvc"]
    for output in (*OUTPUTS, *OF_LATER_STAGES):  # as after `dvc repro`
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text("{}")
    subprocess.run([*dvc, "commit", "--force", "--quiet"], check=True)
    author = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run(["git", *author, "commit", "--quiet", "--all", "--no-verify", "-m", "run"], check=True)
    monkeypatch.setenv("DVC_ROOT", str(checkout))
    job = Job.of(tmp_path / "s", load(TrainParams, learning_rate=7e-4, seed=3), "s-best", {})
    for output in OUTPUTS:
        path = job.folder / "workspace" / output
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"agent_steps": 1}) if path.suffix == ".json" else f"{output}\n")
    before = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    save_experiment(job, "s-best", "the best")
    after = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    assert before == after == "", "the checkout stays as it was"

    monkeypatch.delenv("DVC_ROOT")
    subprocess.run([*dvc, "exp", "apply", "s-best"], check=True)
    applied = load(TrainParams)
    assert (applied.learning_rate, applied.seed) == (7e-4, 3)
    assert Path("models/best_model.safetensors").read_text() == "models/best_model.safetensors\n"
    status = subprocess.run([*dvc, "status", "train"], capture_output=True, text=True, check=True).stdout
    assert "up to date" in status, status
    assert not Path("metrics/evaluate.json").exists(), "of another policy"
    shutil.rmtree(checkout)
