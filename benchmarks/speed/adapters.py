"""What each ``adapter=`` costs on the shipped policy: parameters, bytes, memory, and seconds to start and an update.

``python -m benchmarks.speed.adapters --out adapters.json``

Every method is attached, trained for a few updates and saved by the code of ``python -m eva_rl.finetune``, on the same
demonstrations, in a forked process of its own whose memory is watched. The methods take turns; seconds are CPU seconds
of the process on one thread, which other load on the machine does not stretch much, and the least of the turns counts.
Nothing here says which method learns better: that takes many seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import tempfile
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import process_time

import torch
from rich.console import Console

from benchmarks import pages
from eva_rl.adapters import METHODS, adapter_bytes, count_parameters, load_policy, save_adapted_policy
from eva_rl.cli.parsing import parse
from eva_rl.cli.profiling import peak_memory
from eva_rl.data import Trajectories, WindowSampler
from eva_rl.finetune import command  # noqa: F401 - registers its config
from eva_rl.finetune.adapter import attach
from eva_rl.rollouts.experts import collect_expert
from eva_rl.training.bc import train_bc


@dataclass(frozen=True)
class Row:
    """One method; memory is by how much the process grew while it started and trained."""

    method: str
    trainable_parameters: int
    adapter_bytes: int
    peak_memory_bytes: float
    seconds_to_start: float
    seconds_per_update: float


def measure(method: str, options: argparse.Namespace, data: Trajectories) -> Row:
    """Attach, train and save one method in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    asked = [
        f"adapter={method}",
        f"adapter.rank={options.rank}",
        f"algo.updates={options.updates}",
        "algo.warmup_steps=1",
    ]
    config = parse("finetune", [f"env={options.env}", *asked])
    policy = load_policy("mt40")
    sampler = WindowSampler(data, policy.network.config.context_length, policy.scaling)
    began = process_time()
    with peak_memory(torch.device("cpu")) as memory:
        adapter = attach(policy, sampler, config)
        attached = process_time()
        train_bc(policy, sampler, config.algo, log=lambda *_: None, extension=adapter.extension)
    trained = process_time()
    trainable = count_parameters(policy.network)["trainable_parameters"]
    with tempfile.TemporaryDirectory() as temporary:
        save_adapted_policy(Path(temporary) / "policy", policy, adapter, "")
        size = adapter_bytes(Path(temporary) / "policy") or 4 * trainable
    return Row(
        method,
        trainable,
        size,
        memory["peak_memory_bytes"],
        attached - began,
        (trained - attached) / options.updates,
    )


def in_a_fork(method: str, options: argparse.Namespace, data: Trajectories) -> Row:
    """:func:`measure` in a process that has seen no other method.

    Raises:
        RuntimeError: It failed; its own message says why.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run(answer: Connection) -> None:
        answer.send(measure(method, options, data))

    process = context.Process(target=run, args=(theirs,))
    process.start()
    theirs.close()
    try:
        found: Row = ours.recv()
    except EOFError as error:
        raise RuntimeError(f"{method} failed") from error
    process.join()
    return found


def together(turns: list[Row]) -> Row:
    """What the turns of a method say."""
    first = turns[0]
    return Row(
        first.method,
        first.trainable_parameters,
        first.adapter_bytes,
        median(row.peak_memory_bytes for row in turns),
        min(row.seconds_to_start for row in turns),
        min(row.seconds_per_update for row in turns),
    )


def markdown(rows: list[Row]) -> str:
    """The table of docs/adapters.md."""
    heads = ("adapter", "trainable parameters", "KiB on disk", "MiB at the peak", "CPU s to start", "CPU ms an update")
    cells = (
        (
            f"`{one.method}`",
            f"{one.trainable_parameters:,}",
            f"{one.adapter_bytes / 1024:,.0f}",
            f"{one.peak_memory_bytes / 2**20:.0f}",
            f"{one.seconds_to_start:.2f}",
            f"{one.seconds_per_update * 1000:.0f}",
        )
        for one in rows
    )
    return pages.table(heads, cells)


def main() -> None:
    """Collect once, run all methods in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--env", default="push-v3")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    data = collect_expert(options.env, 10, seed=0)
    found: dict[str, list[Row]] = {method: [] for method in options.methods}
    for turn in range(options.turns):
        for method in options.methods:
            console.print(f"turn {turn + 1}: {method}")
            found[method].append(in_a_fork(method, options, data))
    rows = [together(turns) for turns in found.values()]
    print(markdown(rows))
    if options.out:
        about = {
            "torch": torch.__version__,
            "machine": platform.platform(),
            **{key: value for key, value in vars(options).items() if key != "out"},
        }
        options.out.write_text(json.dumps({"about": about, "rows": [asdict(one) for one in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
