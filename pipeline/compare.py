"""Say whether one policy, or one recipe, is better than another, and how sure that is.

python -m pipeline.compare A B [C ...]                   policies; all are compared with the first
python -m pipeline.compare A1,A2,A3 B1,B2,B3             recipes: the policies of several seeds each
python -m pipeline.compare --experiments [NAME|REV ...]  DVC experiments, grouped by all parameters but the seed
python -m pipeline.compare A B [C ...] --race            a film of the policies on the same track

Each policy is a file, models:/NAME@ALIAS, models:/NAME/NUMBER, runs:/ID/PATH, a DVC experiment, or a run in MLflow (id,
or of a name the newest; of a parent run the runs below it). All drive the same tracks on the stock game; drives that
are known are not driven again. Prints figures with 95% intervals and the verdict in words; a chart, and all of it in
MLflow. What the numbers mean: docs/comparing.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import (
    EvaluateParams,
    Parser,
    TrainParams,
    fail,
    load,
    parse_args,
    project_root,
    track_bounds,
    track_list,
    track_seed,
)

if TYPE_CHECKING:
    from pipeline.comparison import Comparison, Side

CHART = Path("plots/comparison.png")


def report(
    sides: Sequence[Side], comparison: Comparison, arguments: argparse.Namespace, params: Mapping[str, Any]
) -> None:
    """Print, draw, write and log what was found."""
    from pipeline.comparison import table
    from pipeline.tracking.run import Run

    chart = draw(sides, comparison, arguments.chart)
    content = json.dumps(comparison.as_json(), indent=2) + "\n"
    if str(arguments.json) == "-":
        sys.stdout.write(content)
    else:
        print(table(comparison))
    if arguments.json and str(arguments.json) != "-":
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(content)
    with Run.begin("compare", params, {"kind": "comparison"}, run_id_file=None) as run:
        run.metrics(metrics(comparison))
        run.track_set(comparison.tracks, "test", "test")
        run.text(content, "comparison.json")
        run.text(table(comparison) + "\n", "comparison.txt")
        run.artifact(chart)
        run.table(rows(sides, comparison.tracks), "comparison/tracks.json")
    print(f"chart: {chart}; in MLflow: run {run.id}", file=sys.stderr)


def metrics(comparison: Comparison) -> dict[str, float]:
    """The figures as metrics: ``side-1/mean``, ``side-2-vs-1/difference`` and so on; MLflow's keys take no labels."""
    found: dict[str, float] = {}
    for place, side in enumerate(comparison.sides.values(), 1):
        for name, estimate in (("mean", side.mean), ("iqm", side.iqm)):
            found |= {f"side-{place}/{name}": estimate.value}
            found |= {f"side-{place}/{name}_ci_low": estimate.low, f"side-{place}/{name}_ci_high": estimate.high}
        found |= {f"side-{place}/median": side.median, f"side-{place}/laps_finished": side.laps_finished}
    for place, contest in enumerate(comparison.contests, 2):
        key = f"side-{place}-vs-1"
        for name in ("difference", "improvement", "laps"):
            estimate = getattr(contest, name)
            found |= {f"{key}/{name}": estimate.value}
            found |= {f"{key}/{name}_ci_low": estimate.low, f"{key}/{name}_ci_high": estimate.high}
        found |= {f"{key}/p_value": contest.p_value}
    return found


def rows(sides: Sequence[Side], tracks: Sequence[int]) -> list[dict[str, Any]]:
    """One row per policy and track."""
    return [
        {
            "side": side.label,
            "policy": policy,
            "track": track,
            "episode_return": float(side.returns[policy, place]),
            "lap_finished": bool(side.laps[policy, place]),
        }
        for side in sides
        for policy in range(side.n)
        for place, track in enumerate(tracks)
    ]


def draw(sides: Sequence[Side], comparison: Comparison, path: Path) -> Path:
    """The chart."""
    import numpy as np

    from pipeline.comparison import profile
    from pipeline.media import charts

    first, *others = sides
    returns = np.concatenate([side.returns.ravel() for side in sides])
    scores = np.unique(np.quantile(returns, np.linspace(0, 1, 80)))  # close where most drives are
    pairs = {f"{c.b} − {c.a}": c.difference for c in comparison.contests}
    by_track = [side.returns.mean(axis=0) - first.returns.mean(axis=0) for side in others]
    charts.paired_comparison(
        dict(zip(pairs, by_track, strict=True)),
        {name: (each.value, each.low, each.high) for name, each in pairs.items()},
        {side.label: profile(side, scores) for side in sides},
        path,
    )
    return path


