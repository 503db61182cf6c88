"""The numbers of docs/verdict.md, from the records of its studies in docs/results.

    python -m benchmarks.comparisons.verdict            # print them
    python -m benchmarks.comparisons.verdict --write    # put them into the page, and draw its figures

Both halves of a study are judged together: each task's runs have the learning rates that the tuning phase of their
half chose on other tasks and seeds.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks import pages, pictures
from eva_rl.benchmark.study import Study, read_study
from eva_rl.report.figures import colour_and_marker
from eva_rl.report.methods import TaskGroup, group_tasks
from eva_rl.report.page import markdown_table
from eva_rl.report.reading import find_runs
from eva_rl.report.runs import Run, read_runs
from eva_rl.report.settings import Decision
from eva_rl.report.stats.aggregates import Floats
from eva_rl.report.stats.equivalence import smallest_difference
from eva_rl.report.tables import Table
from eva_rl.report.verdicts import ENDPOINTS, UNDECIDED, Verdict, held_out, paired_differences, verdicts

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "verdict.md", ROOT / "docs" / "results"
STUDIES: Mapping[str, tuple[str, ...]] = {
    "cw10": ("cw10_a", "cw10_b"),
    "small": ("small_a", "small_b"),
    "methods": ("methods_a", "methods_b"),
    "online": ("online", "online_refreshed"),
}
"""The study files of each study, halves where there are two; ``docs/results/NAME-study.png`` is its figure."""
TITLES = {"cw10": "`mt40`, rank 8", "small": "`mt40-small`, rank 2", "online": "`mt40`, rank 8, online"}
"""The studies in the summary, and the titles of their columns."""
EVA, SUMMARY = "eva", "summary"
FOLDERS = {"online": "online_study"}
"""Records that are not in a folder of their study file's name."""
SUCCESS, RATE = "success_rate", "algo.learning_rate"


@dataclass(frozen=True)
class Measure:
    """What is shown of each method by task.

    Attributes:
        title: In words.
        value: Of a run; NaN where it was not measured.
        scale: What it is multiplied by.
        spread: Whether its standard deviation over seeds is shown.
        digits: After the decimal point.
    """

    title: str
    value: Callable[[Run], float]
    scale: float = 1.0
    spread: bool = False
    digits: int = 2


def of(endpoint: str) -> Callable[[Run], float]:
    """An endpoint of reports, of success."""
    return lambda run: ENDPOINTS[endpoint].value(run, SUCCESS)


def cloned(run: Run) -> float:
    """Success between cloning and learning online; NaN where there was no such evaluation."""
    return float(run.summary.get(f"eval_cloned/{SUCCESS}", np.nan))


def env_steps_to_90(run: Run) -> float:
    """NaN where gradient steps are counted."""
    return of("updates_to_90")(run) if run.counts_env_steps else np.nan


area, final = of("area"), of("final")
MEASURES = (
    Measure("Area, mean ± standard deviation over seeds", area, spread=True),
    Measure("Success after cloning", cloned),
    Measure("Success at the end", final),
    Measure("Env steps to a success of 0.90, all of them where it is not reached", env_steps_to_90, digits=0),
    Measure("Held-out cloning loss × 1000", of("cloning_loss"), scale=1e3),
)
MUCH = 0.05
"""A fall of success that is worth counting."""
MOST_SEEDS = 1_000


@cache
def read_half(name: str) -> tuple[Study, list[Run]]:
    """A study file, and the records there are of it."""
    folder = RESULTS / FOLDERS.get(name, name)
    runs = read_runs(find_runs([str(folder)]))[0] if folder.exists() else []
    return read_study(ROOT / "benchmarks" / "studies" / f"{name}.yaml"), runs


def figure(study: str) -> Path:
    """Where the figure of a study is."""
    return RESULTS / f"{study}-study.png"


def around(study: str) -> tuple[str, str]:
    """The lines around the numbers of a study, or around the summary, in the page."""
    return f"<!-- numbers of {study}: benchmarks/comparisons/verdict.py -->", f"<!-- end of the numbers of {study} -->"


def tuning_table(study: Study, runs: Sequence[Run]) -> str:
    """Mean success over the updates at each learning rate tried."""
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for run in runs:
        if run.tuning:
            found[run.method, float(run.tuning[RATE])].append(area(run))
    rows = []
    for method in study.methods:
        rates = [float(one[RATE]) for one in study.candidates(method)]
        cells = [f"{rate:g}: {_mean(found[method, rate])}" for rate in rates]
        rows.append([method, *cells])
    columns = [f"rate {number}" for number in range(1, max(map(len, rows)))]
    return markdown_table(Table("", ["method", *columns], rows))


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f} ({len(values)})" if values else "-"


