"""``python -m eva_rl.report``: compare runs of several methods, tasks and seeds."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from rich.markup import escape

from eva_rl.cli.command import run_command
from eva_rl.cli.console import console, say
from eva_rl.cli.parsing import register
from eva_rl.cli.values import quoted
from eva_rl.errors import UnknownNameError, UserError, counted
from eva_rl.files import check_folder, expanded, is_held, write_file, write_folder
from eva_rl.options import between, one_of, option, positive
from eva_rl.report.comparison import Analysis, Resampling, analyse
from eva_rl.report.csv_curves import CSV_PREFIX, read_csv_curves
from eva_rl.report.curves import AXES, Curve, curves_of, without_curve
from eva_rl.report.figures import (
    aggregate_figure,
    curve_figure,
    first_pairs,
    improvement_figure,
    picture,
    profile_figure,
    style,
    task_figure,
)
from eva_rl.report.methods import TaskGroup, group_tasks
from eva_rl.report.page import Picture, Section, markdown, page, terminal_table
from eva_rl.report.reading import find_runs, one_line
from eva_rl.report.runs import Problem, Run, decision, read_runs, select
from eva_rl.report.settings import Decision
from eva_rl.report.tables import (
    CSV_COLUMNS,
    Table,
    aggregate_table,
    comparison_table,
    cost_table,
    endpoint_records,
    endpoint_table,
    heading,
    records,
    run_table,
    task_table,
    verdict_records,
    verdict_table,
    write_csv,
)
from eva_rl.report.tuning import tuning_sections
from eva_rl.report.verdicts import BY_SCORE, ENDPOINTS, FINAL, endpoint_means, verdicts
from eva_rl.report.warnings import warnings_of
from eva_rl.seeding import MAX_SEED

HELP = """
Compare methods from their finished runs: interquartile means with intervals, paired tests, profiles, learning curves,
cost; a warning where the data cannot tell methods apart. Writes report.html, report.md, report.csv and figures/.

Examples:
  python -m eva_rl.report runs/eva-0 runs/eva-1 runs/lora-0 runs/lora-1 out=report
  python -m eva_rl.report 'runs/push-*' out=report
  python -m eva_rl.report out/cw10
  python -m eva_rl.report results/records endpoint=area margin=0.05
  python -m eva_rl.report csv:tdmpc2/results out=published
