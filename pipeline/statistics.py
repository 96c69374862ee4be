"""Statistics of returns on the same tracks: of one policy, of two, and of recipes, each trained with several seeds.

One policy's returns are an array (n_tracks,). A recipe's are (n_seeds, n_tracks): a row is one training's policy on all
tracks, and the tracks are those of everybody it is compared with. All intervals are at 95%, and repeatable, since the
random numbers behind them are seeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Statistic = Callable[..., Floats]
"""Of one or more (k, n_seeds, n_tracks) arrays, k resamples of as many groups, the (k,) values."""

PAIRED_TEST = "one-sided paired sign-flip permutation test of the mean"
ALPHA = 0.05
CHUNK = 4_000_000
"""Returns that are resampled at a time: 32 MB."""
MAX_DEALS = 20_000
"""Up to so many ways to deal trainings into two groups are all counted; of more, as many are drawn."""


# One policy, or two


def iqm(returns: Floats, axis: int = -1) -> Any:
    """Interquartile mean along an axis: the mean of the middle half.

    Agarwal et al. (2021), "Deep reinforcement learning at the edge of the statistical precipice".
    """
    return stats.trim_mean(returns, 0.25, axis=axis)


def interval(returns: Floats, samples: int, statistic: Callable[..., Any]) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic over (n_tracks,) returns.

    ``statistic(draws, axis=1)`` is called with (samples, n_tracks) returns.
    """
    if len(returns) < 2:
        return float(returns[0]), float(returns[0])
    draws = np.random.default_rng(0).choice(returns, (samples, len(returns)))
    low, high = np.percentile(statistic(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedTest:
    """One policy against another, paired by track.

    Attributes:
        mean: Mean difference of the returns; positive is better than the other.
        low: Lower end of its bootstrap interval over tracks.
        high: Upper end.
        p_value: Chance of a mean difference this high if both drove equally well.
        p_two_sided: Chance of one this large in either direction.
        wins: Tracks on which the return is higher.
        n_tracks: Tracks driven by both.
    """

    mean: float
    low: float
    high: float
    p_value: float
    p_two_sided: float
    wins: int
    n_tracks: int

    def __str__(self) -> str:
        return (
            f"mean difference {self.mean:+.2f}, 95% bootstrap interval {self.low:+.2f} to {self.high:+.2f}, "
            f"higher on {self.wins} of {self.n_tracks} tracks; {PAIRED_TEST}: p = {self.p_value:.4f}"
        )


def paired_test(challenger: Floats, champion: Floats, samples: int) -> PairedTest:
    """Test whether the challenger's mean return is higher, given (n_tracks,) returns of both on the same tracks.

    If both drove equally well, a track's two returns could as well be swapped: its difference could have either sign.
    The p-value is the share of random signs that give a mean at least as high, the observed one included (Phipson and
    Smyth 2010, "Permutation p-values should never be zero"). Wilcoxon's signed ranks would ask about the typical track
    instead: a challenger a little faster on 90 tracks that crashes on 10 would win it, with a lower mean.
    """
    differences = challenger - champion
    mean = float(differences.mean())
    random = np.random.default_rng(0)
    flipped = random.choice([-1.0, 1.0], (samples, len(differences))) @ differences / len(differences)
    # Equal up to rounding counts as equal: sums of the same numbers differ in the last bits.
    higher = np.count_nonzero(flipped >= mean - 1e-9)
    larger = np.count_nonzero(np.abs(flipped) >= abs(mean) - 1e-9)
    resampled = random.choice(differences, (samples, len(differences))).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return PairedTest(
        mean,
        float(low),
        float(high),
        float((1 + higher) / (1 + samples)),
        float((1 + larger) / (1 + samples)),
        int(np.count_nonzero(differences > 0)),
        len(differences),
    )


# Recipes: several trainings each


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} ({self.low:.1f} to {self.high:.1f})"


def mean(returns: Floats) -> Floats:
    """(k, n_seeds, n_tracks) -> (k,) mean returns."""
    return np.asarray(returns.mean(axis=(1, 2)))


def flat_iqm(returns: Floats) -> Floats:
    """(k, n_seeds, n_tracks) -> (k,) IQM over all trainings and tracks, as rliable's ``aggregate_iqm``."""
    return np.asarray(iqm(returns.reshape(len(returns), -1), axis=1))


def mean_difference(b: Floats, a: Floats) -> Floats:
    """(k,) by how much the mean of ``b`` is higher."""
    return np.asarray(mean(b) - mean(a))


def improvement(b: Floats, a: Floats) -> Floats:
    """(k,) probability of improvement: how likely a training of ``b`` beats one of ``a`` on a track drawn at random.

    Equal returns count half. Agarwal et al. (2021), section 4.3: the mean over tracks of Mann and Whitney's
    U / (n_b n_a).
    """
    beats = np.sign(b[:, :, None, :] - a[:, None, :, :])  # (k, n_b, n_a, n_tracks)
    return np.asarray((1 + beats.mean(axis=(1, 2, 3))) / 2)


def estimate(statistic: Statistic, samples: int, *groups: Floats, n_comparisons: int = 1) -> Estimate:
    """A statistic of groups (n_seeds, n_tracks) that drove the same tracks, with its interval.

    The intervals of ``n_comparisons`` are each so wide that all of them hold in 95 of 100 cases (Bonferroni).

    Hierarchical bootstrap: each resample draws tracks, the same for all groups, and of each group whole trainings. One
    training drives all tracks, so a training that turned out bad is bad on all of them; rliable's stratified bootstrap
    (:func:`stratified_interval`) draws anew on each track, which fits games that are each trained on by themselves,
    and says here that three seeds are as good as three times as many tracks.

    Few trainings resampled vary too little. What they add to a resample is widened by the two factors that make it
    Student's interval of the mean where tracks don't matter: (n - 1) / n in the variance, and t for the normal
    quantile (Hesterberg 2015, "What teachers should know about the bootstrap", section 4). Groups are taken to vary
    alike, so that one of a single training can be compared; if all are, the interval speaks of these policies and other
    tracks.
    """
    value = float(statistic(*(group[None] for group in groups))[0])
    tail = ALPHA / 2 / n_comparisons
    replicates = np.concatenate(list(_replicates(statistic, samples, groups, tail)))
    low, high = np.percentile(replicates, [100 * tail, 100 * (1 - tail)])
    return Estimate(value, float(low), float(high))


def _replicates(statistic: Statistic, samples: int, groups: Sequence[Floats], tail: float) -> Iterator[Floats]:
    random = np.random.default_rng(0)
    n_tracks, factor = groups[0].shape[1], widening([len(group) for group in groups], tail)
    left = samples
    while left > 0:
        k = min(left, max(1, CHUNK // sum(group.size for group in groups)))
        left -= k
        tracks = random.integers(0, n_tracks, (k, n_tracks))
        same = [group[:, tracks].swapaxes(0, 1) for group in groups]  # (k, n_seeds, n_tracks)
        fixed = statistic(*same)
        if factor == 0:
            yield fixed
            continue
        drawn = [random.integers(0, len(group), (k, len(group))) for group in groups]
        other = [np.take_along_axis(d, seeds[:, :, None], axis=1) for d, seeds in zip(same, drawn, strict=True)]
        yield fixed + factor * (statistic(*other) - fixed)


def widening(sizes: Sequence[int], tail: float = ALPHA / 2) -> float:
    """By what the part of a bootstrap interval that comes from trainings is too narrow; 0 where there is no such part.

    Args:
        sizes: Trainings in each group.
        tail: Chance left out at either end of the interval.
    """
    freedom = sum(n - 1 for n in sizes)
    if freedom == 0:
        return 0.0
    resampled = sum((n - 1) / n**2 for n in sizes)  # variance of a resampled mean, in variances of a training
    quantiles = stats.t.isf(tail, freedom) / stats.norm.isf(tail)
    return float(math.sqrt(sum(1 / n for n in sizes) / resampled) * quantiles)


def stratified_interval(statistic: Statistic, samples: int, group: Floats) -> tuple[float, float]:
    """rliable's interval of a group (n_seeds, n_tracks): trainings are drawn anew on each track, tracks are fixed.

    For figures beside those of papers; see :func:`estimate` for what it leaves out. Agarwal et al. (2021), section 4.1.
    """
    random = np.random.default_rng(0)
    found, left = [], samples
    while left > 0:
        k = min(left, max(1, CHUNK // group.size))
        left -= k
        seeds = random.integers(0, len(group), (k, *group.shape))
        found.append(statistic(np.take_along_axis(group[None], seeds, axis=1)))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def lap_difference(b: Floats, a: Floats, samples: int, n_comparisons: int = 1) -> Estimate:
    """Difference in the share of laps finished, of (n_seeds, n_tracks) zeros and ones.

    Two tracks are made up for the interval, one that all of ``b`` finish and none of ``a``, and one the other way
    round: else 0 of 100 against 0 of 100 would be a difference of 0 for sure. Bonett and Price (2012), "Adjusted Wald
    confidence interval for a difference of binomial proportions based on paired data".
    """
    made_up = [np.broadcast_to(np.array(pair, float), (len(laps), 2)) for laps, pair in ((b, (1, 0)), (a, (0, 1)))]
    longer = [np.concatenate(pair, axis=1) for pair in zip((b, a), made_up, strict=True)]
    wider = estimate(mean_difference, samples, *longer, n_comparisons=n_comparisons)
    return Estimate(float(b.mean() - a.mean()), max(wider.low, -1.0), min(wider.high, 1.0))


def probability_of_improvement(b: Floats, a: Floats, samples: int, n_comparisons: int = 1) -> Estimate:
    """:func:`improvement` with its interval, which ends at 0 and 1."""
    found = estimate(improvement, samples, b, a, n_comparisons=n_comparisons)
    return Estimate(found.value, max(found.low, 0.0), min(found.high, 1.0))


@dataclass(frozen=True)
class Summary:
    """How the trainings of one recipe drove; of a single policy, how that did.

    Attributes:
        n_seeds: Trainings.
        n_tracks: Tracks that each policy drove.
        mean: Over trainings and tracks, with its interval.
        iqm: The same of the interquartile mean.
        stratified: rliable's interval of the IQM, for figures beside those of papers; None for a single policy.
        median: Of the trainings' means; of a single policy's returns.
        std: Of the trainings' means (n - 1); of a single policy's returns (n, as ``evaluate``).
        lowest: Lowest mean of a training; of a single policy the lowest return.
        highest: Highest.
        laps_finished: Share of the laps.
    """

    n_seeds: int
    n_tracks: int
    mean: Estimate
    iqm: Estimate
    stratified: tuple[float, float] | None
    median: float
    std: float
    lowest: float
    highest: float
    laps_finished: float


def summarize_seeds(returns: Floats, laps: Floats, samples: int) -> Summary:
    """Figures over the trainings of one recipe.

    Args:
        returns: (n_seeds, n_tracks) raw returns.
        laps: (n_seeds, n_tracks) whether the lap was finished, as 0 and 1.
        samples: Resamples behind the intervals.
    """
    several = len(returns) > 1
    values = returns.mean(axis=1) if several else returns[0]
    return Summary(
        n_seeds=returns.shape[0],
        n_tracks=returns.shape[1],
        mean=estimate(mean, samples, returns),
        iqm=estimate(flat_iqm, samples, returns),
        stratified=stratified_interval(flat_iqm, samples, returns) if several else None,
        median=float(np.median(values)),
        std=float(values.std(ddof=1 if several else 0)),
        lowest=float(values.min()),
        highest=float(values.max()),
        laps_finished=float(laps.mean()),
    )


def trainings_test(b: Floats, a: Floats) -> float:
    """Two-sided p-value that two groups (n_seeds, n_tracks) are trainings of one and the same recipe.

    Exact permutation test of the difference of the means: if the recipe makes no difference, the trainings could have
    been dealt to the two groups in any way; the p-value is the share of deals with a difference as large.
    """
    means = np.concatenate([b.mean(axis=1), a.mean(axis=1)])
    chosen = np.array(list(_deals(len(means), len(b))))  # (n_deals, n_b)
    first = means[chosen].sum(axis=1)
    differences = first / len(b) - (means.sum() - first) / len(a)
    return float(np.mean(np.abs(differences) >= abs(differences[0]) - 1e-9))


def _deals(n: int, chosen: int) -> Iterator[Sequence[int]]:
    if math.comb(n, chosen) <= MAX_DEALS:
        yield from combinations(range(n), chosen)  # the real one is the first
        return
    random = np.random.default_rng(0)
    yield range(chosen)
    for _ in range(MAX_DEALS):
        yield random.permutation(n)[:chosen].tolist()


def least_p(n_b: int, n_a: int) -> float:
    """The lowest p-value that :func:`trainings_test` can give to groups of these sizes."""
    return (1 + (n_b == n_a)) / math.comb(n_b + n_a, n_b)


def seed_noise(means: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation of a training's mean return, pooled over recipes, and its degrees of freedom.

    Args:
        means: Of each recipe the mean returns of its trainings, which differ in their seeds alone.
    """
    freedom = sum(len(group) - 1 for group in means if group)
    squares = sum(float(np.var(group)) * len(group) for group in means if group)
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


def noise_margin(deviation: float, freedom: int, n_b: int = 1, n_a: int = 1) -> float:
    """Up to what difference of the means two groups of trainings of one recipe stay in 95 of 100 cases."""
    return float(stats.t.ppf(0.975, freedom) * deviation * math.sqrt(1 / n_b + 1 / n_a))
