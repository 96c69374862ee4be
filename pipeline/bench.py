"""How fast each part is, against stock CarRacing measured in the same run.

python -m pipeline.bench [--seconds 3] [--repeats 3] [--only NAME ...] [--peers]

Prints a table and writes ``metrics/bench.json``. The cases take turns, ``repeats`` rounds of ``seconds`` each, and the
median of the rounds counts: what else the machine does then hits all alike. Trust the ratios more than the figures.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Parser, TrainParams, cores, parse_args

if TYPE_CHECKING:
    from pipeline.agent.ppo import DrivingPPO

METRICS = Path("metrics/bench.json")
Work = Callable[[], int]
"""Does a piece of work and returns how many units it was."""


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: Key in ``metrics/bench.json``.
        unit: What is counted, per second.
        against: Case whose speed the ratio is taken to.
        prepare: Sets the work up, outside the measured time.
    """

    name: str
    unit: str
    against: str
    prepare: Callable[[TrainParams], AbstractContextManager[Work]]


def _drive(env: Any, frames_per_step: int, steps: int = 50) -> Work:
    """Drive ahead with a little steering; an episode that ends starts again, as in training."""
    import numpy as np

    env.reset(seed=1)
    shape = env.action_space.shape[0]
    actions = [np.array([0.3 * np.sin(t / 15), 0.3, 0.0][:shape], np.float32) for t in range(steps)]

    def work() -> int:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return steps * frames_per_step

    return work


@contextmanager
def _game(params: TrainParams, env_id: str, **kwargs: Any) -> Iterator[Work]:
    import cv2
    import gymnasium as gym

    import pipeline.sim.car_racing  # registers FastCarRacing-v3

    cv2.setNumThreads(1)
    assert pipeline.sim.car_racing
    env = gym.make(env_id, disable_env_checker=True, **kwargs)
    yield _drive(env, 1)
    env.close()


@contextmanager
def _training_env(params: TrainParams) -> Iterator[Work]:
    from pipeline.sim.env import make_training_env

    env = make_training_env(params, 0)
    yield _drive(env, params.frame_skip)
    env.close()


@contextmanager
def _vectorised(params: TrainParams, n_workers: int) -> Iterator[Work]:
    import numpy as np

    from pipeline.sim.env import make_training_env
    from pipeline.sim.vec_env import SharedMemoryVecEnv

    env = SharedMemoryVecEnv([partial(make_training_env, params, i) for i in range(params.n_envs)], n_workers)
    env.reset()
    actions = np.tile(np.array([0.0, 0.3, 0.0][: env.action_space.shape[0]], np.float32), (params.n_envs, 1))  # type: ignore[index]

    def work() -> int:
        for _ in range(10):
            env.step(actions)
        return 10 * params.n_envs * params.frame_skip

    yield work
    env.close()


@contextmanager
def _model(params: TrainParams, n_workers: int = 0) -> Iterator[DrivingPPO]:
    from stable_baselines3.common.logger import Logger

    from pipeline.agent.ppo import build_model
    from pipeline.sim.env import make_training_env
    from pipeline.sim.vec_env import SharedMemoryVecEnv

    env = SharedMemoryVecEnv([partial(make_training_env, params, i) for i in range(params.n_envs)], n_workers)
    model = build_model(params, env)
    model.set_logger(Logger(None, []))
    yield model
    env.close()


