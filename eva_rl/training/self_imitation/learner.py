"""Self-imitation: clone demonstrations and the policy's own solved episodes (Oh et al. 2018, arXiv 1806.05635).

In place of that paper's value function, what is worth imitating is decided by success alone, and the policy retries
the starts from which it fails (:mod:`eva_rl.training.self_imitation.retries`): its successes at the first attempt teach
it little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.training.bc import Extension
from eva_rl.training.failures import NotFiniteError
from eva_rl.training.learner import Choice, Explore, Learner, step_generators
from eva_rl.training.losses import clone_loss
from eva_rl.training.optimizer import copy_of, restore_parameters
from eva_rl.training.options import SelfImitationOptions


class SelfImitation(Learner):
    """Clones demonstrations and solved episodes, with the returns-to-go that the policy was asked for.

    Args:
        policy: Its trainable parameters are changed in place.
        options: Hyperparameters.
        seed: Of all random draws.
        extension: What the adapter's method adds.
        start: The parameters before any cloning, by name, from which every iteration clones anew; None goes on with
            those of the iteration before.
    """

    def __init__(
        self,
        policy: DecisionTransformerPolicy,
        options: SelfImitationOptions,
        *,
        seed: int = 0,
        extension: Extension | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(policy, options, seed=seed, extension=extension)
        self._start = start
        self._weights = (options.demonstration_share, options.retry_weight)
        self._updates_per_episode = 0.0 if start is None else options.updates_per_episode
        self._begun, self._updates = 0, options.updates_per_iteration  # of the iteration

    def can_learn(self, replay: TrajectoryReplay, failures: int) -> bool:
        """Whether the policy failed since the last gradient steps, and there is an episode to imitate.

        One that solved all it met has nothing to learn from imitating itself.
        """
        return failures > 0 and bool(replay.imitation_weights(*self._weights).any())

    def begin_iteration(self, replay: TrajectoryReplay, *, env_steps: int = 0, updates: int = 0) -> int:
        """More gradient steps where there is more to clone, if all of it is cloned anew."""
        in_proportion = math.ceil(self._updates_per_episode * len(replay.imitated_lengths))
        self._begun, self._updates = self._actor_steps, max(self.options.updates_per_iteration, in_proportion)
        return self._updates

    def schedule(self, update: int) -> float:
        """A warm-up at the start of each iteration, then a cosine to zero (warm restarts, arXiv 1608.03983).

        The policy always acts with parameters that a small learning rate has settled.
        """
        updates, position = self._updates, update - self._begun
        warmup = min(self.options.warmup_steps, updates // 4)
        if position < warmup:
            return (position + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (position - warmup) / max(1, updates - warmup)))

    def explore(self, generator: torch.Generator) -> Explore:
        """The policy's own actions: noise is a matter of retries."""
        return lambda features, _: Choice(self.policy.network.actions(features))

    def update(self, replay: TrajectoryReplay, update: int) -> dict[str, float]:
        """One gradient step of cloning; the first of an iteration is taken from the parameters before any cloning.

        Raises:
            NotFiniteError: The loss or the gradient is not finite; the parameters are as they were.
        """
        if self._start is None or self._actor_steps > self._begun:
            return self._clone(replay, update)
        own = self._restarted
        before = copy_of(own)
        restore_parameters(own, self._start, "")
        self.optimizer.state.clear()
        try:
            return self._clone(replay, update)
        except NotFiniteError:
            restore_parameters(own, before, "")
            raise

    @property
    def _restarted(self) -> dict[str, nn.Parameter]:
        """The parameters that begin anew in every iteration."""
        return {name: self.parameters[name] for name in self._start or {}}

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        """In the parameters from which the next iteration clones anew; the policy acts with those it has until then."""
        own = self._restarted
        before = copy_of(own)
        restore_parameters(own, self._start or {}, "")
        try:
            yield
            if self._start is not None:
                self._start = copy_of(own)
        finally:
            restore_parameters(own, before, "")

    def state_of(self) -> Mapping[str, Tensor]:
        """The parameters from which the next iteration clones anew, where refreshed directions changed them."""
        return (self._start or {}) if self.options.refresh_every else {}

    def restore_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_of` gave."""
        if tensors:
            self._start = dict(tensors)

    def _clone(self, replay: TrajectoryReplay, update: int) -> dict[str, float]:
        rng, _ = step_generators(self.seed, update)
        weights = replay.imitation_weights(*self._weights)
        batch = replay.sample_as_asked(self.options.batch_size, rng, self.context_length, self.scaling, weights)
        batch = batch.to(self.policy.device)
        loss = clone_loss(self.policy.network, batch)
        norm = self.step_actor(loss, update, batch)
        return {"train/loss": loss.item(), "train/gradient_norm": norm}
