"""Config of ``python -m eva_rl.finetune``: adapters, the activations that EVA starts from, and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, get_args

from eva_rl.adapters import METHODS, PROJECTIONS, SOURCES, check_gain, find_method
from eva_rl.configs.algorithms import (
    ALGORITHMS,
    BCAlgo,
    ODTAlgo,
    ODTTD3Algo,
    OnlineAlgo,
    SelfImitationAlgo,
    for_method,
)
from eva_rl.configs.groups import (
    SOURCES_OF_DATA,
    AlgoOptions,
    CheckpointOptions,
    DataOptions,
    EnvOptions,
    EvalOptions,
    PolicyOptions,
    TrainOptions,
)
from eva_rl.errors import UserError
from eva_rl.eva.options import MAX_BATCHES, EvaOptions, Variant
from eva_rl.eva.redistribution import Score
from eva_rl.options import Options, group, option

MEASURED_WHILE_LEARNING = (BCAlgo, ODTAlgo, ODTTD3Algo, SelfImitationAlgo)
"""Algorithms that take ``eval.at``."""
OBTAINED, ASKED = "obtained", "asked"


@dataclass
class EvaSourceOptions(Options):
    """The activations and gradients that EVA, CorDA, LoRA-GA and LoRA-One start from."""

    PREFIX: ClassVar[str] = "adapter.eva."
    source: str = option(
        "auto",
        "trajectories, rollouts (of the policy, while it acts) or mixed; auto uses trajectories if there are any",
        choices=("auto", *SOURCES),
    )
    max_batches: int = option(MAX_BATCHES, "maximum number of batches", above=0)
    batch_size: int = option(64, "windows per batch", above=0)
    rollout_envs: int = option(10, "environments in which the policy acts", above=0)
    rollout_steps: int = option(200, "env steps per environment", above=0)


@dataclass
class AdapterOptions(Options):
    """What is trained."""

    PREFIX: ClassVar[str] = "adapter."
    method: str = option("eva", "one of " + ", ".join(METHODS))
    rank: int = option(
        EvaOptions.rank, "rank of each target layer (on average, where EVA redistributes ranks)", above=0
    )
    alpha: float | None = option(
        None, "LoRA's alpha; null uses the rank: a scale alpha / rank of 1 (rslora: alpha / sqrt(rank))", above=0
    )
    dropout: float = option(0.0, "LoRA's dropout", low=0, high=0.99)
    targets: list[str] = option(list(PROJECTIONS), "layers that get an adapter, by (ending of) name")
    rank_caps: dict[str, int] = option({}, "highest rank of some layers, by (ending of) name: {action_head:2}")
    rho: float = option(
        EvaOptions.rho, "EVA: no layer gets more than rank * rho; 1 gives all the same", low=1, high=1000
    )
    tau: float = option(EvaOptions.tau, "EVA: stop once two halves of the data agree to this degree", above=0, high=1)
    center: bool = option(EvaOptions.center, "EVA: subtract the mean activation")
    score: str = option(
        EvaOptions.score,
        "EVA: compare layers by explained-variance ratio, or by the paper's formula (score=paper)",
        choices=get_args(Score),
    )
    variant: str | None = option(
        EvaOptions.variant,
        "EVA: an ablation of the paper: whiten, rotate, permute or minor; rotate also for lora, rslora and dora",
        choices=get_args(Variant),
    )
    gain: str = option(
        "own",
        "scale of A where B starts at zero: own, lora or eva (of LoRA's or EVA's initialisation), or a number, the "
        "mean squared length of A x in every layer",
    )
    eva: EvaSourceOptions = group(EvaSourceOptions, "data of EVA, CorDA, LoRA-GA and LoRA-One")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gain = str(self.gain)
        check_gain(self.gain)
        method = find_method(self.method)
        if self.gain != "own" and not method.zero_b:
            raise UserError(
                f"adapter.gain={self.gain} rescales a start whose B is zero; adapter={method.name} has none. Use "
                "adapter=eva, lora, rslora or dora and their kin, or adapter.gain=own."
            )
        if self.variant is not None and not (method.eva or (self.variant == "rotate" and method.zero_b)):
            raise UserError(
                f"adapter.variant={self.variant} changes EVA's directions; adapter={method.name} has none. Use "
                "adapter=eva and its kin (rotate works for lora, rslora and dora, too)."
            )


@dataclass
class FinetuneEvalOptions(EvalOptions):
    """Evaluation on held-out episodes, and on held-out demonstrations."""

    at: list[int] = option(
        [],
        "gradient steps of cloning, or env steps of odt, odt_td3 and self_imitation, after which to evaluate on the "
        "held-out episodes, too: [10,20,40]; these evaluations count no env steps",
    )
    demonstrations: int = option(
        0, "held-out expert demonstrations on which to measure the cloning loss; 0 for none", low=0, high=1000
    )


@dataclass
class FinetuneDataOptions(DataOptions):
    """Demonstrations of the new task, and how they are shown."""

    source: str = option(
        "auto",
        f"{SOURCES_OF_DATA}; none; auto for the scripted expert if demonstrations are cloned, else none; same as data=",
    )
    returns_to_go: str = option(
        OBTAINED,
        "what cloning shows as return-to-go: obtained from there on, or asked, the target return less the rewards so "
        "far, as a policy sees it when it acts",
        choices=(OBTAINED, ASKED),
    )


@dataclass
class FinetuneConfig(TrainOptions):
    """Config of ``python -m eva_rl.finetune``."""

    shared: str = option("", "folder for work that runs have in common: demonstrations, evaluation before, EVA pass")
    study: str = option("", "SHA-256 of the study file that the run belongs to; set by the benchmark")
    video: bool = option(
        False, "record one episode before and after, side by side; slow without a GPU; needs a renderer"
    )
    env: EnvOptions = group(EnvOptions, "the new task")
    policy: PolicyOptions = group(partial(PolicyOptions, path="auto"), "what to start from")
    data: FinetuneDataOptions = group(FinetuneDataOptions, "demonstrations")
    adapter: AdapterOptions = group(AdapterOptions, "what is trained")
    algo: AlgoOptions = group(AlgoOptions, "how it is trained: " + ", ".join(ALGORITHMS))
    eval: FinetuneEvalOptions = group(FinetuneEvalOptions, "evaluation")
    checkpoint: CheckpointOptions = group(CheckpointOptions, "checkpoints")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.algo = for_method(self.algo, self.adapter.method)
        clones = isinstance(self.algo, BCAlgo) or (isinstance(self.algo, OnlineAlgo) and self.algo.bc.updates)
        if not clones and self.eval.every not in {0, EvalOptions.every}:
            raise UserError(
                f"eval.every={self.eval.every} counts gradient steps of cloning, and algo={self.algo.name} does not "
                "clone first. Type eval.every=0, and for validation by env steps algo.eval_every=STEPS."
            )
        if self.eval.at and not isinstance(self.algo, MEASURED_WHILE_LEARNING):
            raise UserError(
                f"eval.at={self.eval.at}: algo={self.algo.name} is not evaluated on the held-out episodes while it "
                "learns. Use algo.eval_every for validation episodes, or algo=bc, odt, odt_td3 or self_imitation."
            )
        if any(not 0 < step <= self.algo.final_step for step in self.eval.at):
            steps = "gradient steps" if isinstance(self.algo, BCAlgo) else "env steps"
            raise UserError(f"eval.at={self.eval.at}: expected {steps} from 1 to {self.algo.final_step}.")
