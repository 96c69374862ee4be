"""What ``pipeline.bench`` measures: stock CarRacing, our parts, whole training, and the peers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.bench_measure import Case, Work
from pipeline.bench_peers import DRIVE, peer_process
from pipeline.config import TrainParams, cores

if TYPE_CHECKING:
    from torch import device as Device

    from pipeline.agent.ppo import DrivingPPO
    from pipeline.sim.vec_env import MakeWorker, SharedMemoryVecEnv

# One environment, one core


def _drive(env: Any, frames_per_step: int) -> Work:
    """Drive ahead with a little steering; an episode that ends starts again, as in training."""
    import numpy as np

    env.reset(seed=1)
    actions = np.array(DRIVE, np.float32)[:, : env.action_space.shape[0]]

    def work() -> int:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return len(actions) * frames_per_step

    return work


@contextmanager
def _game(params: TrainParams, env_id: str, **kwargs: Any) -> Iterator[Work]:
    import cv2
    import gymnasium as gym

    import pipeline.sim.car_racing as ours  # registers FastCarRacing-v3

    assert ours
    cv2.setNumThreads(1)
    env = gym.make(env_id, disable_env_checker=True, **kwargs)
    yield _drive(env, 1)
    env.close()


LONG_EPISODES: dict[str, Any] = {"grass_limit": 0, "stall_limit": 0}
"""A car that drives ahead blindly would be ended after 150 frames, and the reset (a new track) be measured; with these
the episodes are as long as stock's, whose rules end them alone."""


@contextmanager
def training_env(params: TrainParams) -> Iterator[Work]:
    """One training environment; counts frames."""
    import cv2

    from pipeline.sim.training_env import make_training_env

    cv2.setNumThreads(1)
    env = make_training_env(params.model_copy(update=LONG_EPISODES), 0)
    yield _drive(env, params.frame_skip)
    env.close()


# All environments


def _vec_env(params: TrainParams, n_workers: int, make_worker: MakeWorker | None = None) -> SharedMemoryVecEnv:
    from pipeline.sim.training_env import make_training_env
    from pipeline.sim.vec_env import SharedMemoryVecEnv

    env_fns = [partial(make_training_env, params, i) for i in range(params.n_envs)]
    return SharedMemoryVecEnv(env_fns, n_workers, make_worker=make_worker)


@contextmanager
def vectorised(
    params: TrainParams, n_workers: int, make_worker: MakeWorker | None = None, **changes: Any
) -> Iterator[Work]:
    """Steps of all environments; counts frames."""
    import numpy as np

    params = params.model_copy(update={**LONG_EPISODES, **changes})
    env = _vec_env(params, n_workers, make_worker)
    env.reset()
    actions = np.repeat(np.array(DRIVE, np.float32)[:, None], params.n_envs, axis=1)  # (steps, n_envs, 3)
    actions = actions[:10, :, : env.action_space.shape[0]]  # type: ignore[index]

    def work() -> int:
        for action in actions:
            env.step(action)
        return len(actions) * params.n_envs * params.frame_skip

    yield work
    env.close()


EVERY_FRAME_RGB: dict[str, Any] = {"frame_skip": 1, "frames_stack": 1, "grayscale": False, "resize": 96}
"""What EnvPool's CarRacing-v3 gives: a (96, 96, 3) picture for every frame."""


# The network


@contextmanager
def _model(params: TrainParams, n_workers: int = 0, make_worker: MakeWorker | None = None) -> Iterator[DrivingPPO]:
    from stable_baselines3.common.logger import Logger

    from pipeline.agent.build import build_model

    env = _vec_env(params, n_workers, make_worker)
    model = build_model(params, env)
    model.set_logger(Logger(None, []))
    yield model
    env.close()


def _wait(device: Device) -> None:
    """A GPU works on after Python has gone ahead: a piece of work ends when the GPU has done it."""
    import torch as th

    if device.type == "cuda":
        th.cuda.synchronize(device)


