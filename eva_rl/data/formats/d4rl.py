"""D4RL's HDF5 files: one long table of env steps, cut into episodes by terminals and timeouts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from eva_rl.data.formats.checks import ActionBounds, Source, warn_of_repeated_ends
from eva_rl.data.formats.d4rl_names import Conventions
from eva_rl.data.formats.episodes import DONES
from eva_rl.data.formats.hdf5 import HdfFile
from eva_rl.data.trajectories import Flags, Floats, Trajectories
from eva_rl.errors import UserError, counted

log = logging.getLogger(__name__)

REQUIRED = ("observations", "actions", "rewards", "terminals")
TIMEOUTS = ("timeouts", "truncations", "truncated", "dones", "done", "episode_terminals")
"""Names under which files note ends of episodes besides ``terminals``; the first that is there counts."""
OPTIONAL = (*TIMEOUTS, "next_observations")
PART_ROWS = 1 << 18
"""Rows that are read at a time, and the episode that they end in."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class _Table:
    """The arrays of one file or of one of its chunks.

    Attributes:
        file: Where they lie.
        group: The chunk, "" for the whole file.
        arrays: By key, unread.
        rows: Env steps.
    """

    file: HdfFile
    group: str
    arrays: dict[str, h5py.Dataset]
    rows: int

    def source(self, key: str, row: int = 0) -> Source:
        return replace(self.file.source(self.group) / key, row=row)

    def floats(self, key: str, begin: int, end: int) -> Floats:
        raw = self.file.read(_joined(self.group, key), slice(begin, end))
        source = self.source(key, begin)
        return source.vector(raw) if key == "rewards" else source.floats(raw)

    def flags(self, key: str) -> Flags:
        return self.source(key).flags(self.file.read(_joined(self.group, key)))


def _joined(group: str, key: str) -> str:
    return f"{group}/{key}" if group else key


def read_d4rl(
    path: Path, rules: Conventions, bounds: ActionBounds | None, metadata: dict[str, str]
) -> Iterator[Trajectories]:
    """Read a file part by part.

    An episode ends where ``terminals`` or ``timeouts`` say so; where no timeout is noted, or ``rules.cuts``, after
    ``rules.horizon`` env steps. What follows the last end is an unfinished episode and is left out, as D4RL's own
    ``sequence_dataset`` does. A file without any end is one episode, truncated at its last row, which a warning says.
    The observation after the last env step is that of ``next_observations``; where the file has none, the last
    observation is repeated, since the next row belongs to another episode. Where there are no ``timeouts``,
    ``truncations``, ``dones`` or the ``episode_terminals`` of d3rlpy's version 1 count as such where they are no
    terminals.

    Args:
        path: The file.
        rules: How it is to be read.
        bounds: Of the actions.
        metadata: Goes into the trajectories.

    Yields:
        Some whole episodes each.

    Raises:
        UserError: The file is unreadable, or what it holds is not a data set; with file, key and row.
    """
    if path.suffix in (".npz", ".npy", ".pkl", ".pickle"):
        raise UserError(f"d4rl:{path}: expected an HDF5 file of D4RL's. Other files go without d4rl: data={path}.")
    with HdfFile(path) as file:
        tables = list(_tables(file))
        episodes = [_episodes(table, rules) for table in tables]
        if not any(len(ends) for _, ends, _, _ in episodes):
            episodes = [_one_episode(table, rules) for table in tables]
        for table, (begins, ends, terminations, truncations) in zip(tables, episodes, strict=True):
            _report_left_out(table, int((ends - begins).sum()), rules)
            for first, last in _parts(begins, ends):
                part = slice(first, last)
                yield _read_part(
                    table, begins[part], ends[part], (terminations, truncations), (rules, bounds, metadata)
                )


