"""Tiny sweeps in folders of their own, and what they left, read with SQL and from files: a second source."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import psutil
from ruamel.yaml import YAML

from tests.conftest import MLFLOW_AND_DVC, ROOT

# As small as a training can be: eight rollouts, a state after each, one validation on one track.
TINY: dict[str, object] = {
    "run_name": "tiny",
    "n_envs": 2,
    "n_steps": 16,
    "batch_size": 32,
    "n_epochs": 1,
    "total_timesteps": 256,
    "cnn_channels": [8, 8, 8],
    "features_dim": 32,
    "eval_freq": 0,
    "n_eval_episodes": 1,
    "save_freq": 32,
    "num_threads": 1,
    "n_workers": 1,
}
SPACE = """name: hunt
pruner: none
trials: {trials}
confirm_seeds: {confirm}
space:
  learning_rate: {{low: 1e-4, high: 1e-3, log: true}}
  n_epochs: {{low: 1, high: 3}}
  frame_skip: {{choice: [2, 4, 8]}}
"""


def new_project(folder: Path, database: Path, size: Mapping[str, object] = TINY) -> Path:
    """A project folder with tiny parameters, or others, and an empty MLflow database."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(database, folder / "mlflow.db")
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    params.update(size)
    yaml.dump(params, folder / "params.yaml")
    return folder


class Driver:
    """``python -m pipeline.sweep``, or another module, in a project."""

    def __init__(self, project: Path, *arguments: str, module: str = "pipeline.sweep", **environment: str) -> None:
        self.project = project
        mine = {key: value for key, value in os.environ.items() if key not in MLFLOW_AND_DVC}
        places = {"DVC_ROOT": str(project), "PYTHONPATH": str(ROOT)}
        with (project / "driver.txt").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=project, env={**mine, **places, **environment}, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def said(self) -> str:
        return (self.project / "driver.txt").read_text(errors="replace")

    def wait_until(self, holds: Callable[[], bool], seconds: float = 900) -> None:
        until = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, self.said()[-3000:]
            assert time.monotonic() < until, self.said()[-3000:]
            time.sleep(0.05)

    def wait(self, seconds: float = 1800) -> int:
        return self.process.wait(seconds)

    def finish(self) -> str:
        assert self.wait() == 0, self.said()[-3000:]
        return self.said()


def sweep_folder(project: Path) -> Path:
    """The one sweep of a project."""
    (folder,) = (project / "runs").iterdir()
    return folder


def outcomes(project: Path) -> int:
    """How many trainings have come to an outcome."""
    return len(list(project.glob("runs/*/jobs/*/outcome.json")))


def trial_states(project: Path) -> Counter[str]:
    """How many of Optuna's trials are in which state."""
    with closing(sqlite3.connect(sweep_folder(project) / "trials.db")) as database:
        return Counter(str(state) for (state,) in database.execute("SELECT state FROM trials"))


def runs(project: Path, parent: bool = False) -> list[tuple[str, str, str]]:
    """(name, status, id) of the trainings' runs in MLflow, or of the sweep's."""
    sql = (
        "SELECT r.name, r.status, r.run_uuid FROM runs r LEFT JOIN tags t ON t.run_uuid = r.run_uuid AND "
        f"t.key = 'mlflow.parentRunId' WHERE t.value IS {'NULL' if parent else 'NOT NULL'}"
    )
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        return [(str(name), str(status), str(uid)) for name, status, uid in database.execute(sql)]


def plots(project: Path) -> list[str]:
    """Names of the pictures that the sweep's run has in MLflow."""
    ((_, _, uid),) = runs(project, parent=True)
    return sorted(path.stem for path in project.glob(f"mlruns/*/{uid}/artifacts/plots/*.png"))


def doubled(project: Path) -> int:
    """Runs beyond the first of a training, and values beyond the first of a (metric, step) of theirs."""
    again = sum(count - 1 for count in Counter(name for name, _, _ in runs(project)).values())
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        counts = database.execute(
            "SELECT COUNT(*) - 1 FROM metrics m JOIN tags t ON t.run_uuid = m.run_uuid "
            "AND t.key = 'mlflow.parentRunId' WHERE m.key NOT LIKE 'system/%' GROUP BY m.run_uuid, m.key, m.step"
        ).fetchall()
    return again + sum(count for (count,) in counts)


def progress(project: Path) -> dict[str, int]:
    """Agent steps of each training that has no outcome yet, as its run folder has them; by the run's name."""
    found: dict[str, int] = {}
    for log in project.glob("runs/*/runs/*/train.log"):
        steps = [
            int(float(number))
            for spool in log.parent.glob("spool-*.jsonl")
            for number in re.findall(r'"time/total_timesteps": ([\d.]+)', spool.read_text())
        ]
        found[log.parent.name.rpartition("-")[0]] = max(steps, default=0)
    ended = {
        name
        for job in project.glob("runs/*/jobs/*/outcome.json")
        for name in re.findall(r'"run_name": "([^"]+)"', (job.parent / "job.json").read_text())
    }
    return {name: steps for name, steps in found.items() if name not in ended}


def resumed(project: Path) -> dict[str, list[int]]:
    """Agent steps at which each training went on; by the run's name."""
    return {
        log.parent.name.rpartition("-")[0]: [
            int(number.replace(",", "")) for number in re.findall(r"resumed at ([\d,]+) steps", log.read_text())
        ]
        for log in project.glob("runs/*/runs/*/train.log")
    }


def job_processes(project: Path) -> list[psutil.Process]:
    """The processes of a project's trainings, without what they started themselves."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "pipeline.sweep.job" in words and words[-2].startswith(str(project)):
                found.append(process)
    return found


def run_name_of(process: psutil.Process) -> str:
    """The name of the run that a training's process works on."""
    job = json.loads((Path(process.cmdline()[-2]) / "job.json").read_text())
    return str(job["params"]["run_name"])


def wait_for_no_job(project: Path, seconds: float = 180) -> None:
    """Until all trainings have noticed that nobody waits for them, and have ended."""
    until = time.monotonic() + seconds
    while left := job_processes(project):
        assert time.monotonic() < until, left
        time.sleep(0.1)
