"""Policy files: exact, self-describing, and harmless whatever is inside."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from stable_baselines3 import PPO

from pipeline.agent import policy as policies
from pipeline.agent.build import build_model
from pipeline.agent.policy import Policy, PolicyError, build_network, load, save
from pipeline.config import NetworkParams, ObservationParams, TrainParams
from pipeline.config import load as load_params
from pipeline.sim.env import to_pedals
from pipeline.sim.training_env import make_training_env
from pipeline.sim.vec_env import SharedMemoryVecEnv

OBSERVATION = ObservationParams(frame_skip=4, frames_stack=2, grayscale=False, resize=48, action_axes="steer_throttle")
NETWORK = NetworkParams(
    cnn_channels=[4, 8, 8], features_dim=16, net_arch=[12], activation="gelu", ortho_init=True, action_head="beta",
    log_std_init=0.0,
)  # fmt: skip


def pictures(channels: int = 6, size: int = 48, n: int = 5) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (n, channels, size, size), np.uint8)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    th.manual_seed(0)
    path = tmp_path / "a.safetensors"
    save(path, build_network(OBSERVATION, NETWORK), OBSERVATION, NETWORK, steps=1234)
    return path


# Ours


@pytest.mark.parametrize("head", ["beta", "gaussian", "gsde"])
def test_what_is_loaded_acts_as_what_was_saved(head: str, tmp_path: Path) -> None:
    network = NETWORK.model_copy(update={"action_head": head})
    module = build_network(OBSERVATION, network)
    with th.no_grad():
        for weights in module.parameters():  # far from their initial values, so that no forgotten tensor goes unseen
            weights.add_(th.randn_like(weights) * 0.1)
        actions, values, _ = module(th.from_numpy(pictures()), deterministic=True)
    save(tmp_path / "a.safetensors", module, OBSERVATION, network, 1)
    loaded = load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(loaded.predict_axes(pictures()), np.clip(actions.numpy(), -1, 1))
    np.testing.assert_array_equal(loaded.value(pictures()), values[:, 0])


def test_a_throttle_axis_presses_the_mean_of_each_pedal(tmp_path: Path) -> None:
    module = build_network(OBSERVATION, NETWORK)
    with th.no_grad():
        for weights in module.parameters():
            weights.add_(th.randn_like(weights) * 0.1)
    save(tmp_path / "a.safetensors", module, OBSERVATION, NETWORK, 1)
    with th.no_grad():
        head = module.get_distribution(th.from_numpy(pictures()))
        sampled = to_pedals(np.stack([head.sample().numpy() for _ in range(20_000)]))  # what a training would press
    got = load(tmp_path / "a.safetensors").predict(pictures())
    assert (got[:, 1:] > 0.02).all(), "unsure between gas and brake"
    np.testing.assert_allclose(got, sampled.mean(axis=0), atol=0.02)


def test_a_gaussian_throttle_presses_the_pedal_of_its_mean(tmp_path: Path) -> None:
    network = NETWORK.model_copy(update={"action_head": "gaussian"})
    save(tmp_path / "a.safetensors", build_network(OBSERVATION, network), OBSERVATION, network, 1)
    loaded = load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(loaded.predict(pictures()), to_pedals(loaded.predict_axes(pictures())))


def train_params(warm_start: Path, **changes: object) -> TrainParams:
    described = {**OBSERVATION.model_dump(), **NETWORK.model_dump(), **changes}
    return load_params(TrainParams, **described).model_copy(update={"warm_start": str(warm_start)})


def test_a_warm_start_takes_over_the_weights_whatever_the_frame_skip(saved: Path) -> None:
    params = train_params(saved, frame_skip=2)
    with closing(SharedMemoryVecEnv([partial(make_training_env, params, 0)], n_workers=0)) as env:
        model = build_model(params, env)
        policies.load_weights(model.policy, policies.warm_start(params))
        expected = load(saved).module.state_dict()
        taken = policies.driving(model.policy.state_dict())
        assert len(taken) == len(expected)
        assert all(th.equal(weights, expected[name]) for name, weights in taken.items())
        assert model.num_timesteps == 0
        assert not model.policy.optimizer.state


@pytest.mark.parametrize("helper", ["state_critic", "state_head"])
def test_a_warm_start_takes_over_what_only_the_training_asks(saved: Path, helper: str) -> None:
    params = train_params(saved)
    with closing(SharedMemoryVecEnv([partial(make_training_env, params, 0)], n_workers=0)) as env:
        trained, fresh = build_model(params, env).policy, build_model(params, env).policy
        name = next(name for name in trained.state_dict() if name.startswith(helper))
        th.nn.init.uniform_(trained.state_dict()[name])
        save(saved, trained, params, params, steps=5)
        policies.load_weights(fresh, policies.warm_start(params))
    assert th.equal(fresh.state_dict()[name], trained.state_dict()[name])
    assert not any(helper in name for name in load(saved).module.state_dict()), "nobody asks it who plays"


def test_a_warm_start_begins_afresh_with_what_the_file_lacks(saved: Path) -> None:
    """A policy of a training that had the critic and not the head, as they all were once."""
    params = train_params(saved)
    with closing(SharedMemoryVecEnv([partial(make_training_env, params, 0)], n_workers=0)) as env:
        trained, fresh = build_model(params, env).policy, build_model(params, env).policy
        initial = fresh.state_head.weight.clone()
        older = {name: w + 1 for name, w in trained.state_dict().items() if not name.startswith("state_head.")}
        policies.load_weights(fresh, policies.without_aliases(older))
    assert th.equal(fresh.state_head.weight, initial)
    assert th.equal(fresh.state_critic[0].weight, trained.state_critic[0].weight + 1)


def test_a_warm_start_from_another_network_names_every_difference(saved: Path) -> None:
    with pytest.raises(PolicyError) as told:
        policies.warm_start(train_params(saved, features_dim=32, resize=64, action_head="gaussian"))
    for words in ("features_dim: expected 16, got 32", "resize: expected 48, got 64", "expected beta, got gaussian"):
        assert words in str(told.value)


def test_the_fingerprint_follows_the_warm_start(saved: Path) -> None:
    params = train_params(saved)
    before = params.fingerprint()
    save(saved, build_network(OBSERVATION, NETWORK), OBSERVATION, NETWORK, steps=5)  # the same name, other weights
    assert params.fingerprint() != before


def test_the_same_weights_give_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    loaded = load(saved)
    save(tmp_path / "b.safetensors", loaded.module, loaded.observation, loaded.network, 1234)
    assert (tmp_path / "b.safetensors").read_bytes() == saved.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_the_header_says_what_the_network_sees(saved: Path) -> None:
    with safe_open(saved, framework="np") as file:
        header = json.loads(file.metadata()["carracing-policy"])
    assert header["observation"] == {
        "frame_skip": 4, "frames_stack": 2, "grayscale": False, "resize": 48, "action_axes": "steer_throttle",
    }  # fmt: skip
    assert header["network"]["cnn_channels"] == [4, 8, 8]
    assert header["info"] == {"agent_steps": 1234, "gymnasium": gym.__version__}
    assert (load(saved).observation, load(saved).network) == (OBSERVATION, NETWORK)


# Damaged, foreign, hostile


class Executed:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def refused(path: Path, observation: ObservationParams | None = None) -> str:
    with pytest.raises(PolicyError) as caught:
        load(path, observation)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def with_header(path: Path, change: dict[str, Any]) -> Path:
    """The file again with a changed header."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["carracing-policy"]) | change
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(weights, path, metadata={"carracing-policy": json.dumps(header)})
    return path


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    assert refused(tmp_path / "a.safetensors") == "no such file; train one with `python -m pipeline.train`"


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_files_are_refused(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    assert refused(saved).startswith("not a policy file, or damaged (")


def test_a_pickle_in_disguise_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps(Executed(tmp_path / "executed")))
    assert refused(path).startswith("not a policy file, or damaged (")
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")  # a header longer than any memory
    assert refused(path).startswith("not a policy file, or damaged (")
    assert not (tmp_path / "executed").exists()


