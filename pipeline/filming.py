"""Drive a track with a camera on: the game, what the network saw, what it did, and the numbers, in one film."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.agent.policy import Policy
from pipeline.evaluation import Episode, drive
from pipeline.media.overlay import SIZE, Telemetry, compose
from pipeline.media.video import FilmWriter
from pipeline.sim.env import make_env

FRAMES_PER_STILL = 4  # of 50 a second


class Camera:
    """Composes a picture after every physics frame: the game, what the network saw last, the controls, the numbers.

    Args:
        policy: Who drives.
        title: Shown in the film.
        write: Called with each picture, (544, 976, 3) uint8 RGB.
        every: Frames from one picture to the next.
        keep_stills: Keep some of the pictures.

    Attributes:
        stills: Every fourth picture at half its size, (h, w, 3) uint8; at full size those of a film fill 400 MB.
        road: Centre line, (n, 2) world units.
        drive: Per frame x, y, speed, steer, gas, brake and the share of wheels off the road.
    """

    def __init__(
        self,
        policy: Policy,
        title: str,
        write: Callable[[NDArray[np.uint8]], None],
        every: int = 1,
        keep_stills: bool = True,
    ) -> None:
        self.policy, self.title, self.write, self.every, self.keep_stills = policy, title, write, every, keep_stills
        self.observation: Any = None
        self.value = self.episode_return = 0.0
        self.stills: list[NDArray[np.uint8]] = []
        self.road: list[tuple[float, float]] = []
        self.drive: list[tuple[float, ...]] = []

    def on_decision(self, observation: NDArray[np.uint8]) -> None:
        """Keep what the network is about to decide on, (c, h, w) uint8."""
        self.observation = observation
        self.value = float(self.policy.value(observation[None])[0])

    def on_frame(self, env: Any, track: int, action: NDArray[np.float32], reward: float) -> None:
        """Film one physics frame of the game ``env``, driven with steer, gas and brake."""
        self.episode_return += reward
        game = env.unwrapped
        self.road = [(x, y) for _, _, x, y in game.track]
        self.drive.append((*game.car.hull.position, game.speed(), *map(float, action), game.wheels_on_grass()))
        if (len(self.drive) - 1) % self.every:
            return
        telemetry = Telemetry(
            track=track,
            frame=game.frames,
            episode_return=self.episode_return,
            speed=game.speed(),
            steer=float(action[0]),
            gas=float(action[1]),
            brake=float(action[2]),
            tiles=game.tile_visited_count,
            n_tiles=len(game.track),
            value=self.value,
        )
        channels = 1 if self.policy.observation.grayscale else 3
        picture = compose(env.render(), self.observation, telemetry, self.title, channels=channels)
        self.write(picture)
        if self.keep_stills and len(self.drive) % FRAMES_PER_STILL == 1:
            self.stills.append(
                np.asarray(cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), np.uint8)
            )


def film(
    policy: Policy, track: int, path: Path, fps: int, title: str, frames: int | None = None
) -> tuple[Camera, Episode]:
    """Drive a track and film every physics frame; returns the camera, with its stills and the drive, and the episode.

    Args:
        policy: Who drives.
        track: Seed of the track.
        path: Of the film.
        fps: Frames per second; 50 is real time.
        title: Shown in the film.
        frames: Length of the drive, if it is known, for the progress bar.
    """
    path.parent.mkdir(exist_ok=True)
    bar = tqdm(total=frames, desc=path.stem, unit="frame", disable=not sys.stderr.isatty())
    with FilmWriter(path, SIZE, fps) as writer, bar:

        def write(picture: NDArray[np.uint8]) -> None:
            writer.write(picture)
            bar.update()

        camera = Camera(policy, title, write)
        env = make_env(policy.observation, render_mode="rgb_array", on_frame=camera.on_frame)
        driven = drive(policy, track, env, camera.on_decision)
    return camera, driven
