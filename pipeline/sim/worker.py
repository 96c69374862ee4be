"""The worker side of the vectorised environment: several environments, a pipe for orders, shared memory for arrays.

A worker imports neither torch nor stable-baselines3 nor the program's main module, so it is small and starts fast. The
parent sends orders ``(method of EnvSlice, *arguments)`` and gets one reply for each, in order.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from pipeline.sim.episodes import EnvState

Env = gym.Env[Any, Any]
EnvFn = Callable[[], Env]
Context = Any  # multiprocessing's contexts have no public common type with Process
Message = tuple[Any, ...]

TERMINAL = 2
"""Page of ``SharedArrays.observations`` for last observations of episodes; pages 0 and 1 alternate with the steps."""


ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")}
"""What a worker sets before libraries are loaded: the processes share the cores, threads within them only collide."""


class Failure(NamedTuple):
    """The reply to an order that was not carried out; ``lost`` if the worker is gone rather than the order wrong."""

    reason: str
    error: Exception | None = None
    lost: bool = False

    def __str__(self) -> str:
        return self.reason


Layout = dict[str, tuple[tuple[int, ...], Any]]
"""Shape and dtype of each of the :class:`Arrays`."""


def layout(n_envs: int, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> Layout:
    """The arrays of ``n_envs`` environments with these spaces."""
    return {
        "observations": ((3, n_envs, *_shape(observation_space)), observation_space.dtype),
        "actions": ((n_envs, *_shape(action_space)), action_space.dtype),
        "rewards": ((n_envs,), np.dtype(np.float32)),
        "dones": ((n_envs,), np.dtype(np.bool_)),
    }


class Arrays:
    """The arrays that parent and workers exchange, here in this process's own memory; rows never used cost none.

    Attributes:
        layout: Shape and dtype by name.
        observations: (3, n_envs, *observation_shape), see :data:`TERMINAL`.
        actions: (n_envs, *action_shape).
        rewards: (n_envs,) float32.
        dones: (n_envs,) bool.
    """

    observations: NDArray[Any]
    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    dones: NDArray[np.bool_]

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        for name, (shape, dtype) in layout.items():
            setattr(self, name, np.empty(shape, dtype))


class SharedArrays(Arrays):
    """The arrays in memory that processes share; pickled to a process that is being started, they are mapped again.

    The memory has no name that could be left behind: it is gone when the last process that maps it is gone, however
    that one ended, and arrays handed out stay valid for as long as somebody holds them.
    """

    def __init__(self, context: Context, layout: Layout) -> None:
        sizes = {name: int(np.prod(shape)) * np.dtype(dtype).itemsize for name, (shape, dtype) in layout.items()}
        self.__setstate__((layout, {name: context.RawArray("b", size) for name, size in sizes.items()}))

    def __getstate__(self) -> tuple[Layout, dict[str, Any]]:
        return self.layout, self._memory

    def __setstate__(self, state: tuple[Layout, dict[str, Any]]) -> None:
        self.layout, self._memory = state
        for name, (shape, dtype) in self.layout.items():
            setattr(self, name, np.frombuffer(self._memory[name], dtype).reshape(shape))


def _shape(space: spaces.Space[Any]) -> tuple[int, ...]:
    if space.shape is None or space.dtype is None:
        raise TypeError(f"expected a space of arrays of one shape (Box, Discrete, ...), got {space}")
    return space.shape


class EnvSlice:
    """The environments of one worker: carries out orders on them, in the order of their index."""

    def __init__(self, shared: Arrays) -> None:
        self._shared = shared
        self._envs: dict[int, Env] = {}

    def answer(self, order: tuple[Any, ...]) -> Any:
        """Carry out ``(method name, *arguments)``; what goes wrong comes back as a :class:`Failure`."""
        try:
            return getattr(self, order[0])(*order[1:])
        except Exception as error:
            return Failure(f"raised\n{traceback.format_exc()}", error)

    def build(self, env_fns: Mapping[int, EnvFn], attributes: Mapping[int, Mapping[str, Any]]) -> None:
        """Make all environments anew, and set what ``set_attr`` had set on them."""
        self.close()
        self._envs = {index: env_fn() for index, env_fn in env_fns.items()}
        if len({id(env.unwrapped) for env in self._envs.values()}) < len(self._envs):
            raise ValueError("expected a new environment from each env_fn, got the same one twice")
        for index, values in attributes.items():
            for name, value in values.items():
                setattr(self._envs[index], name, value)

    def step(self, indices: Sequence[int], page: int) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
        """Step with the shared actions; returns ``(info, info of the reset if the episode ended)`` for each."""
        return [self._step(index, page) for index in indices]

    def _step(self, index: int, page: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
        shared, env = self._shared, self._envs[index]
        observation, reward, terminated, truncated, info = env.step(shared.actions[index].copy())
        shared.rewards[index] = reward
        shared.dones[index] = done = terminated or truncated
        info = {**info, "TimeLimit.truncated": truncated and not terminated}
        reset_info = None
        if done:
            shared.observations[TERMINAL, index] = observation
            observation, reset_info = env.reset()
        shared.observations[page, index] = observation
        return info, reset_info

    def reset(self, starts: Mapping[int, Mapping[str, Any]], page: int) -> list[dict[str, Any]]:
        """Reset with ``{index: keyword arguments of reset}``; returns the infos."""
        return [self._reset(index, page, arguments) for index, arguments in starts.items()]

    def _reset(self, index: int, page: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
        self._shared.observations[page, index], info = self._envs[index].reset(**arguments)
        return info

    def restore(self, states: Mapping[int, EnvState], page: int) -> None:
        """Bring newly built environments to ``states``."""
        for index, state in states.items():
            self._shared.observations[page, index] = _replay(self._envs[index], state)

    def verify(self, states: Mapping[int, EnvState], pages: Mapping[int, int]) -> None:
        """Bring newly built environments to ``states``; they must show what is in shared memory."""
        for index, state in states.items():
            observation = _replay(self._envs[index], state)
            seen = self._shared.observations[pages[index], index] if index in pages else observation
            if np.asarray(observation, seen.dtype).tobytes() != seen.tobytes():
                raise RuntimeError(f"environment {index}: replay() leads to another observation than the first time")

    def get_attr(self, indices: Iterable[int], name: str) -> list[Any]:
        """Attribute of each environment, whichever wrapper has it."""
        return [self._envs[index].get_wrapper_attr(name) for index in indices]

    def set_attr(self, indices: Sequence[int], name: str, value: Any) -> list[None]:
        """Set an attribute of each outermost wrapper, as stable-baselines3 does."""
        for index in indices:
            setattr(self._envs[index], name, value)
        return [None for _ in indices]

    def env_method(self, indices: Iterable[int], name: str, args: Any, kwargs: Any) -> list[Any]:
        """Call a method of each environment, whichever wrapper has it."""
        return [self._envs[index].get_wrapper_attr(name)(*args, **kwargs) for index in indices]

    def is_wrapped(self, indices: Iterable[int], wrapper_class: tuple[str, str]) -> list[bool]:
        """Whether each environment has a wrapper of the class of that module and name.

        By name: to unpickle a class of stable-baselines3, as VecMonitor asks for, would import torch, 4 s a worker.
        """
        return [wrapper_class in _wrapper_classes(self._envs[index]) for index in indices]

    def close(self) -> None:
        """Close all environments."""
        while self._envs:
            self._envs.popitem()[1].close()


def _wrapper_classes(env: Env) -> Iterator[tuple[str, str]]:
    while isinstance(env, gym.Wrapper):
        yield from ((base.__module__, base.__qualname__) for base in type(env).__mro__)
        env = env.env


def _replay(env: Any, state: EnvState) -> NDArray[Any]:
    if state.seed is None:
        observation: NDArray[Any] = env.replay(state.episode, state.actions)
        return observation
    if state.episode >= 0:
        env.replay(state.episode, state.actions[:0])
    observation, _ = env.reset(seed=state.seed)
    for action in state.actions:
        observation, *_ = env.step(action.copy())
    return observation


def serve(pipe: connection.Connection, shared: SharedArrays) -> None:
    """Main function of a worker process: answer orders until the parent closes its end of the pipe, or is gone."""
    live_with_parent()
    os.environ.update(ONE_THREAD)
    envs = EnvSlice(shared)
    with suppress(EOFError, OSError):
        while True:
            pipe.send_bytes(encoded(envs.answer(pickle.loads(pipe.recv_bytes()))))
            limit_threads()
    envs.close()


def live_with_parent() -> None:
    """What a worker process does first: leave Ctrl-C, which goes to the whole group, to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # also out of a step that never returns


def limit_threads() -> None:
    """Keep OpenCV, which has a thread per core of its own, to one; it may have been imported since the last order."""
    cv2 = sys.modules.get("cv2")
    if cv2 is not None and cv2.getNumThreads() > 1:
        cv2.setNumThreads(1)


def encoded(reply: Any) -> bytes:
    """Pickle a reply; what can't be pickled becomes a :class:`Failure` that says so."""
    try:
        answer = dumps(reply)
        if isinstance(reply, Failure):
            pickle.loads(answer)  # exceptions with an __init__ of their own often can't be rebuilt
    except Exception:  # whatever can't be pickled, or rebuilt on the other side, is told as text
        reason = reply.reason if isinstance(reply, Failure) else f"raised\n{traceback.format_exc()}"
        return pickle.dumps(Failure(reason))
    return answer


def dumps(value: Any) -> bytes:
    """Pickle by reference where a worker can import it, by value for what lives in ``__main__`` and for lambdas."""
    with suppress(pickle.PicklingError, AttributeError, TypeError):
        encoded = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        if b"__main__" not in encoded:
            return encoded
    import cloudpickle  # type: ignore[import-untyped]

    by_value: bytes = cloudpickle.dumps(value)
    return by_value
