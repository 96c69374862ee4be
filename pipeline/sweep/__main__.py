"""Train one setting on several seeds, or search for a better one.

python -m pipeline.sweep --seeds 0:5 [--config FILE] [--KEY VALUE ...]           one setting on seeds 0 to 4
python -m pipeline.sweep --config configs/sweep.yaml [--config FILE] [--KEY VALUE ...]   a search

Trainings are runs of MLflow under the sweep's run. The same command goes on with a sweep that was killed. What can be
searched and how: docs/sweeping.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import durable
from pipeline.config import ConfigError, Parser, TrainParams, cores, fail, integer, project_root
from pipeline.config.cli import add_flags
from pipeline.interrupts import Interrupts
from pipeline.sim.ray_cluster import ClusterError, close_to_others, import_ray
from pipeline.sweep.definition import Sweep, SweepError, read_sweep
from pipeline.sweep.runner import Executor, Local, Runner, gpu_shares

if TYPE_CHECKING:
    from pipeline.tracking.run import Run


def parser() -> argparse.ArgumentParser:
    """The command's flags: its own, and one per parameter of the training."""
    found = Parser(prog="python -m pipeline.sweep", description=__doc__)
    group = found.add_argument_group("the sweep")
    group.add_argument("--seeds", metavar="A:B", help="train on seeds A to B - 1")
    group.add_argument("--against", type=Path, metavar="FOLDER", help="compare with another finished --seeds")
    group = found.add_argument_group("where it runs")
    group.add_argument("--jobs", type=integer(1, 4096), metavar="N", help="trainings at a time [default 1; Ray: all]")
    group.add_argument(
        "--cores", type=integer(1, 4096), metavar="N", help="cores of each [default: all, divided by --jobs; Ray: 1]"
    )
    group.add_argument(
        "--gpus", type=_gpus, metavar="X", help="GPUs of each; 0.5 = two share one [default: all see all; Ray: 0]"
    )
    group.add_argument("--ray", metavar="ADDRESS", help="on a Ray cluster: its address, or `local` to start one here")
    add_flags(found, [key for key in TrainParams.model_fields if key != "seed"])
    return found


def _gpus(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (0 < value < 1 or (value >= 1 and value == int(value))):
        raise argparse.ArgumentTypeError(f"expected a whole number, or a share between 0 and 1, got {text}")
    return value


def visible_gpus() -> list[str]:
    """The CUDA GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if names := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return names.split(",")
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def build_executor(arguments: argparse.Namespace, params: TrainParams) -> Executor:
    """Where the trainings run, as the flags say.

    Raises:
        SweepError: It can't be done so.
        ClusterError: Ray is not installed.
    """
    n_jobs, each = arguments.jobs or 1, arguments.cores
    if not arguments.ray:
        if n_jobs * (each or 1) > cores():
            raise SweepError(
                f"expected --jobs x --cores up to {cores()}, the cores of this machine; got {n_jobs * (each or 1)}"
            )
        each = each or cores() // n_jobs
        gpus = gpu_shares(n_jobs, visible_gpus(), arguments.gpus) if arguments.gpus else []
    else:
        each = each or 1
    if params.num_threads > each:
        raise SweepError(
            f"num_threads = {params.num_threads}: expected at most {each}, the cores of each training, or 0"
        )
    if arguments.ray:
        if arguments.ray == "local":
            close_to_others()
        import_ray()
        from pipeline.sweep.on_ray import OnRay

        return OnRay(arguments.ray, project_root(), each, arguments.gpus or 0.0, arguments.jobs)
    return Local(project_root(), n_jobs, each, gpus)


def start_log(folder: Path) -> None:
    """Send the log to the console and to ``sweep.log``."""
    from pipeline.tracking.folder import Console, LogFile

    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[Console(), LogFile(folder / "sweep.log", encoding="utf-8")],
        force=True,
    )
    for noisy in ("alembic", "mlflow", "matplotlib", "optuna"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def sweep_seeds(sweep: Sweep, runner: Runner, stop: Interrupts, run: Run, against: Path | None) -> str:
    """Train the setting on its seeds; returns what came out, in words."""
    from pipeline.sweep.progress import Progress
    from pipeline.sweep.report import child_tags, report_seeds
    from pipeline.sweep.seeds import jobs_of, run_all

    jobs = jobs_of(sweep, {}, sweep.seeds, sweep.base.run_name[:50], child_tags(sweep, run))
    with Progress(runner, stop, len(jobs), lambda: sum(job.outcome is not None for job in jobs)) as progress:
        run_all(jobs, runner, progress.tick)
    return report_seeds(sweep, jobs, run, against)


def sweep_search(sweep: Sweep, runner: Runner, stop: Interrupts, run: Run) -> str:
    """Search, confirm the best on fresh seeds, write it down; returns what came out, in words."""
    from pipeline.sweep.confirm import confirm
    from pipeline.sweep.progress import Progress
    from pipeline.sweep.report import child_tags, report_search
    from pipeline.sweep.search import Search
    from pipeline.sweep.study import Study

    search = Search(sweep, Study(sweep), runner, child_tags(sweep, run))
    with Progress(runner, stop, search.most_trainings, search.trainings_ended) as progress:
        try:
            search.run(progress.tick)
        finally:
            search.note_time()
    trials = report_search(search, run)
    return f"{trials}\n\n{confirm(search, runner, stop, run)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 2 for mistakes of the user, 128 + n for signal n."""
    arguments = parser().parse_args(argv)
    flags = {key: value for key, value in vars(arguments).items() if key in TrainParams.model_fields}
    try:
        sweep = read_sweep(arguments.config, flags, arguments.seeds)
        if arguments.against:
            from pipeline.sweep.report import read_result

            read_result(arguments.against)
        executor = build_executor(arguments, sweep.base)
    except (ConfigError, SweepError, ClusterError) as error:
        fail(error)
    work(sweep, executor, arguments.against)


def work(sweep: Sweep, executor: Executor, against: Path | None) -> None:
    """Work on a sweep until it is done, as the only process that does."""
    from pipeline.sweep.report import begin_run
    from pipeline.sweep.study import StudyError
    from pipeline.tracking.folder import RunFolderError, one_writer
    from pipeline.tracking.store import TrackingError

    runner = Runner(executor)
    try:
        with Interrupts() as stop, one_writer(sweep.folder):
            start_log(sweep.folder)
            logging.getLogger(__name__).info("%s", sweep.folder)
            try:
                with begin_run(sweep) as run:
                    run.artifact(describe(sweep), "sweep")
                    words = (
                        sweep_search(sweep, runner, stop, run)
                        if sweep.space
                        else sweep_seeds(sweep, runner, stop, run, against)
                    )
            finally:
                runner.stop()  # after a mistake of ours too, no training is left behind
        print(words)
    except (TrackingError, RunFolderError, StudyError, SweepError) as error:
        fail(error)


def describe(sweep: Sweep) -> Path:
    """Write down what is searched, beside what comes out."""
    path = sweep.folder / "sweep.json"
    words = {"base": sweep.base.model_dump(), "space": {d.key: str(d) for d in sweep.space}, "seeds": sweep.plan.seeds}
    durable.publish(path, json.dumps({**words, "plan": sweep.plan.model_dump(exclude={"space"})}, indent=2).encode())
    return path


if __name__ == "__main__":
    main()
