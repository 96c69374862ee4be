"""What ``compare`` compares: policies by the words of the command line, driven on the same tracks."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tqdm import tqdm

from pipeline.agent.policy import PolicyError, load
from pipeline.comparison import Noise, Side
from pipeline.config import EvaluateParams, recipe
from pipeline.evaluation import Episode, Evaluator
from pipeline.policy_source import Source, find, labels, members
from pipeline.score_cache import ScoreCache, drive_new
from pipeline.statistics import seed_noise
from pipeline.tracking.experiments import experiments, is_evaluated, read_json, read_params
from pipeline.tracking.history import History
from pipeline.tracking.store import TrackingError

LINE_EVERY = 30.0
"""Seconds between two lines of progress where there is no terminal."""


@dataclass(frozen=True)
class Group:
    """The policies of one word of the command line.

    Attributes:
        label: Its name in tables and charts.
        sources: One policy, or one per seed.
    """

    label: str
    sources: tuple[Source, ...]


def find_groups(words: Sequence[str], params: EvaluateParams, stack: ExitStack) -> list[Group]:
    """The policies of each word; those that are no files of this machine yet are gone when ``stack`` closes.

    Raises:
        PolicyError: A file is not a policy, or a group has the same one twice.
        TrackingError: There is no such policy.
    """
    folder = Path(stack.enter_context(TemporaryDirectory()))
    names = [members(word) for word in words]
    flat = [name for group in names for name in group]
    sources = iter([find(name, folder / str(place)) for place, name in enumerate(flat)])
    short = iter(labels(flat).values())
    groups = []
    for word, group in zip(words, names, strict=True):
        found, said = tuple(next(sources) for _ in group), [next(short) for _ in group]
        label = word if len(word) <= 24 else said[0] if len(group) == 1 else f"{said[0]} and {len(group) - 1} more"
        groups.append(Group(said[0] if len(group) == 1 else label, found))
        _check(groups[-1], params)
    return _told_apart(groups)


def _check(group: Group, params: EvaluateParams) -> None:
    digests = [hashlib.sha256(source.path.read_bytes()).digest() for source in group.sources if _loads(source, params)]
    if len(set(digests)) < len(digests):
        raise PolicyError(f"{group.label}: expected the policies of different trainings, got one of them twice")


def _loads(source: Source, params: EvaluateParams) -> bool:
    load(source.path, params)  # refused here, before any process starts
    return True


def _told_apart(groups: Sequence[Group]) -> list[Group]:
    names = [group.label for group in groups]
    return [
        Group(f"{group.label} ({place})" if names.count(group.label) > 1 else group.label, group.sources)
        for place, group in enumerate(groups, 1)
    ]


class Progress:
    """A bar on a terminal, elsewhere a line now and then; both say how long it still takes."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.began = self.said = time.monotonic()
        self.bar = tqdm(total=total, unit="drive", disable=not sys.stderr.isatty())

    def __call__(self, episode: Episode) -> None:
        self.done += 1
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and now - self.said >= LINE_EVERY:
            self.said = now
            left = (now - self.began) / self.done * (self.total - self.done)
            print(f"{self.done}/{self.total} drives, {left / 60:.1f} minutes left", file=sys.stderr, flush=True)


def drive_sides(
    groups: Sequence[Group], params: EvaluateParams, tracks: Sequence[int], folder: Path, fresh: bool
) -> list[Side]:
    """Let all policies drive all tracks, on all cores; says what was known already.

    Args:
        groups: Who drives.
        params: What an SB3 zip was trained to see.
        tracks: Track seeds.
        folder: Of the run folders, where drives are kept.
        fresh: Drive again what is known.
    """
    paths = {source.path for group in groups for source in group.sources}
    caches = {path: ScoreCache(folder, path, params) for path in sorted(paths)}
    if fresh:
        for cache in caches.values():
            cache.forget(tracks)
    known = sum(len(cache.read().keys() & set(tracks)) for cache in caches.values())
    total = len(caches) * len(tracks) - known
    if known:
        print(f"{known} of {known + total} drives are known from before (--fresh drives them again)", file=sys.stderr)
    progress = Progress(total)
    with Evaluator() as evaluator, progress.bar:
        episodes = {path: drive_new(evaluator, cache, path, tracks, params, progress) for path, cache in caches.items()}
    return [to_side(group.label, [episodes[s.path] for s in group.sources], recipes_of(group)) for group in groups]


def recipes_of(group: Group) -> list[dict[str, str] | None]:
    """What each policy of a group was trained with but for the seed, where that is known."""
    return [recipe(source.params) if source.params else None for source in group.sources]


def to_side(label: str, drives: Sequence[Sequence[Episode]], recipes: Sequence[Mapping[str, str] | None] = ()) -> Side:
    """A side of the episodes of each of its policies."""
    returns = np.array([[episode.episode_return for episode in each] for each in drives])
    laps = np.array([[float(episode.lap_finished) for episode in each] for each in drives])
    return Side(label, returns, laps, tuple(recipes))


def known_noise(sides: Sequence[Side]) -> dict[str, Noise]:
    """How much trainings of each side's recipe differ, by MLflow's runs and DVC's experiments; of those that tell."""
    if not any(side.recipe for side in sides):
        return {}
    scores: list[tuple[dict[str, str], str, float]] = []
    try:
        for run in History().evaluated():
            scores.append((recipe(run.params), run.params.get("seed", ""), run.metrics["evaluate/mean"]))
        for experiment in experiments():
            values, figures = read_params(experiment.rev), read_json(experiment.rev, "metrics/evaluate.json")
            if "mean" in figures and is_evaluated(experiment.rev):
                scores.append((recipe(values), str(values.get("seed", "")), float(figures["mean"])))
    except TrackingError as error:
        print(f"seed noise: not known ({error})", file=sys.stderr)
    found = {}
    for side in sides:
        means = {seed: score for values, seed, score in scores if side.recipe and values == side.recipe}
        if len(means) > 1:
            deviation, freedom = seed_noise([list(means.values())])
            known = f"the means of {len(means)} seeds of the recipe of {side.label} have a std of {deviation:.1f}"
            found[side.label] = Noise(deviation, freedom, known)
    return found
