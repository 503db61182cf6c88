"""What each ``adapter=`` costs on the shipped policy: parameters, bytes, memory, and seconds to start and an update.

``python benchmarks/adapters.py --out adapters.json``

Every method is fine-tuned by the command itself, in a process of its own, on the same demonstrations, and the figures
are those of its ``summary.json``. The methods take turns, so that other load on the machine falls on all of them;
seconds are the least of the turns, memory the median. Nothing here says which method learns better: that takes many
seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from eva_rl.adapters import METHODS


@dataclass(frozen=True)
class Row:
    """One method; memory is how much the process grew while it trained."""

    method: str
    trainable_parameters: int
    adapter_bytes: int
    peak_memory_bytes: float
    seconds_to_start: float
    seconds_per_update: float


def command(module: str, *arguments: str) -> None:
    """Run a command of eva-rl, quietly.

    Raises:
        RuntimeError: It failed; with what it said.
    """
    asked = [sys.executable, "-m", f"eva_rl.{module}", *arguments]
    ended = subprocess.run(asked, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)}\n{ended.stderr[-2000:]}")


def run(method: str, options: argparse.Namespace, demonstrations: Path, run_dir: Path) -> dict[str, Any]:
    """The summary of one run of fine-tuning."""
    command(
        "finetune",
        f"env={options.env}",
        f"data={demonstrations}",
        f"adapter={method}",
        f"adapter.rank={options.rank}",
        f"algo.updates={options.updates}",
        "eval.episodes=1",
        "eval.every=0",
        "checkpoint.every=0",
        f"threads={options.threads}",
        f"device={options.device}",
        f"run_dir={run_dir}",
    )
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def row(method: str, summaries: list[dict[str, Any]]) -> Row:
    """What the turns of a method say together."""
    first = summaries[0]
    return Row(
        method,
        first["trainable_parameters"],
        first["adapter_bytes"],
        median(summary["peak_memory_bytes"] for summary in summaries),
        min(summary["seconds"]["adapter"] for summary in summaries),
        min(summary["seconds_per_update"] for summary in summaries),
    )


def markdown(rows: list[Row]) -> str:
    """The table of docs/adapters.md."""
    lines = [
        "| adapter | trainable parameters | KiB on disk | MiB while training | s to start | ms an update |",
        "|---|---|---|---|---|---|",
    ]
    for one in rows:
        cells = (
            f"`{one.method}`",
            f"{one.trainable_parameters:,}",
            f"{one.adapter_bytes / 1024:,.0f}",
            f"{one.peak_memory_bytes / 2**20:.0f}",
            f"{one.seconds_to_start:.2f}",
            f"{one.seconds_per_update * 1000:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Collect once, run all methods in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--env", default="push-v3")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in options.methods}
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as temporary:
        demonstrations = Path(temporary) / "demonstrations.h5"
        command("collect", f"env={options.env}", "episodes=10", f"out={demonstrations}", "workers=1")
        for turn in range(options.turns):
            for method in options.methods:
                console.print(f"turn {turn + 1}: {method}")
                found[method].append(run(method, options, demonstrations, Path(temporary) / f"{method}-{turn}"))
    rows = [row(method, summaries) for method, summaries in found.items()]
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
