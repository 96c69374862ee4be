"""What came out of a sweep: in words, in ``result.json``, and in the parent run of MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import durable
from pipeline.sweep.definition import Sweep, SweepError
from pipeline.sweep.job import Job
from pipeline.tracking.run import Run
from pipeline.tracking.spool import SPOOLS

if TYPE_CHECKING:
    from pipeline.sweep.search import Search

RESULT = "result.json"


def begin_run(sweep: Sweep) -> Run:
    """The sweep's run in MLflow, the parent of its trainings' runs; the same one when a sweep goes on.

    Raises:
        TrackingError: MLflow can't be reached.
    """
    known = [path.stem.removeprefix("spool-") for path in sweep.folder.glob(SPOOLS)]
    searched = {dimension.key: str(dimension) for dimension in sweep.space}
    params = {**sweep.base.model_dump(), **searched, "run_name": sweep.plan.name, "seed": sweep.plan.seeds}
    if sweep.space:
        plan = sweep.plan.model_dump(include={"sampler", "pruner"})
        params |= {f"sweep.{key}": value for key, value in plan.items()}
    run = Run.begin(
        sweep.plan.name,
        params,
        {"sweep": sweep.label, "sweep.kind": "search" if sweep.space else "seeds"},
        sweep.folder,
        known[0] if known else None,
        sweep.folder / "mlflow.json",
    )
    run.flush()  # the trainings' runs need its id
    return run


def child_tags(sweep: Sweep, run: Run) -> dict[str, str]:
    """Tags that put a training's run under the sweep's."""
    return {"mlflow.parentRunId": run.id, "sweep": sweep.label}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table for the terminal; numbers with one digit behind the point where they are large."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys, *([_cell(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(keys))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return str(value)


def report_seeds(sweep: Sweep, jobs: Sequence[Job], run: Run, against: Path | None) -> str:
    """Figures of one setting over its seeds; written, drawn, told to MLflow, and returned in words.

    Raises:
        SweepError: No training came to its end.
    """
    from pipeline.sweep.seed_statistics import difference, over_seeds

    ended = [(job, job.outcome or {}) for job in jobs]
    good = [(job, outcome) for job, outcome in ended if outcome["state"] == "finished"]
    rows = [_row(job, outcome) for job, outcome in ended]
    run.table(rows, "sweep/seeds.json")
    tell_failures(sweep, failures_of(jobs), run)
    if not good:
        raise SweepError("no training came to its end; see failures.txt")
    means = [float(outcome["mean_reward"]) for _, outcome in good]
    figures = over_seeds(means)
    # A step per number of seeds: those of a sweep that went on with more of them are told beside the earlier ones.
    run.metrics({f"seeds/{key}": value for key, value in figures.items()}, step=len(jobs))
    run.metrics({"seeds/failed": len(jobs) - len(good)}, step=len(jobs))
    draw_curves(sweep, {sweep.plan.name: [job for job, _ in good]}, run)
    seeds = {str(job.params.seed): mean for (job, _), mean in zip(good, means, strict=True)}
    write_result(sweep, {"mean_reward": figures, "by_seed": seeds, "failed": len(ended) - len(good)}, run)
    text = [table(rows), "", "validation return of the best policy of each seed:", in_words(figures)]
    if against:
        other = read_result(against)["by_seed"]
        text.append(f"against {against.name}: {difference(means, list(other.values()))}")
    return "\n".join(text)


def in_words(figures: Mapping[str, float]) -> str:
    """Figures over seeds on a line."""
    return (
        f"median {figures['median']:.1f}, IQM {figures['iqm']:.1f} (95% interval {figures['iqm_ci_low']:.1f} to "
        f"{figures['iqm_ci_high']:.1f}), range {figures['min']:.1f} to {figures['max']:.1f}, "
        f"{figures['n_seeds']:.0f} seeds"
    )


def read_result(folder: Path) -> dict[str, Any]:
    """The result of a finished ``--seeds``.

    Raises:
        SweepError: There is none.
    """
    try:
        result = json.loads((folder / RESULT).read_text())
        return {**result, "by_seed": dict(result["by_seed"])}
    except (OSError, KeyError, TypeError, ValueError):
        raise SweepError(
            f"{folder}: expected the folder of a finished `--seeds`, which has a {RESULT} with by_seed"
        ) from None


def _row(job: Job, outcome: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("mean_reward", "std_reward", "score", "best_agent_steps")
    figures = {key: float(outcome[key]) for key in kept if key in outcome}
    return {"seed": job.params.seed, "state": outcome["state"], **figures, "run": job.params.run_name}


def write_result(sweep: Sweep, result: Mapping[str, Any], run: Run) -> None:
    """Write ``result.json`` into the sweep's folder, and hand it to MLflow."""
    path = sweep.folder / RESULT
    durable.publish(path, (json.dumps({"sweep": sweep.label, **result}, indent=2) + "\n").encode())
    run.artifact(path, "sweep")


def tell_failures(sweep: Sweep, failures: Mapping[str, str], run: Run, name: str = "failures") -> None:
    """Hand tracebacks to MLflow, in one text; by whose they are."""
    if failures:
        path = sweep.folder / f"{name}.txt"
        durable.publish(path, "\n\n".join(f"{whose}\n{why}" for whose, why in failures.items()).encode())
        run.artifact(path, "sweep")


def failures_of(jobs: Sequence[Job]) -> dict[str, str]:
    """The tracebacks of the failed ones, by their runs' names."""
    ended = [(job, job.outcome or {}) for job in jobs]
    return {job.params.run_name: str(outcome["error"]) for job, outcome in ended if "error" in outcome}


def draw_curves(sweep: Sweep, groups: Mapping[str, Sequence[Job]], run: Run) -> None:
    """Validation curves of settings over their seeds."""
    from pipeline.media.charts import curves_over_seeds

    curves = {
        name: [[(v.steps * job.params.frame_skip, v.mean) for v in job.validations()] for job in jobs]
        for name, jobs in groups.items()
    }
    path = sweep.folder / "plots/learning_curves.png"
    curves_over_seeds(curves, path, y="raw return, validation")
    run.artifact(path, "plots")


def report_search(search: Search, run: Run) -> str:
    """All trials: table, plots, figures; written, told to MLflow, and returned in words."""
    from pipeline.sweep import plots
    from pipeline.sweep.search import chosen_by

    rows = []
    for frozen in search.study.trials():
        chosen = chosen_by(search.sweep, frozen)
        score = {"score": frozen.value} if frozen.value is not None else {}
        rows.append({"trial": frozen.number, "state": frozen.state.name.lower(), **score, **chosen})
    run.table(
        [{**row, **{k: json.dumps(v) for k, v in row.items() if isinstance(v, list)}} for row in rows],
        "sweep/trials.json",
    )
    states = [row["state"] for row in rows]
    run.metrics({f"trials/{state}": states.count(state) for state in ("complete", "pruned", "fail")}, len(rows))
    best = float("-inf")
    for row in rows:
        if row["state"] == "complete":
            best = max(best, row["score"])
            run.metrics({"trial/score": row["score"], "trial/best_score": best}, step=row["trial"])
    told = {f"trial {trial.number}": trial.user_attrs.get("failure") for trial in search.study.trials()}
    tell_failures(search.sweep, {whose: why for whose, why in told.items() if why}, run)
    for path in plots.draw(search.study.optuna, search.sweep.folder / "plots"):
        run.artifact(path, "plots")
    return table(rows)
