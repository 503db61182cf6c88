"""What the episodes of every format go through: the usual names of their arrays, and checks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.data.formats.checks import AS_WIDE, ActionBounds, LayoutError, Source, check_episode
from eva_rl.data.trajectories import Episode
from eva_rl.errors import UserError

log = logging.getLogger(__name__)

NAMES = {
    "observations": ("observations", "states", "obs"),
    "actions": ("actions", "acts"),
    "rewards": ("rewards", "rews"),
    "next_observations": ("next_observations", "next_obs"),
    "terminations": ("terminations", "terminals", "terminated", "terminal", "termination"),
    "truncations": ("truncations", "timeouts", "truncated", "timeout", "truncation", "dones", "done"),
    "successes": ("successes", "success", "is_success"),
}
"""Usual names of each array. ``dones`` does not say why an episode ended; beside terminations or truncations it is the
other of the two, alone a truncation, which is what it is in Meta-World and DM Control."""
DONES = ("dones", "done")
KNOWN = frozenset(name for names in NAMES.values() for name in names)
REQUIRED = ("observations", "actions", "rewards")

LEAVE_OUT = "Or leave such episodes out: data.skip_damaged=true (in Python skip_damaged=True)."

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class ReadOptions:
    """How foreign files are read.

    Attributes:
        bounds: Of the actions; None takes those that the data come with.
        outside: What to do with actions outside the bounds that the data come with; see :class:`ActionBounds`.
        allow_pickle: Whether pickles may be opened.
        skip_damaged: Whether damaged episodes are left out instead of refused.
        keys: Parts of Dict observations, in the order in which they are laid side by side; none takes the data's own.
    """

    bounds: ActionBounds | None = None
    outside: str = "check"
    allow_pickle: bool = False
    skip_damaged: bool = False
    keys: tuple[str, ...] = ()


def unknown_bounds(where: Path | str) -> UserError:
    """What to raise where actions are to be clipped, and nothing says to what."""
    return UserError(
        f"?actions=clip: nothing says what the bounds of the actions in {where} are. Leave it out, or give "
        "load_dataset(..., action_bounds=(LOW, HIGH))."
    )


class EpisodeChecker:
    """Makes checked episodes of one data set out of raw arrays, and says what it had to leave out or to assume.

    Args:
        path: The file or folder, for messages.
        options: Bounds of the actions, and what to do with damaged episodes.

    Raises:
        UserError: Actions are to be clipped, and nothing says to what.
    """

    def __init__(self, path: Path | str, options: ReadOptions) -> None:
        if options.outside == "clip" and options.bounds is None:
            raise unknown_bounds(path)
        self._path, self._options = path, options
        self._first: Episode | None = None
        self._damaged: list[str] = []
        self._seen = self._endless = 0

    def episode(self, source: Source, read: Callable[[], Arrays]) -> Episode | None:
        """One checked episode; None where it is damaged and left out.

        Args:
            source: The file and the group that hold it, for messages.
            read: Gives ``observations`` (T + 1 rows), ``actions``, ``rewards`` (T rows), and where known
                ``terminations``, ``truncations``, ``target_actions`` (T rows) and ``successes`` (T or T + 1 rows).

        Raises:
            UserError: Damaged and not to be left out, or actions out of bounds.
        """
        self._seen += 1
        try:
            episode = self._checked(source, read())
        except UserError as error:
            if not self._options.skip_damaged:
                raise error if isinstance(error, LayoutError) else UserError(f"{error} {LEAVE_OUT}") from error
            self._damaged.append(str(error))
            return None
        self._first = self._first or episode
        bounds, targets = self._options.bounds, episode.target_actions
        actions = (source / "actions").bounded(episode.actions, bounds)
        if targets is not None:
            targets = (source / "target_actions").bounded(targets, bounds)
        return replace(episode, actions=actions, target_actions=targets)

    def close(self) -> None:
        """Say how many episodes were left out, and how many ends were assumed.

        Raises:
            UserError: Every episode was damaged, or most are of another width than the first.
        """
        if self._damaged:
            text = f"{self._path}: {len(self._damaged)} of {self._seen} episodes are damaged; the first: "
            if self._first is None:
                raise UserError(text + self._damaged[0])
            if sum(AS_WIDE in fault for fault in self._damaged) > self._seen - len(self._damaged):
                raise UserError(f"{text}{self._damaged[0]} Most are unlike the first one: leave that out instead.")
            log.warning("%s%s They are left out.", text, self._damaged[0])
        if self._endless:
            log.warning(
                "%s: %d of %d episodes have no end flag that is true. Their last row counts as a truncation.",
                self._path,
                self._endless,
                self._seen - len(self._damaged),
            )

    def _checked(self, source: Source, raw: Arrays) -> Episode:
        rewards = (source / "rewards").vector(raw["rewards"])
        steps = len(rewards)
        arrays: dict[str, Any] = {
            name: (source / name).floats(raw[name])
            for name in ("observations", "actions", "target_actions")
            if name in raw
        }
        none = np.zeros(steps, bool)
        for name in ("terminations", "truncations"):
            arrays[name] = (source / name).flags(raw[name]) if name in raw else none.copy()
        if "successes" in raw:
            successes = (source / "successes").flags(_by_step(raw["successes"], steps))
            successes = successes[1:] if len(successes) == steps + 1 else successes
            arrays["successes"] = np.logical_or.accumulate(successes)  # some say it of each env step alone
        episode = Episode(rewards=rewards, **arrays)
        check_episode(source, episode, self._first or episode)
        if not (episode.terminations[-1] or episode.truncations[-1]):
            self._endless += 1
            episode.truncations[-1] = True
        return episode


def _by_step(success: NDArray[Any], steps: int) -> NDArray[Any]:
    """What is said of a whole episode, of its last env step."""
    if np.ndim(success):
        return success
    return np.concatenate([np.zeros(max(0, steps - 1)), np.reshape(success, 1)])


def standard_names(source: Source, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """The same arrays under the names of an :class:`Episode`.

    Raises:
        UserError: One that is needed is missing, or two that are the same by their names differ; the message says which
            names there are.
    """
    found = {key: [name for name in names if name in arrays and name not in DONES] for key, names in NAMES.items()}
    for key in REQUIRED:
        if not found[key]:
            raise source.missing(key, " or ".join(NAMES[key]), list(arrays))
    chosen = {key: _same(source, names, arrays) for key, names in found.items() if names}
    if done := [name for name in DONES if name in arrays]:
        chosen |= _with_dones(source / done[0], _same(source, done, arrays), chosen)
    return chosen


def _same(source: Source, names: Sequence[str], arrays: Arrays) -> NDArray[Any]:
    """The one array of several names."""
    first, *others = names
    for other in others:
        if not np.array_equal(arrays[first], arrays[other]):
            raise UserError(
                f"{source} holds {first} and {other}, which are names of the same and differ. Leave out one of them."
            )
    return arrays[first]


def _with_dones(source: Source, dones: NDArray[Any], flags: Arrays) -> dict[str, NDArray[Any]]:
    """Terminations and truncations, of which at most one says all, and ends of either kind."""
    known = [name for name in ("terminations", "truncations") if name in flags]
    ends = source.flags(dones)
    for name in known:
        array = (source / name).flags(flags[name])
        (source / name).check_rows(len(array), len(ends), "there are as many ends")
        ends = ends & ~array
    if "truncations" not in known:
        return {"truncations": ends}
    other = "truncations" if "terminations" in known else "terminations"
    return {other: ends | (source / other).flags(flags[other]) if other in flags else ends}


def with_final_observation(source: Source, raw: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """One episode with the observation after its last env step; where it is not noted, the last one is repeated."""
    following = raw.pop("next_observations", None)
    observations, rewards = np.asarray(raw["observations"]), np.asarray(raw["rewards"])
    steps = len(rewards) if rewards.ndim else 0
    if observations.ndim == 0 or len(observations) != steps or steps == 0:
        return raw  # T + 1 rows already; anything else is reported with its length
    following = observations if following is None else np.asarray(following)
    if following.shape != observations.shape:
        raise UserError(f"{source / 'next_observations'} has shape {following.shape}, expected {observations.shape}.")
    return raw | {"observations": np.concatenate([observations, following[-1:]])}
