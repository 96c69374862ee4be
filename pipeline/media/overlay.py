"""One film frame: the game, what the network sees of it, what the network does, and how the lap goes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from gymnasium.envs.box2d.car_racing import FPS
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
    Box,
    Color,
    Frame,
    fill,
    fill_centered,
    fit,
    resize,
    signed,
    write,
)

FULL_SPEED = 100.0
"""Right end of the speed bar, in world units per second: about the most the car reaches on a straight."""


@dataclass(frozen=True)
class Telemetry:
    """What the overlay writes beside the picture.

    Attributes:
        track: Seed of the track.
        frame: Physics frames since the start of the episode.
        episode_return: Raw return so far.
        speed: World units per second.
        steer: -1 (full left) to 1 (full right).
        gas: 0 to 1.
        brake: 0 to 1.
        tiles: Tiles of the road visited so far.
        n_tiles: Tiles of the whole road.
        value: The critic's estimate, or None for a policy without one.
    """

    track: int
    frame: int
    episode_return: float
    speed: float
    steer: float
    gas: float
    brake: float
    tiles: int
    n_tiles: int
    value: float | None = None

    @property
    def lap_time(self) -> float:
        """Seconds of game time since the start."""
        return self.frame / FPS


SIZE = (976, 544)
"""(width, height) of a film frame: even, as yuv420p wants, and multiples of 16, as H.264 likes."""
HEADER = Box(0, 0, 976, 48)
GAME = Box(0, 48, 600, 400)
PROGRESS = Box(0, 448, 976, 4)
NEWEST = Box(618, 84, 252, 252)  # 3 x 84
OLDER = Box(878, 84, 80, 252)
STEER_BAR = Box(678, 370, 220, 12)
GAS_BAR = Box(678, 394, 220, 12)
BRAKE_BAR = Box(678, 418, 220, 12)
SPEED_BAR = Box(348, 524, 116, 4)
CELLS = {"RETURN": 20, "LAP TIME": 184, "SPEED": 348, "TILES": 512, "FRAME": 676, "VALUE": 840}
"""Left edge of each number in the strip at the bottom."""


def compose(
    picture: Frame, observation: NDArray[np.uint8], telemetry: Telemetry, title: str, *, channels: int | None = None
) -> Frame:
    """Draw one film frame.

    Args:
        picture: The game's own ``rgb_array``, (height, width, 3) uint8; other sizes than 400 x 600 are resized.
        observation: What the network was given, (stack * channels, height, width) uint8, newest last.
        telemetry: The numbers to write.
        title: Label of the policy; shortened where it does not fit.
        channels: 1 for gray, 3 for RGB observations. None takes RGB when the first axis divides by three.

    Returns:
        (544, 976, 3) uint8 RGB, see `SIZE`.
    """
    canvas: Frame = _background().copy()
    GAME.of(canvas)[:] = resize(picture, GAME.width, GAME.height)
    _draw_header(canvas, title, telemetry.track)
    _draw_observation(canvas, observation, channels)
    _draw_actions(canvas, telemetry)
    _draw_numbers(canvas, telemetry)
    return canvas


@lru_cache(maxsize=1)
def _background() -> Frame:
    canvas = np.empty((SIZE[1], SIZE[0], 3), np.uint8)
    canvas[:] = BACKGROUND
    canvas[GAME.y : PROGRESS.y, GAME.width :] = PANEL
    for bar in (PROGRESS, STEER_BAR, GAS_BAR, BRAKE_BAR, SPEED_BAR):
        bar.of(canvas)[:] = GROOVE
    write(canvas, "NETWORK SEES", NEWEST.x, 60, size=11, color=MUTED, on=PANEL)
    write(canvas, "NETWORK DOES", NEWEST.x, 346, size=11, color=MUTED, on=PANEL)
    for word, bar in (("steer", STEER_BAR), ("gas", GAS_BAR), ("brake", BRAKE_BAR)):
        write(canvas, word, NEWEST.x, bar.y - 2, size=13, on=PANEL)
    for name, x in CELLS.items():
        write(canvas, name, x, 464, size=11, color=MUTED)
    return canvas


def _draw_header(canvas: Frame, title: str, track: int) -> None:
    write(canvas, f"track {track}", SIZE[0] - 18, 16, size=14, color=MUTED, anchor="right")
    write(canvas, fit(title, 760, 17), 20, 14, size=17, bold=True)


def _draw_observation(canvas: Frame, observation: NDArray[np.uint8], channels: int | None) -> None:
    *older, newest = split_stack(observation, channels)
    big = _enlarge(newest)
    height, width = big.shape[:2]
    x, y = (NEWEST.width - width) // 2, (NEWEST.height - height) // 2  # 84 pixels fill the box, other sizes are centred
    NEWEST.of(canvas)[y : y + height, x : x + width] = big
    if older:
        _draw_older(canvas, older)


def _enlarge(newest: Frame) -> Frame:
    """Repeat every pixel a whole number of times: the network's very pixels, not a smooth likeness."""
    scale = NEWEST.width // max(newest.shape[:2])
    if not scale:
        return resize(newest, NEWEST.width, NEWEST.height)
    return newest.repeat(scale, axis=0).repeat(scale, axis=1)


