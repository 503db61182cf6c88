"""The algorithms of ``algo=``: each is its loop's own options, with the command's beside them.

The loop's options come first among the bases, so that what a loop says of a field it shares holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

from eva_rl.adapters import METHODS, Method
from eva_rl.adapters.methods import LEAST_UPDATES, adalora_schedule
from eva_rl.configs.groups import AlgoOptions
from eva_rl.errors import UserError
from eva_rl.options import Options, group, option
from eva_rl.training.options import (
    MAX_REPLAY,
    MIN_REPLAY,
    BCOptions,
    DistillOptions,
    ODTOptions,
    OffPolicyOptions,
    OnlineOptions,
    PPOOptions,
    ReplayOptions,
    ResidualOptions,
    SACOptions,
    SelfImitationOptions,
    TD3Options,
    averaged_updates,
)

AUTO = "auto"
"""The learning rate that suits what is trained."""


class RateByAdapter(Options):
    """Options whose learning rate may be left to the adapter's method; no dataclass, so that it adds no defaults."""

    learning_rate: float | str

    @property
    def share(self) -> float:
        """Of the learning rate that suits cloning."""
        return 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.learning_rate, str) and self.learning_rate != AUTO:
            raise UserError(f"{self.PREFIX}learning_rate={self.learning_rate}: expected a number or {AUTO}.")

    def with_default(self, learning_rate: float) -> Self:
        """With a share of the rate that suits cloning, where none is given."""
        if self.learning_rate != AUTO:
            return self
        return replace(self, learning_rate=self.share * learning_rate)  # type: ignore[type-var]  # they are dataclasses


@dataclass
class BCAlgo(RateByAdapter, BCOptions, AlgoOptions):
    """Behaviour cloning."""

    learning_rate: float | str = option(  # type: ignore[assignment]  # a number once the command's config is made
        AUTO, "peak learning rate of AdamW; auto chooses by adapter (pretraining: 0.001)", above=0
    )

    @property
    def total_updates(self) -> int:
        """Gradient steps of the whole training."""
        return self.updates

    @property
    def final_step(self) -> int:
        """Where the record ends, in gradient steps."""
        return self.updates


@dataclass
class BCFirst(BCAlgo):
    """Behaviour cloning before an online algorithm, or none."""

    PREFIX: ClassVar[str] = "algo.bc."
    updates: int = option(0, "gradient steps", low=0)


@dataclass
class OnlineAlgo(OnlineOptions, AlgoOptions):
    """What the command adds to every algorithm that acts in the environment.

    With ``bc.updates`` above 0 the policy clones the demonstrations first.
    """

    num_envs: int = option(10, "parallel environments", above=0)
    workers: int = option(
        0, "0: all environments in this process (DummyVecEnv); 1: a process for each (SubprocVecEnv)", low=0, high=1
    )
    bc: BCFirst = group(BCFirst, "behaviour cloning before; algo.bc.updates=0 for none")

    @property
    def adapter_updates(self) -> int:
        """All gradient steps that the adapter will see."""
        return self.bc.updates + self.total_updates

    @property
    def final_step(self) -> int:
        """Where the record ends, in env steps."""
        return self.env_steps


@dataclass
class ReplayAlgo(OnlineAlgo):
    """What the command adds to the algorithms that learn from a replay of whole episodes."""

    replay_size: int = option(
        500_000, "capacity in env steps; the oldest episodes are dropped first", low=MIN_REPLAY, high=MAX_REPLAY
    )
    replay_on_disk: bool = option(False, "keep the replay in run_dir/replay, mapped into memory")
    refresh_below: float = option(
        0.8, "EVA: overlap with current directions below which unused ones are reinitialised", low=0, high=1
    )


@dataclass
class ODTAlgo(ODTOptions, ReplayAlgo):
    """Online Decision Transformer (arXiv 2202.05607)."""

    num_envs: int = option(10, "parallel environments, from no exploration noise to all of it", above=0)
    initial_std: float = option(
        0.1, "standard deviation, before the tanh, that a deterministic policy begins with", above=0
    )


@dataclass
class ODTTD3Algo(TD3Options, ReplayAlgo):
    """Decision Transformer with twin critics (arXiv 2410.24108)."""

    num_envs: int = option(5, "parallel environments, from no exploration noise to all of it", above=0)


