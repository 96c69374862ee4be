"""The saved policy: weights plus the observation pipeline they were trained with, in one file without pickles.

Format: safetensors. The tensors are the network's; the header holds one JSON text under ``carracing-policy`` with the
observation and network parameters. Reading it executes nothing.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump

from pipeline import durable
from pipeline.agent.network import LOG_2, BetaDistribution, DrivingNetwork, network_kwargs
from pipeline.config import NetworkParams, ObservationParams, TrainParams
from pipeline.sim.env import to_pedals

HEADER_KEY = "carracing-policy"
FORMAT_VERSION = 1
MAX_ZIP_MEMBER = 256 * 1024 * 1024
"""Bytes of weights accepted from a third-party zip; a small file can unpack to terabytes."""
HELPERS = ("state_critic.", "state_head.")
"""Parts of the network that only a training asks."""

_ADVICE = {
    "action_net.bias": "; is action_axes the one it was trained with?",
    "features_extractor.cnn.0.weight": "; are frames_stack and grayscale those it was trained with?",
    "features_extractor.linear.0.weight": "; is resize the one it was trained with?",
}
"""Where a shape tells which parameter is wrong."""


class PolicyError(Exception):
    """A policy file that can't be used: what was expected, what came."""


class Policy:
    """A network ready to drive, and what it needs to see.

    Attributes:
        observation: Frame skip, stack, size, colour and action axes the network was trained with.
        network: Shape of the network.
        info: What else the file says of its training (agent steps, versions), as JSON values.
        weights: What the file holds, with the critic that only a training asks if it is there.
    """

    def __init__(
        self,
        weights: dict[str, th.Tensor],
        observation: ObservationParams,
        network: NetworkParams,
        info: dict[str, Any],
    ) -> None:
        self.observation, self.network, self.info, self.weights = observation, network, info, weights
        self.module = build_network(observation, network)
        load_weights(self.module, driving(weights))
        self.module.set_training_mode(False)

    def predict(self, observations: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Deterministic actions: (n, c, h, w) uint8 -> (n, 3) float32 steer [-1, 1], gas [0, 1], brake [0, 1].

        The mean of what the training's noise puts on the controls. On a throttle axis each pedal has its own mean: a
        policy that is unsure between gas and brake presses both a little, as it did on average while it learned. The
        pedal of its mean throttle would be the brake alone, on which a car that stands never moves again.
        """
        with th.inference_mode():
            head = self.module.get_distribution(th.from_numpy(observations))
            axes = self._clipped(head.mode())
            if axes.shape[1] == 3:
                return axes
            if not isinstance(head, BetaDistribution):
                return to_pedals(axes)
            gas = head.mean_above_zero().numpy()[:, 1]
        return np.stack([axes[:, 0], gas, np.clip(gas - axes[:, 1], 0, 1)], axis=1)

    def predict_axes(self, observations: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The mean action on the policy's own axes: (n, c, h, w) uint8 -> (n, n_axes) float32."""
        with th.inference_mode():
            return self._clipped(self.module.get_distribution(th.from_numpy(observations)).mode())

    def _clipped(self, actions: th.Tensor) -> NDArray[np.float32]:
        space: Any = self.module.action_space
        clipped: NDArray[np.float32] = np.clip(actions.numpy(), space.low, space.high)
        return clipped

    def density(self, observation: NDArray[np.uint8], points: int) -> NDArray[np.float32]:
        """Of each action axis the probability density at one observation (c, h, w): (points, n_axes).

        The points are spread evenly from the axis's lower end to its upper end.
        """
        space: Any = self.module.action_space
        actions = th.from_numpy(np.linspace(space.low, space.high, points))  # (points, n_axes)
        with th.inference_mode():
            head: Any = self.module.get_distribution(th.from_numpy(observation[None]))
            if isinstance(head, BetaDistribution):  # stretched from [0, 1] to [-1, 1]
                inside = ((actions + 1) / 2).clamp(BetaDistribution.EPSILON, 1 - BetaDistribution.EPSILON)
                log_density = head.beta.log_prob(inside) - LOG_2  # type: ignore[no-untyped-call]
            else:
                log_density = head.distribution.log_prob(actions)
            density: NDArray[np.float32] = log_density.exp().float().numpy()
        return density

    def value(self, observations: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n,) the critic's estimate of the (normalised, shaped) return."""
        with th.inference_mode():
            values: NDArray[np.float32] = self.module.predict_values(th.from_numpy(observations)).numpy()[:, 0]
        return values


def load_weights(module: DrivingNetwork, weights: dict[str, th.Tensor]) -> None:
    """Copy weights into a network of the same shape, else raise :class:`PolicyError`."""
    expected = without_aliases(module.state_dict())
    for helper in HELPERS:
        if not any(name.startswith(helper) for name in weights):
            expected = _without(expected, helper)  # a policy trained without it, or shipped: the helper starts afresh
    wrong = [k for k in expected.keys() | weights.keys() if _shape(expected, k) != _shape(weights, k)]
    if wrong:
        key = min(wrong)
        shapes = f"expected shape {_shape(expected, key)}, got {_shape(weights, key)}"
        raise PolicyError(f"weights {key}: {shapes}{_ADVICE.get(key, '')}")
    module.load_state_dict(weights, strict=False)  # the names left out are aliases of those checked above


def warm_start(params: TrainParams) -> dict[str, th.Tensor]:
    """Weights of the policy that ``params.warm_start`` names.

    Raises:
        PolicyError: Unreadable, or trained with a network or pictures that the parameters don't describe. The frame
            skip may differ.
    """
    path = Path(params.warm_start)
    initial = load(path)
    theirs = {**initial.network.model_dump(), **initial.observation.model_dump()}
    free = {"frame_skip", "ortho_init", "log_std_init"}  # they change no weight's shape or meaning
    wrong = [key for key in theirs if key not in free and theirs[key] != getattr(params, key)]
    if wrong:
        differences = "; ".join(f"{key}: expected {theirs[key]}, got {getattr(params, key)}" for key in wrong)
        raise PolicyError(f"warm_start: {path} was trained with other parameters: {differences}")
    asked = (params.privileged_critic, params.state_coef > 0)
    return _without(initial.weights, *(helper for helper, is_asked in zip(HELPERS, asked, strict=True) if not is_asked))


def without_aliases(weights: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    """SB3 lists the shared features extractor three times; keep it once."""
    return _without(weights, "pi_features_extractor.", "vf_features_extractor.")


def driving(weights: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    """The weights that drive, and the picture's critic: all but what only a training asks."""
    return _without(weights, *HELPERS)


def _without(weights: dict[str, th.Tensor], *prefixes: str) -> dict[str, th.Tensor]:
    return {name: weight for name, weight in weights.items() if not name.startswith(prefixes)}


def _shape(tensors: dict[str, th.Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(tensors[key].shape) if key in tensors else None


def spaces_of(observation: ObservationParams) -> tuple[spaces.Box, spaces.Box]:
    """The network's observation and action space."""
    channels = observation.frames_stack * (1 if observation.grayscale else 3)
    size = observation.resize
    low = [-1, -1] if observation.action_axes == "steer_throttle" else [-1, 0, 0]
    return (
        spaces.Box(0, 255, (channels, size, size), np.uint8),
        spaces.Box(np.array(low, np.float32), np.ones(len(low), np.float32)),
    )


def build_network(observation: ObservationParams, network: NetworkParams) -> DrivingNetwork:
    """A fresh float32 network on the CPU."""
    observation_space, action_space = spaces_of(observation)
    return DrivingNetwork(observation_space, action_space, lambda _: 0.0, **network_kwargs(network))


def save(
    path: Path,
    module: DrivingNetwork,
    params: ObservationParams,
    network: NetworkParams,
    steps: int,
    dtype: th.dtype = th.float32,
) -> None:
    """Write a policy file, its weights rounded to ``dtype``; the same weights give the same bytes."""
    header = {
        "format": FORMAT_VERSION,
        "observation": _only(ObservationParams, params),
        "network": _only(NetworkParams, network),
        "info": {"agent_steps": steps, "gymnasium": gym.__version__},
    }
    weights = {k: v.detach().cpu().to(dtype).contiguous() for k, v in without_aliases(module.state_dict()).items()}
    durable.publish(path, dump(weights, metadata={HEADER_KEY: json.dumps(header, sort_keys=True)}))


def _only(kind: type[ObservationParams] | type[NetworkParams], params: Any) -> dict[str, Any]:
    return {key: getattr(params, key) for key in kind.model_fields}


def load(path: Path, observation: ObservationParams | None = None) -> Policy:
    """Read a policy: ours, or an SB3 zip, for which ``observation`` says what it was trained to see.

    Raises:
        PolicyError: The file is missing, damaged, of another format, or does not fit the observation.
    """
    if not path.is_file():
        raise PolicyError(f"{path}: no such file; train one with `python -m pipeline.train`")
    try:
        if path.suffix == ".zip":
            return _load_sb3_zip(path, observation)
        return _load_safetensors(path)
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from None


def _load_safetensors(path: Path) -> Policy:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = json.loads(metadata[HEADER_KEY])
        if header["format"] != FORMAT_VERSION:
            raise PolicyError(f"format {header['format']}; this version reads format {FORMAT_VERSION}")
        observation, network = ObservationParams(**header["observation"]), NetworkParams(**header["network"])
        return Policy(weights, observation, network, dict(header["info"]))
    except (SafetensorError, OSError) as error:
        raise PolicyError(f"not a policy file, or damaged ({error})") from None
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise PolicyError(
            f"no valid {HEADER_KEY} header ({type(error).__name__}); was it saved by this project?"
        ) from None


# Third-party policies: SB3 zips of CnnPolicy. Weights are read with torch's weights-only loader; the pickles inside
# `data` are never loaded, so the network's shape is read off the weights.


def _load_sb3_zip(path: Path, observation: ObservationParams | None) -> Policy:
    if observation is None:
        raise PolicyError("an SB3 zip does not say what it was trained to see; give the observation parameters")
    try:
        with zipfile.ZipFile(path) as archive:
            weights = th.load(io.BytesIO(_member(archive, "policy.pth")), map_location="cpu", weights_only=True)
            description = _member(archive, "data").decode()
    except PolicyError:
        raise
    except Exception as error:  # zipfile and torch raise a dozen types for damaged and for hostile files
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise PolicyError(f"not a readable SB3 zip ({reason})") from None
    if not isinstance(weights, dict) or not all(isinstance(w, th.Tensor) for w in weights.values()):
        raise PolicyError("policy.pth holds something else than a network's weights")
    network = _infer_network(weights, description)
    return Policy(without_aliases(weights), observation, network, {"source": "stable-baselines3 zip"})


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise PolicyError(f"no {name} inside; is it a model saved by stable-baselines3?") from None
    if info.file_size > MAX_ZIP_MEMBER:
        raise PolicyError(f"{name} unpacks to {info.file_size:,} bytes; at most {MAX_ZIP_MEMBER:,} are accepted")
    return archive.read(info)


def _infer_network(weights: dict[str, th.Tensor], description: str) -> NetworkParams:
    try:
        log_std = weights["log_std"]
        hidden = [k for k in sorted(weights) if re.match(r"mlp_extractor\.policy_net.*weight", k)]
        activation = re.search(r"torch\.nn\.modules\.activation\.(ReLU|GELU|Tanh)", description)
        return NetworkParams(
            cnn_channels=[int(weights[f"features_extractor.cnn.{i}.weight"].shape[0]) for i in (0, 2, 4)],
            features_dim=int(weights["features_extractor.linear.0.weight"].shape[0]),
            net_arch=[int(weights[k].shape[0]) for k in hidden],
            activation=activation.group(1).lower() if activation else "tanh",  # type: ignore[arg-type]
            ortho_init=False,
            action_head="gsde" if log_std.ndim == 2 else "gaussian",
            log_std_init=0.0,
        )
    except KeyError as error:
        raise PolicyError(f"not a CnnPolicy with continuous actions: {error} is missing") from None
    except (IndexError, ValidationError) as error:
        reason = (
            ", ".join(str(e["loc"][0]) for e in error.errors()) if isinstance(error, ValidationError) else "a scalar"
        )
        raise PolicyError(f"not a CnnPolicy of a size that is read here ({reason})") from None
