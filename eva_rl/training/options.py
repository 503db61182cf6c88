"""Options of the training loops, known without importing torch, so that a command answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eva_rl.options import COMPILE_MODES, FLOAT32, MANY, PRECISIONS, Options, option

LOSSES = ("mse", "l1")
AUTO = "auto"
MIN_REPLAY, MAX_REPLAY = 1_000, 10**10
"""Env steps of a replay."""


@dataclass
class OptimizerOptions(Options):
    """How the policy's trainable parameters are trained."""

    batch_size: int = option(64, "windows per gradient step", above=0)
    learning_rate: float = option(3e-4, "AdamW's learning rate", above=0)
    warmup_steps: int = option(100, "gradient steps of linear learning-rate warm-up", low=0, high=MANY)
    weight_decay: float = option(1e-4, "AdamW's weight decay, on matrices", low=0, high=10)
    gradient_clip: float = option(0.25, "largest norm of the gradient", above=0)


@dataclass
class BCOptions(OptimizerOptions):
    """How to clone.

    The learning rate rises linearly for ``warmup_steps`` gradient steps and then falls along a cosine. The parameters
    stay float32 in every precision, and the gradient is that of the whole batch however many microbatches it is taken
    in. With ``ema``, evaluation during and after that part of training, and what is kept at the end, are of the mean
    weights. Length and batches are those chosen in docs/learning_rates.md.
    """

    updates: int = option(100, "gradient steps", above=0)
    batch_size: int = option(32, "windows per gradient step", above=0)
    learning_rate: float = option(1e-3, "peak learning rate of AdamW", above=0)
    warmup_steps: int = option(20, "gradient steps of linear learning-rate warm-up", low=0, high=MANY)
    final_learning_rate: float = option(0.05, "end of the cosine, as a fraction of the peak", low=0, high=1)
    ema: float = option(
        0.0, "average the weights over this last fraction of the gradient steps; 0 disables", low=0, high=1
    )
    loss: str = option("mse", "mse or l1", choices=LOSSES)
    precision: str = option(
        FLOAT32,
        "float32, bfloat16 for mixed precision, or auto for what is faster on this machine",
        choices=(*PRECISIONS, AUTO),
    )
    accumulate: int = option(1, "microbatches per gradient step: more need less memory", above=0)
    compile: str = option(
        "none", "torch.compile: none, default or reduce-overhead (CUDA graphs)", choices=COMPILE_MODES
    )
    log_every: int = option(20, "gradient steps between logged training metrics", above=0)


def averaged_updates(ema: float, updates: int) -> int:
    """How many of the last gradient steps are averaged, by the share of all that are."""
    return math.ceil(ema * updates - 1e-9)  # 0.07 * 100 is a little above 7


@dataclass
class OnlineOptions(Options):
    """What all algorithms share that act in the environment."""

    env_steps: int = option(100_000, "total env steps", above=0)
    eval_every: int = option(10_000, "validate every N env steps; 0 disables", low=0, high=MANY)


