"""Config of ``python -m eva_rl.finetune``: adapters, the activations that EVA looks at, and the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from eva_rl.adapters import METHODS, PROJECTIONS, SOURCES, find_method
from eva_rl.configs.algorithms import ALGORITHMS
from eva_rl.configs.groups import (
    AlgoOptions,
    CheckpointOptions,
    DataOptions,
    EnvOptions,
    EvalOptions,
    PolicyOptions,
    TrainOptions,
)
from eva_rl.options import between, group, one_of, option, positive


@dataclass
class EvaSourceOptions:
    """The activations and gradients that EVA, CorDA and LoRA-GA look at."""

    source: str = option(
        "auto",
        "trajectories, rollouts (of the policy, while it acts) or mixed; auto takes trajectories if there are any",
    )
    max_batches: int = option(16, "batches of windows at most")
    batch_size: int = option(64, "windows a batch")
    rollout_envs: int = option(10, "environments in which the policy acts")
    rollout_steps: int = option(200, "env steps in each")

    def __post_init__(self) -> None:
        one_of(("auto", *SOURCES), adapter__eva__source=self.source)
        positive(
            adapter__eva__max_batches=self.max_batches,
            adapter__eva__batch_size=self.batch_size,
            adapter__eva__rollout_envs=self.rollout_envs,
            adapter__eva__rollout_steps=self.rollout_steps,
        )


@dataclass
class AdapterOptions:
    """What is trained."""

    method: str = option("eva", "one of " + ", ".join(METHODS))
    rank: int = option(8, "rank of each target layer (on average, where EVA hands ranks out)")
    alpha: float | None = option(None, "LoRA's alpha; null takes the rank, an update scale of 1")
    dropout: float = option(0.0, "LoRA's dropout")
    targets: list[str] = field(
        default_factory=lambda: list(PROJECTIONS),
        metadata={"help": "layers that get an adapter, by (ending of) name"},
    )
    rank_caps: dict[str, int] = field(
        default_factory=dict, metadata={"help": "highest rank of some layers, by (ending of) name: {action_head:2}"}
    )
    rho: float = option(1.0, "EVA: no layer gets more than rank * rho; 1 gives all the same")
    tau: float = option(0.99, "EVA: stop when two halves of the data agree to this")
    center: bool = option(False, "EVA: subtract the mean activation")
    score: str = option("ratio", "EVA: compare layers by explained-variance ratio, or by the paper's formula (paper)")
    variant: str | None = option(None, "EVA: an ablation of the paper: whiten, rotate, permute or minor")
    eva: EvaSourceOptions = group(EvaSourceOptions, "data of EVA, CorDA and LoRA-GA")

    def __post_init__(self) -> None:
        find_method(self.method)
        positive(adapter__rank=self.rank)
        between(1, 1000, adapter__rho=self.rho)
        between(0, 1, adapter__tau=self.tau)
        between(0, 0.99, adapter__dropout=self.dropout)
        one_of(("ratio", "paper"), adapter__score=self.score)
        if self.variant is not None:
            one_of(("whiten", "rotate", "permute", "minor"), adapter__variant=self.variant)
        if self.alpha is not None:
            positive(adapter__alpha=self.alpha)


@dataclass
class FinetuneConfig(TrainOptions):
    """Config of ``python -m eva_rl.finetune``."""

    video: bool = option(False, "also film one episode before and after, side by side; takes time, and a renderer")
    env: EnvOptions = group(EnvOptions, "the new task")
    policy: PolicyOptions = group(partial(PolicyOptions, path="auto"), "what to start from")
    data: DataOptions = group(partial(DataOptions, source="auto"), "demonstrations")
    adapter: AdapterOptions = group(AdapterOptions, "what is trained")
    algo: AlgoOptions = group(AlgoOptions, "how it is trained: " + ", ".join(ALGORITHMS))
    eval: EvalOptions = group(EvalOptions, "evaluation")
    checkpoint: CheckpointOptions = group(CheckpointOptions, "checkpoints")
