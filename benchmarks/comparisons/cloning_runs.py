"""Short cloning runs in one process, for sweeps: what runs of a task share is loaded once, a method is attached once.

Used by ``learning_rates.py`` and ``variance.py``. Every finished run is a line of JSON; a sweep that is started again
does what is missing, and ``--shard i/n`` takes one part of n.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from eva_rl.adapters import AttachedAdapter, find_method, load_policy
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.cli.parsing import parse
from eva_rl.configs.algorithms import BCAlgo
from eva_rl.configs.finetune import FinetuneConfig
from eva_rl.data import Trajectories, WindowSampler
from eva_rl.data.selection import sampling_weights
from eva_rl.distributed import ProcessGroup
from eva_rl.eva import EvaResult
from eva_rl.finetune import command  # noqa: F401 - registers its config
from eva_rl.finetune.adapter import attach
from eva_rl.finetune.session import choose_target_return
from eva_rl.options import PRECISIONS
from eva_rl.rollouts.evaluation import evaluate_policy, shared_envs
from eva_rl.rollouts.experts import collect_expert
from eva_rl.seeding import MAX_SEED
from eva_rl.training.bc import train_bc
from eva_rl.training.failures import NotFiniteError
from eva_rl.training.losses import clone_loss

HELD_OUT_EPISODES, HELD_OUT_BATCH = 20, 256
HELD_OUT_SEED = MAX_SEED - 1
"""Demonstrations that no run trains on; studies use those of MAX_SEED."""
AVERAGED = 0.25
"""Last part of a run over which weights are averaged, besides."""
Record = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How long runs are, and on what.

    Attributes:
        episodes: Demonstrations.
        updates: Gradient steps.
        rank: Of the adapters.
        batch_size: Windows a gradient step.
        goals: Validation goals on which success is measured; 0 for none.
        policy: What is fine-tuned.
        device: Where.
        horizon: Env steps an episode; 0 takes the task's own.
        averages: What is measured with averaged weights, too: ``none``, ``loss`` or ``success``, which is both.
        held_out: Windows on which the cloning loss is measured.
        precision: ``float32``, or ``bfloat16`` for mixed precision while training.
        window: Env steps of a window; 0 takes the policy's context.
    """

    episodes: int = 25
    updates: int = 100
    rank: int = 8
    batch_size: int = 32
    goals: int = 20
    policy: str = "mt40"
    device: str = "cpu"
    horizon: int = 0
    averages: str = "loss"
    held_out: int = 1024
    precision: str = "float32"
    window: int = 0


