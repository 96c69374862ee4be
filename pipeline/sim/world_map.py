"""The whole world of one episode as a picture: grass, road and borders, painted once and looked up in every frame."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import cv2
import numpy as np
from gymnasium.envs.box2d.car_racing import PLAYFIELD
from numpy.typing import NDArray

TEXELS = 3
"""Texels per world unit. One bilinear look-up in a map this fine blurs like the stock picture's box filter: variance
0.028 square units, (1/3)^2/4 here and a mean of (0.64^2 + 0.51^2)/2/12 there. A grass square is 50 texels wide."""
SIZE = round(2 * PLAYFIELD * TEXELS)
"""Width and height of the map, 2000 texels."""
SQUARE = SIZE // 40
"""Side of a grass square in texels."""
LEVELS = 5
"""The map and its halvings, for the first second of an episode, when the camera sees up to 17 times as far."""
SHIFT = 4
"""Fractional bits of the polygon corners handed to OpenCV."""
ACROSS, ALONG = 0.6, 0.3
"""Texels by which each side of a polygon moves inwards, as OpenCV paints anti-aliased ones larger than pygame does.
On tracks 0 and 1, 0.4, 0.5, 0.6, 0.7 across gave mean absolute differences of 0.195, 0.170, 0.161, 0.173."""

VISITED_ACROSS, VISITED_ALONG = 1.1, 0.3
"""The same for visited tiles, which are painted without anti-aliasing: whole texels of one colour come out the same in
any order, so the map is a function of the state, and a replay draws what was drawn before."""

Color = Sequence[float] | NDArray[Any]


def shade(color: Color) -> tuple[int, int, int, int]:
    """A stock colour as it comes out of the stock picture's ``smoothscale``, which truncates twice: 2 levels darker."""
    red, green, blue = (max(int(c) - 2, 0) for c in color)
    return red, green, blue, 255


def texels(points: NDArray[Any]) -> NDArray[np.float64]:
    """World coordinates, in units, as map coordinates (x, y) with integers at the texels' centres."""
    return (points + PLAYFIELD) * TEXELS - 0.5


class WorldMap:
    """Paints the world of a ``CarRacing`` and keeps it up to date.

    Attributes:
        levels: The map and its halvings, (2000, 2000, 4), (1000, 1000, 4) ... uint8. Row 0 is the world's lowest y; the
            fourth channel is unused, it is there because OpenCV warps four channels in half the time of three.
    """

    def __init__(self) -> None:
        self.levels = [np.zeros((SIZE >> level, SIZE >> level, 4), np.uint8) for level in range(LEVELS)]
        self._road: list[Any] | None = None

    def update(self, env: Any) -> None:
        """Paint what has changed since the last call: everything in a new episode, else newly visited tiles."""
        if env.road is not self._road:
            self._paint_world(env)
        elif env.tile_visited_count != self._n_visited:
            self._paint_visited(env)

    def _paint_world(self, env: Any) -> None:
        self._road = env.road
        self._paint_grass(env)
        quads = _quads(env.road_poly)
        corners = _corners(quads, ACROSS, ALONG)
        for quad, color in zip(corners, _first_colors(env), strict=True):
            cv2.fillConvexPoly(self.levels[0], quad, shade(color), cv2.LINE_AA, SHIFT)
        for finer, coarser in zip(self.levels, self.levels[1:], strict=False):
            cv2.resize(finer, coarser.shape[:2], dst=coarser, interpolation=cv2.INTER_AREA)
        is_tile = [isinstance(color, np.ndarray) for _, color in env.road_poly]
        inner = _corners(quads, VISITED_ACROSS, VISITED_ALONG)
        self._pending = dict(zip(env.road, inner[is_tile], strict=True))
        self._n_visited = 0
        self._paint_visited(env)

    def _paint_grass(self, env: Any) -> None:
        pixels = self.levels[0].view(np.uint32)[:, :, 0]  # whole pixels at a time: 0.3 ms instead of 17
        squares = pixels.reshape(20, 2 * SQUARE, 20, 2 * SQUARE)
        pixels[:] = np.array(shade(env.bg_color), np.uint8).view(np.uint32)
        squares[:, :SQUARE, :, :SQUARE] = np.array(shade(env.grass_color), np.uint8).view(np.uint32)

    def _paint_visited(self, env: Any) -> None:
        """Visited tiles lose their stripes; the halvings keep them, there they are 2 levels in less than a pixel."""
        visited = [tile for tile in self._pending if tile.road_visited]
        for tile in visited:
            cv2.fillConvexPoly(self.levels[0], self._pending.pop(tile), shade(tile.color), cv2.LINE_8, SHIFT)
        self._n_visited = env.tile_visited_count


def _first_colors(env: Any) -> list[Color]:
    """Colours of the road's polygons at the start of the episode; visits have changed them in place since."""
    stripes = [env.road_color + 0.01 * third * 255 for third in range(3)]
    tiles = iter(env.road)
    return [stripes[next(tiles).idx % 3] if isinstance(color, np.ndarray) else color for _, color in env.road_poly]


def _quads(road_poly: list[Any]) -> NDArray[np.float64]:
    """Corners of the road's polygons, (n, 4, 2) in texels: near left, near right, far right, far left."""
    coordinates = chain.from_iterable(chain.from_iterable(poly for poly, _ in road_poly))
    return texels(np.fromiter(coordinates, np.float64, 8 * len(road_poly)).reshape(-1, 4, 2))  # 0.3 ms; np.array: 2 ms


def _corners(quads: NDArray[np.float64], inset_across: float, inset_along: float) -> NDArray[np.int32]:
    """The same for OpenCV, (n, 4, 2) int32 in 1/16 texels, with their sides moved inwards by texels."""
    quads = quads.copy()
    across = _unit(quads[:, [1, 2]] - quads[:, [0, 3]]) * inset_across
    quads[:, [0, 3]] += across
    quads[:, [1, 2]] -= across
    along = _unit(quads[:, [3, 2]] - quads[:, [0, 1]]) * inset_along
    quads[:, [0, 1]] += along
    quads[:, [3, 2]] -= along
    return np.rint(quads * (1 << SHIFT)).astype(np.int32)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths: NDArray[np.float64] = np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
    return vectors / lengths
