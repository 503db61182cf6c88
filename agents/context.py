"""What a Decision Transformer remembers while it acts in a batch of environments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from eva_rl.agents.decision_transformer import ACTION, RETURN, REWARD, STATE, DecisionTransformer
from eva_rl.agents.decoding import CachedDecoder
from eva_rl.agents.static_cache import StaticMemory, compiled_step, static_step
from eva_rl.agents.transformer import LayerCache
from eva_rl.batch import InputScaling, WindowBatch
from eva_rl.errors import UnknownNameError
from eva_rl.options import COMPILE_MODES, PRECISIONS, one_of

Window = Literal["cached", "growing", "static", "full"]


@dataclass(frozen=True)
class Acting:
    """How the network is computed while it acts.

    Attributes:
        precision: ``float32``, or ``bfloat16`` for mixed precision.
        compile: ``none``, or torch.compile's mode for the steps of a static memory: ``default`` or ``reduce-overhead``
            (CUDA graphs).

    Raises:
        UnknownNameError: One is none of these.
    """

    precision: str = "float32"
    compile: str = "none"

    def __post_init__(self) -> None:
        one_of(PRECISIONS, precision=self.precision)
        if self.compile not in COMPILE_MODES:
            raise UnknownNameError("compile mode", self.compile, COMPILE_MODES)


class RolloutContext:
    """The last T env steps of n environments, and the keys and values of their tokens.

    ``window="full"`` shows the network the last T steps at every step. ``window="cached"`` keeps keys and values of a
    context that grows from T / 2 to T steps and is then rebuilt from the last T / 2: every action is the network's own
    on a window of legitimate length (it was trained on all lengths from 1 to T), at the cost of about two env steps'
    tokens instead of T. Its tensors are either as long as the context (``growing``), or have one shape at every step
    (``static``, the choice where the step is compiled). All environments share the length of the context; the steps in
    it that precede an environment's episode are masked for that environment.

    Args:
        network: The Decision Transformer.
        scaling: How raw numbers become what the network sees.
        target_returns: (n,), return to ask for, unscaled, per environment.
        window: ``cached``, or one of its forms by name, or ``full``.
        on_window: Called with each full window before the network sees it.
        acting: How the network is computed.
        earlier: A context that is no longer used; its memory is, where it fits.

    Raises:
        UnknownNameError: There is no such window.
    """

    def __init__(
        self,
        network: DecisionTransformer,
        scaling: InputScaling,
        target_returns: Tensor,
        window: Window = "cached",
        on_window: Callable[[WindowBatch], None] | None = None,
        acting: Acting | None = None,
        earlier: RolloutContext | None = None,
    ) -> None:
        config = network.config
        self._network, self._scaling, self._acting = network, scaling, acting or Acting()
        self._window = _form(window, self._acting)
        self._on_window = on_window
        fixed = scaling.action_half_range == 0
        self._fixed = fixed if bool(fixed.any()) else None
        """Action dimensions of a single value, which scaled actions hold as 0."""
        self._targets = (target_returns / scaling.return_scale).unsqueeze(-1)  # (n, 1)
        n, T = len(target_returns), config.context_length
        # The newest steps slide through buffers of twice their number, so that they move once every T steps only.
        self._widths = widths = (config.observation_dim, config.action_dim, 1, 1)
        self._steps = target_returns.new_zeros(n, 2 * T, sum(widths))
        self._observations, self._actions, self._returns_to_go, self._rewards = torch.split(
            self._steps, list(widths), dim=-1
        )
        self._end = T
        self._timesteps = torch.zeros(n, dtype=torch.long)
        """Of the newest step, (n,); kept on the CPU, so that no decision waits for a GPU."""
        self._caches: list[LayerCache] = []
        self._cached_steps = 0
        self._positions = torch.arange(T * config.tokens_per_step)
        kept: StaticMemory | None = None if earlier is None else earlier._memory
        self._memory: StaticMemory | None = kept.forget() if kept is not None and kept.fits(network, n) else None
        decodes = self._window == "growing" and self._acting.precision == "float32"
        self.decoder: CachedDecoder | None = CachedDecoder.of(network, n) if decodes else None
        """Steps with plain tensors; None where the network's modules are called."""

    def features(self, observations: Tensor, rewards: Tensor, starts: Tensor) -> Tensor:
        """Take in one env step and return the hidden state that its action is read from.

        Args:
            observations: (n, obs), raw.
            rewards: (n,), raw rewards of the previous env step; ignored where an episode starts.
            starts: (n,), True where this is the first observation of an episode; on the CPU.

        Returns:
            (n, D).
        """
        if self.decoder is not None and not self.decoder.refresh(self._network):
            self.decoder = None
        device = self._steps.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._acting.precision == "bfloat16"):
            return self._features(observations, rewards, starts).float()

    def _features(self, observations: Tensor, rewards: Tensor, starts: Tensor) -> Tensor:
        self._append(observations, rewards, starts)
        T, longest = self._network.config.context_length, int(self._timesteps.max()) + 1
        if self._window == "full":
            windows = self._last(min(T, longest))
            if self._on_window is not None:
                self._on_window(windows)
            return self._network.features(windows, last_only=self._on_window is None)[:, -1]
        if self._cached_steps in {0, T} or longest == 1:
            kept = min(max(1, T // 2), longest)
            return self._static(kept, max(1, T // 2)) if self._window == "static" else self._rebuild(kept)
        if self._window == "static":
            return self._static(self._cached_steps + 1, 1)
        if self.decoder is None and not self._caches:  # as before, but for a hook on a module since
            return self._rebuild(self._cached_steps + 1)
        return self._extend()

    def acted(self, actions: Tensor) -> None:
        """Record the scaled actions (n, act) taken on the last features."""
        taken = actions if self._fixed is None else actions.masked_fill(self._fixed, 0.0)
        self._actions[:, self._end - 1] = taken

    @property
    def num_environments(self) -> int:
        """N."""
        return len(self._timesteps)

    @property
    def num_visible_steps(self) -> int:
        """Env steps in the cache, the newest included; 0 with full windows."""
        return self._cached_steps

    def _append(self, observations: Tensor, rewards: Tensor, starts: Tensor) -> None:
        if self._end == self._steps.shape[1]:
            self._end //= 2
            self._steps[:, : self._end] = self._steps[:, self._end :]
        now, scaling = self._end, self._scaling
        self._rewards[:, now - 1] = rewards.unsqueeze(-1) / scaling.return_scale
        to_go = self._returns_to_go[:, now - 1] - self._rewards[:, now - 1]
        self._steps[:, now] = 0
        self._observations[:, now] = scaling.observations(observations)
        self._returns_to_go[:, now] = torch.where(starts.to(to_go.device).unsqueeze(-1), self._targets, to_go)
        self._timesteps = torch.where(starts, 0, self._timesteps + 1)
        self._end = now + 1

    def _last(self, num_steps: int) -> WindowBatch:
        newest = slice(self._end - num_steps, self._end)
        timesteps = self._timesteps.unsqueeze(-1) - torch.arange(num_steps - 1, -1, -1)  # (n, T)
        device = self._steps.device
        return WindowBatch(
            observations=self._observations[:, newest],
            actions=self._actions[:, newest],
            returns_to_go=self._returns_to_go[:, newest],
            timesteps=timesteps.clamp(min=0).to(device),
            attention_mask=None if self._all_reach(num_steps) else (timesteps >= 0).to(device),
            rewards=self._rewards[:, newest],
        )

    def _all_reach(self, num_steps: int) -> bool:
        """Whether every environment has taken that many steps in its episode."""
        return int(self._timesteps.min()) >= num_steps - 1

    def _static(self, num_visible: int, num_new: int) -> Tensor:
        """Add the ``num_new`` newest env steps to the static memory; a context of one begins with one step alone."""
        num_new = min(num_new, 1) if num_visible == 1 else num_new
        if self._memory is None:
            self._memory = StaticMemory(self._network, len(self._timesteps))
        memory, self._cached_steps = self._memory, num_visible
        memory.visible.fill_(num_visible)
        memory.timesteps.copy_(self._timesteps)
        steps = memory.inputs(self._steps[:, self._end - num_new - 1 : self._end])
        compiles = self._acting.compile != "none" and num_new == 1
        step = compiled_step(self._acting.compile) if compiles else static_step
        return step(
            self._network, steps, self._widths, memory.keys, memory.values, memory.visible, memory.timesteps
        ).clone()

    def _rebuild(self, num_steps: int) -> Tensor:
        self._cached_steps = num_steps
        if self.decoder is not None:
            return self._decode(self.decoder, num_steps)
        config = self._network.config
        self._caches = self._caches or self._network.new_caches(len(self._timesteps), config.context_length)
        for cache in self._caches:
            cache.length = 0
        return self._network.features(self._last(num_steps), self._caches, last_only=True)[:, -1]

    def _decode(self, decoder: CachedDecoder, num_steps: int) -> Tensor:
        """Fill the empty cache with the newest env steps, up to the read-out token."""
        config = self._network.config
        decoder.length = 0
        tokens = self._embedded(decoder, num_steps)[:, : -(config.tokens_per_step - config.tokens_before_action)]
        mask = None if self._all_reach(num_steps) else self._mask(0, tokens.shape[1]).to(tokens.device)
        return decoder.encode(tokens, mask)

    def _embedded(self, decoder: CachedDecoder, num_steps: int) -> Tensor:
        batch = self._last(num_steps)
        assert batch.rewards is not None
        kinds = {RETURN: batch.returns_to_go, STATE: batch.observations, ACTION: batch.actions, REWARD: batch.rewards}
        return decoder.embed(kinds, batch.timesteps)

    def _extend(self) -> Tensor:
        """Add the rest of the previous env step and the read-out part of this one."""
        config, decoder = self._network.config, self.decoder
        rest = config.tokens_per_step - config.tokens_before_action
        embedded = self._network.embed(self._last(2)) if decoder is None else self._embedded(decoder, 2)
        tokens = embedded[:, config.tokens_before_action : -rest]
        self._cached_steps += 1
        length = self._caches[0].length if decoder is None else decoder.length
        mask = self._mask(length, tokens.shape[1]).to(tokens.device)
        if decoder is not None:
            return decoder.encode(tokens, mask)
        return self._network.encode(tokens, mask, slice(tokens.shape[1] - 1, None), self._caches)[:, -1]

    def _mask(self, length: int, num_new: int) -> Tensor:
        """Which of all tokens each new one may look at, (n or 1, 1, new, length + new).

        Causal, and blind to steps before the episode; but every token sees itself, so that no row is empty.
        """
        keys = self._positions[: length + num_new]
        queries = self._positions[length : length + num_new].unsqueeze(-1)
        causal = (keys <= queries)[None, None]
        if self._all_reach(self._cached_steps):
            return causal
        ages = self._cached_steps - 1 - keys // self._network.config.tokens_per_step
        real = ages <= self._timesteps.unsqueeze(-1)  # (n, keys)
        return (causal & real[:, None, None]) | (keys == queries)


def _form(window: Window, acting: Acting) -> Window:
    """What ``cached`` stands for: one shape at every step where that is worth its price."""
    one_of(get_args(Window), window=window)
    if window != "cached":
        return window
    return "growing" if acting.compile == "none" else "static"