@dataclass
class SelfImitationAlgo(RateByAdapter, SelfImitationOptions, ReplayAlgo):
    """Self-imitation of solved episodes, with retries of those that fail (after arXiv 1806.05635)."""

    learning_rate: float | str = option(  # type: ignore[assignment]  # a number once the command's config is made
        AUTO,
        "peak learning rate of AdamW; auto uses what suits cloning with the adapter (a fifth with algo.restart=false)",
        above=0,
    )

    @property
    def share(self) -> float:
        """All of it for cloning anew, less for going on with parameters that solve the task at times."""
        return 1.0 if self.restart else 0.2


@dataclass
class DistillAlgo(RateByAdapter, DistillOptions):
    """Cloning of the residual policy into the policy itself."""

    PREFIX: ClassVar[str] = "algo.distill."
    learning_rate: float | str = option(  # type: ignore[assignment]  # a number once the command's config is made
        AUTO, "peak learning rate of AdamW; auto chooses by adapter", above=0
    )


@dataclass
class ResidualAlgo(ResidualOptions, ReplayAlgo):
    """Residual reinforcement learning on the frozen policy, then distilled into it."""

    num_envs: int = option(5, "parallel environments, from no exploration noise to all of it", above=0)
    distill: DistillAlgo = group(DistillAlgo, "cloning of the residual policy afterwards")

    @property
    def total_updates(self) -> int:
        """Gradient steps of distillation; residual learning takes none on the adapter."""
        return self.distill.updates * (1 + self.distill.rounds)

    @property
    def residual_env_steps(self) -> int:
        """Env steps before distillation."""
        return self.env_steps - self.distill.rounds * self.distill.env_steps

    @property
    def learner_options(self) -> ResidualOptions:
        """Of residual learning alone, without distillation's env steps."""
        own = {field.name: getattr(self, field.name) for field in fields(ResidualOptions)}
        return ResidualOptions(**own | {"env_steps": self.residual_env_steps})

    def __post_init__(self) -> None:
        super().__post_init__()
        taken = self.env_steps - self.residual_env_steps
        if self.residual_env_steps < 1:
            raise UserError(
                f"algo.env_steps={self.env_steps} leaves none for training: algo.distill.rounds={self.distill.rounds} "
                f"take {self.distill.env_steps} each. Increase it, or set algo.distill.rounds=0."
            )
        if not self.learner_options.total_updates:
            raise UserError(
                f"algo.env_steps={self.env_steps} ends before the actor's first gradient step: distillation takes "
                f"{taken}, algo.learning_starts={self.learning_starts} come before the first gradient step, and "
                f"algo.critic_warmup={self.critic_warmup} of these are the critics' alone. Type "
                f"algo.env_steps={taken + self.least_env_steps} or more (the actor needs thousands of gradient steps), "
                "or lower one of the others."
            )


