"""Residual off-policy reinforcement learning on a frozen Decision Transformer, from demonstrations on.

The frozen policy proposes, a small actor adds to it, an ensemble of critics judges the sum. Residual policies:
Johannink et al. 2018, arXiv 1812.03201; on a frozen cloned policy: ResFiT, arXiv 2509.19301; demonstrations in half of
each batch, and an ensemble with layer normalisation: RLPD, Ball et al. 2023, arXiv 2302.02948.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.batch import NStepBatch
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.data.selection import until_success
from eva_rl.data.trajectories import Episode
from eva_rl.rollouts.recorder import EpisodeRecorder
from eva_rl.training.critics import CriticEnsemble, fitting_scale, polyak_update, random_pair
from eva_rl.training.failures import NotFiniteError
from eva_rl.training.learner import Choice, Explore, Learner, named, noise_levels, step_generators
from eva_rl.training.optimizer import restore_parameters
from eva_rl.training.options import ResidualOptions
from eva_rl.training.residual.actor import ResidualActor, ResidualPolicy
from eva_rl.training.residual.embeddings import EMBEDDINGS, StateActionEncoder
from eva_rl.training.residual.playback import FEATURES, PROPOSALS, TARGETS, after_end, extra_widths, played_through


class ResidualLearner(Learner):
    """A residual actor and an ensemble of critics on a frozen policy.

    Rewards are divided by a scale: where success ends an episode and one is known, the value of the highest reward for
    ever, so that values lie below 1; else the mean discounted return when the first reward was paid. It is found again
    once that is several times as large.

    Args:
        policy: Stays as it is.
        options: Hyperparameters.
        seed: Of all random draws and of the networks' first parameters.
        demonstrations: Whole episodes of the task.
        env_id: The task.
    """

    def __init__(
        self,
        policy: DecisionTransformerPolicy,
        options: ResidualOptions,
        *,
        seed: int = 0,
        demonstrations: Sequence[Episode] = (),
        env_id: str = "",
    ) -> None:
        dims, width = (policy.observation_dim, policy.action_dim), policy.network.config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = StateActionEncoder(*dims, options.embedding_size) if options.embedding_size else None
            shown = None if encoder is None else copy.deepcopy(encoder).requires_grad_(False)
            actor = ResidualActor(
                *dims, width if options.features else 0, options.actor_hidden_size, options.scale, shown
            )
            seen = policy.observation_dim + 2 * options.embedding_size
            critics = CriticEnsemble(seen, policy.action_dim, options.critic_hidden_size, options.critics)
        self.actor, self.critics = actor.to(policy.device), critics.to(policy.device)
        super().__init__(policy, options, seed=seed, actor=self.actor)
        self._residual = options
        self.target_actor, self.target_critics = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.encoder, self.target_encoder = None if encoder is None else encoder.to(policy.device), self.actor.encoder
        self.target_actor.encoder = self.target_encoder  # one average, which all others see
        judges = named(self.critics) | ({} if self.encoder is None else named(self.encoder, "encoder."))
        self._critic_optimizer = torch.optim.Adam(judges.values(), options.critic_learning_rate, fused=True)
        self.add("critics", judges, self._critic_optimizer)
        self.demonstrations = self._stored(demonstrations, env_id)
        self._unfinished = self.new_replay(0)
        self._reward_scale = self._solved_value = 0.0
        self._actor_steps_planned = options.total_updates

    def _stored(self, episodes: Sequence[Episode], env_id: str) -> TrajectoryReplay:
        if self._residual.stop_at_success:
            episodes = [until_success(episode) for episode in episodes]
        replay = self.new_replay(1 + sum(len(episode.rewards) + 1 for episode in episodes))
        asked = self.policy.conditioning.of(env_id)
        replay.extend(played_through(self.policy, env_id, episodes), asked)
        return replay

    def new_replay(self, capacity: int, folder: Path | None = None) -> TrajectoryReplay:
        """An empty replay that keeps what this learner needs of each env step."""
        policy, discount = self.policy, self._residual.discount
        return TrajectoryReplay(
            capacity,
            policy.observation_dim,
            policy.action_dim,
            folder,
            discount=discount,
            extras=extra_widths(policy),
            at_end=partial(after_end, policy),
        )

    def see_unfinished(self, recorder: EpisodeRecorder, asked: float) -> None:
        """As the parent; their transitions are drawn as all others."""
        episodes = recorder.unfinished()
        self._unfinished = self.new_replay(sum(len(episode.rewards) + 1 for episode in episodes))
        for episode in episodes:
            self._unfinished.add(episode, asked, complete=False)

    def can_learn(self, replay: TrajectoryReplay, failures: int) -> bool:
        """Whether there is a transition."""
        return replay.num_steps + self._unfinished.num_steps > 0

    @property
    def acting(self) -> ResidualPolicy:
        """The frozen policy with the averaged actor's residuals."""
        return ResidualPolicy(self.policy.with_own_history(), self.target_actor)

    @property
    def acting_parameters(self) -> Mapping[str, nn.Parameter]:
        """The averaged actor's."""
        return named(self.target_actor)

    def explore(self, generator: torch.Generator) -> Explore:
        """The actor's actions with Gaussian noise, times each environment's level."""
        std = self._residual.exploration_noise

        def choose(features: Tensor, observations: Tensor) -> Choice:
            proposals = self.policy.network.actions(features).clamp(-1, 1)
            actions = self.actor.actions(observations, proposals, features)
            noise = std * noise_levels(len(actions)) * torch.randn(actions.shape, generator=generator)
            executed = (actions + noise.to(actions.device)).clamp(-1, 1)
            return Choice(executed, {FEATURES: features, PROPOSALS: proposals, TARGETS: executed})

        return choose

    def begin_iteration(self, replay: TrajectoryReplay, *, env_steps: int = 0, updates: int = 0) -> int:
        """As the parent; find the rewards' scale, and where learning began late, how much is still to come."""
        self._find_scale(replay)
        options, per_iteration = self._residual, super().begin_iteration(replay)
        iterations = 1 + -(-max(0, options.env_steps - env_steps) // options.steps_per_iteration)
        self._actor_steps_planned = options.actor_updates(updates + iterations * per_iteration)
        return per_iteration

    def schedule(self, update: int) -> float:
        """As the parent does, and to zero over the last part: a policy that follows its critics does not settle."""
        last = self._residual.decay * self._actor_steps_planned
        left = self._actor_steps_planned - update
        return super().schedule(update) * (min(1.0, max(0.0, left / last)) if last else 1.0)

    def update(self, replay: TrajectoryReplay, update: int) -> dict[str, float]:
        """One gradient step on the critics, and at every ``policy_delay``-th one on the actor."""
        options, (batch, generator) = self._residual, self._draw(replay, update)
        metrics = self._update_critics(batch, generator, update)
        if update >= options.critic_warmup and update % options.policy_delay == 0:
            metrics |= self._update_actor(batch, update)
            polyak_update(self.target_actor, self.actor, min(1.0, options.tau * options.policy_delay))
        polyak_update(self.target_critics, self.critics, options.tau)
        if self.encoder is not None and self.target_encoder is not None:
            polyak_update(self.target_encoder, self.encoder, options.tau)
        return metrics

    def _draw(self, replay: TrajectoryReplay, update: int) -> tuple[NStepBatch, torch.Generator]:
        rng, generator = step_generators(self.seed, update)
        options, size = self._residual, self.options.batch_size
        shown = round(size * options.demonstration_share) if self.demonstrations.num_episodes else 0
        under_way = self._unfinished.num_steps
        fresh = int(rng.binomial(size - shown, under_way / (under_way + replay.num_steps))) if under_way else 0
        parts = [
            source.sample_n_step(
                count, rng, self.scaling, n=options.n_step, discount=options.discount, solved_value=self._solved_value
            )
            for source, count in (
                (self.demonstrations, shown),
                (replay, size - shown - fresh),
                (self._unfinished, fresh),
            )
            if count
        ]
        return self._embedded(NStepBatch.joined(parts).to(self.policy.device)), generator

    def _embedded(self, batch: NStepBatch) -> NStepBatch:
        """With the embeddings that actor and critics see, computed once."""
        encoder = self.target_encoder
        if encoder is None:
            return batch
        with torch.no_grad():
            now, then = (encoder.observations(x) for x in (batch.observations, batch.next_observations))
        own, following = {**batch.extras, EMBEDDINGS: now}, {**batch.next_extras, EMBEDDINGS: then}
        return replace(batch, extras=own, next_extras=following)

    def _find_scale(self, replay: TrajectoryReplay) -> None:
        """See what a success is worth, once one is known, and what rewards are divided by."""
        known = [source for source in (self.demonstrations, replay, self._unfinished) if source.num_episodes]
        if not known:
            return
        if not self._solved_value and self._residual.stop_at_success and any(source.num_solved for source in known):
            highest = max(source.highest_reward for source in known)
            self._solved_value = max(0.0, highest) / max(1 - self._residual.discount, 1e-3)
        found = self._solved_value or max(source.mean_discounted_return for source in known)
        self._reward_scale = fitting_scale(
            self._reward_scale, found, self.critics, self.target_critics, self._critic_optimizer
        )

    def targets(self, batch: NStepBatch, generator: torch.Generator) -> Tensor:
        """What the critics are taught, (B,)."""
        options, extras = self._residual, batch.next_extras
        with torch.no_grad():
            actions = self.target_actor.actions(batch.next_observations, *_seen_by_actor(extras))
            noise = torch.randn(actions.shape, generator=generator).to(actions.device) * options.target_noise
            noise = noise.clamp(-2 * options.target_noise, 2 * options.target_noise)
            pair = random_pair(options.critics, generator).to(actions.device)
            actions = (actions + noise).clamp(-1, 1)
            values = self.target_critics.min_of(self._seen(batch.next_observations, extras, actions), actions, pair)
            return batch.returns / (self._reward_scale or 1.0) + batch.discounts * values

    def _seen(self, observations: Tensor, extras: Mapping[str, Tensor], actions: Tensor) -> Tensor:
        """What critics see beside the actions: observations (B, obs), and embeddings (B, 2 E) where there are some."""
        encoder = self.target_encoder
        return observations if encoder is None else encoder.seen_by_critics(observations, extras[EMBEDDINGS], actions)

    def _update_critics(self, batch: NStepBatch, generator: torch.Generator, update: int) -> dict[str, float]:
        targets = self.targets(batch, generator)
        values: Tensor = self.critics(self._seen(batch.observations, batch.extras, batch.actions), batch.actions)
        errors = (values - targets).square().mean(1).sum()
        predicted = self._prediction_loss(batch)
        loss = errors + predicted
        self._critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if not bool(torch.isfinite(loss)):
            raise NotFiniteError("the critics' loss", update, batch)
        self._critic_optimizer.step()
        return {
            "train/critic_loss": errors.item() / self.critics.size,
            "train/q": values.mean().item(),
            "train/encoder_loss": predicted.item(),
        }

    def _prediction_loss(self, batch: NStepBatch) -> Tensor:
        """Of the embeddings; 0 where there are none."""
        if self.encoder is None:
            return torch.zeros((), device=batch.observations.device)
        return self.encoder.loss(batch.observations, batch.actions, batch.following_observations)

    def _update_actor(self, batch: NStepBatch, update: int) -> dict[str, float]:
        options, proposals = self._residual, batch.extras[PROPOSALS]
        residuals = self.actor(batch.observations, *_seen_by_actor(batch.extras))
        actions = self.actor.added(proposals, residuals)
        values = self._judged(batch, actions)
        gain = values.mean() / values.detach().abs().mean().clamp(min=1e-6)
        distance, share = self._distance_to_better(batch, residuals, values.detach())
        size = residuals.square().mean()
        loss = options.bc_coef * distance + options.size_coef * size - options.q_coef * gain
        norm = self.step_actor(loss, update, batch)
        return {
            "train/loss": loss.item(),
            "train/clone_loss": distance.item(),
            "train/cloned_share": share.item(),
            "train/residual": size.item() ** 0.5,
            "train/gradient_norm": norm,
        }

    def _judged(self, batch: NStepBatch, actions: Tensor) -> Tensor:
        """Mean of the critics less ``pessimism`` standard deviations, (B,): where they disagree, they know little."""
        values: Tensor = self.critics(self._seen(batch.observations, batch.extras, actions), actions)
        return values.mean(0) - self._residual.pessimism * values.std(0)

    def _distance_to_better(self, batch: NStepBatch, residuals: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error to actions of solved episodes that the critics prefer, and their share of the batch.

        Preference as in the Q-filter of Nair et al. 2017, arXiv 1709.10089.
        """
        if not bool(batch.solved.any()):
            return residuals.new_zeros(()), residuals.new_zeros(())
        targets, proposals = batch.extras[TARGETS], batch.extras[PROPOSALS]
        with torch.no_grad():
            better = batch.solved & (self._judged(batch, targets) > values)
            wanted = ((targets - proposals) / self._residual.scale).clamp(-1, 1)
        weights = better.to(residuals.dtype)
        return ((residuals - wanted).square().mean(-1) * weights).mean(), weights.mean()

    def state_of(self) -> Mapping[str, Tensor]:
        """Target networks and the rewards' scale."""
        state = {f"target_critics/{name}": value for name, value in self.target_critics.state_dict().items()}
        state |= {f"target_actor/{name}": value for name, value in self.target_actor.state_dict().items()}
        return state | {"scales": torch.tensor([self._reward_scale, self._solved_value], dtype=torch.float64)}

    def restore_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_of` gave."""
        restore_parameters(self.target_critics.state_dict(), tensors, "target_critics/")
        restore_parameters(self.target_actor.state_dict(), tensors, "target_actor/")
        self._reward_scale, self._solved_value = tensors["scales"].tolist()


def _seen_by_actor(extras: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """What an actor sees beside the observations."""
    return extras[PROPOSALS], extras[FEATURES], extras.get(EMBEDDINGS)
