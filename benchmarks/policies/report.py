"""Tables and the training curve of a shipped policy, from its run directory and its evaluations.

    python -m benchmarks.policies.report --run runs/mt40/pretrain --evaluations mt40.json cw10.json --out docs/results

Writes `NAME.md` (the tables, which docs/mt40.md repeats), `NAME-curve.png`, and `NAME.json` (per task, without the
single episodes).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import pages, pictures
from eva_rl.tracking.tracker import read_metrics


def section(name: str, evaluation: dict[str, Any]) -> list[str]:
    """One evaluation as Markdown."""
    rows = []
    for task, result in evaluation["tasks"].items():
        (low, high), metrics = result["success_interval_95"], result["metrics"]
        success, at_end, returns = (metrics[f"eval/{key}"] for key in ("success_rate", "success_at_end", "mean_reward"))
        short = task.removeprefix("metaworld/")
        rows.append([short, f"{success:.2f}", f"{low:.2f} to {high:.2f}", f"{at_end:.2f}", f"{returns:.0f}"])
    heads = ["task", "success", "95% interval", "at the last step", "mean return"]
    return [f"### {name}: mean success {evaluation['mean_success_rate']:.3f}", "", pages.table(heads, rows), ""]


def curve(run: Path, out: Path) -> None:
    """Training loss and validation success against gradient steps."""
    rows = read_metrics(run)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    loss = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    left.plot(*zip(*loss, strict=True), lw=0.8)
    left.set(xlabel="gradient steps", ylabel="training loss", yscale="log")
    success = [(row["step"], row["validation/success_rate"]) for row in rows if "validation/success_rate" in row]
    right.plot(*zip(*success, strict=True), marker="o")
    right.set(xlabel="gradient steps", ylabel="success rate, validation", ylim=(-0.02, 1.02))
    for axes in (left, right):
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
    pictures.save(figure, out)


def compact(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Without the single episodes."""
    tasks = {task: {k: v for k, v in r.items() if k != "episodes"} for task, r in evaluation["tasks"].items()}
    return evaluation | {"tasks": tasks}


def main() -> None:
    """Write tables, curve and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="mt40", help="of the policy, and of the files")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--evaluations", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    evaluations = {path.stem: json.loads(path.read_text()) for path in options.evaluations}
    lines = [line for name, evaluation in evaluations.items() for line in section(name, evaluation)]
    (options.out / f"{options.name}.md").write_text("\n".join(lines))
    record = {name: compact(evaluation) for name, evaluation in evaluations.items()}
    (options.out / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    curve(options.run, options.out / f"{options.name}-curve.png")


if __name__ == "__main__":
    main()
