"""Things that nobody here made: other libraries' tasks, agents, data files and policies, through the usual commands.

    pip install -c constraints.txt gymnasium-robotics ogbench "shimmy[dm-control]" "gymnasium[box2d]" "minari[create]"
    python -m benchmarks.third_party.run  # every row; --only ogbench for those whose name begins so
    python -m benchmarks.third_party.run --out docs/results/third_party.json --table  # print its table
    python -m benchmarks.third_party.run --brief  # five updates each: only whether it runs

Each row lets a library make data (sources.py, without a line of eva_rl), pretrains a small base policy on
its first episodes where the row brings no policy, and types the row's command, which clones with EVA; some rows go on
online. What is asked is that it runs and that the policy gets better, not how good it can become: a row takes less than
a minute on one thread, the base saw a few episodes for a hundred updates, the evaluation is 10 held-out episodes. A row
fails if a command does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym

from benchmarks import pages
from benchmarks.third_party import sources
from eva_rl.__main__ import main as eva_rl
from eva_rl.data import load_dataset

SMALL = "size.hidden_size=64 size.num_layers=2 size.num_heads=2 size.context_length=10"
QUIET = "threads=1 eval.every=0"
EVA = "adapter=eva adapter.rank=8"
BASE = "runs/base"


@dataclass(frozen=True)
class Row:
    """Something that others made, and what a user types to use it.

    Attributes:
        name: Library and task.
        made_by: Who made what.
        make: Makes it in the current folder.
        env: The task, as ``env=`` takes it.
        data: The demonstrations, as ``data=`` takes them.
        options: Further words of the row's command.
        policy: What is fine-tuned; ``runs/base`` is pretrained here.
        env_options: Further words about the environment, of all commands.
        pretrain_updates: Of the base.
        online: Words of a command that goes on from the cloned policy.
    """

    name: str
    made_by: str
    make: Callable[[], None]
    env: str
    data: str
    options: str = "algo.updates=150 algo.learning_rate=3e-3"
    policy: str = BASE
    env_options: str = ""
    pretrain_updates: int = 100
    online: str = ""

    @property
    def command(self) -> str:
        """What the row shows."""
        words = (
            f"eva-rl finetune env={self.env} {self.env_options} data={self.data} policy={self.policy} {self.options}"
        )
        return " ".join(words.split())

    def commands(self) -> dict[str, str]:
        """Everything that is typed, by the name of the run directory."""
        typed = {}
        if self.policy == BASE:
            typed["base"] = (
                f"eva-rl pretrain env={self.env} {self.env_options} data={self.data} data.first=3 {SMALL} "
                f"algo.updates={self.pretrain_updates} {QUIET}"
            )
        typed["eva"] = f"{self.command} {EVA} {QUIET} eval.episodes=10"
        if self.online:
            typed["online"] = (
                f"eva-rl finetune env={self.env} {self.env_options} policy=runs/eva {EVA} "
                f"{self.online} {QUIET} eval.episodes=10"
            )
        return {name: f"{words} run_dir=runs/{name}" for name, words in typed.items()}


def minari(env_id: str, act: sources.Controller, episodes: int, **kwargs: Any) -> Callable[[], None]:
    """A row's data by Minari's DataCollector."""
    return lambda: sources.minari(env_id, act, episodes, "theirs/set-v0", **kwargs)


def ogbench(task: str) -> Row:
    """A task of OGBench's UR5e arm by its own scripted oracles."""
    return Row(
        f"OGBench {task}",
        "OGBench's scripted oracles on its UR5e arm; Minari's DataCollector",
        minari(f"{task}-v0", sources.Oracles(), 30),
        f"ogbench:{task}-v0",
        "minari:theirs/set-v0",
        env_options="env.horizon=100",
    )


