"""The rollout and the update against SB3's own, against the environments driven by hand, and against formulas."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from pipeline.agent import ppo
from pipeline.agent.build import build_model, schedule
from pipeline.agent.ppo import DrivingPPO
from pipeline.agent.reward import RewardScaler
from pipeline.config import TrainParams, load
from pipeline.sim.driving_state import KEY, VISIBLE
from pipeline.sim.training_env import make_training_env
from pipeline.sim.vec_env import SharedMemoryVecEnv

N_ENVS, N_STEPS = 3, 80  # odd, so that the groups differ; 16 frames a decision reach the time limit after 63 decisions


def parameters(**changes: object) -> TrainParams:
    small = {"n_envs": N_ENVS, "n_steps": N_STEPS, "batch_size": N_ENVS * N_STEPS, "n_epochs": 2, "num_threads": 1}
    game = {
        "frame_skip": 16,
        "grass_limit": 0,
        "stall_limit": 0,
        "resize": 36,
        "precision": "fp32",
        "device": "cpu",
        "privileged_critic": False,
        "state_coef": 0.0,
        "desired_kl": 0.0,
    }
    return load(TrainParams, **{**small, **game, "total_timesteps": 1000, **changes})


def build(params: TrainParams) -> DrivingPPO:
    envs = [partial(make_training_env, params, index) for index in range(params.n_envs)]
    model = build_model(params, SharedMemoryVecEnv(envs, n_workers=0))
    model.set_logger(Logger(None, []))
    return model


@pytest.fixture(scope="module")
def rolled_out() -> Iterator[DrivingPPO]:
    """A model with a filled buffer, not updated yet."""
    model = build(parameters())
    _, callback = model._setup_learn(N_ENVS * N_STEPS, CallbackList([]))
    model.collect_rollouts(model.env, callback, model.rollout_buffer, N_STEPS)
    model._update_current_progress_remaining(0, 1)
    yield model
    model.env.close()


def test_initial_weights_are_the_same_whatever_the_threads() -> None:
    threads, weights = th.get_num_threads(), []
    for number in (1, 2):
        th.set_num_threads(number)
        model = build(parameters(features_dim=512, resize=84))
        weights.append(model.policy.state_dict())
        model.env.close()
    th.set_num_threads(threads)
    assert all(th.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("action_axes", ["steer_throttle", "steer_gas_brake"])
def test_the_first_actions_are_the_parameters(action_axes: str) -> None:
    model = build(parameters(action_axes=action_axes, throttle_init=0.3, log_std_init=-1.5))
    pictures = th.randint(0, 256, (32, *model.observation_space.shape), dtype=th.uint8)
    head = model.policy.get_distribution(pictures)
    model.env.close()
    expected = [0, 0.3] if action_axes == "steer_throttle" else [0, 0.3, 0]
    np.testing.assert_allclose(head.mode().detach(), np.tile(expected, (32, 1)), atol=0.03)
    np.testing.assert_allclose(2 * head.beta.stddev.detach(), np.exp(-1.5), atol=0.02)


def driven_by_hand(
    model: DrivingPPO, index: int
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """The buffer's actions in a fresh environment: observations, rewards, ends, last pictures at the time limit."""
    env = make_training_env(parameters(), index)
    observation, _ = env.reset()
    observations, rewards, dones, cut = [], np.zeros(N_STEPS, np.float32), np.zeros(N_STEPS, bool), {}
    for step in range(N_STEPS):
        observations.append(observation)
        observation, rewards[step], terminated, truncated, _ = env.step(model.rollout_buffer.actions[step, index])
        dones[step] = terminated or truncated
        if truncated:
            cut[step] = observation
        if dones[step]:
            observation, _ = env.reset()
    return observations, rewards, dones, cut


