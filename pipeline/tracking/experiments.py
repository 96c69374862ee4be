"""DVC's experiments as git holds them: commits with the parameters, scores and tracks of their stages.

An experiment that DVC took from its cache has all of this, though nothing of it ran and MLflow was told nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.config import project_root
from pipeline.tracking.store import TrackingError, first_line

EXPERIMENT_REF = re.compile(r"refs/exps/(?P<start>[0-9a-f]{2})/(?P<rest>[0-9a-f]{38})/(?P<name>[^/]+)")
"""DVC's ``refs/exps/<baseline>/<name>``; its queue and its running experiments have refs of other forms."""
POLICY = "models/best_model.safetensors"
TRACKS = "plots/tracks.csv"


@dataclass(frozen=True)
class Experiment:
    """A DVC experiment.

    Attributes:
        name: As in ``dvc exp show``.
        rev: Its git commit.
        run_id: The MLflow run that its stages wrote to.
        baseline: The commit it began from.
    """

    name: str
    rev: str
    run_id: str
    baseline: str


def experiments() -> list[Experiment]:
    """All DVC experiments of this repository whose ``train`` stage wrote a run id, oldest first."""
    found = []
    refs = git("for-each-ref", "--sort=creatordate", "--format=%(refname) %(objectname)", "refs/exps")
    for ref, rev in map(str.split, refs.splitlines()):
        match, run_id = EXPERIMENT_REF.fullmatch(ref), read_json(rev, "metrics/mlflow.json").get("run_id")
        if match and run_id:
            found.append(Experiment(match["name"], rev, run_id, match["start"] + match["rest"]))
    return found


def chosen(names: Sequence[str]) -> list[Experiment]:
    """The experiments of these names, or begun from these commits (branches, tags); all of them if none is named.

    Raises:
        TrackingError: There is no such experiment.
    """
    known = experiments()
    found: dict[str, Experiment] = {}
    for name in names:
        commit = git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").strip()
        these = [e for e in known if name == e.name or (commit and commit in (e.rev, e.baseline))]
        if not these:
            raise TrackingError(
                f"{name}: expected the name of a DVC experiment that was trained, or a commit that some began from; "
                "`dvc exp list -A` lists them"
            )
        found |= {e.rev: e for e in these}
    return list(found.values()) if names else known


def git(*arguments: str) -> str:
    """Output of a git command in the project; empty when it fails."""
    try:
        result = subprocess.run(["git", *arguments], cwd=project_root(), capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout


def read_text(rev: str, path: str) -> str:
    """A file of a commit; empty if it isn't there."""
    return git("show", f"{rev}:./{path}")


def read_json(rev: str, path: str) -> dict[str, Any]:
    """A JSON file of a commit; empty if it isn't there."""
    text = read_text(rev, path)
    return dict(json.loads(text)) if text else {}


def read_params(rev: str) -> dict[str, Any]:
    """``params.yaml`` of a commit; empty if it isn't there."""
    return _read_yaml(rev, "params.yaml")


def _read_yaml(rev: str, path: str) -> dict[str, Any]:
    return dict(YAML(typ="safe", pure=True).load(read_text(rev, path)) or {})


def code_of(rev: str) -> str:
    """Eight hex digits that name the code which ``train`` ran, by DVC's digests of what it depends on."""
    deps = _locked(rev, "train").get("deps", [])
    return hashlib.sha256(json.dumps(deps).encode()).hexdigest()[:8]


def is_evaluated(rev: str) -> bool:
    """Whether the scores in a commit are those of the policy trained for it; else an earlier one's lie there."""
    left = _digest(_locked(rev, "train").get("outs", []))
    return left is not None and left == _digest(_locked(rev, "evaluate").get("deps", []))


def _locked(rev: str, stage: str) -> dict[str, Any]:
    return dict(_read_yaml(rev, "dvc.lock").get("stages", {}).get(stage, {}))


def _digest(files: Sequence[Mapping[str, Any]]) -> str | None:
    return next((file.get("md5") for file in files if file.get("path") == POLICY), None)


def fetch_policy(experiment: Experiment, folder: Path) -> Path:
    """The experiment's best policy, from DVC's cache or its remote, in ``folder``.

    Raises:
        TrackingError: It is in neither.
    """
    import dvc.api  # 1 s
    from dvc.exceptions import DvcException

    try:
        data: bytes = dvc.api.read(POLICY, repo=str(project_root()), rev=experiment.rev, mode="rb")
    except (DvcException, OSError) as error:
        raise TrackingError(
            f"{experiment.name}: DVC has no {POLICY} of this experiment ({first_line(error)}). "
            "`dvc exp pull` or `dvc pull` may get it; it is gone if `dvc gc` removed it"
        ) from None
    path = folder / Path(POLICY).name
    path.write_bytes(data)
    return path