@dataclass
class TaskRuns:
    """Runs on one task with the same demonstrations.

    Attributes:
        task: A Meta-World task.
        seed: Of the demonstrations.
        setting: How long, and on what.
    """

    task: str
    seed: int
    setting: Setting
    _eva: dict[tuple[bool, int], EvaResult] = field(default_factory=dict)
    _configs: dict[str, FinetuneConfig] = field(default_factory=dict)

    def config(self, method: str) -> FinetuneConfig:
        """Of ``python -m eva_rl.finetune``, as these runs would have it."""
        if method not in self._configs:
            self._configs[method] = self._parsed(method)
        return self._configs[method]

    def _parsed(self, method: str) -> FinetuneConfig:
        setting = self.setting
        asked = [f"env={self.task}", f"adapter={method}", f"adapter.rank={setting.rank}"]
        asked += [f"algo.updates={setting.updates}", f"algo.batch_size={setting.batch_size}", f"seed={self.seed}"]
        asked += [f"algo.precision={setting.precision}"]
        asked += [f"env.horizon={setting.horizon}"] if setting.horizon else []
        config: FinetuneConfig = parse("finetune", asked)
        return config

    def sampler(self, data: Trajectories, seed: int) -> WindowSampler:
        """Windows in an order of their own."""
        policy, options = self.base, self.config("lora").data
        steps = self.setting.window or policy.network.config.context_length
        weights = sampling_weights(data, options.after_success, options.weight_by)
        return WindowSampler(data, steps, policy.scaling, seed=seed, weights=weights)

    @cached_property
    def data(self) -> Trajectories:
        """The demonstrations."""
        return self._collected(self.setting.episodes, self.seed)

    @cached_property
    def base(self) -> DecisionTransformerPolicy:
        """The policy before training, with the target return of the demonstrations."""
        policy = load_policy(self.setting.policy, self.setting.device)
        config = self.config("lora")
        choose_target_return(policy, config, self.data, config.env.id)
        return policy

    @cached_property
    def held_out(self) -> WindowSampler:
        """Windows of demonstrations that no run trains on."""
        data = self._collected(min(HELD_OUT_EPISODES, 4 * self.setting.episodes), HELD_OUT_SEED)
        return self.sampler(data, 0)

    @cached_property
    def envs(self) -> Any:
        """Environments of the validation goals."""
        env_id = self.config("lora").env.id
        return shared_envs(ProcessGroup(), env_id, self.setting.goals, self.setting.horizon or None)

    def close(self) -> None:
        """Close the environments, if there are any."""
        if "envs" in vars(self):
            self.envs.close()

    def _collected(self, episodes: int, seed: int) -> Trajectories:
        short = self.setting.horizon or None
        return collect_expert(self.task, episodes, seed=seed, horizon=short, only_successes=short is None)

    def start(self, method: str, seed: int | None = None) -> MethodRuns:
        """Attach a method to a copy of the policy.

        Args:
            method: What is trained.
            seed: Of what is random in its start; None takes the demonstrations'.
        """
        config = replace(self.config(method), seed=self.seed if seed is None else seed)
        torch.manual_seed(config.seed)
        policy = copy.deepcopy(self.base)
        sampler = self.sampler(self.data, config.seed)

        def once(compute: Callable[[], EvaResult]) -> EvaResult:
            key = find_method(method).adalora, config.seed
            if key not in self._eva:
                self._eva[key] = compute()
            return self._eva[key]

        return MethodRuns(self, policy, attach(policy, sampler, config, once), method)

    def loss(self, policy: DecisionTransformerPolicy) -> float:
        """Cloning loss on the held-out demonstrations."""
        network = policy.network.eval()
        with torch.no_grad():
            size = min(HELD_OUT_BATCH, self.setting.held_out)
            number = self.setting.held_out // size
            batches = (self.held_out.sample(size, n, policy.device) for n in range(number))
            return sum(clone_loss(network, batch).item() for batch in batches) / number

    def success(self, policy: DecisionTransformerPolicy, goals_seed: int | None = None) -> float | None:
        """Share of the validation goals that the policy reaches."""
        if not self.setting.goals:
            return None
        seed = self.seed if goals_seed is None else goals_seed
        options: Any = {"validation": True, "vec_env": self.envs, "stop_at_success": True}
        env_id, horizon = self.config("lora").env.id, self.setting.horizon or None
        found = evaluate_policy(policy, env_id, episodes=self.setting.goals, seed=seed, horizon=horizon, **options)
        return found.success_rate


class MethodRuns:
    """Runs of one method that all begin from the same start.

    Args:
        runs: What they share with runs of other methods.
        policy: With the adapter.
        adapter: What was attached.
        method: Its name.
    """

    def __init__(
        self, runs: TaskRuns, policy: DecisionTransformerPolicy, adapter: AttachedAdapter, method: str
    ) -> None:
        self.runs, self.policy, self.adapter, self.method = runs, policy, adapter, method
        self._state = {name: value.clone() for name, value in policy.network.state_dict().items()}
        extension = adapter.extension
        self._extension = {} if extension is None else {k: v.clone() for k, v in extension.tensors().items()}

    def run(self, learning_rate: float, order: int | None = None, goals_seed: int | None = None) -> Record:
        """Train from the start and measure.

        Args:
            learning_rate: Peak of the schedule.
            order: Seed of the order of the windows; None takes the demonstrations'.
            goals_seed: Seed of the validation goals; None takes the demonstrations'.
        """
        began = time.perf_counter()
        self._restore()
        algo = replace(cast("BCAlgo", self.runs.config(self.method).algo), learning_rate=learning_rate)
        sampler = self.runs.sampler(self.runs.data, self.runs.seed if order is None else order)
        mean = _Mean(self.policy)
        try:
            losses = self._train(sampler, algo, mean)
        except NotFiniteError:
            return {"diverged": True, "seconds": time.perf_counter() - began}
        found: Record = {"train_loss": losses[-1], **self._measured(goals_seed)}
        if self.runs.setting.averages != "none":
            mean.take(self.policy)
            found["averaged_loss"] = self.runs.loss(self.policy)
        if self.runs.setting.averages == "success":
            found["averaged_success"] = self.runs.success(self.policy, goals_seed)
        return {**found, "seconds": time.perf_counter() - began}

    def _train(self, sampler: WindowSampler, algo: BCAlgo, mean: _Mean) -> list[float]:
        losses: list[float] = []
        first = algo.updates - round(AVERAGED * algo.updates)

        def log(metrics: Mapping[str, float], update: int) -> None:
            losses.extend([metrics["train/loss"]] if "train/loss" in metrics else [])

        at = range(first + 1, algo.updates) if self.runs.setting.averages != "none" else ()
        after = dict.fromkeys(at, mean.add)
        train_bc(self.policy, sampler, algo, log=log, extension=self.adapter.extension, after=after)
        mean.add()
        return losses

    def _measured(self, goals_seed: int | None) -> Record:
        return {"loss": self.runs.loss(self.policy), "success": self.runs.success(self.policy, goals_seed)}

    def _restore(self) -> None:
        self.policy.network.load_state_dict(self._state)
        if self.adapter.extension is not None:
            self.adapter.extension.restore({name: value.clone() for name, value in self._extension.items()})


