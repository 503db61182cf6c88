"""A Decision Transformer with everything its behaviour depends on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from eva_rl.agents.context import Acting, RolloutContext, Window
from eva_rl.agents.decision_transformer import DecisionTransformer
from eva_rl.batch import InputScaling, WindowBatch, within_bounds
from eva_rl.errors import UserError, check_dimensions, counted


class Policy(Protocol):
    """Acts in a batch of environments and remembers their histories."""

    @property
    def observation_dim(self) -> int:
        """Numbers in one observation."""

    @property
    def action_dim(self) -> int:
        """Numbers in one action."""

    def reset(self, env_ids: Sequence[str]) -> None:
        """Forget all histories and prepare for one environment per name."""

    def act(
        self,
        observations: NDArray[np.float32],
        rewards: NDArray[np.float32],
        episode_starts: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """Choose one action per environment.

        Args:
            observations: (n, obs).
            rewards: (n,), rewards of the previous env step; ignored where an episode starts.
            episode_starts: (n,), True where this is the first observation of an episode.

        Returns:
            (n, act), within the action bounds.
        """


@dataclass(frozen=True)
class Conditioning:
    """The target return of the policy.

    Attributes:
        target_return: Used for tasks that ``per_env`` does not name.
        per_env: Target return by env id; ``push-v3`` is ``metaworld/push-v3`` here, and ``module:Env-v0`` ``Env-v0``.
    """

    target_return: float
    per_env: Mapping[str, float] = field(default_factory=dict)

    def of(self, env_id: str) -> float:
        """Target return for a task, unscaled: for the task with its options, else without them."""
        for name in (env_id, env_id.partition("?")[0]):  # options of a task follow a "?"
            if name in self.per_env:
                return self.per_env[name]
            if (other := next((one for one in self.per_env if same_task(one, name)), None)) is not None:
                return self.per_env[other]
        return self.target_return

    def with_target(self, target_return: float, env_id: str) -> Conditioning:
        """The same, but for one task."""
        others = {name: value for name, value in self.per_env.items() if not same_task(name, env_id)}
        return replace(self, per_env={**others, env_id: float(target_return)})


def same_task(first: str, second: str) -> bool:
    """Whether two names are of one task: one may leave out the module to import, or the namespace."""
    (one, own), (other, theirs) = (_task_and_options(name) for name in (first, second))
    if "/" not in one or "/" not in other:
        one, other = one.rpartition("/")[2], other.rpartition("/")[2]
    return (one, own) == (other, theirs)


def _task_and_options(name: str) -> tuple[str, str]:
    """A task's name without the module to import, and its options."""
    task, _, options = name.partition("?")
    return task.rpartition(":")[2], options


