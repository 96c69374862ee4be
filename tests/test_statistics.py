"""Statistics against hand-computed values, scipy, and worlds whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from pipeline import statistics
from pipeline.statistics import Estimate, estimate, flat_iqm, improvement, mean, mean_difference

Floats = NDArray[np.float64]


def world(n_seeds: int, random: np.random.Generator, tracks: Floats, level: float = 900.0, std: float = 20.0) -> Floats:
    """(n_seeds, n_tracks) returns: what the track allows, how well the training turned out, luck."""
    seeds = std * random.standard_normal((n_seeds, 1))
    return level + tracks + seeds + 30 * random.standard_normal((n_seeds, len(tracks)))


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    assert statistics.iqm(np.array([1000.0, 1, 2, 3, 4, 5, 6, -1000])) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert flat_iqm(np.array([[[1000.0, 1, 2, 3], [4, 5, 6, -1000]]])) == pytest.approx([3.5])


def test_probability_of_improvement_by_hand() -> None:
    assert improvement(np.array([[[2.0, 1.0]]]), np.array([[[1.0, 1.0]]])) == pytest.approx([(1 + 0.5) / 2])
    b, a = np.array([[3.0], [1.0]]), np.array([[2.0], [1.0]])
    assert improvement(b[None], a[None]) == pytest.approx([(1 + 1 + 0 + 0.5) / 4])


def test_probability_of_improvement_is_mann_and_whitneys_u() -> None:
    random = np.random.default_rng(0)
    b, a = random.integers(0, 9, (4, 7)).astype(float), random.integers(0, 9, (3, 7)).astype(float)
    by_track = [stats.mannwhitneyu(b[:, track], a[:, track]).statistic / 12 for track in range(7)]
    assert improvement(b[None], a[None]) == pytest.approx([np.mean(by_track)])


def test_of_single_policies_the_interval_is_scipys_bootstrap_over_tracks() -> None:
    random = np.random.default_rng(1)
    b, a = random.normal(905, 20, 100), random.normal(900, 20, 100)
    expected = stats.bootstrap((b - a,), np.mean, method="percentile", n_resamples=20_000, random_state=0)
    found = estimate(mean_difference, 20_000, b[None], a[None])
    assert found.value == pytest.approx((b - a).mean())
    ends = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=0.15)


@pytest.mark.parametrize("sizes", [(8, 8), (6, 12)])
def test_where_tracks_do_not_matter_the_interval_is_students(sizes: tuple[int, int]) -> None:
    random = np.random.default_rng(2)
    means = [900 + 20 * stats.zscore(random.standard_normal(n), ddof=1) for n in sizes]  # of equal spread, as assumed
    student = stats.ttest_ind(*means).confidence_interval()
    b, a = (np.repeat(each[:, None], 5, axis=1) for each in means)
    found = estimate(mean_difference, 20_000, b, a)
    assert found.high - found.low == pytest.approx(student.high - student.low, rel=0.12)
    assert (found.low + found.high) / 2 == pytest.approx(found.value, abs=2)


def test_the_widening_by_hand() -> None:
    assert statistics.widening([1, 1]) == 0
    t, z = 2.7764, 1.9600  # of 4 degrees of freedom, and of the normal distribution
    assert statistics.widening([3, 3]) == pytest.approx(math.sqrt(3 / 2) * t / z, rel=1e-4)


def test_intervals_of_several_comparisons_hold_together() -> None:
    random = np.random.default_rng(3)
    b, a = random.normal(905, 20, (1, 400)), random.normal(900, 20, (1, 400))
    differences = (b - a)[0]
    found = estimate(mean_difference, 20_000, b, a, n_comparisons=5)
    half = stats.norm.isf(0.05 / 2 / 5) * differences.std() / 20
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


def test_rliables_interval_by_hand() -> None:
    """One track, two trainings: their mean is one, the other or the middle, 1/4, 1/4, 1/2."""
    low, high = statistics.stratified_interval(mean, 2000, np.array([[900.0], [800.0]]))
    assert (low, high) == (800, 900)
    many = np.repeat([[900.0], [800.0]], 400, axis=1)  # each track draws for itself: sd 50 / sqrt(2) / sqrt(400)
    low, high = statistics.stratified_interval(mean, 5000, many)
    assert (high - low) / 2 == pytest.approx(1.96 * 50 / math.sqrt(2) / 20, rel=0.06)


def test_seeds_count_as_seeds_not_as_tracks() -> None:
    """In 60 worlds two equal recipes are hardly ever called different; rliable's interval of one misses most."""
    random = np.random.default_rng(4)
    missed = stratified = 0
    for _ in range(60):
        tracks = 50 * random.standard_normal(30)
        b, a = world(3, random, tracks), world(3, random, tracks)
        found = estimate(mean_difference, 300, b, a)
        missed += not found.low <= 0 <= found.high
        low, high = statistics.stratified_interval(mean, 300, b - tracks)
        stratified += not low <= 900 <= high
    assert missed <= 6
    assert stratified >= 30


