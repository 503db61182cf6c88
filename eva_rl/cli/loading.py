"""The policy that a command starts from, and the demonstrations that it learns from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from eva_rl.adapters import AdaptedPolicy, load_policy
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.agents.huggingface.options import ImportOptions
from eva_rl.agents.policy_folder import find_policy, says_its_bounds
from eva_rl.cli.collecting import collect_shown
from eva_rl.cli.console import say
from eva_rl.configs.groups import DataOptions, PolicyOptions
from eva_rl.data import Trajectories, concatenate, load_dataset, read_episodes, select_episodes, write_episodes
from eva_rl.data.selection import observation_statistics, target_return
from eva_rl.data.trajectories import OBSERVATION_KEYS
from eva_rl.envs import EnvSpec, canonical_id, env_spec
from eva_rl.envs.observations import observation_keys
from eva_rl.errors import UserError, check_dimensions, counted
from eva_rl.rollouts.experts import check_scripted

log = logging.getLogger(__name__)

MUJOCO = "Hopper", "Walker2d", "HalfCheetah"
SHIPPED_FOR = {f"{task}-{version}": task.lower() for task in MUJOCO for version in ("v4", "v5")}
DEFAULT = "mt40"
EXPERT, AUTO, NONE = "expert", "auto", "none"
LARGEST_RETURN = 50.0
"""Magnitude of scaled returns above which a policy is warned of: those of the shipped ones are below 10."""


def resolve_policy(options: PolicyOptions, env_id: str) -> PolicyOptions:
    """The options with ``auto`` replaced by the shipped policy for a task."""
    if options.path != AUTO:
        return options
    return replace(options, path=SHIPPED_FOR.get(env_id.partition("?")[0], DEFAULT))


def open_policy(
    options: PolicyOptions,
    device: torch.device,
    *,
    merge: bool = False,
    adapters: Mapping[str, str] | None = None,
    target_return: float | None = None,
) -> AdaptedPolicy:
    """Load the policy that the options name.

    Args:
        options: What to load.
        device: Where to.
        merge: Whether to fold its adapter into its weights.
        adapters: More adapters, by task.
        target_return: Of an imported policy, where the options name none.

    Raises:
        UserError: See :func:`eva_rl.adapters.load_policy`.
    """
    mean, std = _normalisation(options)
    given = target_return if options.target_return is None else options.target_return
    low, high = _bounds_of_import(options)
    imported = ImportOptions(
        context_length=options.context_length,
        observation_mean=mean,
        observation_std=std,
        return_scale=options.return_scale,
        target_return=0.0 if _from_demonstrations(options) else given,
        action_low=low,
        action_high=high,
        num_heads=options.num_heads,
        allow_pickle=options.allow_pickle,
    )
    policy = load_policy(options.path, device, imported, merge=merge, adapters=adapters)
    if options.action_bounds is not None:
        policy.set_action_bounds(*options.action_bounds)
    return policy


def _bounds_of_import(options: PolicyOptions) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Lowest and highest action of a policy of another project, where they are given: it may act in their units."""
    bounds = options.action_bounds
    if bounds is not None and len(bounds) != 2:
        raise UserError(f"policy.action_bounds={bounds}: expected two numbers, [LOW,HIGH].")
    if bounds is None or says_its_bounds(find_policy(options.path)):
        return None, None
    return bounds[:1], bounds[1:]


FROM_DEMONSTRATIONS = "data"
"""Of ``policy.observations_from``: the run's own demonstrations."""
STD_EPSILON = 1e-6
"""Added to standard deviations, as the original Decision Transformer does."""


def check_has_no_demonstrations(options: PolicyOptions) -> None:
    """Raise where a command that has none is to take an imported policy's normalisation from demonstrations.

    Raises:
        UserError: It is.
    """
    if options.observations_from == FROM_DEMONSTRATIONS:
        raise UserError(
            f"policy.observations_from={FROM_DEMONSTRATIONS} stands for the demonstrations of a fine-tuning run, and "
            "there are none here. Name the data: policy.observations_from=minari:ID."
        )


def _from_demonstrations(options: PolicyOptions) -> bool:
    return options.observations_from == FROM_DEMONSTRATIONS and options.target_return is None


def _normalisation(options: PolicyOptions) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Mean and standard deviation of an imported policy's observations, where they are given."""
    if not options.observations_from:
        return options.observation_mean, options.observation_std
    if options.observation_mean is not None or options.observation_std is not None:
        raise UserError("policy.observations_from and policy.observation_mean or _std: expected one of them.")
    if options.observations_from == FROM_DEMONSTRATIONS:
        return [0.0], [1.0]  # until there are demonstrations: normalise_by
    return _statistics(load_dataset(options.observations_from, allow_pickle=options.allow_pickle))


