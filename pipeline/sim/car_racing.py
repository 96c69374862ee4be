"""CarRacing with Gymnasium's own physics, rewards and tracks; the picture is drawn only when somebody looks at it."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
from Box2D.b2 import fixtureDef
from gymnasium.envs.box2d import car_dynamics
from gymnasium.envs.box2d.car_dynamics import Car
from gymnasium.envs.box2d.car_racing import (
    FPS,
    GRASS_DIM,
    MAX_SHAPE_DIM,
    PLAYFIELD,
    STATE_H,
    STATE_W,
    WINDOW_H,
    WINDOW_W,
    CarRacing,
)
from gymnasium.utils import EzPickle
from numpy.typing import NDArray

from pipeline.sim.fast_car import FastCar
from pipeline.sim.renderer import Renderer

MAX_FRAMES = 1000
"""The stock time limit of an episode, in physics frames (20 s at 50 frames/s)."""
IN_SIGHT = math.hypot(WINDOW_W / 2 + MAX_SHAPE_DIM, WINDOW_H * 3 / 4 + MAX_SHAPE_DIM) + MAX_SHAPE_DIM
"""Canvas pixels from the car to the first corner of the furthest polygon that Gymnasium draws: to the canvas's edge
beside and ahead of the car, one ``MAX_SHAPE_DIM`` beyond it, and another one across the polygon."""
FIELD = [(PLAYFIELD, PLAYFIELD), (PLAYFIELD, -PLAYFIELD), (-PLAYFIELD, -PLAYFIELD), (-PLAYFIELD, PLAYFIELD)]
GRASS = np.array(
    [
        [(right, y), (x, y), (x, top), (right, top)]
        for x, right in [(GRASS_DIM * column, GRASS_DIM * column + GRASS_DIM) for column in range(-20, 20, 2)]
        for y, top in [(GRASS_DIM * row, GRASS_DIM * row + GRASS_DIM) for row in range(-20, 20, 2)]
    ]
)
"""The lighter squares of the field, (400, 4, 2) world units, with Gymnasium's floats and in its order."""


def owning_fixture_def(**settings: Any) -> Any:
    """``Box2D.b2.fixtureDef``, whose shape is freed with it.

    pybox2d takes a shape's memory out of Python's hands when it is given to a definition, and never frees it: 304
    bytes a fixture, eight fixtures a car, a car an episode.
    """
    definition = fixtureDef(**settings)
    definition.owned = settings["shape"]  # lives as long as the definition that points to it
    definition.owned.thisown = True
    return definition


# For Gymnasium's own game in this process too, whose cars leak as well.
car_dynamics.fixtureDef = owning_fixture_def  # type: ignore[attr-defined]


