"""Jobs and their processes: each to one outcome, through crashes; and who gets which GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import TrainParams, cores, load
from pipeline.sweep.job import Job
from pipeline.sweep.runner import ATTEMPTS, Runner, gpu_shares


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
    with pytest.raises(ValueError, match=r"3 trainings at a time, 0\.5 each; 1 give 2 their share"):
        gpu_shares(3, ["0"], 0.5)


def test_a_share_of_the_machine_is_all_a_training_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_CPU_COUNT", "3")
    assert cores() == 3
    monkeypatch.setenv("PYTHON_CPU_COUNT", "none")
    assert 1 <= cores() != 0
