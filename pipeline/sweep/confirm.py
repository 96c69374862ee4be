"""The winner of a search on seeds that no trial has seen: the highest of many scores is partly luck."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pipeline.interrupts import Interrupts
from pipeline.sweep import winner
from pipeline.sweep.definition import SweepError
from pipeline.sweep.job import Job
from pipeline.sweep.progress import Progress
from pipeline.sweep.report import draw_curves, failures_of, in_words, tell_failures, write_result
from pipeline.sweep.runner import Runner
from pipeline.sweep.search import Search, chosen_by
from pipeline.sweep.seed_statistics import Difference, difference, over_seeds
from pipeline.sweep.seeds import finished, jobs_of, run_all
from pipeline.tracking.run import Run

log = logging.getLogger(__name__)

BEST, BASELINE = "best", "baseline"


def confirm(search: Search, runner: Runner, stop: Interrupts, run: Run) -> str:
    """Train the best setting, and the one without the search, on fresh seeds; write the best down; returns it in words.

    Raises:
        SweepError: No trial came to its end.
    """
    frozen = search.study.best()
    if frozen is None or frozen.value is None:
        raise SweepError("no trial came to its end; see failures.txt in the sweep's folder")
    chosen = chosen_by(search.sweep, frozen)
    groups = _train(search, chosen, frozen.number, runner, stop)
    scores = {name: [float(outcome["score"]) for _, outcome in finished(jobs)] for name, jobs in groups.items()}
    figures = {name: over_seeds(values) for name, values in scores.items() if values}
    begun = search.study.begun()  # the step: a sweep that went on with more trials tells its figures again
    run.metrics({"best/score": frozen.value, "best/trial": frozen.number}, begun)
    for name, values in figures.items():
        run.metrics({f"confirm/{name}_{key}": value for key, value in values.items()}, begun)
    if groups:
        draw_curves(search.sweep, groups, run)
        fresh = [job for jobs in groups.values() for job in jobs]
        tell_failures(search.sweep, failures_of(fresh), run, "failures_on_fresh_seeds")
    gain = difference(scores[BEST], scores[BASELINE]) if scores.get(BEST) and scores.get(BASELINE) else None
    lines = [f"best trial {frozen.number}: score {frozen.value:.1f} on the seeds of the search; {_listed(chosen)}"]
    lines += [f"{name} on fresh seeds: {in_words(values)}" for name, values in figures.items()]
    lines += [f"best against baseline on fresh seeds: {gain}"] if gain else []
    result: dict[str, Any] = {
        "best_trial": frozen.number,
        "score": frozen.value,
        "parameters": chosen,
        "fresh_seeds": list(search.sweep.fresh_seeds),
        "fresh_scores": scores,
        "lost": runner.lost,
    }
    confirmed = _is_confirmed(search, scores, gain)
    if confirmed:
        lines += _write_down(search, chosen, groups, "\n".join([f"Best of the sweep {search.sweep.label}.", *lines]))
    else:
        lines.append("not confirmed: nothing is written to configs/")
    run.tags({"sweep.confirmed": str(confirmed).lower()})
    write_result(search.sweep, {**result, "confirmed": confirmed}, run)
    return "\n".join(lines)


def _train(
    search: Search, chosen: Mapping[str, Any], trial: int, runner: Runner, stop: Interrupts
) -> dict[str, list[Job]]:
    """Train on the fresh seeds what the plan says; returns the trainings by the setting's name."""
    sweep = search.sweep
    settings: dict[str, Mapping[str, Any]] = {BEST: chosen}
    if sweep.plan.baseline:
        settings[BASELINE] = {}
    groups = {
        name: jobs_of(sweep, values, sweep.fresh_seeds, f"{sweep.plan.name[:40]}-{name}", search.tags)
        for name, values in settings.items()
        if sweep.fresh_seeds
    }
    jobs = [job for group in groups.values() for job in group]
    if jobs:
        log.info("trial %d is the best so far: confirming on seeds %s", trial, list(sweep.fresh_seeds))
        with Progress(runner, stop, len(jobs), lambda: sum(job.outcome is not None for job in jobs)) as progress:
            run_all(jobs, runner, progress.tick)
    return groups


def _is_confirmed(search: Search, scores: Mapping[str, list[float]], gain: Difference | None) -> bool:
    """Whether the fresh seeds have all come to their end, and are not worse than without the search."""
    seeds = search.sweep.fresh_seeds
    all_ended = all(len(values) == len(seeds) for values in scores.values())
    return bool(seeds) and all_ended and (gain is None or gain.mean > 0)


def _write_down(search: Search, chosen: Mapping[str, Any], groups: Mapping[str, list[Job]], words: str) -> list[str]:
    path = winner.write_config(search.sweep, chosen, words)
    lines = [f"written: {path}", f"train it again: {winner.command(search.sweep, chosen)}"]
    job, _ = max(finished(groups[BEST]), key=lambda pair: float(pair[1]["score"]))
    name = f"{search.sweep.label}-best"
    try:
        winner.save_experiment(job, name, words)
        lines.append(f"as an experiment, trained with seed {job.params.seed}: dvc exp apply {name}")
    except winner.ExperimentError as error:
        lines.append(f"no DVC experiment: {error}")
    return lines


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )
