"""Figures over seeds: how good a setting is, and whether a difference between two is more than their luck."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pipeline.statistics import interval, iqm

SAMPLES = 10_000


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Median, IQM with its 95% bootstrap interval over seeds, mean, sample std and range of one figure per seed."""
    figures = np.asarray(values, dtype=float)
    low, high = interval(figures, SAMPLES, iqm)
    found = {
        "median": np.median(figures),
        "iqm": iqm(figures),
        "iqm_ci_low": low,
        "iqm_ci_high": high,
        "mean": figures.mean(),
        "std": figures.std(ddof=1) if len(figures) > 1 else 0.0,
        "min": figures.min(),
        "max": figures.max(),
    }
    return {"n_seeds": len(figures), **{key: round(float(value), 4) for key, value in found.items()}}


@dataclass(frozen=True)
class Difference:
    """How much more one setting reaches than another, by Welch's t: means over seeds with a 95% interval.

    A bootstrap over three seeds excludes 0 whenever all of them agree, which luck alone does one time in four; Welch's
    interval of three seeds is as wide as so little evidence deserves.
    """

    mean: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Whether luck alone may explain it."""
        return not (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        if not math.isfinite(self.low):
            return f"{self.mean:+.1f}; one seed each can't tell that from luck"
        words = "WITHIN SEED NOISE: luck alone may explain it" if self.within_noise else "more than seed noise"
        return f"{self.mean:+.1f} (95% interval {self.low:+.1f} to {self.high:+.1f}), {words}"


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """How much more ``a`` reaches than ``b``, one figure per seed each."""
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    mean = float(first.mean() - second.mean())
    if min(len(first), len(second)) < 2:
        return Difference(mean, -math.inf, math.inf)
    if first.std() == 0 and second.std() == 0:
        return Difference(mean, mean, mean)
    bounds = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    return Difference(mean, float(bounds.low), float(bounds.high))
