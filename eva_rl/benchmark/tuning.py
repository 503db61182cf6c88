"""Choosing each method's settings on tuning tasks and seeds, before the test phase begins."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from eva_rl.benchmark.grid import Cell, setting_name
from eva_rl.benchmark.study import Study
from eva_rl.errors import UserError
from eva_rl.report.runs import score_keys
from eva_rl.report.tuning import Tried, comparable, task_ranks
from eva_rl.report.verdicts import ENDPOINTS

Chosen = dict[str, Mapping[str, Any]]


def choose(study: Study, cells: Sequence[Cell]) -> Chosen:
    """For each method the setting with the best endpoint over tuning tasks and seeds; ties: the first in the file.

    The best mean where all tasks are judged by success, or all by a normalised score; else the best mean rank, since
    returns of different tasks are never averaged. A setting with a run that diverged is never chosen.

    Args:
        study: The study.
        cells: The runs of the tuning phase, all done.

    Raises:
        UserError: Every setting of some method diverged, or the endpoint was not measured.
    """
    results = {cell.name: cell.result() for cell in cells}
    keys = score_keys([run for run in results.values() if run is not None])
    endpoint = ENDPOINTS[study.endpoint]
    tried: dict[tuple[str, str], Tried] = defaultdict(list)
    for cell in cells:
        run = results[cell.name]
        value = float("nan") if run is None else endpoint.sign * endpoint.value(run, keys[run.task])
        tried[cell.method, setting_name(cell.chosen)].append((cell.task, value))
    merits = _means if comparable(keys) else _ranks
    return {method: _best(method, study.candidates(method), tried, merits) for method in study.methods}


def _means(settings: Sequence[Tried]) -> Sequence[float]:
    return [float(np.mean([value for _, value in tried])) for tried in settings]


def _ranks(settings: Sequence[Tried]) -> Sequence[float]:
    return [-float(rank) for rank in task_ranks(settings).mean(axis=1)]


def _best(
    method: str,
    candidates: Sequence[Mapping[str, Any]],
    tried: Mapping[tuple[str, str], Tried],
    merits: Callable[[Sequence[Tried]], Sequence[float]],
) -> Mapping[str, Any]:
    if len(candidates) == 1:
        return candidates[0]
    found = merits([tried[method, setting_name(one)] for one in candidates])
    if not np.isfinite(found).any():
        raise UserError(
            f"No setting of {method} gave a finite result on every tuning task and seed. Try lower learning rates, or "
            "an endpoint that is known of these tasks: updates_to_90 needs success, cloning_loss eval.demonstrations."
        )
    return candidates[int(np.nanargmax(found))]
