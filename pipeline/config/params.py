"""The parameters: one class per stage, each key with its type, range and meaning. Defaults: ``params.yaml``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

FIRST_TRAINING_TRACK = 1_000_000
"""Training tracks have seeds from here on, so validation and test tracks below can never be among them."""

PACKAGE = Path(__file__).parent.parent
LEARNING_CODE = ("agent/*.py", "config/*.py", "sim/*.py", "evaluation.py", "session.py", "train.py")
"""Code that decides which policy comes out."""
WITHOUT_EFFECT = {"n_workers"}
"""Keys that change no bit of the result."""
NOT_OF_THE_RECIPE = {*WITHOUT_EFFECT, "seed", "run_name", "log_root"}
"""Keys in which two trainings of the same recipe may differ."""


def _whole(value: object) -> object:
    """Read ``1e6`` as the integer it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _track_range(value: object) -> object:
    """Check ``"10000:10100"``: first track, and the one after the last."""
    if isinstance(value, str):
        first, _, stop = value.partition(":")
        if first.isdecimal() and stop.isdecimal() and 0 <= int(first) < int(stop) <= FIRST_TRAINING_TRACK:
            return value
    raise ValueError


def _spelled(pattern: str, meaning: str) -> FieldInfo:
    """Constrain a text by a pattern, with the words that errors and help use for it."""
    field: FieldInfo = Field(pattern=pattern, json_schema_extra={"meaning": meaning})
    return field


_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"

Int = Annotated[int, BeforeValidator(_whole)]
Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Device = Annotated[str, _spelled(r"^(auto|cpu|mps|cuda(:\d+)?)$", "auto, cpu, cuda, cuda:N or mps")]
Name = Annotated[str, _spelled(f"^{_NAME}$", "1 to 64 letters, digits, dots, dashes or underscores")]
FolderInProject = Annotated[
    str, _spelled(f"^{_NAME}(/{_NAME})*$", "a folder inside the project, as a relative path without '..'")
]
PolicyInProject = Annotated[
    str,
    _spelled(
        rf"^({_NAME}(/{_NAME})*\.safetensors)?$",
        "a policy file inside the project, as a relative path without '..', or ''",
    ),
]
TrackRange = Annotated[
    str,
    BeforeValidator(_track_range),
    Field(
        json_schema_extra={
            "meaning": f"first:stop below {FIRST_TRAINING_TRACK}, such as 10000:10100",
            "pattern": r"^\d+:\d+$",
        }
    ),
]


