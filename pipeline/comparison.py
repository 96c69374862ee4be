"""Two policies, or two recipes with several trainings each, on the same tracks: which is better, and how sure that is.

A policy can drive better than another without its recipe being better: two trainings of one recipe that differ in the
seed alone often do. So the words say what they are about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import statistics
from pipeline.statistics import ALPHA, Estimate, Summary

Floats = NDArray[np.float64]
SEVERAL = "`A1,A2,A3 B1,B2,B3`"


@dataclass(frozen=True)
class Side:
    """One policy, or the policies of several trainings of one recipe.

    Attributes:
        label: Its name in tables and charts.
        returns: (n_seeds, n_tracks) raw returns.
        laps: (n_seeds, n_tracks) whether the lap was finished, as 0 and 1.
        recipes: Of each policy what it was trained with, but for the seed; None where that is unknown.
    """

    label: str
    returns: Floats
    laps: Floats
    recipes: tuple[Mapping[str, str] | None, ...] = ()

    @property
    def n(self) -> int:
        """Trainings."""
        return len(self.returns)

    @property
    def recipe(self) -> Mapping[str, str] | None:
        """What all of its policies were trained with, if that is known and the same."""
        first = self.recipes[0] if self.recipes else None
        return first if all(recipe == first for recipe in self.recipes) else None


@dataclass(frozen=True)
class Noise:
    """By how much trainings of one recipe differ.

    Attributes:
        deviation: Standard deviation of a training's mean return.
        freedom: Degrees of freedom behind it.
        known_from: Where it comes from.
    """

    deviation: float
    freedom: int
    known_from: str

    def margin(self, n_b: int, n_a: int) -> float:
        """Up to what difference groups of so many trainings of one recipe stay in 95 of 100 cases."""
        return statistics.noise_margin(self.deviation, self.freedom, n_b, n_a)


@dataclass(frozen=True)
class Contest:
    """One side against another.

    Attributes:
        b: Label of the one.
        a: Label of the other.
        about: ``policies``, or ``recipes`` where a side has several trainings.
        verdict: ``better`` if ``b`` is, ``worse`` or ``undecided``.
        difference: By how much the mean return of ``b`` is higher.
        improvement: Probability that ``b`` beats ``a`` on a track.
        laps: By how much the share of laps finished of ``b`` is higher.
        p_value: Two-sided: of the sign-flip test over tracks (policies), of the exact test over trainings (recipes).
        higher_on: Tracks on which the (mean) return of ``b`` is higher.
        within_seed_noise: Whether two trainings, or groups of them, of one recipe differ as much; None if unknown.
        words: The verdict in sentences.
    """

    b: str
    a: str
    about: str
    verdict: str
    difference: Estimate
    improvement: Estimate
    laps: Estimate
    p_value: float
    higher_on: int
    within_seed_noise: bool | None
    words: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """All sides against the first.

    Attributes:
        tracks: Seeds of the tracks.
        sides: Figures of each side, by its label.
        contests: The other sides against the first.
    """

    tracks: tuple[int, ...]
    sides: Mapping[str, Summary]
    contests: tuple[Contest, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return asdict(self)


def compare(
    sides: Sequence[Side], tracks: Sequence[int], samples: int, noise: Mapping[str, Noise] | None = None
) -> Comparison:
    """Compare all sides with the first, on the same tracks.

    Args:
        sides: Two or more; one alone is only summarized.
        tracks: Seeds of the tracks, in the order of the columns.
        samples: Resamples behind intervals and p-values.
        noise: How much trainings of a side's recipe differ, by its label, where that is known from elsewhere.
    """
    first, *others = sides
    known = noise or {}
    return Comparison(
        tuple(tracks),
        {side.label: statistics.summarize_seeds(side.returns, side.laps, samples) for side in sides},
        tuple(
            contest(other, first, samples, len(others), known.get(other.label) or known.get(first.label))
            for other in others
        ),
    )


def contest(b: Side, a: Side, samples: int, n_comparisons: int = 1, noise: Noise | None = None) -> Contest:
    """One side against another; arguments as of :func:`compare`."""
    pair, several = (b.returns, a.returns), max(b.n, a.n) > 1
    difference = statistics.estimate(statistics.mean_difference, samples, *pair, n_comparisons=n_comparisons)
    if several:
        p_value = statistics.trainings_test(*pair)
        allowed = max(ALPHA / n_comparisons, statistics.least_p(b.n, a.n))
        noise = _own_noise(b, a)
    else:
        p_value = statistics.paired_test(b.returns[0], a.returns[0], samples).p_two_sided
        allowed = ALPHA / n_comparisons
    excluded = not difference.low <= 0 <= difference.high
    decided = p_value <= allowed and (excluded or not several)
    verdict = "undecided" if not decided else "better" if difference.value > 0 else "worse"
    improvement = statistics.probability_of_improvement(*pair, samples, n_comparisons)
    words = (_about_recipes if several else _about_policies)(b, a, difference, p_value, verdict, noise)
    return Contest(
        b=b.label,
        a=a.label,
        about="recipes" if several else "policies",
        verdict=verdict,
        difference=difference,
        improvement=improvement,
        laps=statistics.lap_difference(b.laps, a.laps, samples, n_comparisons),
        p_value=p_value,
        higher_on=int(np.count_nonzero(b.returns.mean(axis=0) > a.returns.mean(axis=0))),
        within_seed_noise=None if noise is None else abs(difference.value) <= noise.margin(b.n, a.n),
        words=(*words, *([] if several or verdict != "undecided" else _on_most_tracks(b, a, improvement))),
    )


def _own_noise(b: Side, a: Side) -> Noise:
    deviation, freedom = statistics.seed_noise([side.returns.mean(axis=1).tolist() for side in (b, a)])
    return Noise(deviation, freedom, "these trainings")


def profile(side: Side, scores: Floats, samples: int = 400) -> tuple[Floats, Floats, Floats, Floats]:
    """A side's performance profile: the scores, the share of drives above each, the ends of the shares' intervals."""

    def above(score: float) -> statistics.Statistic:
        return lambda draws: np.asarray((draws > score).mean(axis=(1, 2)))

    found = [statistics.estimate(above(float(score)), samples, side.returns) for score in scores]
    columns = [[e.value for e in found], [e.low for e in found], [e.high for e in found]]
    share, low, high = np.clip(np.array(columns), 0, 1)
    return scores, share, low, high


# In words


def _about_policies(
    b: Side, a: Side, difference: Estimate, p_value: float, verdict: str, noise: Noise | None
) -> list[str]:
    by = f"{_signed(difference)} points a drive, p = {p_value:.4f}"
    if np.array_equal(b.returns, a.returns):
        return [f"{b.label} and {a.label} drive alike on every track."]
    if verdict == "undecided":
        said = [f"Which of {b.label} and {a.label} drives better can't be told from these tracks: {by}."]
    else:
        better, worse = (b, a) if verdict == "better" else (a, b)
        said = [f"{better.label} drives better than {worse.label}, {_surely(p_value)}: {by}."]
    return [*said, _what_of_recipes(b, a, difference, noise)]


def _what_of_recipes(b: Side, a: Side, difference: Estimate, noise: Noise | None) -> str:
    about = "That is about these two policies, not about their recipes:"
    if b.recipe and b.recipe == a.recipe:
        return f"{about} they have the same recipe and other seeds, so the difference between them is seed noise."
    if noise is None:
        return f"{about} how much trainings with other seeds differ is not known here. Give several a side: {SEVERAL}."
    margin = noise.margin(1, 1)
    source = f"two trainings of one recipe differ by up to {margin:.1f} ({noise.known_from})"
    if abs(difference.value) <= margin:
        return f"{about} the difference is within seed noise, since {source}. Give several a side: {SEVERAL}."
    return f"It is more than seed noise, since {source}; several trainings a side would show it: {SEVERAL}."


def _on_most_tracks(b: Side, a: Side, improvement: Estimate) -> list[str]:
    """Said of policies where the mean does not tell, and the typical track does."""
    if improvement.low <= 0.5 <= improvement.high:
        return []
    ahead, behind, chance = (b, a, improvement.value) if improvement.value > 0.5 else (a, b, 1 - improvement.value)
    return [f"{ahead.label} is ahead of {behind.label} on {chance:.0%} of the tracks; the mean hangs on a few others."]


def _about_recipes(
    b: Side, a: Side, difference: Estimate, p_value: float, verdict: str, noise: Noise | None
) -> list[str]:
    assert noise
    by = f"{_signed(difference)} points a drive over trainings and tracks"
    least = statistics.least_p(b.n, a.n)
    only = ", the lowest that so few can give" if least > ALPHA and p_value <= least + 1e-9 else ""
    test = f"exact test over {b.n} + {a.n} trainings: p = {p_value:.3g}{only}"
    if verdict == "undecided":
        said = [f"No difference between the recipes of {b.label} and {a.label} is shown: {by}; {test}."]
        inside = "within" if abs(difference.value) <= noise.margin(b.n, a.n) else "hardly more than"
        said += [
            f"That is {inside} seed noise: trainings of one recipe have means with a standard deviation of "
            f"{noise.deviation:.1f}, so groups of {b.n} and {a.n} differ by up to {noise.margin(b.n, a.n):.1f}."
        ]
    else:
        better, worse = (b, a) if verdict == "better" else (a, b)
        sure = _surely(p_value) if p_value <= ALPHA else "fairly sure"
        said = [f"The recipe of {better.label} is better than that of {worse.label}, {sure}: {by}; {test}."]
    return said + _warnings(b, a)


def _warnings(b: Side, a: Side) -> list[str]:
    said = [
        f"{side.label} is a single training; that its recipe varies as much as the other's is assumed."
        for side in (b, a)
        if side.n == 1
    ]
    for side in (b, a):
        if keys := differing([recipe for recipe in side.recipes if recipe is not None]):
            said.append(
                f"Careful: the policies of {side.label} are not of one recipe; they differ in {', '.join(keys)}."
            )
    if b.recipe and b.recipe == a.recipe:
        said.append("Both are trainings of the same recipe with other seeds.")
    return said


def differing(recipes: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys in which recipes differ."""
    keys = sorted({key for recipe in recipes for key in recipe})
    return [key for key in keys if len({recipe.get(key) for recipe in recipes}) > 1]


