"""The rule for learning rates beside a sweep.

    python -m benchmarks.comparisons.learning_rates_report docs/results/learning_rates.jsonl
    python -m benchmarks.comparisons.learning_rates_report --write  # table and figure of docs/learning_rates.md

Reads what ``learning_rates.py`` wrote and prints, for each method, the best rate of the sweep, the rate that
``algo.learning_rate=auto`` takes, and what was measured at both. Between two rates of the sweep results are
interpolated, against the logarithm of the rate. ``--figure`` draws the curves.

The best of a sweep is the luckiest of its points, too. Where there are several tasks or seeds, the last column is free
of that: for each of them the best rate is chosen on all the others.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks import pages, pictures
from benchmarks.comparisons.cloning_runs import read_records
from eva_rl.adapters import METHODS

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "learning_rates.md", ROOT / "docs" / "results"
SWEEP, FIGURE = RESULTS / "learning_rates_sweep.jsonl", RESULTS / "learning_rates_sweep.png"
BEGIN, END = "<!-- the sweep: benchmarks/comparisons/learning_rates_report.py -->", "<!-- end of the sweep -->"
WANTED = 0.98
"""Share of the best rate's success that ``auto`` is to reach."""
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
        elif measure == "success" and record.get("diverged"):
            value = 0.0
        if value is not None:
            found[record["run"]["method"]][record["run"]["learning_rate"]].append(value)
    return {method: {rate: float(np.mean(v)) for rate, v in sorted(own.items())} for method, own in found.items()}


def _where(record: Mapping[str, Any]) -> str:
    return "{task} {seed} {setting}".format(**record["run"])


def chosen_elsewhere(records: list[dict[str, Any]], measure: str, method: str) -> tuple[float, float] | None:
    """A method's mean at the rate of ``auto``, and at the rates chosen for each task and seed on all the others.

    Returns:
        None where there is one task and seed.
    """
    own = [record for record in records if record["run"]["method"] == method]
    places, better = sorted({_where(record) for record in own}), min if measure == "loss" else max
    if len(places) < 2:
        return None
    at_auto, at_chosen = [], []
    for place in places:
        here = curves([record for record in own if _where(record) == place], measure)[method]
        others = curves([record for record in own if _where(record) != place], measure)[method]
        at_auto.append(at(here, METHODS[method].learning_rate))
        at_chosen.append(at(here, better(others, key=others.__getitem__)))
    return float(np.mean(at_auto)), float(np.mean(at_chosen))


def at(curve: Mapping[float, float], rate: float) -> float:
    """A curve at a rate, the logarithm of losses interpolated against that of rates."""
    values = np.log(np.maximum(list(curve.values()), 1e-9))
    return float(np.exp(np.interp(np.log(rate), np.log(list(curve)), values)))


def table(records: list[dict[str, Any]], measure: str) -> str:
    """Markdown: a row a method."""
    found = curves(records, measure)
    better = min if measure == "loss" else max
    elsewhere = {method: chosen_elsewhere(records, measure, method) for method in found}
    there = f"{measure} there"
    heads = ["adapter", "best rate of the sweep", there, "rate of `auto`", there, "`auto` / best"]
    rows = []
    for method, curve in found.items():
        best, own = better(curve, key=curve.__getitem__), METHODS[method].learning_rate
        found_at = (f"{best:g}", f"{curve[best]:.2f}", f"{own:g}", f"{at(curve, own):.2f}")
        rows.append([f"`{method}`", *found_at, f"{at(curve, own) / curve[best]:.2f}"])
    if any(elsewhere.values()):
        heads.append("`auto` / best chosen elsewhere")
        for row, pair in zip(rows, elsewhere.values(), strict=True):
            row.append(f"{pair[0] / pair[1]:.2f}" if pair and pair[1] else "-")
    return pages.table(heads, rows)


def whole(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of methods that every task and seed has."""
    places: dict[str, set[str]] = defaultdict(set)
    for record in records:
        places[record["run"]["method"]].add(_where(record))
    everywhere = set().union(*places.values())
    return [record for record in records if places[record["run"]["method"]] == everywhere]


def numbers(records: list[dict[str, Any]]) -> str:
    """What the page says of the sweep: success of methods that were run everywhere, and how many reach the aim."""
    found = whole(records)
    methods = list(dict.fromkeys(record["run"]["method"] for record in found))
    ratios = [a / b for a, b in filter(None, (chosen_elsewhere(found, "success", method) for method in methods))]
    reached = sum(ratio >= WANTED for ratio in ratios)
    said = (
        f"{len(found)} runs. `auto` has at least {WANTED:.0%} of the success of the best rate chosen elsewhere with "
        f"{reached} of {len(methods)} methods, and {np.mean(ratios):.2f} of it on average."
    )
    return f"{said}\n\n{table(found, 'success')}"


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
    parser.add_argument("records", nargs="*", type=Path, help="files of learning_rates.py")
    parser.add_argument("--write", action="store_true", help="put the sweep into docs/learning_rates.md")
    parser.add_argument("--measure", default="loss", choices=("loss", "success"))
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if options.write:
        records = list(read_records(SWEEP))
        pages.write_between(PAGE, BEGIN, END, numbers(records))
        pictures.save(draw(curves(whole(records), "success"), "success"), FIGURE, dpi=120)
        return
    records = list(read_records(*options.records))
    print(table(records, options.measure))
    if options.figure:
        pictures.save(draw(curves(records, options.measure), options.measure), options.figure, dpi=120)


if __name__ == "__main__":
    main()
