"""Typed configuration: one dataclass a group, each default and each range written once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from eva_rl.data.selection import WEIGHTINGS
from eva_rl.envs.names import DENSE, REWARD, REWARDS, TIMEOUT, with_options
from eva_rl.options import MANY, Options, group, option
from eva_rl.rollouts.experts import ActionNoise
from eva_rl.seeding import MAX_SEED
from eva_rl.tracking.sinks import TENSORBOARD, TRACKERS, check_trackers


@dataclass
class EnvOptions(Options):
    """The task."""

    PREFIX: ClassVar[str] = "env."
    id: str = option(
        "metaworld/push-v3",
        "task: metaworld/push-v3, Hopper-v5 or any other Gymnasium id, or module:Env-v0 of your own; same as env=",
    )
    horizon: int | None = option(None, "env steps per episode; null uses the task's own (Meta-World: 200)", above=0)
    kwargs: dict[str, Any] = option({}, "arguments of the environment's constructor, '{NAME:VALUE}'")
    reward: str = option(
        DENSE, "Meta-World: dense, or sparse for 1 where the task is solved and else 0", choices=REWARDS
    )
    goal: int | str | None = option(
        None,
        "Meta-World: one goal for all episodes, by its seed, or by its index in Meta-World's own list of 50: index:7 "
        "is that of MT1(task, seed=0).train_tasks, index:7@42 that of seed=42; null gives each episode its own",
        low=0,
    )

    timeout: float = option(
        TIMEOUT, "seconds that one call of the environment may take before it is interrupted", low=1, high=MANY
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.id:
            self.id = self.named(self.id)
            self.kwargs, self.goal, self.reward = {}, None, DENSE  # they are part of the name from here on

    def named(self, task: str) -> str:
        """A task with these options in its name."""
        reward = {} if self.reward == DENSE else {REWARD: self.reward}
        return with_options(task, {**self.kwargs, **reward}, self.goal)


@dataclass
class NoiseOptions(Options):
    """Disturbance of the scripted experts' actions; the undisturbed action is what is imitated."""

    PREFIX: ClassVar[str] = "data.noise."
    std: float = option(ActionNoise.std, "largest standard deviation of Gaussian action noise", low=0, high=10)
    burst_probability: float = option(
        ActionNoise.burst_probability, "largest chance per env step of 3-10 steps of one random motion", low=0, high=1
    )


SOURCES_OF_DATA = (
    "expert (Meta-World's scripts), expert:ENV?episodes=25, d4rl:NAME, d4rl:FILE, minari:ID, trajectories:PATH "
    "or a path"
)


@dataclass
class DataOptions(Options):
    """Where demonstrations come from."""

    PREFIX: ClassVar[str] = "data."
    source: str = option(
        "expert",
        f"{SOURCES_OF_DATA}; same as data=",
    )
    episodes: int = option(25, "episodes to collect, for each task", above=0)
    seed: int = option(0, "seed of collected episodes, their goals and noise, and of data.sample", low=0, high=MAX_SEED)
    noise: NoiseOptions = group(NoiseOptions, "action noise")
    only_successes: bool = option(True, "leave out episodes in which the expert failed")
    after_success: float = option(
        0.25, "sampling weight of env steps more than 10 after the first success", low=0, high=1
    )
    workers: int = option(2, "number of collecting processes", above=0)
    top: float = option(1.0, "use this fraction of the episodes, with the highest returns", above=0, high=1)
    first: int = option(0, "use the first N episodes; 0 uses all", low=0, high=MANY)
    sample: int = option(0, "use N episodes, drawn at random by data.seed; 0 uses all", low=0, high=MANY)
    max_return: float | None = option(None, "leave out episodes with a higher return; null for none")
    weight_by: str = option(
        "uniform", "how windows are sampled: uniform (env steps), episode, length or return", choices=WEIGHTINGS
    )
    allow_pickle: bool = option(False, "open pickles, admitting numpy arrays and builtin containers alone")
    skip_damaged: bool = option(False, "leave out damaged episodes, with a count, instead of refusing the data")


