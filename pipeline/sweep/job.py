"""One training of a sweep: a folder that says what to train, a process that does, and what came of it.

The job goes on from its own run folder like every training, so it may be started again after any end. What it has
reached is read from what it tells MLflow, which is in its run folder first.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from filelock import FileLock, Timeout

from pipeline import durable
from pipeline.config import TrainParams
from pipeline.interrupts import Interrupts
from pipeline.sweep.launch import OUTPUT
from pipeline.tracking import spool
from pipeline.tracking.folder import ENDING_SECONDS, run_folder

log = logging.getLogger(__name__)

AGAIN = 75
"""Exit code of a job that could not be done now, and may be later."""


class Validation(NamedTuple):
    """Figures of one validation: mean of its raw returns, and the score by which a training chooses its best policy."""

    steps: int
    mean: float
    score: float


@dataclass(frozen=True)
class Job:
    """One training of a sweep.

    Attributes:
        folder: Named by what is trained: the same parameters are the same job, whoever asks for them.
        params: Its parameters.
        tags: For its run in MLflow.
    """

    folder: Path
    params: TrainParams
    tags: Mapping[str, str]

    @classmethod
    def of(cls, sweep: Path, params: TrainParams, name: str, tags: Mapping[str, str]) -> Job:
        """The job of these parameters: the one that is there, or a new one whose run gets this name."""
        folder = sweep / "jobs" / params.fingerprint()
        if not (folder / "job.json").exists():
            named = params.model_copy(update={"run_name": name})
            text = json.dumps({"params": named.model_dump(), "tags": dict(tags)}, indent=2)
            durable.publish(folder / "job.json", text.encode())
        return cls.read(folder)

    @classmethod
    def read(cls, folder: Path) -> Job:
        """The job of a folder."""
        words = json.loads((folder / "job.json").read_text())
        return cls(folder, TrainParams(**words["params"]), words["tags"])

    @property
    def key(self) -> str:
        """What names the job within its sweep."""
        return self.folder.name

    @cached_property
    def run_folder(self) -> Path:
        """Where it trains."""
        return run_folder(self.params)

    @property
    def outcome(self) -> dict[str, Any] | None:
        """What came of it: ``state`` (finished, pruned or failed) and its figures, or ``error``; None before that."""
        path = self.folder / "outcome.json"
        return dict(json.loads(path.read_text())) if path.exists() else None

    def end(self, state: str, **figures: object) -> None:
        """Note what came of it."""
        durable.publish(
            self.folder / "outcome.json", (json.dumps({"state": state, **figures}, indent=2) + "\n").encode()
        )

    @property
    def pruned(self) -> Path:
        """A file that asks the training to end where it is."""
        return self.folder / "prune"

    def told(self, containing: bytes = b"", newest: bool = False) -> list[dict[str, Any]]:
        """What it has told MLflow so far, see :func:`pipeline.tracking.spool.read_all`."""
        return [
            entry for path in self.run_folder.glob(spool.SPOOLS) for entry in spool.read_all(path, containing, newest)
        ]

    def steps(self) -> int:
        """Agent steps so far."""
        return max((entry.get("step", 0) for entry in self.told(b'"time/total_timesteps"', newest=True)), default=0)

    def validations(self) -> list[Validation]:
        """All so far, in their order."""
        told = [(entry["step"], entry["metrics"]) for entry in self.told(b"eval/mean_reward")]
        seen = {step: Validation(step, m["eval/mean_reward"], m["eval/score"]) for step, m in told}
        return [seen[step] for step in sorted(seen)]

    @property
    def saved(self) -> str:
        """Name of the newest state; empty without one."""
        return max((path.name for path in (self.run_folder / "checkpoints").glob("state_*")), default="")

    def last_words(self, lines: int = 20) -> str:
        """The end of what it printed."""
        path = self.folder / OUTPUT
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def figures(job: Job) -> dict[str, object] | None:
    """The figures of a training that has ended well, from what it told MLflow; None for one that hasn't."""
    told = job.told()
    # Not of the last entry alone: what watches the machine's load may say a last thing after it.
    if [entry["status"] for entry in told if "status" in entry][-1:] != ["FINISHED"]:
        return None
    metrics = {key: value for entry in told for key, value in entry.get("metrics", {}).items()}
    return {
        "score": metrics["best/score"],
        "mean_reward": metrics["best/mean_reward"],
        "std_reward": metrics["best/std_reward"],
        "best_agent_steps": metrics["best/agent_steps"],
        "agent_steps": job.validations()[-1].steps,  # there is one at the end of every training
        "run_id": json.loads((job.folder / "workspace/metrics/mlflow.json").read_text())["run_id"],
        "policy": str(job.run_folder / "best_model.safetensors"),
    }


def work(job: Job, stop: Interrupts) -> None:
    """Train, from wherever the job was left, and note what came of it.

    Raises:
        SystemExit: It was asked to stop, or can't be done now; it may be started again.
    """
    from pipeline.agent.callbacks import EndEarly
    from pipeline.tracking.folder import RunFolderError
    from pipeline.tracking.store import TrackingError
    from pipeline.train import train

    os.environ["MLFLOW_RUN_CONTEXT"] = json.dumps(job.tags)  # MLflow's way of giving tags to a run that others begin
    if job.params.warm_start:
        _bring(job)
    try:
        if figures(job) is None:  # else killed between the end of the training and the note of it
            train(job.params, stop, [EndEarly(job.pruned.exists)])
    except (TrackingError, RunFolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(AGAIN) from None
    except Exception as error:
        if isinstance(error, OSError) and durable.is_full(error):
            print(f"error: {error}: no room to write", file=sys.stderr)
            raise SystemExit(AGAIN) from None
        traceback.print_exc()
        job.end("failed", error=traceback.format_exc())
        _tag(job, "failed", f"{type(error).__name__}: {error}")
        return
    found = figures(job)
    assert found is not None
    pruned = job.pruned.exists() and int(str(found["agent_steps"])) < job.params.total_timesteps
    job.end("pruned" if pruned else "finished", **found)
    if pruned:
        _tag(job, "pruned", f"after {found['agent_steps']} agent steps")


def _bring(job: Job) -> None:
    """Copy the policy to begin with to where the training looks for it: beside it, as in the project."""
    from pipeline.config import project_root

    source, place = project_root() / job.params.warm_start, job.folder / "workspace" / job.params.warm_start
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, place)


def _tag(job: Job, state: str, why: str) -> None:
    """Say in MLflow how the run ended, beside MLflow's own word for it."""
    from pipeline.tracking.run import Run

    run = Run.of_folder("sweep", job.run_folder)
    if run:
        with run:
            run.tags({"sweep.state": state, "sweep.why": why[:500]})


def main(folder: Path, starter: int) -> None:
    """Do the job of a folder for the process that started this one."""
    job = Job.read(folder)
    try:
        parent = psutil.Process(starter)
    except psutil.NoSuchProcess:
        raise SystemExit(AGAIN) from None
    try:
        # Held until the outcome is noted: what seems lost may still be running elsewhere, and about to finish.
        with FileLock(folder / "lock", timeout=ENDING_SECONDS), Interrupts(parent) as stop:
            if not job.outcome:
                work(job, stop)
    except Timeout:
        print(f"error: {folder} is being worked on by another process", file=sys.stderr)
        raise SystemExit(AGAIN) from None


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