@dataclass
class ReplayOptions(OptimizerOptions, OnlineOptions):
    """What the algorithms share that learn from a replay of whole episodes.

    Unfinished episodes are truncated where the policy is validated or saved, so that a resumed run meets the same
    episodes as one that was never interrupted; but never before every environment had the time for a whole episode,
    until when nothing is saved. The best validation is the one with the most success, ties broken by
    return, or by fewer env steps where episodes end at success.
    """

    steps_per_iteration: int = option(1_000, "env steps, over all environments, of an iteration", above=0)
    updates_per_iteration: int = option(100, "gradient steps of an iteration", above=0)
    learning_starts: int = option(0, "env steps before the first gradient step", low=0, high=MANY)
    checkpoint_every: int = option(10_000, "env steps between two checkpoints; 0 for none", low=0, high=MANY)
    keep_best: bool = option(False, "return the parameters with the best validation score instead of the last")
    demonstration_share: float = option(
        0.0, "share of a batch drawn from demonstrations; 0 draws them as often as other env steps", low=0, high=1
    )
    refresh_every: int = option(
        0, "EVA: compare directions with the current activations every N env steps; 0 disables", low=0, high=MANY
    )

    @property
    def total_updates(self) -> int:
        """Gradient steps, at most; those that ``updates_per_episode`` adds are not known beforehand."""
        iterations, before = (-(-steps // self.steps_per_iteration) for steps in (self.env_steps, self.learning_starts))
        return max(0, iterations - max(0, before - 1)) * self.updates_per_iteration


@dataclass
class SelfImitationOptions(ReplayOptions):
    """Self-imitation of solved episodes, with further attempts at those that failed.

    In each round the policy attempts new goals without exploration; from the starts at which it fails it tries again
    with noise until the task is solved. All that was solved is cloned, with a learning rate that falls to zero in every
    iteration; an iteration without a failure takes no gradient step. With ``restart`` every iteration clones anew, from
    the parameters before any cloning, as STaR does (arXiv 2203.14465, section 3.1), lest mistakes add up.
    """

    env_steps: int = option(20_000, "total env steps", above=0)
    eval_every: int = option(0, "validate every N env steps; 0 disables", low=0, high=MANY)
    steps_per_iteration: int = option(
        2_000, "env steps of an iteration at least: rounds are played to their end", above=0
    )
    restart: bool = option(True, "clone anew in every iteration, from the parameters before cloning, not go on")
    updates_per_iteration: int = option(
        100, "gradient steps of an iteration in which the policy failed; with restart=true at least so many", above=0
    )
    updates_per_episode: float = option(
        4.0,
        "restart=true: gradient steps for each demonstration and solved episode, where those are more",
        low=0,
        high=1000,
    )
    batch_size: int = option(32, "windows per gradient step", above=0)
    learning_rate: float = option(1e-3, "AdamW's learning rate", above=0)
    warmup_steps: int = option(20, "gradient steps of linear learning-rate warm-up", low=0, high=MANY)
    demonstration_share: float = option(0.25, "share of a batch drawn from demonstrations", low=0, high=1)
    retry_weight: float = option(
        10.0,
        "how many times as often solved retries are drawn as other solved episodes",
        low=0,
        high=100,
    )
    retries: int = option(4, "further attempts at a start from which the policy failed", low=0, high=1000)
    attempt_length: float = option(
        1.5,
        "give up an attempt after this many times the median length of demonstrations and solved episodes; 0 plays "
        "to the horizon",
        low=0,
        high=1000,
    )
    exploration_noise: float = option(
        0.1, "standard deviation of the noise on (scaled) actions of retries", low=0, high=2
    )
    noise_steps: float = option(10.0, "env steps over which the noise decorrelates; 0 draws it anew", low=0, high=MANY)
    snapshot: float = option(
        0.4,
        "share of the preceding cloning after which a snapshot of the parameters is taken, which plays every other "
        "retry, the first without noise; 0 takes none",
        low=0,
        high=1,
    )


@dataclass
class ODTOptions(ReplayOptions):
    """Online Decision Transformer.

    Env steps are drawn by the return of their episode above the worst one's, rather than uniformly as in the paper.
    """

    initial_temperature: float = option(0.02, "initial entropy weight (lambda)", above=0)
    temperature_learning_rate: float = option(
        1e-2, "Adam's learning rate for the logarithm of the entropy weight", above=0
    )
    by_return: bool = option(True, "draw env steps in proportion to their episode's return, not uniformly")
    target_entropy: float | None = option(None, "lower bound of the entropy in nats; null uses -2 x action dimensions")


@dataclass
class TD3Options(ReplayOptions):
    """TD3+ODT.

    The critics begin with Monte Carlo returns, since temporal differences take about 1 / (tau (1 - discount)) gradient
    steps to carry a return through an episode. The policy's critic term is divided by its mean magnitude (Fujimoto and
    Gu 2021, arXiv 2106.06860, equation 5).
    """

    eval_every: int = option(2_000, "validate every N env steps; 0 disables", low=0, high=MANY)
    updates_per_iteration: int = option(500, "gradient steps of an iteration", above=0)
    batch_size: int = option(32, "windows per gradient step", above=0)
    critic_learning_rate: float = option(1e-3, "Adam's learning rate, for the critics", above=0)
    critic_hidden_size: int = option(256, "width of the critics", above=0)
    critics: int = option(2, "critics; the target is the minimum over two of them, drawn at each step", low=2, high=100)
    discount: float = option(0.99, "gamma", low=0, high=1)
    tau: float = option(0.01, "soft update of the target networks, per gradient step", low=0, high=1)
    policy_delay: int = option(2, "gradient steps of the critics for one of the policy", above=0)
    critic_warmup: int = option(
        2_000, "critic warm-up: gradient steps on Monte Carlo returns before TD targets", low=0, high=MANY
    )
    exploration_noise: float = option(0.2, "standard deviation of the noise on (scaled) actions", low=0, high=2)
    target_noise: float = option(0.2, "standard deviation of the noise on target actions", low=0, high=2)
    target_noise_clip: float = option(0.5, "largest magnitude of that noise", low=0, high=2)
    q_coef: float = option(1.0, "weight of the critic in the policy's loss", low=0, high=1000)
    bc_coef: float = option(1.0, "weight of the error to the replay's actions in the policy's loss", low=0, high=1000)

    @property
    def total_updates(self) -> int:
        """Gradient steps of the policy, at most."""
        of_critics, delay = super().total_updates, self.policy_delay
        return max(0, -(-of_critics // delay) - -(-self.critic_warmup // delay))


@dataclass
class ResidualOptions(ReplayOptions):
    """Residual off-policy learning on the frozen policy.

    The first ``learning_starts`` env steps are the frozen policy's, with noise; the critics then learn its values for
    ``critic_warmup`` gradient steps before the actor moves.
    """

    eval_every: int = option(0, "validate every N env steps; 0 disables", low=0, high=MANY)
    steps_per_iteration: int = option(200, "env steps, over all environments, of an iteration", above=0)
    updates_per_iteration: int = option(200, "gradient steps of an iteration", above=0)
    learning_starts: int = option(
        2_000, "env steps of the frozen policy, with noise, before the first gradient step", low=0, high=MANY
    )
    batch_size: int = option(
        128, "transitions per gradient step; algo.demonstration_share of them are from demonstrations", above=1
    )
    learning_rate: float = option(3e-4, "AdamW's learning rate, for the actor", above=0)
    decay: float = option(
        0.5, "last part of the gradient steps, over which the actor's learning rate falls to zero", low=0, high=1
    )
    weight_decay: float = option(0.0, "AdamW's weight decay, on matrices", low=0, high=10)
    gradient_clip: float = option(1.0, "largest norm of the actor's gradient", above=0)
    critic_learning_rate: float = option(3e-4, "Adam's learning rate, for the critics", above=0)
    critic_hidden_size: int = option(256, "width of the critics", above=0)
    actor_hidden_size: int = option(256, "width of the residual actor", above=0)
    critics: int = option(5, "critics; the target is the minimum over two of them, drawn at each step", low=2, high=100)
    embedding_size: int = option(
        0, "width of the learned embeddings (SALE) that actor and critics see, too, such as 256; 0 for none", low=0
    )
    features: bool = option(True, "show the actor the frozen policy's hidden state, too")
    scale: float = option(1.0, "largest residual, on actions in [-1, 1]", above=0, high=2)
    n_step: int = option(3, "env steps of rewards before the critics' values take over", above=0)
    discount: float = option(0.99, "gamma", low=0, high=1)
    tau: float = option(0.005, "soft update of the target networks, per gradient step", low=0, high=1)
    policy_delay: int = option(4, "gradient steps of the critics for one of the actor", above=0)
    critic_warmup: int = option(
        2_000, "gradient steps in which the critics learn the frozen policy's values", low=0, high=MANY
    )
    exploration_noise: float = option(0.2, "standard deviation of the noise on (scaled) actions", low=0, high=2)
    target_noise: float = option(0.2, "standard deviation of the noise on target actions", low=0, high=2)
    demonstration_share: float = option(0.5, "share of a batch drawn from demonstrations", low=0, high=1)
    q_coef: float = option(1.0, "weight of the critics in the actor's loss", low=0, high=1000)
    bc_coef: float = option(
        0.1, "weight of cloning solved episodes where the critics prefer their actions", low=0, high=1000
    )
    size_coef: float = option(0.0, "weight of the residual's mean square in the actor's loss", low=0, high=1000)
    pessimism: float = option(
        0.5, "standard deviations over the critics that are subtracted from their mean for the actor", low=0, high=100
    )
    stop_at_success: bool = option(
        True, "end episodes of training at their first success, as if the highest reward followed for ever"
    )

    @property
    def total_updates(self) -> int:
        """Gradient steps of the actor, at most."""
        return self.actor_updates(super().total_updates)

    def actor_updates(self, of_critics: int) -> int:
        """Gradient steps of the actor among so many of the critics."""
        return max(0, -(-of_critics // self.policy_delay) - -(-self.critic_warmup // self.policy_delay))

    @property
    def least_env_steps(self) -> int:
        """Env steps with which the actor takes a gradient step, rounded up to whole iterations."""
        of_critics = math.ceil(self.critic_warmup / self.policy_delay) * self.policy_delay + 1
        before = max(1, math.ceil(self.learning_starts / self.steps_per_iteration))
        return (before - 1 + math.ceil(of_critics / self.updates_per_iteration)) * self.steps_per_iteration


@dataclass
class DistillOptions(BCOptions):
    """Cloning of the residual policy, first on the replay, then with env steps of the clone in every round."""

    updates: int = option(2_000, "gradient steps of each round, and of the first one on the replay", above=0)
    batch_size: int = option(64, "windows per gradient step", above=0)
    log_every: int = option(20, "without effect: the loss is recorded once a round", above=0)
    rounds: int = option(4, "DAgger rounds: the clone acts, the residual policy labels", low=0, high=100)
    env_steps: int = option(
        5_000,
        "env steps of the clone per round; part of algo.env_steps. Whole episodes of all environments are best",
        above=0,
    )
    noise: float = option(
        0.2,
        "largest standard deviation of the noise on scaled observations: what to do there is asked, too",
        low=0,
        high=10,
    )
    clone_share: float = option(
        0.5, "share of a batch from the clone's own env steps, where it has acted; 0 draws all alike", low=0, high=1
    )


@dataclass
class SB3Options(OnlineOptions):
    """What Stable-Baselines3's algorithms share."""

    learning_rate: float = option(1e-4, "Adam's learning rate", above=0)
    batch_size: int = option(64, "windows per gradient step", above=0)
    discount: float = option(0.99, "gamma", low=0, high=1)
    initial_std: float = option(0.2, "initial standard deviation of the actions", above=0)
    critic_hidden_size: int = option(256, "width of the value networks", above=0)


@dataclass
class PPOOptions(SB3Options):
    """Proximal policy optimisation (arXiv 1707.06347)."""

    batch_size: int = option(64, "windows per gradient step", above=1)
    rollout_steps: int = option(200, "env steps of each environment between two updates", above=0)
    epochs: int = option(5, "passes over a rollout", above=0)
    clip_range: float = option(0.2, "of the likelihood ratio", above=0)
    gae_lambda: float = option(0.95, "of generalised advantage estimation", low=0, high=1)
    entropy: float = option(0.0, "weight of the entropy", low=0, high=10)
    target_kl: float | None = option(0.03, "KL divergence at which an update ends early; null for no limit", above=0)


@dataclass
class OffPolicyOptions(SB3Options):
    """What SAC and TD3 share; TD3 (arXiv 1802.09477) has no more."""

    replay_size: int = option(200_000, "capacity in env steps; each is stored once", low=MIN_REPLAY, high=MAX_REPLAY)
    learning_starts: int = option(
        1_000, "env steps, of uniformly random actions, before the first gradient step", low=0, high=MANY
    )
    train_freq: int = option(10, "env steps of each environment between two updates", above=0)
    gradient_steps: int = option(10, "gradient steps of an update", above=0)
    tau: float = option(0.005, "soft update of the target networks, per gradient step", low=0, high=1)


@dataclass
class SACOptions(OffPolicyOptions):
    """Soft actor-critic (arXiv 1801.01290)."""

    entropy: float = option(
        0.01, "initial entropy weight, for a reward of 1 an env step; adapted during training", above=0, high=10
    )
