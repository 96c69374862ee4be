"""The car in the picture: always upright at the same place, only its wheels turn and, at the start, its size grows."""

from __future__ import annotations

import cmath
import math
from functools import lru_cache
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
from gymnasium.envs.box2d.car_racing import STATE_W, WINDOW_H, WINDOW_W
from numpy.typing import NDArray

TOP, BOTTOM, LEFT, RIGHT = 66, 78, 45, 51
"""The picture's rows and columns that hold the car at its largest; its centre is at (48, 72)."""
FINE_X, FINE_Y = 10, 8
"""The car is drawn this many times finer and then averaged, as in the stock picture (10.4 x 8.3)."""
SHAPE = RIGHT - LEFT, BOTTOM - TOP
FINE = SHAPE[0] * FINE_X, SHAPE[1] * FINE_Y
"""Width and height of the patch, in pixels and in fine pixels."""
CANVAS_X, CANVAS_Y = WINDOW_W / 2, WINDOW_H / 4
"""The car's centre on the stock canvas, y upwards; corners are whole pixels there."""
FINER = FINE_X * STATE_W / WINDOW_W
"""Fine pixels per pixel of the stock canvas, 0.96, in both directions."""
SHIFT = 4
"""Fractional bits of the polygon corners handed to OpenCV."""
RED, BLACK, WHITE = (202, 0, 0, 255), (0, 0, 0, 255), (75, 75, 75, 255)
"""Gymnasium's (204, 0, 0), (0, 0, 0) and (77, 77, 77), which its ``smoothscale`` darkens by 2 levels."""

Polygon = NDArray[np.int32]


def _complex(points: list[tuple[int, int]]) -> list[complex]:
    return [complex(x * SIZE, y * SIZE) for x, y in points]


HULL = [_complex(poly) for poly in (HULL_POLY1, HULL_POLY2, HULL_POLY3, HULL_POLY4)]
AXLES = _complex(WHEELPOS)
WHEEL = _complex([(-WHEEL_W, WHEEL_R), (WHEEL_W, WHEEL_R), (WHEEL_W, -WHEEL_R), (-WHEEL_W, -WHEEL_R)])
ANGLES = 32
"""Steps per radian of a steering angle: 0.15 fine pixels at a wheel's corner."""
TURN = 128
"""Steps per turn of a wheel, 0.2 fine pixels at its rim."""
PHASES = TURN / math.tau
MARK = 1.2
"""Angle on the rim that is painted white, in radians."""


def draw_car(frame: NDArray[np.uint8], car: Any, zoom: float) -> None:
    """Draw the car into ``frame``, (96, 96, 4) uint8, at ``zoom`` canvas pixels per world unit."""
    place = frame[TOP:BOTTOM, LEFT:RIGHT]
    fine = cv2.resize(place, FINE, interpolation=cv2.INTER_NEAREST)
    wheels = [
        _wheel(axle, round(wheel.joint.angle * ANGLES), round(wheel.phase * PHASES) % TURN, zoom)
        for axle, wheel in enumerate(car.wheels)
    ]
    cv2.fillPoly(fine, [tyre for tyre, _ in wheels], BLACK, shift=SHIFT)
    cv2.fillPoly(fine, [mark for _, mark in wheels if mark is not None], WHITE, shift=SHIFT)
    for poly in _hull(zoom):
        cv2.fillConvexPoly(fine, poly, RED, shift=SHIFT)
    cv2.resize(fine, SHAPE, dst=place, interpolation=cv2.INTER_AREA)


@lru_cache(maxsize=64)  # one for each frame of the zoom
def _hull(zoom: float) -> list[Polygon]:
    return [_pixels(poly, zoom) for poly in HULL]


@lru_cache(maxsize=1 << 14)  # about 8,000 are in use: few angles at the rear wheels, no mark in half of the phases
def _wheel(axle: int, angle: int, phase: int, zoom: float) -> tuple[Polygon, Polygon | None]:
    """A wheel and its white mark, if that is above the wheel; ``angle`` and ``phase`` in steps."""
    turn = cmath.rect(1.0, angle / ANGLES)
    tyre, mark = ([AXLES[axle] + turn * corner for corner in poly] for poly in (WHEEL, _mark(phase / PHASES)))
    return _pixels(tyre, zoom), _pixels(mark, zoom) if mark else None


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


def _pixels(points: list[complex], zoom: float) -> Polygon:
    """Points in the car's frame, in units, as pixels of the fine patch, (n, 2) int32 with 4 fractional bits."""
    pixels = [(int(CANVAS_X + p.real * zoom), WINDOW_H - 1 - int(CANVAS_Y + p.imag * zoom)) for p in points]
    centres = (np.array(pixels) + 0.5) * FINER - (LEFT * FINE_X, TOP * FINE_Y) - 0.5
    return np.asarray(np.rint(centres * 2**SHIFT), np.int32)
