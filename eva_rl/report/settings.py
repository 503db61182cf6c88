"""The settings by which a report tells methods apart: those that decide a result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from eva_rl.adapters import METHODS
from eva_rl.cli.parsing import flat
from eva_rl.cli.run_dir import FREE_IN_GROUPS, FREE_TO_CHANGE
from eva_rl.report.reading import one_line

NO_SETTINGS = FREE_TO_CHANGE | {"seed", "env.id", "adapter.method", "data.source", "data.seed", "data.workers"}
"""Keys that name a run or change no result; the rest tells methods apart."""
NO_SETTINGS |= {"eval.every", "eval.quick_episodes", "eval.at", "algo.eval_every", "algo.checkpoint_every"}
NO_SETTINGS |= {"algo.workers", "algo.replay_on_disk", "study"}
EVA_KEYS = ("adapter.rho", "adapter.tau", "adapter.center", "adapter.score", "adapter.variant")

Settings = tuple[tuple[str, Any], ...]


def settings_of(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Settings:
    """What decides a result besides task, method and seed: canonical JSON by dotted key."""
    found = {key: value for key, value in flat(config) if not _ignored(key, summary)}
    data = summary.get("data") or {}
    task = summary["env"]
    origin = str(data.get("source", "none"))
    found["data.source"] = origin.replace(task, "TASK").replace(task.rpartition("/")[2], "TASK")
    return tuple(sorted((one_line(key), json.dumps(value, default=str)) for key, value in found.items()))


def _ignored(key: str, summary: Mapping[str, Any]) -> bool:
    """Whether a setting changes no result, or the run's method ignores it."""
    method = METHODS.get(str(summary["method"]))
    group, _, name = key.rpartition(".")
    if key in NO_SETTINGS or key.partition(".")[0] in NO_SETTINGS or (group and name in FREE_IN_GROUPS):
        return True
    if method is None or not key.startswith("adapter."):
        return False
    if not method.adapter:
        return True
    return (not method.eva and key in EVA_KEYS) or (not method.needs and key.startswith("adapter.eva."))
