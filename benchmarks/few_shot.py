"""How far few demonstrations go: success on CW10 after cloning 1 to 25 demonstrations, from records of a study.

    python -m eva_rl.benchmark study=benchmarks/studies/few_shot.yaml records=docs/results/few_shot out=runs/few_shot
    python benchmarks/few_shot.py            # print the tables
    python benchmarks/few_shot.py --write    # put them into docs/verdict.md

The first can be stopped and continued at any time; tables are of the seeds that all tasks and methods have by then.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pages

from eva_rl.benchmark.study import Study, read_study
from eva_rl.report.reading import find_runs
from eva_rl.report.runs import Run, read_runs
from eva_rl.report.stats.aggregates import mean
from eva_rl.report.stats.intervals import bootstrap
from eva_rl.report.verdicts import ENDPOINTS, FINAL

ROOT = Path(__file__).parents[1]
PAGE, RECORDS = ROOT / "docs" / "verdict.md", ROOT / "docs" / "results" / "few_shot"
STUDY = ROOT / "benchmarks" / "studies" / "few_shot.yaml"
BEGIN, END = "<!-- few demonstrations: benchmarks/few_shot.py -->", "<!-- end of few demonstrations -->"
SUCCESS = "success_rate"
Scores = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Success by method of the study, task and seed."""


def read() -> tuple[Study, list[Run]]:
    """The study, and the records there are of it."""
    runs = read_runs(find_runs([str(RECORDS)]))[0] if RECORDS.exists() else []
    return read_study(STUDY), runs


def scores(study: Study, runs: list[Run]) -> Scores:
    """Held-out success, of the seeds that all methods and tasks have."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        found[run.method][run.task][run.seed] = ENDPOINTS[FINAL].value(run, SUCCESS)
    whole = [seed for seed in study.seeds if all(seed in found[m][t] for m in study.methods for t in study.tasks)]
    return {m: {t: {seed: found[m][t][seed] for seed in whole} for t in study.tasks} for m in study.methods}


def parts(method: str) -> tuple[str, int]:
    """``eva-5`` is EVA with 5 demonstrations."""
    name, number = method.rsplit("-", 1)
    return name, int(number)


def tables(study: Study, found: Scores) -> str:
    """Markdown: the mean of all tasks by demonstrations and method, and each task."""
    names = list(dict.fromkeys(parts(method)[0] for method in study.methods))
    numbers = sorted({parts(method)[1] for method in study.methods})
    seeds = len(next(iter(next(iter(found.values())).values())))
    if not seeds:
        return "No seed is complete yet."
    rows = []
    for number in numbers:
        cells = []
        for name in names:
            one = bootstrap(mean, [np.array(list(runs.values())) for runs in found[f"{name}-{number}"].values()])
            interval = "" if np.isnan(one.low) else f" [{one.low:.2f}, {one.high:.2f}]"
            cells.append(f"{one.value:.2f}{interval}")
        rows.append([str(number), *cells])
    single = [
        [
            f"`{task.removeprefix('metaworld/')}`",
            *(" / ".join(f"{np.mean(list(found[f'{n}-{k}'][task].values())):.2f}" for n in names) for k in numbers),
        ]
        for task in study.tasks
    ]
    means = pages.table(["demonstrations", *(f"`{name}`" for name in names)], rows)
    each = pages.table([" / ".join(names), *map(str, numbers)], single)
    return f"Mean success over {len(study.tasks)} tasks, {seeds} seeds:\n\n{means}\n\nEach task:\n\n{each}"


def main() -> None:
    """Print the tables, or put them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into docs/verdict.md")
    study, runs = read()
    text = tables(study, scores(study, runs))
    if parser.parse_args().write:
        pages.write_between(PAGE, BEGIN, END, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
