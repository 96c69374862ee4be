"""Where a command's policies come from: files, or versions of a registered model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.agent.policy import Policy, load
from pipeline.config import ObservationParams

HELP = "policy file, or models:/NAME@ALIAS, or models:/NAME/NUMBER of the registry"


@contextmanager
def policy_files(sources: Sequence[str]) -> Iterator[list[Path]]:
    """The policy file of each source; those from the registry are gone afterwards.

    Raises:
        TrackingError: The registry can't be reached, or has no such version.
    """
    with TemporaryDirectory() as name:
        yield [_file(source, Path(name) / str(place)) for place, source in enumerate(sources)]


def _file(source: str, folder: Path) -> Path:
    if not source.startswith("models:"):
        return Path(source)
    from pipeline.tracking.registry import fetch  # 3 s, and only for those who ask for it

    folder.mkdir()
    return fetch(source, folder)


def load_policies(sources: Sequence[str], observation: ObservationParams | None = None) -> dict[str, Policy]:
    """The policy of each source, by its label.

    Args:
        sources: As in :data:`HELP`.
        observation: What an SB3 zip was trained to see.

    Raises:
        PolicyError: A file is not a policy.
        TrackingError: The registry can't be reached, or has no such version.
    """
    with policy_files(sources) as files:
        policies = [load(file, observation) for file in files]
    return dict(zip(labels(sources).values(), policies, strict=True))


def labels(sources: Sequence[str]) -> Mapping[int, str]:
    """A short name for each source by its place: as much of the path's end as tells it from the others."""
    return {place: _label(source, [*sources[:place], *sources[place + 1 :]]) for place, source in enumerate(sources)}


def _label(source: str, others: Sequence[str]) -> str:
    if source.startswith("models:"):
        name = source.removeprefix("models:/")
        return name if source not in others else f"{name} ({source})"
    parts = Path(source).with_suffix("").parts
    for length in range(1, len(parts) + 1):
        if not any(Path(other).with_suffix("").parts[-length:] == parts[-length:] for other in others):
            return "/".join(parts[-length:])
    return source