"""
AUTO = "auto"
PAGE, TEXT, CSV, RUNS_CSV, CURVES_CSV = "report.html", "report.md", "report.csv", "runs.csv", "curves.csv"
PARTS = {PAGE, TEXT, CSV, RUNS_CSV, CURVES_CSV, "figures"}
RUN_COLUMNS = ("method", "task", "seed", "score", "value", "before", "folder")
VERSIONS = {"eva-rl": "eva-rl", "torch": "torch", "Machine": "machine"}
"""What the first lines name of ``versions.json``."""
CURVE_COLUMNS = ("score", "axis", "method", "place", "value", "low", "high")


@dataclass
class ReportConfig:
    """Config of ``python -m eva_rl.report``."""

    runs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "run directories, records, folders that hold some, patterns, or csv:FOLDER for learning curves in "
            "FOLDER/METHOD/TASK.csv with the columns step, success or reward, seed; no key is needed"
        },
    )
    out: str = option("report", "folder for the report; an earlier report there is replaced")
    title: str = option("Comparison of fine-tuning methods", "heading")
    endpoint: str = option(
        AUTO, f"score by which methods are compared: {', '.join(ENDPOINTS)}; auto takes the study's, else {FINAL}"
    )
    margin: float | None = option(
        None, "difference below which methods count as equivalent; null takes the study's, else tests none"
    )
    reference: str = option(
        "", "method that the others are compared with; empty takes the study's, else compares each pair"
    )
    replicates: int = option(2_000, "bootstrap resamples")
    confidence: float = option(0.95, "of the intervals")
    seed: int = option(0, "of the resampling")

    def __post_init__(self) -> None:
        positive(replicates=self.replicates)
        one_of((AUTO, *ENDPOINTS), endpoint=self.endpoint)
        if self.margin is not None:
            positive(margin=self.margin)
        between(0.5, 0.999, confidence=self.confidence)
        between(0, MAX_SEED, seed=self.seed)


def arguments(typed: Sequence[str]) -> list[str]:
    """Overrides, from what was typed: whatever is no ``KEY=VALUE`` and no flag names runs."""
    overrides = [word for word in typed if re.match(r"(-|[+~]?\w[\w.]*=)", word)]
    places = [word for word in typed if word not in overrides]
    return [*overrides, f"runs=[{','.join(map(quoted, places))}]"] if places else overrides


register("report", ReportConfig, {}, arguments)


def report(config: ReportConfig) -> None:
    """Read, compute, write, show."""
    if not config.runs:
        raise UserError(
            "No runs. Name run directories, or a folder that holds some: python -m eva_rl.report runs out=report"
        )
    out = check_out(config.out)
    found, problems = read_places(config.runs)
    runs = [run for run in found if run.tuning is None]
    if not runs:
        raise UserError(nothing_to_compare(config.runs, found, problems))
    tasks = group_tasks(runs)
    check_reference(config.reference, tasks)  # what is typed: a study's own may have no runs yet
    by = as_decided(config, runs)
    config = replace(config, endpoint=by.endpoint, margin=by.margin, reference=by.reference)
    resampling = Resampling(config.replicates, config.confidence, config.seed)
    groups = [analyse(group, resampling, config.reference) for group in tasks]
    curves = [curves_of(analysis.group, resampling) for analysis in groups]
    with style():
        sections = [s for pair in zip(groups, curves, strict=True) for s in sections_of(*pair, problems, config)]
        sections += tuning_sections(
            found, runs, config.endpoint, [p.run for p in problems if p.run is not None and p.run.tuning is not None]
        )
        sections.append(runs_section(groups, problems))

        def fill(folder: Path) -> None:
            write(folder, config.title, lead(runs, config), sections)
            rows = [row for analysis in groups for row in records(analysis)]
            for analysis in groups:
                for further in decisions(config):
                    rows += endpoint_records(analysis.group, further.endpoint, config.confidence)
                    rows += verdict_records(analysis.group, further, config.confidence)
            write_csv(folder / CSV, CSV_COLUMNS, rows)
            write_csv(folder / RUNS_CSV, RUN_COLUMNS, [row for analysis in groups for row in run_records(analysis)])
            write_csv(folder / CURVES_CSV, CURVE_COLUMNS, list(curve_records(groups, curves)))

        write_folder(out, fill)
    show(out, groups, problems, config)


def as_decided(config: ReportConfig, runs: Sequence[Run]) -> Decision:
    """Endpoint, margin and reference: those that are typed, else those that the runs' study decided on."""
    by = decision(runs) or BY_SCORE
    if config.endpoint not in {AUTO, by.endpoint}:
        by = replace(by, endpoint=config.endpoint, margin=None)  # the study's is in the unit of its own
    margin = by.margin if config.margin is None else config.margin
    return replace(by, margin=margin, reference=config.reference or by.reference)


def decisions(config: ReportConfig) -> list[Decision]:
    """What verdicts are given by: the endpoint that was decided on, then the others, without a margin."""
    others = [Decision(name, None, config.reference) for name in ENDPOINTS if name != config.endpoint]
    return [Decision(config.endpoint, config.margin, config.reference), *others]


def check_reference(reference: str, groups: Sequence[TaskGroup]) -> None:
    """Raise unless a group has the method that the others are compared with.

    Raises:
        UnknownNameError: Naming the methods that there are.
    """
    if reference and not any(group.called(reference) for group in groups):
        labels = sorted({method.label for group in groups for method in group.methods})
        raise UnknownNameError("reference", reference, labels)


def nothing_to_compare(places: Sequence[str], tuned: Sequence[Run], problems: Sequence[Problem]) -> str:
    """Why there is no run to report on."""
    if problems:
        reasons = "; ".join(f"{p.place}: {p.kind}, {p.reason}" for p in problems[:3])
        unfinished = any(p.kind == "unfinished" for p in problems)
        advice = "Continue them first." if unfinished else "Name runs of finetune or benchmark that have ended well."
        return f"No finished, undamaged run among {len(problems)} ({reasons}). {advice}"
    where = ", ".join(places)
    return f"{where} holds tuning runs only ({len(tuned)}). Name the folder with the study's test runs, too."


def read_places(places: Sequence[str]) -> tuple[list[Run], list[Problem]]:
    """The runs in folders, and those of learning curves that others published."""
    runs: list[Run] = []
    problems: list[Problem] = []
    folders = [place for place in places if not place.startswith(CSV_PREFIX)]
    if folders:
        runs, problems = read_runs(find_runs(folders))
    for place in places:
        if place.startswith(CSV_PREFIX):
            more, lost = read_csv_curves(expanded(place.removeprefix(CSV_PREFIX)))
            runs, problems = [*runs, *more], [*problems, *lost]
    return select(runs, problems)


