"""A training state on disk: written whole or not at all, read without unpickling, and exact to the bit.

One safetensors file holds weights, Adam's moments, random generators, the reward scale, and of every environment its
episode and the actions since, which bring it back by replay. The header holds the counters as JSON and a SHA-256 of
everything else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pipeline import durable
from pipeline.agent.policy import without_aliases
from pipeline.agent.ppo import DrivingPPO
from pipeline.sim.vec_env import EnvState

log = logging.getLogger(__name__)

FORMAT_VERSION = 3
HEADER_KEY = "carracing-state"
KEPT = 3
"""Newest states kept; the last may be damaged by whatever ended the run, so older ones stand behind it."""


class CheckpointError(Exception):
    """States are there but none can be read; the message says what to do."""


@dataclass(frozen=True)
class State:
    """A training between two rollouts.

    Attributes:
        tensors: Weights, moments, generators and actions by name.
        header: Counters and everything else that is plain JSON.
    """

    tensors: dict[str, th.Tensor]
    header: dict[str, Any]


def machine(model: DrivingPPO) -> dict[str, str]:
    """What decides the last bits beside the parameters; a training resumed elsewhere is equal only statistically."""
    return {
        "torch": th.__version__,
        "numpy": np.__version__,
        "threads": str(model.update_threads),
        "isa": th.backends.cpu.get_cpu_capability(),
        "architecture": platform.machine(),
        "device": th.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "dtype": str(model.policy.features_extractor.dtype),
    }


def capture(model: DrivingPPO, extra: Mapping[str, Any]) -> State:
    """The state of ``model`` and its environments; ``extra`` is JSON of the caller's own."""
    tensors = {f"policy.{name}": tensor for name, tensor in without_aliases(model.policy.state_dict()).items()}
    for index, moments in enumerate(model.policy.optimizer.state.values()):
        tensors.update({f"adam.{index}.{name}": th.as_tensor(value) for name, value in moments.items()})
    for index, state in enumerate(model.env.state()):
        tensors[f"env.{index}.actions"] = th.from_numpy(np.ascontiguousarray(state.actions))
        tensors[f"env.{index}.episode"] = th.tensor(state.episode)
    tensors["random.torch"] = th.get_rng_state()
    if model.device.type == "cuda":
        tensors["random.cuda"] = th.cuda.get_rng_state(model.device)
    if model.device.type == "mps":
        tensors["random.mps"] = th.mps.get_rng_state()
    tensors["scaler.returns"] = th.from_numpy(model.reward_scaler.returns)
    tensors["driving_states"] = th.from_numpy(model.states[-1])
    tensors["episode_starts"] = th.from_numpy(np.asarray(model._last_episode_starts))
    statistics = model.reward_scaler.statistics
    header = {
        "format": FORMAT_VERSION,
        "machine": machine(model),
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "slowdown": model.slowdown,
        "random.numpy": model.generator.bit_generator.state,
        "scaler": [float(statistics.mean), float(statistics.var), float(statistics.count)],
        "episodes": list(model.ep_info_buffer or ()),
        "pending_log": {k: v for k, v in model.logger.name_to_value.items() if isinstance(v, (int, float))},
        "extra": dict(extra),
    }
    return State({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, header)


def restore(model: DrivingPPO, state: State) -> None:
    """Bring ``model`` and its environments to ``state``; the next ``learn`` goes on from there."""
    tensors, header = state.tensors, state.header
    weights = {k.removeprefix("policy."): v for k, v in tensors.items() if k.startswith("policy.")}
    model.policy.load_state_dict(weights, strict=False)  # copies in place, so channels-last strides stay
    _restore_adam(model.policy.optimizer, tensors)
    model.num_timesteps, model._n_updates = header["num_timesteps"], header["n_updates"]
    model.slowdown = header["slowdown"]
    model.generator.bit_generator.state = header["random.numpy"]
    scaler = model.reward_scaler
    mean, var, count = header["scaler"]
    scaler.statistics.mean, scaler.statistics.var = np.asarray(mean), np.asarray(var)
    scaler.statistics.count = count
    scaler.returns = tensors["scaler.returns"].numpy().copy()
    model.restore_episodes(header["episodes"])
    for key, value in header["pending_log"].items():
        model.logger.record(key, value)
    model._last_obs = model.env.restore(_env_states(tensors, model.env.num_envs))
    model.states[-1] = tensors["driving_states"].numpy()
    model._last_episode_starts = tensors["episode_starts"].numpy().copy()
    if model.device.type == "cuda" and "random.cuda" in tensors:
        th.cuda.set_rng_state(tensors["random.cuda"], model.device)
    if model.device.type == "mps" and "random.mps" in tensors:
        th.mps.set_rng_state(tensors["random.mps"])
    th.set_rng_state(tensors["random.torch"])  # last: building the model drew from it


def _restore_adam(optimizer: th.optim.Optimizer, tensors: Mapping[str, th.Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        if f"adam.{index}.step" not in tensors:
            continue  # before the first update
        moments = {name: th.empty_like(parameter) for name in ("exp_avg", "exp_avg_sq")}  # same strides as the weights
        for name, moment in moments.items():
            moment.copy_(tensors[f"adam.{index}.{name}"])
        step = tensors[f"adam.{index}.step"].to(parameter.device)
        optimizer.state[parameter] = {"step": step, **moments}


def _env_states(tensors: Mapping[str, th.Tensor], n_envs: int) -> list[EnvState]:
    return [
        EnvState(int(tensors[f"env.{index}.episode"]), tensors[f"env.{index}.actions"].numpy())
        for index in range(n_envs)
    ]


def publish(folder: Path, state: State, best: int | None = None) -> Path:
    """Write a state under its number of agent steps, and drop all but the newest ``KEPT`` and the one of ``best``.

    Args:
        folder: Of the checkpoints.
        state: What to write.
        best: Agent steps of the best policy so far; the state of that moment is kept however old it is.

    Raises:
        OSError: It can't be written, for example because the disk is full; the states before it are as they were.
    """
    path = state_path(folder, state.header["num_timesteps"])
    header = json.dumps(state.header, sort_keys=True)
    data = save(state.tensors, metadata={HEADER_KEY: header, "sha256": digest(state.tensors, header)})
    durable.publish(path, data)
    spared = None if best is None else state_path(folder, best)
    for old in states(folder)[KEPT:]:
        if old != spared:
            old.unlink()
    return path


def state_path(folder: Path, steps: int) -> Path:
    """The file of the state after so many agent steps."""
    return folder / f"state_{steps:012}.safetensors"


def digest(tensors: Mapping[str, th.Tensor], header: str) -> str:
    """SHA-256 over the header and every tensor's name, type, shape and bytes."""
    sha = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def states(folder: Path) -> list[Path]:
    """State files of a folder, newest first."""
    return sorted(folder.glob("state_*.safetensors"), reverse=True)


def latest(folder: Path) -> State | None:
    """The newest readable state, or None if there is none at all.

    Raises:
        CheckpointError: There are states, but every one is damaged. Starting afresh would throw them away, so that is
            left to the user.
    """
    damaged: list[str] = []
    for path in states(folder):
        try:
            return read(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            damaged.append(f"{path.name}: {error}")
            log.warning("checkpoint %s can't be used (%s); trying the one before", path, error)
    if damaged:
        raise CheckpointError(
            f"no readable checkpoint in {folder}:\n  " + "\n  ".join(damaged) + "\n"
            "Restore one from a backup, or delete these files to train from the start."
        )
    return None


def read(path: Path) -> State:
    """Read and verify one state file. Raises ValueError if its contents don't match its digest."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    header = metadata[HEADER_KEY]
    if digest(tensors, header) != metadata["sha256"]:
        raise ValueError("damaged: its contents do not match its SHA-256")
    content = json.loads(header)
    if content["format"] != FORMAT_VERSION:
        raise ValueError(f"format {content['format']}; this version reads format {FORMAT_VERSION}")
    return State(tensors, content)