def _tables(file: HdfFile) -> Iterator[_Table]:
    """The file itself, or its chunks under ``virtual/<i>``, each on its own."""
    names = file.names()
    if "observations" in names or "virtual" not in names:
        yield _table(file, "")
        return
    chunks = file.names("virtual")
    if not chunks or not all(chunk.isdecimal() for chunk in chunks):
        raise UserError(f"{file.source('virtual')} holds {chunks[:3]}, expected groups 0, 1, ...")
    for chunk in sorted(chunks, key=int):
        yield _table(file, f"virtual/{chunk}")


def _table(file: HdfFile, group: str) -> _Table:
    if not file.is_group(group):
        raise UserError(f"{file.source(group)} is not a group. Expected one with {', '.join(REQUIRED)}.")
    present = [*REQUIRED, *(key for key in OPTIONAL if key in file.names(group))]
    arrays = {key: file.array(_joined(group, key), ", ".join(REQUIRED)) for key in present}
    rows = len(arrays["rewards"])
    table = _Table(file, group, arrays, rows)
    for key, array in arrays.items():
        table.source(key).check_rows(len(array), rows, f"{_joined(group, 'rewards')} has as many")
    if rows == 0:
        raise UserError(f"{table.source('rewards')} is empty; expected at least one env step.")
    if "next_observations" in arrays:
        own, other = arrays["next_observations"].shape, arrays["observations"].shape
        if own != other:
            raise UserError(f"{table.source('next_observations')} has shape {own}, expected {other}.")
    return table


def _episodes(table: _Table, rules: Conventions) -> tuple[Rows, Rows, Flags, Flags]:
    """First row and row after the last of each finished episode; terminations and truncations of all rows."""
    terminals = table.flags("terminals")
    timeouts = _noted_timeouts(table, terminals, rules)
    if timeouts is None and rules.horizon is None and not terminals.any():
        timeouts = np.zeros_like(terminals)
    elif timeouts is None or rules.cuts or (rules.horizon is not None and not timeouts.any()):
        timeouts = _counted_timeouts(table, terminals, timeouts, rules)
    if not rules.goal_ends and (repeated := int((terminals[1:] & terminals[:-1]).sum())):
        log.warning(
            "%s: %s of one env step, each after a terminal: keep only the first of several. AntMaze repeats "
            "them while the ant is near its goal, and is known by the name of its file: antmaze-....hdf5.",
            table.file.source(table.group),
            counted(repeated, "episode"),
        )
    elif not rules.goal_ends:
        warn_of_repeated_ends(table.file.source(table.group), terminals | timeouts)
    ends = timeouts if rules.goal_ends else terminals | timeouts
    stops: Rows = np.flatnonzero(ends).astype(np.int64) + 1
    starts = np.concatenate([np.zeros(1, np.int64), stops])
    if rules.goal_ends:
        starts, stops = _cut_at_goals(starts, stops, terminals)
        last_rows = np.zeros(table.rows, bool)
        last_rows[stops - 1] = True
        terminals, timeouts = terminals & last_rows, timeouts & last_rows
    return starts[: len(stops)], stops, terminals, timeouts


def _one_episode(table: _Table, rules: Conventions) -> tuple[Rows, Rows, Flags, Flags]:
    """What :func:`_episodes` returns, of a table whose flags are never true."""
    limit = "" if rules.horizon is None else f" within {rules.horizon} env steps"
    log.warning(
        "%s: neither terminals nor timeouts end an episode%s. The %d rows are read as one, truncated at the last row. "
        "Where episodes have a fixed length, write it behind the source, for instance d4rl:FILE?horizon=1000.",
        table.file.source(table.group),
        limit,
        table.rows,
    )
    rows = np.arange(table.rows)
    return rows[:1], rows[-1:] + 1, np.zeros(table.rows, bool), rows == table.rows - 1


def _noted_timeouts(table: _Table, terminals: Flags, rules: Conventions) -> Flags | None:
    name = next((name for name in TIMEOUTS if name in table.arrays), None)
    if name is None:
        return None
    ambiguous = name in DONES or not rules.goal_ends  # in a maze a terminal is no end that a time limit could repeat
    return table.flags(name) & ~terminals if ambiguous and name != "timeouts" else table.flags(name)


