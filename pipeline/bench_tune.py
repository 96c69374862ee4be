"""Which n_envs and num_threads train fastest on this machine: each setting in a process of its own, in turns."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from pipeline.bench_cases import training
from pipeline.bench_measure import machine, memory_mib, rate, report
from pipeline.config import TrainParams, cores
from pipeline.config.__main__ import apply as apply_file

METRICS, PICTURE = Path("metrics/bench_tune.json"), Path("plots/bench_tune.png")
N_ENVS, NUM_THREADS = (1, 2, 4, 8, 16, 32, 64, 128), (1, 2, 4, 8, 16)
ENVS_PER_CORE = 16
"""At most so many are tried: each doubling adds memory (1 GB to 1.3 GB from 16 to 32 on 2 cores)."""
AS_FAST = 0.97
"""Settings within 3% of the fastest count as fast: a change has to be worth its while."""


class Round(NamedTuple):
    """One measurement: agent steps/s, use of each core [%], resident memory of trainer and workers [MiB]."""

    steps_per_second: float
    cpu: list[float]
    memory_mib: float


class Outcome(NamedTuple):
    """A setting and the median of its rounds."""

    n_envs: int
    num_threads: int
    n_steps: int
    steps_per_second: float
    cpu: list[float]
    memory_mib: float


def settings(params: TrainParams) -> list[TrainParams]:
    """What is tried: the same rollout and minibatches by other numbers of environments and threads."""
    counts = [n for n in N_ENVS if n <= ENVS_PER_CORE * cores()]
    threads = [n for n in NUM_THREADS if n <= cores()]
    return [
        params.model_copy(update={"n_envs": n, "num_threads": t, "n_steps": steps_for(params, n)})
        for n in counts
        for t in threads
    ]


def steps_for(params: TrainParams, n_envs: int) -> int:
    """``n_steps`` that keeps the rollout what it was, or as near as whole minibatches allow."""
    unit = params.batch_size // math.gcd(params.batch_size, n_envs)  # smallest n_steps of whole minibatches
    wanted = params.n_envs * params.n_steps / n_envs
    n_steps = max(round(wanted / unit), 1) * unit
    return n_steps if n_steps >= 2 else 2 * unit


def try_setting(params: TrainParams, seconds: float) -> Round:
    """Train for some seconds; runs in a new process, so that threads and memory are this setting's alone."""
    import psutil

    with training(params) as work:
        work()  # warm-up: a rollout with its update
        psutil.cpu_percent(percpu=True)
        frames_per_second = rate(work, seconds)
        use = psutil.cpu_percent(percpu=True)
        mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(use))
        return Round(frames_per_second / params.frame_skip, [use[i] for i in mine if i < len(use)], memory_mib())


def in_new_process(params: TrainParams, seconds: float) -> Round:
    """:func:`try_setting` in a process that imports everything anew."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(try_setting, params, seconds).result()


def summarize(params: TrainParams, rounds: Sequence[Round]) -> Outcome:
    """Median speed, mean use of the cores, largest memory."""
    cpu = [round(statistics.mean(use)) for use in zip(*(r.cpu for r in rounds), strict=True)]
    speed = round(statistics.median(r.steps_per_second for r in rounds), 1)
    return Outcome(
        params.n_envs, params.num_threads, params.n_steps, speed, cpu, round(max(r.memory_mib for r in rounds))
    )


def recommend(outcomes: Sequence[Outcome], n_envs: int, num_threads: int) -> Outcome:
    """The present setting if it is as fast as the fastest; else, of those that are, the one with the least memory."""
    fastest = max(outcome.steps_per_second for outcome in outcomes)
    fast = [outcome for outcome in outcomes if outcome.steps_per_second >= AS_FAST * fastest]
    return min(
        fast, key=lambda o: ((o.n_envs, o.num_threads) != (n_envs, num_threads), o.memory_mib, -o.steps_per_second)
    )


def table(outcomes: Sequence[Outcome], best: Outcome) -> str:
    """The outcomes for people."""
    lines = [f"{'n_envs':>6}{'num_threads':>13}{'n_steps':>9}{'steps/s':>10}{'memory':>11}  CPU per core [%]"]
    for outcome in outcomes:
        cpu = " ".join(f"{use:.0f}" for use in outcome.cpu)
        mark = "  <- recommended" if outcome == best else ""
        lines.append(
            f"{outcome.n_envs:>6}{outcome.num_threads:>13}{outcome.n_steps:>9}{outcome.steps_per_second:>10,.0f}"
            f"{outcome.memory_mib:>7,.0f} MiB  {cpu}{mark}"
        )
    return "\n".join(lines)


def draw(outcomes: Sequence[Outcome], path: Path = PICTURE) -> None:
    """Agent steps/s over n_envs and num_threads as a heat map."""
    from pipeline.media.charts import heat_map

    rows, columns = sorted({o.n_envs for o in outcomes}), sorted({o.num_threads for o in outcomes})
    speed = {(o.n_envs, o.num_threads): o.steps_per_second for o in outcomes}
    heat_map(
        [[speed[n, t] for t in columns] for n in rows],
        rows,
        columns,
        path,
        title=f"Training speed [agent steps/s], {cores()} cores",
        x="num_threads",
        y="n_envs",
    )


def apply(best: Outcome) -> list[str]:
    """Write the setting into ``params.yaml``; returns the keys that changed."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "bench_tune.json"
        path.write_text(json.dumps({key: getattr(best, key) for key in ("n_envs", "num_threads", "n_steps")}))
        return apply_file(path)


def tune(params: TrainParams, seconds: float, repeats: int, write: bool) -> None:
    """Try all settings, print and draw what came out, recommend one; write it into ``params.yaml`` if asked.

    Raises:
        ConfigError: The setting does not fit the other values of ``params.yaml``.
    """
    from tqdm import tqdm

    here, tried = machine(), settings(params)
    rounds: list[list[Round]] = [[] for _ in tried]
    with tqdm(total=len(tried) * repeats, disable=not sys.stderr.isatty()) as bar:
        for _ in range(repeats):
            for setting, results in zip(tried, rounds, strict=True):
                bar.set_description(f"n_envs {setting.n_envs}, num_threads {setting.num_threads}")
                results.append(in_new_process(setting, seconds))
                bar.update()
    outcomes = [summarize(setting, results) for setting, results in zip(tried, rounds, strict=True)]
    best = recommend(outcomes, params.n_envs, params.num_threads or cores())
    print(table(outcomes, best))
    draw(outcomes)
    report(METRICS, machine=here, recommended=best._asdict(), outcomes=[outcome._asdict() for outcome in outcomes])
    print(f"load {here['load']} before the start; {METRICS}, {PICTURE}")
    if write:
        print("params.yaml, changed: " + (", ".join(apply(best)) or "nothing"))
