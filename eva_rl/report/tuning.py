"""The tuning phase of a study: what was tried on which tasks, and what was chosen."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

from eva_rl.report.figures import WIDTH, colour_and_marker, legend_columns, legend_label
from eva_rl.report.page import Picture, Section
from eva_rl.report.runs import RETURN, Run, score_keys
from eva_rl.report.stats.aggregates import Floats
from eva_rl.report.tables import Table, number
from eva_rl.report.verdicts import ENDPOINTS

BETWEEN = ", "
"""Between the settings that a run tried together."""
Tried = list[tuple[str, float]]
"""Of one setting: the task and the endpoint of each run."""
Scores = dict[str, dict[str, list[float]]]
"""By method, by setting: what is averaged, the endpoint of each run or the rank on each task."""


def comparable(keys: Mapping[str, str]) -> bool:
    """Whether an endpoint may be averaged over tasks, by the score that judges each: one for all, and no return."""
    kinds = set(keys.values())
    return len(keys) < 2 or (len(kinds) == 1 and RETURN not in kinds)


def task_ranks(settings: Sequence[Tried]) -> Floats:
    """The rank of each setting on each task by its mean over runs.

    Args:
        settings: For each setting the task of each run and what it reached there; more is better.

    Returns:
        (settings, tasks): 1 for the best, ties share their mean. NaN for a setting without a finite result on some
        task, which takes no rank from the others.
    """
    tasks = sorted({task for tried in settings for task, _ in tried})
    means = np.array([[_mean([value for one, value in tried if one == task]) for task in tasks] for tried in settings])
    found = np.full(means.shape, np.nan)
    sound = np.isfinite(means).all(axis=1)
    found[sound] = rankdata(-means[sound], axis=0) if sound.any() else np.nan
    return found


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def tuning_sections(
    found: Sequence[Run], tested: Sequence[Run], endpoint: str, diverged: Sequence[Run] = ()
) -> list[Section]:
    """The section on tuning; empty where nothing was tuned.

    Args:
        found: The runs that were read, those of the tuning phase among them.
        tested: Those of the test phase.
        endpoint: What settings were chosen by.
        diverged: The runs of the tuning phase that diverged.
    """
    tuned = [run for run in found if run.tuning is not None]
    if not tuned and not diverged:
        return []
    tried, chosen = tried_settings(tuned, endpoint, diverged), _chosen(tuned, tested)
    ranked = not comparable(score_keys(tuned))
    lost = Counter((method, setting) for method, setting, _, _ in {_which(run) for run in diverged})
    title = ENDPOINTS[endpoint].title
    what = f"mean rank over tasks by {title}, 1 is the best" if ranked else title
    scores = tuning_scores(tried, ENDPOINTS[endpoint].sign if ranked else None, lost)
    rows = [
        [method, setting, number(_mean(scores[method][setting])), str(len(runs)), str(lost[method, setting]), mark]
        for method, own in sorted(tried.items())
        for setting, runs in own.items()
        for mark in ["yes" if chosen.get(method) == setting else ""]
    ]
    everything = [*tuned, *diverged]
    tasks, seeds = sorted({run.task for run in everything}), sorted({run.seed for run in everything})
    text = (
        f"Settings were chosen on {', '.join(tasks)} and seeds {', '.join(map(str, seeds))}, none of which is tested "
        f"above. Shown is the {what}."
    )
    column = "mean rank" if ranked else "mean"
    note = f"{column.capitalize()}: {what}." + (" A run that diverged rules its setting out." if lost else "")
    return [
        Section(
            "Tuning",
            text=[text, *_edges(scores, chosen)],
            tables=[Table("", ["method", "setting", column, "runs", "diverged", "chosen"], rows, note)],
            pictures=[Picture("tuning", f"Tuning curves: {what}", tuning_figure(scores, what))],
        )
    ]


def tried_settings(runs: Sequence[Run], endpoint: str, diverged: Sequence[Run] = ()) -> dict[str, dict[str, Tried]]:
    """The endpoint of each run that did not diverge, by method and setting, in ascending order of the setting."""
    keys = score_keys(runs)
    found: dict[str, dict[str, Tried]] = defaultdict(dict)
    for run in sorted([*runs, *diverged], key=_order):
        found[run.method].setdefault(setting_of(run), [])
    for run in sorted(runs, key=_order):
        found[run.method][setting_of(run)].append((run.task, ENDPOINTS[endpoint].value(run, keys[run.task])))
    return dict(found)


def tuning_scores(
    tried: Mapping[str, Mapping[str, Tried]],
    rank_sign: int | None = None,
    diverged: Container[tuple[str, str]] = (),
) -> Scores:
    """What is averaged of each setting.

    Args:
        tried: See :func:`tried_settings`.
        rank_sign: None for the endpoint of each run; for ranks within tasks 1 where more is better, -1 where less is.
        diverged: Methods and settings with a run that diverged, which take no rank.
    """
    if rank_sign is None:
        return {method: {name: [v for _, v in one] for name, one in own.items()} for method, own in tried.items()}
    found: Scores = {}
    for method, own in tried.items():
        sound = [name for name in own if (method, name) not in diverged]
        ranks = task_ranks([[(task, rank_sign * value) for task, value in own[name]] for name in sound])
        found[method] = {name: [] for name in own} | dict(zip(sound, ranks.tolist(), strict=True))
    return found


def _which(run: Run) -> tuple[str, str, str, int]:
    return run.method, setting_of(run), run.task, run.seed


def setting_of(run: Run) -> str:
    """The settings that a run tried: ``learning_rate=0.001``."""
    return BETWEEN.join(f"{key.rpartition('.')[2]}={value}" for key, value in (run.tuning or {}).items())


def _order(run: Run) -> tuple[object, ...]:
    return (run.method, *_place(setting_of(run)), run.task, run.seed)


def _place(setting: str) -> tuple[list[float], str]:
    """By which settings are sorted: their numbers, then their words."""
    return [_number(part.partition("=")[2], 0.0) for part in setting.split(BETWEEN)], setting


def _number(text: str, otherwise: float) -> float:
    try:
        return float(text)
    except ValueError:
        return otherwise


def _chosen(tuned: Sequence[Run], tested: Sequence[Run]) -> dict[str, str]:
    """By method, the setting that its tested runs have."""
    found = {}
    for run in tested:
        own = {key: value.strip('"') for key, value in dict(run.settings).items()}
        for other in tuned:
            tried = other.tuning or {}
            if other.method == run.method and all(_same(own.get(key, ""), value) for key, value in tried.items()):
                found[run.method] = setting_of(other)
    return found


def _same(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b


def _edges(scores: Scores, chosen: dict[str, str]) -> list[str]:
    """A best value at the end of its grid says that the grid was too narrow."""
    ends = [
        f"{method} ({', '.join(found)})"
        for method, own in sorted(scores.items())
        if method in chosen and (found := _ends(list(own), chosen[method]))
    ]
    return [f"At an end of the grid, so that a better value may lie outside: {', '.join(ends)}."] if ends else []


def _ends(settings: Sequence[str], chosen: str) -> list[str]:
    """Which parts of a setting are the least or the greatest tried, of those that are numbers: words have no order."""
    found = []
    for part in chosen.split(BETWEEN):
        key, _, value = part.partition("=")
        tried = [
            other.removeprefix(f"{key}=")
            for setting in settings
            for other in setting.split(BETWEEN)
            if other.startswith(f"{key}=")
        ]
        numbers = [_number(other, math.nan) for other in tried]
        if np.isfinite(numbers).all() and len(set(numbers)) > 1 and float(value) in {min(numbers), max(numbers)}:
            found.append(part)
    return found


ROOM = 60
"""Letters that fit side by side below a figure."""


def tuning_figure(scores: Scores, title: str) -> Figure:
    """The mean of each setting, with what it is the mean of: single runs, or ranks on tasks."""
    settings = sorted({setting for own in scores.values() for setting in own}, key=_place)
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, (method, own) in enumerate(sorted(scores.items())):
        colour, marker = colour_and_marker(index)
        places = [settings.index(setting) for setting in own]
        axes.plot(
            places,
            [_mean(values) for values in own.values()],
            color=colour,
            marker=marker,
            label=legend_label(method),
        )
        for place, values in zip(places, own.values(), strict=True):
            axes.plot([place] * len(values), values, color=colour, marker=".", ls="", alpha=0.4)
    axes.set_xticks(range(len(settings)), settings)
    if len(" ".join(settings)) > ROOM:
        axes.tick_params(axis="x", labelrotation=20)
    axes.set(ylabel=title)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns(labels), fontsize="small")
    return figure
