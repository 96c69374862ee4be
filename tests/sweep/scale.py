"""The acceptance run of sweeps on a cluster, and its figures in ``metrics/scale.json``: some minutes.

python -m tests.sweep.scale [FOLDER]

Twelve trials over learning_rate, n_epochs and frame_skip on two nodes of a Ray cluster; one node is lost half-way; the
winner is confirmed on three fresh seeds, beside the setting without the search.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.conftest import ROOT
from tests.sweep import projects
from tests.sweep.cluster import RayCluster

RESULTS = ROOT / "metrics/scale.json"
TRIALS, CONFIRM = 12, 3
STATE_STEPS = 32
"""Agent steps from one state of a tiny training to the next."""


def empty_database(folder: Path) -> Path:
    code = "from pipeline.tracking.store import connect, experiment_id; experiment_id(connect())"
    environment = {**os.environ, "DVC_ROOT": str(folder), "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
    return folder / "mlflow.db"


def acceptance(folder: Path) -> dict[str, object]:
    """Run it; returns its figures."""
    project = projects.new_project(folder / "project", empty_database(folder))
    (project / "s.yaml").write_text(projects.SPACE.format(trials=TRIALS, confirm=CONFIRM))
    (folder / "ray").mkdir()
    began = time.monotonic()
    with RayCluster(2, folder / "ray") as cluster:
        driver = projects.Driver(project, "--config", "s.yaml", "--ray", cluster.address, **cluster.environment)
        driver.wait_until(lambda: projects.outcomes(project) >= TRIALS // 2, 3000)
        driver.wait_until(lambda: max(projects.progress(project).values(), default=0) >= 2 * STATE_STEPS)
        before = projects.progress(project)
        killed = cluster.tell("kill 0")
        driver.wait(3000)
    said = driver.said()
    assert driver.process.returncode == 0, said[-3000:]
    print(said)
    result = json.loads((projects.sweep_folder(project) / "result.json").read_text())
    lost = [
        steps - projects.resumed(project)[name][0]
        for name, steps in before.items()
        if projects.resumed(project).get(name)
    ]
    states = projects.trial_states(project)
    return {
        "nodes": 2,
        "killed": f"1 node half-way, its {killed} processes at once",
        "trials_asked": TRIALS,
        "trials_finished": states["COMPLETE"],
        "trials_failed": states["FAIL"],
        "trials_lost": TRIALS - states["COMPLETE"] - states["FAIL"] - states["PRUNED"],
        "doubled": projects.doubled(project),
        "trainings": len(projects.runs(project)),
        "trainings_not_finished": sum(status != "FINISHED" for _, status, _ in projects.runs(project)),
        "moved_trainings": result["lost"],
        "progress_lost_agent_steps": max(lost, default=0),
        "steps_from_state_to_state": STATE_STEPS,
        "confirmed_on_fresh_seeds": len(result["fresh_scores"]["best"]),
        "winner_beats_baseline_there": result["confirmed"],
        "plots_in_mlflow": len(list(project.glob("mlruns/**/artifacts/plots/*.png"))),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def note(name: str, figures: dict[str, object]) -> None:
    """Add figures to ``metrics/scale.json``."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    known[name] = {"machine": machine, "day": datetime.now(timezone.utc).date().isoformat(), **figures}
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        place = Path(sys.argv[1])
        place.mkdir(parents=True)
        found = acceptance(place)
    else:
        with TemporaryDirectory() as name:
            found = acceptance(Path(name))
    print(json.dumps(found, indent=2))
    note("sweep: 12 trials on 2 nodes, one killed", found)
