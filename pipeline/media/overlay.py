"""One film frame: the game, what the network sees of it, what the network does, and how the lap goes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import cv2
import matplotlib
import numpy as np
from gymnasium.envs.box2d.car_racing import FPS
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Frame = NDArray[np.uint8]
"""(height, width, 3) uint8 RGB."""
Color = tuple[int, int, int]
Anchor = Literal["left", "center", "right"]

BACKGROUND: Color = (13, 17, 23)
PANEL: Color = (22, 27, 34)
GROOVE: Color = (44, 51, 61)
TICK: Color = (98, 108, 120)
TEXT: Color = (240, 244, 248)
MUTED: Color = (150, 160, 172)
STEER: Color = (86, 180, 233)  # Okabe and Ito's sky blue, green and vermilion: told apart by colour-blind eyes too
GAS: Color = (0, 178, 128)
BRAKE: Color = (232, 101, 32)

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


@dataclass(frozen=True)
class Box:
    """A rectangle of the film frame, in pixels from its top left corner."""

    x: int
    y: int
    width: int
    height: int

    def of(self, canvas: Frame) -> Frame:
        """View of the canvas under this box, (height, width, 3)."""
        return canvas[self.y : self.y + self.height, self.x : self.x + self.width]


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
    GAME.of(canvas)[:] = _resize(picture, GAME.width, GAME.height)
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
    _write(canvas, "NETWORK SEES", NEWEST.x, 60, size=11, color=MUTED, on=PANEL)
    _write(canvas, "NETWORK DOES", NEWEST.x, 346, size=11, color=MUTED, on=PANEL)
    for word, bar in (("steer", STEER_BAR), ("gas", GAS_BAR), ("brake", BRAKE_BAR)):
        _write(canvas, word, NEWEST.x, bar.y - 2, size=13, on=PANEL)
    for name, x in CELLS.items():
        _write(canvas, name, x, 464, size=11, color=MUTED)
    return canvas


def _draw_header(canvas: Frame, title: str, track: int) -> None:
    _write(canvas, f"track {track}", SIZE[0] - 18, 16, size=14, color=MUTED, anchor="right")
    _write(canvas, _fit(title, 760, 17), 20, 14, size=17, bold=True)


def _draw_observation(canvas: Frame, observation: NDArray[np.uint8], channels: int | None) -> None:
    *older, newest = _split(observation, channels)
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
        return _resize(newest, NEWEST.width, NEWEST.height)
    return newest.repeat(scale, axis=0).repeat(scale, axis=1)


def _draw_older(canvas: Frame, older: list[Frame]) -> None:
    _write(canvas, "EARLIER", OLDER.x, 60, size=11, color=MUTED, on=PANEL)
    gap = 6
    side = min(OLDER.width, (OLDER.height - gap * (len(older) - 1)) // len(older))
    for age, small in enumerate(reversed(older)):
        box = Box(OLDER.x, OLDER.y + age * (side + gap), side, side)
        box.of(canvas)[:] = _resize(small, side, side)


def _draw_actions(canvas: Frame, telemetry: Telemetry) -> None:
    _fill_centered(canvas, STEER_BAR, telemetry.steer, STEER)
    _fill(canvas, GAS_BAR, telemetry.gas, GAS)
    _fill(canvas, BRAKE_BAR, telemetry.brake, BRAKE)
    numbers = (_signed(telemetry.steer, "+.2f"), f"{telemetry.gas:.2f}", f"{telemetry.brake:.2f}")
    for bar, number in zip((STEER_BAR, GAS_BAR, BRAKE_BAR), numbers, strict=True):
        _write(canvas, number, SIZE[0] - 18, bar.y - 2, size=13, on=PANEL, anchor="right")


def _draw_numbers(canvas: Frame, telemetry: Telemetry) -> None:
    done = telemetry.tiles >= telemetry.n_tiles
    _fill(canvas, PROGRESS, telemetry.tiles / telemetry.n_tiles, GAS if done else STEER)
    _fill(canvas, SPEED_BAR, telemetry.speed / FULL_SPEED, TEXT)
    value = "n/a" if telemetry.value is None else _signed(telemetry.value, ".1f")
    _number(canvas, "RETURN", _signed(telemetry.episode_return, ".1f"))
    _number(canvas, "LAP TIME", f"{telemetry.lap_time:.2f}", "s")
    _number(canvas, "SPEED", f"{telemetry.speed:.0f}", "units/s")
    _number(canvas, "TILES", f"{telemetry.tiles}", f"/ {telemetry.n_tiles}", GAS if done else TEXT)
    _number(canvas, "FRAME", f"{telemetry.frame}")
    _number(canvas, "VALUE", value, color=MUTED if telemetry.value is None else TEXT)


def _number(canvas: Frame, cell: str, number: str, unit: str = "", color: Color = TEXT) -> None:
    width = _write(canvas, number, CELLS[cell], 484, size=26, bold=True, color=color)
    if unit:
        _write(canvas, unit, CELLS[cell] + width + 6, 494, size=14, color=MUTED)


def _signed(number: float, spec: str) -> str:
    """The number without a negative zero, and with a real minus sign, which is as wide as the plus."""
    text = format(number, spec)
    return (text if float(text) else format(0.0, spec)).replace("-", "−")


def _fill(canvas: Frame, bar: Box, share: float, color: Color) -> None:
    """Colour the bar from its left end; ``share`` is clipped to [0, 1]."""
    bar.of(canvas)[:, : round(bar.width * float(np.clip(share, 0, 1)))] = color


def _fill_centered(canvas: Frame, bar: Box, share: float, color: Color) -> None:
    """Colour the bar from its middle; ``share`` is clipped to [-1, 1], negative to the left."""
    middle = bar.width // 2
    length = round(middle * float(np.clip(share, -1, 1)))
    view = bar.of(canvas)
    view[:, middle + min(length, 0) : middle + max(length, 0)] = color
    view[:, middle - 1 : middle + 1] = TEXT


def _split(observation: NDArray[np.uint8], channels: int | None) -> list[Frame]:
    """(stack * channels, height, width) -> ``stack`` frames (height, width, 3), oldest first."""
    if observation.ndim != 3 or observation.dtype != np.uint8:
        raise ValueError(f"expected a (channels, height, width) uint8 observation, got {observation.shape}")
    channels = channels or (3 if len(observation) % 3 == 0 else 1)
    if channels not in (1, 3) or len(observation) % channels:
        raise ValueError(f"{len(observation)} planes are no stack of frames with {channels} channels each")
    frames = observation.reshape(-1, channels, *observation.shape[1:]).transpose(0, 2, 3, 1)
    return [np.broadcast_to(frame, (*frame.shape[:2], 3)) for frame in frames]


def _resize(picture: Frame, width: int, height: int) -> Frame:
    if picture.shape[:2] == (height, width):
        return picture
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def _write(
    canvas: Frame,
    text: str,
    x: int,
    y: int,
    *,
    size: int,
    bold: bool = False,
    color: Color = TEXT,
    on: Color = BACKGROUND,
    anchor: Anchor = "left",
) -> int:
    """Paste text with its top at ``y``; the text's width in pixels."""
    label = _label(text, size, bold, color, on)
    height: int = label.shape[0]
    width: int = label.shape[1]
    x -= {"left": 0, "center": width // 2, "right": width}[anchor]
    canvas[y : y + height, x : x + width] = label
    return width


@lru_cache(maxsize=2048)
def _label(text: str, size: int, bold: bool, color: Color, on: Color) -> Frame:
    """Text on its flat background, (line height, width, 3): pasting is then a plain copy."""
    font = _font(size, bold)
    ascent, descent = font.getmetrics()
    picture = Image.new("RGB", (max(1, round(font.getlength(text))), ascent + descent), on)
    ImageDraw.Draw(picture).text((0, 0), text, color, font)
    return np.asarray(picture)


@lru_cache(maxsize=16)
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


@lru_cache(maxsize=64)
def _fit(text: str, width: int, size: int) -> str:
    """The text, or as much of its beginning as fits into ``width`` pixels."""
    font = _font(size, bold=True)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
