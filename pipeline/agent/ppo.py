"""Parameters -> PPO: stable-baselines3's algorithm, with a rollout loop in which workers and network never wait.

The environments are two groups. While the network picks actions for one group, the worker processes step the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv

from pipeline.agent.network import DrivingNetwork, choose_dtype, network_kwargs
from pipeline.config import TrainParams, cores
from pipeline.sim.vec_env import SharedMemoryVecEnv


class RewardScaler:
    """Training reward -> reward / running std of the discounted return, clipped; as SB3's ``VecNormalize`` does.

    Attributes:
        statistics: Running variance of the discounted return over all environments.
        returns: (n_envs,) float64 discounted return of the present episodes.
    """

    EPSILON = 1e-8

    def __init__(self, n_envs: int, gamma: float, normalize: bool, clip: float) -> None:
        self.gamma, self.normalize, self.clip = gamma, normalize, clip
        self.statistics = RunningMeanStd(shape=())
        self.returns = np.zeros(n_envs)

    def __call__(self, rewards: NDArray[np.float32], dones: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Scale one step's rewards, (n_envs,) float32."""
        if self.normalize:
            self.returns = self.returns * self.gamma + rewards
            self.statistics.update(self.returns)
            rewards = (rewards / np.sqrt(self.statistics.var + self.EPSILON)).astype(np.float32)
            self.returns[dones] = 0
        return np.clip(rewards, -self.clip, self.clip) if self.clip else rewards


