"""How far few demonstrations go: success on CW10 after cloning 1 to 25 demonstrations, from records of a study.

    python -m eva_rl.benchmark study=benchmarks/studies/few_shot.yaml records=docs/results/few_shot out=runs/few_shot
    python -m benchmarks.comparisons.few_shot            # print the tables
    python -m benchmarks.comparisons.few_shot --write    # put them into docs/verdict.md

The first can be stopped and continued at any time; tables are of the seeds that all tasks and methods have by then.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations

import numpy as np

from benchmarks import pages
from benchmarks.comparisons.verdict import PAGE, SUCCESS, read_half
from eva_rl.benchmark.study import Study
from eva_rl.errors import counted
from eva_rl.report.runs import Run
from eva_rl.report.stats import holm, stratified_sign_flip_test
from eva_rl.report.stats.aggregates import mean
from eva_rl.report.stats.intervals import bootstrap
from eva_rl.report.verdicts import ENDPOINTS, FINAL

STUDY = "few_shot"
BEGIN, END = "<!-- few demonstrations: benchmarks/comparisons/few_shot.py -->", "<!-- end of few demonstrations -->"
Scores = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Success by method of the study, task and seed."""


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


def closest_to_different(found: Scores) -> str:
    """The smallest p of a difference at an equal number of demonstrations, corrected for all such pairs."""
    pairs = [(a, b) for a, b in combinations(found, 2) if parts(a)[1] == parts(b)[1]]
    p_values = holm(
        [
            stratified_sign_flip_test(
                [np.subtract(list(found[a][task].values()), list(runs.values())) for task, runs in found[b].items()]
            )
            for a, b in pairs
        ]
    )
    (first, second), p = min(zip(pairs, p_values, strict=True), key=lambda one: one[1])
    return (
        f"Smallest p of a difference between two methods with equally many demonstrations, corrected for all "
        f"{len(pairs)} pairs: {p:.2g} (`{first}` and `{second}`)."
    )


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
    shown = [f"Mean success over {len(study.tasks)} tasks, {counted(seeds, 'seed')}:", means]
    return "\n\n".join([*shown, *([closest_to_different(found)] if seeds > 1 else []), "Each task:", each])


def main() -> None:
    """Print the tables, or put them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into docs/verdict.md")
    options = parser.parse_args()
    study, runs = read_half(STUDY)
    text = tables(study, scores(study, runs))
    if options.write:
        pages.write_between(PAGE, BEGIN, END, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
