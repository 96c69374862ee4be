"""Starts one training of a sweep as a process of its own, on this machine or inside a task of Ray's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

OUTPUT = "output.txt"
CODE = Path(__file__).resolve().parents[2]
"""The folder of the package, from which the process imports it."""
STOPPING_SECONDS = 12.0
"""A training that was told to stop is gone after 10 s."""


def launch(folder: Path, root: Path, cores: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the job of a folder; what it prints is added to ``output.txt`` there.

    It gets a share of the machine's cores, and stops when this process is gone.

    Args:
        folder: The job's.
        root: The project's.
        cores: How many it may use.
        environment: Variables beside those of this process.
    """
    workspace = folder / "workspace"
    workspace.mkdir(exist_ok=True)
    share = {"PYTHON_CPU_COUNT": str(cores), "OMP_NUM_THREADS": str(cores)}
    mine = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}  # it is no stage
    places = {"DVC_ROOT": str(root), "PYTHONPATH": os.pathsep.join([str(CODE), mine.get("PYTHONPATH", "")])}
    with (folder / OUTPUT).open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.sweep.job", str(folder), str(os.getpid())],
            cwd=workspace,
            env={**mine, **environment, **share, **places},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the sweep, which passes it on
        )


def end(process: subprocess.Popen[bytes], seconds: float = STOPPING_SECONDS) -> None:
    """Ask a job to save its state and end, and wait for that."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
