"""Where a training is made to die or to fail, from outside: production code has no failpoints.

What matters on the way to the disk are system calls, and :mod:`pipeline.durable` makes them by name from ``os``; what
matters on the way to MLflow are calls of its client. Both are replaced in the victim's process alone. So the code that
ships is the code that is tested, and a point can't be left armed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym

from pipeline.sim.training_env import make_training_env


def die(point: str) -> None:
    """As ``kill -9`` would, here and now."""
    os.write(2, f"failpoint {point}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


def note_result(path: Path) -> None:
    """Have the training write digests of everything it learned when it is done."""
    from pipeline.agent import checkpoint
    from pipeline.session import BEST, FINAL, Session

    publish = Session.publish

    def publish_and_note(session: Session) -> dict[str, float]:
        figures = publish(session)
        state = checkpoint.capture(session.model, {})
        counted = ("num_timesteps", "n_updates", "slowdown", "random.numpy", "scaler")
        counters = json.dumps([state.header[k] for k in counted])
        digests = {
            "learning state": checkpoint.digest(state.tensors, counters),  # weights, Adam, generators, environments
            "best policy": hashlib.sha256(BEST.read_bytes()).hexdigest(),
            "final policy": hashlib.sha256(FINAL.read_bytes()).hexdigest(),
        }
        path.write_text(json.dumps(digests))
        return figures

    Session.publish = publish_and_note  # type: ignore[method-assign]


def _is_state(descriptor: int) -> bool:
    return "/state_" in str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _nth(count: int, test: Callable[..., bool], action: Callable[..., Any], original: Callable[..., Any]) -> Any:
    """``original``, but ``action`` in its place at the ``count``-th call for which ``test`` holds."""
    calls = itertools.count(1)

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        if test(*args, **kwargs) and next(calls) == count:
            return action(*args, **kwargs)
        return original(*args, **kwargs)

    return replaced


def _to_state(source: Any, target: Any = "", **_: Any) -> bool:
    return "/state_" in str(target or source)


def before_write(count: int) -> None:
    """A state's temporary file is there, and empty."""
    os.write = _nth(count, lambda fd, data: _is_state(fd), lambda fd, data: die("before-write"), os.write)


