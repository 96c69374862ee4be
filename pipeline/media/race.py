"""One frame of a race: every car's picture with the others as ghosts, who leads, and the gaps in seconds and tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.media.canvas import (
    BACKGROUND,
    BRAKE,
    GAS,
    GROOVE,
    MUTED,
    PANEL,
    TEXT,
    Box,
    Color,
    Frame,
    fill,
    fit,
    resize,
    signed,
    write,
)

COLORS: tuple[Color, ...] = (
    (86, 180, 233),
    (240, 228, 66),
    (204, 121, 167),
    (230, 159, 0),
    (0, 158, 115),
    (213, 94, 0),
)
"""Okabe and Ito's palette, one a racer."""
MAX_RACERS = len(COLORS)

WIDTH = 976
GAP, HEADER, FACTS, LANE = 16, 56, 92, 18


@dataclass(frozen=True)
class Standing:
    """What is written of a racer.

    Attributes:
        name: Of the policy, or of the person.
        picture: The game's picture with the ghosts in it, (400, 600, 3) uint8; None for a racer without a panel.
        episode_return: Raw return so far.
        tiles: Tiles visited.
        n_tiles: Tiles of the track.
        progress: Tiles from the start.
        seconds: Game time driven.
        gap_seconds: Behind the leader.
        gap_tiles: Behind the leader; 0 and ``leads`` for the leader.
        leads: Nobody is farther.
        out: It drives no more.
        lap_finished: All tiles were visited.
    """

    name: str
    picture: Frame | None
    episode_return: float
    tiles: int
    n_tiles: int
    progress: int
    seconds: float
    gap_seconds: float
    gap_tiles: int
    leads: bool
    out: bool
    lap_finished: bool


def race_size(panels: int, racers: int) -> tuple[int, int]:
    """(width, height) of a frame with that many pictures and that many lanes, both even."""
    _, rows, _, height = _grid(panels)
    return WIDTH, HEADER + rows * (height + FACTS) + racers * LANE + GAP


def compose_race(standings: Sequence[Standing], title: str, seconds: float) -> Frame:
    """Draw a frame.

    Args:
        standings: The racers, at most :data:`MAX_RACERS`, always in the same order.
        title: Shown at the top.
        seconds: Game time since the start.

    Returns:
        (height, width, 3) uint8 RGB, see :func:`race_size`.
    """
    shown = [
        (standing, color) for standing, color in zip(standings, COLORS, strict=False) if standing.picture is not None
    ]
    width, height = race_size(len(shown), len(standings))
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = BACKGROUND
    write(canvas, fit(title, 700, 18), GAP, 17, size=18, bold=True)
    write(canvas, f"{seconds:.2f} s", width - GAP, 12, size=24, bold=True, anchor="right")
    columns, _, picture_width, picture_height = _grid(len(shown))
    for place, (standing, color) in enumerate(shown):
        x = _left(columns, picture_width) + (place % columns) * (picture_width + GAP)
        y = HEADER + (place // columns) * (picture_height + FACTS)
        _draw_panel(canvas, standing, color, Box(x, y, picture_width, picture_height))
    for lane, (standing, color) in enumerate(zip(standings, COLORS, strict=False)):
        _draw_lane(canvas, standing, color, height - GAP - (len(standings) - lane) * LANE)
    return canvas


def _grid(panels: int) -> tuple[int, int, int, int]:
    """Columns, rows, and width and height of each picture."""
    columns = {1: 1, 2: 2, 4: 2}.get(panels, 3)
    width = 720 if columns == 1 else (WIDTH - (columns + 1) * GAP) // columns
    return columns, -(-panels // columns), width, width * 2 // 3


def _left(columns: int, width: int) -> int:
    return (WIDTH - columns * width - (columns - 1) * GAP) // 2


def _draw_panel(canvas: Frame, standing: Standing, color: Color, box: Box) -> None:
    assert standing.picture is not None
    box.of(canvas)[:] = resize(standing.picture, box.width, box.height)
    if standing.out:
        box.of(canvas)[:] = (box.of(canvas) * 0.45).astype(np.uint8)
        _write_end(canvas, standing, box)
    facts = Box(box.x, box.y + box.height, box.width, FACTS - GAP)
    facts.of(canvas)[:] = PANEL
    Box(box.x, facts.y, box.width, 4).of(canvas)[:] = color
    write(canvas, fit(standing.name, box.width - 24, 15), box.x + 12, facts.y + 11, size=15, bold=True, on=PANEL)
    words, ink = gap_words(standing)
    write(canvas, words, box.x + 12, facts.y + 34, size=15, bold=True, color=ink, on=PANEL)
    numbers = f"return {signed(standing.episode_return, '.1f')}   tiles {standing.tiles} / {standing.n_tiles}"
    write(canvas, numbers, box.x + 12, facts.y + 55, size=12, color=MUTED, on=PANEL)


def _write_end(canvas: Frame, standing: Standing, box: Box) -> None:
    """How the drive ended, large, over the darkened picture."""
    words = f"{standing.seconds:.2f} s" if standing.lap_finished else "OUT"
    small = "lap finished" if standing.lap_finished else f"after {standing.seconds:.2f} s"
    color = GAS if standing.lap_finished else BRAKE
    size = 34 if box.width > 400 else 24
    plate = Box(box.x + box.width // 2 - 100, box.y + box.height // 2 - 40, 200, 84)
    plate.of(canvas)[:] = BACKGROUND
    middle = box.x + box.width // 2
    write(canvas, words, middle, plate.y + 10, size=size, bold=True, color=color, anchor="center")
    write(canvas, small, middle, plate.y + 56, size=13, color=MUTED, anchor="center")


def gap_words(standing: Standing) -> tuple[str, Color]:
    """The gap as a person reads it, and its colour."""
    if standing.leads:
        return ("first" if standing.out else "leads"), GAS
    tiles = f"{standing.gap_tiles} tile{'' if standing.gap_tiles == 1 else 's'}"
    if standing.out and not standing.lap_finished:
        return f"out, {tiles} behind", MUTED
    return f"+{standing.gap_seconds:.2f} s   {tiles} behind", TEXT


def _draw_lane(canvas: Frame, standing: Standing, color: Color, y: int) -> None:
    """How much of the lap is done."""
    lane = Box(GAP, y + 5, WIDTH - 2 * GAP, LANE - 8)
    lane.of(canvas)[:] = GROOVE
    fill(canvas, lane, (standing.progress + 1) / standing.n_tiles, color)
