"""The network: convolutions over stacked pictures, and a distribution over steering and throttle."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch as th
from gymnasium import spaces
from scipy.special import betaincc
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from pipeline.config import NetworkParams
from pipeline.sim.driving_state import VISIBLE

LOG_2 = math.log(2)
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


STRIDE = 4
"""Of the first convolution, whose 8x8 windows are 2x2 blocks of this side."""


def fold(pictures: th.Tensor) -> th.Tensor:
    """(n, c, h, w) uint8 -> (n, h // 4, w // 4, 16 c) uint8: the pixels of each 4x4 block, in the order (y, c, x).

    On blocks the first convolution is 2x2 with stride 1. Its 64 channels fill a matrix instruction's rows, of which the
    pictures' four would use a sixteenth. Rows and columns that no window reaches are left out.
    """
    n, channels, height, width = pictures.shape
    rows, columns = height // STRIDE, width // STRIDE
    reached = pictures[:, :, : STRIDE * rows, : STRIDE * columns].contiguous()
    words = reached.view(th.int32).view(n, channels, rows, STRIDE, columns)  # four pixels of a row move as one
    blocks = words.permute(0, 2, 4, 3, 1).reshape(n, rows, columns, STRIDE * channels)
    return blocks.contiguous().view(th.uint8)


class ConvFeatures(BaseFeaturesExtractor):
    """The three convolutions of Mnih et al. (2015), of any width: (n, c, h, w) uint8 -> (n, features_dim) float32.

    Layer names are those of SB3's ``NatureCNN``, so its saved weights fit. Convolutions run in ``dtype`` with
    channels-last memory: on a CPU with bf16 instructions that is 3.6 times as fast as float32, channels first.
    """

    def __init__(
        self, observation_space: spaces.Box, cnn_channels: list[int], features_dim: int, dtype: th.dtype = th.float32
    ) -> None:
        super().__init__(observation_space, features_dim)
        self.dtype = dtype
        n_input, height, width = observation_space.shape
        first, second, third = cnn_channels
        self.cnn = nn.Sequential(
            nn.Conv2d(n_input, first, kernel_size=8, stride=4),
            nn.ReLU(),
            nn.Conv2d(first, second, kernel_size=4, stride=2),
            nn.ReLU(),
            nn.Conv2d(second, third, kernel_size=3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        with th.no_grad():
            n_flat = self.cnn(th.zeros(1, n_input, height, width)).shape[1]
        self.linear = nn.Sequential(nn.Linear(n_flat, features_dim), nn.ReLU())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """(n, c, h, w) uint8 in 0..255, or :func:`fold`-ed, uint8 or bf16 -> (n, features_dim) float32."""
        folded = fold(observations) if observations.shape[1:] == self._observation_space.shape else observations
        blocks = folded.permute(0, 3, 1, 2).to(self.dtype)  # channels last in memory; 0..255 is exact in bf16 too
        first: nn.Conv2d = self.cnn[0]  # type: ignore[assignment]
        with th.autocast(observations.device.type, self.dtype, enabled=self.dtype != th.float32):
            # The pictures' scale goes into the weights: thousands of multiplications instead of millions.
            hidden = nn.functional.conv2d(blocks, _on_blocks(first.weight * (1 / 255)), first.bias)
            features: th.Tensor = self.linear(self.cnn[1:](hidden))
        return features.float()


def _on_blocks(weight: th.Tensor) -> th.Tensor:
    """(o, c, 8, 8) weights for pictures -> (o, 16 c, 2, 2) for what :func:`fold` returns, channels last."""
    o, c = weight.shape[:2]
    windows = weight.reshape(o, c, 2, STRIDE, 2, STRIDE).permute(0, 2, 4, 3, 1, 5)
    return windows.reshape(o, 2, 2, -1).permute(0, 3, 1, 2)


class BetaDistribution(Distribution):
    """Independent Beta distributions stretched to [-1, 1]: bounded like the pedals, so no probability is clipped away.

    Chou, Maturana and Scherer (2017), "Improving stochastic policy gradients in continuous control with deep
    reinforcement learning using the Beta distribution". Both concentrations are > 1, so there is one mode. The
    deterministic action is the mean.
    """

    EPSILON = 1e-6  # samples stay off the borders, where the log probability is infinite

    def __init__(self, action_dim: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.action_dim = action_dim

    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        """A layer from the latent to 2 x action_dim raw concentrations."""
        return nn.Linear(latent_dim, 2 * self.action_dim)

    @staticmethod
    def raw_of(means: th.Tensor, log_std: float) -> th.Tensor:
        """(2 x action_dim,) of the layer's output for actions of ``means`` (action_dim,), each about exp(log_std) wide.

        In the middle alpha = beta = 1 + nu / 2, whose variance on [-1, 1] is 1 / (3 + nu): 0.58 is the widest. The
        wider, the nearer to the middle its mean is: one further off becomes the furthest there is.
        """
        nu = max(math.exp(-2 * log_std) - 3, math.exp(-5))
        mu = ((means + 1) / 2 * (2 + nu) - 1) / nu
        return th.cat([mu.clamp(0.01, 0.99).logit(), th.full_like(means, math.log(nu))])

    def proba_distribution(self, raw: th.Tensor) -> BetaDistribution:
        """Set the distribution from (n, 2 x action_dim): of each action the logit of its place, and the log of ``nu``.

        alpha = 1 + nu mu, beta = 1 + nu (1 - mu). With alpha and beta straight from the network, as in the paper, noise
        that shrinks as 1/sqrt(alpha + beta) needs outputs in the hundreds before the car drives steadily.
        """
        logit, log_nu = raw.chunk(2, dim=1)
        nu = log_nu.clamp(-5, 12).exp()
        mu = logit.sigmoid()
        alpha, beta = 1 + nu * mu, 1 + nu * (1 - mu)
        self.distribution = self.beta = th.distributions.Beta(alpha, beta, validate_args=False)
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """(n,) log density of actions (n, action_dim) in [-1, 1]; the stretch by 2 costs log 2 an axis."""
        unit = ((actions + 1) / 2).clamp(self.EPSILON, 1 - self.EPSILON)
        log_prob: th.Tensor = self.beta.log_prob(unit).sum(dim=1) - self.action_dim * LOG_2  # type: ignore[no-untyped-call]
        return log_prob

    def entropy(self) -> th.Tensor:
        """(n,) differential entropy in nats."""
        entropy: th.Tensor = self.beta.entropy().sum(dim=1) + self.action_dim * LOG_2  # type: ignore[no-untyped-call]
        return entropy

    def sample(self) -> th.Tensor:
        """(n, action_dim) in (-1, 1)."""
        return self.beta.sample().clamp(self.EPSILON, 1 - self.EPSILON) * 2 - 1

    def mode(self) -> th.Tensor:
        """The deterministic action: the mean, which drives smoother than the mode (both agree as alpha, beta grow)."""
        return self.beta.mean * 2 - 1

    def mean_above_zero(self) -> th.Tensor:
        """(n, action_dim) mean of max(action, 0).

        Of X ~ Beta(alpha, beta) in [0, 1], stretched, it is 2 E[X] P(Y > 1/2) - P(X > 1/2) with Y ~ Beta(alpha + 1,
        beta), since x times the density of X is E[X] times that of Y.
        """
        alpha, beta = (each.double().cpu().numpy() for each in (self.beta.concentration1, self.beta.concentration0))
        above = 2 * alpha / (alpha + beta) * betaincc(alpha + 1, beta, 0.5) - betaincc(alpha, beta, 0.5)
        return th.from_numpy(above).clamp(0, 1).float()

    def actions_from_params(self, raw: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """Actions straight from the layer's output."""
        return self.proba_distribution(raw).get_actions(deterministic)

    def log_prob_from_params(self, raw: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Sampled actions and their log probability."""
        actions = self.actions_from_params(raw)
        return actions, self.log_prob(actions)


class DrivingNetwork(ActorCriticCnnPolicy):
    """SB3's actor-critic over :class:`ConvFeatures`, with a Beta head as one more choice of distribution.

    With ``state_size`` it has a second critic, which reads the simulator's state instead of the picture and which only
    the training asks (Pinto et al. 2017, "Asymmetric actor critic for image-based robot learning"): what the picture
    hides is no noise in its advantages. The first one goes on learning from the same returns, by the features as the
    actor needs them: what one lost car does to the value loss would undo what the policy has learned (docs/recipe.md).
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        action_head: Literal["beta", "gaussian", "gsde"] = "beta",
        state_size: int = 0,
        tells_state: bool = False,
        throttle_init: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.action_head, self.state_size, self.tells_state = action_head, state_size, tells_state
        self.throttle_init = throttle_init
        kwargs["use_sde"] = action_head == "gsde"  # PPO passes its own, equal, value
        super().__init__(observation_space, action_space, lr_schedule, normalize_images=False, **kwargs)
        # Not earlier: orthogonal initialisation needs contiguous weights.
        self.to(memory_format=th.channels_last)  # type: ignore[call-overload]

    def _build(self, lr_schedule: Schedule) -> None:
        if self.tells_state:
            self.state_head = nn.Linear(self.features_dim, len(VISIBLE))
        if self.state_size:
            self.state_critic = state_critic(self.state_size)
        means = th.zeros(get_action_dim(self.action_space))
        if self.throttle_init:
            means[1] = self.throttle_init
        if self.action_head != "beta":
            super()._build(lr_schedule)
            self._aim_at(means)
            return
        self._build_mlp_extractor()
        self.action_dist = BetaDistribution(len(means))
        self.action_net = self.action_dist.proba_distribution_net(self.mlp_extractor.latent_dim_pi)
        self.value_net = nn.Linear(self.mlp_extractor.latent_dim_vf, 1)
        if self.ortho_init:
            for module, gain in ((self.features_extractor, 2**0.5), (self.mlp_extractor, 2**0.5)):
                module.apply(partial(self.init_weights, gain=gain))
            self.action_net.apply(partial(self.init_weights, gain=0.01))
            self.value_net.apply(partial(self.init_weights, gain=1))
        self._aim_at(self.action_dist.raw_of(means, self.log_std_init))
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _aim_at(self, output: th.Tensor) -> None:
        """Add to what the last layer says before it has learned anything."""
        bias: th.Tensor = self.action_net.bias  # type: ignore[assignment]
        with th.no_grad():
            bias += output

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        if isinstance(self.action_dist, BetaDistribution):
            return self.action_dist.proba_distribution(self.action_net(latent_pi))
        return super()._get_action_dist_from_latent(latent_pi)

    def extract_features(self, obs: Any, features_extractor: Any = None) -> th.Tensor:
        """Skip SB3's conversion to float32: the extractor takes the bytes."""
        features: th.Tensor = self.features_extractor(obs)
        return features

    def get_distribution(self, obs: Any) -> Distribution:
        """Distribution of the actions at observations (n, c, h, w) uint8."""
        latent_pi = self.mlp_extractor.forward_actor(self.extract_features(obs))
        return self._get_action_dist_from_latent(latent_pi)

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Values (n, 1), log probabilities (n,) and entropies (n,) of actions (n, action_dim) at observations."""
        return self.judge(self.extract_features(obs), actions)

    def judge(self, features: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """The same of features (n, features_dim)."""
        distribution = self._get_action_dist_from_latent(self.mlp_extractor.forward_actor(features))
        seen = features.detach() if self.state_size else features
        values = self.value_net(self.mlp_extractor.forward_critic(seen))
        return values, distribution.log_prob(actions), distribution.entropy()

    def gradient_groups(self) -> list[list[nn.Parameter]]:
        """The parameters, in groups that share no gradient: all in one, or the actor and each critic by itself."""
        if not self.state_size:
            return [list(self.parameters())]
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            of_critic = name.startswith(("value_net.", "mlp_extractor.value_net."))
            group = "picture" if of_critic else "state" if name.startswith("state_critic.") else "actor"
            groups.setdefault(group, []).append(parameter)
        return list(groups.values())

    def predict_values(self, obs: Any) -> th.Tensor:
        """(n, 1) values at observations (n, c, h, w) uint8."""
        return self.value_net(self.mlp_extractor.forward_critic(self.extract_features(obs)))  # type: ignore[no-any-return]


def state_critic(state_size: int, width: int = 256) -> nn.Sequential:
    """The training's critic: (n, state_size) float32 -> (n, 1)."""
    layers = nn.Linear(state_size, width), nn.Linear(width, width), nn.Linear(width, 1)
    for layer, gain in zip(layers, (2**0.5, 2**0.5, 1.0), strict=True):
        ActorCriticCnnPolicy.init_weights(layer, gain)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def network_kwargs(network: NetworkParams, dtype: th.dtype = th.float32) -> dict[str, Any]:
    """Keyword arguments of :class:`DrivingNetwork`; also PPO's ``policy_kwargs``."""
    return {
        "action_head": network.action_head,
        "features_extractor_class": ConvFeatures,
        "features_extractor_kwargs": {
            "cnn_channels": list(network.cnn_channels),
            "features_dim": network.features_dim,
            "dtype": dtype,
        },
        "net_arch": list(network.net_arch),
        "activation_fn": ACTIVATIONS[network.activation],
        "ortho_init": network.ortho_init,
        "log_std_init": network.log_std_init,
    }