def _counted_timeouts(table: _Table, terminals: Flags, noted: Flags | None, rules: Conventions) -> Flags:
    """Time limits, noted ones and others: after ``horizon`` env steps without an end."""
    if rules.horizon is None:
        raise UserError(
            f"{table.source('timeouts')} is missing, and the name of the file does not say how "
            "long an episode lasts. Add ?horizon=STEPS to the source, for instance d4rl:FILE?horizon=1000."
        )
    noted = np.zeros_like(terminals) if noted is None else noted
    ends = noted if rules.goal_ends else terminals | noted  # in a maze the ant goes on after its goal
    rows = np.arange(table.rows)
    resets = np.where(np.concatenate([[True], ends[:-1]]), rows, 0)
    since = rows - np.maximum.accumulate(resets)
    counted: Flags = (since + 1) % rules.horizon == 0
    return noted | (counted if rules.goal_ends else counted & ~terminals)


def _cut_at_goals(starts: Rows, stops: Rows, terminals: Flags) -> tuple[Rows, Rows]:
    """End each episode at its first terminal; one without a timeout counts when it has a terminal."""
    stops = np.append(stops, len(terminals))
    goals = np.append(np.flatnonzero(terminals), len(terminals))
    first_goal = goals[np.searchsorted(goals, starts)] + 1
    cut = np.minimum(stops, first_goal)
    kept = starts < stops
    kept[-1] &= first_goal[-1] <= stops[-1]  # what follows the last timeout is unfinished unless it met its goal
    return starts[kept], cut[kept]


def _report_left_out(table: _Table, kept: int, rules: Conventions) -> None:
    if kept < table.rows:
        log.log(
            logging.INFO if rules.goal_ends or kept >= 0.9 * table.rows else logging.WARNING,
            "%s: %d of %d rows belong to an unfinished last episode or follow a goal, and are left out.",
            table.file.source(table.group),
            table.rows - kept,
            table.rows,
        )


def _parts(begins: Rows, ends: Rows) -> Iterator[tuple[int, int]]:
    """Ranges of episodes that hold about :data:`PART_ROWS` rows each."""
    first = 0
    while first < len(ends):
        last = int(np.searchsorted(ends, begins[first] + PART_ROWS))
        last = min(max(last, first + 1), len(ends))
        yield first, last
        first = last


def _read_part(
    table: _Table,
    begins: Rows,
    ends: Rows,
    over: tuple[Flags, Flags],
    rules: tuple[Conventions, ActionBounds | None, dict[str, str]],
) -> Trajectories:
    conventions, bounds, metadata = rules
    begin, end = int(begins[0]), int(ends[-1])
    lengths = ends - begins
    keep = slice(None) if lengths.sum() == end - begin else _kept(begins - begin, ends - begin, end - begin)
    observations = table.floats("observations", begin, end)
    lasts = ends - 1 - begin
    following = table.floats("next_observations", begin, end) if "next_observations" in table.arrays else observations
    actions = table.source("actions", begin).bounded(table.floats("actions", begin, end), bounds)
    terminations, truncations = (flag[begin:end][keep] for flag in over)
    return Trajectories(
        observations=observations[keep],
        actions=actions[keep],
        rewards=table.floats("rewards", begin, end)[keep],
        terminations=terminations,
        truncations=truncations,
        final_observations=following[lasts],
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        env_id=conventions.env_id,
        source=str(table.file.path),
        metadata=metadata,
        successes=terminations if conventions.goal_ends else None,  # there a terminal is a goal
    )


def _kept(begins: Rows, ends: Rows, rows: int) -> Flags:
    steps = np.zeros(rows + 1, np.int8)
    np.add.at(steps, begins, 1)
    np.add.at(steps, ends, -1)
    return np.cumsum(steps[:-1]).astype(bool)
