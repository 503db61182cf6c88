"""Gradient steps a second on 1, 2, ... processes of this machine, for the same global batch.

    python -m benchmarks.speed.scaling --processes 1 2

Each run is `torchrun` around this file; every process has one thread. What counts is the ratio within one call: the
processes share the machine's cores with whatever else it does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from eva_rl.agents import SIZES, Conditioning, DecisionTransformer, DecisionTransformerConfig, DecisionTransformerPolicy
from eva_rl.batch import InputScaling
from eva_rl.data import Trajectories, WindowSampler
from eva_rl.data.samplers import ShardedSampler
from eva_rl.distributed import init_distributed
from eva_rl.training.bc import train_bc
from eva_rl.training.options import BCOptions

OBSERVATION, ACTION, EPISODES, LENGTH = 39, 4, 20, 200


def make_data() -> Trajectories:
    """Random env steps of Meta-World's dimensions."""
    rng, steps = np.random.default_rng(0), EPISODES * LENGTH
    ends = np.zeros(steps, bool)
    ends[LENGTH - 1 :: LENGTH] = True
    return Trajectories(
        observations=rng.normal(size=(steps, OBSERVATION)).astype(np.float32),
        actions=rng.uniform(-1, 1, (steps, ACTION)).astype(np.float32),
        rewards=rng.normal(size=steps).astype(np.float32),
        terminations=np.zeros(steps, bool),
        truncations=ends,
        final_observations=rng.normal(size=(EPISODES, OBSERVATION)).astype(np.float32),
        offsets=np.arange(0, steps + 1, LENGTH),
    )


def train(options: argparse.Namespace) -> None:
    """One process's part: train, and let the first say how long it took."""
    torch.set_num_threads(1)
    ranks = init_distributed(torch.device("cpu"))
    torch.manual_seed(0)
    config = DecisionTransformerConfig(OBSERVATION, ACTION, **SIZES[options.size])
    scaling = InputScaling.create([0.0] * OBSERVATION, [1.0] * OBSERVATION, 100.0, [-1.0] * ACTION, [1.0] * ACTION)
    policy = DecisionTransformerPolicy(DecisionTransformer(config), scaling, Conditioning(100.0))
    sampler = ShardedSampler(WindowSampler(make_data(), config.context_length, scaling), ranks)
    seconds: list[float] = []

    def log(metrics: object, step: int) -> None:
        assert isinstance(metrics, dict)
        seconds.append(step / metrics["time/updates_per_second"])

    loop = BCOptions(updates=options.updates + 2, batch_size=options.batch, log_every=1, warmup_steps=1)
    train_bc(policy, sampler, loop, log=log)
    if ranks.first:
        Path(options.result).write_text(json.dumps(np.diff(seconds)[1:].tolist()))


def main() -> None:
    """Start the runs and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=64, help="windows a gradient step, of all processes together")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--turns", type=int, default=2, help="the runs take turns")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling.json"))
    parser.add_argument("--result", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result:
        train(options)
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[int, list[float]] = {number: [] for number in options.processes}
    for _ in range(options.turns):
        for number in options.processes:
            result = options.out.with_name(f"{options.out.name}.{number}")
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
            given = ["--size", options.size, "--batch", str(options.batch), "--updates", str(options.updates)]
            subprocess.run([*launcher, "-m", "benchmarks.speed.scaling", *given, "--result", str(result)], check=True)
            found[number] += json.loads(result.read_text())
            result.unlink()
    table = Table("processes", "gradient steps/s", "times one process", title=f"{options.size}, batch {options.batch}")
    medians = {number: float(np.median(seconds)) for number, seconds in found.items()}
    for number, median in medians.items():
        table.add_row(str(number), f"{1 / median:.2f}", f"{medians[options.processes[0]] / median:.2f}")
    Console().print(table)
    options.out.write_text(json.dumps({"options": vars(options) | {"out": str(options.out)}, "seconds": medians}))


if __name__ == "__main__":
    main()
