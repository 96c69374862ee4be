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

from pipeline.config import TrainParams, project_root

LOG = "train.log"


class RunFolderError(Exception):
    """Another process trains with the same parameters."""


def run_folder(params: TrainParams) -> Path:
    """Folder of these parameters and this code: the same again, to go on where a killed training stopped."""
    return project_root() / params.log_root / f"{params.run_name}-{params.fingerprint()}"


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold the run folder; a second trainer of the same parameters is told who does.

    Raises:
        RunFolderError: Another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / "holder.txt"
    try:
        with FileLock(folder / "lock", timeout=0):
            holder.write_text(f"process {os.getpid()} on {platform.node()}\n")
            yield
    except Timeout:
        who = holder.read_text().strip() if holder.exists() else "another process"
        raise RunFolderError(f"{folder} is being trained by {who}; wait for it, stop it, or change run_name") from None


def set_aside(folder: Path) -> None:
    """Move what an earlier, finished training of the same parameters left, so that nothing is written over."""
    leftovers = [path for path in folder.iterdir() if path.name not in ("lock", "holder.txt")]
    if leftovers:
        earlier = folder / f"earlier-{sum(1 for _ in folder.glob('earlier-*')) + 1}"
        earlier.mkdir()
        for path in leftovers:
            if not path.name.startswith("earlier-"):
                path.rename(earlier / path.name)


class Console(logging.Handler):
    """Log lines above the progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        tqdm.write(self.format(record), file=sys.stderr)


def start_log(folder: Path, params: TrainParams) -> None:
    """Write the effective parameters, and send the log to the run folder and to the console."""
    (folder / "config.json").write_text(params.model_dump_json(indent=2) + "\n")
    console, file = Console(), logging.FileHandler(folder / LOG, encoding="utf-8")
    console.setLevel(logging.INFO)  # the file also gets the lines that the progress bar stands for
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[console, file], force=True
    )
    logging.getLogger("pipeline").setLevel(logging.DEBUG)
    for noisy in ("alembic", "mlflow", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
