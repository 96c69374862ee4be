"""stable-baselines3's PPO, with a rollout loop in which workers and network never wait.

The environments are two groups. While the network picks actions for one group, the worker processes step the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.utils import explained_variance, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from pipeline.agent.network import DrivingNetwork, fold
from pipeline.agent.reward import RewardScaler
from pipeline.sim.driving_state import KEY as STATE
from pipeline.sim.driving_state import STATE_SIZE, VISIBLE
from pipeline.sim.vec_env import SharedMemoryVecEnv

NO_STATE = np.zeros(0, np.float32)
UPDATE_STATISTICS = (
    "policy_gradient_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction", "loss", "state_loss"
)  # fmt: skip
APPROX_KL = UPDATE_STATISTICS.index("approx_kl")
CONVERTED_AT_ONCE = 2**28
"""Bytes of a rollout's pictures up to which they become bf16, twice as many, before the first pass."""


class Rollout(NamedTuple):
    """What an update needs of n decisions: observations (n, h // 4, w // 4, 16 c) uint8 or bf16, else (n, ...) float32.

    Observations are as the convolutions want them: folded, and on a CPU converted, once a rollout and not once a pass.
    """

    observations: th.Tensor
    states: th.Tensor
    actions: th.Tensor
    log_probs: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor

    def pick(self, rows: th.Tensor) -> Rollout:
        """The decisions at these rows."""
        return Rollout(*(tensor.index_select(0, rows) for tensor in self))  # 18 times as fast as tensor[rows]