@contextmanager
def _inference(params: TrainParams) -> Iterator[Work]:
    import numpy as np
    import torch as th

    with _model(params) as model:
        size, shape = max(params.n_envs // 2, 1), model.rollout_buffer.obs_shape
        pictures = np.random.default_rng(0).integers(0, 255, (size, *shape), np.uint8)

        def work() -> int:
            with th.no_grad():
                for _ in range(10):
                    model.policy(th.from_numpy(pictures).to(model.device))[0].cpu()
            return 10 * size

        yield work


@contextmanager
def _update(params: TrainParams, **changes: Any) -> Iterator[Work]:
    """PPO's update on a rollout of noise."""
    with _model(params.model_copy(update=changes)) as model:
        _fill(model)

        def work() -> int:
            model.train()
            return model.n_epochs * model.rollout_buffer.buffer_size * model.n_envs

        yield work


NATURE: dict[str, Any] = {"resize": 84, "cnn_channels": [32, 64, 64], "features_dim": 512, "batch_size": 256, "n_epochs": 1}
"""The network that SB3 takes for pictures, on its usual 84x84x4."""


@contextmanager
def _sb3_update(params: TrainParams) -> Iterator[Work]:
    """The same update by stable-baselines3 itself: its network, its loop, its defaults."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.logger import Logger

    with _model(params.model_copy(update=NATURE)) as ours:
        model = PPO("CnnPolicy", ours.env, n_steps=params.n_steps, batch_size=256, n_epochs=1, device=ours.device)
        model.set_logger(Logger(None, []))
        _fill(model)
        flat = dict(vars(model.rollout_buffer))

        def work() -> int:
            vars(model.rollout_buffer).update(flat)  # SB3's update reshapes the buffer in place
            model.train()
            return model.rollout_buffer.buffer_size * model.n_envs

        yield work


def _fill(model: Any) -> None:
    import numpy as np

    random, buffer = np.random.default_rng(0), model.rollout_buffer
    buffer.observations = random.integers(0, 255, buffer.observations.shape, np.uint8)
    buffer.actions[:] = random.uniform(-0.9, 0.9, buffer.actions.shape)
    buffer.advantages[:] = random.normal(size=buffer.advantages.shape)
    buffer.pos, buffer.full = buffer.buffer_size, True


@contextmanager
def _training(params: TrainParams) -> Iterator[Work]:
    """Rollout and update, as ``pipeline.train`` does them, without validation."""
    with _model(params, cores()) as model:
        rollout = params.n_steps * params.n_envs

        def work() -> int:
            model.learn(rollout, reset_num_timesteps=model._last_obs is None)
            return rollout * params.frame_skip

        yield work


FRAMES, SAMPLES, DECISIONS = "frames/s", "samples/s", "decisions/s"

CASES = (
    Case("stock", FRAMES, "stock", partial(_game, env_id="CarRacing-v3")),
    Case("fast_rgb", FRAMES, "stock", partial(_game, env_id="FastCarRacing-v3")),
    Case("fast_gray", FRAMES, "stock", partial(_game, env_id="FastCarRacing-v3", grayscale=True)),
    Case("training_env", FRAMES, "stock", _training_env),
    Case("vectorised_1_worker", FRAMES, "stock", partial(_vectorised, n_workers=1)),
    Case("vectorised_all_cores", FRAMES, "vectorised_1_worker", partial(_vectorised, n_workers=cores())),
    Case("inference", DECISIONS, "inference", _inference),
    Case("update_sb3_nature", SAMPLES, "update_sb3_nature", _sb3_update),
    Case("update_nature_fp32", SAMPLES, "update_sb3_nature", partial(_update, precision="fp32", **NATURE)),
    Case("update_nature_bf16", SAMPLES, "update_sb3_nature", partial(_update, precision="bf16", **NATURE)),
    Case("update_default_fp32", SAMPLES, "update_sb3_nature", partial(_update, precision="fp32")),
    Case("update_default_auto", SAMPLES, "update_sb3_nature", _update),
    Case("training", FRAMES, "stock", _training),
)


def measure(cases: Sequence[Case], params: TrainParams, seconds: float, repeats: int) -> dict[str, list[float]]:
    """Units per second of each case in each round. Cases are prepared once and take turns."""
    from tqdm import tqdm

    rates: dict[str, list[float]] = {case.name: [] for case in cases}
    with ExitStack() as stack, tqdm(total=len(cases) * repeats, disable=not sys.stderr.isatty()) as bar:
        works = {case.name: stack.enter_context(case.prepare(params)) for case in cases}
        for work in works.values():
            work()  # warm-up: first calls allocate and choose kernels
        for _ in range(repeats):
            for name, work in works.items():
                bar.set_description(name)
                rates[name].append(_rate(work, seconds))
                bar.update()
    return rates


def _rate(work: Work, seconds: float) -> float:
    units, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        units += work()
    return units / elapsed


def summarize(cases: Sequence[Case], rates: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Median, range and ratio of each case; the ratio is the median of the rounds' ratios."""
    summary: dict[str, dict[str, Any]] = {}
    for case in cases:
        mine, base = rates[case.name], rates.get(case.against)
        ratio = statistics.median(m / b for m, b in zip(mine, base, strict=True)) if base else None
        summary[case.name] = {
            "per_second": round(statistics.median(mine), 1),
            "low": round(min(mine), 1),
            "high": round(max(mine), 1),
            "unit": case.unit,
            "against": case.against,
            "ratio": ratio and round(ratio, 2),
        }
    return summary


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The summary as a table for people."""
    lines = [f"{'case':<24}{'median':>10}  {'range':<19}{'unit':<13}ratio"]
    for name, row in summary.items():
        span = f"{row['low']:,.0f} - {row['high']:,.0f}"
        ratio = f"{row['ratio']:.2f}x {row['against']}" if row["ratio"] and name != row["against"] else ""
        lines.append(f"{name:<24}{row['per_second']:>10,.0f}  {span:<19}{row['unit']:<13}{ratio}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write; the training parameters are those of ``params.yaml``, ``--config`` and flags."""
    parser = Parser(prog="python -m pipeline.bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round [default 3]")
    parser.add_argument("--repeats", type=int, default=3, help="rounds [default 3]")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="measure these alone")
    params, arguments = parse_args(TrainParams, parser, argv)
    cases = [case for case in CASES if not arguments.only or case.name in arguments.only]
    summary = summarize(cases, measure(cases, params, arguments.seconds, arguments.repeats))
    print(table(summary))
    from pipeline.tracking.provenance import cpu_name

    METRICS.parent.mkdir(exist_ok=True)
    METRICS.write_text(json.dumps({"cpu": cpu_name(), "cores": cores(), "cases": summary}, indent=2) + "\n")


if __name__ == "__main__":
    main()
