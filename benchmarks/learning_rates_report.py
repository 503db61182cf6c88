"""The rule for learning rates beside a sweep.

    python benchmarks/learning_rates_report.py docs/results/learning_rates.jsonl

Reads what ``learning_rates.py`` wrote and prints, for each method, the best rate of the sweep, the rate that
``algo.learning_rate=auto`` takes, and what was measured at both. Between two rates of the sweep results are
interpolated, against the logarithm of the rate. ``--figure`` draws the curves.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pictures
from matplotlib import colormaps
from matplotlib.figure import Figure

from eva_rl.adapters import METHODS

Curves = Mapping[str, Mapping[float, float]]
"""Mean over tasks and seeds by method and learning rate."""
DIVERGED = 10.0
"""What a loss that is not finite counts as, times the least loss of its task."""


def curves(records: list[dict[str, Any]], measure: str) -> Curves:
    """Means of what was measured; losses relative to the least of their task, seed and setting."""
    least: dict[str, float] = {}
    for record in records:
        if record.get(measure) is not None:
            least[_where(record)] = min(record[measure], least.get(_where(record), np.inf))
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        value = record.get(measure)
        if measure == "loss" and _where(record) in least:
            value = DIVERGED if value is None else value / least[_where(record)]
        if value is not None:
            found[record["run"]["method"]][record["run"]["learning_rate"]].append(value)
    return {method: {rate: float(np.mean(v)) for rate, v in sorted(own.items())} for method, own in found.items()}


def _where(record: Mapping[str, Any]) -> str:
    return "{task} {seed} {setting}".format(**record["run"])


def at(curve: Mapping[float, float], rate: float) -> float:
    """A curve at a rate, the logarithm of losses interpolated against that of rates."""
    values = np.log(np.maximum(list(curve.values()), 1e-9))
    return float(np.exp(np.interp(np.log(rate), np.log(list(curve)), values)))


def table(found: Curves, measure: str) -> str:
    """Markdown: a row a method."""
    better = min if measure == "loss" else max
    there = f"{measure} there"
    rows = []
    for method, curve in found.items():
        best, own = better(curve, key=curve.__getitem__), METHODS[method].learning_rate
        found_at = (f"{best:g}", f"{curve[best]:.2f}", f"{own:g}", f"{at(curve, own):.2f}")
        rows.append([f"`{method}`", *found_at, f"{at(curve, own) / curve[best]:.2f}"])
    return pages.table(["adapter", "best rate of the sweep", there, "rate of `auto`", there, "`auto` / best"], rows)


def draw(found: Curves, measure: str) -> Figure:
    """The curves, with the rule's rate of each method marked."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"].resampled(20)(range(20)))
    for method, curve in found.items():
        (line,) = axes.plot(list(curve), list(curve.values()), marker="o", ms=3, label=method)
        own = METHODS[method].learning_rate
        axes.plot([own], [at(curve, own)], marker="*", ms=13, color=line.get_color(), ls="none")
    axes.set(xscale="log", xlabel="peak learning rate (star: auto)")
    if measure == "loss":
        axes.set(yscale="log", ylabel="held-out cloning loss / least of all")
    else:
        axes.set(ylabel=measure)
    axes.legend(fontsize=8, ncols=2)
    return figure


def main() -> None:
    """Print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path, help="files of learning_rates.py")
    parser.add_argument("--measure", default="loss", choices=("loss", "success"))
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    records = [json.loads(line) for path in options.records for line in path.read_text().splitlines()]
    found = curves(records, options.measure)
    print(table(found, options.measure))
    if options.figure:
        pictures.save(draw(found, options.measure), options.figure, dpi=120)


if __name__ == "__main__":
    main()
