"""Verdicts on synthetic drives whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.comparison import Noise, Side, compare, contest, profile, table
from tests.test_statistics import Floats, world

RECIPE = {"learning_rate": "0.0003", "n_epochs": "4"}
TRACKS = 50 * np.random.default_rng(0).standard_normal(100)


def side(label: str, returns: Floats, *recipes: dict[str, str]) -> Side:
    return Side(label, returns, (returns > 850).astype(float), recipes)


def trained(label: str, n_seeds: int, seed: int, level: float = 900.0, **recipe: str) -> Side:
    """Policies of trainings whose means differ by 20 (standard deviation), on tracks that differ by 50."""
    returns = world(n_seeds, np.random.default_rng(seed), TRACKS, level)
    return side(label, returns, *[RECIPE | recipe] * n_seeds)


def test_two_policies_of_one_recipe_differ_and_the_recipe_does_not() -> None:
    """The trap: over 100 tracks the policies differ for sure, by the luck of their seeds."""
    b, a = trained("B", 3, seed=1), trained("A", 3, seed=2)
    best = side("best", b.returns[[b.returns.mean(axis=1).argmax()]], RECIPE)
    worst = side("worst", a.returns[[a.returns.mean(axis=1).argmin()]], RECIPE)
    single = contest(best, worst, 2000)
    assert (single.about, single.verdict) == ("policies", "better")
    assert "best drives better than worst, very sure" in single.words[0]
    assert "the same recipe and other seeds, so the difference between them is seed noise" in single.words[1]
    groups = contest(b, a, 2000)
    assert (groups.about, groups.verdict, groups.within_seed_noise) == ("recipes", "undecided", True)
    assert "No difference between the recipes of B and A is shown" in groups.words[0]
    assert "within seed noise" in groups.words[1]
    assert len(groups.words) == 3, "and that both are of one recipe"


def test_a_better_recipe_is_found() -> None:
    found = contest(trained("long", 3, 1, 900), trained("short", 3, 2, 500), 2000)
    assert (found.about, found.verdict, found.within_seed_noise) == ("recipes", "better", False)
    assert found.difference.low > 300
    assert "The recipe of long is better than that of short, fairly sure" in found.words[0]
    assert "exact test over 3 + 3 trainings: p = 0.1, the lowest that so few can give" in found.words[0]
    more = contest(trained("short", 5, 2, 500), trained("long", 5, 1, 900), 2000)
    assert more.verdict == "worse"
    assert more.p_value == pytest.approx(2 / 252)
    assert "The recipe of long is better than that of short, sure" in more.words[0]


def test_single_policies_are_told_what_seeds_are_known_to_do() -> None:
    b, a = trained("B", 1, 1, 915, n_epochs="6"), trained("A", 1, 2)
    noise = Noise(20.0, 4, "the means of 5 seeds have a std of 20.0")
    assert noise.margin(1, 1) == pytest.approx(2.776 * 20 * 2**0.5, rel=1e-3)
    (found,) = compare([a, b], range(100), 2000, {"A": noise}).contests
    assert found.within_seed_noise
    assert "within seed noise, since two trainings of one recipe differ by up to 78.5 (the means of 5" in found.words[1]
    (far,) = compare([a, trained("B", 1, 1, 1100, n_epochs="6")], range(100), 2000, {"B": noise}).contests
    assert far.within_seed_noise is False
    assert "It is more than seed noise" in far.words[1]
    (unknown,) = compare([a, b], range(100), 2000).contests
    assert unknown.within_seed_noise is None
    assert "not known here. Give several a side: `A1,A2,A3 B1,B2,B3`" in unknown.words[1]


def test_a_difference_too_small_for_the_tracks_is_undecided() -> None:
    a = side("A", 900 + TRACKS[None])
    b = side("B", a.returns + 2 + 30 * np.random.default_rng(3).standard_normal((1, 100)))
    assert contest(b, a, 2000).verdict == "undecided"
    assert "can't be told from these tracks" in contest(b, a, 2000).words[0]
    same = contest(a, side("C", a.returns), 2000)
    assert same.words == ("A and C drive alike on every track.",)
    assert (same.verdict, same.p_value) == ("undecided", 1)


def test_ahead_on_most_tracks_but_lost_on_some_is_said() -> None:
    a = side("A", 900 + TRACKS[None])
    b = side("B", a.returns + np.where(np.arange(100) < 10, -70.0, 8.0))
    found = contest(b, a, 2000)
    assert found.verdict == "undecided"
    assert found.words[-1] == "B is ahead of A on 90% of the tracks; the mean hangs on a few others."


def test_a_mixed_group_is_named_and_so_is_a_single_training() -> None:
    mixed = side("mixed", world(2, np.random.default_rng(1), TRACKS), RECIPE, RECIPE | {"n_epochs": "6"})
    words = contest(mixed, trained("A", 1, 2), 500).words
    assert any("not of one recipe; they differ in n_epochs" in word for word in words)
    assert any("A is a single training" in word for word in words)
    assert mixed.recipe is None


def test_many_comparisons_are_held_to_more() -> None:
    """Eight policies that drive as well as the first: each alone has a chance of 1 in 20 to be called different."""
    random = np.random.default_rng(8)
    sides = [side(str(n), 900 + TRACKS[None] + 30 * random.standard_normal((1, 100))) for n in range(9)]
    together = compare(sides, range(100), 500).contests
    assert {c.verdict for c in together} == {"undecided"}
    alone = contest(sides[1], sides[0], 500)
    assert together[0].difference.low < alone.difference.low < alone.difference.high < together[0].difference.high


def test_the_tables_hold_the_figures() -> None:
    found = compare([trained("A", 1, 2), trained("B", 1, 1)], range(100), 500)
    lines = table(found).splitlines()
    assert [line.split()[:2] for line in lines[3:5]] == [["A", "1"], ["B", "1"]]
    assert f"{found.sides['A'].mean.value:.1f}" in lines[3]
    assert any(line.startswith("B − A") and f"{found.contests[0].higher_on} of 100" in line for line in lines)
    assert found.as_json()["contests"][0]["difference"]["value"] == found.contests[0].difference.value


def test_a_performance_profile_by_hand() -> None:
    scores, share, low, high = profile(side("A", np.array([[100.0, 200, 300, 400]])), np.array([50.0, 200, 350, 400]))
    assert share.tolist() == [1, 0.5, 0.25, 0]
    assert scores.tolist() == [50, 200, 350, 400]
    assert np.all((low <= share) & (share <= high))
    assert (low[0], high[0]) == (1, 1)
