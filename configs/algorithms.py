"""The algorithms of ``algo=`` and their options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar

from eva_rl.adapters import Method
from eva_rl.configs.groups import (
    AlgoOptions,
    BCOptionsGroup,
)
from eva_rl.errors import UserError
from eva_rl.options import between, group, option, positive
from eva_rl.training.bc import BCOptions

MIN_REPLAY = 1_000


@dataclass
class BCFirstOptions(BCOptionsGroup):
    """Behaviour cloning before an online algorithm, or none."""

    least_updates: ClassVar[int] = 0


@dataclass
class OnlineAlgoOptions(AlgoOptions):
    """What the algorithms that act in the environment share.

    With ``bc.updates`` above 0 the policy clones the demonstrations first.
    """

    env_steps: int = option(100_000, "env steps in all")
    num_envs: int = option(10, "environments that the policy acts in at once, from no exploration to all of it")
    workers: int = option(0, "0 steps all environments in this process, 1 gives each a process of its own")
    eval_every: int = option(10_000, "env steps between two quick looks at validation episodes; 0 for none")
    checkpoint_every: int = option(10_000, "env steps between two checkpoints; 0 for none")
    target_scale: float = option(1.0, "the return asked for while collecting, over the one asked for in evaluations")
    bc: BCFirstOptions = group(partial(BCFirstOptions, updates=0), "behaviour cloning before; bc.updates=0 for none")

    def __post_init__(self) -> None:
        positive(algo__env_steps=self.env_steps, algo__num_envs=self.num_envs, algo__target_scale=self.target_scale)
        between(0, 1, algo__workers=self.workers)
        between(0, 10**9, algo__eval_every=self.eval_every, algo__checkpoint_every=self.checkpoint_every)

    @property
    def gradient_steps(self) -> int:
        """Gradient steps after cloning."""
        raise NotImplementedError

    @property
    def final_step(self) -> int:
        """Where the record ends, in env steps."""
        return self.env_steps


@dataclass
class ReplayAlgoOptions(OnlineAlgoOptions):
    """What the algorithms share that learn from a replay of whole episodes."""

    steps_per_iteration: int = option(1_000, "env steps between two bouts of gradient steps")
    updates_per_iteration: int = option(100, "gradient steps of a bout")
    random_steps: int = option(0, "env steps before the first gradient step")
    batch_size: int = option(64, "windows a gradient step")
    learning_rate: float = option(3e-4, "AdamW's learning rate")
    warmup: int = option(100, "gradient steps of linear warm-up")
    weight_decay: float = option(1e-4, "AdamW's weight decay, on matrices")
    gradient_clip: float = option(0.25, "largest norm of the gradient")
    replay_size: int = option(500_000, "env steps kept at most; the oldest episodes go first")
    replay_on_disk: bool = option(False, "keep the replay in run_dir/replay, mapped into memory")
    keep_best: bool = option(True, "end with the parameters that did best in the quick looks, not with the last ones")
    refresh_every: int = option(0, "EVA: env steps between two looks at whether the activations moved; 0 for none")
    refresh_below: float = option(0.8, "EVA: overlap with current directions below which unused ones are reinitialised")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            algo__steps_per_iteration=self.steps_per_iteration,
            algo__updates_per_iteration=self.updates_per_iteration,
            algo__batch_size=self.batch_size,
            algo__learning_rate=self.learning_rate,
            algo__gradient_clip=self.gradient_clip,
        )
        between(0, 10**9, algo__random_steps=self.random_steps, algo__warmup=self.warmup)
        between(0, 10**9, algo__refresh_every=self.refresh_every)
        between(0, 1, algo__refresh_below=self.refresh_below)
        between(0, 10, algo__weight_decay=self.weight_decay)
        between(MIN_REPLAY, 10**10, algo__replay_size=self.replay_size)

    @property
    def gradient_steps(self) -> int:
        """Gradient steps after cloning."""
        return -(-self.env_steps // self.steps_per_iteration) * self.updates_per_iteration


@dataclass
class ODTAlgoOptions(ReplayAlgoOptions):
    """Online Decision Transformer (arXiv 2202.05607)."""

    initial_std: float = option(0.1, "standard deviation, before the tanh, that a deterministic policy begins with")
    initial_temperature: float = option(0.02, "weight of the entropy at first")
    temperature_learning_rate: float = option(1e-2, "Adam's, for the logarithm of that weight")
    by_return: bool = option(True, "draw env steps in proportion to their episode's return, not all alike")
    target_entropy: float | None = option(None, "lower bound of the entropy in nats; null takes -2 x action dimensions")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            algo__initial_std=self.initial_std,
            algo__initial_temperature=self.initial_temperature,
            algo__temperature_learning_rate=self.temperature_learning_rate,
        )


@dataclass
class ODTTD3AlgoOptions(ReplayAlgoOptions):
    """Decision Transformer with twin critics (arXiv 2410.24108)."""

    num_envs: int = option(5, "environments that the policy acts in at once, from no exploration to all of it")
    eval_every: int = option(2_000, "env steps between two quick looks at validation episodes; 0 for none")
    updates_per_iteration: int = option(500, "gradient steps of a bout")
    batch_size: int = option(32, "windows a gradient step")
    critic_learning_rate: float = option(1e-3, "Adam's, for the critics")
    critic_hidden_size: int = option(256, "width of the critics")
    discount: float = option(0.99, "gamma")
    target_share: float = option(0.01, "share by which target networks move at each gradient step")
    policy_delay: int = option(2, "gradient steps of the critics for one of the policy")
    critic_warmup: int = option(2_000, "gradient steps in which the critics learn the returns obtained so far")
    exploration_noise: float = option(0.2, "standard deviation of the noise on actions, in scaled actions")
    target_noise: float = option(0.2, "standard deviation of the noise on target actions")
    target_noise_clip: float = option(0.5, "its largest magnitude")
    q_weight: float = option(1.0, "weight of the critics beside the distance to the actions taken")
    clone_weight: float = option(1.0, "weight of the distance to the actions taken")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            algo__critic_learning_rate=self.critic_learning_rate,
            algo__critic_hidden_size=self.critic_hidden_size,
            algo__policy_delay=self.policy_delay,
        )
        between(0, 1, algo__discount=self.discount, algo__target_share=self.target_share)
        between(0, 2, algo__exploration_noise=self.exploration_noise, algo__target_noise=self.target_noise)
        between(0, 1000, algo__q_weight=self.q_weight, algo__clone_weight=self.clone_weight)
        between(0, 10**9, algo__critic_warmup=self.critic_warmup)


@dataclass
class SB3AlgoOptions(OnlineAlgoOptions):
    """What Stable-Baselines3's algorithms share."""

    learning_rate: float = option(1e-4, "Adam's learning rate")
    batch_size: int = option(64, "windows a gradient step")
    discount: float = option(0.99, "gamma")
    initial_std: float = option(0.2, "standard deviation of the actions at first")
    critic_hidden_size: int = option(256, "width of the value networks")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            algo__learning_rate=self.learning_rate,
            algo__batch_size=self.batch_size,
            algo__initial_std=self.initial_std,
            algo__critic_hidden_size=self.critic_hidden_size,
        )
        between(0, 1, algo__discount=self.discount)


