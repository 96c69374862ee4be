"""Bring MLflow up to date with what happened while nobody told it.

python -m pipeline.sync

Sends what runs could not send while MLflow was away, ends runs whose process was killed as KILLED, and ties DVC's
experiments to their MLflow runs. An experiment from another clone or from DVC's cache, whose run this store does not
have, gets a restored run with the parameters and metrics that git holds. Prints a table of the experiments.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, Parser, TrainParams, fail, load, project_root
from pipeline.tracking.experiments import Experiment, experiments, read_json, read_params

log = logging.getLogger("pipeline.sync")

SCORES = {"train": "metrics/train.json", "evaluate": "metrics/evaluate.json"}


def send_spools(client: Any, *folders: Path) -> None:
    """Send what is left in all spools below the folders; one that can't be sent does not hold up the others."""
    from pipeline.tracking.run import discard_sent
    from pipeline.tracking.sender import send
    from pipeline.tracking.spool import SPOOLS
    from pipeline.tracking.store import first_line

    for spool in [path for folder in folders for path in sorted(folder.glob(f"**/{SPOOLS}"))]:
        try:
            if count := send(client, spool):
                log.info("sent %d entries of %s", count, spool)
            discard_sent(spool)
        except Exception as error:  # a deleted run, an unknown one, a server that went away again
            log.warning("%s can't be sent and stays: %s", spool, first_line(error))


def tie(client: Any, found: Sequence[Experiment]) -> list[tuple[str, ...]]:
    """Name each run's experiments in its tags; returns rows of experiment, run, status, evaluate/mean.

    Experiments share a run where DVC took ``train`` from its cache.
    """
    from pipeline.tracking.stored import RESTORED_FROM, known_or_restored, log_tags

    rows: list[tuple[str, ...]] = []
    for known_as in dict.fromkeys(experiment.run_id for experiment in found):
        group = [experiment for experiment in found if experiment.run_id == known_as]
        run_id = known_or_restored(client, known_as, group[0].name)
        fill_if_restored(client, run_id, group[-1].rev)
        names, revs = ", ".join(e.name for e in group), ", ".join(e.rev for e in group)
        log_tags(client, run_id, {"dvc.experiment": names, "dvc.experiment_rev": revs})
        run = client.get_run(run_id)
        status = run.info.status + (", restored" if RESTORED_FROM in run.data.tags else "")
        rows += [(e.name, run_id, status, evaluated_mean(e)) for e in group]
    return rows


def evaluated_mean(experiment: Experiment) -> str:
    """The experiment's own score: several may share a run, which shows the last one's."""
    mean = read_json(experiment.rev, SCORES["evaluate"]).get("mean")
    return "-" if mean is None else f"{mean:.2f}"


def fill_if_restored(client: Any, run_id: str, rev: str) -> None:
    """Give a restored run the parameters and final metrics of a commit that it doesn't have yet."""
    from pipeline.tracking.stored import RESTORED_FROM, log_metrics, log_params

    data = client.get_run(run_id).data
    if RESTORED_FROM not in data.tags:
        return
    params = {key: value for key, value in read_params(rev).items() if key not in data.params}
    log_params(client, run_id, params)
    for stage, path in SCORES.items():
        figures = {f"{stage}/{key}": value for key, value in read_json(rev, path).items()}
        log_metrics(client, run_id, {key: value for key, value in figures.items() if key not in data.metrics})


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def sync(folder: Path) -> str:
    """All of it, for the run folders in ``folder``; returns the table of experiments.

    Raises:
        TrackingError: MLflow can't be reached.
    """
    from pipeline.tracking.lost import mark_killed
    from pipeline.tracking.run import OUTBOX
    from pipeline.tracking.store import connect, experiment_id

    client = connect()
    send_spools(client, folder, project_root() / OUTBOX)  # in this order: runs begin in their run folders
    for name in mark_killed(client, experiment_id(client)):
        log.info("run %s: its process is gone; now KILLED", name)
    if not (project_root() / ".dvc").is_dir():
        return f"{project_root()} is not a DVC project: no experiments to tie to their runs."
    rows = tie(client, experiments())
    if not rows:
        return "No DVC experiments yet; `dvc exp run` makes one."
    return table([("experiment", "run", "status", "evaluate/mean"), *rows])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 2 for mistakes of the user."""
    Parser(prog="python -m pipeline.sync", description=__doc__).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        log_root = load(TrainParams).log_root
    except ConfigError as error:
        fail(error)
    from pipeline.tracking.store import TrackingError, in_one_message

    for noisy in ("alembic", "mlflow"):  # after its import, which sets its own level
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        with in_one_message():
            print(sync(project_root() / log_root))
    except TrackingError as error:
        fail(error)


if __name__ == "__main__":
    main()
