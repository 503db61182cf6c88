"""Table and curves of online runs: ``python benchmarks/online_report.py runs/online/push-back --out docs/results``.

Every folder named holds one run a seed, as ``benchmarks/online.sh`` leaves them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pictures
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from eva_rl.tracking.tracker import read_metrics


def key_of(summary: dict[str, Any]) -> str:
    """What a task is judged by."""
    return "success_rate" if "eval/success_rate" in summary else "mean_reward"


def row_of(run: Path) -> dict[str, Any]:
    """What a run reached, on its held-out episodes."""
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    key = key_of(summary)
    start = "eval_cloned" if f"eval_cloned/{key}" in summary else "eval_before"
    return {
        "env": summary["env"],
        "algo": summary["algo"],
        "adapter": summary["method"],
        "seed": summary["seed"],
        "judged_by": key,
        "pretrained": summary[f"eval_before/{key}"],
        "before_online": summary[f"{start}/{key}"],
        "after": summary[f"eval/{key}"],
        "env_steps": summary["env_steps"],
        "best_step": summary.get("best_step"),
        "updates": summary["updates"],
        "seconds": round(sum(summary["seconds"].values())),
        "protocol": summary["protocol"],
        "curve": [(row["step"], row[f"validation/{key}"]) for row in read_metrics(run) if f"validation/{key}" in row],
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The table, with the mean over seeds."""
    table = Table("seed", "pretrained", "before online", "after", "gain", "env steps", "of the best", "seconds")
    for row in rows:
        gain = row["after"] - row["before_online"]
        numbers = [f"{row[name]:.2f}" for name in ("pretrained", "before_online", "after")]
        table.add_row(
            str(row["seed"]),
            *numbers,
            f"{gain:+.2f}",
            str(row["env_steps"]),
            str(row["best_step"]),
            str(row["seconds"]),
        )
    means = [np.mean([row[name] for row in rows]) for name in ("pretrained", "before_online", "after")]
    table.add_row("mean", *(f"{mean:.2f}" for mean in means), f"{means[2] - means[1]:+.2f}", "", "", "")
    first = rows[0]
    console = Console(width=120)
    console.print(f"{first['env']}, {first['algo']}, adapter={first['adapter']}, {first['judged_by']}")
    console.print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Validation against env steps, one line a seed."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows):
        steps, values = zip(*row["curve"], strict=True)
        axes.plot(steps, values, color=f"C{index}", marker="o", label=f"seed {row['seed']}")
        axes.axhline(row["before_online"], color=f"C{index}", ls=":", lw=1)
    key = rows[0]["judged_by"]
    axes.set(
        xlabel="env steps",
        ylabel=f"{'success rate' if key == 'success_rate' else 'mean return'} on validation episodes",
        title=f"{rows[0]['env'].removeprefix('metaworld/')}, algo={rows[0]['algo']}",
    )
    if key == "success_rate":
        axes.set_ylim(-0.02, 1.02)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="dotted: held out, before online")
    pictures.save(figure, path)


def main() -> None:
    """Show, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="each holds runs that differ in their seed")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    for folder in arguments.folders:
        rows = [row_of(run) for run in sorted(folder.iterdir()) if (run / "summary.json").exists()]
        show(rows)
        if arguments.out:
            (arguments.out / f"online-{folder.name}.json").write_text(json.dumps(rows, indent=1) + "\n")
            draw(rows, arguments.out / f"online-{folder.name}.png")


if __name__ == "__main__":
    main()
