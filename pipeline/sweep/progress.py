"""How far a sweep is: a bar with the time left, or a line a minute where there is no terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from pipeline.interrupts import Interrupts
from pipeline.sweep.runner import Runner

log = logging.getLogger(__name__)

LINE_SECONDS = 60.0
TICK_SECONDS = 1.0


class Progress:
    """Lets time pass while trainings run: looks after them, shows how far they are, hears signals.

    Args:
        runner: Runs them.
        stop: Asked whether to end.
        total: Trainings in all; None where that is not known.
        done: Counts those that have ended.
    """

    def __init__(self, runner: Runner, stop: Interrupts, total: int | None, done: Callable[[], int]) -> None:
        self._runner, self._stop, self._total, self._done = runner, stop, total, done
        self._bar = tqdm(
            total=total,
            desc="trainings",
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}, {remaining} left]",
        )
        self._began, self._next_line = time.monotonic(), time.monotonic() + LINE_SECONDS
        self._first = self._now()

    def tick(self) -> None:
        """Look after the trainings, and wait a little.

        Raises:
            SystemExit: Asked to stop; the trainings have saved their states and ended.
        """
        self._stop.check(self._runner.stop)
        self._runner.poll()
        now = self._now()
        self._bar.update(now - self._bar.n)
        if self._bar.disable and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            log.info(self._line(now))
        time.sleep(TICK_SECONDS)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        """Take the bar away."""
        self._bar.close()

    def _now(self) -> float:
        """Trainings so far, those under way by their share of steps."""
        under_way = [job for job in self._runner.unfinished if not job.outcome]  # the others are among the done
        return self._done() + sum(min(job.steps() / job.params.total_timesteps, 1) for job in under_way)

    def _line(self, now: float) -> str:
        running = len(self._runner.unfinished)
        if self._total is None:
            return f"{now:.1f} trainings, {running} under way"
        speed = (now - self._first) / max(time.monotonic() - self._began, 1e-9)
        left = f", {(self._total - now) / speed / 60:.0f} minutes left" if speed > 0 else ""
        return f"{now:.1f} of {self._total} trainings, {running} under way or waiting{left}"
