"""Film how a training learned to drive: one track, driven by one checkpoint after the other.

python -m pipeline.timelapse [RUN_FOLDER] [--track N] [--speed N] [--checkpoints N]

RUN_FOLDER is one of ``runs/`` [default: the newest with checkpoints]. Leaves ``videos/timelapse.mp4``, and puts it into
the training's MLflow run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Parser, TrainParams, fail, integer, parse_args, project_root, track_seed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.evaluation import Episode

FILM = Path("videos/timelapse.mp4")
FPS = 50
HELD = 0.8
"""Seconds for which the last picture of each checkpoint stays."""


class RunFolderMistake(Exception):
    """The folder is not one that a training left its checkpoints in."""


def newest_run(runs: Path) -> Path:
    """The run folder with the newest checkpoint.

    Raises:
        RunFolderMistake: There is none.
    """
    found = max(runs.glob("*/checkpoints/policy_*.safetensors"), key=lambda path: path.stat().st_mtime, default=None)
    if found is None:
        raise RunFolderMistake(
            f"{runs}: expected a run folder with checkpoints/, found none; train first: `make repro`"
        )
    return found.parent.parent


def checkpoints(folder: Path, most: int) -> dict[int, Path]:
    """Policies by their agent steps, at most so many, evenly spread, the first and the last among them.

    Raises:
        RunFolderMistake: There is none.
    """
    import numpy as np

    paths = sorted((folder / "checkpoints").glob("policy_*.safetensors"))
    if not paths:
        raise RunFolderMistake(f"{folder}: expected checkpoints/policy_*.safetensors inside, found none")
    picked = np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int))
    return {int(paths[place].stem.removeprefix("policy_")): paths[place] for place in picked}


def timelapse(policies: dict[int, Path], track: int, speed: int, path: Path = FILM) -> dict[int, Episode]:
    """Film the drives one after the other, ``speed`` times as fast as they were; returns them by agent steps.

    Raises:
        PolicyError: A checkpoint can't be read.
        FilmError: The film can't be written.
    """
    from pipeline.agent.policy import load
    from pipeline.evaluation import drive, one_thread
    from pipeline.filming import Camera
    from pipeline.media.overlay import SIZE
    from pipeline.media.video import FilmWriter
    from pipeline.sim.env import make_env

    one_thread()
    episodes: dict[int, Episode] = {}
    path.parent.mkdir(exist_ok=True)
    with FilmWriter(path, SIZE, FPS, crf=24) as film:
        for steps, file in policies.items():
            shown: list[NDArray[np.uint8]] = []

            def write(picture: NDArray[np.uint8], shown: list[NDArray[np.uint8]] = shown) -> None:
                shown[:] = [picture]
                film.write(picture)

            policy = load(file)
            camera = Camera(policy, f"after {steps:,} steps of training", write, every=speed, keep_stills=False)
            env = make_env(policy.observation, render_mode="rgb_array", on_frame=camera.on_frame)
            episodes[steps] = drive(policy, track, env, camera.on_decision)
            for _ in range(round(HELD * FPS)):
                film.write(shown[0])
    return episodes


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 2 for mistakes of the user."""
    parser = Parser(prog="python -m pipeline.timelapse", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, metavar="RUN_FOLDER", help="[default: the newest in runs/]")
    parser.add_argument("--track", type=track_seed, metavar="N", help="seed [default: the first validation track]")
    parser.add_argument(
        "--speed", type=integer(1, 1000), default=4, metavar="N", help="times as fast as real [default 4]"
    )
    parser.add_argument(
        "--checkpoints", type=integer(1, 1000), default=8, metavar="N", help="at most so many [default 8]"
    )
    params, arguments = parse_args(TrainParams, parser, argv)
    track = params.validation_seed if arguments.track is None else arguments.track
    try:
        folder = arguments.folder or newest_run(project_root() / params.log_root)
        policies = checkpoints(folder, arguments.checkpoints)
    except RunFolderMistake as error:
        fail(error)
    _film(folder, policies, track, arguments.speed)


def _film(folder: Path, policies: dict[int, Path], track: int, speed: int) -> None:
    from pipeline.agent.policy import PolicyError
    from pipeline.media.video import FilmError
    from pipeline.tracking.run import Run
    from pipeline.tracking.store import TrackingError

    for noisy in ("alembic", "mlflow"):  # after its import, which sets its own level
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        for steps, episode in timelapse(policies, track, speed).items():
            print(f"after {steps:>9,} steps: {episode.episode_return:7.1f}, {episode.tiles} of {episode.n_tiles} tiles")
        run = Run.of_folder("timelapse", folder)
        if run:
            with run:
                run.artifact(FILM, "videos")
        print(f"{FILM}{'' if run else '; not in MLflow, which does not know this training'}")
    except (PolicyError, FilmError, TrackingError) as error:
        fail(error)


if __name__ == "__main__":
    main()
