"""Env steps and gradient steps a second of the online algorithms, beside Stable-Baselines3's own MLP and a plain loop.

``python -m benchmarks.speed.online --threads 1 --out online.json``

All act and learn in the same environments, with equal numbers of gradient steps an env step. "plain full window" is our
Online Decision Transformer as it is usually run: one environment, the whole window at every step. The time of the
simulator is part of every figure. The loops take turns, so that other load on the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3 import SAC

from eva_rl import envs
from eva_rl.agents import SIZES, Conditioning, DecisionTransformer, DecisionTransformerConfig, DecisionTransformerPolicy
from eva_rl.batch import InputScaling
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.training.collector import TaskEnvs
from eva_rl.training.odt import OnlineDecisionTransformer
from eva_rl.training.odt_td3 import TD3DecisionTransformer
from eva_rl.training.online import train_online
from eva_rl.training.options import ODTOptions, OffPolicyOptions, ResidualOptions, SACOptions, TD3Options
from eva_rl.training.residual.learner import ResidualLearner
from eva_rl.training.sb3 import make_model, train_sb3

ENV, BATCH = "Hopper-v5", 64
PLAIN, MLP = "odt, plain full window", "sac, own MLP"


def make_policy(stochastic: bool) -> DecisionTransformerPolicy:
    """A small Decision Transformer with random weights."""
    spec = envs.env_spec(ENV)
    shape = SIZES["small"]
    config = DecisionTransformerConfig(spec.observation_dim, spec.action_dim, **shape, stochastic=stochastic)
    scaling = InputScaling.create(
        [0.0] * spec.observation_dim, [1.0] * spec.observation_dim, 1000.0, spec.action_low, spec.action_high
    )
    return DecisionTransformerPolicy(DecisionTransformer(config).eval(), scaling, Conditioning(3000.0))


def replayed(name: str, num_envs: int, window: str) -> Callable[[int, int], None]:
    """One of our own loops; takes env steps and gradient steps for every thousand of them."""

    def run(env_steps: int, updates: int) -> None:
        policy = make_policy(name == "odt")
        policy.window = "full" if window == "full" else "cached"
        loop = {"env_steps": env_steps, "steps_per_iteration": 1000, "updates_per_iteration": updates}
        learner = (
            OnlineDecisionTransformer(policy, ODTOptions(batch_size=BATCH, **loop))
            if name == "odt"
            else TD3DecisionTransformer(policy, TD3Options(batch_size=BATCH, critic_warmup=0, **loop))
        )
        vec_env = envs.make_vec_env(ENV, num_envs)
        replay = TrajectoryReplay(env_steps * 2, policy.observation_dim, policy.action_dim)
        train_online(learner, replay, TaskEnvs(vec_env, ENV, False), log=lambda *_: None)
        vec_env.close()

    return run


def on_windows(name: str, num_envs: int) -> Callable[[int, int], None]:
    """Stable-Baselines3 on our windows."""

    def run(env_steps: int, updates: int) -> None:
        vec_env = envs.make_vec_env(ENV, num_envs)
        options = (SACOptions if name == "sac" else OffPolicyOptions)(
            env_steps=env_steps,
            eval_every=0,
            batch_size=BATCH,
            learning_starts=0,
            train_freq=1000 // num_envs,
            gradient_steps=updates,
        )
        task = TaskEnvs(vec_env, ENV, False)
        train_sb3(make_model(make_policy(False), task, options), task, options, log=lambda *_: None)
        vec_env.close()

    return run


def residual(num_envs: int, hidden_size: int, **options: int) -> Callable[[int, int], None]:
    """Residual learning on the frozen policy, with critics and an actor of some width, and other options."""

    def run(env_steps: int, updates: int) -> None:
        asked = ResidualOptions(
            env_steps=env_steps,
            steps_per_iteration=1000,
            updates_per_iteration=updates,
            batch_size=BATCH,
            learning_starts=0,
            critic_warmup=0,
            critic_hidden_size=hidden_size,
            actor_hidden_size=hidden_size,
            **options,  # type: ignore[arg-type]
        )
        learner, vec_env = ResidualLearner(make_policy(False), asked), envs.make_vec_env(ENV, num_envs)
        task = TaskEnvs(vec_env, ENV, False)
        train_online(learner, learner.new_replay(env_steps * 2), task, log=lambda *_: None)
        vec_env.close()

    return run


def mlp(num_envs: int) -> Callable[[int, int], None]:
    """Stable-Baselines3's own SAC."""

    def run(env_steps: int, updates: int) -> None:
        vec_env = envs.make_vec_env(ENV, num_envs)
        every = (1000 // num_envs, "step")
        model = SAC("MlpPolicy", vec_env, batch_size=BATCH, learning_starts=0, train_freq=every, gradient_steps=updates)
        model.learn(env_steps)
        vec_env.close()

    return run


def measure(loops: dict[str, Callable[[int, int], None]], env_steps: int, updates: int, turns: int) -> dict[str, float]:
    """Median CPU seconds of each loop, of all its threads: other load on the machine hardly matters."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(turns):
        for name, loop in loops.items():
            began = time.process_time()
            loop(env_steps, updates)
            seconds[name].append(time.process_time() - began)
    return {name: median(times) for name, times in seconds.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--env-steps", type=int, default=4000)
    parser.add_argument("--updates", type=int, default=20, help="gradient steps for every 1,000 env steps")
    parser.add_argument("--num-envs", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of the names of the loops to measure")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    n = arguments.num_envs
    loops = {
        "odt": replayed("odt", n, "cached"),
        "odt_td3": replayed("odt_td3", n, "cached"),
        "sac on windows": on_windows("sac", n),
        "td3 on windows": on_windows("td3", n),
        "residual, 256 wide": residual(n, 256),
        "residual, 128 wide": residual(n, 128),
        "residual, two critics with embeddings": residual(n, 256, critics=2, policy_delay=2, embedding_size=256),
        MLP: mlp(n),
        PLAIN: replayed("odt", 1, "full"),
    }
    loops = {name: loop for name, loop in loops.items() if not arguments.only or name.startswith(tuple(arguments.only))}
    reference = PLAIN if PLAIN in loops else MLP
    found = measure(loops, arguments.env_steps, arguments.updates, arguments.turns)
    updates = arguments.updates * arguments.env_steps / 1000
    table = Table("loop", "env steps/s", "gradient steps/s", f"times {reference}")
    for name, seconds in found.items():
        ratio = found[reference] / seconds
        table.add_row(name, f"{arguments.env_steps / seconds:.0f}", f"{updates / seconds:.1f}", f"{ratio:.1f}")
    Console().print(table)
    if arguments.out:
        arguments.out.write_text(json.dumps({"arguments": vars(arguments) | {"out": ""}, "seconds": found}, indent=2))


if __name__ == "__main__":
    main()
