"""Fine-tuning in one call, from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eva_rl.adapters import AdaptedPolicy, load_policy
from eva_rl.agents import DecisionTransformerPolicy, save_policy
from eva_rl.agents.policy_folder import policy_record, weights_digest
from eva_rl.cli.parsing import parse
from eva_rl.cli.run_dir import INPUTS, check_run_dir, read_summary
from eva_rl.cli.values import as_word
from eva_rl.configs.finetune import FinetuneConfig
from eva_rl.data import load_dataset, write_episodes
from eva_rl.data.sources import GivenData
from eva_rl.data.trajectories import COLUMNS
from eva_rl.envs import env_spec
from eva_rl.errors import UserError
from eva_rl.files import alone, expanded
from eva_rl.finetune.command import finetune
from eva_rl.finetune.locations import digest_of, key_of


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning made.

    Attributes:
        policy: The fine-tuned policy.
        summary: ``summary.json``: results before and after, parameters, seconds.
        run_dir: Where everything lies.
    """

    policy: AdaptedPolicy
    summary: dict[str, Any]
    run_dir: Path


def finetune_policy(
    policy: DecisionTransformerPolicy | str | Path,
    env: str,
    data: GivenData | None = None,
    *,
    run_dir: str | Path,
    adapter: str = "eva",
    settings: Mapping[str, Any] | None = None,
) -> FinetuneResult:
    """Fine-tune a policy on a task, with its success on held-out episodes before and after.

    In a script, call it under ``if __name__ == "__main__":``, or with ``data.workers`` of 1: the processes that collect
    demonstrations run the script from its top.

    Args:
        policy: A policy, or the name of one as ``policy=`` takes it; its active adapter becomes part of its weights,
            and without an active one the base is fine-tuned.
        env: The task, as ``env=`` takes it: ``push-v3``, ``Hopper-v5`` or ``module:Env-v0``.
        data: Demonstrations as ``eva_rl.load_dataset`` takes or returns them, or their source as ``data=`` takes it;
            None takes the scripted expert where one is needed.
        run_dir: New folder for everything; an unfinished one is continued. A policy and data given as objects are
            written to its folder ``inputs``.
        adapter: A name in :data:`eva_rl.adapters.METHODS`.
        settings: Any other keys of the command: ``{"algo.updates": 100, "adapter.rank": 4}``.

    Returns:
        The fine-tuned policy, the results, and where everything lies. As the command does, this prints its progress and
        sets torch's number of threads.

    Raises:
        UserError: As the command, for a ``run_dir`` that holds a finished run, say; or ``settings`` has what an
            argument says.
    """
    _check_settings(settings or {})
    place = expanded(run_dir).resolve()
    check_run_dir(place)
    own = {
        "policy": _policy_path(policy, place / INPUTS),
        "env": env,
        "data": _data_path(data, place / INPUTS, _task(env, settings or {})),
        "adapter": adapter,
        "run_dir": str(run_dir),
    }
    finetune(_config({**own, **(settings or {})}))
    return FinetuneResult(load_policy(place), read_summary(place), place)


def _config(settings: Mapping[str, Any]) -> FinetuneConfig:
    config: FinetuneConfig = parse("finetune", [f"{key}={as_word(value)}" for key, value in settings.items()])
    return config


def _task(env: str, settings: Mapping[str, Any]) -> str:
    """The task's name with what the settings say of it: it may be made with arguments alone, or have other bounds."""
    return _config({"env": env} | {key: value for key, value in settings.items() if key.startswith("env.")}).env.id


ARGUMENTS = {"policy.path": "policy", "env.id": "env", "data.source": "data", "adapter.method": "adapter"}
"""Arguments of :func:`finetune_policy` by the long names of their keys."""


def _check_settings(settings: Mapping[str, Any]) -> None:
    arguments = {*ARGUMENTS.values(), "run_dir"}
    for key, value in settings.items():
        if (name := ARGUMENTS.get(key, key)) in arguments:
            raise UserError(f"settings[{key!r}]={value!r}: that is an argument of its own. Give {name}=... instead.")
        if isinstance(value, Mapping) and "." not in key:
            raise UserError(f"settings[{key!r}]={value!r}: write the whole key, {key}.{next(iter(value), 'KEY')}.")


def _policy_path(policy: DecisionTransformerPolicy | str | Path, folder: Path) -> str:
    """Where a policy is, written there if it is an object: under one name as long as it is the same."""
    if isinstance(policy, str | Path):
        return str(policy)
    if not isinstance(policy, DecisionTransformerPolicy):
        raise UserError(
            f"policy is a {type(policy).__name__}: expected the name or the folder of a policy, or what "
            "eva_rl.load_policy returns."
        )
    policy = _without_adapter(policy)
    key = key_of(weights=weights_digest(policy.network.state_dict()), record=policy_record(policy))
    return _written(folder / f"policy-{key}", lambda path: save_policy(path, policy))


def _without_adapter(policy: DecisionTransformerPolicy) -> DecisionTransformerPolicy:
    """The policy, or a copy in whose weights its active adapter is; none is active where the base acts alone."""
    if not isinstance(policy, AdaptedPolicy) or not policy.adapters.names:
        return policy
    copied = deepcopy(policy)
    copied.adapters.unmerge()
    if copied.adapters.active is None:
        copied.adapters.unload()
    else:
        copied.adapters.merge_and_unload()
    return copied


def _data_path(data: GivenData | None, folder: Path, env: str) -> str:
    """As :func:`_policy_path`; ``auto`` where there are none."""
    if data is None or isinstance(data, str | Path):
        return "auto" if data is None else str(data)
    spec = env_spec(env)
    data = load_dataset(data, action_bounds=(spec.action_low, spec.action_high))
    arrays = {name: digest_of(getattr(data, name)) for name in ("offsets", *COLUMNS)}
    key = key_of(arrays=arrays, env_id=data.env_id, source=data.source, metadata=data.metadata)
    return _written(folder / f"data-{key}.h5", lambda path: write_episodes(path, data))


def _written(path: Path, write: Callable[[Path], None]) -> str:
    with alone(path, "run_dir="):
        if not path.exists():
            write(path)
    return str(path)
