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
from numpy.typing import NDArray
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices

from pipeline.sim.episodes import EnvState, Episodes, Replayable
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
from pipeline.sim.worker import TERMINAL, Arrays, Context, Failure, Message, SharedArrays, layout

__all__ = ["EnvState", "Replayable", "SharedMemoryVecEnv", "WorkerError"]

BOTH = (0, 1)
"""The groups of a plain step."""

NO_PAGE = -1

Infos = list[dict[str, Any]]
Groups = tuple[int, ...]
MakeWorker = Callable[[list[int], Arrays], Worker]
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
        make_worker: Makes each worker, of its environments and this process's arrays, instead of a process here.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env[Any, Any]]],
        n_workers: int,
        start_method: str | None = None,
        deadline: float = 60.0,
        max_restarts: int = 3,
        make_worker: MakeWorker | None = None,
    ) -> None:
        if not env_fns or n_workers < 0:
            raise ValueError(f"expected env_fns and n_workers >= 0, got {len(env_fns)} env_fns and {n_workers=}")
        probe = env_fns[0]()  # a few ms, and the sizes in shared memory are known before the first process starts
        observation_space, action_space = probe.observation_space, probe.action_space
        replayable = isinstance(probe, Replayable)
        probe.close()
        n_envs = len(env_fns)
        self._env_fns = env_fns
        context = process_context(start_method)
        self._shared = SharedArrays(context, layout(n_envs, observation_space, action_space))
        make_worker = make_worker or partial(_worker, n_workers=n_workers, context=context, deadline=deadline)
        self._episodes = Episodes(n_envs, action_space, replayable)
        self._attributes: list[dict[str, Any]] = [{} for _ in env_fns]  # what set_attr has set
        self._infos: Infos = [{} for _ in env_fns]
        self._sent: dict[Groups, int] = {}  # groups under way -> number of the request
        self._page = [0, 0]  # of each group's observations, the last asked for
        self._latest = np.full(n_envs, NO_PAGE)  # page of each environment's observation, the last answered

        half = (n_envs + 1) // 2
        self.groups = (slice(0, half), slice(half, n_envs))
        shares = _spread(self.groups, min(n_workers, n_envs) or 1)
        workers = [make_worker(first + second, self._shared) for first, second in shares]
        every: tuple[Groups, ...] = ((0,), (1,), BOTH)
        self._shares = {groups: _shares(workers, shares, groups) for groups in every}
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

    def _send(self, groups: Groups, actions: NDArray[Any]) -> None:
        if any(group in sent for group in groups for sent in self._sent):
            raise RuntimeError(f"groups {groups}: the step before was not received yet")
        if len({self._page[group] for group in groups}) > 1:
            raise RuntimeError("a step of all environments needs groups that have taken equally many steps, or a reset")
        page = 1 - self._page[groups[0]]
        shared_actions = self._shared.actions[self._span(groups)]
        if np.shape(actions) != shared_actions.shape:
            raise ValueError(f"actions: expected shape {shared_actions.shape}, got {np.shape(actions)}")
        shared_actions[...] = actions
        for group in groups:
            self._page[group] = page
        self._sent[groups] = self._supervisor.request()
        for worker, indices in self._shares[groups]:
            self._supervisor.ask(worker, ("step", indices, page), partial(self._stepped, indices, page))

    def _receive(self, groups: Groups) -> StepReturn:
        if groups not in self._sent:
            raise RuntimeError(f"groups {groups}: no step was sent")
        self._supervisor.settle(self._sent[groups])
        del self._sent[groups]
        span, observations = self._span(groups), self._observations(self._page[groups[0]], groups)
        return observations, self._shared.rewards[span].copy(), self._shared.dones[span].copy(), self._infos[span]

    def _observations(self, page: int, groups: Groups) -> NDArray[Any]:
        observations: NDArray[Any] = self._shared.observations[page, self._span(groups)]
        return observations

    def _span(self, groups: Groups) -> slice:
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
        return self._call(indices, "is_wrapped", (wrapper_class.__module__, wrapper_class.__qualname__))

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


def _spread(groups: Sequence[slice], n_workers: int) -> list[tuple[list[int], ...]]:
    """Each worker's environments, by group; what does not divide goes to the first workers and to the last."""
    first, second = (np.array_split(np.arange(group.start, group.stop), n_workers) for group in groups)
    return [(one.tolist(), two.tolist()) for one, two in zip(first, reversed(second), strict=True)]


def _worker(indices: list[int], shared: Arrays, n_workers: int, context: Context, deadline: float) -> Worker:
    assert isinstance(shared, SharedArrays)
    return ProcessWorker(indices, shared, context, deadline) if n_workers else LocalWorker(indices, shared)


def _shares(
    workers: Sequence[Worker], shares: Sequence[tuple[list[int], ...]], groups: Groups
) -> list[tuple[Worker, list[int]]]:
    """The workers that hold environments of ``groups``, and which."""
    indices = [[index for group in groups for index in share[group]] for share in shares]
    return [(worker, mine) for worker, mine in zip(workers, indices, strict=True) if mine]


def _arguments(seed: int | None, options: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {} if seed is None else {"seed": seed}
    return {**arguments, "options": options} if options else arguments


def _called(results: dict[int, Any], indices: list[int], reply: Any) -> None:
    results.update(dict.fromkeys(indices, reply) if isinstance(reply, Failure) else zip(indices, reply, strict=True))
