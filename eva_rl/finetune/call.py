"""Fine-tuning in one call, from Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from eva_rl.adapters import load_policy
from eva_rl.agents import DecisionTransformerPolicy, save_policy
from eva_rl.cli.keys import as_typed
from eva_rl.cli.parsing import parse
from eva_rl.cli.run_dir import read_summary
from eva_rl.data import Trajectories, write_episodes
from eva_rl.files import expanded
from eva_rl.finetune.command import finetune


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning made.

    Attributes:
        policy: The fine-tuned policy.
        summary: ``summary.json``: results before and after, parameters, seconds.
        run_dir: Where everything lies.
    """

    policy: DecisionTransformerPolicy
    summary: dict[str, Any]
    run_dir: Path


def finetune_policy(
    policy: DecisionTransformerPolicy | str | Path,
    env: str,
    data: Trajectories | str | Path | None = None,
    *,
    run_dir: str | Path,
    adapter: str = "eva",
    settings: Mapping[str, Any] | None = None,
) -> FinetuneResult:
    """Fine-tune a policy on a task, with its success on held-out episodes before and after.

    In a script, call it under ``if __name__ == "__main__":``, or with ``data.workers`` of 1: the processes that collect
    demonstrations run the script from its top.

    Args:
        policy: A policy, or the name of one as ``policy=`` takes it.
        env: The task.
        data: Demonstrations, or their source as ``data=`` takes it; None takes the scripted expert where one is needed.
        run_dir: New folder for everything; an unfinished one is continued.
        adapter: The method.
        settings: Any other keys of the command: ``{"algo.updates": 100, "adapter.rank": 4}``.

    Raises:
        UserError: As the command.
    """
    with TemporaryDirectory() as folder:
        own = {
            "policy": _written_policy(policy, Path(folder)),
            "env": env,
            "data": _written_data(data, Path(folder)),
            "adapter": adapter,
            "run_dir": str(run_dir),
        }
        finetune(parse("finetune", [f"{key}={as_typed(value)}" for key, value in {**own, **(settings or {})}.items()]))
    place = expanded(run_dir)
    return FinetuneResult(load_policy(place), read_summary(place), place)


def _written_policy(policy: DecisionTransformerPolicy | str | Path, folder: Path) -> str:
    if not isinstance(policy, DecisionTransformerPolicy):
        return str(policy)
    save_policy(folder / "policy", policy)
    return str(folder / "policy")


def _written_data(data: Trajectories | str | Path | None, folder: Path) -> str:
    if not isinstance(data, Trajectories):
        return "auto" if data is None else str(data)
    write_episodes(folder / "data.h5", data)
    return str(folder / "data.h5")
