"""Env steps a second of a whole evaluation: this package's beside the plain loop that it replaced.

``python -m benchmarks.speed.evaluation --episodes 50 --turns 3 --out evaluation.json``

The plain loop: ten of Meta-World's own environments in Stable-Baselines3's DummyVecEnv, the policy's modules called for
all ten at each step. Beside both, the simulator alone: Meta-World's own step in one process, with random actions. They
take turns, so that other load on the machine falls on all of them; CPU seconds count worker processes, too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.vec_env import DummyVecEnv

from eva_rl import evaluate_policy, load_policy
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.envs import canonical_id
from eva_rl.seeding import EVALUATION, episode_seeds

HORIZON, NUM_ENVS = 200, 10


@dataclass(frozen=True)
class Turn:
    """One evaluation, with the making of its environments."""

    wall_seconds: float
    cpu_seconds: float
    env_steps: int
    success_rate: float


class PlainTask(gym.Wrapper[Any, Any, Any, Any]):
    """A task as Meta-World makes it; its episodes are numbered from ``first`` on."""

    def __init__(self, env_id: str, first: int, stride: int) -> None:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as classes

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            task = classes[f"{env_id.removeprefix('metaworld/')}-goal-observable"](seed=0)
        task._freeze_rand_vec, task.seeded_rand_vec, task.max_path_length = False, True, HORIZON
        super().__init__(task)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float32)
        self._next, self._stride = first, stride

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start the next episode."""
        self.unwrapped.seed(self._next)  # type: ignore[attr-defined]
        self._next += self._stride
        observation, info = self.env.reset()
        return observation.astype(np.float32), info


def plain_evaluation(policy: DecisionTransformerPolicy, env_id: str, episodes: int) -> tuple[int, float]:
    """The loop that was replaced; returns env steps and success rate."""
    first = episode_seeds(EVALUATION, 0)
    vec_env = DummyVecEnv([partial(PlainTask, env_id, first + i, NUM_ENVS) for i in range(NUM_ENVS)])
    policy.reset([env_id] * NUM_ENVS)
    assert policy._context is not None
    policy._context.decoder = None
    observations: Any = vec_env.reset()
    rewards, starts = np.zeros(NUM_ENVS, np.float32), np.ones(NUM_ENVS, dtype=bool)
    successes, solved, steps = [], np.zeros(NUM_ENVS, dtype=bool), 0
    while len(successes) < episodes:
        observations, rewards, starts, infos = vec_env.step(policy.act(observations, rewards, starts))
        solved |= [bool(info["success"]) for info in infos]
        steps += NUM_ENVS
        if starts.any():
            successes += solved.tolist()
            solved[:] = False
    vec_env.close()
    return steps, float(np.mean(successes[:episodes]))


def evaluation(
    policy: DecisionTransformerPolicy, env_id: str, episodes: int, *, stop_at_success: bool = False
) -> tuple[int, float]:
    """This package's; returns env steps and success rate."""
    result = evaluate_policy(policy, env_id, episodes=episodes, stop_at_success=stop_at_success)
    return sum(episode.length for episode in result.episodes), result.success_rate


def simulator_alone(env_id: str, episodes: int) -> tuple[int, float]:
    """Meta-World's own steps in one process."""
    task, rng = PlainTask(env_id, 0, 1), np.random.default_rng(0)
    for _ in range(episodes):
        task.reset()
        for action in rng.uniform(-1, 1, (HORIZON, 4)).astype(np.float32):
            task.step(action)
    return episodes * HORIZON, float("nan")


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def take_turn(play: Callable[[], tuple[int, float]]) -> Turn:
    """Time one evaluation."""
    wall, cpu = time.perf_counter(), _cpu_seconds()
    steps, success = play()
    return Turn(time.perf_counter() - wall, _cpu_seconds() - cpu, steps, success)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="push-v3", help="a Meta-World task (%(default)s)")
    parser.add_argument("--policy", default="mt40")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy, env_id = load_policy(options.policy), canonical_id(options.env)
    ways: dict[str, Callable[[], tuple[int, float]]] = {
        "plain loop": partial(plain_evaluation, policy, env_id, options.episodes),
        "eva-rl": partial(evaluation, policy, env_id, options.episodes),
        "eva-rl, stopped at success": partial(evaluation, policy, env_id, options.episodes, stop_at_success=True),
        "simulator alone": partial(simulator_alone, env_id, max(1, options.episodes // 5)),
    }
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    for _ in range(options.turns):
        for name, play in ways.items():
            turns[name].append(take_turn(play))
    show(turns, f"{env_id}, {options.episodes} episodes, {os.cpu_count()} cores, {options.threads} thread(s)")
    if options.out:
        figures = {name: [asdict(turn) for turn in taken] for name, taken in turns.items()}
        options.out.write_text(json.dumps({"load_average": os.getloadavg()[0], **figures}, indent=2))


def show(turns: dict[str, list[Turn]], title: str) -> None:
    """Print medians."""
    table = Table(title=title)
    for column in ("way", "env steps/s", "env steps per CPU second", "wall seconds", "success"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, taken in turns.items():
        wall = median(turn.env_steps / turn.wall_seconds for turn in taken)
        cpu = median(turn.env_steps / turn.cpu_seconds for turn in taken)
        seconds = median(turn.wall_seconds for turn in taken)
        table.add_row(name, f"{wall:.0f}", f"{cpu:.0f}", f"{seconds:.1f}", f"{taken[0].success_rate:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
