"""Peak memory of training: the 12M policy at batch 128, and a data set four times the memory it may use.

    python -m benchmarks.speed.memory policy
    python -m benchmarks.speed.memory data

`policy` takes one gradient step of the shape `base` (K = 50) and prints the process's largest resident size. `data`
writes a store four times `--limit` MiB, limits this process's private memory to that (RLIMIT_DATA, which does
not count mapped files), shows that reading the store whole fails, and trains from it.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from eva_rl.agents import SIZES, Conditioning, DecisionTransformer, DecisionTransformerConfig, DecisionTransformerPolicy
from eva_rl.batch import InputScaling
from eva_rl.data import Trajectories, WindowSampler, write_store
from eva_rl.data.formats.store import read_store
from eva_rl.training.bc import train_bc
from eva_rl.training.options import BCOptions

OBSERVATION, ACTION, LENGTH = 39, 4, 200
WIDE = 400
"""Numbers in an observation of the large store: what is kept per env step besides is small beside them."""


def episodes(steps: int, width: int, seed: int) -> Trajectories:
    """Random whole episodes."""
    rng, number = np.random.default_rng(seed), steps // LENGTH
    ends = np.zeros(number * LENGTH, bool)
    ends[LENGTH - 1 :: LENGTH] = True
    return Trajectories(
        observations=rng.standard_normal((number * LENGTH, width), np.float32),
        actions=rng.uniform(-1, 1, (number * LENGTH, ACTION)).astype(np.float32),
        rewards=rng.standard_normal(number * LENGTH, np.float32),
        terminations=np.zeros(number * LENGTH, bool),
        truncations=ends,
        final_observations=rng.standard_normal((number, width), np.float32),
        offsets=np.arange(0, number * LENGTH + 1, LENGTH),
    )


def train(data: Trajectories, size: str, batch: int, accumulate: int, updates: int) -> float:
    """Seconds a gradient step."""
    torch.manual_seed(0)
    config = DecisionTransformerConfig(data.observations.shape[1], ACTION, **SIZES[size])
    zeros, ones = [0.0] * config.observation_dim, [1.0] * config.observation_dim
    scaling = InputScaling.create(zeros, ones, 100.0, [-1.0] * ACTION, [1.0] * ACTION)
    policy = DecisionTransformerPolicy(DecisionTransformer(config), scaling, Conditioning(100.0))
    sampler = WindowSampler(data, config.context_length, scaling)
    options = BCOptions(updates=updates, batch_size=batch, accumulate=accumulate, warmup_steps=1, log_every=1)
    return train_bc(policy, sampler, options, log=lambda metrics, step: None).seconds / updates


def measure_policy(options: argparse.Namespace) -> None:
    """One gradient step of the 12M policy."""
    seconds = train(episodes(4000, OBSERVATION, 0), options.size, options.batch, options.accumulate, options.updates)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        f"{options.size}, batch {options.batch}, in {options.accumulate} parts: {peak:.0f} MiB at most, {seconds:.1f} s"
        " a gradient step"
    )


def measure_data(options: argparse.Namespace) -> None:
    """Training from a store four times the limit."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store, rows = Path(folder) / "store", 16_000
        parts = max(1, round(4 * options.limit * 2**20 / (rows * 4 * WIDE)))

        def pieces() -> Iterator[Trajectories]:
            for seed in range(parts):
                yield episodes(rows, WIDE, seed)

        write_store(store, pieces(), "random")
        size = sum(path.stat().st_size for path in store.iterdir()) / 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (options.limit * 2**20,) * 2)
        try:
            np.load(store / "observations.npy")
            raise SystemExit("The limit does not limit: the whole store was read into memory.")
        except MemoryError:
            print(f"A store of {size:.0f} MiB does not fit into {options.limit} MiB of memory.")
        began = time.perf_counter()
        train(read_store(store), "small", 64, 1, options.updates)
        print(f"{options.updates} gradient steps from it, mapped: done in {time.perf_counter() - began:.1f} s.")


def main() -> None:
    """Measure one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["policy", "data"])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--limit", type=int, default=1024, help="MiB of private memory, for data")
    parser.add_argument("--folder", help="where the store is written for a while")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    (measure_policy if options.what == "policy" else measure_data)(options)


if __name__ == "__main__":
    main()