def merged(runs: Sequence[Run]) -> TaskGroup | None:
    """The test runs with the settings that tuning chose per half left out, so that a method is one row on all tasks."""
    tested = [
        replace(run, settings=tuple(pair for pair in run.settings if pair[0] != RATE)) for run in runs if not run.tuning
    ]
    groups = group_tasks(tested)
    return groups[0] if groups else None


def methods_tables(group: TaskGroup) -> list[str]:
    """What was measured, by method and task, and its mean over the tasks."""
    runs = runs_of(group)
    known = [measure for measure in MEASURES if np.isfinite([measure.value(run) for run in runs]).any()]
    return [f"{measure.title}:\n\n{_by_task(group, measure)}" for measure in known]


def runs_of(group: TaskGroup) -> list[Run]:
    """All of them."""
    return [run for method in group.methods for several in method.runs.values() for run in several]


def falls(group: TaskGroup) -> str:
    """How many runs end below where cloning left them; empty where that was not measured."""
    gains = np.array([final(run) - cloned(run) for run in runs_of(group)])
    gains = gains[np.isfinite(gains)].round(6)
    if not len(gains):
        return ""
    lower, much = (gains < 0).sum(), (gains < -MUCH).sum()
    return f"{lower} of {len(gains)} runs end below where cloning left them, {much} of them by more than {MUCH}."


def _by_task(group: TaskGroup, measure: Measure) -> str:
    tasks = sorted({task for method in group.methods for task in method.runs})
    rows = []
    for method in group.methods:
        values = [np.array([measure.value(run) for run in method.runs.get(task, ())]) for task in tasks]
        found = [measure.scale * of_task[np.isfinite(of_task)] for of_task in values]
        over_tasks = f"{np.mean([one.mean() for one in found]):,.{measure.digits}f}" if all(map(len, found)) else "-"
        rows.append([method.label, *(_cell(of_task, measure) for of_task in found), over_tasks])
    names = [task.removeprefix("metaworld/").removesuffix("-v3") for task in tasks]
    return markdown_table(Table("", ["method", *names, "mean"], rows))


def _cell(values: Floats, measure: Measure) -> str:
    """The mean, and where that is asked for the standard deviation over seeds."""
    if not len(values):
        return "-"
    spread = f" ± {values.std(ddof=1):.{measure.digits}f}" if measure.spread and len(values) > 1 else ""
    return f"{values.mean():,.{measure.digits}f}{spread}"


@dataclass(frozen=True)
class Judged:
    """The test runs of a study by method, and what is concluded.

    Attributes:
        group: Methods and tasks.
        decision: What the study compares by.
        verdicts: Of each pair that it compares.
    """

    group: TaskGroup
    decision: Decision
    verdicts: Sequence[Verdict]


@cache
def judge(study_name: str) -> Judged | None:
    """The verdicts of a study, all its files together; None before there is a test run."""
    halves = [read_half(name) for name in STUDIES[study_name]]
    group = merged([run for _, runs in halves for run in runs])
    if group is None:
        return None
    study = halves[0][0]
    decision = Decision(study.endpoint, study.margin, study.reference)
    return Judged(group, decision, verdicts(group, decision))


def difference(verdict: Verdict, digits: int = 3, sign: int = 1) -> str:
    """The mean difference with its interval; second minus first where the sign is -1."""
    if verdict.mean is None:
        return "-"
    ends = sorted(sign * end for end in verdict.mean.interval())
    mean, low, high = (f"{value:+z.{digits}f}" for value in (sign * verdict.mean.mean, *ends))
    return f"{mean} [{low}, {high}]"


def verdict_rows(judged: Judged) -> str:
    """Every pair of methods that is compared, and the seeds that an undecided one would take."""
    group, decision = judged.group, judged.decision
    methods = {method.label: method for method in group.methods}
    rows = []
    for one in judged.verdicts:
        apart = paired_differences(group, decision.endpoint, methods[one.first], methods[one.second])
        text = one.text if one.text != UNDECIDED else f"{UNDECIDED}; {seeds_needed(one, apart, group, decision)}"
        pair = f"{one.first} - {one.second}"
        rows.append([pair, difference(one), str(one.pairs), f"{one.corrected[0]:.2g}", text])
    return markdown_table(Table("", ["pair", "difference in area", "pairs of runs", "p, corrected", "verdict"], rows))