def _draw_older(canvas: Frame, older: list[Frame]) -> None:
    write(canvas, "EARLIER", OLDER.x, 60, size=11, color=MUTED, on=PANEL)
    gap = 6
    side = min(OLDER.width, (OLDER.height - gap * (len(older) - 1)) // len(older))
    for age, small in enumerate(reversed(older)):
        box = Box(OLDER.x, OLDER.y + age * (side + gap), side, side)
        box.of(canvas)[:] = resize(small, side, side)


def _draw_actions(canvas: Frame, telemetry: Telemetry) -> None:
    fill_centered(canvas, STEER_BAR, telemetry.steer, STEER)
    fill(canvas, GAS_BAR, telemetry.gas, GAS)
    fill(canvas, BRAKE_BAR, telemetry.brake, BRAKE)
    numbers = (signed(telemetry.steer, "+.2f"), f"{telemetry.gas:.2f}", f"{telemetry.brake:.2f}")
    for bar, number in zip((STEER_BAR, GAS_BAR, BRAKE_BAR), numbers, strict=True):
        write(canvas, number, SIZE[0] - 18, bar.y - 2, size=13, on=PANEL, anchor="right")


def _draw_numbers(canvas: Frame, telemetry: Telemetry) -> None:
    done = telemetry.tiles >= telemetry.n_tiles
    fill(canvas, PROGRESS, telemetry.tiles / telemetry.n_tiles, GAS if done else STEER)
    fill(canvas, SPEED_BAR, telemetry.speed / FULL_SPEED, TEXT)
    value = "n/a" if telemetry.value is None else signed(telemetry.value, ".1f")
    _number(canvas, "RETURN", signed(telemetry.episode_return, ".1f"))
    _number(canvas, "LAP TIME", f"{telemetry.lap_time:.2f}", "s")
    _number(canvas, "SPEED", f"{telemetry.speed:.0f}", "units/s")
    _number(canvas, "TILES", f"{telemetry.tiles}", f"/ {telemetry.n_tiles}", GAS if done else TEXT)
    _number(canvas, "FRAME", f"{telemetry.frame}")
    _number(canvas, "VALUE", value, color=MUTED if telemetry.value is None else TEXT)


def _number(canvas: Frame, cell: str, number: str, unit: str = "", color: Color = TEXT) -> None:
    width = write(canvas, number, CELLS[cell], 484, size=26, bold=True, color=color)
    if unit:
        write(canvas, unit, CELLS[cell] + width + 6, 494, size=14, color=MUTED)


def split_stack(observation: NDArray[np.uint8], channels: int | None) -> list[Frame]:
    """(stack * channels, height, width) -> ``stack`` frames (height, width, 3), oldest first."""
    if observation.ndim != 3 or observation.dtype != np.uint8:
        raise ValueError(f"expected a (channels, height, width) uint8 observation, got {observation.shape}")
    channels = channels or (3 if len(observation) % 3 == 0 else 1)
    if channels not in (1, 3) or len(observation) % channels:
        raise ValueError(f"{len(observation)} planes are no stack of frames with {channels} channels each")
    frames = observation.reshape(-1, channels, *observation.shape[1:]).transpose(0, 2, 3, 1)
    return [np.broadcast_to(frame, (*frame.shape[:2], 3)) for frame in frames]