def _signed(difference: Estimate) -> str:
    text = f"{difference.value:+.1f} (95% interval {difference.low:+.1f} to {difference.high:+.1f})"
    return text.replace("-", "−")


def _surely(p_value: float) -> str:
    return "very sure" if p_value <= 0.001 else "sure" if p_value <= 0.01 else "fairly sure"


def table(comparison: Comparison) -> str:
    """The figures as two tables, and the verdicts in words."""
    rows: list[tuple[str, ...]] = [
        ("", "n", "mean", "std", "median", "IQM (95% interval)", "lowest", "highest", "laps")
    ]
    for label, s in comparison.sides.items():
        figures = [f"{value:.1f}" for value in (s.mean.value, s.std, s.median)]
        ends = [f"{value:.1f}" for value in (s.lowest, s.highest)]
        rows.append((label, str(s.n_seeds), *figures, str(s.iqm), *ends, f"{s.laps_finished:.1%}"))
    n_tracks = len(comparison.tracks)
    found = [f"{n_tracks} tracks; n > 1: std, median, lowest and highest are of the trainings' means", align(rows)]
    if comparison.contests:
        found.append(align([DIFFERENCES, *(_difference_row(c, n_tracks) for c in comparison.contests)]))
    if len(comparison.contests) > 1:
        found.append(
            f"{len(comparison.contests)} comparisons: intervals and verdicts are widened so that all hold together."
        )
    return "\n\n".join([*found, *("\n".join(c.words) for c in comparison.contests)])


DIFFERENCES = ("difference", "mean (95% interval)", "p", "P(improvement)", "laps (95% interval)", "higher on")


def _difference_row(c: Contest, n_tracks: int) -> tuple[str, ...]:
    improvement = f"{c.improvement.value:.2f} ({c.improvement.low:.2f} to {c.improvement.high:.2f})"
    laps = f"{c.laps.value:+.1%} ({c.laps.low:+.1%} to {c.laps.high:+.1%})"
    mean = f"{c.difference.value:+.1f} ({c.difference.low:+.1f} to {c.difference.high:+.1f})"
    return (f"{c.b} − {c.a}", mean, f"{c.p_value:.4f}", improvement, laps, f"{c.higher_on} of {n_tracks}")


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns; the first is on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
