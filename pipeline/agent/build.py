"""Parameters -> the PPO of a training, on its device, with its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch as th
from stable_baselines3.common.utils import set_random_seed

from pipeline.agent.hardware import choose_device, choose_dtype
from pipeline.agent.network import DrivingNetwork, network_kwargs
from pipeline.agent.ppo import DrivingPPO
from pipeline.agent.reward import RewardScaler
from pipeline.config import TrainParams, cores
from pipeline.sim.driving_state import STATE_SIZE
from pipeline.sim.vec_env import SharedMemoryVecEnv


def schedule(kind: str, initial: float) -> Callable[[float], float]:
    """A learning-rate schedule over SB3's ``progress_remaining``, which falls from 1 to 0."""
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda remaining: 1.0,
        "linear": lambda remaining: remaining,
        "cosine": lambda remaining: (1 - math.cos(math.pi * remaining)) / 2,
    }
    shape = shapes[kind]
    return lambda remaining: initial * shape(max(remaining, 0.0))  # the last rollout ends past total_timesteps


def build_model(params: TrainParams, env: SharedMemoryVecEnv) -> DrivingPPO:
    """The PPO of these parameters, on its device."""
    th.set_num_threads(1)  # orthogonal weights differ in the last bits with the threads that compute them
    device = choose_device(params.device)
    # Not by PPO's own `seed`: that would also seed the environments, whose tracks have a sequence of their own.
    set_random_seed(params.seed, using_cuda=device.type == "cuda")
    dtype = choose_dtype(params.precision, device)
    if device.type == "cuda" and dtype != th.float32:
        th.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    return DrivingPPO(
        DrivingNetwork,
        env,
        learning_rate=schedule(params.learning_rate_schedule, params.learning_rate),
        n_steps=params.n_steps,
        batch_size=params.batch_size,
        n_epochs=params.n_epochs,
        gamma=params.gamma,
        gae_lambda=params.gae_lambda,
        clip_range=params.clip_range,
        ent_coef=params.ent_coef,
        vf_coef=params.vf_coef,
        max_grad_norm=params.max_grad_norm,
        target_kl=params.target_kl or None,
        use_sde=params.action_head == "gsde",
        sde_sample_freq=params.sde_sample_freq,
        policy_kwargs={
            **network_kwargs(params, dtype),
            "state_size": STATE_SIZE if params.privileged_critic else 0,
            "tells_state": params.state_coef > 0,
            "throttle_init": params.throttle_init,
            "optimizer_kwargs": {"eps": 1e-5, "fused": True},
        },
        device=device,
        generator=np.random.default_rng(params.seed),
        update_threads=params.num_threads or cores(),
        state_coef=params.state_coef,
        desired_kl=params.desired_kl,
        reward_scaler=RewardScaler(env.num_envs, params.gamma, params.normalize_reward, params.reward_clip),
    )
