"""Choosing each method's settings on tuning tasks and seeds, before the test phase begins."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eva_rl.benchmark.grid import Cell, setting_name
from eva_rl.benchmark.study import Study
from eva_rl.errors import UserError
from eva_rl.report.runs import score_keys
from eva_rl.report.verdicts import ENDPOINTS

Chosen = dict[str, Mapping[str, Any]]


def choose(study: Study, cells: Sequence[Cell]) -> Chosen:
    """For each method the setting with the best mean endpoint over tuning tasks and seeds; ties: the first in the file.

    A setting with a run that diverged is never chosen.

    Args:
        study: The study.
        cells: The runs of the tuning phase, all done.

    Raises:
        UserError: Every setting of some method diverged, or the endpoint was not measured.
    """
    results = {cell.name: cell.result() for cell in cells}
    keys = score_keys([run for run in results.values() if run is not None])
    endpoint = ENDPOINTS[study.endpoint]
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for cell in cells:
        run = results[cell.name]
        value = float("nan") if run is None else endpoint.sign * endpoint.value(run, keys[run.task])
        scores[cell.method, setting_name(cell.chosen)].append(value)
    return {method: _best(method, study.candidates(method), scores) for method in study.methods}


def _best(
    method: str, candidates: Sequence[Mapping[str, Any]], scores: Mapping[tuple[str, str], Sequence[float]]
) -> Mapping[str, Any]:
    if len(candidates) == 1:
        return candidates[0]
    means = [float(np.mean(scores[method, setting_name(one)])) for one in candidates]
    if not np.isfinite(means).any():
        raise UserError(f"No setting of {method} gave a finite result while tuning. Try lower learning rates.")
    return candidates[int(np.nanargmax(means))]
