"""Stage ``evaluate``: drive the held-out tracks on the stock game and say how well.

python -m pipeline.evaluate                                  the stage: metrics/evaluate.json, plots/, the MLflow run
python -m pipeline.evaluate --policy FILE --json -           any policy file, ours or an SB3 zip; JSON to stdout only
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import EvaluateParams, Parser, fail, parse_args, track_list

if TYPE_CHECKING:
    from pipeline.evaluation import Episode

POLICY = Path("models/best_model.safetensors")
METRICS, TABLE = Path("metrics/evaluate.json"), Path("plots/tracks.csv")
RETURNS_PICTURE, LAPS_PICTURE = Path("plots/returns.png"), Path("plots/lap_times.png")


def drive_tracks(params: EvaluateParams, policy: Path) -> list[Episode]:
    """Drive every track once, on all cores, with a progress bar."""
    from tqdm import tqdm

    from pipeline.evaluation import Evaluator

    tracks = track_list(params.tracks)
    with Evaluator() as evaluator, tqdm(total=len(tracks), unit="track", disable=not sys.stderr.isatty()) as bar:
        return evaluator.play(policy, tracks, params, on_episode=lambda episode: bar.update())


def evaluate(params: EvaluateParams, policy: Path = POLICY) -> dict[str, float]:
    """The stage: figures to ``metrics/evaluate.json``, table and charts to ``plots/``, all of it to the MLflow run."""
    from pipeline.evaluation import summarize, write_table
    from pipeline.media import charts
    from pipeline.tracking.run import Run

    run = Run.attach("evaluate")  # before the driving: without a run there is nothing to add to
    episodes = drive_tracks(params, policy)
    figures = summarize(episodes, params.bootstrap_samples)
    METRICS.parent.mkdir(exist_ok=True)
    METRICS.write_text(json.dumps(figures, indent=2) + "\n")
    write_table(TABLE, episodes)
    charts.returns_by_track(
        {e.track: e.episode_return for e in episodes}, {e.track: e.lap_finished for e in episodes}, RETURNS_PICTURE
    )
    charts.lap_time_vs_tiles(
        [e.n_tiles for e in episodes],
        [e.frames / 50 for e in episodes],
        [e.lap_finished for e in episodes],
        LAPS_PICTURE,
    )
    with run:
        run.metrics({f"evaluate/{key}": value for key, value in figures.items()})
        run.series("evaluate/return_by_rank", sorted(e.episode_return for e in episodes))
        run.track_set([e.track for e in episodes], "test", "test")
        run.table([asdict(e) for e in episodes], "evaluate/tracks.json")
        for path in (RETURNS_PICTURE, LAPS_PICTURE):
            run.artifact(path, "plots")
    return figures


def report(figures: dict[str, float]) -> str:
    """The figures in a line or two."""
    return (
        f"{figures['mean']:.1f} +- {figures['std']:.1f} over {figures['n_tracks']:.0f} tracks "
        f"(min {figures['min']:.1f}, median {figures['median']:.1f}, max {figures['max']:.1f}); "
        f"{figures['laps_finished']:.0%} of laps finished"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage, or judge one policy file; exit code 2 for mistakes of the user."""
    parser = Parser(prog="python -m pipeline.evaluate", description=__doc__)
    parser.add_argument("--policy", type=Path, default=POLICY, metavar="FILE", help=f"policy file [default {POLICY}]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there (- is stdout), nothing else")
    params, arguments = parse_args(EvaluateParams, parser, argv)
    from pipeline.agent.policy import PolicyError, load

    try:
        load(arguments.policy, params)  # refused here, before any process starts
    except PolicyError as error:
        fail(error)
    if arguments.json is None and arguments.policy.resolve() != POLICY.resolve():
        from pipeline.evaluation import summarize

        print(report(summarize(drive_tracks(params, arguments.policy), params.bootstrap_samples)))
        return  # somebody else's score does not belong into this pipeline's metrics and run
    if arguments.json is None:
        from pipeline.tracking.store import TrackingError

        try:
            print(report(evaluate(params, arguments.policy)))
        except TrackingError as error:
            fail(error)
        return
    from pipeline.evaluation import summarize

    if str(arguments.json) != "-":  # a folder that can't be made is told before the driving
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    figures = summarize(drive_tracks(params, arguments.policy), params.bootstrap_samples)
    text = json.dumps(figures, indent=2) + "\n"
    if str(arguments.json) == "-":
        sys.stdout.write(text)
    else:
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()
