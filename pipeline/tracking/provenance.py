"""What else a run depends on: code, versions, machine, DVC experiment."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("gymnasium", "stable-baselines3", "torch", "numpy", "opencv-python", "mlflow", "dvc")
CODE = ("pipeline", "requirements.txt", "constraints.txt")
"""What makes a checkout dirty: DVC edits params.yaml and dvc.lock itself."""


def tags() -> dict[str, str]:
    """Tags that say where a run came from; values are at most a line."""
    found = {
        "mlflow.source.git.commit": _git("rev-parse", "HEAD"),
        "code_dirty": str(bool(_git("status", "--porcelain", "--", *CODE))).lower(),
        "dvc.experiment": os.environ.get("DVC_EXP_NAME", ""),
        "dvc.baseline": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "pid": f"{os.getpid()}@{platform.node()}",
        **{f"version.{name}": _version(name) for name in PACKAGES},
    }
    return {key: value for key, value in found.items() if value}


def _git(*arguments: str) -> str:
    """Output of a git command where this code lies; empty outside a repository or without git."""
    code = Path(__file__).resolve().parents[2]  # a sweep's training runs in a folder of its own
    try:
        result = subprocess.run(["git", *arguments], cwd=code, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def cpu_name() -> str:
    """The processor's name as its maker prints it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
