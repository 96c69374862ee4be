"""The network against scipy's Beta distribution, SB3's NatureCNN and its own float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from scipy import stats
from stable_baselines3.common.torch_layers import NatureCNN

from pipeline.agent.hardware import choose_dtype
from pipeline.agent.network import BetaDistribution, ConvFeatures, DrivingNetwork, fold, network_kwargs
from pipeline.agent.policy import build_network, spaces_of
from pipeline.config import NetworkParams, ObservationParams

OBSERVATION = ObservationParams(frame_skip=4, frames_stack=4, grayscale=True, resize=64, action_axes="steer_throttle")
NETWORK = NetworkParams(
    cnn_channels=[8, 16, 16], features_dim=32, net_arch=[], activation="relu", ortho_init=True, action_head="beta",
    log_std_init=0.0,
)  # fmt: skip
PICTURES = spaces.Box(0, 255, (4, 84, 84), np.uint8)


def concentrations(logit: float, log_nu: float) -> tuple[float, float]:
    """Alpha and beta of an action whose mode lies at the share 1 / (1 + exp(-logit)) of its range."""
    share = 1 / (1 + np.exp(-logit))
    return float(1 + np.exp(log_nu) * share), float(1 + np.exp(log_nu) * (1 - share))


@pytest.fixture
def raw() -> th.Tensor:
    """(5, 4) outputs of the network's last layer: two axes, place of both before sharpness of both."""
    return th.tensor(np.random.default_rng(0).normal(0, 2, (5, 4)), dtype=th.float32)


@pytest.fixture
def expected(raw: th.Tensor) -> list[list[stats.rv_continuous]]:
    """scipy's Beta of each sample and axis, stretched to [-1, 1]."""
    return [
        [stats.beta(*concentrations(row[axis], row[2 + axis]), loc=-1, scale=2) for axis in (0, 1)]
        for row in raw.tolist()
    ]


