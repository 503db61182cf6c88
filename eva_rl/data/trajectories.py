"""Episodes as flat arrays with offsets."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.data.arrays import gathered
from eva_rl.data.formats.checks import Source, check_episode, warn_of_repeated_ends
from eva_rl.errors import UserError, check_dimensions, counted

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

COLUMNS: dict[str, tuple[type[np.generic], int]] = {
    "observations": (np.float32, 2),
    "actions": (np.float32, 2),
    "rewards": (np.float32, 1),
    "terminations": (np.bool_, 1),
    "truncations": (np.bool_, 1),
    "final_observations": (np.float32, 2),
    "successes": (np.bool_, 1),
    "target_actions": (np.float32, 2),
}
"""Type and axes of each array besides the offsets."""
OBSERVATION_KEYS = "observation_keys"
"""Metadata: the parts of observations that were a Dict, in the order in which they lie side by side."""


@dataclass(frozen=True)
class Episode:
    """One episode of T env steps.

    Attributes:
        observations: (T + 1, obs), the last row being the observation after the last step.
        actions: (T, act), as executed.
        rewards: (T,).
        terminations: (T,), True where the environment ended the episode.
        truncations: (T,), True where a time limit cut it.
        successes: (T,), True from the first step on which the task was solved; None where unknown.
        target_actions: (T, act), what a clone should do in each observation, where it differs from what was
            executed (an expert's own action under injected noise: DART, Laskey et al. 2017); None otherwise.
        extras: What else was noted at each step, (T, width) by name.
    """

    observations: Floats
    actions: Floats
    rewards: Floats
    terminations: Flags
    truncations: Flags
    successes: Flags | None = None
    target_actions: Floats | None = None
    extras: Mapping[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Trajectories:
    """Read-only episodes, concatenated: N env steps in E episodes.

    Attributes:
        observations: (N, obs), the observation in which each action was taken.
        actions: (N, act), as executed.
        rewards: (N,).
        terminations: (N,).
        truncations: (N,).
        final_observations: (E, obs), the observation after the last step of each episode.
        offsets: (E + 1,), episode e owns the rows ``offsets[e]:offsets[e + 1]``.
        env_id: The task the data come from, or "" where unknown.
        source: Where the data come from, as a user would name it.
        successes: (N,) or None.
        target_actions: (N, act) or None; see :class:`Episode`.
        metadata: What the file said besides: ``dataset``, ``ref_min_score``, ``ref_max_score``, ...

    Raises:
        UserError: Lengths disagree, an episode is empty, or there is none.
    """

    observations: Floats
    actions: Floats
    rewards: Floats
    terminations: Flags
    truncations: Flags
    final_observations: Floats
    offsets: NDArray[np.int64]
    env_id: str = ""
    source: str = ""
    successes: Flags | None = None
    target_actions: Floats | None = None
    metadata: dict[str, str] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        """Source, amount and dimensions, in one line."""
        return (
            f"Trajectories({self.source or 'unnamed'}: {self.amount}, observations {self.observation_dim}, "
            f"actions {self.action_dim}, mean return {self.returns.mean():g})"
        )

    def __post_init__(self) -> None:
        self._check()
        for name in ("offsets", *COLUMNS):
            if getattr(self, name) is not None:
                array = np.asarray(getattr(self, name)).view()  # a plain view, of a memory map too
                array.flags.writeable = False
                object.__setattr__(self, name, array)

    def _check(self) -> None:
        where = f"{self.source or 'trajectories'}: "
        if len(self.offsets) < 2:
            raise UserError(where + "no episode. Expected at least one; name another data set.")
        if self.offsets[0] != 0:
            raise UserError(where + f"the offsets start with {self.offsets[0]}, expected 0.")
        empty = np.flatnonzero(np.diff(self.offsets) <= 0)
        if len(empty):
            raise UserError(where + f"episode {empty[0]} is empty; expected at least one env step.")
        steps, episodes = int(self.offsets[-1]), len(self.offsets) - 1
        expected = {
            "observations": steps,
            "actions": steps,
            "rewards": steps,
            "terminations": steps,
            "truncations": steps,
            "successes": steps,
            "target_actions": steps,
            "final_observations": episodes,
        }
        for name, length in expected.items():
            array = getattr(self, name)
            if array is None:
                continue
            if array.ndim != COLUMNS[name][1]:
                raise UserError(where + f"{name} has {array.ndim} axes, expected {COLUMNS[name][1]}.")
            if len(array) != length:
                raise UserError(where + f"{name} has {counted(len(array), 'row')}, expected {length}.")

    @property
    def num_episodes(self) -> int:
        """Number of episodes E."""
        return len(self.offsets) - 1

    @property
    def amount(self) -> str:
        """How much there is, in words: ``25 episodes, 5000 env steps``."""
        return f"{counted(self.num_episodes, 'episode')}, {counted(self.num_steps, 'env step')}"

    @property
    def num_steps(self) -> int:
        """Number of env steps N."""
        return int(self.offsets[-1])

    @property
    def observation_dim(self) -> int:
        """Numbers in one observation."""
        return int(self.observations.shape[1])

    @property
    def action_dim(self) -> int:
        """Numbers in one action."""
        return int(self.actions.shape[1])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Env steps of each episode, (E,)."""
        return np.diff(self.offsets)

    @cached_property
    def returns(self) -> NDArray[np.float64]:
        """Undiscounted return of each episode, (E,)."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.offsets[:-1])

    @cached_property
    def returns_to_go(self) -> Floats:
        """Sum of the rewards from each env step to the end of its episode, (N,)."""
        total = np.cumsum(self.rewards, dtype=np.float64)
        end = np.repeat(total[self.offsets[1:] - 1], self.lengths)
        return (end - total + self.rewards).astype(np.float32)

    @cached_property
    def content_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of observations, actions, rewards, offsets and any target actions."""
        digest = hashlib.sha256()
        for array in (self.observations, self.actions, self.rewards, self.offsets, self.target_actions):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def column(self, name: str) -> NDArray[Any]:
        """An array by its name; unknown successes read as none, unknown target actions as the executed ones."""
        value = getattr(self, name)
        if value is None:
            return np.zeros(self.num_steps, bool) if name == "successes" else self.actions
        array: NDArray[Any] = value
        return array

    def episode(self, index: int) -> Episode:
        """Episode number ``index``, from the end where it is negative, with its own observation after the last step."""
        index = range(self.num_episodes)[index]
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Episode(
            observations=np.concatenate([self.observations[rows], self.final_observations[index : index + 1]]),
            actions=self.actions[rows],
            rewards=self.rewards[rows],
            terminations=self.terminations[rows],
            truncations=self.truncations[rows],
            successes=None if self.successes is None else self.successes[rows],
            target_actions=None if self.target_actions is None else self.target_actions[rows],
        )

    def select(self, episodes: Sequence[int] | NDArray[np.int64]) -> Trajectories:
        """The given episodes, in the given order, as new trajectories; mapped from a file where they are large."""
        chosen = np.arange(self.num_episodes)[np.asarray(episodes, np.int64)]
        arrays = {name: getattr(self, name) for name in COLUMNS if name != "final_observations"}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        columns: dict[str, Any] = dict(gathered(arrays, self.offsets[chosen], self.offsets[chosen + 1]))
        offsets = np.append(0, np.cumsum(self.lengths[chosen]))
        return replace(self, **columns, final_observations=self.final_observations[chosen], offsets=offsets)

    @classmethod
    def from_episodes(
        cls,
        episodes: Iterable[Episode],
        *,
        env_id: str = "",
        source: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> Trajectories:
        """Concatenate episodes.

        ``successes`` and ``target_actions`` are kept where at least one episode has them: an episode without
        successes never succeeded, one without target actions should be imitated as executed.

        Raises:
            UserError: There is none, or one has other shapes than :class:`Episode` says, numbers that are not finite,
                or an end before its last row.
        """
        parts = list(episodes)
        if not parts:
            raise UserError(f"{source or 'trajectories'}: no episode. Expected at least one; name another data set.")
        for index, part in enumerate(parts):
            check_episode(Source(source or "trajectories") / f"episode {index}", part, parts[0])
        successes = [_or(part.successes, np.zeros(len(part.rewards), bool)) for part in parts]
        targets = [_or(part.target_actions, part.actions) for part in parts]
        return cls(
            observations=np.concatenate([part.observations[:-1] for part in parts], dtype=np.float32),
            actions=np.concatenate([part.actions for part in parts], dtype=np.float32),
            rewards=np.concatenate([part.rewards for part in parts], dtype=np.float32),
            terminations=np.concatenate([part.terminations for part in parts], dtype=bool),
            truncations=np.concatenate([part.truncations for part in parts], dtype=bool),
            final_observations=np.stack([part.observations[-1] for part in parts]).astype(np.float32),
            offsets=np.concatenate([[0], np.cumsum([len(part.rewards) for part in parts])]).astype(np.int64),
            env_id=env_id,
            source=source,
            successes=None if all(p.successes is None for p in parts) else np.concatenate(successes),
            target_actions=None if all(p.target_actions is None for p in parts) else np.concatenate(targets),
            metadata=dict(metadata or {}),
        )

    @classmethod
    def from_arrays(  # noqa: PLR0913 - the columns of a table, each by its own name
        cls,
        observations: NDArray[Any],
        actions: NDArray[Any],
        rewards: NDArray[Any],
        terminations: NDArray[Any] | None = None,
        truncations: NDArray[Any] | None = None,
        *,
        next_observations: NDArray[Any] | None = None,
        successes: NDArray[Any] | None = None,
        env_id: str = "",
        source: str = "arrays",
        metadata: Mapping[str, str] | None = None,
    ) -> Trajectories:
        """Cut flat arrays of N env steps into episodes at their terminations and truncations.

        Steps after the last end are an episode of their own, truncated at its last step; a warning says so. Where
        there are no ``next_observations``, the observation after the last step of an episode is its last one.

        Args:
            observations: (N, ...), in which each action was taken; further axes are flattened.
            actions: (N, ...), as executed.
            rewards: (N,) or (N, 1).
            terminations: (N,), True where the environment ended an episode; None for nowhere.
            truncations: (N,), True where a time limit cut an episode; None for nowhere.
            next_observations: (N, ...), after each step.
            successes: (N,), True from the first step on which the task was solved.
            env_id: The task the data come from.
            source: What messages call the data.
            metadata: See :class:`Trajectories`.

        Raises:
            UserError: Lengths or shapes disagree, values are not finite numbers, flags neither 0 nor 1.
        """
        where = Source(source)
        columns: dict[str, Any] = {
            "observations": _own((where / "observations").floats(observations), observations),
            "actions": _own((where / "actions").floats(actions), actions),
            "rewards": _own((where / "rewards").vector(rewards), rewards),
        }
        steps = len(columns["rewards"])
        flags = {"terminations": terminations, "truncations": truncations, "successes": successes}
        for name, raw in flags.items():
            if raw is not None:
                columns[name] = (where / name).flags(raw)
            elif name != "successes":
                columns[name] = np.zeros(steps, bool)
        following = _following(where, columns["observations"], next_observations)
        for name, array in (columns | {"next_observations": following}).items():
            (where / name).check_rows(len(array), steps, f"there are {steps} rewards")
        ends = _ends(where, columns)
        return cls(
            **columns,
            final_observations=following[ends],
            offsets=np.concatenate([[0], ends + 1]).astype(np.int64),
            env_id=env_id,
            source=source,
            metadata=dict(metadata or {}),
        )


def _own(array: Floats, given: NDArray[Any]) -> Floats:
    """A copy of what is the caller's, whose arrays may change."""
    return array.copy() if np.may_share_memory(array, np.asarray(given)) else array


def _following(where: Source, observations: Floats, raw: NDArray[Any] | None) -> Floats:
    if raw is None:
        return observations
    following = (where / "next_observations").floats(raw)
    if following.shape != observations.shape:
        raise UserError(
            f"{where / 'next_observations'} has shape {following.shape}, expected {observations.shape} as the "
            "observations."
        )
    return following


def _ends(where: Source, columns: dict[str, Any]) -> NDArray[np.int64]:
    """Last row of each episode; a last row without an end becomes a truncation."""
    if not len(columns["rewards"]):
        raise UserError(f"{where / 'rewards'} is empty; expected at least one env step.")
    if not columns["terminations"][-1] and not columns["truncations"][-1]:
        log.warning("%s: the last episode has no end flag that is true. Its last row counts as a truncation.", where)
        columns["truncations"][-1] = True
    ends: NDArray[np.bool_] = columns["terminations"] | columns["truncations"]
    warn_of_repeated_ends(where, ends)
    return np.flatnonzero(ends)


def _or(value: NDArray[Any] | None, default: NDArray[Any]) -> NDArray[Any]:
    return default if value is None else value


def concatenate(parts: Sequence[Trajectories], *, source: str = "") -> Trajectories:
    """Join several sets of trajectories; the env id and the metadata are kept where all agree.

    Raises:
        UserError: There is none, or they differ in their dimensions.
    """
    if not parts:
        raise UserError(f"{source or 'trajectories'}: no episode. Expected at least one; name another data set.")
    env_ids, first = {part.env_id for part in parts}, parts[0]
    for part in parts:
        check_same_dimensions(part, first)
    steps = np.cumsum([0, *(part.num_steps for part in parts)])
    columns = {name: _joined(parts, name) for name in COLUMNS}
    return Trajectories(
        **columns,  # type: ignore[arg-type]
        offsets=np.concatenate([[0], *(part.offsets[1:] + n for part, n in zip(parts, steps, strict=False))]),
        env_id=env_ids.pop() if len(env_ids) == 1 else "",
        source=source or " + ".join(dict.fromkeys(part.source for part in parts)),
        metadata=dict(first.metadata) if all(part.metadata == first.metadata for part in parts) else {},
    )


def check_same_dimensions(part: Trajectories, first: Trajectories) -> None:
    """Raise unless two sets of trajectories can be joined.

    Raises:
        UserError: They differ in their dimensions.
    """
    dims, expected = (part.observation_dim, part.action_dim), (first.observation_dim, first.action_dim)
    check_dimensions(part.source, dims, f"{first.source} has", expected, "Join data of one kind.")


def _joined(parts: Sequence[Trajectories], name: str) -> NDArray[Any] | None:
    if all(getattr(part, name) is None for part in parts):
        return None
    return np.concatenate([part.column(name) for part in parts])
