"""Another car drawn into the game's picture, where it would be: Gymnasium's camera, done by hand."""

from __future__ import annotations

import cv2
import numpy as np
from gymnasium.envs.box2d.car_dynamics import (
    HULL_POLY1,
    HULL_POLY2,
    HULL_POLY3,
    HULL_POLY4,
    SIZE,
    WHEEL_R,
    WHEEL_W,
    WHEELPOS,
)
from gymnasium.envs.box2d.car_racing import WINDOW_H, WINDOW_W
from numpy.typing import ArrayLike, NDArray

from pipeline.media.canvas import Color, Frame
from pipeline.sim.renderer import camera_zoom

HULL = [np.array(polygon) * SIZE for polygon in (HULL_POLY1, HULL_POLY2, HULL_POLY3, HULL_POLY4)]
WHEELS = [
    (np.array([(-WHEEL_W, WHEEL_R), (WHEEL_W, WHEEL_R), (WHEEL_W, -WHEEL_R), (-WHEEL_W, -WHEEL_R)]) + place) * SIZE
    for place in WHEELPOS
]
"""Corners in the car's own system, world units."""
OPACITY = 0.75
INDICATORS = WINDOW_H / 40 * 5
"""Height of the black bar at the bottom of the stock canvas; no car is drawn over it."""


def to_picture(points: ArrayLike, camera: tuple[float, float, float], seconds: float) -> NDArray[np.float64]:
    """World points, (n, 2), on the stock canvas, (n, 2) pixels of 1000 x 800 from its upper left.

    Args:
        points: World units.
        camera: x, y and angle of the car that the picture follows.
        seconds: Game time, which decides the zoom at the start.
    """
    x, y, angle = camera
    relative = (np.asarray(points, float) - (x, y)) * camera_zoom(seconds)
    turned = relative @ _rotation(angle)
    return np.stack([WINDOW_W / 2 + turned[:, 0], WINDOW_H * 3 / 4 - turned[:, 1]], axis=1)


def draw_ghost(
    picture: Frame,
    ghost: tuple[float, float, float],
    camera: tuple[float, float, float],
    seconds: float,
    color: Color,
) -> None:
    """Draw a car at ``ghost`` (x, y, angle) into a ``rgb_array`` picture, which must be writable."""
    height, width = picture.shape[:2]
    scale = np.array([width / WINDOW_W, height / WINDOW_H])
    place = np.array(ghost[:2])
    bodies = [polygon @ _rotation(-ghost[2]) + place for polygon in (*WHEELS, *HULL)]
    corners = [np.round(to_picture(body, camera, seconds) * scale).astype(np.int32) for body in bodies]
    view = picture[: round(height - INDICATORS * scale[1])]
    inked = view.copy()
    for polygon in corners[: len(WHEELS)]:
        cv2.fillPoly(inked, [polygon], (20, 20, 20), cv2.LINE_AA)
    for polygon in corners[len(WHEELS) :]:
        cv2.fillPoly(inked, [polygon], color, cv2.LINE_AA)
    cv2.addWeighted(inked, OPACITY, view, 1 - OPACITY, 0, dst=view)


def _rotation(angle: float) -> NDArray[np.float64]:
    """Turns row vectors by ``-angle``."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])