def test_beta_density_entropy_and_mean_are_scipys(raw: th.Tensor, expected: list[list[stats.rv_continuous]]) -> None:
    head = BetaDistribution(2).proba_distribution(raw)
    actions = np.random.default_rng(1).uniform(-0.999, 0.999, (5, 2))
    density = [
        sum(axis.logpdf(a) for axis, a in zip(row, at, strict=True)) for row, at in zip(expected, actions, strict=True)
    ]
    np.testing.assert_allclose(head.log_prob(th.tensor(actions, dtype=th.float32)), density, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(head.entropy(), [sum(axis.entropy() for axis in row) for row in expected], atol=1e-4)
    np.testing.assert_allclose(head.mode(), [[axis.mean() for axis in row] for row in expected], atol=1e-5)


@pytest.mark.parametrize("action_head", ["beta", "gaussian", "gsde"])
def test_an_untrained_policy_steers_straight_on_with_the_throttle_asked_for(action_head: str) -> None:
    network = NETWORK.model_copy(update={"action_head": action_head, "log_std_init": -1.15})
    space, actions = spaces_of(OBSERVATION)
    policy = DrivingNetwork(space, actions, lambda _: 0.0, throttle_init=0.15, **network_kwargs(network))
    pictures = th.randint(0, 256, (64, *space.shape), dtype=th.uint8)
    head = policy.get_distribution(pictures)
    np.testing.assert_allclose(head.mode().detach(), np.tile([0, 0.15], (64, 1)), atol=0.03)
    if isinstance(head, BetaDistribution):
        of_scipy = stats.beta(head.beta.concentration1.detach(), head.beta.concentration0.detach(), loc=-1, scale=2)
        np.testing.assert_allclose(of_scipy.std(), np.exp(-1.15), atol=0.02)


def test_no_beta_is_wider_than_the_uniform_one() -> None:
    head = BetaDistribution(2).proba_distribution(BetaDistribution.raw_of(th.tensor([0.0, 0.15]), 2.0)[None])
    assert stats.beta(head.beta.concentration1, head.beta.concentration0).std() == pytest.approx(12**-0.5, abs=1e-3)


def test_the_density_integrates_to_one() -> None:
    head = BetaDistribution(1).proba_distribution(th.tensor([[0.3, 1.7]]).repeat(20001, 1))
    actions = th.linspace(-1, 1, 20001, dtype=th.float64)[:, None]
    assert np.trapezoid(head.log_prob(actions).exp(), actions[:, 0]) == pytest.approx(1, abs=1e-3)


def test_samples_follow_the_distribution_and_stay_inside(raw: th.Tensor) -> None:
    th.manual_seed(0)
    head = BetaDistribution(2).proba_distribution(raw[:1].repeat(4000, 1))
    samples = head.sample().numpy()
    assert np.abs(samples).max() < 1
    for axis in (0, 1):
        alpha, beta = concentrations(float(raw[0, axis]), float(raw[0, 2 + axis]))
        assert stats.kstest(samples[:, axis], stats.beta(alpha, beta, loc=-1, scale=2).cdf).pvalue > 0.01
        mode = 2 * (alpha - 1) / (alpha + beta - 2) - 1
        assert mode == pytest.approx(np.tanh(float(raw[0, axis]) / 2), abs=1e-5)  # the logit is the mode's


@pytest.mark.parametrize("extreme", [-60.0, 0.0, 60.0])
def test_gradients_are_finite_at_the_borders_and_for_extreme_outputs(extreme: float) -> None:
    raw = th.full((3, 4), extreme, requires_grad=True)
    head = BetaDistribution(2).proba_distribution(raw)
    actions = th.tensor([[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
    (head.log_prob(actions).sum() + head.entropy().sum()).backward()  # type: ignore[no-untyped-call]
    assert raw.grad is not None
    assert th.isfinite(raw.grad).all()
    assert (head.mode().abs() <= 1).all()


def features(width: list[int], dtype: th.dtype = th.float32) -> ConvFeatures:
    th.manual_seed(0)
    return ConvFeatures(PICTURES, width, 64, dtype)


def pictures(n: int = 3) -> th.Tensor:
    return th.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 4, 84, 84), np.uint8))


def test_at_full_width_the_features_are_nature_cnns() -> None:
    theirs = NatureCNN(PICTURES, features_dim=64)
    ours = features([32, 64, 64])
    ours.load_state_dict(theirs.state_dict())  # by name: saved weights fit
    with th.no_grad():
        expected = theirs(pictures().float() / 255)
        got = ours(pictures())
    assert got.dtype == th.float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n", "channels", "size"), [(3, 4, 84), (2, 9, 96), (1, 4, 67), (3, 1, 36), (1, 1, 84)])
def test_folded_pictures_give_the_convolutions_of_the_unfolded(n: int, channels: int, size: int) -> None:
    """Also where the windows don't reach the last rows and columns (67)."""
    pictures = th.randint(0, 256, (n, channels, size, size), dtype=th.uint8)
    extractor = ConvFeatures(spaces.Box(0, 255, (channels, size, size), np.uint8), [8, 8, 8], 16)
    with th.no_grad():
        expected = extractor.linear(extractor.cnn(pictures / 255))
        assert th.equal(extractor(fold(pictures)), extractor(pictures))
        assert th.allclose(extractor(pictures), expected, atol=1e-5)


def test_bf16_features_are_near_float32s() -> None:
    single, half = features([16, 32, 32]), features([16, 32, 32], th.bfloat16)
    half.load_state_dict(single.state_dict())
    with th.no_grad():
        expected, got = single(pictures()), half(pictures())
    assert got.dtype == th.float32
    assert float((got - expected).norm() / expected.norm()) < 0.02  # bf16 has 8 bits: 0.4% a rounding


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_that_is_asked_for_is_taken(precision: str) -> None:
    assert choose_dtype(precision, th.device("cpu")) == {"fp32": th.float32, "bf16": th.bfloat16}[precision]


@pytest.mark.parametrize("head", ["beta", "gaussian", "gsde"])
@pytest.mark.parametrize("axes", ["steer_throttle", "steer_gas_brake"])
def test_actor_and_critic_agree_with_evaluate_actions(head: str, axes: str) -> None:
    """What the rollout stores is what the update computes again; a difference would bias PPO's ratio from 1."""
    observation = OBSERVATION.model_copy(update={"action_axes": axes})
    th.manual_seed(0)
    module = build_network(observation, NETWORK.model_copy(update={"action_head": head, "net_arch": [16]}))
    seen = th.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 4, 64, 64), np.uint8))
    with th.no_grad():
        actions, values, log_prob = module(seen)
        values_again, log_prob_again, entropy = module.evaluate_actions(seen, actions)
    np.testing.assert_allclose(log_prob, log_prob_again, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(values, values_again, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values, module.predict_values(seen).detach(), rtol=1e-5, atol=1e-6)
    assert entropy is None or th.isfinite(entropy).all()  # SB3's gSDE has no closed form
    low, high = spaces_of(observation)[1].low, spaces_of(observation)[1].high
    assert actions.shape == (6, len(low))
    if head == "beta" and axes == "steer_throttle":
        assert ((actions.numpy() >= low) & (actions.numpy() <= high)).all()
