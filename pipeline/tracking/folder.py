"""The run folder: one place per parameters and code, held by one writer, with the log of what happened."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from pipeline import durable
from pipeline.config import TrainParams, project_root

LOG = "train.log"
ENDING_SECONDS = 10.0
"""A trainer that was told to stop, or whose ``dvc`` was killed, is gone after so long: the next one waits for it."""


class RunFolderError(Exception):
    """Another process trains with the same parameters."""


def run_folder(params: TrainParams) -> Path:
    """Folder of these parameters and this code: the same again, to go on where a killed training stopped."""
    return project_root() / params.log_root / f"{params.run_name}-{params.fingerprint()}"


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold the run folder; a second trainer of the same parameters is told who does, if that one isn't ending.

    Raises:
        RunFolderError: Another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / "holder.txt"
    lock = FileLock(folder / "lock")
    try:
        held = lock.acquire(timeout=ENDING_SECONDS)
    except Timeout:
        who = holder.read_text().strip() if holder.exists() else "another process"
        raise RunFolderError(f"{folder} is being trained by {who}; wait for it, stop it, or change run_name") from None
    with held:
        holder.write_text(f"process {os.getpid()} on {platform.node()}\n")
        for torn in _torn(folder):
            torn.unlink()
        yield


def _torn(folder: Path) -> Iterator[Path]:
    """What processes killed while they published have left; not in folders below that have writers of their own."""
    for path in folder.iterdir():
        if path.is_dir():
            if not (path / "lock").exists():
                yield from _torn(path)
        elif path.suffix == ".tmp":
            yield path


def set_aside(folder: Path) -> None:
    """Move what an earlier, finished training of the same parameters left, so that nothing is written over."""
    leftovers = [path for path in folder.iterdir() if path.name not in ("lock", "holder.txt")]
    if leftovers:
        numbers = [int(number) for path in folder.glob("earlier-*") if (number := path.name[8:]).isdecimal()]
        earlier = folder / f"earlier-{max(numbers, default=0) + 1}"
        earlier.mkdir()
        for path in leftovers:
            if not path.name.startswith("earlier-"):
                path.rename(earlier / path.name)


class LogFile(logging.FileHandler):
    """The log on disk; a line for which there is no room is left out."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing where the disk is full: that ends the training, which tells it once."""
        error = sys.exc_info()[1]
        if not (isinstance(error, OSError) and durable.is_full(error)):
            super().handleError(record)


class Console(logging.Handler):
    """Log lines above the progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        tqdm.write(self.format(record), file=sys.stderr)


def start_log(folder: Path, params: TrainParams) -> None:
    """Write the effective parameters, and send the log to the run folder and to the console."""
    (folder / "config.json").write_text(params.model_dump_json(indent=2) + "\n")
    console, file = Console(), LogFile(folder / LOG, encoding="utf-8")
    console.setLevel(logging.INFO)  # the file also gets the lines that the progress bar stands for
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[console, file], force=True
    )
    logging.getLogger("pipeline").setLevel(logging.DEBUG)
    for noisy in ("alembic", "mlflow", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Of a server that is away, or a full disk under MLflow's database, the sender tells once.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