def _statistics(data: Trajectories) -> tuple[list[float], list[float]]:
    mean, std = observation_statistics(data)
    return mean.tolist(), (std + STD_EPSILON).tolist()


def normalise_by(policy: DecisionTransformerPolicy, data: Trajectories, options: PolicyOptions) -> None:
    """Give an imported policy the normalisation of demonstrations, and their target return unless one was given."""
    mean, std = (torch.tensor(values, dtype=torch.float32, device=policy.device) for values in _statistics(data))
    policy.scaling = replace(policy.scaling, observation_mean=mean, observation_std=std)
    if _from_demonstrations(options):
        policy.conditioning = replace(policy.conditioning, target_return=target_return(data))


@dataclass(frozen=True)
class Demonstrations:
    """What one policy for several tasks learns from.

    Attributes:
        data: All episodes, each once.
        target_returns: Target return of each task.
        shared: Whether all tasks share the same episodes.
    """

    data: Trajectories
    target_returns: dict[str, float]
    shared: bool


def load_demonstrations(
    tasks: Sequence[str], options: DataOptions, folder: Path, horizon: int | None = None
) -> Demonstrations:
    """Demonstrations of several tasks: each task's own where experts play them, else one data set, read once.

    Args:
        tasks: Canonical names.
        options: Where they come from, and which episodes are used.
        folder: For collected files, one a task.
        horizon: Env steps of a collected episode; None takes the task's own.

    Raises:
        UserError: As :func:`load_task_data`, or the tasks differ in what a policy sees or does.
    """
    check_alike([env_spec(task, horizon) for task in tasks])
    named = options.source.partition(":")[0] != EXPERT or expert_source(options.source, "", 1)[0]
    shared = bool(named) and len(tasks) > 1
    parts = [load_task_data(task, options, folder, horizon) for task in (tasks[:1] if shared else tasks)]
    targets = [target_return(part) for part in parts]
    data = parts[0] if len(parts) == 1 else concatenate(parts)
    return Demonstrations(data, dict(zip(tasks, targets * len(tasks) if shared else targets, strict=True)), shared)


def check_alike(specs: Sequence[EnvSpec]) -> None:
    """Raise unless one policy can act in all of these tasks.

    Raises:
        UserError: They differ in dimensions or action bounds, or their actions have no bounds.
    """
    first = specs[0]
    for spec in specs:
        if not (np.subtract(spec.action_high, spec.action_low) < np.finfo(np.float32).max).all():
            raise UserError(
                f"{spec.env_id} has actions without bounds ({spec.action_low} to {spec.action_high}); a Decision "
                "Transformer's lie between bounds. Register the environment with RescaleAction or ClipAction."
            )
        for name in ("observation_dim", "action_dim", "action_low", "action_high"):
            own, other = getattr(spec, name), getattr(first, name)
            if own != other:
                raise UserError(
                    f"{spec.env_id} has {name} {own}, {first.env_id} has {other}: one policy cannot act in both. Train "
                    "one for each, with one env= at a time."
                )


def load_task_data(env: str, options: DataOptions, folder: Path, horizon: int | None = None) -> Trajectories:
    """Demonstrations of a task.

    Args:
        env: The task.
        options: Where they come from, and which episodes are used; collected ones are kept in ``folder`` and read from
            there the next time.
        folder: For collected files, one a task.
        horizon: Env steps of a collected episode; None takes the task's own.

    Raises:
        UserError: There are none, or they do not fit the task's observations and actions.
    """
    spec = env_spec(env, horizon)
    if options.source.partition(":")[0] == EXPERT:
        check_expert(options.source, spec)
        data = _demonstrated(env, options, folder, horizon)
    else:
        if unused := unused_for_files(options):
            log.warning("Not used: %s", unused)
        data = load_dataset(
            options.source,
            allow_pickle=options.allow_pickle,
            action_bounds=(spec.action_low, spec.action_high),
            skip_damaged=options.skip_damaged,
        )
    check_fit(data, spec)
    return select_episodes(
        data,
        top=options.top,
        first=options.first,
        max_return=options.max_return,
        sample=options.sample,
        seed=options.seed,
    )