def summary() -> str:
    """EVA's mean success while learning minus that of each other method, in the studies that have a column."""
    judged = {study: found for study in TITLES if (found := judge(study)) is not None}
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for study, found in judged.items():
        for one in found.verdicts:
            if EVA in (one.first, one.second):
                other, sign = (one.second, 1) if one.first == EVA else (one.first, -1)
                cells[other][study] = f"{difference(one, 2, sign)} {one.text}"
    often_first = sorted(cells, key=lambda other: (-len(cells[other]), other))
    rows = [[f"`{other}`", *(cells[other].get(study, "") for study in judged)] for other in often_first]
    return pages.table(["`eva` minus", *(TITLES[study] for study in judged)], rows)


def seeds_needed(verdict: Verdict, differences: Sequence[Floats], group: TaskGroup, decision: Decision) -> str:
    """How many seeds would find a difference as large as the one seen, or as the margin where that is larger."""
    spreads = [float(np.var(task, ddof=1)) for task in differences if len(task) > 1]
    if not spreads or verdict.mean is None:
        return "one seed has no spread"
    wanted = max(abs(verdict.mean.mean), decision.margin or 0.0)
    comparisons = len(group.compared(decision.reference))
    for seeds in range(2, MOST_SEEDS):
        if smallest_difference(float(np.sqrt(np.mean(spreads))), len(differences), seeds, comparisons) <= wanted:
            return f"{seeds} seeds would find {wanted:.3f}"
    return f"more than {MOST_SEEDS} seeds"


def cost(runs: Sequence[Run]) -> str:
    """Core-hours and machine of the runs there are."""
    seconds = [sum(v for v in run.summary["seconds"].values() if isinstance(v, float)) for run in runs]
    machines = sorted({re.sub(r"\b1 CPUs$", "1 CPU", run.versions.get("machine", "unknown")) for run in runs})
    return f"{len(runs)} runs, {sum(seconds) / 3600:.1f} hours of one thread ({'; '.join(machines)})"


def numbers(study_name: str) -> str:
    """All that the page says of a study in numbers."""
    parts, tested, everything, planned = [], [], [], 0
    for name in STUDIES[study_name]:
        study, runs = read_half(name)
        tuned = [run for run in runs if run.tuning]
        total = len(study.tuning_tasks) * len(study.tuning_seeds) * sum(map(len, map(study.candidates, study.methods)))
        everything += runs
        tested += [run for run in runs if not run.tuning]
        planned += len(list(product(study.tasks, study.methods, study.seeds)))
        if tuned:
            names = ", ".join(task.removeprefix("metaworld/") for task in study.tuning_tasks)
            parts.append(f"**{name}**, tuned on {names}: {len(tuned)} of {total} runs. Area at each rate (runs):")
            parts.append(tuning_table(study, tuned))
    parts.append(f"**Test phase**: {len(tested)} of {planned} runs.")
    judged = judge(study_name)
    if judged is not None:
        parts += [*methods_tables(judged.group), *filter(None, [falls(judged.group)]), verdict_rows(judged)]
    if everything:
        parts.append(f"**Cost**: {cost(everything)}.")
    return "\n\n".join(parts)


def draw(study: str) -> None:
    """Success against steps, by method, over all test runs; over the tuning runs before there are any."""
    from matplotlib.figure import Figure

    halves = [read_half(name) for name in STUDIES[study]]
    runs = [run for _, own in halves for run in own]
    steps = [0, *halves[0][0].budgets]  # env steps are measured where an iteration ends
    tested = [run for run in runs if not run.tuning] or runs
    drawing = Figure(figsize=(7, 3.5), layout="constrained")
    axes = drawing.subplots()
    methods = sorted({run.method for run in tested})
    for index, method in enumerate(methods):
        scores = [np.interp(steps, *held_out(run, SUCCESS).T) for run in tested if run.method == method]
        colour, marker = colour_and_marker(index)
        axes.plot(steps, np.mean(scores, axis=0), color=colour, marker=marker, label=f"{method} ({len(scores)} runs)")
    counted = "env steps" if tested[0].counts_env_steps else "gradient steps"
    axes.set(xlabel=counted, ylabel="success rate, mean over runs", ylim=(0, 1))
    axes.grid(alpha=0.3)
    drawing.legend(loc="outside right center", fontsize="small")
    pictures.save(drawing, figure(study))


def main() -> None:
    """Print the numbers, or put them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into docs/verdict.md")
    if not parser.parse_args().write:
        print("\n\n".join([summary(), *map(numbers, STUDIES)]))
        return
    pages.write_between(PAGE, *around(SUMMARY), summary())
    for study in STUDIES:
        pages.write_between(PAGE, *around(study), numbers(study))
        draw(study)


if __name__ == "__main__":
    main()