def test_tensors_without_our_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": th.zeros(1)}, path)
    assert "no valid carracing-policy header" in refused(path)
    save_file({"a": th.zeros(1)}, path, metadata={"carracing-policy": "[1, 2]"})
    assert "no valid carracing-policy header" in refused(path)


def test_another_format_is_named(saved: Path) -> None:
    assert refused(with_header(saved, {"format": 99})) == "format 99; this version reads format 1"


def test_an_impossible_header_is_refused_before_anything_is_built(saved: Path) -> None:
    huge = {**NETWORK.model_dump(), "features_dim": 10**12}
    assert "no valid carracing-policy header" in refused(with_header(saved, {"network": huge}))


def test_weights_that_do_not_fit_the_header_are_named_with_both_shapes(saved: Path) -> None:
    other = {**NETWORK.model_dump(), "features_dim": 20}
    assert refused(with_header(saved, {"network": other})) == (
        "weights features_extractor.linear.0.bias: expected shape (20,), got (16,)"
    )
    lacking = build_network(OBSERVATION, NETWORK).state_dict()
    lacking.pop("value_net.bias")
    with pytest.raises(PolicyError, match=r"weights value_net.bias: expected shape \(1,\), got None"):
        Policy(policies.without_aliases(lacking), OBSERVATION, NETWORK, {})