class Params(BaseModel):
    """What all parameter classes share: strict types, no unknown keys, no NaN, immutable."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    def fingerprint(self) -> str:
        """Eight hex digits that name these values and the code that learns from them: equal only if both are."""
        sha = hashlib.sha256(self.model_dump_json(exclude=WITHOUT_EFFECT).encode())
        if policy := getattr(self, "warm_start", ""):
            sha.update(Path(policy).read_bytes())
        for path in sorted(p for pattern in LEARNING_CODE for p in PACKAGE.glob(pattern)):
            sha.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
        return sha.hexdigest()[:8]


class ObservationParams(Params):
    """What the network sees and does per decision; travels inside every saved policy."""

    frame_skip: Int = Field(ge=1, le=16, description="physics frames (1/50 s) per decision; the action is held")
    frames_stack: Int = Field(ge=1, le=16, description="pictures the network sees at once, one per decision")
    grayscale: bool = Field(description="gray pictures (1 channel) instead of RGB (3 channels)")
    resize: Int = Field(ge=36, le=96, description="side of the picture the network sees [pixels]; 96 = unscaled")
    action_axes: Literal["steer_throttle", "steer_gas_brake"] = Field(
        description="2 axes (gas and brake share one) or CarRacing's own 3"
    )


class NetworkParams(Params):
    """Shape of the network; travels inside every saved policy."""

    cnn_channels: list[Annotated[int, Field(ge=1, le=512), BeforeValidator(_whole)]] = Field(
        min_length=3, max_length=3, description="channels of the 8x8/4, 4x4/2 and 3x3/1 convolutions"
    )
    features_dim: Int = Field(ge=8, le=4096, description="width of the layer after the convolutions")
    net_arch: list[Annotated[int, Field(ge=1, le=4096), BeforeValidator(_whole)]] = Field(
        max_length=4, description="hidden layers of policy and of value after the features; [] = none"
    )
    activation: Literal["relu", "gelu", "tanh"] = Field(description="activation of the hidden layers in net_arch")
    ortho_init: bool = Field(description="orthogonal initial weights")
    action_head: Literal["beta", "gaussian", "gsde"] = Field(description="distribution of the actions")
    log_std_init: float = Field(ge=-10, le=2, description="initial log of the standard deviation of each action")


class TrainParams(ObservationParams, NetworkParams):
    """Stage ``train``: everything that decides which policy comes out."""

    run_name: Name = Field(description="name of the run in MLflow and of its folder")
    log_root: FolderInProject = Field(description="folder of the run folders: log, curves, checkpoints")
    env_id: Literal["CarRacing-v3", "FastCarRacing-v3"] = Field(
        description="training picture: Gymnasium's own or our fast copy; scores are always on CarRacing-v3"
    )
    seed: Int = Field(ge=0, le=2**31 - 1, description="seed of weights, actions and training tracks")
    warm_start: PolicyInProject = Field(
        description="policy file whose weights the training begins with; '' = random weights"
    )
    n_envs: Int = Field(ge=1, le=1024, description="environments stepped side by side")
    n_workers: Int = Field(
        ge=0, le=256, description="worker processes that share the environments; 0 = all cores (result is the same)"
    )
    num_threads: Int = Field(ge=0, le=256, description="torch threads; 0 = all cores (changes the last bits)")
    device: Device = Field(description="where the network learns")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        description="number format of the convolutions; auto = bf16 where the hardware is fast at it"
    )
    throttle_init: float = Field(
        ge=-0.9, le=0.9, description="mean throttle, or gas, of an untrained policy; wide noise limits it"
    )
    total_timesteps: Int = Field(ge=1, le=10**10, description="decisions to learn from [agent steps over all envs]")
    learning_rate: Positive = Field(le=1, description="Adam's step size at the start")
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = Field(
        description="how the learning rate falls to 0 over the training, if at all"
    )
    n_steps: Int = Field(ge=2, le=65536, description="decisions per environment between updates")
    batch_size: Int = Field(ge=2, le=1_048_576, description="samples per gradient step")
    n_epochs: Int = Field(ge=1, le=100, description="passes over each rollout")
    gamma: Probability = Field(description="discount per decision")
    gae_lambda: Probability = Field(description="GAE's bias-variance factor")
    clip_range: Positive = Field(le=1, description="PPO's clip of the probability ratio")
    target_kl: float = Field(
        ge=0, le=10, description="an update stops at a minibatch whose KL is over 1.5 times this [nats]; 0 = no limit"
    )
    desired_kl: float = Field(
        ge=0,
        le=10,
        description="learning rate sinks below its schedule while the KL is over 1.5 times this [nats]; 0 = never",
    )
    ent_coef: float = Field(ge=0, le=1, description="weight of the entropy bonus")
    privileged_critic: bool = Field(
        description="advantages from a critic that reads the simulator's state; the policy sees pictures alone"
    )
    state_coef: float = Field(
        ge=0,
        le=1000,
        description="weight of the loss by which features learn to tell the simulator's visible state",
    )
    vf_coef: float = Field(ge=0, le=10, description="weight of the value loss")
    max_grad_norm: Positive = Field(le=1000, description="gradient norm is clipped to this")
    reward_clip: float = Field(ge=0, le=1000, description="training reward is clipped to +- this; 0 = not clipped")
    normalize_reward: bool = Field(description="divide the training reward by the running std of the return")
    sde_sample_freq: Int = Field(ge=-1, le=1000, description="decisions between new noise (gsde); -1 = once a rollout")
    grass_penalty: float = Field(ge=0, le=10, description="reward lost per world unit driven with all wheels on grass")
    grass_limit: Int = Field(
        ge=0, le=1000, description="episode ends after so many frames with 3 wheels off; 0 = never"
    )
    stall_limit: Int = Field(ge=0, le=1000, description="episode ends after so many frames without a tile; 0 = never")
    early_end_penalty: float = Field(ge=0, le=1000, description="reward lost when an episode is ended by a limit above")
    missed_tile_penalty: float = Field(
        ge=0, le=1000, description="reward lost when a road tile is left behind unvisited"
    )
    bootstrap_lap: bool = Field(
        description="the end of a lap is bootstrapped like a time limit (the car can't see it), not an end worth 0"
    )
    reverse_laps: Probability = Field(description="share of training episodes that drive the lap the other way round")
    retries: Int = Field(
        ge=0, le=20, description="more tries at the road before a missed tile or where the car was lost; 0 = none"
    )
    time_penalty: float = Field(ge=0, le=10, description="extra reward lost per frame, on top of the game's 0.1")
    steer_penalty: float = Field(ge=0, le=10, description="reward lost per decision per squared change of steering")
    eval_freq: Int = Field(ge=0, le=10**10, description="agent steps between validations; 0 = only at the end")
    n_eval_episodes: Int = Field(ge=1, le=1000, description="validation tracks, the same ones each time")
    validation_seed: Int = Field(ge=0, lt=FIRST_TRAINING_TRACK, description="first validation track")
    save_freq: Int = Field(ge=0, le=10**10, description="agent steps between checkpoints; 0 = only at the end")


class TestTrackParams(Params):
    """The held-out tracks and how surely they tell; scores that are compared share them."""

    tracks: TrackRange = Field(description="held-out test tracks, first:stop")
    bootstrap_samples: Int = Field(ge=100, le=1_000_000, description="resamples behind 95% intervals and p-values")


class EvaluateParams(TestTrackParams, ObservationParams):
    """Stage ``evaluate``. The observation keys serve third-party policies, which carry none."""


class RecordParams(Params):
    """Stage ``record-videos``."""

    video_tracks: list[Literal["best", "median", "worst"]] = Field(
        min_length=1, max_length=3, description="evaluated tracks to film, by their rank"
    )
    video_fps: Int = Field(ge=10, le=100, description="frames per second of the film; 50 is real time")
    gif_seconds: Int = Field(ge=1, le=60, description="length of the GIF made for `dvc plots` [s]")


class PromoteParams(TestTrackParams):
    """Command ``promote``: champion and challenger drive the held-out tracks."""

    registered_model: Name = Field(description="name in MLflow's model registry")
    promote_alpha: float = Field(gt=0, lt=0.5, description="largest p-value at which a challenger counts as better")


STAGES: tuple[type[Params], ...] = (TrainParams, EvaluateParams, RecordParams, PromoteParams)


def recipe(values: Mapping[str, Any]) -> dict[str, str]:
    """What a policy was trained with but for the seed: two trainings are of one recipe if these are equal.

    Args:
        values: Parameters as in ``params.yaml`` or, as texts, in MLflow; those of other stages are left out.
    """
    others = {key for stage in STAGES for key in stage.model_fields} - TrainParams.model_fields.keys()
    return {key: _plain(value) for key, value in sorted(values.items()) if key not in others | NOT_OF_THE_RECIPE}


def _plain(value: Any) -> str:
    """The same text for ``10``, ``10.0`` and ``"10.0"``."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return str(value)
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def all_fields(stages: tuple[type[Params], ...] = STAGES) -> dict[str, FieldInfo]:
    """Every known key, in the order of the classes."""
    return {name: field for stage in stages for name, field in stage.model_fields.items()}


def track_bounds(tracks: str) -> tuple[int, int]:
    """``"10000:10100"`` as first track and stop."""
    first, _, stop = tracks.partition(":")
    return int(first), int(stop)


def track_list(tracks: str) -> list[int]:
    """``"10000:10100"`` as a list of track seeds."""
    return list(range(*track_bounds(tracks)))
