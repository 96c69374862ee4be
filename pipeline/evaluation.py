"""Play given tracks with a policy on the stock game, and say how well it drove.

An episode is a function of the policy file and the track alone: each is played by one process on one thread, so the
numbers do not depend on how many cores the machine has.
"""

from __future__ import annotations

import csv
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch as th
from gymnasium.envs.box2d.car_racing import FPS
from numpy.typing import NDArray

from pipeline.agent.policy import Policy, load
from pipeline.config import ObservationParams, cores
from pipeline.sim.env import make_env
from pipeline.sim.worker import live_with_parent
from pipeline.statistics import interval, iqm


@dataclass(frozen=True)
class Episode:
    """One drive on one track of the stock game.

    Attributes:
        track: Seed given to ``CarRacing-v3``'s reset.
        episode_return: Raw, undiscounted sum of the game's rewards.
        frames: Physics frames driven, 1000 at most.
        lap_finished: All tiles were visited.
        tiles: Road tiles visited.
        n_tiles: Road tiles of the track.
    """

    track: int
    episode_return: float
    frames: int
    lap_finished: bool
    tiles: int
    n_tiles: int


OnDecision = Callable[[NDArray[np.uint8]], None]


def drive(policy: Policy, track: int, env: Any = None, on_decision: OnDecision | None = None) -> Episode:
    """One deterministic episode on the stock game; arguments as of :func:`play`."""
    return deque(play(policy, track, env, on_decision), maxlen=1)[0]


def play(policy: Policy, track: int, env: Any = None, on_decision: OnDecision | None = None) -> Iterator[Episode]:
    """One deterministic episode on the stock game, a decision at a time: what it has come to after each of them.

    Args:
        policy: Who drives.
        track: Seed of the track.
        env: Made by ``make_env``; a new one if not given.
        on_decision: Called with each observation (c, h, w) uint8 before the network acts on it.
    """
    env = env or make_env(policy.observation)
    observation, _ = env.reset(seed=track)
    total, done = 0.0, False
    while not done:
        if on_decision:
            on_decision(observation)
        observation, reward, terminated, truncated, info = env.step(policy.predict(observation[None])[0])
        total += reward
        done = terminated or truncated
        frames = round(info["lap_time"] * FPS)
        yield Episode(track, round(total, 6), frames, bool(info["lap_finished"]), info["tiles"], info["n_tiles"])


def one_thread() -> None:
    """Let this process drive on one thread: the last bits of a network's answer depend on their number."""
    th.set_num_threads(1)
    cv2.setNumThreads(1)


class Evaluator:
    """Worker processes that play tracks, kept between calls: starting one costs 3 s of imports.

    Use as a context manager. ``n_workers`` 0 means one per core.
    """

    def __init__(self, n_workers: int = 0) -> None:
        workers = n_workers or cores()
        # spawn: the parent may hold torch threads and open databases, neither of which survives a fork. The initializer
        # is of a small module: a worker still importing torch, 4 s, must not outlive a killed parent either.
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=live_with_parent)

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None:  # a track takes seconds, and nobody waits for it any more
            for process in self._processes():
                process.kill()
        self.close()

    def _processes(self) -> list[Any]:
        return list((self._pool._processes or {}).values())  # kill_workers() comes with Python 3.14

    def close(self) -> None:
        """Stop the workers; tracks not begun are dropped."""
        self._pool.shutdown(cancel_futures=True)

    def play(
        self,
        policy: Path,
        tracks: Sequence[int],
        observation: ObservationParams | None = None,
        on_episode: Callable[[Episode], None] | None = None,
        on_stills: Callable[[list[NDArray[np.uint8]]], None] | None = None,
    ) -> list[Episode]:
        """Drive every track once; episodes in the order of ``tracks``.

        Args:
            policy: Policy file, ours or an SB3 zip.
            tracks: Track seeds.
            observation: What an SB3 zip was trained to see.
            on_episode: Called as each track ends, in any order.
            on_stills: Called once with pictures of the first track's drive, see :func:`stills`.
        """
        stamp = policy.stat().st_mtime_ns  # a file written again under the same name is another policy
        filmed = self._pool.submit(_stills_in_worker, policy, observation, tracks[0]) if on_stills else None
        futures = [self._pool.submit(_drive_in_worker, policy, stamp, observation, track) for track in tracks]
        for future in as_completed(futures):
            if on_episode:
                on_episode(future.result())
        if filmed and on_stills:
            on_stills(filmed.result())
        return [future.result() for future in futures]


