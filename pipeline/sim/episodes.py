"""What it takes to bring an environment back: how its present episode began, and the actions since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class EnvState:
    """The whole state of a :class:`Replayable` environment.

    Attributes:
        episode: Number of the episode in the environment's own sequence; the last one if ``seed`` is given.
        actions: Actions since the episode began, over all of its tries, (t, *action_shape).
        seed: Set if the episode was begun by ``reset(seed=seed)``, outside of the sequence.
    """

    episode: int
    actions: NDArray[Any]
    seed: int | None = None


@runtime_checkable
class Replayable(Protocol):
    """An environment with a deterministic sequence of episodes, whose state can be brought back exactly.

    ``reset()`` begins the next episode of the sequence and ``reset(seed=...)`` an episode outside of it. The info of
    both carries the number of the last episode begun in the sequence as ``episode_index`` (-1 before the first). If
    ``reset()`` after the end of an episode tells the same number again, that episode goes on, and so do its actions.
    """

    def replay(self, episode: int, actions: NDArray[Any]) -> NDArray[Any]:
        """Go to the state after ``actions`` (t, *action_shape) in ``episode``; returns its observation."""
        ...


class Episodes:
    """How each environment's present episode began, and the actions since: all it takes to bring it back."""

    def __init__(self, n_envs: int, action_space: spaces.Space[Any], replayable: bool) -> None:
        assert action_space.shape is not None
        self.replayable = replayable
        self.begun = [False] * n_envs
        self._numbers: list[int | None] = [None] * n_envs
        self._seeds: list[int | None] = [None] * n_envs
        self._lengths = np.zeros(n_envs, np.int64)
        # 256 steps: an episode of CarRacing has 1000 frames, 250 steps at frame skip 4
        self._actions = np.empty((n_envs, 256, *action_space.shape), action_space.dtype)

    def begin(self, index: int, info: Mapping[str, Any], seed: int | None = None, options: Any = None) -> None:
        """Note that a reset with these arguments returned ``info``: it began an episode, or went on with the last."""
        number = info.get("episode_index") if self.replayable and not options else None
        present = self._numbers[index] if self.begun[index] and self._seeds[index] is None else None
        if seed is None and number is not None and number == present:
            return  # it goes on
        self.begun[index] = True
        self._numbers[index], self._seeds[index] = number, seed
        self._lengths[index] = 0

    def append(self, indices: list[int], actions: NDArray[Any]) -> None:
        """Note a step of some environments with ``actions`` (len(indices), *action_shape)."""
        lengths = self._lengths[indices]
        self._reserve(int(lengths.max()) + 1)
        self._actions[indices, lengths] = actions
        self._lengths[indices] = lengths + 1

    def _reserve(self, length: int) -> None:
        capacity = self._actions.shape[1]
        if length > capacity:
            more = np.empty_like(
                self._actions, shape=(len(self._actions), max(length, 2 * capacity), *self._actions.shape[2:])
            )
            more[:, :capacity] = self._actions
            self._actions = more

    def state(self, index: int) -> EnvState:
        """State of one environment."""
        number = self._numbers[index]
        if number is None:
            raise RuntimeError(
                f"environment {index} can't be brought back (it takes a replay() method, and an episode whose reset "
                f"had no options and told its episode_index)"
            )
        return EnvState(number, self._actions[index, : self._lengths[index]].copy(), self._seeds[index])

    def load(self, index: int, state: EnvState) -> None:
        """Note that one environment was brought to ``state``."""
        self.begin(index, {"episode_index": state.episode}, state.seed)
        self._reserve(len(state.actions))
        self._actions[index, : len(state.actions)] = state.actions
        self._lengths[index] = len(state.actions)
