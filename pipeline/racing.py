"""Drives on one track side by side, frame by frame: who is ahead, and by how much."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium.envs.box2d.car_racing import FPS
from numpy.typing import NDArray

from pipeline.agent.policy import Policy
from pipeline.evaluation import play
from pipeline.media.canvas import Frame
from pipeline.media.ghost import draw_ghost
from pipeline.media.race import COLORS, Standing, compose_race
from pipeline.sim.env import make_env


@dataclass(frozen=True)
class Moment:
    """A car after one physics frame.

    Attributes:
        x: Place of the hull, world units.
        y: The same.
        angle: Of the hull, radians.
        speed: World units per second.
        progress: Tiles between the start and the foremost wheel, visited or not, up to the last before the line.
        tiles: Tiles visited.
        n_tiles: Tiles of the track.
        episode_return: Raw return so far.
        lap_finished: All tiles were visited.
        picture: The game's ``rgb_array``, (400, 600, 3) uint8, if it was asked for.
    """

    x: float
    y: float
    angle: float
    speed: float
    progress: int
    tiles: int
    n_tiles: int
    episode_return: float
    lap_finished: bool
    picture: NDArray[np.uint8] | None = None


@dataclass
class Racer:
    """One of those who drive.

    Attributes:
        name: Shown in the film.
        moments: One per frame so far.
        out: It drives no more: the lap is finished, or the episode has ended without it.
    """

    name: str
    moments: list[Moment] = field(default_factory=list)
    out: bool = False
    _reached: list[int] = field(default_factory=list)  # progress so far, by frame: it never falls

    def add(self, moment: Moment) -> None:
        """The next frame; its picture replaces the one before, which is let go."""
        if self.moments:
            self.moments[-1] = without_picture(self.moments[-1])
        self.moments.append(moment)
        self._reached.append(moment.progress)

    @property
    def now(self) -> Moment:
        """The latest frame."""
        return self.moments[-1]

    @property
    def seconds(self) -> float:
        """Game time it has driven, until it was out."""
        return len(self.moments) / FPS

    def seconds_at(self, progress: int) -> float | None:
        """When it first was so many tiles from the start; None if it has not been there."""
        frame = bisect_left(self._reached, progress)
        return (frame + 1) / FPS if frame < len(self._reached) else None


@dataclass(frozen=True)
class Gap:
    """How far a racer is behind the leader.

    Attributes:
        tiles: Tiles of the road between them now.
        seconds: How long ago the leader was where the racer is now.
    """

    tiles: int
    seconds: float


def without_picture(moment: Moment) -> Moment:
    """The moment without its 720 kB."""
    return Moment(**{**vars(moment), "picture": None})


def leader(racers: Sequence[Racer]) -> Racer:
    """Who is farthest; of those equally far, who was there first."""
    return max(racers, key=lambda racer: (racer.now.progress, -(racer.seconds_at(racer.now.progress) or 0.0)))


def gap(racer: Racer, ahead: Racer) -> Gap:
    """How far ``racer`` is behind ``ahead``."""
    there, here = ahead.seconds_at(racer.now.progress), racer.seconds_at(racer.now.progress)
    assert there is not None, "the leader has been wherever the others are"
    assert here is not None
    # Where the racer is now, counted from its arrival there: a car that has stopped falls behind no further on tiles,
    # but the clock goes on until it is out.
    arrival = here if racer.out else racer.seconds
    return Gap(ahead.now.progress - racer.now.progress, max(arrival - there, 0.0))


class Odometer:
    """Turns the game's state after a frame into a :class:`Moment`."""

    def __init__(self, draw: bool) -> None:
        self.draw = draw
        self.progress = 0
        self.episode_return = 0.0

    def read(self, env: Any, reward: float) -> Moment:
        """The moment of ``env``, and what that frame was worth."""
        game = env.unwrapped
        self.progress = game.progress(self.progress)
        self.episode_return += reward
        x, y = game.car.hull.position
        return Moment(
            x=x,
            y=y,
            angle=game.car.hull.angle,
            speed=game.speed(),
            progress=min(self.progress, len(game.track) - 1),
            tiles=game.tile_visited_count,
            n_tiles=len(game.track),
            episode_return=self.episode_return,
            lap_finished=game.tile_visited_count == len(game.track),
            picture=env.render() if self.draw else None,
        )


def policy_moments(policy: Policy, track: int, draw: bool = True) -> Iterator[Moment]:
    """A policy's drive, the very one that ``evaluate`` scores, frame by frame."""
    odometer, reached = Odometer(draw), list[Moment]()
    env = make_env(
        policy.observation,
        render_mode="rgb_array",
        on_frame=lambda env, track, action, reward: reached.append(odometer.read(env, reward)),
    )
    for _ in play(policy, track, env):
        yield from reached
        reached.clear()
    env.close()


def race(racers: Sequence[Racer], drives: Sequence[Iterator[Moment]]) -> Iterator[int]:
    """Drive all of them side by side; yields the frame's number after each frame that anybody drives.

    ``racers`` are brought up to date before each yield.
    """
    frame = 0
    while not all(racer.out for racer in racers):
        for racer, drive in zip(racers, drives, strict=True):
            moment = None if racer.out else next(drive, None)
            if moment is None:
                racer.out = True
            else:
                racer.add(moment)
        if not all(racer.out for racer in racers):
            frame += 1
            yield frame


def draw_race(racers: Sequence[Racer], title: str) -> Frame:
    """The race as it stands, one panel for each racer whose moments have pictures; the others are ghosts in them."""
    first = leader(racers)
    standings = [_standing(racer, first, _with_ghosts(racer, racers)) for racer in racers]
    return compose_race(standings, title, max(racer.seconds for racer in racers))


def _standing(racer: Racer, first: Racer, picture: Frame | None) -> Standing:
    now, behind = racer.now, gap(racer, first)
    return Standing(
        name=racer.name,
        picture=picture,
        episode_return=now.episode_return,
        tiles=now.tiles,
        n_tiles=now.n_tiles,
        progress=now.progress,
        seconds=racer.seconds,
        gap_seconds=behind.seconds,
        gap_tiles=behind.tiles,
        leads=racer is first,
        out=racer.out,
        lap_finished=now.lap_finished,
    )


def _with_ghosts(racer: Racer, racers: Sequence[Racer]) -> Frame | None:
    now = racer.now
    if now.picture is None:
        return None
    picture, camera = now.picture.copy(), (now.x, now.y, now.angle)
    for other, color in zip(racers, COLORS, strict=False):
        if other is not racer:
            there = other.now
            draw_ghost(picture, (there.x, there.y, there.angle), camera, racer.seconds, color)
    return picture