def rows() -> list[Row]:
    """All rows; what a library registers, it registers when imported."""
    for library in ("gymnasium_robotics", "ogbench", "shimmy"):
        import_module(library)

    made = "minari:theirs/set-v0"
    continuous, lunar = {"continuous": True}, "env.kwargs={continuous:true}"
    return [
        Row(
            "Gymnasium MountainCarContinuous-v0",
            "a textbook controller in Gymnasium's task; folder of episodes in L2M's layout",
            lambda: sources.l2m(Path("episodes"), gym.make("MountainCarContinuous-v0"), sources.along_the_speed, 30),
            "MountainCarContinuous-v0",
            "trajectories:episodes",
        ),
        Row(
            "Gymnasium LunarLander-v3",
            "the heuristic that Gymnasium ships; Minari's DataCollector",
            minari("LunarLander-v3", sources.lander, 30, **continuous),
            "LunarLander-v3",
            made,
            env_options=lunar,
            options="algo.updates=250 algo.learning_rate=3e-3",
        ),
        Row(
            "Gymnasium InvertedPendulum-v5, then online",
            "an agent that Stable-Baselines3 trained and saved; rows in D4RL's layout",
            lambda: sources.d4rl(
                Path("agent.hdf5"),
                gym.make("InvertedPendulum-v5"),
                sources.sb3_agent("InvertedPendulum-v5", 8_000),
                10,
            ),
            "InvertedPendulum-v5",
            "d4rl:agent.hdf5",
            options="algo.updates=60 algo.learning_rate=3e-3",
            pretrain_updates=30,
            online="algo=odt_td3 algo.env_steps=2000 algo.updates_per_iteration=20 data=d4rl:agent.hdf5",
        ),
        Row(
            "Minari Pendulum-v1",
            "a textbook controller; Minari's DataCollector",
            minari("Pendulum-v1", sources.swing_up, 30),
            "Pendulum-v1",
            made,
            options="algo.updates=250 algo.learning_rate=3e-3",
        ),
        Row(
            "Gymnasium-Robotics FetchReachDense-v4",
            "a proportional controller; Minari's DataCollector, Dict observations with goals",
            minari("FetchReachDense-v4", sources.reach, 30),
            "gymnasium_robotics:FetchReachDense-v4",
            made,
        ),
        Row(
            "Gymnasium-Robotics PointMaze_OpenDense-v3",
            "a PD controller; Minari's DataCollector, Dict observations with goals",
            minari("PointMaze_OpenDense-v3", sources.reach, 20),
            "gymnasium_robotics:PointMaze_OpenDense-v3",
            made,
        ),
        ogbench("cube-single-singletask-task1"),
        ogbench("scene-singletask-task1"),
        ogbench("puzzle-3x3-singletask-task1"),
        Row(
            "dm_control cartpole-balance through shimmy",
            "state feedback; rows in D4RL's layout, Dict observations laid flat",
            lambda: sources.d4rl(Path("rows.hdf5"), gym.make("dm_control/cartpole-balance-v0"), sources.pole, 3),
            "shimmy:dm_control/cartpole-balance-v0",
            "d4rl:rows.hdf5",
            env_options="env.horizon=250",
            options="algo.updates=100 algo.learning_rate=3e-3",
            pretrain_updates=20,
        ),
        Row(
            "dm_control point_mass-easy through shimmy",
            "a PD controller; rows in D4RL's layout, Dict observations laid flat",
            lambda: sources.d4rl(Path("rows.hdf5"), gym.make("dm_control/point_mass-easy-v0"), sources.centre, 5),
            "shimmy:dm_control/point_mass-easy-v0",
            "d4rl:rows.hdf5",
            env_options="env.horizon=250",
            options="algo.updates=100 algo.learning_rate=3e-3",
            pretrain_updates=20,
        ),
        Row(
            "transformers DecisionTransformerModel",
            "trained and saved with transformers alone, on Gymnasium's LunarLander-v3",
            transformers_lander,
            "LunarLander-v3",
            made,
            policy="hf-policy",
            env_options=lunar,
            options="policy.context_length=10 policy.return_scale=100 policy.observations_from=data algo.updates=200",
        ),
        Row(
            "Meta-World push-v3, L2M's layout",
            "Meta-World's scripted policy in its own MT1; folder of episodes in L2M's layout; the shipped mt40",
            lambda: sources.l2m(Path("push"), *sources.metaworld("push-v3"), 25),
            "push-v3",
            "trajectories:push",
            policy="mt40",
            options="algo.updates=60 algo.learning_rate=3e-3",
        ),
    ]