# Zips of stable-baselines3

ZIP_OBSERVATION = ObservationParams(
    frame_skip=2, frames_stack=4, grayscale=True, resize=84, action_axes="steer_gas_brake"
)


class Still(gym.Env[Any, Any]):
    """The spaces of a common SB3 set-up for CarRacing: 84x84, four gray frames."""

    observation_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = spaces.Box(np.array([-1, 0, 0], np.float32), np.ones(3, np.float32))

    def reset(self, **kwargs: Any) -> Any:
        return self.observation_space.sample(), {}


@pytest.fixture(scope="module", params=["gaussian", "gsde"])
def sb3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PPO, Path]:
    kwargs = {"net_arch": [24], "activation_fn": th.nn.GELU} if request.param == "gsde" else {}
    model = PPO(
        "CnnPolicy", Still(), n_steps=8, batch_size=8, use_sde=request.param == "gsde", policy_kwargs=kwargs, seed=0
    )
    with th.no_grad():
        for weights in model.policy.parameters():
            weights.add_(th.randn_like(weights) * 0.02)
    path = tmp_path_factory.mktemp("sb3") / "model.zip"
    model.save(path)
    return model, path


def test_an_sb3_zip_acts_as_in_sb3(sb3: tuple[PPO, Path]) -> None:
    model, path = sb3
    expected, _ = model.predict(pictures(4, 84), deterministic=True)
    np.testing.assert_allclose(load(path, ZIP_OBSERVATION).predict(pictures(4, 84)), expected, rtol=1e-4, atol=1e-5)


def test_an_sb3_zip_that_sees_something_else_is_refused(sb3: tuple[PPO, Path]) -> None:
    _, path = sb3
    three_frames = ZIP_OBSERVATION.model_copy(update={"frames_stack": 3})
    assert refused(path, three_frames) == (
        "weights features_extractor.cnn.0.weight: expected shape (32, 3, 8, 8), got (32, 4, 8, 8); "
        "are frames_stack and grayscale those it was trained with?"
    )
    small = ZIP_OBSERVATION.model_copy(update={"resize": 64})
    assert refused(path, small).endswith("(512, 1024), got (512, 3136); is resize the one it was trained with?")
    two_axes = ZIP_OBSERVATION.model_copy(update={"action_axes": "steer_throttle"})
    assert refused(path, two_axes).endswith("(2,), got (3,); is action_axes the one it was trained with?")
    assert "give the observation parameters" in refused(path)


