"""Small policy files with random weights, for tests that are not about driving."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.agent import policy
from pipeline.config import NetworkParams, ObservationParams

OBSERVATION = ObservationParams(frame_skip=8, frames_stack=2, grayscale=True, resize=36, action_axes="steer_throttle")
NETWORK = NetworkParams(
    cnn_channels=[2, 2, 2],
    features_dim=8,
    net_arch=[],
    activation="relu",
    ortho_init=True,
    action_head="beta",
    log_std_init=0.0,
)


def write_policy(path: Path, seed: int) -> Path:
    """A policy of 2 stacked gray 36x36 pictures; another one per seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy.save(path, policy.build_network(OBSERVATION, NETWORK), OBSERVATION, NETWORK, steps=0)
    return path
