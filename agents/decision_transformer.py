"""The Decision Transformer (Chen et al. 2021, arXiv 2106.01345) in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eva_rl.agents.transformer import ACTIVATIONS, Block, Cache, LayerCache, causal_mask
from eva_rl.batch import WindowBatch
from eva_rl.errors import UserError

RETURN, STATE, ACTION, REWARD = "return", "state", "action", "reward"
TOKEN_ORDERS = ((RETURN, STATE, ACTION), (STATE, RETURN, ACTION, REWARD))
LOG_STD_RANGE = (-5.0, 2.0)


SIZES: Mapping[str, Mapping[str, int]] = {
    "small": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "context_length": 20},
    "base": {"hidden_size": 512, "num_layers": 4, "num_heads": 8, "context_length": 50},
    "large": {"hidden_size": 768, "num_layers": 6, "num_heads": 12, "context_length": 50},
}
"""Keyword arguments of :class:`eva_rl.agents.DecisionTransformerConfig`.

About 1, 13 and 43 million parameters. ``base`` is the policy of EVA's experiments (arXiv 2410.07170, section 4.5) and
``large`` the 40M one of L2M (arXiv 2306.14884), both without their task sets' token vocabularies.
"""


@dataclass(frozen=True)
class DecisionTransformerConfig:
    """Shape of the network.

    Attributes:
        observation_dim: Numbers in one observation.
        action_dim: Numbers in one action.
        hidden_size: Width D.
        num_layers: Blocks L.
        num_heads: Attention heads; divides ``hidden_size``.
        inner_size: Width of the MLP; 0 uses ``4 * hidden_size``.
        context_length: Env steps T that the network was trained to see at most.
        max_timestep: Rows of the timestep embedding; later steps share the last row.
        activation: ``gelu``, ``gelu_new`` (tanh form) or ``relu``.
        dropout: Probability, while training.
        token_order: Tokens of one env step; the action is read from the token before the action token.
        stochastic: Whether there is a log-standard-deviation head (tanh-Gaussian policy) beside the mean.
        action_tanh: Whether actions pass through a tanh; without it they are only cut off where they are executed.
    """

    observation_dim: int
    action_dim: int
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 8
    inner_size: int = 0
    context_length: int = 20
    max_timestep: int = 1000
    activation: str = "gelu"
    dropout: float = 0.0
    token_order: tuple[str, ...] = TOKEN_ORDERS[0]
    stochastic: bool = False
    action_tanh: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_order", tuple(self.token_order))
        sizes = ("observation_dim", "action_dim", "hidden_size", "num_layers", "num_heads", "context_length")
        for name in (*sizes, "max_timestep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.inner_size < 0:
            raise UserError(f"inner_size={self.inner_size}: expected at least 1, or 0 for four times hidden_size.")
        if self.hidden_size % self.num_heads:
            raise UserError(f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}.")
        if self.token_order not in TOKEN_ORDERS:
            raise UserError(f"token_order={self.token_order}: expected one of {TOKEN_ORDERS}.")
        if self.stochastic and not self.action_tanh:
            raise UserError("stochastic=true makes a tanh-Gaussian policy: expected action_tanh=true.")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r}: expected one of {sorted(ACTIVATIONS)}.")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one env step."""
        return len(self.token_order)

    @property
    def tokens_before_action(self) -> int:
        """Tokens of an env step that are known when its action is chosen; the last of them is read out."""
        return self.token_order.index(ACTION)