@dataclass
class PPOAlgoOptions(SB3AlgoOptions):
    """Proximal policy optimisation (arXiv 1707.06347)."""

    rollout_steps: int = option(200, "env steps of each environment between two updates")
    epochs: int = option(5, "passes over a rollout")
    clip_range: float = option(0.2, "of the likelihood ratio")
    gae_lambda: float = option(0.95, "of generalised advantage estimation")
    entropy: float = option(0.0, "weight of the entropy")
    target_kl: float | None = option(0.03, "KL divergence at which an update ends early; null for no limit")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(algo__rollout_steps=self.rollout_steps, algo__epochs=self.epochs, algo__clip_range=self.clip_range)
        between(0, 1, algo__gae_lambda=self.gae_lambda)
        between(0, 10, algo__entropy=self.entropy)

    @property
    def gradient_steps(self) -> int:
        """Gradient steps after cloning."""
        return max(1, self.env_steps * self.epochs // self.batch_size)


@dataclass
class OffPolicyAlgoOptions(SB3AlgoOptions):
    """What SAC and TD3 share."""

    replay_size: int = option(200_000, "env steps kept at most; each is stored once")
    random_steps: int = option(1_000, "env steps before the first gradient step")
    train_every: int = option(10, "env steps of each environment between two bouts of gradient steps")
    updates_per_bout: int = option(10, "gradient steps of a bout")
    target_share: float = option(0.005, "share by which target networks move at each gradient step")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(algo__train_every=self.train_every, algo__updates_per_bout=self.updates_per_bout)
        between(MIN_REPLAY, 10**10, algo__replay_size=self.replay_size)
        between(0, 10**9, algo__random_steps=self.random_steps)
        between(0, 1, algo__target_share=self.target_share)

    @property
    def gradient_steps(self) -> int:
        """Gradient steps after cloning."""
        return max(1, self.env_steps // (self.train_every * self.num_envs) * self.updates_per_bout)


@dataclass
class SACAlgoOptions(OffPolicyAlgoOptions):
    """Soft actor-critic (arXiv 1801.01290)."""

    entropy: float = option(0.01, "weight of the entropy at first; it is adapted")


_REPLAYED: Mapping[str, type[OnlineAlgoOptions]] = {"odt": ODTAlgoOptions, "odt_td3": ODTTD3AlgoOptions}
SB3_ALGORITHMS: Mapping[str, type[SB3AlgoOptions]] = {
    "ppo": PPOAlgoOptions,
    "sac": SACAlgoOptions,
    "td3": OffPolicyAlgoOptions,
}
_ONLINE: Mapping[str, type[OnlineAlgoOptions]] = {**_REPLAYED, **SB3_ALGORITHMS}
BC_FIRST = "bc_then_"

ALGORITHMS: Mapping[str, AlgoOptions] = {
    "bc": BCOptionsGroup(),
    **{name: kind(name=name) for name, kind in _ONLINE.items()},
    **{BC_FIRST + name: kind(name=BC_FIRST + name, bc=BCFirstOptions(updates=200)) for name, kind in _ONLINE.items()},
}
"""What ``algo=`` takes, with the options that each begins with."""


def check_method(algo: AlgoOptions, method: Method) -> None:
    """Raise unless an algorithm can train an adapter's method.

    Raises:
        UserError: The method prunes while it trains, and the algorithm is Stable-Baselines3's; or EVA's directions are
            to be refreshed, and the method has none that stay.
    """
    if isinstance(algo, SB3AlgoOptions) and method.adalora:
        raise UserError(
            f"adapter={method.name} prunes while it trains, in our own loops; algo={algo.name} is Stable-Baselines3's. "
            "Use adapter=eva, or algo=odt_td3."
        )
    if isinstance(algo, ReplayAlgoOptions) and algo.refresh_every and (not method.eva or method.adalora):
        raise UserError(
            f"algo.refresh_every={algo.refresh_every} looks after EVA's directions; adapter={method.name} has none "
            "that stay. Use adapter=eva, eva_dora or eva_rslora, or algo.refresh_every=0."
        )


def bc_options(algo: BCOptionsGroup, eval_every: int, checkpoint_every: int) -> BCOptions:
    """Options of the training loop: those of the config group that it has, under the names they share."""
    shared = {f.name: getattr(algo, f.name) for f in fields(BCOptions) if hasattr(algo, f.name)}
    return BCOptions(**shared, eval_every=eval_every, checkpoint_every=checkpoint_every)
