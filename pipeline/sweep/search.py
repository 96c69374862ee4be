"""The search: trials are asked for, trained on their seeds, told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from optuna import Trial
from optuna.trial import FrozenTrial, TrialState

from pipeline.sweep.definition import Sweep
from pipeline.sweep.job import Job
from pipeline.sweep.runner import Runner
from pipeline.sweep.seeds import jobs_of
from pipeline.sweep.space import problem_of
from pipeline.sweep.study import Study

HOURS_NOTED = 60.0
"""Seconds from one note of the time taken to the next."""


class Attempted(NamedTuple):
    """A trial under way and its trainings, one per seed."""

    trial: Trial
    jobs: list[Job]


class Search:
    """Works on a sweep's trials until its budget is used up.

    Args:
        sweep: What is searched, and how.
        study: Its record.
        runner: Trains.
        tags: For the trainings' runs in MLflow.
    """

    def __init__(self, sweep: Sweep, study: Study, runner: Runner, tags: Mapping[str, str]) -> None:
        self.sweep, self.study, self.runner, self.tags = sweep, study, runner, tags
        self._hours, self._since = study.spend(0), time.monotonic()
        self._attempted: dict[int, Attempted] = {}
        for trial, chosen in study.under_way():
            self._begin(trial, chosen)

    def run(self, tick: Callable[[], None]) -> None:
        """Search to the end; ``tick`` lets time pass, and the trainings be looked after."""
        while True:
            while self.runner.room > 0 and self.budget_left():
                self._begin(*self.study.ask())
                self.runner.poll()
            for attempted in list(self._attempted.values()):
                self._look_at(attempted)
            if not self._attempted and not self.budget_left():
                break
            tick()
            if time.monotonic() - self._since >= HOURS_NOTED:
                self.note_time()
        self.note_time()

    def budget_left(self) -> bool:
        """Whether another trial may begin."""
        most, hours = self.sweep.most_trials, self.sweep.plan.hours
        in_time = not hours or self._hours + (time.monotonic() - self._since) / 3600 < hours
        return in_time and (most is None or self.study.begun() < most)

    @property
    def most_trainings(self) -> int | None:
        """Trainings in all; None where only the hours limit them."""
        most = self.sweep.most_trials
        return None if most is None else most * len(self.sweep.seeds)

    def trainings_ended(self) -> int:
        """Trainings of trials that have ended, and those of the others that have an outcome."""
        over = self.study.begun() - len(self._attempted)
        of_others = sum(job.outcome is not None for _, jobs in self._attempted.values() for job in jobs)
        return over * len(self.sweep.seeds) + of_others

    def note_time(self) -> None:
        """Add the time since the last note to what the search has taken."""
        now = time.monotonic()
        self._hours, self._since = self.study.spend(now - self._since), now

    def _begin(self, trial: Trial, chosen: Mapping[str, Any]) -> None:
        if problem := problem_of(self.sweep.base.model_dump(), chosen):  # of numbers between those that were checked
            self.study.tell(trial, None, TrialState.FAIL, {"failure": problem})
            return
        name, tags = f"{self.sweep.plan.name[:40]}-trial-{trial.number:03}", {"sweep.trial": str(trial.number)}
        jobs = jobs_of(self.sweep, chosen, self.sweep.seeds, name, {**self.tags, **tags})
        trial.set_user_attr("jobs", [job.key for job in jobs])
        self._attempted[trial.number] = Attempted(trial, jobs)
        for job in jobs:
            self.runner.add(job)

    def _look_at(self, attempted: Attempted) -> None:
        """Tell how far a trial is; end it when its trainings have, and give it up when it is not worth them."""
        trial, jobs = attempted
        curves = [[validation.score for validation in job.validations()] for job in jobs]
        means = [float(np.mean(scores)) for scores in zip(*curves, strict=False)]  # of what all seeds have reached
        if self.study.report(trial, means):
            for job in jobs:
                job.pruned.touch()
        outcomes = [job.outcome for job in jobs]
        ended = [outcome for outcome in outcomes if outcome]
        if len(ended) < len(jobs):
            return
        self._end(trial, jobs, ended)
        del self._attempted[trial.number]

    def _end(self, trial: Trial, jobs: Sequence[Job], outcomes: Sequence[Mapping[str, Any]]) -> None:
        failures = [f"{j.params.run_name}: {o['error']}" for j, o in zip(jobs, outcomes, strict=True) if "error" in o]
        facts = {"runs": [outcome.get("run_id", "") for outcome in outcomes]}
        if failures:
            self.study.tell(trial, None, TrialState.FAIL, {**facts, "failure": "\n".join(failures)})
        elif any(outcome["state"] == "pruned" for outcome in outcomes):
            self.study.tell(trial, None, TrialState.PRUNED, facts)
        else:
            score = float(np.mean([outcome["score"] for outcome in outcomes]))
            self.study.tell(trial, score, TrialState.COMPLETE, facts)


def chosen_by(sweep: Sweep, frozen: FrozenTrial) -> dict[str, Any]:
    """The values of a trial."""
    return {d.key: d.read(frozen.params[d.key]) for d in sweep.space if d.key in frozen.params}