def compare_policies(params: EvaluateParams, words: Sequence[str], arguments: argparse.Namespace) -> None:
    """Drive, compare, report.

    Raises:
        PolicyError: A file is not a policy.
        TrackingError: A policy can't be found, or MLflow can't be used.
    """
    from pipeline import comparison
    from pipeline.compare_sides import drive_sides, find_groups, known_noise
    from pipeline.tracking.store import refuse_impossible

    refuse_impossible()
    tracks = track_list(params.tracks)
    folder = project_root() / load(TrainParams).log_root
    with ExitStack() as stack:
        groups = find_groups(words, params, stack)
        sides = drive_sides(groups, params, tracks, folder, arguments.fresh)
    found = comparison.compare(sides, tracks, params.bootstrap_samples, known_noise(sides))
    logged = {f"side-{place}": word for place, word in enumerate(words, 1)}
    report(sides, found, arguments, {**logged, "tracks": params.tracks, "bootstrap_samples": params.bootstrap_samples})


def compare_experiments(params: EvaluateParams, names: Sequence[str], arguments: argparse.Namespace) -> None:
    """Group, compare, report.

    Raises:
        TrackingError: There is no such experiment, none has a score, or MLflow can't be used.
    """
    from pipeline import comparison
    from pipeline.compare_experiments import sides_of
    from pipeline.tracking.store import refuse_impossible

    refuse_impossible()
    sides, tracks, notes = sides_of(names)
    for note in notes:
        print(note, file=sys.stderr)
    found = comparison.compare(sides, tracks, params.bootstrap_samples)
    logged = {f"side-{place}": side.label for place, side in enumerate(sides, 1)}
    report(sides, found, arguments, {**logged, "bootstrap_samples": params.bootstrap_samples})


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that are no parameters."""
    parser.add_argument("policies", nargs="*", metavar="POLICY", help="see above; seeds of one recipe joined by commas")
    parser.add_argument(
        "--experiments", nargs="*", metavar="NAME", help="DVC experiments, or commits they began from [default: all]"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all figures there (- is stdout, and only them)"
    )
    parser.add_argument("--chart", type=Path, default=CHART, metavar="FILE", help=f"PNG to draw [default {CHART}]")
    parser.add_argument("--fresh", action="store_true", help="drive again what was driven before")
    parser.add_argument("--race", action="store_true", help="film them side by side on the same track")
    parser.add_argument(
        "--track",
        type=track_seed,
        nargs="+",
        metavar="N",
        help="with --race: seeds of the tracks, a film each [default: the first of tracks]",
    )


def check(arguments: argparse.Namespace) -> None:
    """Refuse what can't be meant, before anything slow."""
    if arguments.race:
        if arguments.experiments is not None or arguments.json or arguments.fresh:
            fail("--race films; --experiments, --json and --fresh are of a comparison: expected one of the two")
        return
    if arguments.track:
        fail("--track says which race to film: expected --race. A comparison drives all of --tracks FIRST:STOP")
    if arguments.experiments is not None:
        if arguments.policies:
            fail("expected policies or --experiments, got both")
    elif len(arguments.policies) < 2:
        fail(f"expected two policies or more, or --experiments; got {len(arguments.policies)}")
    elif len(set(arguments.policies)) < len(arguments.policies):
        fail("expected different policies, got one of them twice")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 2 for mistakes of the user."""
    parser = Parser(prog="python -m pipeline.compare", description=__doc__)
    add_flags(parser)
    params, arguments = parse_args(EvaluateParams, parser, argv)
    check(arguments)
    if arguments.race:
        from pipeline.compare_race import film_races

        film_races(params, arguments.policies, arguments.track or [track_bounds(params.tracks)[0]])
        return
    from pipeline.agent.policy import PolicyError
    from pipeline.tracking.store import TrackingError, in_one_message

    for noisy in ("alembic", "mlflow"):  # after its import, which sets its own level
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        with in_one_message():
            if arguments.experiments is None:
                compare_policies(params, arguments.policies, arguments)
            else:
                compare_experiments(params, arguments.experiments, arguments)
    except (PolicyError, TrackingError) as error:
        fail(error)


if __name__ == "__main__":
    main()
