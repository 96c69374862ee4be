"""The car in the picture: always upright at the same place, only its wheels turn and, at the start, its size grows."""

from __future__ import annotations

import cmath
import math
from typing import Any

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
from numpy.typing import NDArray

TOP, BOTTOM, LEFT, RIGHT = 66, 78, 45, 51
"""The picture's rows and columns that hold the car at its largest; its centre is at (48, 72)."""
FINE_X, FINE_Y = 10, 8
"""The car is drawn this many times finer and then averaged, as in the stock picture (10.4 x 8.3)."""
FINE = (RIGHT - LEFT) * FINE_X, (BOTTOM - TOP) * FINE_Y
"""Width and height of the patch in fine pixels."""
CENTRE_X, CENTRE_Y = (48 - LEFT) * FINE_X, (BOTTOM - 72) * FINE_Y
"""The car's centre in fine pixels from the patch's lower left corner."""
RED, BLACK, WHITE = (202, 0, 0, 255), (0, 0, 0, 255), (75, 75, 75, 255)
"""Gymnasium's (204, 0, 0), (0, 0, 0) and (77, 77, 77), which its ``smoothscale`` darkens by 2 levels."""


def _complex(points: list[tuple[int, int]]) -> list[complex]:
    return [complex(x * SIZE, y * SIZE) for x, y in points]


HULL = [_complex(poly) for poly in (HULL_POLY1, HULL_POLY2, HULL_POLY3, HULL_POLY4)]
AXLES = _complex(WHEELPOS)
WHEEL = _complex([(-WHEEL_W, WHEEL_R), (WHEEL_W, WHEEL_R), (WHEEL_W, -WHEEL_R), (-WHEEL_W, -WHEEL_R)])
MARK = 1.2
"""Angle on the rim that is painted white, in radians."""


def draw_car(frame: NDArray[np.uint8], car: Any, zoom: tuple[float, float]) -> None:
    """Draw the car into ``frame``, (96, 96, 4) uint8, at ``zoom`` = (x, y) pixels per world unit."""
    place = frame[TOP:BOTTOM, LEFT:RIGHT]
    fine = cv2.resize(place, FINE, interpolation=cv2.INTER_NEAREST)
    scale = np.array(zoom) * (FINE_X, FINE_Y)
    turns = [cmath.rect(1.0, wheel.joint.angle) for wheel in car.wheels]
    poses = list(zip(AXLES, turns, [_mark(wheel.phase) for wheel in car.wheels], strict=True))
    wheels = [[axle + turn * corner for corner in WHEEL] for axle, turn, _ in poses]
    marks = [[axle + turn * corner for corner in mark] for axle, turn, mark in poses if mark]
    cv2.fillPoly(fine, list(_pixels(wheels, scale)), BLACK)
    cv2.fillPoly(fine, list(_pixels(marks, scale)), WHITE)
    for poly in HULL:
        cv2.fillConvexPoly(fine, _pixels(poly, scale), RED)
    cv2.resize(fine, (RIGHT - LEFT, BOTTOM - TOP), dst=place, interpolation=cv2.INTER_AREA)


def _mark(phase: float) -> list[complex]:
    """Corners of the white mark on a wheel in the wheel's frame; none while it is below the wheel."""
    begin, end = cmath.rect(1.0, phase), cmath.rect(1.0, phase + MARK)
    if begin.imag > 0 and end.imag > 0:
        return []
    near = math.copysign(1.0, begin.real) if begin.imag > 0 else begin.real
    far = math.copysign(1.0, end.real) if end.imag > 0 else end.real
    top, bottom = near * WHEEL_R * SIZE, far * WHEEL_R * SIZE
    side = WHEEL_W * SIZE
    return [complex(-side, top), complex(side, top), complex(side, bottom), complex(-side, bottom)]


def _pixels(points: Any, scale: NDArray[np.float64]) -> NDArray[np.int32]:
    """Points in the car's frame, in units, as pixels of the fine patch: (..., 2) int32, y downwards."""
    corners = np.asarray(points, np.complex128)
    pixels = corners.view(np.float64).reshape(*corners.shape, 2) * scale + (CENTRE_X, CENTRE_Y)
    whole = pixels.astype(np.int32)
    whole[..., 1] = FINE[1] - 1 - whole[..., 1]
    return whole
