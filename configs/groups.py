"""Typed configuration: one dataclass a group, each default and each range written once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from eva_rl.data.selection import WEIGHTINGS
from eva_rl.options import between, group, one_of, option, positive
from eva_rl.seeding import MAX_SEED
from eva_rl.tracking.sinks import TENSORBOARD, TRACKERS
from eva_rl.tracking.tracker import check_trackers


@dataclass
class EnvOptions:
    """The task."""

    id: str = option("metaworld/push-v3", "task: metaworld/push-v3, mujoco/hopper or any Gymnasium id; same as env=")
    horizon: int | None = option(None, "env steps an episode; null takes the task's own (Meta-World: 200)")

    def __post_init__(self) -> None:
        if self.horizon is not None:
            positive(env__horizon=self.horizon)


@dataclass
class NoiseOptions:
    """Disturbance of the scripted experts' actions; what the expert wanted is what is imitated."""

    std: float = option(0.0, "largest standard deviation of Gaussian action noise")
    burst_probability: float = option(0.0, "largest chance per env step of 3-10 steps of one random motion")

    def __post_init__(self) -> None:
        between(0, 10, data__noise__std=self.std)
        between(0, 1, data__noise__burst_probability=self.burst_probability)


@dataclass
class DataOptions:
    """Where demonstrations come from."""

    source: str = option(
        "expert",
        "expert (Meta-World's scripts), expert:ENV?episodes=25, d4rl:NAME, d4rl:FILE, minari:ID, trajectories:PATH or "
        "a path; finetune: none, or auto for the expert where there is something to clone; same as data=",
    )
    episodes: int = option(25, "episodes to collect, for each task")
    seed: int = option(0, "chooses the goals and the noise of collected episodes")
    noise: NoiseOptions = group(NoiseOptions, "action noise")
    only_successes: bool = option(True, "leave out episodes in which the expert failed")
    after_success: float = option(0.25, "weight, in sampling, of env steps more than 10 after the first success")
    workers: int = option(2, "processes that collect")
    top: float = option(1.0, "fraction of the episodes that is used, those with the highest returns")
    first: int = option(0, "number of first episodes that are used; 0 for all")
    max_return: float | None = option(None, "leave out episodes with a higher return; null for none")
    weight_by: str = option("uniform", "what windows are drawn by: uniform (env steps), episode, length or return")
    allow_pickle: bool = option(False, "open pickles, admitting numpy arrays and builtin containers alone")
    skip_damaged: bool = option(False, "leave out damaged episodes, with a count, instead of refusing the data")

    def __post_init__(self) -> None:
        between(1e-9, 1, data__top=self.top)
        between(0, 10**9, data__first=self.first)
        one_of(WEIGHTINGS, data__weight_by=self.weight_by)
        positive(data__episodes=self.episodes, data__workers=self.workers)
        between(0, 1, data__after_success=self.after_success)
        between(0, MAX_SEED, data__seed=self.seed)


@dataclass
class EvalOptions:
    """Evaluation on held-out episodes."""

    episodes: int = option(50, "episodes, each with its own goal")
    every: int = option(50, "gradient steps between two quick looks at validation episodes while training; 0 for none")
    quick_episodes: int = option(10, "episodes of a quick look")
    seed: int = option(0, "chooses the episodes; no demonstration shares one")

    def __post_init__(self) -> None:
        positive(eval__episodes=self.episodes, eval__quick_episodes=self.quick_episodes)
        between(0, 10**9, eval__every=self.every)
        between(0, MAX_SEED, eval__seed=self.seed)


@dataclass
class PolicyOptions:
    """The pretrained policy."""

    path: str = option(
        "mt40",
        "a shipped name (finetune: auto for the one that fits the task), a policy folder, a run directory, or a "
        "Hugging Face folder or hub id; same as policy=",
    )
    target_return: float | None = option(None, "return to ask for; null takes the demonstrations' or the policy's own")
    context_length: int | None = option(None, "env steps an imported policy was trained to see; null takes 20")
    allow_pickle: bool = option(False, "read imported weights from a torch.save file, admitting tensors alone")


@dataclass
class CheckpointOptions:
    """Checkpoints for resuming."""

    every: int = option(500, "gradient steps between two checkpoints; 0 for none")

    def __post_init__(self) -> None:
        between(0, 10**9, checkpoint__every=self.every)


LOSSES = ("mse", "l1")
COMPILE_MODES = ("none", "default", "reduce-overhead")
PRECISIONS = ("float32", "bfloat16")


@dataclass
class AlgoOptions:
    """How the policy is trained."""

    name: str = option("bc", "the algorithm")

    @property
    def gradient_steps(self) -> int:
        """Gradient steps that the adapter will see."""
        raise NotImplementedError

    @property
    def final_step(self) -> int:
        """Where the record ends, on its own axis."""
        raise NotImplementedError


@dataclass
class BCOptionsGroup(AlgoOptions):
    """Behaviour cloning."""

    least_updates: ClassVar[int] = 1
    updates: int = option(200, "gradient steps")
    batch_size: int = option(64, "windows a gradient step")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    final_learning_rate: float = option(0.05, "end of the cosine, as a fraction of the peak")
    warmup: int = option(20, "gradient steps of linear warm-up")
    weight_decay: float = option(1e-4, "AdamW's weight decay, on matrices")
    gradient_clip: float = option(0.25, "largest norm of the gradient")
    loss: str = option("mse", "mse or l1")
    precision: str = option("float32", "float32, or bfloat16 for mixed precision")
    accumulate: int = option(1, "parts that a gradient step's windows are taken in, one after the other: less memory")
    compile: str = option("none", "torch.compile: none, default, or reduce-overhead (CUDA graphs)")

    def __post_init__(self) -> None:
        positive(algo__updates=self.updates + 1 - self.least_updates)
        positive(
            algo__accumulate=self.accumulate,
            algo__batch_size=self.batch_size,
            algo__learning_rate=self.learning_rate,
            algo__gradient_clip=self.gradient_clip,
        )
        between(0, 1, algo__final_learning_rate=self.final_learning_rate)
        between(0, 10**9, algo__warmup=self.warmup)
        between(0, 10, algo__weight_decay=self.weight_decay)
        one_of(LOSSES, algo__loss=self.loss)
        one_of(PRECISIONS, algo__precision=self.precision)
        one_of(COMPILE_MODES, algo__compile=self.compile)

    @property
    def gradient_steps(self) -> int:
        """Gradient steps of the whole training."""
        return self.updates

    @property
    def final_step(self) -> int:
        """Where the record ends, in gradient steps."""
        return self.updates


@dataclass
class RunOptions:
    """What the commands that use a network share."""

    seed: int = option(0, "seed of everything that has none of its own")
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    threads: int = option(0, "CPU threads; 0 takes all cores")
    run_dir: str = option("", "where everything is written; empty makes a new folder under runs/")
    resume: str = option("auto", "auto continues an unfinished run_dir, never refuses")

    def __post_init__(self) -> None:
        between(0, MAX_SEED, seed=self.seed)
        between(0, 4096, threads=self.threads)
        one_of(("auto", "never"), resume=self.resume)


@dataclass
class TrainOptions(RunOptions):
    """What every command that trains shares."""

    tracker: list[str] = field(
        default_factory=lambda: [TENSORBOARD],
        metadata={"help": "where metrics go besides metrics.jsonl, some of [" + ", ".join(TRACKERS) + "]"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trackers(tuple(self.tracker))
