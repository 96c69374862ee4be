"""CarRacing's state -> one frame, about fifty times as fast as Gymnasium draws it.

Gymnasium fills some hundred polygons on a 1000 x 800 canvas for every frame and shrinks that to 96 x 96. Here the world
is painted once per episode (:mod:`pipeline.sim.world_map`); a frame is one affine look-up in it, with the car and the
bar of indicators on top. ``docs/fidelity.md`` shows how near the result comes.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from gymnasium.envs.box2d.car_racing import PLAYFIELD, SCALE, STATE_H, STATE_W, WINDOW_H, WINDOW_W, ZOOM
from numpy.typing import NDArray

from pipeline.sim.car_sprite import draw_car
from pipeline.sim.hud import ROWS, draw_hud
from pipeline.sim.world_map import LEVELS, TEXELS, WorldMap

VIEW_H = STATE_H - ROWS
"""Rows that show the world, 84; the rest is the bar of indicators."""
PIXEL_X, PIXEL_Y = STATE_W / WINDOW_W, STATE_H / WINDOW_H
"""Pixels of the picture per pixel of the stock canvas."""
CAR_X, CAR_Y = STATE_W / 2, STATE_H * 3 / 4
"""Where the car is in the picture, in pixels from the upper left."""
ZOOMED = ZOOM * SCALE
"""Canvas pixels per world unit once the camera has come near."""


class Renderer:
    """Draws the state of a ``CarRacing``; it reads the environment and never changes it."""

    def __init__(self) -> None:
        self._world = WorldMap()
        self._frame = np.zeros((STATE_H, STATE_W, 4), np.uint8)

    def draw(self, env: Any, grayscale: bool = False) -> NDArray[np.uint8]:
        """The present state of ``env`` as a new array, (96, 96, 3) uint8 RGB or (96, 96) uint8 gray.

        Gray is ``cv2.COLOR_RGB2GRAY`` of the RGB frame, to the bit.
        """
        self._world.update(env)
        zoom = camera_zoom(env.t)
        self._draw_world(env.car.hull, zoom)
        draw_car(self._frame, env.car, zoom)
        draw_hud(self._frame, env)
        code = cv2.COLOR_RGBA2GRAY if grayscale else cv2.COLOR_RGBA2RGB
        return np.asarray(cv2.cvtColor(self._frame, code), np.uint8)

    def _draw_world(self, hull: Any, zoom: float) -> None:
        level = min(max(round(math.log2(ZOOMED / zoom)), 0), LEVELS - 1)
        texels = TEXELS / 2**level  # per unit
        matrix = _frame_to_map(hull.position, hull.angle, zoom, texels)
        view = self._frame[:VIEW_H]
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(self._world.levels[level], matrix, (STATE_W, VIEW_H), dst=view, flags=flags)


def camera_zoom(seconds: float) -> float:
    """Canvas pixels per world unit: in the first second the camera comes down from the whole field to the car."""
    return 0.1 * SCALE * max(1 - seconds, 0) + ZOOMED * min(seconds, 1)


def _frame_to_map(position: Any, angle: float, zoom: float, texels: float) -> NDArray[np.float64]:
    """Affine matrix, (2, 3), from the frame's pixels to the map's texels, whole numbers being centres on both sides."""
    right, down = texels / (zoom * PIXEL_X), texels / (zoom * PIXEL_Y)  # texels per pixel
    cos, sin = math.cos(angle), math.sin(angle)
    xx, xy = cos * right, sin * down
    yx, yy = sin * right, -cos * down
    column, row = CAR_X - 0.5, CAR_Y - 0.5
    x = (position[0] + PLAYFIELD) * texels - 0.5
    y = (position[1] + PLAYFIELD) * texels - 0.5
    return np.array([[xx, xy, x - xx * column - xy * row], [yx, yy, y - yx * column - yy * row]])