class DrivingPPO(PPO):
    """PPO (Schulman et al. 2017) as in SB3, with its own way of the data through rollout and update.

    Args:
        reward_scaler: Applied to the rewards before advantages are estimated.
        generator: Shuffles the minibatches; its state fits in a checkpoint.
        update_threads: Torch's threads in the update; the rollout has one.
        desired_kl: The learning rate sinks below its schedule while the KL is over 1.5 times this [nats]; 0 = never.
        state_coef: Weight of the loss that makes the features tell what the picture shows of the simulator's state.
    """

    policy: DrivingNetwork
    env: SharedMemoryVecEnv

    def __init__(
        self,
        *args: Any,
        reward_scaler: RewardScaler,
        generator: np.random.Generator,
        update_threads: int,
        state_coef: float = 0.0,
        desired_kl: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.reward_scaler, self.generator, self.update_threads = reward_scaler, generator, update_threads
        self.state_coef, self.desired_kl = state_coef, desired_kl
        self.slowdown = 1.0  # learning rate, as a share of its schedule's
        # What the simulator knows before each decision of the rollout, and after the last one.
        state_size = STATE_SIZE if self.policy.state_size or state_coef else 0
        self.states = np.zeros((self.n_steps + 1, self.n_envs, state_size), np.float32)

    def restore_episodes(self, episodes: Sequence[dict[str, Any]]) -> None:
        """Refill the running statistics of the latest episodes, oldest first."""
        self.ep_info_buffer = deque(episodes, maxlen=self._stats_window_size)
        self.ep_success_buffer = deque(maxlen=self._stats_window_size)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the buffer with ``n_rollout_steps`` decisions of each environment.

        Differs from SB3's loop in three ways: the two groups of environments alternate, rewards are scaled here, and
        ``callback.on_step`` is called when the *whole* vector has been stepped, with ``infos``, ``rewards``, ``dones``.
        """
        assert isinstance(env, SharedMemoryVecEnv)
        self.policy.set_training_mode(False)
        th.set_num_threads(1)  # the workers need the other cores; a batch of a few pictures is no faster on two
        rollout_buffer.reset()
        callback.on_rollout_start()
        rewards = np.zeros((n_rollout_steps, env.num_envs), np.float32)
        bootstrap = np.zeros_like(rewards)
        dones = np.zeros((n_rollout_steps, env.num_envs), bool)
        assert isinstance(self._last_obs, np.ndarray)
        pictures = rollout_buffer.observations  # (n_steps, n_envs, c, h, w) uint8; copied here from the workers, once
        pictures[0] = self._last_obs
        self.states[0] = self.states[-1]
        if self.num_timesteps == 0:
            self._tell_states(0, [{} for _ in env.reset_infos], np.ones(env.num_envs, bool))
        last_pictures = np.empty_like(pictures[0])

        for step in range(n_rollout_steps):
            if self.use_sde and (step == 0 or (self.sde_sample_freq > 0 and step % self.sde_sample_freq == 0)):
                self._resample_noise()
            infos: list[dict[str, Any]] = []
            for group, rows in enumerate(env.groups):
                if step > 0:
                    infos += self._receive(env, group, pictures[step], rewards[step - 1], dones[step - 1])
                env.send(group, self._act(rollout_buffer, step, rows))
            if step > 0:
                self._tell_states(step, infos, dones[step - 1])
                if not self._after_step(callback, rewards[step - 1], dones[step - 1], bootstrap[step - 1], infos):
                    return False
        infos = []
        for group in range(len(env.groups)):
            infos += self._receive(env, group, last_pictures, rewards[-1], dones[-1])
        self._tell_states(n_rollout_steps, infos, dones[-1])
        if not self._after_step(callback, rewards[-1], dones[-1], bootstrap[-1], infos):
            return False

        rollout_buffer.episode_starts[0] = self._last_episode_starts
        rollout_buffer.episode_starts[1:] = dones[:-1]
        for step in range(n_rollout_steps):
            rollout_buffer.rewards[step] = self.reward_scaler(rewards[step], dones[step]) + bootstrap[step]
        rollout_buffer.pos, rollout_buffer.full = n_rollout_steps, True
        self._last_obs, self._last_episode_starts = last_pictures, dones[-1]
        if self.policy.state_size:
            rollout_buffer.values[:] = self._state_values(self.states[:-1])
        last_values = self._values(last_pictures, self.states[-1])
        rollout_buffer.compute_returns_and_advantage(th.from_numpy(last_values), dones[-1])
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

    def _tell_states(self, step: int, infos: list[dict[str, Any]], begun: NDArray[np.bool_]) -> None:
        """Note the states before decision ``step``: those of the infos, or of the resets where an episode has begun."""
        if self.states.size:
            sources = zip(infos, self.env.reset_infos, begun, strict=True)
            self.states[step] = [(reset if new else info)[STATE] for info, reset, new in sources]

    def _values(self, observations: NDArray[np.uint8], states: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n,) what the critic of the advantages expects at observations (n, c, h, w) and states (n, state_size)."""
        if self.policy.state_size:
            return self._state_values(states)
        with th.no_grad():
            values: NDArray[np.float32] = self.policy.predict_values(self._to_device(observations)).cpu().numpy()[:, 0]
        return values

    def _state_values(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """The state critic's values, (...) of states (..., state_size)."""
        with th.no_grad():
            values: NDArray[np.float32] = self.policy.state_critic(self._to_device(states)).cpu().numpy()[..., 0]
        return values

    def _act(self, buffer: RolloutBuffer, step: int, rows: slice) -> NDArray[np.float32]:
        """Choose actions for one group's pictures, and store what the update needs of it."""
        self._use_noise_of(rows)
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
                last, state = infos[index]["terminal_observation"], infos[index].get(STATE, NO_STATE)
                bootstrap[index] = self.gamma * self._values(last[None], state[None])[0]
        self._update_info_buffer(infos, dones)
        callback.update_locals({"infos": infos, "rewards": rewards, "dones": dones})
        return callback.on_step()

    def train(self) -> None:
        """Improve the policy on the rollout: ``n_epochs`` passes in shuffled minibatches, fewer beyond ``target_kl``.

        The losses and the limit are SB3's. What differs is the way of the data: minibatches are picked from one tensor
        that is as the convolutions want it, and numbers for the log stay on the device until the end.
        """
        self.policy.set_training_mode(True)
        th.set_num_threads(self.update_threads)
        learning_rate = self.slowdown * self.lr_schedule(self._current_progress_remaining)
        update_learning_rate(self.policy.optimizer, learning_rate)
        self.logger.record("train/learning_rate", learning_rate)
        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        data = self._flat_rollout()
        statistics: list[th.Tensor] = []
        for _ in range(self.n_epochs):
            near = self._pass_over(data, clip_range, statistics)
            self._n_updates += 1
            if not near:
                break
        means = th.stack(statistics).mean(dim=0).tolist()
        self._record_update(means, clip_range)
        self._adapt(means[APPROX_KL])

    def _adapt(self, kl: float) -> None:
        """Lower the next update's learning rate if this one moved the policy too far, else let it rise again.

        The surer a policy is, the further the same step takes it: at a learning rate that taught a beginner, one that
        drives well falls apart (docs/recipe.md). After Rudin et al. (2021), "Learning to walk in minutes using
        massively parallel deep reinforcement learning", where the rate may rise without end.
        """
        if self.desired_kl and kl > 1.5 * self.desired_kl:
            self.slowdown /= 1.5
        elif kl < self.desired_kl / 1.5:
            self.slowdown = min(1.0, 1.1 * self.slowdown)

    def _pass_over(self, data: Rollout, clip_range: float, statistics: list[th.Tensor]) -> bool:
        """One pass; adds each minibatch's statistics. Returns False if it ended early, beyond ``target_kl``."""
        size = len(data.advantages)
        order = th.from_numpy(self.generator.permutation(size)).to(self.device)
        for start in range(0, size, self.batch_size):
            batch = data.pick(order[start : start + self.batch_size])
            loss, numbers = self._loss(batch, clip_range)
            statistics.append(numbers)
            if self.target_kl is not None and numbers[APPROX_KL] > 1.5 * self.target_kl:
                return False
            self._descend(loss, batch)
        return True

    def _flat_rollout(self) -> Rollout:
        buffer = self.rollout_buffer
        size = buffer.buffer_size * buffer.n_envs

        def flat(array: NDArray[Any]) -> th.Tensor:
            tensor = th.from_numpy(array.reshape(size, *array.shape[2:]))
            return (tensor.pin_memory() if self.device.type == "cuda" else tensor).to(self.device, non_blocking=True)

        observations = fold(flat(buffer.observations))
        on_cpu_in_bf16 = self.device.type == "cpu" and self.policy.features_extractor.dtype == th.bfloat16
        if on_cpu_in_bf16 and observations.nbytes <= CONVERTED_AT_ONCE:
            observations = observations.bfloat16()  # exact, and a tenth of each pass
        return Rollout(
            observations, flat(self.states[:-1]), flat(buffer.actions),
            flat(buffer.log_probs), flat(buffer.advantages), flat(buffer.returns),
        )  # fmt: skip

    def _loss(self, batch: Rollout, clip_range: float) -> tuple[th.Tensor, th.Tensor]:
        """PPO's loss on a minibatch, and its ``UPDATE_STATISTICS``."""
        features = self.policy.extract_features(batch.observations)
        values, log_prob, entropy = self.policy.judge(features, batch.actions)
        advantages = batch.advantages
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        log_ratio = log_prob - batch.log_probs
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        policy_loss = -th.min(advantages * ratio, advantages * clipped).mean()
        value_loss = nn.functional.mse_loss(values.flatten(), batch.returns)
        entropy_loss = log_prob.mean() if entropy is None else -entropy.mean()
        loss = policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss
        state_loss = loss.new_zeros(())
        if self.state_coef:
            told = self.policy.state_head(features)
            state_loss = nn.functional.mse_loss(told, batch.states[:, VISIBLE])
            loss = loss + self.state_coef * state_loss
        with th.no_grad():
            approx_kl = ((ratio - 1) - log_ratio).mean()  # http://joschu.net/blog/kl-approx.html
            clip_fraction = ((ratio - 1).abs() > clip_range).float().mean()
            numbers = th.stack([policy_loss, value_loss, entropy_loss, approx_kl, clip_fraction, loss, state_loss])
        return loss, numbers

    def _descend(self, loss: th.Tensor, batch: Rollout) -> None:
        """One step of the optimizer; gradients that share nothing are clipped each by themselves."""
        self.policy.optimizer.zero_grad()
        if self.policy.state_size:
            values = self.policy.state_critic(batch.states).flatten()
            loss = loss + nn.functional.mse_loss(values, batch.returns)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in self.policy.gradient_groups():
            nn.utils.clip_grad_norm_(group, self.max_grad_norm)
        self.policy.optimizer.step()

    def _record_update(self, means: list[float], clip_range: float) -> None:
        """Log what SB3 logs of an update, under its names."""
        buffer = self.rollout_buffer
        for name, value in zip(UPDATE_STATISTICS, means, strict=True):
            if name != "state_loss" or self.state_coef:
                self.logger.record(f"train/{name}", value)
        explained = explained_variance(buffer.values.flatten(), buffer.returns.flatten())
        self.logger.record("train/explained_variance", float(explained))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip_range)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.exp().mean().item())

    def _resample_noise(self) -> None:
        """Draw gSDE's noise, one matrix per environment as SB3 does."""
        self.policy.reset_noise(self.n_envs)
        distribution = self.policy.action_dist
        assert isinstance(distribution, StateDependentNoiseDistribution)
        self._noise = distribution.exploration_matrices

    def _use_noise_of(self, rows: slice) -> None:
        distribution = self.policy.action_dist
        if isinstance(distribution, StateDependentNoiseDistribution) and rows.stop > rows.start:
            distribution.exploration_matrices, distribution.exploration_mat = self._noise[rows], self._noise[rows.start]

    def _to_device(self, array: NDArray[Any]) -> th.Tensor:
        return th.from_numpy(array).to(self.device, non_blocking=True)
