"""The scale of the training reward."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.running_mean_std import RunningMeanStd


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
