"""Keeps as many trainings running as there is room for; one whose process or machine is lost goes on elsewhere."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Protocol

from pipeline.sweep.definition import SweepError
from pipeline.sweep.job import Job
from pipeline.sweep.launch import end, how_it_ended, launch

log = logging.getLogger(__name__)

ATTEMPTS = 8
"""So often in a row may a training be lost without having saved anything new; then it counts as failed."""


class Executor(Protocol):
    """Where the processes of jobs run."""

    def room(self) -> int:
        """How many more can be started now."""
        ...

    def start(self, job: Job) -> None:
        """Start a job's process."""
        ...

    def ended(self) -> list[tuple[str, str]]:
        """Keys of the jobs whose process has ended since the last call, and how."""
        ...

    def stop(self) -> None:
        """Ask all of them to save their state and end, and wait for that."""
        ...


class Local:
    """Jobs on this machine, ``n_jobs`` at a time; each has its share of the cores, and of the GPUs where that is said.

    Args:
        root: The project's folder.
        n_jobs: At a time.
        cores: Of each.
        gpus: What each of them sees of the GPUs (``CUDA_VISIBLE_DEVICES``); empty = all see all.
    """

    def __init__(self, root: Path, n_jobs: int, cores: int, gpus: Sequence[str] = ()) -> None:
        self._root, self._cores = root, cores
        self._slots: list[Mapping[str, str]] = [
            {"CUDA_VISIBLE_DEVICES": gpus[slot]} if gpus else {} for slot in range(n_jobs)
        ]
        self._running: dict[str, tuple[Popen[bytes], Mapping[str, str]]] = {}

    def room(self) -> int:
        return len(self._slots)

    def start(self, job: Job) -> None:
        slot = self._slots.pop()
        self._running[job.key] = (launch(job.folder, self._root, self._cores, slot), slot)

    def ended(self) -> list[tuple[str, str]]:
        over: list[tuple[str, str]] = []
        for key, (process, slot) in list(self._running.items()):
            if (code := process.poll()) is not None:
                over.append((key, how_it_ended(code)))
                self._slots.append(slot)
                del self._running[key]
        return over

    def stop(self) -> None:
        processes = [process for process, _ in self._running.values()]
        for process in processes:
            process.terminate()
        for process in processes:
            end(process)


def gpu_shares(n_jobs: int, gpus: Sequence[str], each: float) -> list[str]:
    """What each of ``n_jobs`` sees: with ``each`` 0.5 two share a GPU, with 2 each has two of its own.

    Raises:
        SweepError: There are too few.
    """
    if each >= 1:
        size = round(each)
        shares = [",".join(gpus[n * size : (n + 1) * size]) for n in range(len(gpus) // size)]
    else:
        shares = [gpu for gpu in gpus for _ in range(int(1 / each + 1e-9))]
    if len(shares) < n_jobs:
        raise SweepError(
            f"expected GPUs for {n_jobs} trainings at a time, {each:g} each; {len(gpus)} give {len(shares)} their share"
        )
    return shares[:n_jobs]


class Runner:
    """Runs jobs to their outcome, each once.

    Attributes:
        lost: Times that a process ended without an outcome, of all jobs.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._waiting: deque[Job] = deque()
        self._running: dict[str, Job] = {}
        self._attempts: dict[str, tuple[int, str]] = {}
        self.lost = 0

    @property
    def unfinished(self) -> list[Job]:
        """The jobs that run, then those that wait."""
        return [*self._running.values(), *self._waiting]

    @property
    def room(self) -> int:
        """How many more jobs would start at once."""
        return self._executor.room() - len(self._waiting)

    def add(self, job: Job) -> None:
        """Run this job as soon as there is room; nothing, where it has an outcome or is here already."""
        if not job.outcome and job.key not in {other.key for other in self.unfinished}:
            self._waiting.append(job)

    def poll(self) -> None:
        """Note what has ended, start what there is room for."""
        for key, how in self._executor.ended():
            job = self._running.pop(key)
            if outcome := job.outcome:
                log.info("%s %s%s", job.params.run_name, outcome["state"], _in_short(outcome))
            else:
                self._again(job, how)
        while self._waiting and self._executor.room() > 0:
            job = self._waiting.popleft()
            self._executor.start(job)
            self._running[job.key] = job

    def _again(self, job: Job, how: str) -> None:
        """Run a job again that has come to no outcome, unless it gets nowhere."""
        self.lost += 1
        count, saved = self._attempts.get(job.key, (0, ""))
        count = 1 if job.saved != saved else count + 1
        self._attempts[job.key] = (count, job.saved)
        if count >= ATTEMPTS:
            job.end("failed", error=f"{how}, {ATTEMPTS} times without progress. It said last:\n{job.last_words()}")
            log.warning("%s failed: %s; see %s", job.params.run_name, how, job.folder)
        else:
            log.warning("%s ended without a result (%s): it goes on from its last state", job.params.run_name, how)
            self._waiting.appendleft(job)

    def stop(self) -> None:
        """Let all of them save their state and end."""
        self._executor.stop()


def _in_short(outcome: Mapping[str, object]) -> str:
    if "error" in outcome:
        return ": " + str(outcome["error"]).strip().splitlines()[-1][:200]
    return f": {outcome['mean_reward']:.1f} ± {outcome['std_reward']:.1f} on the validation tracks"
