"""Make the README's pictures: the champion's moving picture and map, `watch`, MLflow's comparison, the report.

Run it from the repository's root after ``make test-browser``, which leaves pictures of the pages in ``.ci/artifacts/``:
``python -m docs.make_pictures [TRACK]``.
"""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.agent.policy import load
from pipeline.evaluation import drive, one_thread
from pipeline.filming import Camera
from pipeline.media import charts
from pipeline.media.console import POINTS, Mind, with_console
from pipeline.media.video import write_gif
from pipeline.sim.env import make_env

CHAMPION, DOCS, PAGES = Path("models/champion.safetensors"), Path("docs"), Path(".ci/artifacts")
TRACK = 10_000
GIF_FPS, GIF_SECONDS, GIF_BEGINS = 12.5, 8, 1.5
SHOWN_AT = 150
"""Physics frame of the picture of `watch`."""
SCREENSHOTS = {"test_two_runs_compared_are_two_curves": "comparison", "report-one": "report"}
SCREENSHOT_SIZE = (1000, 640)


def drive_champion(track: int) -> None:
    """The moving picture, the map and the picture of `watch`, all of one drive."""
    one_thread()
    policy = load(CHAMPION)
    values: deque[float] = deque(maxlen=120)
    shown: list[NDArray[np.uint8]] = []
    mind: list[Mind] = []

    def on_decision(observation: NDArray[np.uint8]) -> None:
        camera.on_decision(observation)
        values.append(camera.value)
        mean = policy.predict_axes(observation[None])[0]
        mind[:] = [Mind(policy.density(observation, POINTS), mean, tuple(values))]

    def write(picture: NDArray[np.uint8]) -> None:
        if len(camera.drive) == SHOWN_AT:
            shown.append(with_console(picture, mind[0]))

    camera = Camera(policy, CHAMPION.stem, write)
    episode = drive(
        policy, track, make_env(policy.observation, "LazyCarRacing-v3", "rgb_array", camera.on_frame), on_decision
    )
    begin = round(GIF_BEGINS * GIF_FPS)
    write_gif(DOCS / "drive.gif", camera.stills[begin : begin + round(GIF_SECONDS * GIF_FPS)], GIF_FPS, max_width=400)
    save(shown[0], DOCS / "watch.png")
    x, y, speed, *_, off_road = np.array(camera.drive).T
    line, left = np.stack([x, y], axis=1), np.flatnonzero(np.diff(off_road == 1, prepend=False) & (off_road == 1))
    title = f"The champion on track {track}: {episode.episode_return:.1f}"
    charts.track_map(camera.road, line, speed, line[left], DOCS / "champion_map.png", title=title)


def save(picture: Any, path: Path) -> None:
    """Write a PNG of 256 colours, a third of the size."""
    Image.fromarray(np.asarray(picture)).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def shrink_screenshots() -> None:
    """The upper part of two pages, small enough for a README."""
    width, height = SCREENSHOT_SIZE
    for name, target in SCREENSHOTS.items():
        with Image.open(PAGES / f"{name}.png") as page:
            part = page.convert("RGB").crop((0, 0, page.width, min(page.height, round(page.width * height / width))))
            save(
                part.resize((width, round(width * part.height / part.width)), Image.Resampling.LANCZOS),
                DOCS / f"{target}.png",
            )


def main() -> None:
    """Make all of them."""
    drive_champion(int(sys.argv[1]) if len(sys.argv) > 1 else TRACK)
    shrink_screenshots()
    for path in sorted(DOCS.glob("*.gif")) + sorted(DOCS.glob("*.png")):
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
