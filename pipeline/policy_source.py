"""Where a command's policies come from: files, versions of a registered model, runs in MLflow, DVC experiments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.agent.policy import Policy, load
from pipeline.config import ObservationParams

if TYPE_CHECKING:
    from pipeline.tracking.experiments import Experiment
    from pipeline.tracking.history import History, Trained

HELP = (
    "policy file, models:/NAME@ALIAS or models:/NAME/NUMBER of the registry, a DVC experiment, a run in MLflow "
    "(id, or of a name the newest), or runs:/ID/PATH"
)
SCHEMES = ("models:", "runs:")
SUFFIXES = (".safetensors", ".zip")


@dataclass(frozen=True)
class Source:
    """A policy and where it comes from.

    Attributes:
        name: What it is called, as it was asked for.
        path: The policy file.
        params: What it was trained with, where that is known.
    """

    name: str
    path: Path
    params: Mapping[str, Any] | None = None


@contextmanager
def policy_files(references: Sequence[str]) -> Iterator[list[Path]]:
    """The policy file of each reference; those from the registry, MLflow or DVC are gone afterwards.

    Raises:
        TrackingError: See :func:`find`.
    """
    with TemporaryDirectory() as name:
        yield [find(reference, Path(name) / str(place)).path for place, reference in enumerate(references)]


def find(reference: str, folder: Path) -> Source:
    """The policy that a reference names, spelled as in :data:`HELP`; what is no file yet becomes one in ``folder``.

    Raises:
        TrackingError: There is no such policy, or what keeps it can't be reached.
    """
    if is_file(reference):
        return Source(reference, Path(reference), _beside(Path(reference)))
    folder.mkdir(parents=True, exist_ok=True)
    if reference.startswith("models:"):
        return _registered(reference, folder)
    if experiment := _experiment(reference):
        from pipeline.tracking.experiments import fetch_policy, read_params

        return Source(reference, fetch_policy(experiment, folder), read_params(experiment.rev))
    return _of_run(reference, folder)


def members(reference: str) -> list[str]:
    """The policies of one word of the command line: of some joined by commas each, of a parent run those below it.

    Raises:
        TrackingError: It might be a run, and MLflow can't be reached or has none of that name.
    """
    if "," in reference and not is_file(reference):
        return [name for name in reference.split(",") if name]
    if is_file(reference) or reference.startswith(SCHEMES) or _experiment(reference):
        return [reference]
    from pipeline.tracking.history import History

    history = History()
    below = history.children(_known(history, reference, reference).id)
    return [run.id for run in reversed(below) if "seed" in run.params] or [reference]


def is_file(reference: str) -> bool:
    """Whether this is a file, or was meant as one."""
    if reference.startswith(SCHEMES):
        return False
    return Path(reference).is_file() or ("," not in reference and reference.endswith(SUFFIXES))


def _experiment(name: str) -> Experiment | None:
    """The newest DVC experiment of this name."""
    from pipeline.tracking.experiments import experiments  # reads no MLflow, but brings it: 3 s

    return next((found for found in reversed(experiments()) if found.name == name), None)


def _registered(uri: str, folder: Path) -> Source:
    from pipeline.tracking.history import History
    from pipeline.tracking.registry import resolve

    registry, version = resolve(uri)
    path = registry.download(version, folder)
    return Source(uri, path, History().short(version.run_id).params if version.run_id else None)


def _of_run(reference: str, folder: Path) -> Source:
    from pipeline.tracking.history import POLICY, History

    history = History()
    run_id, _, path = reference.removeprefix("runs:/").partition("/")
    run = _known(history, run_id, reference)
    return Source(reference, history.policy(run.id, path or POLICY, folder), run.params)


def _known(history: History, run_id: str, reference: str) -> Trained:
    """The run, or else what was expected of a word that names no run either."""
    from pipeline.tracking.store import TrackingError

    try:
        return history.short(run_id)
    except TrackingError:
        raise TrackingError(f"{reference}: expected {HELP}; there is none of this name") from None


def _beside(path: Path) -> Mapping[str, Any] | None:
    """The parameters in a run folder's ``config.json``, beside its policy or its folder of checkpoints."""
    for folder in path.resolve().parents[:2]:
        try:
            return dict(json.loads((folder / "config.json").read_text()))
        except (OSError, ValueError):
            continue
    return None


def load_policies(references: Sequence[str], observation: ObservationParams | None = None) -> dict[str, Policy]:
    """The policy of each reference, by its label.

    Args:
        references: As in :data:`HELP`.
        observation: What an SB3 zip was trained to see.

    Raises:
        PolicyError: A file is not a policy.
        TrackingError: See :func:`find`.
    """
    with policy_files(references) as files:
        policies = [load(file, observation) for file in files]
    return dict(zip(labels(references).values(), policies, strict=True))


def labels(references: Sequence[str]) -> Mapping[int, str]:
    """A short name for each by its place: as much of the path's end as tells it from the others."""
    others = [[*references[:place], *references[place + 1 :]] for place in range(len(references))]
    return {place: _label(reference, others[place]) for place, reference in enumerate(references)}


def _label(reference: str, others: Sequence[str]) -> str:
    if reference.startswith("models:"):
        name = reference.removeprefix("models:/")
        return name if reference not in others else f"{name} ({reference})"
    if not is_file(reference):
        return reference
    parts = Path(reference).with_suffix("").parts
    for length in range(1, len(parts) + 1):
        if not any(Path(other).with_suffix("").parts[-length:] == parts[-length:] for other in others):
            return "/".join(parts[-length:])
    return reference
