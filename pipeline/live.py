"""Windows on a training: what the game draws, and the very array that the network is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback

from pipeline.config import TrainParams
from pipeline.media.viewer import CLOSING, Viewer

RAW, PREPROCESSED = "env_raw", "env_preprocessed"
GAP = 4
"""Dark pixels between the pictures of a stack."""
GAP_COLOR = (13, 17, 23)


@dataclass(frozen=True)
class Look:
    """How a training is looked at; no parameter, since it changes nothing in the result.

    Attributes:
        every: Decisions from one picture to the next.
        raw: Also show the game's own picture.
        scale: Screen pixels per pixel.
    """

    every: int = 1
    raw: bool = True
    scale: int = 3


class TrainingWindows(BaseCallback):
    """Show environment 0 before every ``look.every``-th decision, until q, Esc or a window's button closes the windows.

    The network itself is listened to, so what is shown is what it was called with, not a likeness.
    """

    def __init__(self, params: TrainParams, viewer: Viewer, look: Look) -> None:
        super().__init__()
        self.params, self.viewer, self.look = params, viewer, look
        self._decisions = 0
        self._listening: Any = None

    def _on_training_start(self) -> None:
        self._listening = self.model.policy.register_forward_pre_hook(self._before_decision)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.close()

    def _before_decision(self, network: th.nn.Module, arguments: tuple[th.Tensor, ...]) -> None:
        observations = arguments[0]
        if not len(observations):
            return  # the second group of a single environment
        if CLOSING.intersection(self.viewer.pressed()):
            self.close()
        elif self._decisions % self.look.every == 0:
            self._show(observations[0].cpu().numpy())
        self._decisions += 1

    def _show(self, observation: NDArray[np.uint8]) -> None:
        if self.look.raw:
            picture = self.training_env.env_method("stock_picture", indices=0)[0]
            self.viewer.show(RAW, enlarge(picture, self.look.scale), f"step {self.model.num_timesteps:,}")
        channels = 1 if self.params.grayscale else 3
        *_, height, width = observation.shape
        caption = f"{len(observation) // channels} x {width} x {height}, newest on the right"
        self.viewer.show(PREPROCESSED, stack_view(observation, channels, self.look.scale), caption)

    def close(self) -> None:
        """Close the windows; the training goes on."""
        if self._listening:
            self._listening.remove()
            self._listening = None
        self.viewer.close()


def enlarge(picture: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """(h, w, 3) -> (h x scale, w x scale, 3), every pixel a square."""
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def stack_view(observation: NDArray[np.uint8], channels: int, scale: int) -> NDArray[np.uint8]:
    """The stacked pictures side by side, oldest left: (stack x channels, h, w) uint8 -> (H, W, 3) uint8 RGB."""
    pictures = observation.reshape(-1, channels, *observation.shape[1:]).transpose(0, 2, 3, 1)
    gap = np.full((pictures.shape[1] * scale, GAP, 3), GAP_COLOR, np.uint8)
    parts: list[NDArray[np.uint8]] = []
    for picture in pictures:
        parts += [enlarge(np.broadcast_to(picture, (*picture.shape[:2], 3)), scale), gap]
    return np.concatenate(parts[:-1], axis=1)