def transformers_lander() -> None:
    """Data of Gymnasium's heuristic, and transformers' model trained on the first of them."""
    env = gym.make("LunarLander-v3", continuous=True)
    sources.transformers_policy(Path("hf-policy"), list(sources.play(env, sources.lander, 5)), 200)
    sources.minari("LunarLander-v3", sources.lander, 30, "theirs/set-v0", continuous=True)


@dataclass
class Outcome:
    """What became of a row; scores are success rates where the task knows success, else returns."""

    row: str
    made_by: str
    command: str
    ok: bool = False
    error: str = ""
    score: str = "return"
    data_return: float | None = None
    before: float | None = None
    after: float | None = None
    online: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def run(row: Row, brief: bool = False) -> Outcome:
    """Make what the row needs in the current folder, and type its commands."""
    outcome = Outcome(row.name, row.made_by, row.command)
    try:
        _timed(outcome, "make", row.make)
        outcome.data_return = float(load_dataset(row.data).returns.mean())
        for name, words in row.commands().items():
            _timed(outcome, name, partial(_type, re.sub(r"updates=\d+", "updates=5", words) if brief else words))
        _read(outcome)
        outcome.ok = True
    except Exception as error:  # other libraries' code may raise anything, and a row that fails is a result
        traceback.print_exc()
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


def _timed(outcome: Outcome, name: str, action: Callable[[], None]) -> None:
    began = time.process_time()
    action()
    outcome.seconds[name] = round(time.process_time() - began, 1)


def _type(words: str) -> None:
    status = eva_rl(shlex.split(words)[1:])
    if status != 0:
        raise RuntimeError(f"status {status} of: {words}")


def _read(outcome: Outcome) -> None:
    summary = _summary("eva")
    key = "success_rate" if "eval/success_rate" in summary else "mean_reward"
    outcome.score = "success" if key == "success_rate" else "return"
    outcome.before, outcome.after = summary[f"eval_before/{key}"], summary[f"eval/{key}"]
    if Path("runs/online").exists():
        outcome.online = _summary("online")[f"eval/{key}"]


def _summary(name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(Path(f"runs/{name}/summary.json").read_text())
    return found


def table(outcomes: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    rows = []
    for o in outcomes:
        scores = [f"{o[key]:.4g}" if o[key] is not None else "" for key in ("data_return", "before", "after", "online")]
        if not o["ok"]:
            scores[1] = f"failed: {o['error']}"
        unit = " (success)" if o["score"] == "success" else ""
        rows.append([f"{o['row']}{unit}", *scores, f"{sum(o['seconds'].values()):.0f}"])
    return pages.table(["what others made", "data's return", "before", "after", "online", "CPU s"], rows)


def main() -> int:
    """Run the rows, each in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name begins so")
    parser.add_argument("--out", type=Path, help="JSON file; rows that are not run keep what stands there")
    parser.add_argument("--brief", action="store_true", help="five updates each: only whether it runs")
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    options = parser.parse_args()
    known = (
        {} if not (options.out and options.out.exists()) else {o["row"]: o for o in json.loads(options.out.read_text())}
    )
    if not options.table:
        out = options.out and options.out.resolve()
        warnings.simplefilter("ignore")
        os.environ["MINARI_DATASETS_PATH"] = "minari"
        chosen = [row for row in rows() if row.name.lower().startswith(options.only.lower())]
        for row in chosen:
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                os.environ["MINARI_DATASETS_PATH"] = f"{folder}/minari"
                known[row.name] = asdict(run(row, options.brief))
            if out:
                out.write_text(json.dumps(list(known.values()), indent=1) + "\n")
    print(table(list(known.values())))
    return 0 if all(o["ok"] for o in known.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
