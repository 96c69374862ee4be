"""Environments on a Ray cluster: frames a second against the number of actors, and what the parts of a step cost.

The rates are wall-clock and suffer from whatever else the machine does; their ratios are of one run, in turns. The
costs are processor time of one core, which others' work hardly changes: ``docs/scaling.md`` plans with them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from pipeline.bench_cases import CASES, FRAMES, inference, training, training_env, update, vectorised
from pipeline.bench_measure import Case, Prepare, Work, machine, measure, summarize, table
from pipeline.config import TrainParams, cores
from pipeline.sim.ray_env import Cluster, connected

METRICS, SECTION = Path("metrics/scale.json"), "rollouts"
BASELINES = ("vectorised_1_worker", "vectorised_all_cores", "training")
MESSAGES = 16
"""Environments of an actor whose messages are measured, in two groups of eight."""


def bench_ray(
    params: TrainParams, address: str, most: int | None, seconds: float, repeats: int, output: Path = METRICS
) -> None:
    """Measure with 1, 2, 4, ... up to ``most`` actors, print, and write a section of ``output``; the others stay.

    Raises:
        ClusterError: The cluster can't be used.
    """
    here = machine()
    numbers = counts(min(most or cores(), params.n_envs))
    cpus = sum(numbers) + numbers[-1]  # the actors of all cases are there while one has its turn
    with connected(address, cpus, cpus) as cluster:
        cases = [*(case for case in CASES if case.name in BASELINES), *ray_cases(cluster, numbers)]
        summary = summarize(cases, *measure(cases, params, seconds, repeats))
        print(table(summary), flush=True)
        prices = costs(cluster, params, seconds)
    for name, price in prices.items():
        print(f"{name:<28}{price:>10,.1f}")
    keys = {"n_envs", "n_steps", "n_epochs", "batch_size", "frame_skip", "frames_stack", "resize", "precision"}
    settings = params.model_dump(include=keys)
    content = {"machine": here, "settings": settings, "nodes": cluster.n_nodes, "cases": summary, "costs": prices}
    write_section(output, SECTION, content)


def counts(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``."""
    return [2**power for power in range(most.bit_length())]


def ray_cases(cluster: Cluster, numbers: Sequence[int]) -> list[Case]:
    """All environments on so many actors, and whole training on the most."""
    remote = partial(vectorised, make_worker=cluster.make_worker)
    against = ("vectorised_1_worker", "ray_1_actors")
    whole: Prepare = partial(training, make_worker=cluster.make_worker, n_workers=numbers[-1])
    return [
        *(Case(f"ray_{n}_actors", FRAMES, against[: 1 + (n > 1)], partial(remote, n_workers=n)) for n in numbers),
        Case(f"ray_training_{numbers[-1]}_actors", FRAMES, ("training",), whole),
    ]


# What a step costs


class Still(gym.Env[Any, Any]):
    """Costs nothing, so that what is measured is the message."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.observation_space = gym.spaces.Box(0, 255, tuple(shape), np.uint8)
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.picture = np.zeros(shape, np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self.picture, {}

    def step(self, action: Any) -> Any:
        return self.picture, 0.0, False, False, {}

    def processor_time(self) -> float:
        """Seconds of the process that holds this environment."""
        return time.process_time()


def costs(cluster: Cluster, params: TrainParams, seconds: float) -> dict[str, float]:
    """Processor time in microseconds of one core, and bytes."""
    alone = params.model_copy(update={"num_threads": 1, "learning_rate": 0.0})
    shape = _shape(params)
    here, there = _messages(cluster, (1, 1, 1), seconds)
    here_full, there_full = _messages(cluster, shape, seconds)
    per_group = MESSAGES // 2
    figures = {
        "simulator_us_per_decision": _price(training_env, alone, seconds) * params.frame_skip,
        "inference_us_per_decision": _price(inference, alone, seconds),
        "update_us_per_sample": _price(update, alone, seconds),
        "learner_us_per_message": here,
        "learner_us_per_observation": max(here_full - here, 0) / per_group,
        "actor_us_per_message": there,
        "actor_us_per_observation": max(there_full - there, 0) / per_group,
    }
    return {name: round(value, 2) for name, value in figures.items()} | {"bytes_per_observation": int(np.prod(shape))}


def _shape(params: TrainParams) -> tuple[int, ...]:
    channels = params.frames_stack * (1 if params.grayscale else 3)
    return channels, params.resize, params.resize


def _price(prepare: Prepare, params: TrainParams, seconds: float) -> float:
    with prepare(params) as work:
        work()
        return _spent(work, seconds, (time.process_time,))[0]


def _messages(cluster: Cluster, shape: tuple[int, ...], seconds: float) -> list[float]:
    """Microseconds that the learner's process and the actor's spend on an order and its reply."""
    with _still(cluster, shape) as (work, processor_time):
        work()
        return _spent(work, seconds, (time.process_time, processor_time))


def _spent(work: Work, seconds: float, clocks: Sequence[Callable[[], float]]) -> list[float]:
    """Microseconds a unit on each of the clocks, quick ones first: the least of the pieces of work done in ``seconds``.

    The least, since whatever else a machine does, a cold cache or a stolen core, only adds.
    """
    least, began = [math.inf] * len(clocks), time.monotonic()
    while time.monotonic() - began < seconds:
        before = [clock() for clock in reversed(clocks)][::-1]
        units = work()
        after = [clock() for clock in clocks]
        prices = [(late - early) / units * 1e6 for early, late in zip(before, after, strict=True)]
        least = [min(pair) for pair in zip(least, prices, strict=True)]
    return least


@contextmanager
def _still(cluster: Cluster, shape: tuple[int, ...]) -> Iterator[tuple[Work, Callable[[], float]]]:
    from pipeline.sim.vec_env import SharedMemoryVecEnv

    env = SharedMemoryVecEnv([partial(Still, shape)] * MESSAGES, 1, make_worker=cluster.make_worker)
    env.reset()
    actions = np.zeros((MESSAGES // 2, 2), np.float32)
    for group in (0, 1):
        env.send(group, actions)

    def work() -> int:
        for _ in range(10):
            for group in (0, 1):
                env.receive(group)
                env.send(group, actions)
        return 20

    yield work, lambda: float(env.env_method("processor_time", indices=0)[0])
    env.close()


def write_section(path: Path, section: str, content: dict[str, Any]) -> None:
    """Put one section into a JSON file that has others."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**known, section: content}, indent=2) + "\n", encoding="utf-8")
