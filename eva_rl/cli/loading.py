"""The policy that a command starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from eva_rl.adapters import AdaptedPolicy, load_policy
from eva_rl.agents.huggingface.options import ImportOptions
from eva_rl.configs.groups import DataOptions, PolicyOptions
from eva_rl.data import Trajectories, load_dataset, read_episodes, select_episodes, write_episodes
from eva_rl.envs import canonical_id, env_spec
from eva_rl.errors import UserError
from eva_rl.rollouts.experts import ActionNoise, collect_expert

AUTO = "auto"
SHIPPED_FOR = {"Hopper-v5": "hopper", "Hopper-v4": "hopper"}
DEFAULT = "mt40"


EXPERT, AUTO, NONE = "expert", "auto", "none"


def resolve_policy(options: PolicyOptions, env_id: str) -> PolicyOptions:
    """The options with ``auto`` replaced by the shipped policy for a task."""
    if options.path != AUTO:
        return options
    return replace(options, path=SHIPPED_FOR.get(env_id, DEFAULT))


def open_policy(
    options: PolicyOptions,
    device: torch.device,
    *,
    merge: bool = False,
    adapters: Mapping[str, str] | None = None,
) -> AdaptedPolicy:
    """Load the policy that the options name; ``merge`` folds its adapter into its weights, ``adapters`` brings more.

    Raises:
        UserError: See :func:`eva_rl.adapters.load_policy`.
    """
    imported = ImportOptions(
        context_length=options.context_length, target_return=options.target_return, allow_pickle=options.allow_pickle
    )
    return load_policy(options.path, device, imported, merge=merge, adapters=adapters)


def load_task_data(env: str, options: DataOptions, folder: Path, horizon: int | None = None) -> Trajectories:
    """Demonstrations of a task.

    Args:
        env: The task.
        options: Where they come from, and which episodes are used; collected ones are kept in ``folder`` and read from
            there the next time.
        folder: For collected files, one a task.
        horizon: Env steps of a collected episode; None takes the task's own.

    Raises:
        UserError: There are none, or they do not fit the task's actions.
    """
    if options.source.partition(":")[0] == EXPERT:
        data = _demonstrated(env, options, folder, horizon)
    else:
        spec = env_spec(env)
        data = load_dataset(
            options.source, allow_pickle=options.allow_pickle, action_bounds=(spec.action_low, spec.action_high)
        )
    return select_episodes(data, top=options.top, first=options.first, max_return=options.max_return)


def _demonstrated(env: str, options: DataOptions, folder: Path, horizon: int | None) -> Trajectories:
    env, episodes = expert_source(options.source, env, options.episodes)
    env_id = canonical_id(env)
    path = folder / f"{env_id.split('/')[-1]}.h5"
    if not path.exists():
        data = collect_expert(
            env_id,
            episodes,
            seed=options.seed,
            noise=ActionNoise(options.noise.std, options.noise.burst_probability),
            horizon=horizon,
            only_successes=options.only_successes,
            workers=options.workers,
        )
        write_episodes(path, data, {"seed": options.seed})
    return read_episodes(path)


def expert_source(source: str, env: str, episodes: int) -> tuple[str, int]:
    """Task and number of episodes of ``expert``, ``expert:ENV`` or ``expert:ENV?episodes=25``.

    Raises:
        UserError: It has another option.
    """
    name, _, query = source.removeprefix(EXPERT).removeprefix(":").partition("?")
    key, _, value = query.partition("=")
    if query and (key != "episodes" or not value.isdecimal() or int(value) == 0):
        raise UserError(f"data={source}: expected expert:ENV or expert:ENV?episodes=NUMBER.")
    return name or env, int(value) if query else episodes