def mid_write(count: int) -> None:
    """Half of a state is in its temporary file."""
    write = os.write

    def half(descriptor: int, data: Any) -> None:
        write(descriptor, data[: len(data) // 2])
        die("mid-write")

    os.write = _nth(count, lambda fd, data: _is_state(fd), half, write)


def after_write(count: int) -> None:
    """All of a state is written, nothing is synced."""
    os.fsync = _nth(count, _is_state, lambda fd: die("after-write"), os.fsync)


def before_rename(count: int) -> None:
    """The temporary file is synced and has its old name."""
    os.replace = _nth(count, _to_state, lambda *_: die("before-rename"), os.replace)


def after_rename(count: int) -> None:
    """The state has its name; the folder is not synced, old states are still there."""
    replace = os.replace

    def then_die(*args: Any) -> None:
        replace(*args)
        die("after-rename")

    os.replace = _nth(count, _to_state, then_die, replace)


def during_retention(count: int) -> None:
    """The new state is there, the old one not yet gone."""
    unlink = Path.unlink

    def is_old_state(path: Path, missing_ok: bool = False) -> bool:
        return path.name.startswith("state_") and path.suffix == ".safetensors"

    Path.unlink = _nth(count, is_old_state, lambda *_, **__: die("during-retention"), unlink)  # type: ignore[method-assign]


def _around_batch(count: int, point: str, before: bool) -> None:
    from mlflow import MlflowClient

    log_batch = MlflowClient.log_batch

    def has_metrics(*args: Any, **kwargs: Any) -> bool:
        return bool(kwargs.get("metrics"))

    def crash(*args: Any, **kwargs: Any) -> None:
        if not before:
            log_batch(*args, **kwargs)
        die(point)

    MlflowClient.log_batch = _nth(count, has_metrics, crash, log_batch)


def before_batch(count: int) -> None:
    """Metrics are in the spool, MLflow is about to get them."""
    _around_batch(count, "before-batch", True)


def after_batch(count: int) -> None:
    """MLflow has the metrics, the spool does not know it."""
    _around_batch(count, "after-batch", False)


def before_version(count: int) -> None:
    """The model is stored, and is not a version in the registry yet."""
    import mlflow

    mlflow.register_model = _nth(
        count, lambda *_, **__: True, lambda *_, **__: die("before-version"), mlflow.register_model
    )


def before_alias(count: int) -> None:
    """The version is registered, and nothing points to it."""
    from mlflow import MlflowClient

    alias = MlflowClient.set_registered_model_alias
    MlflowClient.set_registered_model_alias = _nth(count, lambda *_, **__: True, lambda *_: die("before-alias"), alias)


TRAINING_POINTS: tuple[Callable[[int], None], ...] = (
    before_write,
    mid_write,
    after_write,
    before_rename,
    after_rename,
    during_retention,
    before_batch,
    after_batch,
)
REGISTRATION_POINTS: tuple[Callable[[int], None], ...] = (before_version, before_alias)


def slow_rollouts(seconds: float) -> None:
    """Make each rollout so much longer, by sleeping: a training that lasts costs no processor."""
    from pipeline.agent.ppo import DrivingPPO

    collect = DrivingPPO.collect_rollouts

    def slowly(*args: Any, **kwargs: Any) -> bool:
        time.sleep(seconds)
        return collect(*args, **kwargs)

    DrivingPPO.collect_rollouts = slowly  # type: ignore[method-assign]


def held_rollouts(gate: Path) -> None:
    """Let as many rollouts begin as the gate's file has bytes: the harness may add some at any time."""
    from pipeline.agent.ppo import DrivingPPO

    collect, numbers = DrivingPPO.collect_rollouts, itertools.count(1)

    def when_let(*args: Any, **kwargs: Any) -> bool:
        number = next(numbers)
        while gate.stat().st_size < number:
            time.sleep(0.05)
        return collect(*args, **kwargs)

    DrivingPPO.collect_rollouts = when_let  # type: ignore[method-assign]


def time_the_spool(path: Path) -> None:
    """Write down the longest time that telling MLflow something has taken the training [s]."""
    from pipeline.tracking.spool import Spool

    longest = 0.0

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal longest
            began = time.monotonic()
            try:
                return original(*args, **kwargs)
            finally:
                longest = max(longest, time.monotonic() - began)
                path.write_text(str(longest))

        return call

    Spool.put = timed(Spool.put)  # type: ignore[method-assign]
    Spool.sync = timed(Spool.sync)  # type: ignore[method-assign]


def short_deadline(seconds: float) -> None:
    """Take workers for hung after so long."""
    from pipeline.sim.vec_env import SharedMemoryVecEnv

    initialize = SharedMemoryVecEnv.__init__
    initialize.__defaults__ = tuple(seconds if value == 60.0 else value for value in initialize.__defaults__ or ())


class Raises(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that raises once, at its third step: a file notes that it did."""

    def __init__(self, env: gym.Env[Any, Any], mark: Path) -> None:
        super().__init__(env)
        self.mark, self.steps = mark, 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.steps == 3 and not self.mark.exists():
            self.mark.touch()
            raise RuntimeError(f"chaos: {self.mark.name} raises")
        return self.env.step(action)

    def replay(self, episode: int, actions: Any) -> Any:
        """Of the environment inside."""
        return self.env.get_wrapper_attr("replay")(episode, actions)


def make_raising_env(marks: Path, params: Any, index: int) -> gym.Env[Any, Any]:
    """The training environment, which raises once."""
    return Raises(make_training_env(params, index), marks / f"environment-{index}")


def raising_environments(marks: Path) -> None:
    """Have every environment raise once."""
    import pipeline.sim.training_env

    marks.mkdir(exist_ok=True)
    pipeline.sim.training_env.make_training_env = functools.partial(make_raising_env, marks)