class DecisionTransformerPolicy:
    """A Decision Transformer together with its scaling, target returns and origin.

    Args:
        network: Works on scaled numbers.
        scaling: How raw numbers become what the network sees.
        conditioning: Which return it is asked for.
        env_id: The task it was last trained for, "" where there are several.
        metadata: Whatever else belongs to its history: data, results, evaluation protocol.
    """

    def __init__(
        self,
        network: DecisionTransformer,
        scaling: InputScaling,
        conditioning: Conditioning,
        *,
        env_id: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.network = network
        self.scaling = scaling
        self.conditioning = conditioning
        self.env_id = env_id
        self.metadata = dict(metadata or {})
        self.window: Window = "cached"
        self.acting = Acting()
        self.on_window: Callable[[WindowBatch], None] | None = None
        self._context: RolloutContext | None = None
        self._second: DecisionTransformerPolicy | None = None

    def __repr__(self) -> str:
        """Size, dimensions, context, target return and task, in one line."""
        config = self.network.config
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        task = self.env_id or counted(len(self.conditioning.per_env), "task")
        return (
            f"{type(self).__name__}({task}: {parameters / 1e6:.2f}M parameters, observations {self.observation_dim}, "
            f"actions {self.action_dim}, context {config.context_length}, "
            f"target return {self.conditioning.of(self.env_id):g})"
        )

    def with_own_history(self) -> DecisionTransformerPolicy:
        """This policy with histories of its own, to act for a second group of environments; the same one each time."""
        second = self._second or copy.copy(self)
        context = None if self._second is None else second._context
        vars(second).update(vars(self) | {"_context": context, "_second": None})
        self._second = second
        return second

    def forget_histories(self) -> None:
        """Act for no environment until the next :meth:`reset`; nothing is shared with a copy from here on."""
        self._context = self._second = None

    @property
    def observation_dim(self) -> int:
        """Numbers in one observation."""
        return self.network.config.observation_dim

    @property
    def action_dim(self) -> int:
        """Numbers in one action."""
        return self.network.config.action_dim

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return self.scaling.observation_mean.device

    def to(self, device: torch.device | str) -> Self:
        """Move network and scaling to a device, in place."""
        self.network.to(device)
        self.scaling = self.scaling.to(device)
        self._context = None
        return self

    def set_target_return(self, target_return: float, env_id: str) -> None:
        """Ask for this return on this task from now on."""
        self.conditioning = self.conditioning.with_target(target_return, env_id)

    def check_dimensions(self, observation_dim: int, action_dim: int, what: str) -> None:
        """Raise unless the policy fits.

        Raises:
            UserError: Naming ``what`` and the dimensions on both sides.
        """
        own, advice = (self.observation_dim, self.action_dim), "Name another policy= or another env= or data=."
        check_dimensions(what, (observation_dim, action_dim), "the policy takes", own, advice)

    @property
    def action_bounds(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Lowest and highest actions (act,) that the policy can take."""
        center, half = (x.cpu().numpy() for x in (self.scaling.action_center, self.scaling.action_half_range))
        return center - half, center + half

    def set_action_bounds(self, low: ArrayLike, high: ArrayLike) -> None:
        """Stretch the actions over other bounds, one number for all or (act,), from now on.

        Raises:
            UserError: A bound is not finite, or low is not below high.
        """
        shape = self.scaling.action_center.shape
        lowest, highest = (np.broadcast_to(np.asarray(x, np.float32), shape) for x in (low, high))
        if not (np.isfinite(lowest) & np.isfinite(highest) & (lowest < highest)).all():
            given = f"{_numbers(lowest)} to {_numbers(highest)}"
            raise UserError(f"Action bounds {given}: expected finite numbers, low below high.")
        center, half = (torch.from_numpy(x).to(self.device) for x in within_bounds(lowest, highest))
        self.scaling = replace(self.scaling, action_center=center, action_half_range=half)

    def check_action_bounds(self, low: ArrayLike, high: ArrayLike, what: str) -> None:
        """Raise unless the actions span those of a task; where a task has no bounds, any do.

        Raises:
            UserError: Naming ``what`` and the bounds on both sides.
        """
        compare_action_bounds(self.action_bounds, low, high, what)

    def reset(self, env_ids: Sequence[str]) -> None:
        """Forget all histories and prepare for one environment per name.

        Raises:
            UserError: One name was given alone, which would be taken for a name a letter.
        """
        if isinstance(env_ids, str):
            raise UserError(f"env_ids={env_ids!r} is one name, expected one for each environment: [{env_ids!r}].")
        targets = torch.tensor([self.conditioning.of(env_id) for env_id in env_ids], device=self.device)
        self._context = RolloutContext(
            self.network, self.scaling, targets.float(), self.window, self.on_window, self.acting, self._context
        )

    def act(
        self,
        observations: NDArray[np.float32],
        rewards: NDArray[np.float32],
        episode_starts: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """Choose the deterministic action of each environment; see :meth:`Policy.act`."""
        assert self._context is not None, "reset() comes before act()"
        if self._context.decoder is None:
            return self.act_by(self.network.actions, observations, rewards, episode_starts)
        with torch.no_grad():
            return self._act(self._read_out, observations, rewards, episode_starts)

    def _read_out(self, features: Tensor) -> Tensor:
        """Scaled actions (n, act) of hidden states (n, D) as the decoder computes them, unless a hook ended it."""
        assert self._context is not None
        return (self._context.decoder or self.network).actions(features)

    def act_by(
        self,
        choose: Callable[[Tensor], Tensor],
        observations: NDArray[np.float32],
        rewards: NDArray[np.float32],
        episode_starts: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """Act as :meth:`act` does, but with scaled actions (n, act) that ``choose`` makes of hidden states (n, D)."""
        assert self._context is not None, "reset() comes before act()"
        with frozen(self.network):
            return self._act(choose, observations, rewards, episode_starts)

    def _act(
        self,
        choose: Callable[[Tensor], Tensor],
        observations: NDArray[np.float32],
        rewards: NDArray[np.float32],
        episode_starts: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        assert self._context is not None
        n = self._context.num_environments
        expected = {"observations": (n, self.observation_dim), "rewards": (n,), "episode_starts": (n,)}
        check_shapes(expected, observations=observations, rewards=rewards, episode_starts=episode_starts)
        check_observations(observations)
        features = self._context.features(
            self._tensor(observations), self._tensor(rewards), torch.as_tensor(episode_starts, dtype=torch.bool)
        )
        actions = choose(features).clamp(-1, 1)
        self._context.acted(actions)
        raw: NDArray[np.float32] = self.scaling.raw_actions(actions).cpu().numpy()
        return raw

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)


def compare_action_bounds(
    own: tuple[NDArray[np.float32], NDArray[np.float32]], low: ArrayLike, high: ArrayLike, what: str
) -> None:
    """Raise unless a policy's actions span those of a task; where a task has no bounds, any do.

    Args:
        own: Lowest and highest actions (act,) of the policy.
        low: Lowest action of the task.
        high: Highest action of the task.
        what: What to call the task.

    Raises:
        UserError: Naming ``what`` and the bounds on both sides.
    """
    expected = np.asarray(low, np.float32), np.asarray(high, np.float32)
    close = [np.isclose(o, e, rtol=1e-3, atol=1e-4) | ~np.isfinite(e) for o, e in zip(own, expected, strict=True)]
    if np.all(close):
        return
    given, asked = (f"{_numbers(pair[0])} to {_numbers(pair[1])}" for pair in (own, expected))
    uniform = all(len(set(bound.tolist())) == 1 for bound in expected)
    pair = f"[{_numbers(expected[0])},{_numbers(expected[1])}]"
    how = f"add policy.action_bounds={pair} (in Python: policy.set_action_bounds)" if uniform else BY_DIMENSION
    raise UserError(
        f"{what} takes actions from {asked}, the policy acts from {given}. If its actions are meant to span the "
        f"task's, {how}; else name another policy= or env=."
    )


def check_shapes(expected: Mapping[str, tuple[int, ...]], **given: NDArray[Any]) -> None:
    """Raise unless what a policy is told of an env step has its shapes; torch would stretch some that have not.

    Raises:
        UserError: Naming both shapes.
    """
    for name, shape in expected.items():
        if np.shape(given[name]) != shape:
            raise UserError(
                f"The policy was given {name} of shape {np.shape(given[name])}, expected {shape}: a row for each "
                "environment that it was reset for, of the task's own observations."
            )


def check_observations(observations: NDArray[np.float32]) -> None:
    """Raise if a number is not finite: it would stay in the history that the next actions are chosen by.

    Raises:
        UserError: Naming the environment.
    """
    if not (finite := np.isfinite(observations)).all():
        row, column = np.argwhere(~finite)[0]
        raise UserError(
            f"The policy was given {observations[row, column]} as number {column} of environment {row}'s observation, "
            "expected finite numbers. Call policy.reset(...) and begin new episodes."
        )


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """No gradients, and no parameter that asks for one: PyTorch's CPU kernels differ in the last bits if one does."""
    asking = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


BY_DIMENSION = "call policy.set_action_bounds(LOW, HIGH) in Python, with a number for each of them"
"""What to do where the bounds of a task differ from action to action; the command line takes one pair."""


def _numbers(values: NDArray[np.float32]) -> str:
    """One number where all are equal, else the first few in brackets."""
    if len(set(values.tolist())) == 1:
        return f"{values[0]:g}"
    return f"[{', '.join(f'{value:g}' for value in values[:4])}{', ...' if len(values) > 4 else ''}]"
