"""Online Decision Transformer (Zheng et al. 2022, arXiv 2202.05607), written from the paper."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.agents.stochastic import gaussian_log_prob, raw_log_prob, sample_actions, sample_raw
from eva_rl.batch import WindowBatch
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.training.bc import Extension
from eva_rl.training.learner import Choice, Explore, Learner, noise_levels, step_generators
from eva_rl.training.losses import masked_mean
from eva_rl.training.options import ODTOptions

SATURATED = 0.99
"""Actions beyond count as this one: experts saturate, and at the bound itself a tanh-Gaussian has no likelihood."""


@dataclass(frozen=True)
class ODTLoss:
    """Parts of the loss of one batch, scalars.

    Attributes:
        likelihood: Mean negative log-likelihood of the actions taken, in nats an env step.
        entropy: Mean entropy of the policy, estimated with one draw an env step.
    """

    likelihood: Tensor
    entropy: Tensor


def odt_loss(
    distribution: tuple[Tensor, Tensor], actions: Tensor, mask: Tensor | None, generator: torch.Generator
) -> ODTLoss:
    """Equations 5 to 7 of the paper, over the real env steps of the windows.

    Args:
        distribution: Mean and log standard deviation before the tanh, (B, T, act) each.
        actions: (B, T, act), what was done.
        mask: (B, T), True where a step is real; None says that all are.
        generator: Draws the actions for the entropy.
    """
    drawn, done = sample_raw(*distribution, generator), actions.clamp(-SATURATED, SATURATED)
    return ODTLoss(
        likelihood=-masked_mean(gaussian_log_prob(done, *distribution), mask),
        entropy=-masked_mean(raw_log_prob(drawn, *distribution), mask),
    )


class OnlineDecisionTransformer(Learner):
    """Maximum likelihood on hindsight-relabelled returns with an entropy constraint.

    Args:
        policy: With a log-standard-deviation head; its trainable parameters are changed in place.
        options: Hyperparameters.
        seed: Of all random draws; those of gradient step n depend on the seed and n alone.
        extension: What the adapter's method adds.
    """

    def __init__(
        self,
        policy: DecisionTransformerPolicy,
        options: ODTOptions,
        *,
        seed: int = 0,
        extension: Extension | None = None,
    ) -> None:
        super().__init__(policy, options, seed=seed, extension=extension)
        bound, self._by_return = options.target_entropy, options.by_return
        self._target_entropy = -2.0 * policy.action_dim if bound is None else bound
        self._log_temperature = nn.Parameter(torch.tensor(float(np.log(options.initial_temperature))))
        self._temperature_optimizer = torch.optim.Adam([self._log_temperature], lr=options.temperature_learning_rate)
        self.add("temperature", {"log": self._log_temperature}, self._temperature_optimizer)

    def explore(self, generator: torch.Generator) -> Explore:
        """Actions drawn from the policy, with its standard deviation times each environment's level."""
        network = self.policy.network

        def choose(features: Tensor, _: Tensor) -> Choice:
            mean, log_std = network.distribution(features)
            levels = noise_levels(len(mean)).clamp(min=1e-6).to(mean.device)
            return Choice(sample_actions(mean, log_std + levels.log(), generator))

        return choose

    def update(self, replay: TrajectoryReplay, update: int) -> dict[str, float]:
        """One gradient step on the policy and one on the temperature."""
        rng, generator = step_generators(self.seed, update)
        batch = replay.sample(
            self.options.batch_size,
            rng,
            self.context_length,
            self.scaling,
            by_return=self._by_return,
            demonstration_share=self.options.demonstration_share,
        ).to(self.policy.device)
        found = self._loss(batch, generator)
        temperature = self._log_temperature.exp()
        loss = found.likelihood - temperature.detach() * found.entropy
        norm = self.step_actor(loss, update, batch)
        self._step_temperature(temperature * (found.entropy.detach() - self._target_entropy))
        return {
            "train/loss": loss.item(),
            "train/nll": found.likelihood.item(),
            "train/entropy": found.entropy.item(),
            "train/temperature": temperature.item(),
            "train/gradient_norm": norm,
        }

    def _loss(self, batch: WindowBatch, generator: torch.Generator) -> ODTLoss:
        network = self.policy.network
        distribution = network.distribution(network.features(batch))
        wanted = batch.actions if batch.target_actions is None else batch.target_actions
        return odt_loss(distribution, wanted, batch.attention_mask, generator)

    def _step_temperature(self, loss: Tensor) -> None:
        self._temperature_optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._temperature_optimizer.step()
