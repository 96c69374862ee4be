"""Jobs and their processes: each to one outcome, through crashes; and who gets which GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import TrainParams, cores, load
from pipeline.sweep.__main__ import main
from pipeline.sweep.confirm import _is_confirmed
from pipeline.sweep.definition import SweepError
from pipeline.sweep.job import Job, figures
from pipeline.sweep.runner import ATTEMPTS, Runner, gpu_shares
from pipeline.tracking.spool import Spool


class Machine:
    """An executor with ``slots`` places, whose processes end when the test says so."""

    def __init__(self, slots: int) -> None:
        self.slots, self.running, self.over = slots, [], []  # type: ignore[var-annotated]
        self.started: list[str] = []

    def room(self) -> int:
        return self.slots - len(self.running)

    def start(self, job: Job) -> None:
        self.started.append(job.key)
        self.running.append(job)

    def ended(self) -> list[tuple[str, str]]:
        over, self.over = self.over, []
        return over

    def stop(self) -> None:
        self.running.clear()

    def end(self, job: Job, how: str = "killed by signal 9") -> None:
        self.running.remove(job)
        self.over.append((job.key, how))


@pytest.fixture
def jobs(params_here: Path, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    params = load(TrainParams)
    return [Job.of(params_here / "s", params.model_copy(update={"seed": seed}), f"s-{seed}", {}) for seed in range(3)]


def test_no_more_run_than_there_is_room_for_and_each_once(jobs: list[Job]) -> None:
    machine = Machine(2)
    runner = Runner(machine)
    for job in [*jobs, *jobs]:
        runner.add(job)
    runner.poll()
    assert machine.started == [job.key for job in jobs[:2]]
    assert runner.room == -1
    jobs[0].end("failed", error="ValueError: no")
    machine.end(jobs[0])
    runner.poll()
    assert machine.started == [job.key for job in jobs]
    runner.add(jobs[0])
    assert jobs[0] not in runner.unfinished, "what has an outcome is not run again"


def test_a_lost_job_goes_on_before_those_that_wait(jobs: list[Job]) -> None:
    machine = Machine(1)
    runner = Runner(machine)
    for job in jobs:
        runner.add(job)
    runner.poll()
    machine.end(jobs[0])
    runner.poll()
    assert machine.started == [jobs[0].key] * 2
    assert runner.lost == 1


def test_a_job_that_gets_nowhere_counts_as_failed_and_one_that_saves_states_does_not(jobs: list[Job]) -> None:
    machine = Machine(2)
    runner = Runner(machine)
    stuck, slow = jobs[:2]
    runner.add(stuck)
    runner.add(slow)
    runner.poll()
    checkpoints = slow.run_folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    for attempt in range(2 * ATTEMPTS):
        (checkpoints / f"state_{attempt:012}.safetensors").touch()
        machine.end(slow)
        if stuck in machine.running:
            (stuck.folder / "output.txt").write_text("Out of memory\n")
            machine.end(stuck)
        runner.poll()
    outcome = stuck.outcome
    assert outcome is not None
    assert outcome["state"] == "failed"
    assert "killed by signal 9" in outcome["error"]
    assert "Out of memory" in outcome["error"]
    assert machine.started.count(stuck.key) == ATTEMPTS
    assert slow.outcome is None
    assert slow in runner.unfinished


def test_the_same_parameters_are_the_same_job_under_its_first_name(jobs: list[Job], params_here: Path) -> None:
    again = Job.of(params_here / "s", load(TrainParams).model_copy(update={"seed": 1}), "another name", {"a": "b"})
    assert again == jobs[1]
    assert again.params.run_name == "s-1"


@pytest.mark.parametrize(
    ("n_jobs", "gpus", "each", "shares"),
    [
        (2, "01", 1, ["0", "1"]),
        (2, "0", 0.5, ["0", "0"]),
        (3, "01", 0.5, ["0", "0", "1"]),
        (2, "0123", 2, ["0,1", "2,3"]),
        (3, "0", 1 / 3, ["0", "0", "0"]),
    ],
)
def test_gpus_are_shared_or_parted_as_stated(n_jobs: int, gpus: str, each: float, shares: list[str]) -> None:
    assert gpu_shares(n_jobs, list(gpus), each) == shares


def test_too_few_gpus_are_told() -> None:
    with pytest.raises(SweepError, match=r"3 trainings at a time, 0\.5 each; 1 give 2 their share"):
        gpu_shares(3, ["0"], 0.5)


def test_a_share_of_the_machine_is_all_a_training_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_CPU_COUNT", "3")
    assert cores() == 3
    monkeypatch.setenv("PYTHON_CPU_COUNT", "none")
    assert 1 <= cores() != 0


def test_a_training_has_ended_whatever_the_load_monitor_says_after_it(jobs: list[Job]) -> None:
    job = jobs[0]
    note = job.folder / "workspace/metrics/mlflow.json"
    for folder in (note.parent, job.run_folder):
        folder.mkdir(parents=True, exist_ok=True)
    note.write_text('{"run_id": "local-1"}')
    best = {f"best/{key}": 1.0 for key in ("score", "mean_reward", "std_reward", "agent_steps")}
    with Spool(job.run_folder / "spool-local-1.jsonl", "local-1") as spool:
        spool.metrics({"eval/mean_reward": 1.0, "eval/score": 1.0}, 64)
        spool.metrics(best, 32)
        spool.put({"status": "RUNNING"})
        assert figures(job) is None
        spool.put({"status": "FINISHED", "time": 0})
        spool.metrics({"system/cpu": 1.0}, 9)
    found = figures(job)
    assert found is not None
    assert found["agent_steps"] == 64


@pytest.mark.parametrize(
    ("scores", "gain", "confirmed"),
    [
        ({"best": [3.0, 3.0], "baseline": [1.0, 1.0]}, 2.0, True),
        ({"best": [3.0, 3.0], "baseline": [4.0, 4.0]}, -1.0, False),
        ({"best": [3.0], "baseline": [1.0, 1.0]}, 2.0, False),
        ({"best": [3.0, 3.0], "baseline": []}, None, False),
        ({"best": [3.0, 3.0]}, None, True),
    ],
)
def test_a_winner_is_confirmed_by_all_trainings_on_fresh_seeds(
    scores: dict[str, list[float]], gain: float | None, confirmed: bool
) -> None:
    search: Any = SimpleNamespace(sweep=SimpleNamespace(fresh_seeds=(1, 2)))
    difference: Any = None if gain is None else SimpleNamespace(mean=gain)
    assert _is_confirmed(search, scores, difference) is confirmed


def test_a_cluster_without_ray_is_one_message(
    params_here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "pipeline.sweep.on_ray", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["--seeds", "0:1", "--ray", "10.0.0.5:6379"])
    assert ended.value.code == 2
    assert "Ray is not installed" in capsys.readouterr().err


def test_local_is_a_cluster_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray without an address joins the one it finds on the machine."""
    ray = pytest.importorskip("ray")
    from pipeline.sweep.on_ray import _connect

    asked: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    _connect("local")
    assert (asked["address"], asked["include_dashboard"]) == ("local", False)
