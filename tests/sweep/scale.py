"""The acceptance run of sweeps on a cluster, and its figures in ``metrics/scale.json``: some minutes.

python -m tests.sweep.scale acceptance    twelve trials, a node lost half-way, the winner confirmed
python -m tests.sweep.scale disturbed     a setting on three seeds; worker, driver, node and head are killed
python -m tests.sweep.scale overhead      what a training takes longer in a sweep than alone; nothing else may run

The trials are over learning_rate, n_epochs and frame_skip, on two nodes of a Ray cluster; the winner is trained on
three fresh seeds, beside the setting without the search.
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
from statistics import mean
from tempfile import mkdtemp

from tests.conftest import ROOT
from tests.sweep import projects
from tests.sweep.cluster import RayCluster, kill_with_children

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


def acceptance(folder: Path, database: Path) -> dict[str, object]:
    """Run it; returns its figures."""
    project = projects.new_project(folder / "project", database)
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
        "plots_in_mlflow": projects.plots(project),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def disturbed(folder: Path, database: Path) -> dict[str, object]:
    """A setting on three seeds, whose worker, driver, node and head are killed one after the other; its figures."""
    project = projects.new_project(folder / "project", database)
    (folder / "ray").mkdir()
    lost: list[int] = []

    def expect_progress(driver: projects.Driver, more: int) -> dict[str, int]:
        """Wait until some training has come further by so many agent steps; returns how far each has come."""
        first = projects.progress(project)

        def holds() -> bool:
            return any(steps >= first.get(name, 0) + more for name, steps in projects.progress(project).items())

        driver.wait_until(holds)
        return projects.progress(project)

    def expect_resumed(driver: projects.Driver, before: dict[str, int], times: dict[str, int]) -> None:
        """Wait until each of these goes on, and note how far behind where it was."""
        driver.wait_until(lambda: all(len(projects.resumed(project)[name]) > times.get(name, 0) for name in before))
        lost.extend(steps - projects.resumed(project)[name][times.get(name, 0)] for name, steps in before.items())

    def times() -> dict[str, int]:
        return {name: len(steps) for name, steps in projects.resumed(project).items()}

    with RayCluster(2, folder / "ray") as cluster:
        arguments = ("--seeds", "0:3", "--ray", cluster.address)
        driver = projects.Driver(project, *arguments, **cluster.environment)
        before = expect_progress(driver, 2 * STATE_STEPS)
        known = times()
        name = max(before, key=lambda name: before[name])
        (worker,) = [p for p in projects.job_processes(project) if name in projects.run_name_of(p)]
        kill_with_children(worker.pid)
        expect_resumed(driver, {name: before[name]}, known)

        driver.process.kill()
        driver.wait()
        projects.wait_for_no_job(project)
        before, known = projects.progress(project), times()
        driver = projects.Driver(project, *arguments, **cluster.environment)
        expect_resumed(driver, before, known)

        expect_progress(driver, STATE_STEPS)
        cluster.tell("kill 0")
        cluster.tell("add")
        expect_progress(driver, STATE_STEPS)

        cluster.tell("kill head")
        code = driver.wait(300)
        assert "head at 127.0.0.1" in driver.said(), driver.said()[-3000:]
        projects.wait_for_no_job(project)
    before, known = projects.progress(project), times()
    (folder / "ray2").mkdir()
    with RayCluster(2, folder / "ray2") as cluster:
        arguments = ("--seeds", "0:3", "--ray", cluster.address)
        driver = projects.Driver(project, *arguments, **cluster.environment)
        expect_resumed(driver, before, known)
        driver.finish()
    runs = projects.runs(project)
    return {
        "killed": "a worker, the driver, a node, the head",
        "exit_code_without_head": code,
        "trainings_asked": 3,
        "trainings_finished": sum(status == "FINISHED" for _, status, _ in runs),
        "doubled": projects.doubled(project),
        "progress_lost_agent_steps": max(lost, default=0),
        "steps_from_state_to_state": STATE_STEPS,
        "times_resumed": sum(times().values()),
    }


MINUTE = {"total_timesteps": 20_480, "n_eval_episodes": 2, "num_threads": 1, "n_workers": 1}
"""The default recipe for a minute on one core."""


def overhead(folder: Path, database: Path) -> dict[str, object]:
    """A minute's training alone, and as the second and third trial of a sweep here and on Ray; [s] of wall clock."""

    def seconds(name: str, module: str, *arguments: str) -> float:
        project = projects.new_project(folder / name, database, MINUTE)
        began = time.monotonic()
        projects.Driver(project, *arguments, module=module).finish()
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        return time.monotonic() - began

    alone = [seconds(f"alone-{seed}", "pipeline.train", "--seed", str(seed)) for seed in range(3)]
    figures: dict[str, object] = {"alone_s": round(mean(alone), 1)}
    for where, arguments in (("here", ()), ("ray", ("--ray", "local", "--jobs", "1"))):
        first, all_three = (
            seconds(f"{where}-{trials}", "pipeline.sweep", "--seeds", f"0:{trials}", *arguments) for trials in (1, 3)
        )
        trial = (all_three - first) / 2
        figures |= {
            f"trial_{where}_s": round(trial, 1),
            f"start_and_end_{where}_s": round(first - trial, 1),
            f"overhead_{where}_percent": round(100 * (trial / mean(alone[1:]) - 1), 1),
        }
    return figures


def note(name: str, figures: dict[str, object]) -> None:
    """Add figures to ``metrics/scale.json``."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    known[name] = {"machine": machine, "day": datetime.now(timezone.utc).date().isoformat(), **figures}
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")


def main(which: str) -> None:
    folder = Path(mkdtemp(prefix="scale-"))  # kept, to look into
    measure = {"acceptance": acceptance, "disturbed": disturbed, "overhead": overhead}[which]
    figures = measure(folder, empty_database(folder))
    print(json.dumps(figures, indent=2))
    note(f"sweep, {which}", figures)


if __name__ == "__main__":
    main(sys.argv[1])
