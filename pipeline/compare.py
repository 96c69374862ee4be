"""Race policies against each other on the same track.

python -m pipeline.compare A B [C ...] --race [--track N ...]

Each policy is a file or a version of the registry (``models:/carracing-ppo@champion``). All of them drive the same
track on the stock game, deterministically, as ``evaluate`` does; the film ``videos/race-TRACK.mp4`` shows them side by
side, the others as ghosts, with the gap to the leader in seconds and in tiles. Prints what each of them scored there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import EvaluateParams, Parser, fail, parse_args, track_bounds, track_seed

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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 2 for mistakes of the user."""
    parser = Parser(prog="python -m pipeline.compare", description=__doc__)
    parser.add_argument("policies", nargs="+", metavar="POLICY", help="file, models:/NAME@ALIAS or models:/NAME/NUMBER")
    parser.add_argument("--race", action="store_true", help="film them side by side on the same track")
    parser.add_argument(
        "--track",
        type=track_seed,
        nargs="+",
        metavar="N",
        help="seeds of the tracks, a film each [default: the first of tracks]",
    )
    params, arguments = parse_args(EvaluateParams, parser, argv)
    tracks = arguments.track or [track_bounds(params.tracks)[0]]
    if not arguments.race:
        fail("expected --race: a race is what this command knows")
    from pipeline.media.race import MAX_RACERS

    if not 2 <= len(arguments.policies) <= MAX_RACERS:
        fail(f"expected 2 to {MAX_RACERS} policies, got {len(arguments.policies)}")
    if len(set(arguments.policies)) < len(arguments.policies):
        fail("expected different policies, got one of them twice")
    _race(params, arguments.policies, tracks)


def _race(params: EvaluateParams, sources: Sequence[str], tracks: Sequence[int]) -> None:
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


if __name__ == "__main__":
    main()
