"""Figures over seeds, against values worked out by hand and by scipy's own functions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipeline.sweep.seed_statistics import difference, over_seeds


def test_figures_over_five_seeds() -> None:
    figures = over_seeds([10.0, 50.0, 20.0, 30.0, 40.0])
    assert figures["median"] == 30
    assert figures["iqm"] == 30  # of five the lowest and the highest are left out
    assert (figures["min"], figures["max"], figures["mean"]) == (10, 50, 30)
    assert figures["std"] == pytest.approx(np.sqrt(250), abs=1e-4)
    assert figures["iqm_ci_low"] < 30 < figures["iqm_ci_high"]


def test_one_seed_has_no_spread() -> None:
    figures = over_seeds([7.0])
    assert (figures["iqm"], figures["iqm_ci_low"], figures["iqm_ci_high"], figures["std"]) == (7, 7, 7, 0)


def test_the_interval_of_a_difference_is_welchs() -> None:
    a, b = [1.0, 2.0, 3.0], [2.0, 4.0, 9.0]
    found = difference(a, b)
    # By hand: s_a^2 / 3 = 1/3, s_b^2 / 3 = 13/3; Welch and Satterthwaite's degrees of freedom.
    error = np.sqrt(1 / 3 + 13 / 3)
    freedom = (1 / 3 + 13 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (13 / 3) ** 2 / 2)
    half = stats.t.ppf(0.975, freedom) * error
    assert (found.mean, found.low, found.high) == pytest.approx((-3.0, -3 - half, -3 + half))
    assert found.within_noise
    assert "WITHIN SEED NOISE" in str(found)


def test_luck_alone_is_called_a_difference_one_time_in_twenty() -> None:
    generator = np.random.default_rng(0)
    calls = [not difference(*generator.normal(size=(2, 3))).within_noise for _ in range(500)]
    assert np.mean(calls) < 0.08


def test_a_large_difference_is_told_and_one_seed_tells_nothing() -> None:
    assert not difference([900.0, 905.0, 910.0], [700.0, 720.0, 690.0]).within_noise
    assert "one seed each can't tell" in str(difference([900.0], [700.0]))
    assert difference([900.0], [700.0]).within_noise
