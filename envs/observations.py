"""The order in which a Dict observation is laid side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
from gymnasium import spaces

from eva_rl.envs.registry import cache_while_registered, make_env


@cache_while_registered
def observation_keys(name: str) -> tuple[str, ...]:
    """Names of the parts of a task's flat observations in their order; none where they are one Box from the start.

    Nested parts are named ``outer/inner``, those of a Tuple ``_index_0``, ``_index_1``, ..., as Minari's files name
    them.

    Args:
        name: Any name that :func:`eva_rl.envs.canonical_id` takes.
    """
    env: gym.Env[Any, Any] = make_env(name)
    try:
        inner = env
        while isinstance(inner, gym.Wrapper):
            if isinstance(inner, gym.wrappers.FlattenObservation):
                return tuple(_leaves(inner.env.observation_space))
            inner = inner.env
        return ()
    finally:
        env.close()


def _leaves(space: spaces.Space[Any], prefix: str = "") -> Iterator[str]:
    parts = getattr(space, "spaces", None)
    if parts is None:
        yield from [prefix] if prefix else []
        return
    items = parts.items() if isinstance(parts, dict) else ((f"_index_{i}", part) for i, part in enumerate(parts))
    for name, part in items:
        yield from _leaves(part, f"{prefix}/{name}" if prefix else name)
