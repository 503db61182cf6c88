"""TD3+ODT: supervised Decision Transformer loss plus a TD3 policy gradient (arXiv 2410.24108)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from eva_rl.agents.policy import DecisionTransformerPolicy, frozen
from eva_rl.batch import TransitionWindows
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.errors import UserError
from eva_rl.training.bc import Extension
from eva_rl.training.critics import CriticEnsemble, fitting_scale, polyak_update, random_pair, td_targets
from eva_rl.training.failures import NotFiniteError
from eva_rl.training.learner import Choice, Explore, Learner, named, noise_levels, step_generators
from eva_rl.training.losses import masked_mean
from eva_rl.training.optimizer import restore_parameters
from eva_rl.training.options import TD3Options


def check_context(policy: DecisionTransformerPolicy) -> None:
    """Raise unless the policy sees two env steps at once: the critics learn from pairs of them.

    Raises:
        UserError: It sees one.
    """
    if policy.network.config.context_length < 2:
        raise UserError(
            "algo=odt_td3 learns from pairs of env steps in the policy's context, and this policy's context_length is "
            "1. Use algo=residual or algo=sac."
        )


class TD3DecisionTransformer(Learner):
    """A deterministic Decision Transformer with an ensemble of critics, two in the paper.

    Departures from the paper, both so that one setting fits tasks with rewards of any size: rewards are divided by
    the mean magnitude of discounted returns when training begins, or once that is several times as large, and the
    critic's gradient by that of its values.

    Args:
        policy: Its trainable parameters are changed in place.
        options: Hyperparameters.
        seed: Of all random draws and of the critics' first parameters.
        extension: What the adapter's method adds.

    Raises:
        UserError: See :func:`check_context`.
    """

    def __init__(
        self,
        policy: DecisionTransformerPolicy,
        options: TD3Options,
        *,
        seed: int = 0,
        extension: Extension | None = None,
    ) -> None:
        check_context(policy)
        super().__init__(policy, options, seed=seed, extension=extension)
        self._td3 = options
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            dims = (policy.observation_dim, policy.action_dim)
            self.critics = CriticEnsemble(*dims, options.critic_hidden_size, options.critics)
        self.critics.to(policy.device)
        self.target_critics = copy.deepcopy(self.critics)
        self.target_network = copy.deepcopy(policy.network)
        self._critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=options.critic_learning_rate)
        self.add("critics", named(self.critics), self._critic_optimizer)
        self._reward_scale = 0.0

    def begin_iteration(self, replay: TrajectoryReplay, *, env_steps: int = 0, updates: int = 0) -> int:
        """As the parent; find the rewards' scale."""
        self._reward_scale = fitting_scale(
            self._reward_scale, replay.mean_discounted_return, self.critics, self.target_critics, self._critic_optimizer
        )
        return super().begin_iteration(replay)

    def explore(self, generator: torch.Generator) -> Explore:
        """The policy's own actions with Gaussian noise, times each environment's level."""
        std = self._td3.exploration_noise

        def choose(features: Tensor, _: Tensor) -> Choice:
            actions = self.policy.network.actions(features)
            noise = std * noise_levels(len(actions)) * torch.randn(actions.shape, generator=generator)
            return Choice(actions + noise.to(actions.device))

        return choose

    def update(self, replay: TrajectoryReplay, update: int) -> dict[str, float]:
        """One gradient step on the critics, and at every ``policy_delay``-th one on the policy."""
        rng, generator = step_generators(self.seed, update)
        share, size = self.options.demonstration_share, self.options.batch_size
        batch = replay.sample_transitions(size, rng, self.context_length, self.scaling, demonstration_share=share)
        batch = batch.to(self.policy.device)
        metrics = self._update_critics(batch, generator, update)
        if update >= self._td3.critic_warmup and update % self._td3.policy_delay == 0:
            metrics |= self._update_policy(batch, update)
            polyak_update(self.target_network, self.policy.network, min(1.0, self._td3.tau * self._td3.policy_delay))
        warming = update < self._td3.critic_warmup
        polyak_update(self.target_critics, self.critics, 1.0 if warming else self._td3.tau)
        return metrics

    def targets(self, batch: TransitionWindows, generator: torch.Generator) -> Tensor:
        """TD targets of each transition, (B, T - 1)."""
        options, observations = self._td3, batch.windows.observations
        with frozen(self.target_network), torch.no_grad():
            actions = self.target_network(batch.windows)[:, 1:]
            noise = torch.randn(actions.shape, generator=generator).to(actions.device) * options.target_noise
            noise = noise.clamp(-options.target_noise_clip, options.target_noise_clip)
            pair = random_pair(options.critics, generator).to(actions.device)
            next_values = self.target_critics.min_of(observations[:, 1:], (actions + noise).clamp(-1, 1), pair)
        return td_targets(self._scaled(batch.rewards[:, :-1]), batch.terminated[:, :-1], next_values, options.discount)

    def _scaled(self, rewards: Tensor) -> Tensor:
        """Rewards or returns over their scale, which is not known while all were zero."""
        return rewards / (self._reward_scale or 1.0)

    def _update_critics(self, batch: TransitionWindows, generator: torch.Generator, update: int) -> dict[str, float]:
        if warming := update < self._td3.critic_warmup:
            targets = self._scaled(batch.returns[:, :-1])
        else:
            targets = self.targets(batch, generator)
        values = self.critics(batch.windows.observations[:, :-1], batch.windows.actions[:, :-1])
        counted = batch.valid & batch.complete if warming else batch.valid
        loss = masked_mean((values - targets).square().sum(0), counted)
        self._critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if not bool(torch.isfinite(loss)):
            raise NotFiniteError("the critics' loss", update, batch.windows)
        self._critic_optimizer.step()
        return {"train/critic_loss": loss.item(), "train/q": masked_mean(values[0].detach(), batch.valid).item()}

    def _update_policy(self, batch: TransitionWindows, update: int) -> dict[str, float]:
        windows = batch.windows
        actions = self.policy.network(windows)
        labels = windows.actions if windows.target_actions is None else windows.target_actions
        distance = masked_mean((actions - labels).square().mean(-1), batch.acted & batch.complete)
        values = self.critics(windows.observations, actions).mean(0)
        gain = masked_mean(values, batch.acted) / masked_mean(values.detach().abs(), batch.acted).clamp(min=1e-6)
        loss = self._td3.bc_coef * distance - self._td3.q_coef * gain
        norm = self.step_actor(loss, update, windows)
        return {"train/loss": loss.item(), "train/clone_loss": distance.item(), "train/gradient_norm": norm}

    def forget(self, changed: Sequence[nn.Parameter]) -> None:
        """As the parent does; the target network takes the new coordinates over as they are."""
        super().forget(changed)
        identities, slow = {id(parameter) for parameter in changed}, self._slow()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if id(parameter) in identities:
                    slow[name].copy_(parameter)

    def state_of(self) -> Mapping[str, Tensor]:
        """Target networks and the rewards' scale."""
        state = {f"target_critics/{name}": value for name, value in self.target_critics.state_dict().items()}
        for name, parameter in self._slow().items():
            state[f"target_network/{name}"] = parameter.data
        return state | {"reward_scale": torch.tensor(self._reward_scale, dtype=torch.float64)}

    def restore_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_of` gave."""
        restore_parameters(self.target_critics.state_dict(), tensors, "target_critics/")
        restore_parameters(self._slow(), tensors, "target_network/")
        trained, kept = self.parameters, named(self.policy.network)
        restore_parameters({n: p for n, p in named(self.target_network).items() if n not in trained}, kept, "")
        self._reward_scale = float(tensors["reward_scale"])

    def _slow(self) -> dict[str, nn.Parameter]:
        own = named(self.target_network)
        return {name: own[name] for name in self.parameters}
