"""A film frame as a canvas: colours, boxes, bars and text, pasted as plain copies because a film has thousands."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import cv2
import matplotlib
import numpy as np
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


def signed(number: float, spec: str) -> str:
    """The number without a negative zero, and with a real minus sign, which is as wide as the plus."""
    text = format(number, spec)
    return (text if float(text) else format(0.0, spec)).replace("-", "−")


def fill(canvas: Frame, bar: Box, share: float, color: Color) -> None:
    """Colour the bar from its left end; ``share`` is clipped to [0, 1]."""
    bar.of(canvas)[:, : round(bar.width * float(np.clip(share, 0, 1)))] = color


def fill_centered(canvas: Frame, bar: Box, share: float, color: Color) -> None:
    """Colour the bar from its middle; ``share`` is clipped to [-1, 1], negative to the left."""
    middle = bar.width // 2
    length = round(middle * float(np.clip(share, -1, 1)))
    view = bar.of(canvas)
    view[:, middle + min(length, 0) : middle + max(length, 0)] = color
    view[:, middle - 1 : middle + 1] = TEXT


def resize(picture: Frame, width: int, height: int) -> Frame:
    """The picture at another size, by area; itself if it has that size."""
    if picture.shape[:2] == (height, width):
        return picture
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def write(
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
def fit(text: str, width: int, size: int) -> str:
    """The text, or as much of its beginning as fits into ``width`` pixels."""
    font = _font(size, bold=True)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