def unused_for_files(options: DataOptions) -> str:
    """What was typed that only collecting reads, beside data that are there, and what to type instead; or nothing."""
    usual, n = DataOptions(), options.episodes
    if n != usual.episodes:
        return (
            f"data.episodes={n} says how many episodes to collect, and data={options.source} is there already. Use "
            f"data.sample={n} to draw so many of it by data.seed, or data.first={n}."
        )
    if options.noise != usual.noise or options.only_successes != usual.only_successes:
        return (
            f"data.noise and data.only_successes say how episodes are collected, and data={options.source} is there "
            "already. Leave them out."
        )
    return ""


def check_fit(data: Trajectories, spec: EnvSpec) -> None:
    """Raise unless data fit a task; say where they come from another one.

    Raises:
        UserError: Naming the dimensions on both sides.
    """
    own, expected = (data.observation_dim, data.action_dim), (spec.observation_dim, spec.action_dim)
    other = f"Name other demonstrations with data=, or the task they were made in with env={data.env_id or '...'}."
    check_dimensions(data.source, own, f"{spec.env_id} has", expected, other)
    _check_order(data, spec)
    if data.env_id and _registered(data.env_id) != _registered(spec.env_id):
        log.warning("%s: demonstrations of %s are used for %s.", data.source, data.env_id, spec.env_id)


def describe_demonstrations(data: Trajectories, policy: DecisionTransformerPolicy, spec: EnvSpec) -> None:
    """Say what there is to clone, and warn where numbers are unlike what the task or the policy knows."""
    low, high, target = float(data.returns.min()), float(data.returns.max()), policy.conditioning.of(spec.env_id)
    episodes = counted(data.num_episodes, "episode")
    say(f"Demonstrations: {episodes}, returns from {low:.4g} to {high:.4g}; target return {target:.4g}.")
    if (longest := int(data.lengths.max())) > spec.horizon > 0:
        log.warning(
            "%s: an episode has %d env steps, and %s ends after %d. Were several joined? Flags that end them, or "
            "?horizon=%d behind a d4rl: source, tell them apart; for a longer task: env.horizon=%d.",
            data.source, longest, spec.env_id, spec.horizon, spec.horizon, longest,
        )  # fmt: skip
    room = max(high - low, abs(low), abs(high))
    if not low - room <= target <= high + room:
        log.warning(
            "The target return %.4g lies far from what the demonstrations return: policy.target_return=%.4g asks for "
            "the best of them.", target, high,
        )  # fmt: skip
    if (shown := max(abs(low), abs(high), abs(target)) / policy.scaling.return_scale) > LARGEST_RETURN:
        log.warning(
            "The policy divides returns by %.4g: it would see numbers up to %.0f, and knows those of its own tasks. "
            "Scale the rewards of the data and of the environment, or pretrain a policy on this task.",
            policy.scaling.return_scale, shown,
        )  # fmt: skip


def check_expert(source: str, spec: EnvSpec) -> None:
    """Raise unless there is the expert that a source names, for a task of the same dimensions.

    Args:
        source: ``expert`` or ``expert:ENV``.
        spec: The task that its episodes are for.

    Raises:
        UserError: Its task has none, or has other dimensions.
    """
    theirs = env_spec(expert_source(source, spec.env_id, 1)[0])
    check_scripted(theirs.env_id)
    own, expected = (theirs.observation_dim, theirs.action_dim), (spec.observation_dim, spec.action_dim)
    other = "Name other demonstrations with data=."
    check_dimensions(f"data={source}: {theirs.env_id}", own, f"{spec.env_id} has", expected, other)


def _registered(env_id: str) -> str:
    """The name that a module registered, without the module: data name the one, ``env=`` the other."""
    base, mark, options = env_id.partition("?")
    return base.rpartition(":")[2] + mark + options


def _check_order(data: Trajectories, spec: EnvSpec) -> None:
    """Refuse data whose Dict observations are laid side by side in another order than the task's."""
    said = data.metadata.get(OBSERVATION_KEYS)
    if not said:
        return
    expected = ",".join(observation_keys(spec.env_id))
    if expected and said != expected:
        raise UserError(
            f"{data.source} lays the parts of an observation side by side as {said}, {spec.env_id} as {expected}. Add "
            f"?keys={expected} to the source, where those are the same parts, or name other demonstrations with data=."
        )


def _demonstrated(env: str, options: DataOptions, folder: Path, horizon: int | None) -> Trajectories:
    env, episodes = expert_source(options.source, env, options.episodes)
    env_id = canonical_id(env)
    path = folder / f"{env_id.split('/')[-1]}.h5"
    if not path.exists():
        data = collect_shown(env_id, episodes, options, horizon)
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