@dataclass
class PPOAlgo(PPOOptions, OnlineAlgo):
    """Proximal policy optimisation (arXiv 1707.06347)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout_steps * self.num_envs < 2:
            raise UserError(
                "algo.rollout_steps=1 algo.num_envs=1: advantages of one env step have no spread. Increase one of them."
            )
        rollout = self.rollout_steps * self.num_envs
        if self.env_steps < rollout:
            raise UserError(
                f"algo.env_steps={self.env_steps}: PPO plays whole rollouts of algo.rollout_steps={self.rollout_steps} "
                f"in each of algo.num_envs={self.num_envs} environments, {rollout} env steps. Type "
                f"algo.env_steps={rollout} or more, or lower one of the others."
            )

    @property
    def total_updates(self) -> int:
        """Gradient steps after cloning."""
        return max(1, self.env_steps * self.epochs // self.batch_size)


@dataclass
class TD3Algo(OffPolicyOptions, OnlineAlgo):
    """Twin delayed DDPG (arXiv 1802.09477)."""

    @property
    def total_updates(self) -> int:
        """Gradient steps after cloning."""
        return max(1, self.env_steps // (self.train_freq * self.num_envs) * self.gradient_steps)


@dataclass
class SACAlgo(SACOptions, TD3Algo):
    """Soft actor-critic (arXiv 1801.01290)."""


SB3Algo = PPOAlgo | SACAlgo | TD3Algo
_ONLINE: Mapping[str, type[OnlineAlgo]] = {
    "self_imitation": SelfImitationAlgo,
    "odt_td3": ODTTD3Algo,
    "odt": ODTAlgo,
    "residual": ResidualAlgo,
    "ppo": PPOAlgo,
    "sac": SACAlgo,
    "td3": TD3Algo,
}
BC_FIRST = "bc_then_"

ALGORITHMS: Mapping[str, AlgoOptions] = {
    "bc": BCAlgo(),
    **{name: kind(name=name) for name, kind in _ONLINE.items()},
    **{
        BC_FIRST + name: kind(name=BC_FIRST + name, bc=BCFirst(updates=BCOptions.updates))
        for name, kind in _ONLINE.items()
    },
}
"""What ``algo=`` takes, with the options that each begins with."""


def for_method(algo: AlgoOptions, name: str) -> AlgoOptions:
    """The options with the learning rates that a method takes, where none are given.

    Args:
        algo: What ``algo=`` says.
        name: What ``adapter=`` says.
    """
    learning_rate = METHODS[name].learning_rate
    if isinstance(algo, RateByAdapter):
        algo = algo.with_default(learning_rate)
    if isinstance(algo, ResidualAlgo):
        algo = replace(algo, distill=algo.distill.with_default(learning_rate))
    return replace(algo, bc=algo.bc.with_default(learning_rate)) if isinstance(algo, OnlineAlgo) else algo


def clonings(algo: AlgoOptions) -> list[tuple[BCOptions, int]]:
    """The options of each cloning, of distillation as its first round, with the gradient steps before it.

    Args:
        algo: What ``algo=`` says.
    """
    if isinstance(algo, BCAlgo):
        return [(algo, 0)]
    found: list[tuple[BCOptions, int]] = []
    if isinstance(algo, OnlineAlgo) and algo.bc.updates:
        found.append((algo.bc, 0))
    if isinstance(algo, ResidualAlgo):
        found.append((algo.distill, algo.bc.updates))
    return found


def check_method(algo: AlgoOptions, method: Method, variant: str | None = None) -> None:
    """Raise unless an algorithm can train an adapter's method.

    Args:
        algo: What trains.
        method: What is trained.
        variant: Of EVA's directions.

    Raises:
        UserError: The method prunes while it trains or has two learning rates, and the algorithm is
            Stable-Baselines3's; there are too few gradient steps to prune in, or weights are averaged while it does;
            or EVA's directions are to be refreshed, and the method has none that stay, or a variant of them.
    """
    if isinstance(algo, SB3Algo) and method.adalora:
        raise UserError(
            f"adapter={method.name} prunes while it trains, in our own loops; algo={algo.name} is Stable-Baselines3's. "
            "Use adapter=eva, or algo=odt_td3."
        )
    if method.adalora:
        _check_pruning(algo, method)
    if isinstance(algo, SB3Algo) and method.plus:
        raise UserError(
            f"adapter={method.name} gives B a learning rate of its own, in our own loops; algo={algo.name} is "
            "Stable-Baselines3's. Use adapter=lora, or algo=odt_td3."
        )
    if isinstance(algo, ReplayOptions) and algo.refresh_every:
        _check_refresh(algo, algo.refresh_every, method, variant)


def _check_pruning(algo: AlgoOptions, method: Method) -> None:
    total = algo.adapter_updates
    if total < LEAST_UPDATES:
        named = {BCAlgo: "algo.updates", ResidualAlgo: "algo.distill.updates"}
        key = next((key for kind, key in named.items() if isinstance(algo, kind)), "algo.env_steps")
        raise UserError(
            f"adapter={method.name} prunes over the gradient steps of the whole training, of which algo={algo.name} "
            f"takes {total}; expected at least {LEAST_UPDATES}. Raise {key}, or use adapter=lora."
        )
    schedule = adalora_schedule(total)
    fixed = schedule["total_step"] - schedule["tfinal"]
    for options, before in clonings(algo):
        averaged = averaged_updates(options.ema, options.updates)
        first = before + options.updates - averaged + 1
        if averaged and first < fixed:
            most = max(0, 100 * (before + options.updates - fixed) // options.updates) / 100
            raise UserError(
                f"{options.PREFIX}ema={options.ema:g} averages from gradient step {first} on; adapter={method.name} "
                f"prunes until step {fixed} of {total}, and pruned weights have no mean. Use at most {most:g}."
            )


def _check_refresh(algo: AlgoOptions, every: int, method: Method, variant: str | None) -> None:
    if isinstance(algo, ResidualAlgo):
        raise UserError(
            f"algo.refresh_every={every}: algo={algo.name} leaves the policy's adapter as it is until "
            "distillation. Use algo.refresh_every=0, or algo=odt_td3."
        )
    if not method.eva or method.adalora:
        raise UserError(
            f"algo.refresh_every={every} refreshes EVA's directions; adapter={method.name} has none "
            "that stay. Use adapter=eva, eva_dora or eva_rslora, or algo.refresh_every=0."
        )
    if variant is not None:
        raise UserError(
            f"algo.refresh_every={every} refreshes EVA's plain directions; adapter.variant={variant} "
            "changes them at the start alone. Use adapter.variant=null, or algo.refresh_every=0."
        )