@contextmanager
def inference(params: TrainParams) -> Iterator[Work]:
    """Actions for one of the two groups of environments, as the rollout asks for them."""
    import numpy as np
    import torch as th

    with _model(params) as model:
        size, shape = max(params.n_envs // 2, 1), model.rollout_buffer.obs_shape
        pictures = np.random.default_rng(0).integers(0, 255, (size, *shape), np.uint8)
        model.policy.set_training_mode(False)

        def work() -> int:
            with th.no_grad():
                for _ in range(10):
                    model.policy(th.from_numpy(pictures).to(model.device))[0].cpu()
            return 10 * size

        yield work


NATURE: dict[str, Any] = {
    "resize": 84,
    "cnn_channels": [32, 64, 64],
    "features_dim": 512,
    "batch_size": 256,
    "n_epochs": 1,
}
"""The network that SB3 takes for pictures, on its usual 84x84x4."""


@contextmanager
def update(params: TrainParams, **changes: Any) -> Iterator[Work]:
    """PPO's update on a rollout of noise. Learning rate 0: weights, and with them the work, stay the same.

    Without ``target_kl``, which the noise's probabilities would exceed at once: the passes would be broken off.
    """
    with _model(params.model_copy(update={"learning_rate": 0.0, "target_kl": 0.0, **changes})) as model:
        _fill(model)

        def work() -> int:
            model.train()
            _wait(model.device)
            return model.n_epochs * model.rollout_buffer.buffer_size * model.n_envs

        yield work


@contextmanager
def _sb3_update(params: TrainParams) -> Iterator[Work]:
    """The same update by stable-baselines3 itself: its network, its loop, its defaults.

    It copies the rollout once before the first pass. The warm-up does that, so the copy isn't measured: with one pass a
    rollout, instead of SB3's ten, it would weigh ten times too much.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.logger import Logger

    with _model(params.model_copy(update=NATURE)) as ours:
        arguments: dict[str, Any] = {"n_steps": params.n_steps, "batch_size": 256, "n_epochs": 1, "learning_rate": 0.0}
        model = PPO("CnnPolicy", ours.env, device=ours.device, **arguments)
        model.set_logger(Logger(None, []))
        _fill(model)

        def work() -> int:
            model.train()
            _wait(model.device)
            return model.rollout_buffer.buffer_size * model.n_envs

        yield work


def _fill(model: Any) -> None:
    import numpy as np

    random, buffer = np.random.default_rng(0), model.rollout_buffer
    buffer.observations = random.integers(0, 255, buffer.observations.shape, np.uint8)
    buffer.actions[:] = random.uniform(-0.9, 0.9, buffer.actions.shape)
    buffer.advantages[:] = random.normal(size=buffer.advantages.shape)
    buffer.pos, buffer.full = buffer.buffer_size, True


# Whole training


@contextmanager
def training(params: TrainParams, n_workers: int = 0, make_worker: MakeWorker | None = None) -> Iterator[Work]:
    """Rollout and update, as ``pipeline.train`` does them, without validation; counts frames."""
    workers = n_workers or min(params.n_workers or cores(), params.n_envs)
    with _model(params, workers if params.n_envs > 1 else 0, make_worker) as model:
        rollout = params.n_steps * params.n_envs

        def work() -> int:
            model.learn(rollout, reset_num_timesteps=model._last_obs is None)
            _wait(model.device)
            return rollout * params.frame_skip

        yield work


# Peers


def _envpool(params: TrainParams, threads: int) -> AbstractContextManager[Work]:
    n_envs = 1 if threads == 1 else max(params.n_envs, threads)
    return peer_process("envpool", str(n_envs), str(threads))


def _rl_zoo(params: TrainParams) -> AbstractContextManager[Work]:
    return peer_process("rl_zoo3")


FRAMES, SAMPLES, DECISIONS = "frames/s", "samples/s", "decisions/s"
STOCK, SB3 = ("stock",), ("update_sb3_nature",)

CASES = (
    Case("stock", FRAMES, (), partial(_game, env_id="CarRacing-v3")),
    Case("fast_rgb", FRAMES, ("stock", "envpool_1_thread"), partial(_game, env_id="FastCarRacing-v3")),
    Case("fast_gray", FRAMES, STOCK, partial(_game, env_id="FastCarRacing-v3", grayscale=True)),
    Case("training_env", FRAMES, STOCK, training_env),
    Case("vectorised_1_worker", FRAMES, STOCK, partial(vectorised, n_workers=1)),
    Case("vectorised_all_cores", FRAMES, ("vectorised_1_worker",), partial(vectorised, n_workers=cores())),
    Case("inference", DECISIONS, (), inference),
    Case("update_sb3_nature", SAMPLES, (), _sb3_update),
    Case("update_nature_fp32", SAMPLES, SB3, partial(update, precision="fp32", **NATURE)),
    Case("update_nature_bf16", SAMPLES, SB3, partial(update, precision="bf16", **NATURE)),
    Case("update_default_fp32", SAMPLES, SB3, partial(update, precision="fp32")),
    Case("update_default_auto", SAMPLES, SB3, update),
    Case("training", FRAMES, ("stock", "rl_zoo_training"), training),
)

PEERS = (
    Case("envpool_1_thread", FRAMES, STOCK, partial(_envpool, threads=1), peer="envpool"),
    Case("envpool_all_cores", FRAMES, ("envpool_1_thread",), partial(_envpool, threads=cores()), peer="envpool"),
    Case(
        "fast_rgb_all_cores",
        FRAMES,
        ("fast_rgb", "envpool_all_cores"),
        partial(vectorised, n_workers=cores(), **EVERY_FRAME_RGB),
    ),
    # A piece is a whole rollout of 4096 decisions, most of a minute. What the first calls cost is in the first round
    # alone, so the median of three doesn't see it.
    Case("rl_zoo_training", FRAMES, STOCK, _rl_zoo, warm_up=False, peer="rl_zoo3"),
)
