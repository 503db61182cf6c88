"""Trajectories for a command: collected once into the run directory, or read from where the user says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eva_rl import envs
from eva_rl.commands.options import DataOptions
from eva_rl.data import (
    Trajectories,
    load_dataset,
    read_episodes,
    select_episodes,
    window_weights,
    write_episodes,
)
from eva_rl.demonstrations import ActionNoise, collect_expert
from eva_rl.errors import UserError

EXPERT, AUTO, NONE = "expert", "auto", "none"
TARGET_QUANTILE = 0.9
"""Quantile of the demonstrations' returns that a policy is asked for."""
GRACE = 10
"""Env steps after the first success that are sampled with full weight."""


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
        spec = envs.env_spec(env)
        data = load_dataset(
            options.source, allow_pickle=options.allow_pickle, action_bounds=(spec.action_low, spec.action_high)
        )
    return select_episodes(data, top=options.top, first=options.first, max_return=options.max_return)


def _demonstrated(env: str, options: DataOptions, folder: Path, horizon: int | None) -> Trajectories:
    env, episodes = expert_source(options.source, env, options.episodes)
    env_id = envs.canonical_id(env)
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


def target_return(data: Trajectories) -> float:
    """The return to ask for: a high quantile of what was demonstrated."""
    return float(np.quantile(data.returns, TARGET_QUANTILE))


def sampling_weights(
    data: Trajectories, after_success: float, weight_by: str = "uniform"
) -> NDArray[np.float64] | None:
    """Weight of each env step as the last of a window.

    What follows a success is mostly holding still; it gets less weight, so that updates go where success is decided.

    Args:
        data: Successes must be known, or all weights are equal.
        after_success: Weight of env steps more than :data:`GRACE` after the first success.
        weight_by: What windows are drawn by otherwise; see :func:`eva_rl.data.window_weights`.

    Returns:
        (N,), or None where all are equal.
    """
    drawn = window_weights(data, weight_by)
    if data.successes is None or after_success == 1:
        return drawn
    weights = np.ones(data.num_steps)
    for begin, end in zip(data.offsets[:-1], data.offsets[1:], strict=True):
        solved = np.flatnonzero(data.successes[begin:end])
        if len(solved):
            weights[begin + solved[0] + GRACE : end] = after_success
    return weights if drawn is None else weights * drawn
