"""What happens around the updates: progress, statistics of the episodes, periodic work between rollouts."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from pipeline.sim.env import to_pedals

log = logging.getLogger(__name__)

EPISODES = 100
"""Episodes behind every running mean; the same as SB3's."""


class Periodic(BaseCallback):
    """Call ``action(agent_steps)`` whenever another ``every`` agent steps are done, and at the end of the training.

    It acts at the start of a rollout: no environment is stepping and the last update is done. ``every`` 0 means only at
    the end.
    """

    def __init__(self, every: int, action: Callable[[int], None]) -> None:
        super().__init__()
        self.every, self.action = every, action
        self.last = 0  # agent steps at the latest call

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.every and self.num_timesteps // self.every > self.last // self.every:
            self._act()

    def _on_training_end(self) -> None:
        if self.num_timesteps > self.last:
            self._act()

    def _act(self) -> None:
        self.last = self.num_timesteps
        self.action(self.num_timesteps)


class EveryRollout(BaseCallback):
    """Call ``action()`` before each rollout but the first, when the last update is done."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__()
        self.action = action

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:
            self.action()


class EndEarly(BaseCallback):
    """End the training as if it were done, at the end of the rollout before which ``is_asked()`` first held."""

    def __init__(self, is_asked: Callable[[], bool]) -> None:
        super().__init__()
        self.is_asked, self._asked = is_asked, False

    def _on_rollout_start(self) -> None:
        self._asked = self._asked or self.is_asked()

    def _on_step(self) -> bool:
        # Not in the middle of a rollout: environments are being stepped then, whose state could not be saved.
        return not (self._asked and self.n_calls % self.model.n_steps == 0)  # type: ignore[attr-defined]


class EpisodeStatistics(BaseCallback):
    """Log what explains the return: the shaped return, finished laps, lap time, tiles, and how the pedals are used."""

    KEYS = ("shaped_return", "lap_finished", "tiles", "missed_tiles", "lost")

    def __init__(self) -> None:
        super().__init__()
        self.episodes: deque[dict[str, float]] = deque(maxlen=EPISODES)
        self._retries: list[float] = []  # of this rollout

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        self.episodes.extend(info["episode"] for info in infos if "episode" in info)
        self._retries += [info["retry"] for info in infos if "retry" in info]
        return True

    def _on_rollout_end(self) -> None:
        for key in self.KEYS if self.episodes else ():
            self.logger.record(f"rollout/{key}", float(np.mean([e[key] for e in self.episodes])))
        if laps := [e["lap_time"] for e in self.episodes if e["lap_finished"]]:
            self.logger.record("rollout/lap_time", float(np.mean(laps)))
        if self._retries:
            self.logger.record("rollout/retry_success", float(np.mean(self._retries)))
            self._retries = []
        self._record_actions(self.model.rollout_buffer.actions)  # type: ignore[attr-defined]

    def _record_actions(self, actions: Any) -> None:
        actions = actions.reshape(-1, actions.shape[-1])
        names = ("steer", "throttle") if actions.shape[1] == 2 else ("steer", "gas", "brake")
        for name, values in zip(names, actions.T, strict=True):
            self.logger.record(f"actions/{name}_mean", float(values.mean()))
            self.logger.record(f"actions/{name}_std", float(values.std()))
            self.logger.record(f"actions/{name}", th.from_numpy(values.copy()), exclude="mlflow")  # a histogram
        pedals = to_pedals(actions) if actions.shape[1] == 2 else actions
        for name, values in zip(("gas", "brake"), pedals.T[1:], strict=True):
            self.logger.record(f"actions/{name}_use", float((values > 0).mean()))  # share of the decisions


class Progress(BaseCallback):
    """A progress bar with steps/s and the time left; a line every ``seconds`` in the log, and where there is no bar."""

    def __init__(self, total_timesteps: int, seconds: float = 15.0) -> None:
        super().__init__()
        self.total, self.seconds = total_timesteps, seconds

    def _on_training_start(self) -> None:
        self._first, self._began = self.num_timesteps, time.monotonic()
        self._next_line = self._began + self.seconds
        self._bar = tqdm(
            total=self.total, initial=self._first, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._bar.update(self.num_timesteps - self._bar.n)
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self.seconds
            log.log(logging.INFO if self._bar.disable else logging.DEBUG, self.line())

    def line(self) -> str:
        """Where the training stands: steps, speed, time left, running return."""
        speed = (self.num_timesteps - self._first) / max(time.monotonic() - self._began, 1e-9)
        left = max(self.total - self.num_timesteps, 0) / max(speed, 1e-9)
        episodes = self.model.ep_info_buffer or ()
        mean = f", return {np.mean([e['r'] for e in episodes]):.0f}" if episodes else ""
        return f"{self.num_timesteps:,}/{self.total:,} steps, {speed:.0f}/s, {_clock(left)} left{mean}"

    def _on_training_end(self) -> None:
        self._bar.update(self.num_timesteps - self._bar.n)
        self._bar.close()
        log.info(self.line())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
