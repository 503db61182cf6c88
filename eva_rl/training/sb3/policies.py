"""Stable-Baselines3 policies whose features are a Decision Transformer's hidden state over a history window."""

from __future__ import annotations

import copy
import math
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.sac.policies import Actor as SACActor
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import Actor as TD3Actor
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from eva_rl.adapters.fused import unfuse
from eva_rl.agents.decision_transformer import DecisionTransformer
from eva_rl.training.sb3.windows import WindowLayout


class DecisionTransformerFeatures(BaseFeaturesExtractor):
    """The hidden state that the newest action of a window is read from.

    Args:
        observation_space: Windows (T, F) of :class:`WindowLayout`.
        network: Trained in place.
    """

    def __init__(self, observation_space: spaces.Box, network: DecisionTransformer) -> None:
        config = network.config
        super().__init__(observation_space, config.hidden_size)
        self.network = network
        self._layout = WindowLayout(observation_space.shape[0], config.observation_dim, config.action_dim)

    def forward(self, windows: Tensor) -> Tensor:
        """Windows (B, T, F) to features (B, D)."""
        return self.network.features(self._layout.decode(windows), last_only=True)[:, -1]


class NewestObservation(BaseFeaturesExtractor):
    """The newest (scaled) observation of a window: what the critics look at.

    Args:
        observation_space: Windows (T, F) of :class:`WindowLayout`.
        observation_dim: Numbers in one observation.
    """

    def __init__(self, observation_space: spaces.Box, observation_dim: int) -> None:
        super().__init__(observation_space, observation_dim)
        self._observation_dim = observation_dim

    def forward(self, windows: Tensor) -> Tensor:
        """Windows (B, T, F) to observations (B, obs)."""
        return windows[:, -1, : self._observation_dim]


def squashed_head(network: DecisionTransformer) -> nn.Sequential:
    """The network's own action head with what keeps its actions in [-1, 1]."""
    return nn.Sequential(network.action_head, nn.Tanh() if network.config.action_tanh else nn.Hardtanh())


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


class DecisionTransformerPPOPolicy(ActorCriticPolicy):
    """A Gaussian around the Decision Transformer's action; the value is an MLP on the newest observation.

    Args:
        observation_space: Windows.
        action_space: [-1, 1] in each dimension.
        lr_schedule: Stable-Baselines3's.
        network: Trained in place.
        initial_std: Standard deviation of the actions at first.
        critic_hidden_size: Width of the two hidden layers of the value.
        **options: Of ``ActorCriticPolicy``.
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        network: DecisionTransformer,
        initial_std: float = 0.2,
        critic_hidden_size: int = 256,
        **options: Any,
    ) -> None:
        self._network, self._hidden = [network], critic_hidden_size  # in a list: not a submodule
        options |= {"net_arch": [], "ortho_init": False, "share_features_extractor": False}
        super().__init__(observation_space, action_space, lr_schedule, log_std_init=math.log(initial_std), **options)

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """The policy's features first, the value's second."""
        network = self._network[0]
        if self._modules.get("features_extractor") is None:
            return DecisionTransformerFeatures(self.observation_space, network)  # type: ignore[arg-type]
        return NewestObservation(self.observation_space, network.config.observation_dim)  # type: ignore[arg-type]

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        network = self._network[0]
        self.add_module("action_net", squashed_head(network))
        inputs, hidden = network.config.observation_dim, self._hidden
        layers = [nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)]
        self.add_module("value_net", nn.Sequential(*layers))
        make_optimizer: Any = self.optimizer_class
        self.optimizer = make_optimizer(_trainable(self), lr=lr_schedule(1), **self.optimizer_kwargs)

    def set_training_mode(self, mode: bool) -> None:
        """As the base's, but never with dropout: the likelihood ratio compares the network with itself."""
        super().set_training_mode(mode)
        self._network[0].eval()


class DecisionTransformerSACPolicy(SACPolicy):
    """A tanh-Gaussian around the Decision Transformer's action; the critics are MLPs on the newest observation.

    Args:
        observation_space: Windows.
        action_space: [-1, 1] in each dimension.
        lr_schedule: Stable-Baselines3's.
        network: Trained in place; with ``action_tanh``, as SAC's actions pass through a tanh.
        initial_std: Standard deviation before the tanh at first.
        critic_hidden_size: Width of the two hidden layers of the critics.
        **options: Of ``SACPolicy``.
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        network: DecisionTransformer,
        initial_std: float = 0.2,
        critic_hidden_size: int = 256,
        **options: Any,
    ) -> None:
        self._network, self._initial_std = [network], initial_std
        options |= _critic_options(network, critic_hidden_size)
        super().__init__(observation_space, action_space, lr_schedule, **options)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> SACActor:
        """The network itself, its action head, and a new log-standard-deviation head."""
        network = self._network[0]
        features = DecisionTransformerFeatures(self.observation_space, network)  # type: ignore[arg-type]
        actor = super().make_actor(features)
        log_std: Any = actor.log_std  # a Linear layer, whatever its annotation says
        nn.init.zeros_(log_std.weight)
        nn.init.constant_(log_std.bias, math.log(self._initial_std))
        actor.mu = network.action_head
        return actor


class DecisionTransformerTD3Policy(TD3Policy):
    """The Decision Transformer's action; the critics are MLPs on the newest observation.

    Args:
        observation_space: Windows.
        action_space: [-1, 1] in each dimension.
        lr_schedule: Stable-Baselines3's.
        network: Trained in place.
        critic_hidden_size: Width of the two hidden layers of the critics.
        **options: Of ``TD3Policy``.
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        network: DecisionTransformer,
        critic_hidden_size: int = 256,
        **options: Any,
    ) -> None:
        self._network = [network]
        options |= _critic_options(network, critic_hidden_size)
        super().__init__(observation_space, action_space, lr_schedule, **options)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> TD3Actor:
        """The network itself first, a copy of it for the target second.

        The copy's low-rank layers are PEFT's own: Stable-Baselines3 averages parameters past their versions, by which
        fused ones notice that they act with old weights.
        """
        first = "actor" not in self._modules
        network = self._network[0] if first else copy.deepcopy(self._network[0])
        if not first:
            unfuse(network)
        actor = super().make_actor(DecisionTransformerFeatures(self.observation_space, network))  # type: ignore[arg-type]
        actor.mu = squashed_head(network)
        return actor


def _critic_options(network: DecisionTransformer, hidden_size: int) -> dict[str, Any]:
    return {
        "net_arch": {"pi": [], "qf": [hidden_size, hidden_size]},
        "features_extractor_class": NewestObservation,
        "features_extractor_kwargs": {"observation_dim": network.config.observation_dim},
        "share_features_extractor": False,
    }
