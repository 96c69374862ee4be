"""Stage ``record-videos``: films of the best, the median and the worst evaluated track.

python -m pipeline.record_videos

Reads the table that ``evaluate`` left, drives those tracks again, and refuses to film a drive that is not the one
evaluated. Leaves ``videos/*.mp4``, a GIF and a film strip for ``dvc plots``, and the films in the MLflow run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Parser, RecordParams, fail, parse_args

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.agent.policy import Policy
    from pipeline.evaluation import Episode
    from pipeline.filming import Camera

log = logging.getLogger("pipeline.record_videos")

POLICY, TABLE = Path("models/best_model.safetensors"), Path("plots/tracks.csv")
FILMS, METRICS = Path("videos"), Path("metrics/record_videos.json")
GIF, STRIP = Path("plots/drive.gif"), Path("plots/filmstrip.png")
MAP, ACTIONS = Path("plots/track_map.png"), Path("plots/actions.png")
GIF_FPS = 12.5


class RecordError(Exception):
    """The films would not show what was evaluated; the message says why."""


def record(params: RecordParams, policy_path: Path = POLICY) -> dict[str, Any]:
    """The stage; returns what is written to ``metrics/record_videos.json``."""
    from pipeline.agent.policy import load
    from pipeline.evaluation import one_thread, read_table
    from pipeline.tracking.run import Run

    one_thread()  # as in the evaluation: the drives must be equal
    policy = load(policy_path)
    if not TABLE.exists():
        raise RecordError(f"{TABLE}: no such file; `python -m pipeline.evaluate` writes it")
    run = Run.attach("record-videos")
    figures: dict[str, Any] = {}
    for rank, episode in pick(read_table(TABLE), params.video_tracks):
        path = FILMS / f"{rank}.mp4"
        camera = film_evaluated(policy, episode, path, params.video_fps, f"{rank} of the evaluated tracks")
        if rank == params.video_tracks[0]:
            publish_stills(camera.stills, params.gif_seconds)
        figures[rank] = {"track": episode.track, "episode_return": episode.episode_return, "frames": episode.frames}
        log.info("%s: track %d, %.1f, %s", rank, episode.track, episode.episode_return, path)
    draw_drive(camera, rank, episode)  # the last one asked for, by default the worst: there is most to see
    with run:
        for film in (*(FILMS / f"{rank}.mp4" for rank in figures), GIF, STRIP):
            run.artifact(film, "videos")
        for picture in (MAP, ACTIONS):
            run.artifact(picture, "plots")
    METRICS.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def pick(episodes: Sequence[Episode], ranks: Sequence[str]) -> Iterator[tuple[str, Episode]]:
    """The episodes of these ranks: ``best``, ``median``, ``worst`` by return."""
    ordered = sorted(episodes, key=lambda e: e.episode_return)
    places = {"worst": 0, "median": (len(ordered) - 1) // 2, "best": len(ordered) - 1}
    for rank in ranks:
        yield rank, ordered[places[rank]]


def film_evaluated(policy: Policy, evaluated: Episode, path: Path, fps: int, title: str) -> Camera:
    """Film an evaluated drive again; returns the camera, with its stills and the drive.

    Raises:
        RecordError: This drive is not the one that was evaluated.
    """
    from pipeline.filming import film

    camera, driven = film(policy, evaluated.track, path, fps, title, frames=evaluated.frames)
    if driven != evaluated:
        raise RecordError(
            f"track {evaluated.track}: evaluated {evaluated.episode_return} in {evaluated.frames} frames, but this "
            f"drive made {driven.episode_return} in {driven.frames}. Another machine or other versions? "
            "Evaluate again: `dvc repro -f evaluate`."
        )
    return camera


def draw_drive(camera: Camera, rank: str, episode: Episode) -> None:
    """The map of the driven line, with the places where the car left the road, and how the controls were used."""
    import numpy as np

    from pipeline.media import charts

    x, y, speed, steer, gas, brake, off_road = np.array(camera.drive).T
    line, lost = np.stack([x, y], axis=1), off_road == 1
    left = np.flatnonzero(lost & ~np.roll(lost, 1))
    MAP.parent.mkdir(exist_ok=True)
    title = f"Track {episode.track}, the {rank} one: {episode.episode_return:.1f}"
    charts.track_map(camera.road, line, speed, line[left], MAP, title=title)
    charts.action_histograms(steer, gas, brake, ACTIONS)


def publish_stills(frames: Sequence[NDArray[np.uint8]], seconds: int) -> None:
    """The GIF and the film strip that ``dvc plots`` shows; ``frames`` come at 12.5 a second."""
    from PIL import Image

    from pipeline.media.video import filmstrip, write_gif

    GIF.parent.mkdir(exist_ok=True)
    start = min(len(frames) // 4, max(len(frames) - int(seconds * GIF_FPS), 0))
    write_gif(GIF, frames[start : start + int(seconds * GIF_FPS)], GIF_FPS)
    Image.fromarray(filmstrip(frames, columns=4, rows=2)).save(STRIP)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage; exit code 2 for mistakes of the user."""
    params, _ = parse_args(RecordParams, Parser(prog="python -m pipeline.record_videos", description=__doc__), argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    from pipeline.agent.policy import PolicyError
    from pipeline.tracking.store import TrackingError

    try:
        record(params)
    except (PolicyError, RecordError, TrackingError) as error:
        fail(error)


if __name__ == "__main__":
    main()
