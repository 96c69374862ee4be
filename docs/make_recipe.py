"""Make docs/recipe.png: the learning curve of the default parameters, median and range over seeds.

Run it from the repository's root: ``python -m docs.make_recipe`` draws docs/recipe/seed_*.csv; with ids or names of
runs behind it, it first writes those files from the curves that MLflow has of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from pipeline.media.charts import ORANGE, learning_curve
from pipeline.tracking.history import CURVES, History

KEPT, PICTURE = Path("docs/recipe"), Path("docs/recipe.png")


def keep(reference: str) -> None:
    """Write the curve of a run as ``seed_N.csv``: a row an update, with the validation where there was one."""
    run = History().run(reference)
    curve = pd.DataFrame(run.curve, columns=["step", "seconds", *CURVES]).rename(columns={"step": "agent_steps"})
    curve.insert(1, "frames", curve.agent_steps * int(run.params["frame_skip"]))
    curve.round(1).to_csv(KEPT / f"seed_{run.params['seed']}.csv", index=False)


def main() -> None:
    """Read, take medians and ranges, draw."""
    for reference in sys.argv[1:]:
        keep(reference)
    seeds = [pd.read_csv(path) for path in sorted(KEPT.glob("seed_*.csv"))]
    by_frames = pd.concat(seeds).groupby("frames")
    median, low, high = by_frames.median(), by_frames["eval_mean"].min(), by_frames["eval_mean"].max()
    history = median[["seconds", "ep_rew_mean", "eval_mean"]].assign(eval_low=low, eval_high=high).reset_index()
    rows = [{str(k): float(v) for k, v in row.items()} for row in history.to_dict("records")]
    figure = learning_curve(rows, interval="range")
    returns = by_frames["ep_rew_mean"].agg(["min", "max"]).dropna()
    figure.axes[0].fill_between(returns.index, returns["min"], returns["max"], color=ORANGE, alpha=0.15, linewidth=0)
    figure.savefig(PICTURE, metadata={"Software": None})
    print(f"{PICTURE}: {len(seeds)} seeds")
    print(history[history.eval_mean.notna()].to_string(index=False))


if __name__ == "__main__":
    main()
