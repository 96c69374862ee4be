"""Many environments over worker processes: observations in shared memory, workers supervised, state restorable.

A step costs each worker one short message each way: observations, actions, rewards and dones stay in shared memory. A
worker that dies or hangs is replaced and brought back to the same state, so a run's result does not depend on it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices

from pipeline.sim.supervisor import (
    CLOSING_TIME,
    LocalWorker,
    ProcessWorker,
    Supervisor,
    Worker,
    WorkerError,
    process_context,
    shut_down,
)
from pipeline.sim.worker import TERMINAL, EnvState, Failure, Message, Replayable, SharedArrays

__all__ = ["EnvState", "Replayable", "SharedMemoryVecEnv", "WorkerError"]

BOTH = (0, 1)
"""The groups of a plain step."""

NO_PAGE = -1

Infos = list[dict[str, Any]]
StepReturn = tuple[NDArray[Any], NDArray[np.float32], NDArray[np.bool_], Infos]


class SharedMemoryVecEnv(VecEnv):
    """``n_envs`` environments on ``n_workers`` processes, with the semantics of stable-baselines3's vectorised ones.

    Results are the same bit for bit whatever ``n_workers`` is, and whatever befalls the workers on the way.

    **Observations are valid until the second next step.** They are not copied: two pages of shared memory take turns,
    so what ``step()`` returns is overwritten by the step after the next one. That is as long as stable-baselines3 needs
    it (it stores the previous observation after the next step). Rewards, dones and infos are the caller's own.

    **Groups.** ``send(group, actions)`` and ``receive(group)`` step one half of the environments, ``groups[group]``,
    while the learner works on the other. Each half is spread over all workers.

    **Replacement.** A worker that dies, hangs or raises is replaced: in a new one the attributes set by ``set_attr``
    are set again (what ``env_method`` changed is not), the episodes are replayed up to the present step, and what the
    old worker was asked is asked again. This takes environments that are :class:`Replayable`, outermost, in an episode
    that was begun without options; otherwise the failure is raised at once.

    Args:
        env_fns: One function per environment; sent to the workers by reference where they can import it.
        n_workers: Processes; 0 steps all environments in this one.
        start_method: ``forkserver`` (the default where it exists) or ``spawn``.
        deadline: Seconds after which a worker that does not answer counts as hung.
        max_restarts: Failures in a row after which a worker is given up with a :class:`WorkerError`.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env[Any, Any]]],
        n_workers: int,
        start_method: str | None = None,
        deadline: float = 60.0,
        max_restarts: int = 3,
    ) -> None:
        if not env_fns or n_workers < 0:
            raise ValueError(f"expected env_fns and n_workers >= 0, got {len(env_fns)} env_fns and {n_workers=}")
        probe = env_fns[0]()  # a few ms, and the sizes in shared memory are known before the first process starts
        observation_space, action_space = probe.observation_space, probe.action_space
        replayable = isinstance(probe, Replayable)
        probe.close()
        context = process_context(start_method)
        n_envs = len(env_fns)
        self._env_fns = env_fns
        self._shared = SharedArrays(context, n_envs, observation_space, action_space)
        self._attributes: list[dict[str, Any]] = [{} for _ in env_fns]
        self._episodes = Episodes(n_envs, action_space, replayable)
        self._infos: Infos = [{} for _ in env_fns]
        self._sent: dict[tuple[int, ...], int] = {}  # groups under way -> number of the request
        self._page = [0, 0]  # of each group's observations, the last asked for
        self._latest = np.full(n_envs, NO_PAGE)  # page of each environment's observation, the last answered

        self.groups = (slice(0, (n_envs + 1) // 2), slice((n_envs + 1) // 2, n_envs))
        shares = _spread(self.groups, min(n_workers, n_envs) or 1)
        workers: list[Worker] = [
            ProcessWorker(first + second, self._shared, context, deadline)
            if n_workers
            else LocalWorker(first + second, self._shared)
            for first, second in shares
        ]
        pairs = list(zip(workers, shares, strict=True))
        self._shares: dict[tuple[int, ...], list[tuple[Worker, list[int]]]] = {
            groups: [(worker, [i for group in groups for i in share[group]]) for worker, share in pairs]
            for groups in ((0,), (1,), BOTH)
        }
        self._supervisor = Supervisor(workers, self._recovery, max_restarts)
        self._open = weakref.finalize(self, shut_down, workers)
        self._supervisor.start()
        try:
            super().__init__(n_envs, observation_space, action_space)
        except BaseException:
            self.close()
            raise

    # Stepping

    def step_async(self, actions: NDArray[Any]) -> None:
        """Start a step of all environments with ``actions`` (n_envs, *action_shape)."""
        self._send(BOTH, actions)

    def step_wait(self) -> StepReturn:
        """Observations (n_envs, *shape), rewards (n_envs,) float32, dones (n_envs,) bool and infos of the step."""
        return self._receive(BOTH)

    def send(self, group: int, actions: NDArray[Any]) -> None:
        """Start a step of one group, 0 or 1, with ``actions`` (group size, *action_shape)."""
        self._send((group,), actions)

    def receive(self, group: int) -> StepReturn:
        """What :meth:`step_wait` returns, for the environments ``groups[group]``."""
        return self._receive((group,))

    def _send(self, groups: tuple[int, ...], actions: NDArray[Any]) -> None:
        if any(group in sent for group in groups for sent in self._sent):
            raise RuntimeError(f"groups {groups}: the step before was not received yet")
        if len({self._page[group] for group in groups}) > 1:
            raise RuntimeError("a step of all environments needs groups that have taken equally many steps, or a reset")
        page = 1 - self._page[groups[0]]
        self._shared.actions[self._span(groups)] = actions
        for group in groups:
            self._page[group] = page
        self._sent[groups] = self._supervisor.request()
        for worker, indices in self._shares[groups]:
            if not indices:
                continue
            self._supervisor.ask(worker, ("step", indices, page), partial(self._stepped, indices, page))

    def _receive(self, groups: tuple[int, ...]) -> StepReturn:
        if groups not in self._sent:
            raise RuntimeError(f"groups {groups}: no step was sent")
        self._supervisor.settle(self._sent[groups])
        del self._sent[groups]
        shared, span, page = self._shared, self._span(groups), self._page[groups[0]]
        return (
            shared.observations[page, span],
            shared.rewards[span].copy(),
            shared.dones[span].copy(),
            self._infos[span],
        )

    def _observations(self, page: int, groups: tuple[int, ...]) -> NDArray[Any]:
        observations: NDArray[Any] = self._shared.observations[page, self._span(groups)]
        return observations

    def _span(self, groups: tuple[int, ...]) -> slice:
        return slice(self.groups[groups[0]].start, self.groups[groups[-1]].stop)

    def _stepped(
        self, indices: list[int], page: int, reply: list[tuple[dict[str, Any], dict[str, Any] | None]]
    ) -> None:
        self._latest[indices] = page
        self._episodes.append(indices, self._shared.actions[indices])
        for index, (info, reset_info) in zip(indices, reply, strict=True):
            self._infos[index] = info
            if reset_info is not None:
                info["terminal_observation"] = self._shared.observations[TERMINAL, index].copy()
                self.reset_infos[index] = reset_info
                self._episodes.begin(index, reset_info)

    # Episodes

    def reset(self) -> NDArray[Any]:
        """Begin new episodes, with the seeds and options set before; returns observations (n_envs, *shape)."""
        page = self._turn_page()
        starts = [_arguments(seed, options) for seed, options in zip(self._seeds, self._options, strict=True)]
        for worker in self._supervisor.workers:
            mine = {index: starts[index] for index in worker.indices}
            self._supervisor.ask(worker, ("reset", mine, page), partial(self._was_reset, mine, page))
        self._supervisor.settle(self._supervisor.serial)
        self._reset_seeds()
        self._reset_options()
        return self._observations(page, BOTH)

    def _was_reset(self, starts: Mapping[int, dict[str, Any]], page: int, infos: Infos) -> None:
        for (index, arguments), info in zip(starts.items(), infos, strict=True):
            self._latest[index] = page
            self.reset_infos[index] = info
            self._episodes.begin(index, info, **arguments)

    def state(self) -> list[EnvState]:
        """State of every environment, between two steps."""
        if self._sent:
            raise RuntimeError(f"groups {list(self._sent)}: a step is under way, receive it first")
        return [self._episodes.state(index) for index in range(self.num_envs)]

    def restore(self, states: Sequence[EnvState]) -> NDArray[Any]:
        """Bring all environments to ``states``; returns their observations (n_envs, *shape)."""
        if not self._episodes.replayable or len(states) != self.num_envs:
            raise ValueError(f"expected {self.num_envs} replayable environments, got {len(states)} states")
        page = self._turn_page()
        for worker in self._supervisor.workers:
            mine = {index: states[index] for index in worker.indices}
            self._supervisor.ask(worker, self._build(worker))
            self._supervisor.ask(worker, ("restore", mine, page), partial(self._restored, mine, page))
        self._supervisor.settle(self._supervisor.serial)
        self._reset_seeds()
        self._reset_options()
        return self._observations(page, BOTH)

    def _restored(self, states: Mapping[int, EnvState], page: int, _: None) -> None:
        for index, state in states.items():
            self._latest[index] = page
            self.reset_infos[index] = {"episode_index": state.episode}
            self._episodes.load(index, state)

    def _turn_page(self) -> int:
        """Cancel what is under way and return the page for all environments' next observations."""
        self._supervisor.settle(self._supervisor.serial)
        self._sent.clear()
        self._supervisor.request()
        page = 1 - self._page[0]
        self._page = [page, page]
        self._latest[:] = NO_PAGE  # group 1 may have had its observations there
        return page

    # Attributes and methods of the environments

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Attribute of each environment."""
        return self._call(indices, "get_attr", attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of each environment, also in workers to come."""
        self._call(indices, "set_attr", attr_name, value)
        for index in self._get_indices(indices):
            self._attributes[index][attr_name] = value

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Call a method of each environment; an exception it raises is raised here."""
        return self._call(indices, "env_method", method_name, args, kwargs)

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Whether each environment is wrapped by that class."""
        return self._call(indices, "is_wrapped", wrapper_class)

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """Picture of each environment, (height, width, 3) uint8, if their ``render_mode`` is ``rgb_array``."""
        if self.render_mode == "rgb_array":
            return self.env_method("render")
        warnings.warn(f"get_images: expected render_mode rgb_array, got {self.render_mode}", stacklevel=2)
        return [None] * self.num_envs

    def _call(self, indices: VecEnvIndices, name: str, *arguments: Any) -> list[Any]:
        wanted = [range(self.num_envs)[index] for index in self._get_indices(indices)]
        results: dict[int, Any] = {}
        self._supervisor.request()
        for worker in self._supervisor.workers:
            if mine := [index for index in wanted if index in worker.indices]:
                self._supervisor.ask(worker, (name, mine, *arguments), partial(_called, results, mine))
        self._supervisor.settle(self._supervisor.serial)
        for result in results.values():
            if isinstance(result, Failure):
                cause = WorkerError(result.reason)
                raise cause if result.error is None else result.error from cause
        return [results[index] for index in wanted]

    # Workers

    @property
    def worker_pids(self) -> list[int]:
        """Processes of the workers; none for ``n_workers=0``."""
        return [worker.pid for worker in self._supervisor.workers if worker.pid is not None]

    def close(self) -> None:
        """Close the environments and end the workers."""
        if self._open.detach():
            shut_down(self._supervisor.workers, CLOSING_TIME)

    def _build(self, worker: Worker) -> Message:
        env_fns = {index: self._env_fns[index] for index in worker.indices}
        return "build", env_fns, {index: self._attributes[index] for index in worker.indices}

    def _recovery(self, worker: Worker) -> list[Message]:
        states = {index: self._episodes.state(index) for index in worker.indices if self._episodes.begun[index]}
        pages = {index: int(self._latest[index]) for index in states if self._latest[index] != NO_PAGE}
        return [self._build(worker), ("verify", states, pages)] if states else [self._build(worker)]


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
        """Note that a reset with these arguments began an episode and returned ``info``."""
        self.begun[index] = True
        self._numbers[index] = info.get("episode_index") if self.replayable and not options else None
        self._seeds[index] = seed
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
            raise WorkerError(
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


def _spread(groups: Sequence[slice], n_workers: int) -> list[tuple[list[int], ...]]:
    """Each worker's environments, by group; what does not divide goes to the first workers and to the last."""
    first, second = (np.array_split(np.arange(group.start, group.stop), n_workers) for group in groups)
    return [(one.tolist(), two.tolist()) for one, two in zip(first, reversed(second), strict=True)]


def _arguments(seed: int | None, options: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {} if seed is None else {"seed": seed}
    return {**arguments, "options": options} if options else arguments


def _called(results: dict[int, Any], indices: list[int], reply: Any) -> None:
    results.update(dict.fromkeys(indices, reply) if isinstance(reply, Failure) else zip(indices, reply, strict=True))
