"""What the online algorithms share: one actor, its optimiser, its draws and its part of a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.training.bc import EXTENSION, Extension
from eva_rl.training.checkpoint import optimizer_tensors, restore_optimizer
from eva_rl.training.failures import NotFiniteError

ACTOR = "actor"


class OnlineAlgorithm(Protocol):
    """Learns from episodes while they are collected."""

    @property
    def policy(self) -> DecisionTransformerPolicy:
        """What acts, and what is changed."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The policy's trainable parameters."""

    def explore(self, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """A function from hidden states (n, D) to scaled exploratory actions (n, act)."""

    def update(self, replay: TrajectoryReplay, update: int) -> dict[str, float]:
        """Gradient step number ``update``, from 0; returns its metrics."""

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what ``tensors`` gave."""


@dataclass(frozen=True)
class ActorOptions:
    """How the policy's own parameters are trained.

    Attributes:
        batch_size: Windows a gradient step.
        learning_rate: AdamW's, after ``warmup`` gradient steps.
        warmup: Gradient steps of linear warm-up.
        weight_decay: AdamW's, on matrices.
        gradient_clip: Largest norm of the gradient.
    """

    batch_size: int = 64
    learning_rate: float = 1e-4
    warmup: int = 100
    weight_decay: float = 1e-4
    gradient_clip: float = 0.25


class Learner(ABC):
    """A policy's trainable parameters with their optimiser, and whatever else is trained beside them.

    Args:
        policy: Its trainable parameters are changed in place.
        options: How.
        seed: Of all draws.
        extension: What the adapter's method adds.
    """

    def __init__(
        self, policy: DecisionTransformerPolicy, options: ActorOptions, *, seed: int, extension: Extension | None
    ) -> None:
        self.options, self.seed, self.extension, self._policy = options, seed, extension, policy
        self.scaling = policy.scaling.to("cpu")
        self.context_length = policy.network.config.context_length
        self.parameters: Mapping[str, nn.Parameter] = {
            name: p for name, p in policy.network.named_parameters() if p.requires_grad
        }
        matrices = [p for p in self.parameters.values() if p.ndim > 1]
        vectors = [p for p in self.parameters.values() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=options.learning_rate)
        self._trained: dict[str, tuple[Mapping[str, nn.Parameter], torch.optim.Optimizer]] = {}
        self.add(ACTOR, self.parameters, self.optimizer)

    @property
    def policy(self) -> DecisionTransformerPolicy:
        """What acts, and what is changed."""
        return self._policy

    @abstractmethod
    def explore(self, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """See :meth:`OnlineAlgorithm.explore`."""

    @abstractmethod
    def update(self, replay: TrajectoryReplay, update: int) -> dict[str, float]:
        """See :meth:`OnlineAlgorithm.update`."""

    def add(self, name: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Make parameters and their optimiser part of a checkpoint."""
        self._trained[name] = (parameters, optimizer)

    def step_actor(self, loss: Tensor, update: int, batch: WindowBatch) -> float:
        """One optimiser step; returns the gradient's norm before clipping.

        Raises:
            NotFiniteError: The loss or the gradient is not finite; the parameters are as they were.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * min(1.0, (update + 1) / max(1, self.options.warmup))
        whole = loss if self.extension is None else loss + self.extension.penalty()
        self.optimizer.zero_grad(set_to_none=True)
        whole.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.options.gradient_clip)
        if not bool(torch.isfinite(whole + norm)):
            raise NotFiniteError("the policy's loss", update, batch)
        self.optimizer.step()
        if self.extension is not None:
            self.extension.after_step(update + 1)
        return float(norm)

    def forget(self, changed: Sequence[nn.Parameter]) -> None:
        """Parameters were expressed in other coordinates: what the optimiser knows of them is void."""
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
        return state

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        for kind, (parameters, optimizer) in self._trained.items():
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(tensors[f"{kind}/parameter/{name}"])
            restore_optimizer(optimizer, parameters, _below(tensors, f"{kind}/"))
        if self.extension is not None:
            self.extension.restore(_below(tensors, EXTENSION))
        self.restore_state(_below(tensors, "own/"))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def draws(seed: int, update: int) -> tuple[np.random.Generator, torch.Generator]:
    """Generators of one gradient step: they depend on nothing but its number, so that a resumed run draws the same."""
    rng = np.random.default_rng((seed, update, 1))
    return rng, torch.Generator().manual_seed(int(rng.integers(2**62)))


def noise_levels(num_envs: int) -> Tensor:
    """How much of its noise each environment explores with, (n, 1): from none to all.

    Several degrees at once (as the actors of Ape-X, Horgan et al. 2018, arXiv 1803.00933) give episodes that succeed
    and episodes that try something else, where one degree for all would spoil every long precise motion.
    """
    return torch.linspace(0, 1, num_envs).unsqueeze(-1) if num_envs > 1 else torch.ones(1, 1)


def named(module: nn.Module) -> dict[str, Any]:
    """A module's parameters by name."""
    return dict(module.named_parameters())
