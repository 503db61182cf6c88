"""Env steps a second: this package's rollouts beside the usual loop around transformers' Decision Transformer.

``python -m benchmarks.speed.rollouts --threads 2 --out rollouts.json``

One set of random weights serves all: it is made here, exported, and loaded by transformers. Every loop plays the same
environments; the time of the simulator is part of every figure. The loops take turns, so that other load on the
machine falls on all of them, and the median of the turns counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.vec_env import VecEnv

from eva_rl import envs
from eva_rl.agents import (
    SIZES,
    Conditioning,
    DecisionTransformer,
    DecisionTransformerConfig,
    DecisionTransformerPolicy,
    export_huggingface,
)
from eva_rl.agents.context import Acting, Window
from eva_rl.batch import InputScaling

TARGET_RETURN, RETURN_SCALE = 6000.0, 1000.0
USUAL = "transformers, batch 1"
Loop = Iterator[NDArray[np.float32]]


@dataclass(frozen=True)
class Measurement:
    """One loop at one context length."""

    loop: str
    context_length: int
    num_envs: int
    env_steps_per_second: float
    times_usual: float
    turns: list[float]


def make_policy(env: str, size: str, context_length: int) -> DecisionTransformerPolicy:
    """A policy with random weights, large enough that its actions vary."""
    spec = envs.env_spec(env)
    torch.manual_seed(0)
    shape = {**SIZES[size], "context_length": context_length}
    network = DecisionTransformer(DecisionTransformerConfig(spec.observation_dim, spec.action_dim, **shape)).eval()
    with torch.no_grad():
        network.action_head.weight.mul_(10)
    zeros, ones = np.zeros(spec.observation_dim), np.ones(spec.observation_dim)
    scaling = InputScaling.create(zeros, ones, RETURN_SCALE, spec.action_low, spec.action_high)
    return DecisionTransformerPolicy(network, scaling, Conditioning(TARGET_RETURN))


def load_transformers(policy: DecisionTransformerPolicy) -> Any:
    """The same weights as a model of transformers."""
    from transformers import DecisionTransformerModel

    with tempfile.TemporaryDirectory() as folder:
        export_huggingface(policy, Path(folder) / "model")
        return DecisionTransformerModel.from_pretrained(Path(folder) / "model").eval()


def our_loop(
    policy: DecisionTransformerPolicy,
    vec_env: VecEnv,
    window: Window,
    acting: Acting = Acting(),  # noqa: B008 - frozen
) -> Loop:
    """Endless env steps with this package; yields each step's actions."""
    n = vec_env.num_envs
    policy.window, policy.acting = window, acting
    policy.reset([""] * n)
    observations: Any = vec_env.reset()
    rewards, starts = np.zeros(n, np.float32), np.ones(n, dtype=bool)
    while True:
        actions = policy.act(observations, rewards, starts)
        yield actions
        observations, rewards, starts, _ = vec_env.step(actions)


@torch.no_grad()
def transformers_loop(model: Any, policy: DecisionTransformerPolicy, vec_env: VecEnv) -> Loop:
    """Endless env steps as published examples do it: growing histories, cut and padded to K, one full forward a step.

    All environments truncate at the same step, so that one history length serves the batch.
    """
    n, K, config = vec_env.num_envs, policy.network.config.context_length, policy.network.config
    starts = np.ones(n, dtype=bool)
    observations: Any = vec_env.reset()
    while True:
        if starts.any():
            assert starts.all(), "this loop needs episodes of equal length"
            states = torch.zeros(n, 0, config.observation_dim)
            actions, rewards = torch.zeros(n, 0, config.action_dim), torch.zeros(n, 0)
            returns, timesteps = torch.full((n, 1, 1), TARGET_RETURN / RETURN_SCALE), torch.zeros(n, 1).long()
        state = policy.scaling.observations(torch.from_numpy(observations)).unsqueeze(1)
        states = torch.cat([states, state], dim=1)
        actions = torch.cat([actions, torch.zeros(n, 1, config.action_dim)], dim=1)
        rewards = torch.cat([rewards, torch.zeros(n, 1)], dim=1)
        length = min(K, states.shape[1])
        mask = torch.cat([torch.zeros(n, K - length), torch.ones(n, length)], dim=1).long()
        predicted = model(
            states=_pad(states[:, -K:], K),
            actions=_pad(actions[:, -K:], K),
            rewards=_pad(rewards[:, -K:, None], K),
            returns_to_go=_pad(returns[:, -K:], K),
            timesteps=_pad(timesteps[:, -K:, None], K)[..., 0],
            attention_mask=mask,
        ).action_preds[:, -1]
        actions[:, -1] = predicted
        chosen = policy.scaling.raw_actions(predicted).numpy()
        yield chosen
        observations, reward, starts, _ = vec_env.step(chosen)
        rewards[:, -1] = torch.from_numpy(reward)
        to_go = returns[:, -1:] - rewards[:, -1, None, None] / RETURN_SCALE
        returns = torch.cat([returns, to_go], dim=1)
        timesteps = torch.cat([timesteps, timesteps[:, -1:] + 1], dim=1)


