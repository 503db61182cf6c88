"""The algorithms of ``algo=`` and their options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from eva_rl.commands.options import AlgoOptions, BCOptionsGroup, between, group, option, positive

MIN_REPLAY = 1_000


@dataclass
class OnlineAlgoOptions(AlgoOptions):
    """What the algorithms that act in the environment share.

    With ``bc.updates`` above 0 the policy clones the demonstrations first.
    """

    env_steps: int = option(100_000, "env steps in all")
    num_envs: int = option(10, "environments that the policy acts in at once")
    workers: int = option(0, "0 steps all environments in this process, 1 gives each a process of its own")
    eval_every: int = option(10_000, "env steps between two quick looks at validation episodes; 0 for none")
    checkpoint_every: int = option(10_000, "env steps between two checkpoints; 0 for none")
    target_scale: float = option(1.0, "the return asked for while collecting, over the one asked for in evaluations")
    bc: BCOptionsGroup = group(partial(BCOptionsGroup, updates=0), "behaviour cloning before; bc.updates=0 for none")

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
    refresh_every: int = option(0, "EVA: env steps between two looks at whether the activations moved; 0 for none")
    refresh_below: float = option(0.8, "EVA: overlap of old and new directions under which they are aimed again")

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

    initial_std: float = option(0.2, "standard deviation, before the tanh, that a deterministic policy begins with")
    initial_temperature: float = option(0.1, "weight of the entropy at first")
    temperature_learning_rate: float = option(1e-4, "Adam's, for the logarithm of that weight")
    target_entropy: float | None = option(None, "lower bound of the entropy in nats; null takes -action dimensions")

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

    critic_learning_rate: float = option(3e-4, "Adam's, for the critics")
    critic_hidden_size: int = option(256, "width of the critics")
    discount: float = option(0.99, "gamma")
    target_share: float = option(0.005, "share by which target networks move at each gradient step")
    policy_delay: int = option(2, "gradient steps of the critics for one of the policy")
    critic_warmup: int = option(500, "gradient steps of the critics before the policy's first")
    exploration_noise: float = option(0.1, "standard deviation of the noise on actions, in scaled actions")
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


_ONLINE: Mapping[str, type[OnlineAlgoOptions]] = {"odt": ODTAlgoOptions, "odt_td3": ODTTD3AlgoOptions}
_BC_FIRST = "bc_then_"

ALGORITHMS: Mapping[str, AlgoOptions] = {
    "bc": BCOptionsGroup(),
    **{name: kind(name=name) for name, kind in _ONLINE.items()},
    **{_BC_FIRST + name: kind(name=_BC_FIRST + name, bc=BCOptionsGroup(updates=200)) for name, kind in _ONLINE.items()},
}
"""What ``algo=`` takes, with the options that each begins with."""
