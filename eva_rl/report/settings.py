"""The settings by which a report tells methods apart, those that decide a result; and what it compares them by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eva_rl.adapters.methods import METHODS
from eva_rl.cli.parsing import flat
from eva_rl.cli.run_dir import FREE_IN_GROUPS, FREE_TO_CHANGE, todays_settings
from eva_rl.configs.algorithms import ALGORITHMS
from eva_rl.configs.finetune import FinetuneConfig
from eva_rl.report.reading import one_line

ADAPTER = "adapter.method"
"""A setting only where a study gives its method another name."""
NO_SETTINGS = FREE_TO_CHANGE | {"seed", "env.id", ADAPTER, "data.source", "data.seed", "data.workers"}
"""Keys that name a run or change no result; the rest tells methods apart."""
NO_SETTINGS |= {"eval.every", "eval.quick_episodes", "eval.at", "algo.eval_every", "algo.checkpoint_every"}
NO_SETTINGS |= {"algo.workers", "algo.replay_on_disk", "study"}
VALIDATION, KEEP_BEST = ("algo.eval_every", "eval.quick_episodes"), "algo.keep_best"
"""Settings that decide a result where the best parameters are kept, and the one that says so."""
TRUNCATING, WHOLE_EPISODES = ("algo.eval_every", "algo.checkpoint_every"), "self_imitation"
"""Settings that decide where episodes of training are truncated, and the algorithm that truncates none."""

Settings = tuple[tuple[str, Any], ...]


def settings_of(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Settings:
    """What decides a result besides task, method and seed: canonical JSON by dotted key."""
    everything = _all_settings(config)
    found = {key: value for key, value in everything.items() if not _ignored(key, everything, str(summary["method"]))}
    data = summary.get("data") or {}
    task = summary["env"]
    origin = str(data.get("source", "none"))
    found["data.source"] = origin.replace(task, "TASK").replace(task.rpartition("/")[2], "TASK")
    return tuple(sorted((one_line(key), json.dumps(value, default=str)) for key, value in found.items()))


def _all_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted key; runs of earlier versions, which did not know some of them, are compared with later ones."""
    algo = ALGORITHMS.get(str((config.get("algo") or {}).get("name")))
    return dict(flat(config)) if algo is None else todays_settings(config, FinetuneConfig(algo=algo))


def _ignored(key: str, settings: Mapping[str, Any], method: str) -> bool:
    """Whether a setting changes no result, or the run's method ignores it."""
    if key in VALIDATION and settings.get(KEEP_BEST):
        return False
    if key in TRUNCATING and not str(settings.get("algo.name")).endswith(WHOLE_EPISODES):
        return False
    group, _, name = key.rpartition(".")
    if key in NO_SETTINGS or key.partition(".")[0] in NO_SETTINGS or (group and name in FREE_IN_GROUPS):
        return True
    return key.startswith("adapter.") and method in METHODS and METHODS[method].ignores(key, settings)


@dataclass(frozen=True)
class Decision:
    """What methods are compared by, which a study decides before its runs.

    Attributes:
        endpoint: A key of :data:`eva_rl.report.verdicts.ENDPOINTS`.
        margin: Difference below which methods count as equivalent, in the endpoint's unit; None tests none.
        reference: Method that each other one is compared with; empty compares each pair.
    """

    endpoint: str
    margin: float | None = None
    reference: str = ""

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Decision:
        """What a run's own file says of it."""
        margin = about.get("margin")
        reference = one_line(str(about.get("reference") or ""))
        return cls(str(about["endpoint"]), None if margin is None else float(margin), reference)

    def __str__(self) -> str:
        """As it is typed."""
        reference = f" reference={self.reference}" if self.reference else ""
        return f"endpoint={self.endpoint} margin={self.margin}{reference}"