def test_rollout_is_what_the_environments_say(rolled_out: DrivingPPO) -> None:
    buffer = rolled_out.rollout_buffer
    drives = [driven_by_hand(rolled_out, index) for index in range(N_ENVS)]
    rewards, dones = (np.stack([drive[k] for drive in drives], axis=1) for k in (1, 2))
    expected = scaled_by_vec_normalize(rewards, dones)
    for index, (_, _, _, cut) in enumerate(drives):
        for step, picture in cut.items():  # the time limit is no end of the game: its value goes on
            with th.no_grad():
                value = rolled_out.policy.predict_values(th.from_numpy(picture[None])).item()
            expected[step, index] += rolled_out.gamma * value
    assert sum(len(drive[3]) for drive in drives) >= 1, "the test needs a drive that the time limit cuts"
    for index, drive in enumerate(drives):
        np.testing.assert_array_equal(buffer.observations[:, index], np.stack(drive[0]))
    np.testing.assert_array_equal(buffer.episode_starts[1:], dones[:-1])
    np.testing.assert_array_equal(buffer.episode_starts[0], 1)
    np.testing.assert_allclose(buffer.rewards, expected, rtol=1e-5, atol=1e-6)


def scaled_by_vec_normalize(rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
    params = parameters()
    env = DummyVecEnv([partial(make_training_env, params, index) for index in range(N_ENVS)])
    normalizer = VecNormalize(env, norm_obs=False, clip_reward=params.reward_clip, gamma=params.gamma)
    scaled = []
    for reward, done in zip(rewards, dones, strict=True):
        normalizer._update_reward(reward)
        scaled.append(normalizer.normalize_reward(reward))
        normalizer.returns[done] = 0
    env.close()
    return np.stack(scaled)


def test_values_and_probabilities_are_the_policys(rolled_out: DrivingPPO) -> None:
    buffer = rolled_out.rollout_buffer
    flat = th.from_numpy(buffer.observations.reshape(-1, *buffer.obs_shape))
    with th.no_grad():
        values, log_probs, _ = rolled_out.policy.evaluate_actions(flat, th.from_numpy(buffer.actions.reshape(-1, 2)))
    np.testing.assert_allclose(buffer.values.ravel(), values.flatten(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(buffer.log_probs.ravel(), log_probs, rtol=1e-4, atol=1e-5)


def test_advantages_are_gae(rolled_out: DrivingPPO) -> None:
    """Schulman et al. 2016, equation 16, as the plain double sum over one environment."""
    with th.no_grad():
        last = rolled_out.policy.predict_values(th.from_numpy(rolled_out._last_obs)).flatten().numpy()
    assert_gae(rolled_out, last)


def assert_gae(model: DrivingPPO, last: np.ndarray) -> None:
    buffer, gamma, decay = model.rollout_buffer, model.gamma, model.gamma * model.gae_lambda
    values = np.vstack([buffer.values, last])
    alive = 1 - np.vstack([buffer.episode_starts, model._last_episode_starts])[1:]
    deltas = buffer.rewards + gamma * values[1:] * alive - values[:-1]
    for t in range(N_STEPS):
        total, weight = np.zeros(N_ENVS), np.ones(N_ENVS)
        for later in range(t, N_STEPS):
            total += weight * deltas[later]
            weight = weight * decay * alive[later]
        np.testing.assert_allclose(buffer.advantages[t], total, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("target_kl", "passes"), [(0.0, 2), (1e-7, 2), (10.0, 2)])
def test_update_is_stable_baselines3s(target_kl: float, passes: int) -> None:
    """One batch is the whole rollout, so shuffling decides nothing but the order of sums.

    With a tiny ``target_kl`` the second pass stops before its step: the first has moved the policy too far.
    """
    ours = build(parameters(target_kl=target_kl))
    _, callback = ours._setup_learn(N_ENVS * N_STEPS, CallbackList([]))
    ours.collect_rollouts(ours.env, callback, ours.rollout_buffer, N_STEPS)
    before = copy.deepcopy(ours.policy.state_dict())
    buffer = copy.deepcopy(ours.rollout_buffer)

    ours.train()
    assert ours._n_updates == passes
    assert ours.policy.optimizer.state[ours.policy.value_net.bias]["step"] == (1 if target_kl == 1e-7 else 2)
    by_us = copy.deepcopy(ours.policy.state_dict())
    ours.policy.load_state_dict(before)
    ours.policy.optimizer.state.clear()
    ours.rollout_buffer = buffer
    PPO.train(ours)
    ours.env.close()

    for name, theirs in ours.policy.state_dict().items():
        moved = (theirs - before[name]).abs().max()
        assert moved > 0, f"{name} was not trained"
        assert (by_us[name] - theirs).abs().max() < 0.02 * moved, name


@pytest.fixture(scope="module")
def privileged() -> Iterator[DrivingPPO]:
    """A model whose advantages come from the simulator's state, with a filled buffer, after a first rollout."""
    model = build(parameters(privileged_critic=True))
    _, callback = model._setup_learn(N_ENVS * N_STEPS, CallbackList([]))
    for _ in range(2):  # the second begins where the first ended
        model.collect_rollouts(model.env, callback, model.rollout_buffer, N_STEPS)
    model._update_current_progress_remaining(0, 1)
    yield model
    model.env.close()


def test_states_are_those_before_each_decision(privileged: DrivingPPO) -> None:
    model = build(parameters(privileged_critic=True))
    _, callback = model._setup_learn(N_ENVS * N_STEPS, CallbackList([]))
    model.collect_rollouts(model.env, callback, model.rollout_buffer, N_STEPS)
    model.env.close()
    for index in range(N_ENVS):
        env = make_training_env(parameters(privileged_critic=True), index)
        _, info = env.reset()
        for step in range(N_STEPS):
            np.testing.assert_array_equal(model.states[step, index], info[KEY])
            *_, terminated, truncated, info = env.step(model.rollout_buffer.actions[step, index])
            if terminated or truncated:
                _, info = env.reset()
        np.testing.assert_array_equal(model.states[-1, index], info[KEY])


def test_advantages_are_of_the_critic_that_reads_the_state(privileged: DrivingPPO) -> None:
    buffer = privileged.rollout_buffer
    with th.no_grad():
        values = privileged.policy.state_critic(th.from_numpy(privileged.states))[..., 0].numpy()
    np.testing.assert_allclose(buffer.values, values[:-1], rtol=1e-4, atol=1e-5)
    assert_gae(privileged, values[-1])


def updated(model: DrivingPPO) -> dict[str, th.Tensor]:
    """Weights after one update, which is then taken back."""
    before = copy.deepcopy(model.policy.state_dict())
    generator = model.generator.bit_generator.state
    model.train()
    after = copy.deepcopy(model.policy.state_dict())
    model.policy.load_state_dict(before)
    model.policy.optimizer.state.clear()
    model.generator.bit_generator.state = generator
    return after


def test_what_the_critics_learn_leaves_the_actor_alone(privileged: DrivingPPO) -> None:
    """Returns a thousand times as large move both critics, and no weight that an action depends on."""
    before = copy.deepcopy(privileged.policy.state_dict())
    first = updated(privileged)
    privileged.rollout_buffer.returns *= 1000
    second = updated(privileged)
    privileged.rollout_buffer.returns /= 1000
    critics = ("value_net.", "mlp_extractor.value_net.", "state_critic.")
    for name, weight in first.items():
        assert not th.equal(weight, before[name]), name
        assert th.equal(weight, second[name]) != name.startswith(critics), name


@pytest.mark.parametrize("privileged_critic", [True, False])
def test_features_learn_to_tell_the_state(privileged_critic: bool) -> None:
    """The loss is the mean squared error of what the head tells, and it falls; without it nothing tells anything."""
    network = {"cnn_channels": [32, 64, 64], "features_dim": 512}
    changes = {"privileged_critic": privileged_critic, "state_coef": 5.0, "n_epochs": 1, "learning_rate": 1e-3}
    model = build(parameters(**network, **changes))
    _, callback = model._setup_learn(N_ENVS * N_STEPS, CallbackList([]))
    model.collect_rollouts(model.env, callback, model.rollout_buffer, N_STEPS)
    model._update_current_progress_remaining(0, 1)
    told = []
    for _ in range(60):
        data = model._flat_rollout()
        with th.no_grad():
            head = model.policy.state_head(model.policy.extract_features(data.observations))
        told.append(float((head - data.states[:, VISIBLE]).square().mean()))
        model.train()
        assert model.logger.name_to_value["train/state_loss"] == pytest.approx(told[-1], rel=1e-4)
    model.env.close()
    assert told[-1] < 0.7 * told[0]
    assert not hasattr(build(parameters(privileged_critic=True)).policy, "state_head")


@pytest.mark.parametrize("n_envs", [2, 3, 4])
def test_every_environment_has_its_own_gsde_noise(n_envs: int) -> None:
    model = build(parameters(action_head="gsde", n_envs=n_envs, batch_size=n_envs * N_STEPS))
    model._resample_noise()
    picture = th.randint(0, 255, (1, *model.rollout_buffer.obs_shape), dtype=th.uint8)
    actions = []
    for rows in model.env.groups:
        model._use_noise_of(rows)
        with th.no_grad():
            actions += list(model.policy(picture.repeat(rows.stop - rows.start, 1, 1, 1))[0].numpy())
    model.env.close()
    assert len({tuple(action) for action in actions}) == n_envs


def test_scaler_without_normalisation_only_clips() -> None:
    scaler = RewardScaler(3, 0.99, normalize=False, clip=2.0)
    rewards = np.array([-5.0, 1.0, 7.0], np.float32)
    np.testing.assert_array_equal(scaler(rewards, np.zeros(3, bool)), [-2, 1, 2])
    np.testing.assert_array_equal(RewardScaler(3, 0.99, False, 0.0)(rewards, np.zeros(3, bool)), rewards)


def test_pictures_converted_once_teach_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, weights after an update are equal to the bit whether a rollout is converted or each minibatch."""
    weights: list[dict[str, th.Tensor]] = []
    for most, dtype in ((0, th.uint8), (ppo.CONVERTED_AT_ONCE, th.bfloat16)):
        monkeypatch.setattr(ppo, "CONVERTED_AT_ONCE", most)
        model = build(parameters(precision="bf16"))
        _, callback = model._setup_learn(N_ENVS * N_STEPS, CallbackList([]))
        model.collect_rollouts(model.env, callback, model.rollout_buffer, N_STEPS)
        model._update_current_progress_remaining(0, 1)
        assert model._flat_rollout().observations.dtype == dtype
        model.train()
        model.env.close()
        weights.append({name: value.clone() for name, value in model.policy.state_dict().items()})
    assert all(th.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("kind", "halfway", "end"), [("constant", 0.1, 0.1), ("linear", 0.05, 0.0), ("cosine", 0.05, 0.0)]
)
def test_learning_rate(kind: str, halfway: float, end: float) -> None:
    rate = schedule(kind, 0.1)
    assert rate(1.0) == pytest.approx(0.1)
    assert rate(0.5) == pytest.approx(halfway)
    assert rate(0.0) == pytest.approx(end)
    assert rate(-0.02) == pytest.approx(end), "the last rollout ends past total_timesteps: never climb the loss"


def test_the_learning_rate_sinks_while_updates_go_too_far_and_rises_to_its_schedule() -> None:
    model = build(parameters(desired_kl=0.02, learning_rate=0.1, learning_rate_schedule="linear"))
    rates = []
    for kl in (0.031, 0.029, 0.5, 0.014, 0.013, *[0.001] * 9):
        model._adapt(kl)
        rates.append(model.slowdown)
    up = 1.1 / 1.5**2
    assert rates[:5] == pytest.approx([1 / 1.5, 1 / 1.5, 1 / 1.5**2, 1 / 1.5**2, up])
    assert rates[5] == pytest.approx(1.1 * up)
    assert rates[-1] == 1.0
    _, callback = model._setup_learn(N_ENVS * N_STEPS, CallbackList([]))
    model.collect_rollouts(model.env, callback, model.rollout_buffer, N_STEPS)
    model.slowdown = 0.3
    model._update_current_progress_remaining(1, 2)
    model.train()
    model.env.close()
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * 0.05)
    model.desired_kl = 0.0
    model._adapt(100.0)
    assert model.slowdown <= 0.33, "0 lowers nothing"