class DrivingPPO(PPO):
    """PPO (Schulman et al. 2017) as in SB3; only the rollout loop is its own.

    Args:
        reward_scaler: Applied to the rewards before advantages are estimated.
    """

    policy: DrivingNetwork
    env: SharedMemoryVecEnv

    def __init__(self, *args: Any, reward_scaler: RewardScaler, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reward_scaler = reward_scaler

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the buffer with ``n_rollout_steps`` decisions of each environment.

        Differs from SB3's loop in three ways: the two groups of environments alternate, rewards are scaled here, and
        ``callback.on_step`` is called when the *whole* vector has been stepped, with ``infos``, ``rewards``, ``dones``.
        """
        assert isinstance(env, SharedMemoryVecEnv)
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()
        rewards = np.zeros((n_rollout_steps, env.num_envs), np.float32)
        bootstrap = np.zeros_like(rewards)
        dones = np.zeros((n_rollout_steps, env.num_envs), bool)
        assert isinstance(self._last_obs, np.ndarray)
        pictures = (
            rollout_buffer.observations
        )  # (n_steps, n_envs, c, h, w) uint8: the workers' pictures are copied once
        pictures[0] = self._last_obs
        last_pictures = np.empty_like(pictures[0])

        for step in range(n_rollout_steps):
            if self.use_sde and (step == 0 or (self.sde_sample_freq > 0 and step % self.sde_sample_freq == 0)):
                self._resample_noise()
            infos: list[dict[str, Any]] = []
            for group, rows in enumerate(env.groups):
                if step > 0:
                    infos += self._receive(env, group, pictures[step], rewards[step - 1], dones[step - 1])
                env.send(group, self._act(rollout_buffer, step, rows))
            if step > 0 and not self._after_step(
                callback, rewards[step - 1], dones[step - 1], bootstrap[step - 1], infos
            ):
                return False
        infos = []
        for group in range(len(env.groups)):
            infos += self._receive(env, group, last_pictures, rewards[-1], dones[-1])
        if not self._after_step(callback, rewards[-1], dones[-1], bootstrap[-1], infos):
            return False

        rollout_buffer.episode_starts[0] = self._last_episode_starts
        rollout_buffer.episode_starts[1:] = dones[:-1]
        for step in range(n_rollout_steps):
            rollout_buffer.rewards[step] = self.reward_scaler(rewards[step], dones[step]) + bootstrap[step]
        rollout_buffer.pos, rollout_buffer.full = n_rollout_steps, True
        self._last_obs, self._last_episode_starts = last_pictures, dones[-1]
        with th.no_grad():
            last_values = self.policy.predict_values(self._to_device(last_pictures))
        rollout_buffer.compute_returns_and_advantage(last_values, dones[-1])
        callback.on_rollout_end()
        return True

    def _receive(
        self,
        env: SharedMemoryVecEnv,
        group: int,
        pictures: NDArray[np.uint8],
        rewards: NDArray[np.float32],
        dones: NDArray[np.bool_],
    ) -> list[dict[str, Any]]:
        """Take one group's step into its rows of (n_envs, ...) arrays; returns its infos."""
        rows = env.groups[group]
        pictures[rows], rewards[rows], dones[rows], infos = env.receive(group)
        return infos

    def _act(self, buffer: RolloutBuffer, step: int, rows: slice) -> NDArray[np.float32]:
        """Choose actions for one group's pictures, and store what the update needs of it."""
        with th.no_grad():
            actions, values, log_probs = self.policy(self._to_device(buffer.observations[step, rows]))
        sampled: NDArray[np.float32] = actions.cpu().numpy()
        buffer.actions[step, rows] = sampled
        buffer.values[step, rows] = values.flatten().cpu().numpy()
        buffer.log_probs[step, rows] = log_probs.cpu().numpy()
        return np.clip(sampled, self.action_space.low, self.action_space.high)  # type: ignore[attr-defined]

    def _after_step(
        self,
        callback: BaseCallback,
        rewards: NDArray[np.float32],
        dones: NDArray[np.bool_],
        bootstrap: NDArray[np.float32],
        infos: list[dict[str, Any]],
    ) -> bool:
        """Count, bootstrap episodes cut by the time limit, tell the callbacks."""
        self.num_timesteps += len(infos)
        for index in np.flatnonzero(dones):
            if infos[index].get("TimeLimit.truncated"):
                last = self._to_device(infos[index]["terminal_observation"][None])
                with th.no_grad():
                    bootstrap[index] = self.gamma * self.policy.predict_values(last).item()
        self._update_info_buffer(infos, dones)
        callback.update_locals({"infos": infos, "rewards": rewards, "dones": dones})
        return callback.on_step()

    def _resample_noise(self) -> None:
        self.policy.reset_noise(max(rows.stop - rows.start for rows in self.env.groups))

    def _to_device(self, observations: NDArray[np.uint8]) -> th.Tensor:
        return th.from_numpy(observations).to(self.device, non_blocking=True)


def choose_device(device: str) -> th.device:
    """``auto`` is CUDA, else Apple's GPU, else the CPU."""
    if device != "auto":
        return th.device(device)
    if th.cuda.is_available():
        return th.device("cuda")
    return th.device("mps" if th.backends.mps.is_available() else "cpu")


def schedule(kind: str, initial: float) -> Callable[[float], float]:
    """A learning-rate schedule over SB3's ``progress_remaining``, which falls from 1 to 0."""
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda remaining: 1.0,
        "linear": lambda remaining: remaining,
        "cosine": lambda remaining: (1 - math.cos(math.pi * remaining)) / 2,
    }
    shape = shapes[kind]
    return lambda remaining: initial * shape(remaining)


def build_model(params: TrainParams, env: SharedMemoryVecEnv) -> DrivingPPO:
    """The PPO of these parameters, on its device, with torch's threads set."""
    th.set_num_threads(params.num_threads or cores())
    device = choose_device(params.device)
    dtype = choose_dtype(params.precision, device)
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
        use_sde=params.action_head == "gsde",
        sde_sample_freq=params.sde_sample_freq,
        policy_kwargs={**network_kwargs(params, dtype), "optimizer_kwargs": {"eps": 1e-5, "fused": True}},
        seed=params.seed,
        device=device,
        reward_scaler=RewardScaler(env.num_envs, params.gamma, params.normalize_reward, params.reward_clip),
    )
