"""Make docs/fidelity.png: stock frames, ours and their difference in five situations.

Run it from the repository's root: ``python -m docs.make_fidelity``.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.sim.car_racing import FastCarRacing
from tests.sim.driving import Driver, donut, follow_road, leave

ENLARGED, AMPLIFIED = 3, 8
SITUATIONS: list[tuple[str, int, Driver, int]] = [
    ("zoom, frame 12", 0, follow_road, 12),
    ("road with border", 1, follow_road, 412),
    ("grass", 1, leave, 100),
    ("edge of the field", 1, leave, 160),
    ("spinning", 3, donut, 80),
]
"""Caption, track, driver and number of frames driven."""

Image = NDArray[np.uint8]


def column(caption: str, track: int, driver: Driver, frames: int) -> Image:
    """Stock, ours and amplified difference from top to bottom, with a caption."""
    env = FastCarRacing()
    env.reset(seed=track)
    for frame in range(frames):
        env.step(driver(env, frame))
    stock, ours = env.stock_picture(), env.picture()
    difference = np.abs(stock.astype(int) - ours)
    print(f"{caption:<20} mean absolute difference {difference.mean():.2f}, largest {difference.max()}")
    amplified = np.minimum(AMPLIFIED * difference, 255).astype(np.uint8)
    rows = np.concatenate([stock, ours, amplified])
    image = cv2.resize(rows, None, fx=ENLARGED, fy=ENLARGED, interpolation=cv2.INTER_NEAREST)
    image = cv2.copyMakeBorder(image, 24, 0, 3, 3, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    cv2.putText(image, caption, (8, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return np.asarray(image, np.uint8)


def main() -> None:
    """Write the picture."""
    image = np.concatenate([column(*situation) for situation in SITUATIONS], axis=1)
    cv2.imwrite(str(Path(__file__).with_suffix("").with_name("fidelity.png")), image[:, :, ::-1])


if __name__ == "__main__":
    main()
