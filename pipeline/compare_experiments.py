"""DVC's experiments for ``compare --experiments``: grouped by all parameters but the seed, a group a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.compare_sides import to_side
from pipeline.comparison import Side, differing
from pipeline.config import recipe
from pipeline.evaluation import Episode, parse_table
from pipeline.tracking.experiments import TRACKS, Experiment, chosen, code_of, is_evaluated, read_params, read_text
from pipeline.tracking.store import TrackingError

CODE = "code"
"""Stands among the parameters for the code that trained, by DVC's digests."""


@dataclass(frozen=True)
class Scored:
    """An experiment with its tracks.

    Attributes:
        experiment: Of DVC.
        recipe: What it was trained with, but for the seed; :data:`CODE` among it.
        seed: Of the training.
        episodes: Of the evaluated tracks, in the order of their seeds.
    """

    experiment: Experiment
    recipe: Mapping[str, str]
    seed: str
    episodes: tuple[Episode, ...]

    @property
    def tracks(self) -> tuple[int, ...]:
        """Seeds of the evaluated tracks."""
        return tuple(episode.track for episode in self.episodes)


def sides_of(names: Sequence[str]) -> tuple[list[Side], tuple[int, ...], list[str]]:
    """The groups of these experiments, the tracks that all of them drove, and what else is to be said.

    The group of the experiment named first, or of the oldest, is the one that the others are compared with.

    Raises:
        TrackingError: There is no such experiment, or none with a table of tracks.
    """
    found = chosen(names)
    scored = [each for each in map(read, found) if each]
    if not scored:
        raise TrackingError(
            f"expected DVC experiments that were evaluated, got none of {len(found)}; "
            "`dvc exp run --queue -S 'seed=range(0,3)'` and `dvc exp run --run-all` make some"
        )
    notes = [f"{len(found) - len(scored)} experiments were not evaluated"] if len(scored) < len(found) else []
    tracks = scored[0].tracks
    same = [each for each in scored if each.tracks == tracks]
    if others := [each.experiment.name for each in scored if each.tracks != tracks]:
        notes.append(f"left out, since they drove other tracks than {same[0].experiment.name}: {', '.join(others)}")
    groups: dict[tuple[tuple[str, str], ...], dict[str, Scored]] = {}
    for each in same:
        group = groups.setdefault(tuple(sorted(each.recipe.items())), {})
        if each.seed in group:
            notes.append(f"{each.experiment.name} is the training of {group[each.seed].experiment.name}: counted once")
        group.setdefault(each.seed, each)
    keys = differing([dict(key) for key in groups])
    sides = []
    for key, group in groups.items():
        label = name_of(dict(key), keys)
        notes.append(f"{label}: " + ", ".join(f"{each.experiment.name} (seed {seed})" for seed, each in group.items()))
        sides.append(to_side(label, [each.episodes for each in group.values()], [dict(key)] * len(group)))
    return sides, tracks, notes


def read(experiment: Experiment) -> Scored | None:
    """An experiment's training and tracks, off its commit; None before ``evaluate``."""
    text = read_text(experiment.rev, TRACKS) if is_evaluated(experiment.rev) else ""
    values = read_params(experiment.rev)
    episodes = tuple(sorted(parse_table(text), key=lambda episode: episode.track)) if text else ()
    if not episodes:
        return None
    trained = {**recipe(values), CODE: code_of(experiment.rev)}
    return Scored(experiment, trained, str(values.get("seed")), episodes)


def name_of(values: Mapping[str, str], keys: Sequence[str]) -> str:
    """A group by the parameters in which the groups differ."""
    return ", ".join(f"{key}={values.get(key, '–')}" for key in keys) or "all"
