"""What stands under the film frame in `watch`: the distributions of the actions and the value estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.media.canvas import (
    BACKGROUND,
    BRAKE,
    GAS,
    GROOVE,
    MUTED,
    PANEL,
    STEER,
    TEXT,
    TICK,
    Box,
    Color,
    Frame,
    signed,
    write,
)
from pipeline.media.overlay import SIZE as FILM_SIZE

HEIGHT = 128
SIZE = (FILM_SIZE[0], FILM_SIZE[1] + HEIGHT)
"""(width, height) of film frame and console together; both are multiples of 16."""

PLOTS = Box(20, 34, 580, 80)
HISTORY = Box(636, 34, 320, 80)
POINTS = 280
"""Places on an axis at which a density is drawn, at most one a pixel."""

AXES: dict[int, tuple[tuple[str, float, Color, Color], ...]] = {
    2: (("STEER", -1, STEER, STEER), ("BRAKE  |  GAS", -1, BRAKE, GAS)),
    3: (("STEER", -1, STEER, STEER), ("GAS", 0, GAS, GAS), ("BRAKE", 0, BRAKE, BRAKE)),
}
"""Name, lower end, and colours below and above zero of each action axis, by their number; the upper end is 1."""


@dataclass(frozen=True)
class Mind:
    """What the network makes of what it sees.

    Attributes:
        density: Probability density along each action axis, (points, n_axes).
        action: Its mean on the same axes, (n_axes,).
        values: Value estimates of the latest decisions, the newest last.
    """

    density: NDArray[np.float32]
    action: NDArray[np.float32]
    values: Sequence[float]


def with_console(film_frame: Frame, mind: Mind) -> Frame:
    """The film frame with the console below.

    Args:
        film_frame: From :func:`pipeline.media.overlay.compose`.
        mind: What to draw.

    Returns:
        (672, 976, 3) uint8 RGB, see :data:`SIZE`.
    """
    canvas = np.empty((SIZE[1], SIZE[0], 3), np.uint8)
    canvas[: FILM_SIZE[1]] = film_frame
    console = canvas[FILM_SIZE[1] :]
    console[:] = BACKGROUND
    console[:1] = GROOVE
    axes = AXES[len(mind.action)]
    width = (PLOTS.width - 20 * (len(axes) - 1)) // len(axes)
    for place, axis in enumerate(axes):
        box = Box(PLOTS.x + place * (width + 20), PLOTS.y, width, PLOTS.height)
        _draw_density(console, box, axis, mind.density[:, place], float(mind.action[place]))
    _draw_history(console, mind.values)
    return canvas


def _draw_density(
    canvas: Frame, box: Box, axis: tuple[str, float, Color, Color], density: NDArray[np.float32], action: float
) -> None:
    """The density as a hill, its peak at the top of the box whatever its height; a white line where the action is."""
    name, low, below, above = axis
    write(canvas, name, box.x, 12, size=11, color=MUTED)
    write(canvas, signed(action, "+.2f"), box.x + box.width, 10, size=13, anchor="right")
    box.of(canvas)[:] = PANEL
    places = np.linspace(low, 1, box.width)
    heights = np.interp(places, np.linspace(low, 1, len(density)), density)
    tops = box.height - np.round(heights / max(float(heights.max()), 1e-9) * (box.height - 6)).astype(int)
    inside = np.arange(box.height)[:, None] >= tops[None, :]  # (height, width)
    colors = np.where((places < 0)[:, None], below, above).astype(np.uint8)  # (width, 3)
    view = box.of(canvas)
    view[inside] = np.broadcast_to(colors, view.shape)[inside]
    if low < 0:
        view[-8:, box.width // 2] = TICK
    at = int(np.clip((action - low) / (1 - low), 0, 1) * (box.width - 2))
    view[:, at : at + 2] = TEXT


def _draw_history(canvas: Frame, values: Sequence[float]) -> None:
    """The value estimates as a line from the oldest, at the left, to the newest."""
    write(canvas, "VALUE ESTIMATE, LATEST DECISIONS", HISTORY.x, 12, size=11, color=MUTED)
    view = HISTORY.of(canvas)
    view[:] = PANEL
    if len(values) < 2:
        return
    shown = np.interp(np.linspace(0, len(values) - 1, HISTORY.width), np.arange(len(values)), values)
    low, high = float(shown.min()), float(shown.max())
    rows = np.round((HISTORY.height - 9) * (1 - (shown - low) / max(high - low, 1e-6))).astype(int) + 3
    for column, (start, end) in enumerate(pairwise(rows)):
        view[min(start, end) : max(start, end) + 2, column] = TEXT
    write(canvas, signed(high, ".1f"), HISTORY.x + HISTORY.width, 10, size=13, anchor="right")