class _Mean:
    """Mean of the trained parameters over several points."""

    def __init__(self, policy: DecisionTransformerPolicy) -> None:
        self._parameters = [p for p in policy.network.parameters() if p.requires_grad]
        self._sums = [torch.zeros_like(p, dtype=torch.float64) for p in self._parameters]
        self._count = 0

    def add(self) -> None:
        """Count the parameters as they are now."""
        self._count += 1
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            total.add_(parameter.detach())

    def take(self, policy: DecisionTransformerPolicy) -> None:
        """Give the policy the mean."""
        with torch.no_grad():
            for total, parameter in zip(self._sums, self._parameters, strict=True):
                parameter.copy_(total / self._count)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every sweep has."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the records, one file a shard")
    parser.add_argument("--shard", default="0/1", help="i/n: which part of n")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after that")
    parser.add_argument("--policy", default="mt40")
    parser.add_argument("--horizon", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    averages = {"choices": ("none", "loss", "success"), "help": "what is measured with averaged weights, too"}
    parser.add_argument("--averages", default="loss", **averages)
    parser.add_argument("--held-out", type=int, default=1024, help="windows on which the cloning loss is measured")
    parser.add_argument("--window", type=int, default=0, help="env steps of a window; 0 takes the policy's context")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--goals", type=int, default=20, help="validation goals for success; 0 for none")


def setting_of(options: argparse.Namespace, episodes: int, updates: int) -> Setting:
    """What the options of :func:`add_options` say of runs of this length."""
    names = [f.name for f in fields(Setting)][2:]
    return Setting(episodes, updates, **{name: getattr(options, name) for name in names})


def own_part(units: Sequence[Any], shard: str) -> Sequence[Any]:
    """A contiguous part of the units, so that a shard sees few tasks."""
    index, number = map(int, shard.split("/"))
    return units[len(units) * index // number : len(units) * (index + 1) // number]


@dataclass
class Records:
    """Finished runs in a folder, by what identifies them."""

    folder: Path
    shard: str
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._done = {self._key(record) for record in read_records(self.folder)}

    @staticmethod
    def _key(record: Mapping[str, Any]) -> str:
        return json.dumps(record["run"], sort_keys=True)

    def missing(self, runs: Sequence[Record]) -> list[Record]:
        """Those that are not there yet."""
        return [run for run in runs if self._key({"run": run}) not in self._done]

    def add(self, run: Record, found: Record) -> None:
        """Append a finished run."""
        line = json.dumps({"run": run, **found})
        with (self.folder / f"records-{self.shard.replace('/', 'of')}.jsonl").open("a") as file:
            file.write(line + "\n")
        print(f"{(time.monotonic() - self.began) / 60:.1f} min: {line}", flush=True)

    def late(self, minutes: float) -> bool:
        """Whether the time is over."""
        return time.monotonic() - self.began > 60 * minutes


def read_records(*places: Path) -> Iterator[Record]:
    """All whole lines of files, or of a folder's files; a run that was done twice counts once."""
    seen: set[str] = set()
    for path in (file for place in places for file in (sorted(place.glob("*.jsonl")) if place.is_dir() else [place])):
        for line in path.read_text().splitlines():
            record = _parsed(line)
            if record and (key := json.dumps(record["run"], sort_keys=True)) not in seen:
                seen.add(key)
                yield record


def _parsed(line: str) -> Record | None:
    """A record, or None for the half line of a killed process."""
    try:
        found: Record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found
