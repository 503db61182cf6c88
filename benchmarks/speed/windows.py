"""Windows per second beside the usual ways to draw them, and what opening and mapping large data costs.

    python -m benchmarks.speed.windows [steps=2000000] [batch=256] [context=20]

One run, one thread. The per-sample loader is written here the way Decision Transformer trainers usually do it: a list
of episodes, one slice per sample, normalised and padded on its own, stacked by torch's DataLoader. The other peer takes
random episodes from a Minari data set and cuts a window out of each.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, IterableDataset

from eva_rl.batch import InputScaling
from eva_rl.data import PrefetchingSampler, Trajectories, WindowSampler, load_dataset, save_minari

OBSERVATION_DIM, ACTION_DIM, EPISODE = 17, 6, 1000
MINARI_EPISODES = 300
"""Its cost per window does not depend on their number."""
SECONDS = 3.0
"""How long each way is measured."""


class PerSample(IterableDataset[tuple[Any, ...]]):
    """One window after another, cut, normalised and padded by itself."""

    def __init__(self, data: Trajectories, context: int, mean: Any, std: Any) -> None:
        returns = data.returns_to_go
        rows = [slice(begin, end) for begin, end in zip(data.offsets[:-1], data.offsets[1:], strict=True)]
        self.episodes = [(data.observations[r], data.actions[r], returns[r]) for r in rows]
        self.probabilities = data.lengths / data.lengths.sum()
        self.context, self.mean, self.std = context, mean, std

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        rng = np.random.default_rng(0)
        while True:
            episode = rng.choice(len(self.episodes), p=self.probabilities)
            yield self.window(episode, int(rng.integers(len(self.episodes[episode][0]))))

    def window(self, episode: int, begin: int) -> tuple[Any, ...]:
        """Observations, actions, returns-to-go, timesteps and mask of one window."""
        observations, actions, returns = (array[begin : begin + self.context] for array in self.episodes[episode])
        real = len(observations)
        padding = ((0, self.context - real), (0, 0))
        return (
            np.pad((observations - self.mean) / self.std, padding).astype(np.float32),
            np.pad(actions, padding),
            np.pad(returns, padding[0]),
            np.arange(begin, begin + self.context),
            np.arange(self.context) < real,
        )


def minari_batch(dataset: Any, batch: int, context: int, rng: np.random.Generator) -> Any:
    """Random episodes from disk, and a window of each."""
    windows: list[tuple[Any, ...]] = []
    count = min(batch, dataset.total_episodes)
    while len(windows) < batch:
        windows += [minari_window(episode, context, rng) for episode in dataset.sample_episodes(count)]
    return [torch.from_numpy(np.stack(part[:batch])) for part in zip(*windows, strict=True)]


def minari_window(episode: Any, context: int, rng: np.random.Generator) -> tuple[Any, ...]:
    """A random window of one episode."""
    begin = int(rng.integers(len(episode.rewards) - context))
    rows = slice(begin, begin + context)
    returns = np.cumsum(episode.rewards[::-1])[::-1]
    return episode.observations[rows], episode.actions[rows], returns[rows].copy()


def milliseconds(draw: Callable[[int], object]) -> float:
    """Mean time of a batch, after a first one."""
    draw(0)
    began, batches = time.perf_counter(), 0
    while batches < 2 or time.perf_counter() - began < SECONDS:
        batches += 1
        draw(batches)
    return 1000 * (time.perf_counter() - began) / batches


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def anonymous_megabytes() -> float:
    """Memory of this process that is not a mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def write_table(path: Path, steps: int) -> None:
    """A file in D4RL's layout, of noise."""
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((steps, OBSERVATION_DIM), np.float32)
    with h5py.File(path, "w") as file:
        file["observations"] = file["next_observations"] = observations
        file["actions"] = rng.uniform(-1, 1, (steps, ACTION_DIM)).astype(np.float32)
        file["rewards"] = rng.standard_normal(steps, np.float32)
        file["terminals"] = np.zeros(steps, bool)
        file["timeouts"] = np.arange(1, steps + 1) % EPISODE == 0


def measure(folder: Path, steps: int, batch: int, context: int) -> tuple[Table, Table]:
    """Both tables: opening, and drawing."""
    scaling = InputScaling.create(
        np.zeros(OBSERVATION_DIM), np.ones(OBSERVATION_DIM), 1000.0, [-1.0] * ACTION_DIM, [1.0] * ACTION_DIM
    )
    path = folder / "halfcheetah_medium-v2.hdf5"
    write_table(path, steps)
    opening = Table(
        "opening and first batch", "s", "memory grown by, MB", title=f"{steps:,} transitions of 17+6 numbers"
    )

    def first_batch(**options: bool) -> tuple[Trajectories, WindowSampler]:
        data = load_dataset(f"d4rl:{path}", **options)
        sampler = WindowSampler(data, context, scaling)
        sampler.sample(batch, 0)
        return data, sampler

    samplers = {}
    for name, mapped in (("mapped, first time", True), ("mapped, from then on", True), ("read into memory", False)):
        before = anonymous_megabytes()
        (data, samplers[name]), seconds = timed(lambda mapped=mapped: first_batch(memory_map=mapped))  # type: ignore[misc]
        opening.add_row(name, f"{seconds:.2f}", f"{anonymous_megabytes() - before:.0f}")
    loader = iter(DataLoader(PerSample(data, context, np.zeros(OBSERVATION_DIM), np.ones(OBSERVATION_DIM)), batch))
    save_minari(data.select(np.arange(min(MINARI_EPISODES, data.num_episodes))), "benchmark/windows-v0")
    dataset, rng = minari.load_dataset("benchmark/windows-v0"), np.random.default_rng(0)
    ways: dict[str, Callable[[int], object]] = {
        "eva-rl, in memory": lambda step: samplers["read into memory"].sample(batch, step),
        "eva-rl, mapped": lambda step: samplers["mapped, from then on"].sample(batch, step),
        "usual per-sample loader": lambda _: next(loader),
        "episodes of Minari": lambda _: minari_batch(dataset, batch, context, rng),
    }
    drawing = Table(
        "drawing", "ms a batch", "windows/s", "eva-rl is faster by", title=f"{batch} windows of {context} steps"
    )
    times = {name: milliseconds(draw) for name, draw in ways.items()}
    with PrefetchingSampler(samplers["read into memory"]) as ahead:
        times["eva-rl, prefetched, beside 20 ms of work"] = milliseconds(
            lambda s: (time.sleep(0.02), ahead.sample(batch, s))
        )
    for name, cost in times.items():
        factor = f"{cost / times['eva-rl, in memory']:.1f} x" if "eva" not in name else ""
        drawing.add_row(name, f"{cost:.2f}", f"{1000 * batch / cost:,.0f}", factor)
    return opening, drawing


def main() -> None:
    """Measure in a temporary folder, and print."""
    options = {"steps": 2_000_000, "batch": 256, "context": 20}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shown = " ".join(f"{key}={value}" for key, value in options.items())
    parser.add_argument("options", nargs="*", metavar="KEY=NUMBER", help=f"by default {shown}")
    options |= {key: int(value) for key, _, value in (word.partition("=") for word in parser.parse_args().options)}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"EVA_RL_CACHE": f"{folder}/cache", "MINARI_DATASETS_PATH": f"{folder}/minari"}
        for table in measure(Path(folder), **options):
            Console().print(table)


if __name__ == "__main__":
    main()
