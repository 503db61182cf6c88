"""The tuning phase of a study: what was tried on which tasks, and what was chosen."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from eva_rl.report.figures import WIDTH, colour_and_marker, legend_label
from eva_rl.report.page import Picture, Section
from eva_rl.report.runs import Run, score_keys
from eva_rl.report.tables import Table, number
from eva_rl.report.verdicts import ENDPOINTS

Scores = dict[str, dict[str, list[float]]]
"""By method, by setting: the endpoint of each run."""


def tuning_sections(found: Sequence[Run], tested: Sequence[Run], endpoint: str) -> list[Section]:
    """The section on tuning; empty where nothing was tuned."""
    tuned = [run for run in found if run.tuning is not None]
    if not tuned:
        return []
    scores, chosen = tuning_scores(tuned, endpoint), _chosen(tuned, tested)
    rows = [
        [
            method,
            setting,
            number(float(np.mean(values))),
            str(len(values)),
            "yes" if chosen.get(method) == setting else "",
        ]
        for method, own in sorted(scores.items())
        for setting, values in own.items()
    ]
    title = ENDPOINTS[endpoint].title
    tasks, seeds = sorted({run.task for run in tuned}), sorted({run.seed for run in tuned})
    text = (
        f"Settings were chosen by the {title}, on {', '.join(tasks)} and seeds {', '.join(map(str, seeds))}, none of "
        "which is tested above."
    )
    return [
        Section(
            "Tuning",
            text=[text, *_edges(scores, chosen)],
            tables=[Table("", ["method", "setting", "mean", "runs", "chosen"], rows, f"Mean {title}.")],
            pictures=[Picture("tuning", f"Tuning curves: {title}", tuning_figure(scores, title))],
        )
    ]


def tuning_scores(runs: Sequence[Run], endpoint: str) -> Scores:
    """The endpoint of each run, by method and setting, in ascending order of the setting."""
    keys = score_keys(runs)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=_order):
        found[run.method][setting_of(run)].append(ENDPOINTS[endpoint].value(run, keys[run.task]))
    return {method: dict(own) for method, own in found.items()}


def setting_of(run: Run) -> str:
    """The settings that a run tried: ``learning_rate=0.001``."""
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in (run.tuning or {}).items())


def _order(run: Run) -> tuple[object, ...]:
    return (run.method, [_number(str(v)) for v in (run.tuning or {}).values()], setting_of(run), run.task, run.seed)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


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
        f"{method} ({chosen[method]})"
        for method, own in sorted(scores.items())
        if len(own) > 1 and chosen.get(method) in {next(iter(own)), list(own)[-1]} and all(map(_is_on_a_scale, own))
    ]
    return [f"At an end of the grid, so that a better value may lie outside: {', '.join(ends)}."] if ends else []


def _is_on_a_scale(setting: str) -> bool:
    """Whether it is a number: words have no order, hence no end."""
    try:
        return math.isfinite(float(setting.rpartition("=")[2]))
    except ValueError:
        return False


ROOM = 60
"""Letters that fit side by side below a figure."""


def tuning_figure(scores: Scores, title: str) -> Figure:
    """The mean endpoint of each setting, with its single runs."""
    settings = list(dict.fromkeys(setting for own in scores.values() for setting in own))
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, (method, own) in enumerate(sorted(scores.items())):
        colour, marker = colour_and_marker(index)
        places = [settings.index(setting) for setting in own]
        axes.plot(
            places,
            [np.mean(values) for values in own.values()],
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
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(scores), 5), fontsize="small"
    )
    return figure
