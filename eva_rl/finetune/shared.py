"""Work that is done once: for all runs of a study (``shared=FOLDER``), or before a run was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.agents.policy_folder import weights_digest
from eva_rl.configs.finetune import ASKED
from eva_rl.eva import EvaResult
from eva_rl.files import alone, expanded, read_json, write_file, write_folder, write_json
from eva_rl.finetune.adapter import activation_source
from eva_rl.finetune.locations import digest_of, key_of, place_key
from eva_rl.finetune.session import Session
from eva_rl.rollouts.episodes import EpisodeRecord
from eva_rl.rollouts.evaluation import EvaluationResult

Actions = NDArray[np.float32]
BEFORE = "before"
"""Folder of evaluations before training, in the run directory or the shared one."""


def evaluate_before(session: Session, *, again: bool) -> tuple[EvaluationResult, Actions]:
    """The held-out evaluation before training with the actions taken; the same for all methods of a study.

    Args:
        session: The run.
        again: Play it anew, unless other runs share it; a run that continues takes what it found at its start.
    """
    config = session.config
    if session.process_group.world_size > 1:
        return session.evaluate("Before")
    key = before_key(session)
    if config.shared:
        session.shared["before"] = key
    path = (expanded(config.shared) if config.shared else session.run_dir) / BEFORE / key
    with alone(path, place_key(config)):
        if not path.exists() or (again and not config.shared):
            result, actions = session.evaluate("Before")
            write_folder(path, lambda aside: _save(aside, result, actions))
        result, actions = _load(path)
    return replace(result, references=session.references), actions  # another run's data may have others


def before_key(session: Session) -> str:
    """A digest of everything that decides the evaluation before training."""
    config = session.config
    return key_of(
        policy=_policy_parts(session.policy),
        env=session.spec.env_id,
        target=session.policy.conditioning.of(session.spec.env_id),
        protocol=session.spec.protocol,
        episodes=config.eval.episodes,
        seed=config.eval.seed,
        stop_at_success=config.eval.stop_at_success,
        horizon=config.env.horizon,
        threads=config.threads,
    )


def eva_key(session: Session) -> str:
    """A digest of everything that decides the EVA pass; of the target return only where the policy sees it."""
    config, data = session.config, session.data
    sees_target = activation_source(config, data is not None) != "trajectories" or config.data.returns_to_go == ASKED
    return key_of(
        policy=_policy_parts(session.policy),
        target=session.policy.conditioning.of(session.spec.env_id) if sees_target else None,
        data=None if data is None else (data.content_hash, digest_of(data.successes)),
        sampling=(config.data.after_success, config.data.weight_by, config.data.returns_to_go),
        env=session.spec.env_id,
        horizon=config.env.horizon,
        seed=config.seed,
        pruned=config.adapter.method.endswith("adalora"),
        threads=config.threads,
        **{k: v for k, v in asdict(config.adapter).items() if k not in {"method", "dropout"}},
    )


def _policy_parts(policy: DecisionTransformerPolicy) -> dict[str, Any]:
    """Everything of a policy that decides how it acts, but for its target return."""
    scaling = {field.name: getattr(policy.scaling, field.name) for field in fields(policy.scaling)}
    return {
        "weights": weights_digest(policy.network.state_dict()),
        "architecture": asdict(policy.network.config),
        "scaling": {name: x.tolist() if isinstance(x, Tensor) else x for name, x in scaling.items()},
        "device": str(policy.device),
    }


def _save(folder: Path, result: EvaluationResult, actions: Actions) -> None:
    write_json(folder / "evaluation.json", {**asdict(result), "episodes": [asdict(e) for e in result.episodes]})
    write_file(folder / "actions.npy", lambda aside: _save_array(aside, actions))


def _save_array(path: Path, actions: Actions) -> None:
    with path.open("wb") as file:  # by name, it would add a suffix
        np.save(file, actions, allow_pickle=False)


def _load(folder: Path) -> tuple[EvaluationResult, Actions]:
    record: Mapping[str, Any] = read_json(folder / "evaluation.json")
    episodes = tuple(EpisodeRecord(**episode) for episode in record["episodes"])
    return EvaluationResult(**{**record, "episodes": episodes}), np.load(folder / "actions.npy", allow_pickle=False)


def shared_eva(session: Session, compute: Callable[[], EvaResult]) -> EvaResult:
    """The EVA pass, which all runs with one policy, data and seed have in common."""
    config = session.config
    if not config.shared or session.process_group.world_size > 1:
        return compute()
    key = eva_key(session)
    session.shared["eva"] = key
    path = expanded(config.shared) / "eva" / key
    with alone(path, place_key(config)):
        if not path.exists():
            result = compute()
            write_folder(path, lambda aside: result.save(aside / "eva"))
        return EvaResult.load(path / "eva")
