"""Watch the shipped champion drive a track it has never seen.

python -m pipeline.demo [--policy FILE] [--track N]

Drives and films one track, by default another one each time; leaves ``videos/demo.mp4``. If MLflow's registry has no
champion yet, the policy becomes its first.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import FIRST_TRAINING_TRACK, Parser, PromoteParams, fail, parse_args, track_bounds, track_seed

CHAMPION = Path("models/champion.safetensors")
SCORE = CHAMPION.with_suffix(".json")
"""What ``pipeline.evaluate --json`` said of the shipped champion."""
FILM = Path("videos/demo.mp4")


def demo(params: PromoteParams, policy_path: Path = CHAMPION, track: int | None = None) -> str:
    """Film one drive and see to it that there is a champion; returns what was done, in words.

    Raises:
        PolicyError: The file is not a policy of this project.
        TrackingError: MLflow can't be used.
        FilmError: The film can't be written.
    """
    from pipeline.agent.policy import load
    from pipeline.evaluation import one_thread
    from pipeline.filming import film

    one_thread()
    policy = load(policy_path)
    track = new_track(params.tracks) if track is None else track
    _, episode = film(policy, track, FILM, 50, policy_path.stem)
    lap = f"a lap of {episode.n_tiles} tiles" if episode.lap_finished else f"{episode.tiles} of {episode.n_tiles} tiles"
    drive = f"track {track}: return {episode.episode_return:.1f}, {lap} in {episode.frames / 50:.1f} s"
    return f"{drive} -> {FILM}\n{crown(params, policy_path)}"


def new_track(test_tracks: str) -> int:
    """A track that nobody has trained on, chosen by or been tested on."""
    return random.SystemRandom().randrange(max(20_000, track_bounds(test_tracks)[1]), FIRST_TRAINING_TRACK)


def crown(params: PromoteParams, policy_path: Path) -> str:
    """Register the policy as champion if there is none; returns what was done."""
    from pipeline.agent.policy import load, spaces_of
    from pipeline.tracking.registry import CHAMPION as ALIAS
    from pipeline.tracking.registry import Registry

    registry = Registry(params.registered_model)
    if champion := registry.champion():
        return f"{params.registered_model} has a champion, version {champion.number}: nothing is registered."
    score = json.loads(SCORE.read_text()) if policy_path == CHAMPION and SCORE.exists() else {}
    tags = {f"evaluate/{key}": str(score[key]) for key in ("mean", "std") if key in score}
    observation, _ = spaces_of(load(policy_path).observation)
    version = registry.register(policy_path, observation.shape, None, tags)
    registry.point(ALIAS, version)
    return f"{policy_path} is registered as {params.registered_model} version {version.number}, the first champion."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 2 for mistakes of the user."""
    parser = Parser(prog="python -m pipeline.demo", description=__doc__)
    parser.add_argument("--policy", type=Path, default=CHAMPION, metavar="FILE", help=f"[default {CHAMPION}]")
    parser.add_argument(
        "--track", type=track_seed, metavar="N", help="seed of the track [default: another one each time]"
    )
    params, arguments = parse_args(PromoteParams, parser, argv)
    from pipeline.agent.policy import PolicyError
    from pipeline.media.video import FilmError
    from pipeline.tracking.store import TrackingError, in_one_message

    for noisy in ("alembic", "mlflow"):  # after its import, which sets its own level
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        with in_one_message():
            print(demo(params, arguments.policy, arguments.track))
    except (PolicyError, FilmError, TrackingError) as error:
        fail(error)


if __name__ == "__main__":
    main()
