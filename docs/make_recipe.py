"""Make docs/recipe.png: the learning curve of the default parameters, median and range over seeds.

Run it from the repository's root: ``python -m docs.make_recipe``. It reads the ``plots/validation.csv`` that each
training left, kept as ``docs/recipe/seed_*.csv``.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from pipeline.media.charts import learning_curve

CURVES, PICTURE = Path("docs/recipe"), Path("docs/recipe.png")


def main() -> None:
    """Read, take medians and ranges at each validation, draw."""
    seeds = [pd.read_csv(path) for path in sorted(CURVES.glob("seed_*.csv"))]
    by_frames = pd.concat(seeds).groupby("frames")
    median, low, high = by_frames.median(), by_frames["eval_mean"].min(), by_frames["eval_mean"].max()
    history = median[["ep_rew_mean", "eval_mean"]].assign(eval_low=low, eval_high=high).reset_index()
    learning_curve(
        [{str(k): float(v) for k, v in row.items()} for row in history.to_dict("records")], PICTURE, interval="range"
    )
    print(f"{PICTURE}: {len(seeds)} seeds")
    print(history.to_string(index=False))


if __name__ == "__main__":
    main()
