"""The best setting: trained again on fresh seeds, then written as a parameter file and as a DVC experiment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ruamel.yaml import YAML

from pipeline import durable
from pipeline.config import TrainParams, load, project_root
from pipeline.sweep.definition import Sweep
from pipeline.sweep.job import Job

ONLY_NAMES = {"run_name", "log_root", "n_workers"}
OUTPUTS = (
    "models/best_model.safetensors",
    "models/final_model.safetensors",
    "metrics/train.json",
    "metrics/mlflow.json",
    "plots/validation.csv",
    "plots/learning_curve.png",
)
"""What stage ``train`` leaves."""
LATER = ("metrics/evaluate.json", "metrics/record_videos.json")
"""Figures that later stages left in git, of another policy."""


def changes(sweep: Sweep, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in which a setting differs from ``params.yaml``, beside its seed."""
    mine, default = {**sweep.base.model_dump(), **chosen}, load(TrainParams).model_dump()
    return {key: mine[key] for key in mine if key not in ONLY_NAMES | {"seed"} and mine[key] != default[key]}


def write_config(sweep: Sweep, chosen: Mapping[str, Any], words: str) -> Path:
    """Write the setting as ``configs/NAME-best.yaml``, a partial parameter file; ``words`` become its comment."""
    path = project_root() / f"configs/{sweep.plan.name[:50]}-best.yaml"
    comment = "".join(f"# {line}\n" for line in words.splitlines())
    values = {"run_name": path.stem, **changes(sweep, chosen)}
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())  # JSON is YAML
    durable.publish(path, (comment + lines).encode())
    return path


def command(sweep: Sweep, chosen: Mapping[str, Any]) -> str:
    """The ``dvc`` command that trains this setting from the present ``params.yaml``."""
    return "dvc exp run " + " ".join(f"-S '{key}={value}'" for key, value in changes(sweep, chosen).items())


class ExperimentError(Exception):
    """The experiment can't be made; the message says why."""


def save_experiment(job: Job, name: str, message: str) -> None:
    """Make a finished training a DVC experiment on the present commit: ``dvc exp apply NAME`` brings it here.

    An experiment is a commit on top of its baseline, under a reference of its own. It is put together in a clone, with
    the outputs in the checkout's cache, so nothing in the checkout changes. Stage ``train`` is up to date in it;
    ``dvc repro`` evaluates and films.

    Raises:
        ExperimentError: There is no git or DVC here, or the code isn't the committed one.
    """
    root = project_root()
    if not (root / ".dvc").is_dir() or not (root / ".git").exists():
        raise ExperimentError("this folder is no repository of git and DVC")
    if _run(["git", "status", "--porcelain", "--", "pipeline", "dvc.yaml"], root):
        raise ExperimentError("pipeline/ or dvc.yaml differs from the last commit, on which an experiment rests")
    head = _run(["git", "rev-parse", "HEAD"], root)
    with TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        _run(["git", "clone", "--quiet", "--shared", str(root), str(clone)], root)
        _fill(clone, root, job)
        dvc = [sys.executable, "-m", "dvc"]
        cache = _run([*dvc, "cache", "dir"], root)
        _run([*dvc, "config", "--local", "cache.dir", str((root / cache).resolve())], clone)
        _run([*dvc, "commit", "--quiet", "--force", "train"], clone)
        author = ["-c", "user.name=sweep", "-c", "user.email=sweep@localhost"]
        _run(["git", "add", "--all"], clone)
        _run(["git", *author, "commit", "--quiet", "--no-verify", "--message", message], clone)
        reference = f"refs/exps/{head[:2]}/{head[2:]}/{name}"
        _run(["git", "push", "--quiet", "--force", str(root), f"HEAD:{reference}"], clone)


def _fill(clone: Path, root: Path, job: Job) -> None:
    """Give a clone the parameters and outputs of a training, and take away the figures of another one."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    params = yaml.load(root / "params.yaml")
    for key, value in job.params.model_dump().items():
        if key not in ONLY_NAMES and params[key] != value:
            params[key] = value
    yaml.dump(params, clone / "params.yaml")
    for output in OUTPUTS:
        (clone / output).parent.mkdir(exist_ok=True)
        shutil.copyfile(job.folder / "workspace" / output, clone / output)
    for later in LATER:
        (clone / later).unlink(missing_ok=True)


def _run(words: Sequence[str], folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "GIT_"))}
    try:
        ended = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=True
        )
    except subprocess.CalledProcessError as error:
        last = (str(error.stderr) or str(error.stdout)).strip().splitlines()
        raise ExperimentError(f"`{' '.join(words[:4])}` said: {last[-1] if last else error.returncode}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise ExperimentError(str(error)) from None
    return ended.stdout.strip()
