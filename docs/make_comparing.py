"""Print how often the intervals and verdicts of ``compare`` are right, in worlds whose answer is known.

Run it from the repository's root: ``python -m docs.make_comparing``. Trainings of one recipe differ by a standard
deviation of 20, tracks by 50, drives by 30; 50 tracks.
"""

from __future__ import annotations

import numpy as np

from pipeline.comparison import Side, contest
from pipeline.statistics import Floats, estimate, flat_iqm, stratified_interval

WORLDS, SAMPLES = 300, 400


def trainings(n: int, tracks: Floats, random: np.random.Generator) -> Floats:
    """(n, n_tracks) returns of trainings of one recipe, whose mean is 0."""
    return tracks + 20 * random.standard_normal((n, 1)) + 30 * random.standard_normal((n, len(tracks)))


def main() -> None:
    """Print both tables."""
    random = np.random.default_rng(0)
    print(f"{WORLDS} pairs of equal recipes: called different")
    for n in (2, 3, 5):
        wrong = 0
        for _ in range(WORLDS):
            tracks = 50 * random.standard_normal(50)
            sides = [Side(label, trainings(n, tracks, random), np.zeros((n, 50))) for label in "BA"]
            wrong += contest(*sides, SAMPLES).verdict != "undecided"
        print(f"  {n} trainings a side: {wrong / WORLDS:.1%}")
    print(f"{WORLDS} recipes: the 95% interval of the IQM holds the truth")
    for n in (3, 5):
        held = stratified = 0
        for _ in range(WORLDS):
            returns = trainings(n, np.zeros(50), random)
            found, (low, high) = estimate(flat_iqm, SAMPLES, returns), stratified_interval(flat_iqm, SAMPLES, returns)
            held += found.low <= 0 <= found.high
            stratified += low <= 0 <= high
        print(f"  {n} trainings: {held / WORLDS:.0%}, rliable's stratified bootstrap {stratified / WORLDS:.0%}")


if __name__ == "__main__":
    main()
