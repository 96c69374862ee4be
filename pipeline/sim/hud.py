"""The black bar at the bottom of CarRacing's picture: score and seven indicators, exactly as Gymnasium draws them.

Every indicator is a rectangle with integer corners on the 1000 x 800 stock canvas, so it has few different pictures.
Each is drawn once, with pygame as the stock picture is, and remembered.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pygame
from gymnasium.envs.box2d.car_racing import STATE_H, STATE_W, WINDOW_H, WINDOW_W
from numpy.typing import NDArray

ROWS = STATE_H // 8
"""Height of the bar: 12 of the picture's rows, 100 of the canvas'."""
CANVAS_H = WINDOW_H // 8
PLACE = WINDOW_W // 40
"""Width of one place on the bar, in canvas pixels."""
LINE = WINDOW_H // 40
"""Height of one line on the bar, in canvas pixels."""
SCORE_COLUMNS = 12
"""Columns of the picture, from the left, that belong to the score."""
SHOWN = 1e-4
"""Indicators nearer to zero than this aren't drawn."""

BLUE, VIOLET = (0, 0, 255), (51, 0, 255)
BARS = (
    (125, 150, 0.02, (255, 255, 255)),
    (175, 199, 0.01, BLUE),
    (200, 224, 0.01, BLUE),
    (225, 249, 0.01, VIOLET),
    (250, 275, 0.01, VIOLET),
)
"""First and last canvas column, lines per unit and colour of the upright indicators: speed and the wheels' spin. Three
of them end one column early, where the stock picture draws the right neighbour over them."""
NEEDLES = ((20, -10.0, (0, 255, 0)), (30, -0.8, (255, 0, 0)))
"""Place, places per unit and colour of the level indicators: steering angle and angular velocity of the hull."""

Patch = NDArray[np.uint8]


def draw_hud(frame: NDArray[np.uint8], env: Any) -> None:
    """Draw the bar into the last 12 rows of ``frame``, (96, 96, 4) uint8."""
    rows = frame[-ROWS:]
    rows[:] = 0
    hull, wheels = env.car.hull, env.car.wheels
    velocity = hull.linearVelocity
    speed = math.sqrt(velocity[0] * velocity[0] + velocity[1] * velocity[1])
    _draw_bars(rows, (speed, *[wheel.omega for wheel in wheels]))
    _draw_needles(rows, (wheels[0].joint.angle, hull.angularVelocity))
    rows[:, :SCORE_COLUMNS] = _score(f"{env.reward:04.0f}")


def _draw_bars(rows: NDArray[np.uint8], values: tuple[float, ...]) -> None:
    for (left, right, scale, color), value in zip(BARS, values, strict=True):
        if abs(value) > SHOWN:
            top = int(WINDOW_H - (LINE + LINE * (scale * value)))
            first, patch = _rectangle(left, right, top, WINDOW_H - LINE, color)
            rows[:, first : first + patch.shape[1]] += patch  # neighbours each have their part of a shared column


def _draw_needles(rows: NDArray[np.uint8], values: tuple[float, ...]) -> None:
    for (place, scale, color), value in zip(NEEDLES, values, strict=True):
        if abs(value) > SHOWN:
            end = int((place + scale * value) * PLACE)
            first, patch = _rectangle(place * PLACE, end, WINDOW_H - 4 * LINE, WINDOW_H - 2 * LINE, color)
            rows[:, first : first + patch.shape[1]] = patch


@cache  # about 100 heights for each bar, a few hundred widths for each needle
def _rectangle(left: int, right: int, top: int, bottom: int, color: tuple[int, int, int]) -> tuple[int, Patch]:
    """First column and picture, (12, columns, 4) uint8, of a rectangle given in canvas pixels."""
    canvas = pygame.Surface((WINDOW_W, CANVAS_H))
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    pygame.draw.polygon(canvas, color, [(x, y - WINDOW_H + CANVAS_H) for x, y in corners])
    picture = _shrink(canvas)
    columns = np.flatnonzero(picture.any(axis=(0, 2)))
    first, last = (columns[0], columns[-1] + 1) if len(columns) else (0, 0)
    return int(first), picture[:, first:last].copy()


@cache  # about 1,100 whole numbers between -100 and 1000
def _score(text: str) -> Patch:
    """Picture of the score, (12, 12, 4) uint8."""
    pygame.font.init()
    font = pygame.font.Font(pygame.font.get_default_font(), 42)
    canvas = pygame.Surface((WINDOW_W, CANVAS_H))
    label = font.render(text, True, (255, 255, 255), (0, 0, 0))
    canvas.blit(label, label.get_rect(center=(60, CANVAS_H // 2)))
    return _shrink(canvas)[:, :SCORE_COLUMNS].copy()


def _shrink(canvas: pygame.Surface) -> Patch:
    """The bar's canvas as the picture shows it, (12, 96, 4) uint8."""
    small = pygame.transform.smoothscale(canvas, (STATE_W, ROWS))
    picture = np.zeros((ROWS, STATE_W, 4), np.uint8)
    picture[:, :, :3] = pygame.surfarray.array3d(small).transpose(1, 0, 2)
    return picture
