"""A race of policies on the same track, for ``compare --race``: the film ``videos/race-TRACK.mp4``, and the scores.

All drive on the stock game, deterministically, as ``evaluate`` does; the film shows them side by side, the others as
ghosts, with the gap to the leader in seconds and in tiles.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import EvaluateParams, fail

if TYPE_CHECKING:
    from pipeline.agent.policy import Policy
    from pipeline.racing import Racer

FILMS = Path("videos")
FPS = 50
HELD = 2.0
"""Seconds that the result stays on the screen."""


def film_race(policies: Mapping[str, Policy], track: int, path: Path) -> list[Racer]:
    """Let all of them drive one track, and film it; returns the racers as they finished.

    Raises:
        FilmError: The film can't be written.
    """
    from tqdm import tqdm

    from pipeline.media.race import race_size
    from pipeline.media.video import FilmWriter
    from pipeline.racing import Racer, draw_race, policy_moments, race

    racers = [Racer(name) for name in policies]
    title = f"Track {track}"
    size = race_size(len(racers), len(racers))
    bar = tqdm(desc=path.stem, unit="frame", disable=not sys.stderr.isatty())
    with FilmWriter(path, size, FPS, crf=24) as film, bar:
        for _ in race(racers, [policy_moments(policy, track) for policy in policies.values()]):
            film.write(draw_race(racers, title))
            bar.update()
        result = draw_race(racers, title)
        for _ in range(round(HELD * FPS)):
            film.write(result)
    return racers


def table(racers: Sequence[Racer]) -> str:
    """What each of them scored, best first."""
    width = max(len("policy"), *(len(racer.name) for racer in racers))
    lines = [f"{'policy':<{width}}  {'return':>8}  {'tiles':>9}  {'time':>7}  lap"]
    for racer in sorted(racers, key=lambda racer: -racer.now.episode_return):
        now = racer.now
        lap = "finished" if now.lap_finished else "not finished"
        tiles = f"{now.tiles}/{now.n_tiles}"
        lines.append(f"{racer.name:<{width}}  {now.episode_return:8.1f}  {tiles:>9}  {racer.seconds:5.2f} s  {lap}")
    return "\n".join(lines)


def film_races(params: EvaluateParams, sources: Sequence[str], tracks: Sequence[int]) -> None:
    """Film the race of these policies on each track, and print what they scored; exits for mistakes of users."""
    from pipeline.media.race import MAX_RACERS

    if not 2 <= len(sources) <= MAX_RACERS:
        fail(f"expected 2 to {MAX_RACERS} policies, got {len(sources)}")
    if len(set(sources)) < len(sources):
        fail("expected different policies, got one of them twice")
    from pipeline.agent.policy import PolicyError
    from pipeline.evaluation import one_thread
    from pipeline.media.video import FilmError
    from pipeline.policy_source import load_policies
    from pipeline.tracking.store import TrackingError

    try:
        policies = load_policies(sources, params)
        one_thread()
        for track in tracks:
            path = FILMS / f"race-{track}.mp4"
            racers = film_race(policies, track, path)
            print(f"track {track} -> {path}\n{table(racers)}")
    except (PolicyError, FilmError, TrackingError) as error:
        fail(error)