def _pad(x: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([x.new_zeros(x.shape[0], length - x.shape[1], x.shape[2]), x], dim=1)


def steps_per_second(loop: Loop, num_envs: int, seconds: float) -> float:
    """Env steps a second of a running loop."""
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        next(loop)
        steps += num_envs
    return steps / (time.perf_counter() - began)


def measure(options: argparse.Namespace, context_length: int) -> tuple[list[Measurement], float]:
    """All loops at one context length; and how far the usual loop's first actions are from ours.

    Later ones drift apart: the simulator amplifies the last bits.
    """
    policy = make_policy(options.env, options.size, context_length)
    model = load_transformers(policy)
    policy.to(options.device)
    n = options.num_envs
    makers: dict[str, tuple[int, Callable[[DecisionTransformerPolicy, VecEnv], Loop]]] = {
        USUAL: (1, lambda p, v: transformers_loop(model, p, v)),
        "transformers, batched": (n, lambda p, v: transformers_loop(model, p, v)),
        "eva-rl, full window": (n, lambda p, v: our_loop(p, v, "full")),
        "eva-rl, cached": (n, lambda p, v: our_loop(p, v, "cached")),
        "eva-rl, cached, batch 1": (1, lambda p, v: our_loop(p, v, "cached")),
    }
    if options.device != "cpu":  # the usual loops build their histories on the CPU
        makers = {name: maker for name, maker in makers.items() if name.startswith("eva-rl")}
    if options.variants:
        mode = "default" if options.device == "cpu" else "reduce-overhead"
        makers |= {
            "eva-rl, growing": (n, lambda p, v: our_loop(p, v, "growing")),
            "eva-rl, static": (n, lambda p, v: our_loop(p, v, "static")),
            "eva-rl, bfloat16": (n, lambda p, v: our_loop(p, v, "cached", Acting("bfloat16"))),
            f"eva-rl, compiled ({mode})": (n, lambda p, v: our_loop(p, v, "static", Acting(compile=mode))),
        }
    loops = {}
    for name, (num_envs, make) in makers.items():
        own = DecisionTransformerPolicy(policy.network, policy.scaling, policy.conditioning)
        loops[name] = make(own, envs.make_vec_env(options.env, num_envs, seed=0))
    first = {name: next(loop) for name, loop in loops.items()}
    difference = 0.0
    if options.device == "cpu":
        difference = float(np.abs(first["transformers, batched"] - first["eva-rl, full window"]).max())
    for loop in loops.values():  # until every window is full
        for _ in range(context_length + 10):
            next(loop)
    turns: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(options.turns):
        for name, loop in loops.items():
            turns[name].append(steps_per_second(loop, makers[name][0], options.seconds))
    usual = median(turns.get(USUAL) or turns["eva-rl, full window"])
    return [
        Measurement(name, context_length, makers[name][0], median(t), median(t) / usual, t) for name, t in turns.items()
    ], difference


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    from transformers import __version__ as transformers_version

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers_version,
        "env": options.env,
        "size": options.size,
    }


def show(measurements: list[Measurement], facts: dict[str, Any]) -> None:
    """Print a table."""
    table = Table(title=f"Env steps a second, {facts['env']}, size {facts['size']}, {facts['threads']} thread(s)")
    for column in ("K", "loop", "envs", "env steps/s", "x usual"):
        table.add_column(column, justify="left" if column == "loop" else "right")
    for m in measurements:
        row = (m.context_length, m.loop, m.num_envs, f"{m.env_steps_per_second:.0f}", f"{m.times_usual:.1f}")
        table.add_row(*map(str, row))
    Console().print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5", help="a task without early ends (%(default)s)")
    parser.add_argument("--size", default="small", choices=SIZES, help="shape of the network (%(default)s)")
    parser.add_argument("--context-lengths", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--device", default="cpu", help="on a GPU, the comparison is with our own full windows")
    parser.add_argument("--variants", action="store_true", help="also static shapes, bfloat16 and torch.compile")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one turn of one loop")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts, measurements = machine(options), []
    for context_length in options.context_lengths:
        measured, difference = measure(options, context_length)
        measurements += measured
        facts[f"first_actions_differ_by_at_K{context_length}"] = difference
    show(measurements, facts)
    if options.out:
        options.out.write_text(json.dumps({"machine": facts, "figures": [asdict(m) for m in measurements]}, indent=2))


if __name__ == "__main__":
    main()