def rezipped(source: Path, target: Path, **members: bytes | None) -> Path:
    """A copy of a zip with some members replaced, or left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        content = {name: old.read(name) for name in old.namelist()} | {
            {"policy": "policy.pth", "data": "data"}[key]: value for key, value in members.items()
        }
        for name, value in content.items():
            if value is not None:
                new.writestr(name, value)
    return target


def test_code_in_a_zip_is_not_run(sb3: tuple[PPO, Path], tmp_path: Path) -> None:
    _, path = sb3
    mark = tmp_path / "executed"
    th.save({"log_std": Executed(mark)}, tmp_path / "hostile.pth")
    for number, weights in enumerate([(tmp_path / "hostile.pth").read_bytes(), pickle.dumps(Executed(mark))]):
        message = refused(rezipped(path, tmp_path / f"{number}.zip", policy=weights), ZIP_OBSERVATION)
        assert message.startswith("not a readable SB3 zip (")
    # SB3 itself unpickles what `data` holds; here that is text to search, whatever it says
    hostile = json.dumps({"policy_class": {":serialized:": pickle.dumps(Executed(mark)).hex()}}).encode()
    load(rezipped(path, tmp_path / "data.zip", data=hostile), ZIP_OBSERVATION)
    assert not mark.exists()


def test_a_zip_bomb_is_refused_unopened(sb3: tuple[PPO, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = sb3
    monkeypatch.setattr(policies, "MAX_ZIP_MEMBER", 1_000_000)
    bomb = rezipped(path, tmp_path / "bomb.zip", policy=bytes(50_000_000))
    assert bomb.stat().st_size < 1_000_000
    assert refused(bomb, ZIP_OBSERVATION) == "policy.pth unpacks to 50,000,000 bytes; at most 1,000,000 are accepted"


def test_other_zips_are_refused(sb3: tuple[PPO, Path], tmp_path: Path) -> None:
    _, path = sb3
    no_weights = rezipped(path, tmp_path / "a.zip", policy=None)
    assert "no policy.pth inside; is it a model saved by stable-baselines3?" in refused(no_weights, ZIP_OBSERVATION)
    (tmp_path / "b.zip").write_bytes(path.read_bytes()[:1000])
    assert refused(tmp_path / "b.zip", ZIP_OBSERVATION).startswith("not a readable SB3 zip (")
    (tmp_path / "c.zip").write_bytes(b"")
    assert refused(tmp_path / "c.zip", ZIP_OBSERVATION).startswith("not a readable SB3 zip (")
    th.save({"log_std": th.zeros(3)}, tmp_path / "mlp.pth")
    mlp = rezipped(path, tmp_path / "d.zip", policy=(tmp_path / "mlp.pth").read_bytes())
    assert "not a CnnPolicy with continuous actions" in refused(mlp, ZIP_OBSERVATION)
    th.save([1, 2, 3], tmp_path / "list.pth")
    lists = rezipped(path, tmp_path / "e.zip", policy=(tmp_path / "list.pth").read_bytes())
    assert "policy.pth holds something else than a network's weights" in refused(lists, ZIP_OBSERVATION)
    huge = {"log_std": th.zeros(3), "features_extractor.linear.0.weight": th.zeros(9999, 1)}
    th.save(huge | {f"features_extractor.cnn.{i}.weight": th.zeros(2, 1) for i in (0, 2, 4)}, tmp_path / "odd.pth")
    odd = rezipped(path, tmp_path / "f.zip", policy=(tmp_path / "odd.pth").read_bytes())
    assert "features_dim" in refused(odd, ZIP_OBSERVATION)