def check_out(name: str) -> Path:
    """The folder of the report; what a killed report left beside it is removed.

    Raises:
        UserError: It holds something else, which replacing the report would delete.
    """
    out = expanded(name)
    if out.name in {"", ".."}:
        raise UserError(f"out={name} is a folder that stands open or holds others. Name a new one: out=report")
    if not os.path.isfile(out):  # Path.is_file raises where a name is too long
        check_folder(out, "out=")
    others = [] if not out.is_dir() else [p.name for p in out.iterdir() if p.name not in PARTS and not _partial(p)]
    if others or out.is_file():
        raise UserError(
            f"out={name} holds something other than a report: {one_line(', '.join(sorted(others)) or 'a file')}. "
            "Name another folder."
        )
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        if not is_held(left):
            shutil.rmtree(left, ignore_errors=True)
    return out


def _partial(path: Path) -> bool:
    """Whether it is what a killed report left in the folder."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def lead(runs: Sequence[Run], config: ReportConfig) -> str:
    """One line on what was compared, and how."""
    tasks, seeds = {run.task for run in runs}, {run.seed for run in runs}
    policies = ", ".join(sorted({str(run.summary.get("policy")) for run in runs}))
    return (
        f"{counted(len(runs), 'finished run')}, {counted(len(tasks), 'task')}, {counted(len(seeds), 'seed')}, starting "
        f"from {policies}. {_conditions(runs)}Intervals: {100 * config.confidence:g}%, {config.replicates} resamples, "
        f"seed {config.seed}. Each row is a method at one rank and one set of settings."
    )


def _conditions(runs: Sequence[Run]) -> str:
    """Updates, demonstrations, study, versions and hardware, as far as the runs know them."""
    studies = sorted({run.study for run in runs if run.study})
    parts = [
        _ranges("Updates", [run.summary.get("updates") for run in runs]),
        _ranges("Demonstrations", [dict(run.summary.get("data") or {}).get("episodes") for run in runs]),
        f"Study file: SHA-256 {', '.join(studies)}. " if studies else "",
        *(_names(title, [run.versions.get(key) for run in runs]) for title, key in VERSIONS.items()),
    ]
    return "".join(parts)


def _ranges(title: str, values: Sequence[object]) -> str:
    known = sorted({int(value) for value in values if isinstance(value, int | float)})
    shown = f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}" if known else ""
    return f"{title}: {shown}. " if known else ""


def _names(title: str, values: Sequence[str | None]) -> str:
    known = sorted({value for value in values if value})
    return f"{title}: {', '.join(known)}. " if known else ""


def sections_of(
    analysis: Analysis, curves: dict[str, list[Curve]], problems: Sequence[Problem], config: ReportConfig
) -> list[Section]:
    """The sections on one group of tasks."""
    name = _file_name(analysis.group.title)
    compared, several = bool(analysis.aggregates), len(analysis.comparisons) > 0
    summary = (
        [Picture(f"{name}-aggregates", "Aggregates with intervals", aggregate_figure(analysis))] if compared else []
    )
    improvement = f"Probability of improvement{first_pairs(analysis)}"
    pairs = [Picture(f"{name}-improvement", improvement, improvement_figure(analysis))] if several else []
    profile = [Picture(f"{name}-profile", "Performance profile", profile_figure(analysis))] if compared else []
    learning = "Learning curves, on validation episodes (on held-out ones where the run evaluated on these)"
    learned = [Picture(f"{name}-curves", learning, curve_figure(analysis, curves))] if curves else []
    by_task = Picture(f"{name}-tasks", "Task by task; the line is the score before", task_figure(analysis))
    found = [
        Section(
            heading(analysis.group.title),
            warnings=warnings_of(analysis, problems, decisions(config)[0]),
            tables=[aggregate_table(analysis)] if compared else [],
            pictures=summary,
        ),
        *([Section("Verdicts", tables=list(verdict_tables(analysis.group, config)))] if several else []),
        Section("Comparisons", tables=[comparison_table(analysis)] if several else [], pictures=[*pairs, *profile]),
        Section("Tasks", tables=[task_table(analysis)], pictures=[by_task]),
        Section("Learning curves", text=without_curve(analysis.group, curves), pictures=learned),
        Section("Cost", tables=[cost_table(analysis.group)]),
    ]
    return [section for section in found if section.tables or section.pictures or section.warnings or section.text]


def _file_name(title: str) -> str:
    """A short name for files, with a digest of what it leaves out."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", title)[:48]
    plain_task = " " not in title.partition(" on ")[2]  # a blank and a dash would be one
    return (
        plain
        if plain_task and plain == title.replace(" ", "-")
        else f"{plain}-{hashlib.sha256(title.encode()).hexdigest()[:6]}"
    )