def test_the_exact_test_is_scipys() -> None:
    random = np.random.default_rng(5)
    b, a = world(4, random, np.zeros(6), 930), world(3, random, np.zeros(6))
    expected = stats.permutation_test(
        (b.mean(axis=1), a.mean(axis=1)), lambda x, y: x.mean() - y.mean(), n_resamples=np.inf
    )
    assert statistics.trainings_test(b, a) == pytest.approx(expected.pvalue)


def test_few_trainings_can_not_tell() -> None:
    b, a = np.full((3, 2), 900.0) + np.arange(3)[:, None], np.full((3, 2), 100.0) + np.arange(3)[:, None]
    assert statistics.trainings_test(b, a) == pytest.approx(2 / 20)  # of 20 ways to deal them, this and its mirror
    assert statistics.least_p(3, 3) == pytest.approx(2 / 20)
    assert statistics.least_p(2, 5) == pytest.approx(1 / 21)
    assert statistics.trainings_test(b, b) == 1


def test_of_many_trainings_some_deals_are_drawn() -> None:
    random = np.random.default_rng(6)
    b, a = world(12, random, np.zeros(3), 915), world(12, random, np.zeros(3))
    expected = stats.permutation_test(
        (b.mean(axis=1), a.mean(axis=1)), lambda x, y: x.mean() - y.mean(), n_resamples=20_000, random_state=0
    )
    assert statistics.trainings_test(b, a) == pytest.approx(expected.pvalue, abs=0.01)


def test_no_lap_against_no_lap_is_not_for_sure_no_difference() -> None:
    none = np.zeros((1, 100))
    found = statistics.lap_difference(none, none, 20_000)
    half = 1.96 * math.sqrt(2 / 102 / 102)  # Bonett and Price (2012): 0.027
    assert (found.value, -found.low, found.high) == pytest.approx((0, half, half), abs=0.004)


def test_seed_noise_by_hand() -> None:
    deviation, freedom = statistics.seed_noise([[1.0, 3.0], [10.0, 12.0, 14.0], [7.0]])
    assert (deviation, freedom) == (pytest.approx(math.sqrt((2 + 8) / 3)), 3)
    t = 3.18245  # of 3 degrees of freedom
    assert statistics.noise_margin(deviation, freedom) == pytest.approx(t * deviation * math.sqrt(2), rel=1e-4)
    assert statistics.noise_margin(deviation, freedom, 4, 4) == pytest.approx(t * deviation * math.sqrt(0.5), rel=1e-4)
    assert statistics.seed_noise([[5.0], []])[1] == 0


def test_a_summary_of_seeds_by_hand() -> None:
    returns, laps = np.array([[900.0, 800.0], [700.0, 600.0], [500.0, 490.0]]), np.array([[1.0, 0], [0, 0], [1, 1]])
    found = statistics.summarize_seeds(returns, laps, 200)
    means = [850, 650, 495]
    assert (found.n_seeds, found.n_tracks, found.median, found.lowest, found.highest) == (3, 2, 650, 495, 850)
    assert found.mean.value == pytest.approx(np.mean(means))
    assert found.std == pytest.approx(np.std(means, ddof=1))
    assert found.laps_finished == 0.5
    assert found.mean.low < 495, "three seeds leave room beyond the lowest"
    single = statistics.summarize_seeds(returns[:1], laps[:1], 200)
    assert (single.median, single.std, single.lowest, single.highest) == (850, 50, 800, 900)
    assert single.stratified is None


def test_an_estimate_reads_well() -> None:
    assert str(Estimate(900.04, 890, 911.26)) == "900.0 (890.0 to 911.3)"
