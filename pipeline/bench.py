"""How fast each part is, against stock CarRacing measured in the same run.

python -m pipeline.bench [--seconds 3] [--repeats 3] [--only NAME ...] [--peers]
python -m pipeline.bench --tune [--apply]
python -m pipeline.bench --ray ADDRESS [--ray-actors N]

Prints a table and writes ``metrics/bench.json``. The cases take turns, ``repeats`` rounds of ``seconds`` each, and the
median of the rounds counts: what else the machine does then hits all alike. Trust the ratios more than the figures.

--peers adds EnvPool's CarRacing-v3 and RL Zoo's own trainer with its own settings (install: make bench-peers).
--tune tries n_envs x num_threads for whole training and recommends a setting; --apply writes it into params.yaml.
--ray measures environments on a Ray cluster (local: one on this machine) and writes its section of metrics/scale.json.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from pipeline.bench_cases import CASES, PEERS
from pipeline.bench_measure import Case, machine, measure, report, summarize, table
from pipeline.bench_peers import PeerError, check_installed
from pipeline.config import ConfigError, Parser, TrainParams, cores, fail, parse_args

METRICS = Path("metrics/bench.json")


def bench(cases: Sequence[Case], params: TrainParams, seconds: float, repeats: int, output: Path) -> None:
    """Measure, print and write.

    Raises:
        PeerError: A peer that is to be measured is not installed, or ended.
    """
    if peers := sorted({case.peer for case in cases if case.peer}):
        check_installed(peers)
    import pipeline.agent.ppo as learner  # before the first case, whose memory it would count for

    assert learner
    here = machine()
    summary = summarize(cases, *measure(cases, params, seconds, repeats))
    print(table(summary))
    print(f"{here['cpu']}, {cores()} cores, {here['gpu'] or 'no GPU'}; load {here['load']} before the start; {output}")
    settings = params.model_dump(include={"n_envs", "n_steps", "num_threads", "device", "precision", "resize"})
    report(output, machine=here, seconds=seconds, repeats=repeats, settings=settings, cases=summary)


def choose(only: Sequence[str] | None, peers: bool) -> list[Case]:
    """The cases by name, else all, with or without the peers."""
    if only:
        return [case for case in (*CASES, *PEERS) if case.name in only]
    return [*CASES, *PEERS] if peers else list(CASES)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write; the training parameters are those of ``params.yaml``, ``--config`` and flags."""
    parser = Parser(prog="python -m pipeline.bench", description=__doc__)
    names = [case.name for case in (*CASES, *PEERS)]
    parser.add_argument("--seconds", type=_positive, default=3.0, help="of each round [default 3]")
    parser.add_argument("--repeats", type=_count, default=3, help="rounds [default 3]")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="these alone: " + ", ".join(names))
    parser.add_argument("--peers", action="store_true", help="also EnvPool and RL Zoo's trainer (make bench-peers)")
    parser.add_argument("--output", type=Path, default=METRICS, help=f"JSON to write [default {METRICS}]")
    parser.add_argument("--tune", action="store_true", help="find the fastest n_envs x num_threads instead")
    parser.add_argument("--apply", action="store_true", help="with --tune: write the setting into params.yaml")
    parser.add_argument("--ray", metavar="ADDRESS", help="throughput against the number of Ray actors instead")
    parser.add_argument(
        "--ray-actors", type=_count, metavar="N", help="with --ray: 1, 2, 4, ... N [default: cores here]"
    )
    params, arguments = parse_args(TrainParams, parser, argv)
    if arguments.apply and not arguments.tune:
        parser.error("--apply: expected together with --tune, which finds what to apply")
    from pipeline.sim.ray_cluster import ClusterError

    try:
        if arguments.ray:
            from pipeline.bench_ray import bench_ray

            bench_ray(params, arguments.ray, arguments.ray_actors, arguments.seconds, arguments.repeats)
        elif arguments.tune:
            from pipeline.bench_tune import tune

            tune(params, arguments.seconds, arguments.repeats, arguments.apply)
        else:
            cases = choose(arguments.only, arguments.peers)
            bench(cases, params, arguments.seconds, arguments.repeats, arguments.output)
    except (ConfigError, PeerError, ClusterError) as error:
        fail(error)


if __name__ == "__main__":
    main()