def runs_section(groups: Sequence[Analysis], problems: Sequence[Problem]) -> Section:
    """What counts and what does not."""
    rows = [[problem.place, problem.kind, problem.reason] for problem in problems]
    table = Table("Runs that do not count, or in part", ["folder", "", "why"], rows, words=True)
    return Section(
        "Runs",
        text=[] if problems else ["All runs that were found are finished and sound."],
        tables=[table] if problems else [],
        folded=[run_table(analysis.group) for analysis in groups],
    )


def write(out: Path, title: str, line: str, sections: Sequence[Section]) -> None:
    """Write the page, the Markdown and the figures."""
    for section in sections:
        for shown in section.pictures:
            for kind in ("png", "svg"):
                content = picture(shown.figure, kind)
                write_file(out / "figures" / f"{shown.name}.{kind}", partial(Path.write_bytes, data=content))
    for name, text in ((TEXT, markdown(title, line, sections)), (PAGE, page(title, line, sections))):
        write_file(out / name, partial(Path.write_text, data=text, encoding="utf-8"))


def run_records(analysis: Analysis) -> Iterator[dict[str, object]]:
    """Rows of ``runs.csv``."""
    key = analysis.group.key
    for method in analysis.group.methods:
        for run in (run for own in method.runs.values() for run in own):
            values = {"value": run.summary[f"eval/{key}"], "before": run.summary.get(f"eval_before/{key}")}
            named = {"method": method.label, "task": run.task, "seed": run.seed, "folder": run.place}
            yield named | {"score": analysis.group.title} | values


def curve_records(groups: Sequence[Analysis], curves: Sequence[dict[str, list[Curve]]]) -> Iterator[dict[str, object]]:
    """Rows of ``curves.csv``."""
    for analysis, own in zip(groups, curves, strict=True):
        for axis, several in own.items():
            for curve in several:
                e = curve.estimate
                for place, value, low, high in zip(curve.places, e.value, e.low, e.high, strict=True):
                    named = {"score": analysis.group.title, "axis": AXES[axis], "method": curve.label}
                    yield named | {"place": place, "value": value, "low": low, "high": high}


def verdict_tables(group: TaskGroup, config: ReportConfig) -> Iterator[Table]:
    """Means and verdicts by the endpoint that was decided on, and by the others that were measured."""
    for by in decisions(config):
        if found := verdicts(group, by):
            yield from endpoint_tables(group, by.endpoint, config.confidence)
            yield verdict_table(found, by, config.confidence, decided=by.endpoint == config.endpoint)


def endpoint_tables(group: TaskGroup, endpoint: str, confidence: float) -> Iterator[Table]:
    """The methods by an endpoint that other tables do not show, where it was measured."""
    if endpoint != FINAL and (means := endpoint_means(group, endpoint)):
        yield endpoint_table(means, endpoint, confidence)


def show(out: Path, groups: Sequence[Analysis], problems: Sequence[Problem], config: ReportConfig) -> None:
    """The tables at the end, and where everything lies."""
    for analysis in groups:
        table = aggregate_table(analysis) if analysis.aggregates else task_table(analysis)
        for shown in (table, *endpoint_tables(analysis.group, config.endpoint, config.confidence)):
            console.print(terminal_table(shown, console.width))
        for warning in warnings_of(analysis, problems, decisions(config)[0]):
            colour = "bold red" if warning.severe else "yellow"
            kind = "Warning" if warning.severe else "Note"
            say(f"[{colour}]{kind}:[/] {escape(warning.text)}", markup=True)
    for problem in problems:
        say(f"{problem.kind.capitalize()}: {problem.place}: {problem.reason}")
    say(f"Report: {out / PAGE}  ({TEXT}, {CSV}, figures/ beside it)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("report", report, HELP, argv)
