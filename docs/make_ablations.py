"""What each part of the recipe is worth: the default with that part changed, on three seeds, all of the same length.

Run it from the repository's root: ``python -m docs.make_ablations`` (an hour on two cores). Each setting is a
``pipeline.sweep --seeds`` on one core, as many at a time as there are cores; the command goes on where it was stopped.
It writes the curves to docs/recipe/ablations.csv, draws docs/ablations.png and prints the table in docs/recipe.md.
``--draw`` does no training.
"""

from __future__ import annotations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from tqdm import tqdm

from pipeline.config import cores
from pipeline.media.charts import BLUE, GRID, ORANGE
from pipeline.tracking.history import History, PastRun

SEEDS = range(3)
STEPS, TRACKS = 100_000, 24
COMMON = {"total_timesteps": STEPS, "eval_freq": 0, "n_eval_episodes": TRACKS, "num_threads": 1}
DEFAULT = "default"
ABLATIONS: dict[str, dict[str, object]] = {
    DEFAULT: {},
    "features that tell no state": {"state_coef": 0.0},
    "critic that sees pictures alone": {"privileged_critic": False},
    "learning rate that ignores the KL": {"desired_kl": 0.0},
    "no entropy bonus": {"ent_coef": 0.0},
    "first actions: stand, wide noise": {"throttle_init": 0.0, "log_std_init": -0.69},
    "a missed tile costs 10, a lost car 25": {"missed_tile_penalty": 10.0, "early_end_penalty": 25.0},
    "twice the width": {"cnn_channels": [32, 64, 64], "features_dim": 512},
}
CURVES, PICTURE = Path("docs/recipe/ablations.csv"), Path("docs/ablations.png")
EVERY = 8
"""Updates between two rows of a curve in the file."""


def run_name(setting: str) -> str:
    """Of the sweep in MLflow; its trainings' are this and ``-seedN``."""
    return "ablation-" + "-".join("".join(c if c.isalnum() else " " for c in setting).split())


def train(setting: str) -> None:
    """The setting on all seeds, or what is missing of it."""
    values = COMMON | ABLATIONS[setting] | {"run_name": run_name(setting)}
    flags = [text for key, value in values.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    seeds = f"{SEEDS.start}:{SEEDS.stop}"
    command = [sys.executable, "-m", "pipeline.sweep", "--seeds", seeds, "--jobs", "1", "--cores", "1", *flags]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if ended.returncode:
        raise SystemExit(f"{setting}: {' '.join(command)} ended with {ended.returncode}\n{ended.stderr[-2000:]}")


def read(setting: str) -> list[PastRun]:
    """The trainings of a setting, one per seed."""
    runs = [History().run(f"{run_name(setting)}-seed{seed}") for seed in SEEDS]
    if unfinished := [run.name for run in runs if run.status != "FINISHED"]:
        raise SystemExit(f"expected finished runs, got {', '.join(unfinished)}: run python -m docs.make_ablations")
    return runs


def curves(runs: dict[str, list[PastRun]]) -> pd.DataFrame:
    """Training returns: ``setting``, ``seed``, ``agent_steps``, ``ep_rew_mean``."""
    rows = [
        {"setting": setting, "seed": seed, "agent_steps": row["step"], "ep_rew_mean": round(row["ep_rew_mean"], 1)}
        for setting, group in runs.items()
        for seed, run in enumerate(group)
        for row in [row for row in run.curve if row.get("ep_rew_mean") is not None][::EVERY]
    ]
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame) -> None:
    """A small picture per setting: median and range of its seeds over the default's."""
    others = [setting for setting in ABLATIONS if setting != DEFAULT]
    columns = 3
    figure = Figure(figsize=(11.0, 2.6 * math.ceil(len(others) / columns)), dpi=110, layout="constrained")
    grid = figure.subplots(math.ceil(len(others) / columns), columns, sharex=True, sharey=True).ravel()
    for axes, setting in zip(grid, others, strict=False):
        lines = [
            _plot(axes, frame[frame.setting == DEFAULT], BLUE),
            _plot(axes, frame[frame.setting == setting], ORANGE),
        ]
        axes.set_title(setting, fontsize=10, loc="left")
    for axes in grid[len(others) :]:
        axes.set_visible(False)
    grid[0].legend(lines, ["the default", "with the change above"], loc="upper left", fontsize=8, frameon=False)
    figure.supxlabel("agent steps", fontsize=10)
    figure.supylabel("training return: median and range of three seeds", fontsize=10)
    figure.savefig(PICTURE, metadata={"Software": None})


def _plot(axes: Axes, rows: pd.DataFrame, color: str) -> Line2D:
    by_step = rows.groupby("agent_steps")["ep_rew_mean"].agg(["median", "min", "max"])
    (line,) = axes.plot(by_step.index, by_step["median"], color=color, linewidth=1.8)
    axes.fill_between(by_step.index, by_step["min"], by_step["max"], color=color, alpha=0.18, linewidth=0)
    axes.axhline(900, color=GRID, linewidth=1, zorder=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return line


def table(runs: dict[str, list[PastRun]]) -> str:
    """The table in docs/recipe.md."""
    lines = [
        f"| the default, but | validation mean by seed | median | laps of {TRACKS * len(SEEDS)} | return half way |",
        "|---|---|---|---|---|",
    ]
    for setting, group in runs.items():
        means = [run.metrics["eval/mean_reward"] for run in group]
        laps = sum(run.metrics["eval/laps_finished"] for run in group) * TRACKS
        half = [_return_at(run, STEPS / 2) for run in group]
        each = ", ".join(f"{mean:.0f}" for mean in means)
        lines.append(f"| {setting} | {each} | {np.median(means):.0f} | {laps:.0f} | {np.median(half):.0f} |")
    return "\n".join(lines)


def _return_at(run: PastRun, steps: float) -> float:
    told = [(row["step"], row["ep_rew_mean"]) for row in run.curve if row.get("ep_rew_mean") is not None]
    return float(np.interp(steps, *zip(*told, strict=True)))


def main() -> None:
    """Train what is missing, read it back from MLflow, write, draw and print."""
    if "--draw" not in sys.argv:
        with ThreadPoolExecutor(cores()) as pool:
            list(tqdm(pool.map(train, ABLATIONS), total=len(ABLATIONS), unit="setting"))
    runs = {setting: read(setting) for setting in ABLATIONS}
    frame = curves(runs)
    frame.to_csv(CURVES, index=False)
    draw(frame)
    print(table(runs))


if __name__ == "__main__":
    main()