class LazyCarRacing(CarRacing):
    """Stock ``CarRacing`` that skips drawing while :attr:`drawing` is false.

    A stock step spends 98% of its time on the picture; an agent that repeats each action for four frames sees one
    picture in four. Physics, reward and termination are Gymnasium's own, and every picture that *is* drawn is,
    to the pixel, what Gymnasium draws.

    Attributes:
        drawing: Draw ``state_pixels``. While false, observations are the last picture drawn.
        frames: Physics frames since the start of the episode.
        reverse: This lap is driven the other way round.
    """

    drawing: bool = True
    reverse: bool = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        EzPickle.__init__(self, **kwargs)  # the parent's would call this class with positional arguments
        self.frames = 0
        self._last_picture: NDArray[np.uint8] = np.zeros((STATE_H, STATE_W, 3), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Begin an episode; ``options={"reverse": True}`` turns the car round, to drive the lap the other way."""
        self.reverse = bool((options or {}).get("reverse"))
        self.frames = -1  # reset() itself makes one step without an action
        drawing, self.drawing = self.drawing, self.drawing and not self.reverse
        observation, info = super().reset(seed=seed, options=options)
        self.drawing = drawing
        return (self._turn_round() if self.reverse else observation), info

    def _turn_round(self) -> NDArray[np.uint8]:
        """Begin again from the same place, facing backwards; returns the picture."""
        assert self.car is not None
        _, beta, x, y = self.track[0]
        self.car.destroy()  # type: ignore[no-untyped-call]
        self.car = Car(self.world, beta + math.pi, x, y)  # type: ignore[no-untyped-call]
        self.t = 0.0
        self.frames = -1
        observation, *_ = self.step(None)
        return observation

    def step(self, action: Any) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """One physics frame; ``info`` gains ``tiles``, ``n_tiles``, ``lap_time`` [s] and ``lap_finished``."""
        observation, reward, terminated, truncated, info = super().step(action)
        self.frames += 1
        info.setdefault("lap_finished", False)
        info.update(tiles=self.tile_visited_count, n_tiles=len(self.track), lap_time=self.frames / FPS)
        return observation, float(reward), terminated, truncated, info

    def wheels_on_grass(self) -> float:
        """Share of the four wheels that touch no road tile, 0 to 1."""
        assert self.car is not None
        return sum(not wheel.tiles for wheel in self.car.wheels) / 4

    def progress(self, front: int) -> int:
        """Tiles between the start and the foremost wheel, given the ``front`` before.

        What is less than half a lap ahead of ``front`` counts as ahead, the rest as behind.
        """
        assert self.car is not None
        n_tiles, direction = len(self.track), -1 if self.reverse else 1
        below = {tile.idx for wheel in self.car.wheels for tile in wheel.tiles}
        ahead = [(direction * tile - front) % n_tiles for tile in below]
        return front + max((tiles for tiles in ahead if tiles < n_tiles / 2), default=0)

    def is_visited(self, place: int) -> bool:
        """Whether the tile ``place`` tiles after the start has been visited."""
        road: Any = self.road
        return bool(road[(-place if self.reverse else place) % len(road)].road_visited)

    def speed(self) -> float:
        """Speed of the hull in world units per second (about 100 at most on the straight)."""
        assert self.car is not None
        velocity = self.car.hull.linearVelocity
        return float(np.hypot(velocity[0], velocity[1]))

    def picture(self) -> NDArray[np.uint8]:
        """The present state's picture, drawn now, (96, 96, 3) uint8 RGB."""
        return self.stock_picture()

    def stock_picture(self) -> NDArray[np.uint8]:
        """The present state's picture as Gymnasium draws it, (96, 96, 3) uint8 RGB."""
        picture: NDArray[np.uint8] = super()._render("state_pixels")
        return picture

    def _render_road(self, zoom: float, translation: Any, angle: float) -> None:
        """Draw what Gymnasium draws, to the pixel; it turns the corners of 700 polygons to find the 70 in sight."""

        def draw(poly: Any, color: Any, clip: bool = True) -> None:
            self._draw_colored_polygon(self.surf, poly, color, zoom, translation, angle, clip)  # type: ignore[no-untyped-call]

        draw(FIELD, self.bg_color, clip=False)
        for square in GRASS[self._in_sight(GRASS[:, 0], zoom)].tolist():
            draw(square, self.grass_color)
        road: Any = self.road_poly
        for place in self._in_sight(np.array([poly[0] for poly, _ in road]), zoom):
            poly, color = road[place]
            draw(poly, [int(channel) for channel in color])

    def _in_sight(self, corners: NDArray[np.float64], zoom: float) -> NDArray[np.intp]:
        """Which polygons may be drawn, given a corner of each, (n, 2) in world units; Gymnasium looks closer."""
        assert self.car is not None
        away: NDArray[np.float64] = corners - np.array(self.car.hull.position)
        return np.flatnonzero(np.hypot(away[:, 0], away[:, 1]) * zoom <= IN_SIGHT)

    def _render(self, mode: str) -> Any:
        if mode != "state_pixels":
            return super()._render(mode)
        if self.drawing:
            self._last_picture = self.picture()
        return self._last_picture


class FastCarRacing(LazyCarRacing):
    """``CarRacing`` with ``state_pixels`` from :class:`~pipeline.sim.renderer.Renderer`, about fifty times as fast.

    The pictures are near the stock ones (``docs/fidelity.md``) and meant for training; ``rgb_array`` and ``human`` are
    Gymnasium's own, and so is all that isn't a picture.

    Args:
        grayscale: Observations are (96, 96) uint8 gray instead of (96, 96, 3) uint8 RGB.
        **kwargs: Those of the stock class: ``render_mode``, ``domain_randomize``, ``continuous`` ...
    """

    def __init__(self, grayscale: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        EzPickle.__init__(self, grayscale, **kwargs)
        self.grayscale = grayscale
        self._renderer = Renderer()
        shape = (STATE_H, STATE_W) if grayscale else (STATE_H, STATE_W, 3)
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self._last_picture = np.zeros(shape, np.uint8)

    def step(self, action: Any) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """As :meth:`LazyCarRacing.step`."""
        if action is None:  # reset() alone does this, with the car it has just made
            self.car.__class__ = FastCar
        return super().step(action)

    def picture(self) -> NDArray[np.uint8]:
        """The present state's picture, drawn now, (96, 96, 3) uint8 RGB or (96, 96) uint8 gray."""
        return self._renderer.draw(self, self.grayscale)


gym.register(
    id="LazyCarRacing-v3",
    entry_point="pipeline.sim.car_racing:LazyCarRacing",
    max_episode_steps=MAX_FRAMES,
    reward_threshold=900,
)
gym.register(
    id="FastCarRacing-v3",
    entry_point="pipeline.sim.car_racing:FastCarRacing",
    max_episode_steps=MAX_FRAMES,
    reward_threshold=900,
)
