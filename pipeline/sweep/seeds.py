"""A setting on several seeds: its trainings, and what they came to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.sweep.definition import Sweep
from pipeline.sweep.job import Job
from pipeline.sweep.runner import Runner


def jobs_of(
    sweep: Sweep, chosen: Mapping[str, Any], seeds: Sequence[int], name: str, tags: Mapping[str, str]
) -> list[Job]:
    """The trainings of a setting, one per seed; their runs are called ``name-seedN``."""
    return [
        Job.of(sweep.folder, sweep.params(chosen, seed), f"{name}-seed{seed}", {**tags, "sweep.seed": str(seed)})
        for seed in seeds
    ]


def run_all(jobs: Sequence[Job], runner: Runner, tick: Callable[[], None]) -> None:
    """Run these jobs to their outcomes; ``tick`` lets time pass, and the trainings be looked after."""
    for job in jobs:
        runner.add(job)
    runner.poll()
    while any(job.outcome is None for job in jobs):
        tick()


def finished(jobs: Sequence[Job]) -> list[tuple[Job, dict[str, Any]]]:
    """Those that came to their end, with their outcomes."""
    outcomes = [(job, job.outcome or {}) for job in jobs]
    return [(job, outcome) for job, outcome in outcomes if outcome.get("state") == "finished"]