@dataclass
class HeldOutOptions(Options):
    """Evaluation on held-out episodes."""

    PREFIX: ClassVar[str] = "eval."
    episodes: int = option(50, "episodes, each with its own goal", above=0)
    seed: int = option(0, "seed of the episodes, which demonstrations never share", low=0, high=MAX_SEED)
    stop_at_success: bool | None = option(
        None,
        "end an episode at its first success: same success rate, return and length not measured; null does so in "
        "validation and in benchmarks alone",
    )


@dataclass
class EvalOptions(HeldOutOptions):
    """Evaluation on held-out episodes, and validation on others while training."""

    every: int = option(50, "validate every N gradient steps of training; 0 disables", low=0, high=MANY)
    quick_episodes: int = option(10, "episodes of a validation", above=0)


@dataclass
class PolicyOptions(Options):
    """The pretrained policy."""

    PREFIX: ClassVar[str] = "policy."
    path: str = option(
        "mt40",
        "a shipped name (finetune: auto for the one that fits the task), a policy folder, a run directory, or a "
        "Hugging Face folder or hub id; same as policy=",
    )
    target_return: float | None = option(
        None, "target return; null uses the demonstrations' 0.9 quantile, else the policy's own"
    )
    context_length: int | None = option(None, "env steps an imported policy was trained to see; null uses 20", above=0)
    allow_pickle: bool = option(
        False, "read imported weights from a torch.save file, admitting tensors and arrays alone"
    )
    observations_from: str = option(
        "",
        "data whose mean and std normalise an imported policy's observations, as data= takes them; finetune: data for "
        "its own demonstrations",
    )
    observation_mean: list[float] | None = option(None, "of an imported policy's training data; [0] for zeros")
    observation_std: list[float] | None = option(None, "of an imported policy's training data; [1] for ones")
    return_scale: float | None = option(None, "divides an imported policy's returns; null uses 1000", above=0)
    action_bounds: list[float] | None = option(
        None, "[LOW,HIGH] that the policy's actions are stretched over; null uses its own bounds"
    )
    num_heads: int | None = option(None, "attention heads of imported bare weights; null uses their project's", above=0)


@dataclass
class CheckpointOptions(Options):
    """Checkpoints for resuming."""

    PREFIX: ClassVar[str] = "checkpoint."
    every: int = option(500, "gradient steps between two checkpoints; 0 for none by steps", low=0, high=MANY)
    seconds: float = option(
        10.0, "seconds between two checkpoints; online at validations; 0 for none by time", low=0, high=MANY
    )


@dataclass
class AlgoOptions(Options):
    """How the policy is trained."""

    PREFIX: ClassVar[str] = "algo."
    name: str = option("bc", "the algorithm")

    @property
    def total_updates(self) -> int:
        """Gradient steps that the adapter will see, without those of a cloning before."""
        raise NotImplementedError

    @property
    def adapter_updates(self) -> int:
        """All gradient steps that the adapter will see."""
        return self.total_updates

    @property
    def final_step(self) -> int:
        """Where the record ends, on its own axis."""
        raise NotImplementedError


@dataclass
class MachineOptions(Options):
    """What the commands that use a network share."""

    seed: int = option(
        0,
        "random seed of initialisation, batches and exploration; data.seed and eval.seed are others",
        low=0,
        high=MAX_SEED,
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    threads: int = option(
        0, "CPU threads; 0 uses those that affinity, container quota and OMP_NUM_THREADS allow", low=0, high=4096
    )


@dataclass
class RunOptions(MachineOptions):
    """What the commands that make a run directory share."""

    run_dir: str = option("", "run directory; empty creates a new one under runs/")
    resume: str = option("auto", "auto continues an unfinished run_dir, never refuses", choices=("auto", "never"))


@dataclass
class TrainOptions(RunOptions):
    """What every command that trains shares."""

    tracker: list[str] = option(
        [TENSORBOARD], "where metrics go besides metrics.jsonl, some of [" + ", ".join(TRACKERS) + "]"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trackers(tuple(self.tracker))