class DecisionTransformer(nn.Module):
    """Maps windows of returns-to-go, states and actions to the next actions.

    Everything goes in and out scaled (see :class:`eva_rl.batch.InputScaling`). In the last block only the tokens that
    are read out pass through the queries, the output projection and the MLP: nothing else of it would be used.
    """

    def __init__(self, config: DecisionTransformerConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.embed_return = nn.Linear(1, D)
        self.embed_state = nn.Linear(config.observation_dim, D)
        self.embed_action = nn.Linear(config.action_dim, D)
        self.embed_reward = nn.Linear(1, D) if REWARD in config.token_order else None
        self.embed_timestep = nn.Embedding(config.max_timestep, D)
        self.embed_norm = nn.LayerNorm(D)
        inner = config.inner_size or 4 * D
        self.blocks = nn.ModuleList(
            Block(D, config.num_heads, inner, config.activation, config.dropout) for _ in range(config.num_layers)
        )
        self.final_norm = nn.LayerNorm(D)
        self.action_head = nn.Linear(D, config.action_dim)
        self.log_std_head = nn.Linear(D, config.action_dim) if config.stochastic else None
        self.dropout = nn.Dropout(config.dropout)
        self._initialise()

    @classmethod
    def empty(cls, config: DecisionTransformerConfig) -> DecisionTransformer:
        """The network without memory for its weights: shapes only."""
        with torch.device("meta"):
            return cls(config)

    @classmethod
    def with_weights(cls, config: DecisionTransformerConfig, weights: Mapping[str, Tensor]) -> DecisionTransformer:
        """The network, in evaluation mode, with copies of the given weights as float32."""
        network = cls.empty(config)
        # Copies: results of a matrix product depend, in the last bits, on how its memory is aligned.
        state = {k: v.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for k, v in weights.items()}
        network.load_state_dict(state, assign=True)
        return network.requires_grad_(True).eval()

    def _initialise(self) -> None:
        """GPT-2's initialisation, with residual outputs shrunk by the square root of their number."""
        if self.action_head.weight.is_meta:  # shapes only
            return
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("o_proj", "down_proj"))
                std = 0.02 / (2 * self.config.num_layers) ** 0.5 if residual else 0.02
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, batch: WindowBatch) -> Tensor:
        """Choose the action of every env step of every window.

        Args:
            batch: Scaled windows.

        Returns:
            (B, T, act), each in [-1, 1] where the config says ``action_tanh``.
        """
        return self.actions(self.features(batch))

    def actions(self, features: Tensor) -> Tensor:
        """Deterministic actions (..., act) read from hidden states (..., D)."""
        raw: Tensor = self.action_head(features)
        return torch.tanh(raw) if self.config.action_tanh else raw

    def features(
        self, batch: WindowBatch, caches: list[LayerCache] | None = None, *, last_only: bool = False
    ) -> Tensor:
        """Hidden states from which actions are read.

        Args:
            batch: Scaled windows.
            caches: Empty caches, one a layer, to be filled with all tokens but those that follow the last read-out.
            last_only: Whether only the last env step's is wanted.

        Returns:
            (B, T, D), or (B, 1, D) of the last env step.
        """
        tokens = self.embed(batch)
        if caches is not None:
            tokens = tokens[:, : tokens.shape[1] - self._tokens_after()]
        mask = self._window_mask(batch, tokens.shape[1])
        per_step, first = self.config.tokens_per_step, self.config.tokens_before_action - 1
        last = first + per_step * (batch.timesteps.shape[1] - 1)
        read = slice(last if last_only else first, last + 1, per_step)
        return self.encode(tokens, mask, read, caches)

    def distribution(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, (B, T, act) each, of the Gaussian before its tanh.

        Raises:
            UserError: The network has no log-standard-deviation head.
        """
        if self.log_std_head is None:
            raise UserError("This policy is deterministic. Load it with stochastic=true for online RL.")
        low, high = LOG_STD_RANGE
        log_std = low + (high - low) * (torch.tanh(self.log_std_head(features)) + 1) / 2
        return self.action_head(features), log_std

    def embed(self, batch: WindowBatch) -> Tensor:
        """Tokens of the windows in time order, (B, T * tokens_per_step, D)."""
        time = self.embed_timestep(batch.timesteps.clamp(max=self.config.max_timestep - 1))
        embedded = [self._embed_one(kind, batch) + time for kind in self.config.token_order]
        B, T = batch.timesteps.shape
        tokens = torch.stack(embedded, dim=2).view(B, T * len(embedded), -1)  # (B, T * tokens, D)
        out: Tensor = self.dropout(self.embed_norm(tokens))
        return out

    def _embed_one(self, kind: str, batch: WindowBatch) -> Tensor:
        if kind == RETURN:
            return self.embed_return(batch.returns_to_go)  # type: ignore[no-any-return]
        if kind == STATE:
            return self.embed_state(batch.observations)  # type: ignore[no-any-return]
        if kind == ACTION:
            return self.embed_action(batch.actions)  # type: ignore[no-any-return]
        assert self.embed_reward is not None
        return self.embed_reward(batch.rewards)  # type: ignore[no-any-return]

    def encode(self, tokens: Tensor, mask: Tensor | None, read: slice, caches: Sequence[Cache] | None = None) -> Tensor:
        """Run the blocks.

        Args:
            tokens: (B, S, D).
            mask: (B or 1, 1, S, keys), True where a token may look; None says causal.
            read: Which tokens are read out.
            caches: Keys and values of earlier tokens, one a layer; the new ones are added.

        Returns:
            (B, tokens read out, D).
        """
        x = tokens
        last = len(self.blocks) - 1
        visible = causal_mask(tokens.shape[1], tokens.device)[None, None] if mask is None else mask
        read_mask = visible[:, :, read]
        for index, block in enumerate(self.blocks):
            cache = None if caches is None else caches[index]
            x = block(x, read_mask, read, cache) if index == last else block(x, mask, cache=cache)
        out: Tensor = self.final_norm(x)
        return out

    def new_caches(self, batch_size: int, num_steps: int) -> list[LayerCache]:
        """Empty caches for windows of up to ``num_steps`` env steps, one a layer."""
        weight = self.embed_norm.weight
        heads = self.config.num_heads
        shape = (batch_size, heads, num_steps * self.config.tokens_per_step, self.config.hidden_size // heads)
        return [LayerCache(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(self.config.num_layers)]

    def _tokens_after(self) -> int:
        return self.config.tokens_per_step - self.config.tokens_before_action

    def _window_mask(self, batch: WindowBatch, num_tokens: int) -> Tensor | None:
        """Causal and blind to padding, but for itself, so that no row is empty: (B, 1, S, S)."""
        if batch.attention_mask is None:
            return None
        real = batch.attention_mask.bool().repeat_interleave(self.config.tokens_per_step, dim=1)[:, :num_tokens]
        causal = causal_mask(num_tokens, real.device)
        itself = torch.eye(num_tokens, dtype=torch.bool, device=real.device)
        return (causal & real[:, None, None, :]) | itself
