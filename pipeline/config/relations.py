"""Rules between keys. Each function is called when all the keys it names are valid by themselves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pipeline.config.params import FIRST_TRAINING_TRACK, track_bounds

RELATIONS: list[Callable[..., str | None]] = []


def relation(rule: Callable[..., str | None]) -> Callable[..., str | None]:
    """Register a rule between the keys that are its arguments; it returns what is wrong, or None."""
    RELATIONS.append(rule)
    return rule


def cores() -> int:
    """Cores this process may use; ``PYTHON_CPU_COUNT``, Python 3.13's word for it, gives it a share of the machine."""
    share = os.environ.get("PYTHON_CPU_COUNT", "")
    if share.isdecimal() and int(share):
        return int(share)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@relation
def batch_size_divides_rollout(batch_size: int, n_steps: int, n_envs: int) -> str | None:
    """SB3 would train on a short last batch."""
    rollout = n_steps * n_envs
    if rollout % batch_size == 0:
        return None
    near = max(d for d in range(1, min(batch_size, rollout) + 1) if rollout % d == 0)
    return f"expected a divisor of n_steps x n_envs = {n_steps} x {n_envs} = {rollout}, such as {near}"


@relation
def total_timesteps_hold_a_rollout(total_timesteps: int, n_steps: int, n_envs: int) -> str | None:
    """PPO learns from whole rollouts."""
    rollout = n_steps * n_envs
    return None if total_timesteps >= rollout else f"expected at least one rollout, n_steps x n_envs = {rollout}"


@relation
def n_envs_fit_the_cores(n_envs: int) -> str | None:
    """More environments only cost memory."""
    most = 64 * cores()
    return None if n_envs <= most else f"expected at most 64 per core, {most} on this machine with {cores()} cores"


@relation
def n_workers_fit(n_workers: int, n_envs: int) -> str | None:
    """Each worker needs an environment, and a share of a core."""
    if n_workers > n_envs:
        return f"expected at most n_envs = {n_envs}: a worker without an environment is idle"
    return None if n_workers <= 4 * cores() else f"expected at most {4 * cores()}, four per core of this machine"


@relation
def num_threads_fit_the_cores(num_threads: int) -> str | None:
    """torch's workers spin when cores are oversubscribed."""
    return None if num_threads <= cores() else f"expected at most {cores()}, the cores of this machine (0 = all)"


@relation
def device_is_present(device: str) -> str | None:
    """SB3 would train on the CPU without a word."""
    if device in ("auto", "cpu"):
        return None
    import torch  # 1 s: only when a GPU was asked for by name

    kind, _, index = device.partition(":")
    if kind == "mps":
        return None if torch.backends.mps.is_available() else "this machine has no Apple GPU; use auto or cpu"
    count = torch.cuda.device_count()
    if count == 0:
        return "this machine (or this build of torch) has no CUDA GPU; use auto or cpu"
    return None if int(index or 0) < count else f"this machine has {count} CUDA GPU(s), numbered from 0"


@relation
def validation_tracks_are_not_test_tracks(validation_seed: int, n_eval_episodes: int, tracks: str) -> str | None:
    """The best policy is chosen on the validation tracks."""
    if validation_seed + n_eval_episodes > FIRST_TRAINING_TRACK:
        return f"the last validation track must be below {FIRST_TRAINING_TRACK}, where the training tracks begin"
    first, stop = track_bounds(tracks)
    if validation_seed + n_eval_episodes <= first or validation_seed >= stop:
        return None
    return (
        f"validation tracks {validation_seed}:{validation_seed + n_eval_episodes} overlap the test tracks {tracks}: "
        "the best model would be chosen on the tracks it is tested on"
    )


@relation
def warm_start_is_there(warm_start: str) -> str | None:
    """What it was trained with is checked when it is read."""
    return None if not warm_start or Path(warm_start).is_file() else "no such file; expected a policy file, or ''"


@relation
def video_tracks_are_different(video_tracks: list[str]) -> str | None:
    """A film per rank."""
    return None if len(set(video_tracks)) == len(video_tracks) else "expected each of best, median, worst at most once"
