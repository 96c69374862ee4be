"""Drives that were driven before, kept so that nobody waits for them twice.

A drive is a function of the policy file, the track, the game and this code on this kind of processor: each combination
of all but the track has one file, ``evaluations/KEY.json`` below the folder of the run folders.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from pipeline import durable
from pipeline.config import ObservationParams
from pipeline.evaluation import Episode, Evaluator
from pipeline.tracking.provenance import cpu_name

FOLDER = "evaluations"
PACKAGE = Path(__file__).parent
DRIVING_CODE = ("agent/network.py", "agent/policy.py", "config/params.py", "evaluation.py", "sim/*.py")
"""Code that decides what a policy file does on a track."""
PACKAGES = ("gymnasium", "box2d", "torch", "numpy", "scipy", "stable-baselines3")
KEPT_EVERY = 10.0
"""Seconds between two writings of what was driven: at most so much is lost with a killed command."""


def identity(policy: Path, observation: ObservationParams) -> dict[str, Any]:
    """All that a drive depends on beside the track, as JSON values.

    Args:
        policy: Policy file.
        observation: What an SB3 zip was trained to see; our own policies carry that themselves.
    """
    sha = hashlib.sha256()
    for path in sorted(p for pattern in DRIVING_CODE for p in PACKAGE.glob(pattern)):
        sha.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    seen = {key: getattr(observation, key) for key in ObservationParams.model_fields}
    return {
        "policy": hashlib.sha256(policy.read_bytes()).hexdigest(),
        "observation": seen if policy.suffix == ".zip" else None,
        "game": "CarRacing-v3",
        "code": sha.hexdigest(),
        "versions": {name: version(name) for name in PACKAGES},
        "processor": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",  # it decides the last bits
    }


class ScoreCache:
    """Drives of one policy.

    Args:
        folder: Of the run folders.
        policy: Policy file.
        observation: See :func:`identity`.
    """

    def __init__(self, folder: Path, policy: Path, observation: ObservationParams) -> None:
        self.identity = identity(policy, observation)
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / FOLDER / f"{key}.json"

    def read(self) -> dict[int, Episode]:
        """The known drives by track; a file that is damaged or of something else counts as none."""
        try:
            content = json.loads(self.path.read_text())
            if content["of"] != self.identity:
                return {}
            return {row["track"]: Episode(**row) for row in content["episodes"]}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def forget(self, tracks: Iterable[int]) -> None:
        """Drop the drives of these tracks."""
        gone = set(tracks)
        self._rewrite(lambda known: {track: each for track, each in known.items() if track not in gone})

    def add(self, episodes: Iterable[Episode]) -> None:
        """Keep drives beside the known ones, also those that another process adds at the same time."""
        new = {episode.track: episode for episode in episodes}
        self._rewrite(lambda known: known | new)

    def _rewrite(self, change: Callable[[dict[int, Episode]], dict[int, Episode]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            kept = change(self.read())
            rows = [asdict(kept[track]) for track in sorted(kept)]
            durable.publish(self.path, json.dumps({"of": self.identity, "episodes": rows}, indent=0).encode())


def drive_new(
    evaluator: Evaluator,
    cache: ScoreCache,
    policy: Path,
    tracks: Sequence[int],
    observation: ObservationParams,
    on_episode: Callable[[Episode], None],
) -> list[Episode]:
    """Drive the tracks that are not in the cache, and keep them there; all episodes in the order of ``tracks``.

    Args:
        evaluator: Who drives.
        cache: Of this policy.
        policy: Policy file.
        tracks: Track seeds.
        observation: What an SB3 zip was trained to see.
        on_episode: Called as each new drive ends.
    """
    known = cache.read()
    new: list[Episode] = []
    kept = time.monotonic()

    def keep(episode: Episode) -> None:
        nonlocal kept
        new.append(episode)
        if time.monotonic() - kept > KEPT_EVERY:
            cache.add(new)
            kept = time.monotonic()
        on_episode(episode)

    missing = [track for track in tracks if track not in known]
    if missing:
        evaluator.play(policy, missing, observation, on_episode=keep)
        cache.add(new)
        known |= {episode.track: episode for episode in new}
    return [known[track] for track in tracks]
