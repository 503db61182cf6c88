"""What the online algorithms share: options, the actor with its optimiser, and their part of a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from eva_rl.agents.policy import DecisionTransformerPolicy, Policy
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.rollouts.recorder import EpisodeRecorder
from eva_rl.training.bc import EXTENSION, Extension
from eva_rl.training.checkpoint import below
from eva_rl.training.failures import Batch
from eva_rl.training.optimizer import (
    checked_step,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    restore_parameters,
    set_learning_rate,
    trainable_parameters,
)
from eva_rl.training.options import ReplayOptions

ACTOR, ACTOR_STEPS = "actor", "actor_steps"


class Choice(NamedTuple):
    """A policy's actions in vectorised environments, and the transitions recorded.

    Attributes:
        actions: (n, act), scaled.
        extras: (n, width) by name, for a replay that keeps them.
    """

    actions: Tensor
    extras: Mapping[str, Tensor] = {}


Explore = Callable[[Tensor, Tensor], Choice]
"""Chooses exploratory actions, given hidden states (n, D) and scaled observations (n, obs)."""


class Learner(ABC):
    """A policy's trainable parameters with their optimiser, and whatever else is trained beside them.

    Args:
        policy: Its trainable parameters are changed in place.
        options: Hyperparameters, of the algorithm and of its loop.
        seed: Of all random draws.
        extension: What the adapter's method adds.
        actor: What is trained instead of the policy's own parameters; None trains these.
    """

    def __init__(
        self,
        policy: DecisionTransformerPolicy,
        options: ReplayOptions,
        *,
        seed: int,
        extension: Extension | None = None,
        actor: nn.Module | None = None,
    ) -> None:
        self.options, self.seed, self.extension, self._policy = options, seed, extension, policy
        self.scaling = policy.scaling.to("cpu")
        self.context_length = policy.network.config.context_length
        self.parameters: Mapping[str, nn.Parameter] = trainable_parameters(actor or policy.network)
        factor = extension.learning_rate_factor if extension else None
        self.optimizer = make_optimizer(self.parameters, options, factor)
        self._trained: dict[str, tuple[Mapping[str, nn.Parameter], torch.optim.Optimizer]] = {}
        self._actor_steps = 0
        self.add(ACTOR, self.parameters, self.optimizer)

    @property
    def policy(self) -> DecisionTransformerPolicy:
        """What acts, and what is changed."""
        return self._policy

    @property
    def actor_steps(self) -> int:
        """Gradient steps of the policy so far."""
        return self._actor_steps

    @property
    def acting(self) -> Policy:
        """What has been learned so far, without exploration."""
        return self.policy

    @property
    def acting_parameters(self) -> Mapping[str, nn.Parameter]:
        """Those of what has been learned so far: ``keep_best`` keeps them."""
        return self.parameters

    def schedule(self, update: int) -> float:
        """What the learning rate is multiplied by at gradient step ``update``: a linear warm-up."""
        return min(1.0, (update + 1) / max(1, self.options.warmup_steps))

    def can_learn(self, replay: TrajectoryReplay, failures: int) -> bool:
        """Whether there is anything to learn from: a whole episode, by default.

        Args:
            replay: What was played.
            failures: Episodes since the last gradient steps in which the task was not solved.
        """
        return replay.num_complete > 0

    def see_unfinished(self, recorder: EpisodeRecorder, asked: float) -> None:  # noqa: B027 - most wait for whole ones
        """Take note of the episodes under way after a rollout, in place of those noted before.

        Args:
            recorder: Has what was played of each.
            asked: Return that the policy was asked for at their starts.
        """

    def begin_iteration(self, replay: TrajectoryReplay, *, env_steps: int = 0, updates: int = 0) -> int:
        """How many gradient steps are taken from here on until the policy acts again.

        Args:
            replay: What was played.
            env_steps: Played so far.
            updates: Gradient steps taken so far.
        """
        return self.options.updates_per_iteration

    @abstractmethod
    def explore(self, generator: torch.Generator) -> Explore:
        """How to act while learning."""

    @abstractmethod
    def update(self, replay: TrajectoryReplay, update: int) -> dict[str, float]:
        """Take gradient step number ``update``, from 0; returns its metrics."""

    def add(self, name: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Make parameters and their optimiser part of a checkpoint."""
        self._trained[name] = (parameters, optimizer)

    def step_actor(self, loss: Tensor, update: int, batch: Batch) -> float:
        """One optimiser step; returns the gradient's norm before clipping.

        Raises:
            NotFiniteError: The loss or the gradient is not finite; the parameters are as they were.
        """
        set_learning_rate(self.optimizer, self.options.learning_rate * self.schedule(self._actor_steps))
        whole = loss if self.extension is None else loss + self.extension.penalty()
        self.optimizer.zero_grad(set_to_none=True)
        whole.backward(inputs=list(self.parameters.values()))  # type: ignore[no-untyped-call]  # not the critics'
        clip, parameters = self.options.gradient_clip, self.parameters.values()
        norm = checked_step(self.optimizer, parameters, whole.detach(), clip, update=update, batch=batch)
        self._actor_steps += 1
        if self.extension is not None:
            self.extension.after_step(self._actor_steps)
        return float(norm)

    def refreshing(self) -> AbstractContextManager[None]:
        """Where the adapter's directions are refreshed: in the parameters from which training goes on."""
        return nullcontext()

    def forget(self, changed: Sequence[nn.Parameter]) -> None:
        """Reset the optimiser state of parameters that were rewritten in other coordinates."""
        for parameter in changed:
            self.optimizer.state.pop(parameter, None)

    def state_of(self) -> Mapping[str, Tensor]:
        """What an algorithm keeps besides parameters and optimisers."""
        return {}

    def restore_state(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - most keep nothing
        """Put back what :meth:`state_of` gave."""

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint."""
        state: dict[str, Tensor] = {f"own/{name}": value for name, value in self.state_of().items()}
        for kind, (parameters, optimizer) in self._trained.items():
            names = {id(p): name for name, p in parameters.items()}
            state |= {f"{kind}/parameter/{name}": p.data for name, p in parameters.items()}
            state |= {f"{kind}/{name}": value for name, value in optimizer_tensors(optimizer, names).items()}
        if self.extension is not None:
            state |= {EXTENSION + name: value for name, value in self.extension.tensors().items()}
        return state | {ACTOR_STEPS: torch.tensor(self._actor_steps)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        for kind, (parameters, optimizer) in self._trained.items():
            restore_parameters(parameters, tensors, f"{kind}/parameter/")
            restore_optimizer(optimizer, parameters, below(tensors, f"{kind}/"))
        counted = max((int(state["step"]) for state in self.optimizer.state.values()), default=0)
        self._actor_steps = int(tensors.get(ACTOR_STEPS, counted))  # older checkpoints lack it
        if self.extension is not None:
            self.extension.restore(below(tensors, EXTENSION))
        self.restore_state(below(tensors, "own/"))


def step_generators(seed: int, update: int) -> tuple[np.random.Generator, torch.Generator]:
    """Random generators of one gradient step, seeded by its number alone so that a resumed run draws the same."""
    rng = np.random.default_rng((seed, update, 1))
    return rng, torch.Generator().manual_seed(int(rng.integers(2**62)))


def collection_generator(seed: int, env_steps: int) -> torch.Generator:
    """Random generator of what is collected after some env steps, seeded by their number alone."""
    return torch.Generator().manual_seed(int(np.random.default_rng((seed, env_steps)).integers(2**62)))


def noise_levels(num_envs: int) -> Tensor:
    """How much of its noise each environment explores with, (n, 1): from none to all.

    Several degrees at once (as the actors of Ape-X, Horgan et al. 2018, arXiv 1803.00933) give episodes that succeed
    and episodes that try something else, where one degree for all would spoil every long precise motion.
    """
    return torch.linspace(0, 1, num_envs).unsqueeze(-1) if num_envs > 1 else torch.ones(1, 1)


def named(module: nn.Module, prefix: str = "") -> dict[str, Any]:
    """A module's parameters by name."""
    return {f"{prefix}{name}": parameter for name, parameter in module.named_parameters()}