@functools.lru_cache(maxsize=2)
def _loaded(path: Path, stamp: int, observation: ObservationParams | None) -> tuple[Policy, Any]:
    one_thread()
    policy = load(path, observation)
    return policy, make_env(policy.observation)


def _drive_in_worker(path: Path, stamp: int, observation: ObservationParams | None, track: int) -> Episode:
    policy, env = _loaded(path, stamp, observation)
    return drive(policy, track, env)


def _stills_in_worker(path: Path, observation: ObservationParams | None, track: int) -> list[NDArray[np.uint8]]:
    return stills(load(path, observation), track)


def stills(policy: Policy, track: int, seconds: float = 1.0) -> list[NDArray[np.uint8]]:
    """Pictures of a drive, one every so many seconds of game time: the game's ``rgb_array``, (400, 600, 3) uint8."""
    pictures: list[NDArray[np.uint8]] = []

    def on_frame(env: Any, track: int, action: NDArray[np.float32], reward: float) -> None:
        if env.unwrapped.frames % round(seconds * FPS) == 0:
            pictures.append(env.render())

    drive(policy, track, make_env(policy.observation, render_mode="rgb_array", on_frame=on_frame))
    return pictures


def summarize(episodes: Sequence[Episode], bootstrap_samples: int = 10_000) -> dict[str, float]:
    """The figures of a set of episodes.

    IQM is the mean of the middle half. Mean and IQM come with a 95% percentile bootstrap interval over tracks. ``std``
    is the population's.
    """
    returns = np.array([e.episode_return for e in episodes])
    mean_low, mean_high = interval(returns, bootstrap_samples, np.mean)
    low, high = interval(returns, bootstrap_samples, iqm)
    figures = {
        "mean": returns.mean(),
        "mean_ci_low": mean_low,
        "mean_ci_high": mean_high,
        "std": returns.std(),
        "min": returns.min(),
        "p10": np.percentile(returns, 10),
        "median": np.median(returns),
        "max": returns.max(),
        "iqm": iqm(returns),
        "iqm_ci_low": low,
        "iqm_ci_high": high,
        "laps_finished": np.mean([e.lap_finished for e in episodes]),
        "mean_frames": np.mean([e.frames for e in episodes]),
        "mean_tiles": np.mean([e.tiles / e.n_tiles for e in episodes]),
    }
    return {"n_tracks": len(episodes), **{key: round(float(value), 4) for key, value in figures.items()}}


def write_table(path: Path, episodes: Iterable[Episode]) -> None:
    """The per-track table as CSV, one row an episode; ``rank`` 1 is the lowest return."""
    episodes = list(episodes)
    ordered = sorted(episodes, key=lambda e: e.episode_return)
    ranks = {e.track: rank for rank, e in enumerate(ordered, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Episode)), "rank"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(e), "rank": ranks[e.track]} for e in episodes)


def read_table(path: Path) -> list[Episode]:
    """Read what :func:`write_table` wrote."""
    return parse_table(path.read_text())


def parse_table(text: str) -> list[Episode]:
    """The episodes of a table that :func:`write_table` wrote."""
    return [
        Episode(
            track=int(row["track"]),
            episode_return=float(row["episode_return"]),
            frames=int(row["frames"]),
            lap_finished=row["lap_finished"] == "True",
            tiles=int(row["tiles"]),
            n_tiles=int(row["n_tiles"]),
        )
        for row in csv.DictReader(text.splitlines())
    ]
