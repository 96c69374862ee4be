"""Cases take turns for a few rounds: their speeds, ratios and memory, as a table and as JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.config import TrainParams, cores

Work = Callable[[], int]
"""Does a piece of work and returns how many units it was."""
Prepare = Callable[[TrainParams], AbstractContextManager[Work]]


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: Key in ``metrics/bench.json``.
        unit: What is counted, per second.
        against: Cases whose speed the ratios are taken to, where they are measured in the same run.
        prepare: Sets the work up, outside the measured time.
        warm_up: Do a piece of work before the first round.
        peer: Package in ``.venv-bench`` that this measures.
    """

    name: str
    unit: str
    against: tuple[str, ...]
    prepare: Prepare
    warm_up: bool = True
    peer: str | None = None


Clock = Callable[[], float]
Rates = dict[str, list[float]]
Rows = dict[str, dict[str, Any]]


def measure(
    cases: Sequence[Case], params: TrainParams, seconds: float, repeats: int, clock: Clock = time.perf_counter
) -> tuple[Rates, dict[str, float]]:
    """Units per second of each case in each round, and its memory in MiB. Cases are prepared once and take turns."""
    from tqdm import tqdm

    rates: Rates = {case.name: [] for case in cases}
    memory: dict[str, float] = {}
    works: dict[str, Work] = {}
    with ExitStack() as stack, tqdm(total=len(cases) * repeats, disable=not sys.stderr.isatty()) as bar:
        for case in cases:
            bar.set_description(f"preparing {case.name}")
            before = memory_mib()
            works[case.name] = stack.enter_context(case.prepare(params))
            if case.warm_up:
                works[case.name]()  # first calls allocate and choose kernels
            memory[case.name] = memory_mib() - before
        bar.reset()
        for _ in range(repeats):
            for name, work in works.items():
                bar.set_description(name)
                rates[name].append(rate(work, seconds, clock))
                bar.update()
    return rates, memory


def rate(work: Work, seconds: float, clock: Clock = time.perf_counter) -> float:
    """Units per second, over whole pieces of work that take ``seconds`` at least."""
    units, began = 0, clock()
    while (elapsed := clock() - began) < seconds:
        units += work()
    return units / elapsed


def memory_mib() -> float:
    """Resident memory of this process and its children; pages they share count for each."""
    import psutil

    me, total = psutil.Process(), 0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # ended since it was listed
            continue
    return float(total / 2**20)


def summarize(cases: Sequence[Case], rates: Rates, memory: dict[str, float]) -> Rows:
    """Median, range, memory and ratios of each case; a ratio is the median of the rounds' ratios."""
    return {
        case.name: {
            "per_second": round(statistics.median(rates[case.name]), 1),
            "low": round(min(rates[case.name]), 1),
            "high": round(max(rates[case.name]), 1),
            "unit": case.unit,
            "ratios": {name: _ratio(rates[case.name], rates[name]) for name in case.against if name in rates},
            "memory_mib": round(memory[case.name]),
        }
        for case in cases
    }


def _ratio(mine: Sequence[float], base: Sequence[float]) -> float:
    return round(statistics.median(m / b for m, b in zip(mine, base, strict=True)), 2)


def table(summary: Rows) -> str:
    """The summary as a table for people."""
    lines = [f"{'case':<22}{'median':>10}  {'range':<19}{'unit':<13}{'memory':>9}  ratio"]
    for name, row in summary.items():
        span = f"{row['low']:,.0f} - {row['high']:,.0f}"
        ratios = ", ".join(f"{ratio:.2f}x {against}" for against, ratio in row["ratios"].items())
        memory = f"{row['memory_mib']:,} MiB"
        lines.append(
            f"{name:<22}{row['per_second']:>10,.0f}  {span:<19}{row['unit']:<13}{memory:>9}  {ratios}".rstrip()
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where and when this is measured; ``load`` says how many others were at work before it began."""
    import psutil
    import torch

    from pipeline.tracking.provenance import tags

    known = tags()
    return {
        "cpu": known["cpu"],
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(psutil.getloadavg()[0], 2),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "platform": known["platform"],
        "python": known["python"],
        "versions": {k.removeprefix("version."): v for k, v in known.items() if k.startswith("version.")},
        "commit": known.get("mlflow.source.git.commit", ""),
        "code_dirty": known["code_dirty"] == "true",
    }


def report(path: Path, **content: Any) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
