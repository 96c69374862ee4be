"""Optuna's part: which values to try next, which trials to give up, and the record of all of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna import Trial
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from pipeline.sweep.definition import Sweep
from pipeline.sweep.space import configurations, suggest

STORAGE = "SWEEP_STORAGE"
"""Environment variable: an SQLAlchemy URL of a database for trials; without it, a file in the sweep's folder."""
STARTUP_TRIALS = 5
"""So many trials are trained to their end before the median says which to give up."""

PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "none": NopPruner,
    # Below the median of the others at the same validation (Golovin et al. 2017, Google Vizier); never at the first.
    "median": lambda: MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=1),
    # Of the trials that reach a rung the best third goes on: ASHA (Li et al. 2020); rungs at 1, 3, 9 ... validations.
    "asha": lambda: SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
}
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    # Those under way count as bad: or several machines would all try the same place.
    "tpe": lambda seed: TPESampler(seed=seed, constant_liar=True),
    "random": RandomSampler,
    "gp": lambda seed: GPSampler(seed=seed, deterministic_objective=False),
    "qmc": lambda seed: QMCSampler(seed=seed, scramble=True),
    "grid": RandomSampler,  # all combinations are waiting; nothing is left to it
}


class StudyError(Exception):
    """The database of trials can't be used; the message says what to do."""


class Study:
    """The trials of a sweep. One process at a time works on it: it holds the sweep's folder.

    Raises:
        StudyError: The database can't be used.
    """

    def __init__(self, sweep: Sweep) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", ExperimentalWarning)
        self._sweep = sweep
        url = os.environ.get(STORAGE) or f"sqlite:///{(sweep.folder / 'trials.db').as_posix()}"
        try:
            self.optuna = optuna.create_study(
                storage=RDBStorage(url),
                study_name=sweep.label,
                direction="maximize",
                pruner=PRUNERS[sweep.plan.pruner](),
                load_if_exists=True,
            )
            if sweep.plan.sampler == "grid":
                written = {dimension.key: dimension.written for dimension in sweep.space}
                for chosen in configurations(sweep.space, exhaustive=True):
                    values = {key: written[key](value) for key, value in chosen.items()}
                    self.optuna.enqueue_trial(values, skip_if_exists=True)
        except (StorageInternalError, SQLAlchemyError, ImportError) as error:
            # Not the URL: it may hold a password.
            where = f"the database named by {STORAGE}" if os.environ.get(STORAGE) else url
            raise StudyError(f"trials can't be kept in {where}: {type(error).__name__}") from None

    def begun(self) -> int:
        """How many trials have begun, those that have ended included."""
        return sum(trial.state != TrialState.WAITING for trial in self.optuna.get_trials(deepcopy=False))

    def ask(self) -> tuple[Trial, dict[str, Any]]:
        """A new trial and its values: a function of the sampler's seed, the trial's number and what is known so far."""
        seed = self._sweep.plan.sampler_seed
        if self._sweep.plan.sampler != "qmc":  # a sequence, which must be one
            seed = int(np.random.SeedSequence([seed, self.begun()]).generate_state(1)[0])
        self.optuna.sampler = SAMPLERS[self._sweep.plan.sampler](seed)
        trial = self.optuna.ask()
        return trial, suggest(self._sweep.space, trial)

    def under_way(self) -> list[tuple[Trial, dict[str, Any]]]:
        """Trials that have begun and not ended, of an earlier process too."""
        running = self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        trials = [Trial(self.optuna, frozen._trial_id) for frozen in running]
        return [(trial, suggest(self._sweep.space, trial)) for trial in trials]  # the values they have, not new ones

    def report(self, trial: Trial, scores: Sequence[float]) -> bool:
        """Tell the score of each validation so far; returns whether the trial is to be given up."""
        known = len(self.frozen(trial.number).intermediate_values)
        give_up = False
        for place, score in enumerate(scores[known:], start=known + 1):
            # By number: agent steps at a validation differ where rollouts do.
            trial.report(score, place)
            give_up = trial.should_prune()
        return give_up

    def tell(self, trial: Trial, score: float | None, state: TrialState, facts: Mapping[str, Any]) -> None:
        """End a trial."""
        for key, value in facts.items():
            trial.set_user_attr(key, value)
        self.optuna.tell(trial, score, state)

    def frozen(self, number: int) -> FrozenTrial:
        """What is known of a trial."""
        return self.optuna.get_trials(deepcopy=False)[number]

    def trials(self) -> list[FrozenTrial]:
        """All that have begun."""
        return [t for t in self.optuna.get_trials(deepcopy=False) if t.state != TrialState.WAITING]

    def best(self) -> FrozenTrial | None:
        """The complete trial with the highest score."""
        complete = [t for t in self.trials() if t.state == TrialState.COMPLETE]
        return max(complete, key=lambda trial: trial.value or 0.0, default=None)

    def spend(self, seconds: float) -> float:
        """Add to the time that the search has taken, over all its processes; returns its hours."""
        spent = float(self.optuna.user_attrs.get("seconds", 0.0)) + seconds
        self.optuna.set_user_attr("seconds", spent)
        return spent / 3600
