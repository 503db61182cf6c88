"""Whole episodes, the newest up to a bound, in arrays that may lie on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eva_rl.batch import InputScaling, NStepBatch, TransitionWindows, WindowBatch
from eva_rl.data.arrays import new_array
from eva_rl.data.trajectories import Episode
from eva_rl.data.windows import discounted_returns, gather_windows, window_rows
from eva_rl.errors import UserError

COLUMNS = ("observations", "actions", "rewards", "returns_to_go", "discounted_returns", "asked")
EPISODE = np.dtype(
    [
        ("length", np.int64), ("terminated", bool), ("complete", bool), ("start", np.int64), ("solved", bool),
        ("demonstrated", bool), ("retried", bool),
    ]
)  # fmt: skip
"""What is known of each episode, in the order in which checkpoints keep it; ``start`` is its first row."""
TARGETS, _EPISODES, _EXTRAS = "target_actions", "episodes", "extras/"


class TrajectoryReplay:
    """A ring of whole episodes; each env step is stored once.

    An episode of T env steps takes T + 1 rows: its last row is the observation after its end. The oldest episodes make
    room for new ones. Returns-to-go are those that were obtained (hindsight return relabelling, Zheng et al. 2022,
    arXiv 2202.05607, section 4.1); what the policy was asked for stands beside them.

    Args:
        capacity: Rows kept at most.
        observation_dim: Numbers in one observation.
        action_dim: Numbers in one action.
        folder: Where the arrays lie, mapped into memory; None keeps them in memory.
        discount: gamma, of the discounted returns that critics begin with.
        extras: Widths of what else is kept of each env step, by name; episodes bring it with them.
        at_end: Called with the replay and the rows of a truncated episode's first and last observation; gives what else
            is kept of the last one, (width,) by name. None keeps zeros.

    Raises:
        UserError: The folder cannot be written.
    """

    def __init__(
        self,
        capacity: int,
        observation_dim: int,
        action_dim: int,
        folder: Path | None = None,
        *,
        discount: float = 0.99,
        extras: Mapping[str, int] | None = None,
        at_end: Callable[[TrajectoryReplay, int, int], Mapping[str, NDArray[np.float32]]] | None = None,
    ) -> None:
        self.capacity, self._discount, self._at_end = capacity, discount, at_end
        shapes = {"observations": (observation_dim,), "actions": (action_dim,)}
        arrays = {name: new_array(name, (capacity, *shapes.get(name, ())), folder) for name in COLUMNS}
        self.observations, self.actions = arrays["observations"], arrays["actions"]
        self.rewards, self.returns_to_go = arrays["rewards"], arrays["returns_to_go"]
        self.asked, self.discounted_returns = arrays["asked"], arrays["discounted_returns"]
        widths = extras or {}
        self.extras = {name: new_array(f"extras_{name}", (capacity, width), folder) for name, width in widths.items()}
        self.target_actions: NDArray[np.float32] | None = None
        self._folder = folder
        self._table = np.zeros(0, EPISODE)
        self._next_row = 0

    @property
    def num_episodes(self) -> int:
        """Episodes kept."""
        return len(self._table)

    @property
    def num_complete(self) -> int:
        """Episodes kept that were not broken off."""
        return int(self._table["complete"].sum())

    @property
    def num_solved(self) -> int:
        """Episodes kept in which the task was solved."""
        return int(self._table["solved"].sum())

    @property
    def imitated_lengths(self) -> NDArray[np.int64]:
        """Env steps of each demonstration and each solved episode."""
        lengths: NDArray[np.int64] = self._table["length"][self._imitated]
        return lengths

    @property
    def _imitated(self) -> NDArray[np.bool_]:
        imitated: NDArray[np.bool_] = self._table["complete"] & (self._table["demonstrated"] | self._table["solved"])
        return imitated

    @property
    def highest_reward(self) -> float:
        """Of all env steps kept."""
        return float(self.rewards[self._rows()].max())

    @property
    def num_steps(self) -> int:
        """Env steps kept."""
        return int(self._table["length"].sum())

    @property
    def mean_discounted_return(self) -> float:
        """Mean magnitude, over all env steps kept, of the discounted sum of the rewards from there on."""
        return float(np.abs(self.discounted_returns[self._rows()]).sum()) / max(1, self.num_steps)

    def add(
        self,
        episode: Episode,
        asked: float,
        *,
        complete: bool = True,
        demonstrated: bool = False,
        retried: bool = False,
    ) -> None:
        """Keep an episode.

        Args:
            episode: T env steps.
            asked: Return that the policy was asked for at its start.
            complete: False for the beginning of an episode that was broken off: its returns-to-go are not what would
                have been obtained, so that it serves for transitions only.
            demonstrated: Whether it was given, not played by the policy that learns.
            retried: Whether the policy had failed from the same start before.

        Raises:
            UserError: It is longer than the whole replay.
        """
        length = len(episode.rewards)
        if length + 1 > self.capacity:
            raise UserError(
                f"algo.replay_size={self.capacity} does not hold an episode of {length} env steps. Increase it."
            )
        begin = self._make_room(length + 1)
        rows = slice(begin, begin + length)
        self.observations[begin : begin + length + 1] = episode.observations
        self.actions[rows], self.rewards[rows] = episode.actions, episode.rewards
        to_go = np.cumsum(episode.rewards[::-1], dtype=np.float64)[::-1]
        self.returns_to_go[rows] = to_go
        self.asked[rows] = asked - (to_go[0] - to_go)
        self.discounted_returns[rows] = discounted_returns(episode.rewards, self._discount)
        last = begin + length
        self.actions[last], self.rewards[last] = 0, 0
        if episode.target_actions is not None or self.target_actions is not None:
            targets, labels = self._with_targets(), episode.target_actions
            targets[rows], targets[last] = episode.actions if labels is None else labels, 0
        self.returns_to_go[last], self.discounted_returns[last], self.asked[last] = 0, 0, asked - to_go[0]
        for name, rows_of in self.extras.items():
            rows_of[rows], rows_of[last] = episode.extras[name], 0
        if self._at_end is not None and not episode.terminations[-1]:
            for name, row in self._at_end(self, begin, last).items():
                self.extras[name][last] = row
        solved = episode.successes is not None and bool(episode.successes.any())
        known = (length, bool(episode.terminations[-1]), complete, begin, solved, demonstrated, retried)
        self._table = np.append(self._table, np.array([known], EPISODE))
        self._next_row = last + 1

    def _with_targets(self) -> NDArray[np.float32]:
        """What a clone should do; the actions themselves in episodes that do not say."""
        if self.target_actions is None:
            self.target_actions = new_array(TARGETS, self.actions.shape, self._folder)
            self.target_actions[:] = self.actions
        return self.target_actions

    def _make_room(self, rows: int) -> int:
        """First of ``rows`` free rows; the episodes that lie there are forgotten, all of which are the oldest."""
        begin = self._next_row if self._next_row + rows <= self.capacity else 0
        starts, ends = self._table["start"], self._table["start"] + self._table["length"] + 1
        keep = (ends <= begin) | (starts >= begin + rows)
        if begin == 0 and self._next_row:  # what lies between the end of the ring and its wrap is older still
            keep &= starts < self._next_row
        self._table = self._table[keep]
        return begin

    def sample(
        self,
        batch_size: int,
        rng: np.random.Generator,
        context_length: int,
        scaling: InputScaling,
        *,
        by_return: bool = False,
        demonstration_share: float = 0.0,
    ) -> WindowBatch:
        """Windows of complete episodes, every env step alike as the last of one, with the returns obtained.

        Args:
            batch_size: B.
            rng: What draws.
            context_length: T.
            scaling: How raw numbers become what the network sees; on the CPU.
            by_return: Draw env steps in proportion to their episode's return above the worst, at least a hundredth.
            demonstration_share: Share of the windows from demonstrations; 0 draws them as all others.

        Raises:
            UserError: No complete episode is kept.
        """
        weights = self._table["complete"] * (self._above_worst() if by_return and self.num_complete else 1.0)
        rows, episodes = self._draw(batch_size, rng, self._shared_out(weights, demonstration_share, 0))
        return gather_windows(self, rows, self._table["start"][episodes], context_length, scaling)

    def sample_as_asked(
        self,
        batch_size: int,
        rng: np.random.Generator,
        context_length: int,
        scaling: InputScaling,
        weights: NDArray[np.float64],
    ) -> WindowBatch:
        """Windows with the returns-to-go that the policy was asked for when it acted.

        Args:
            batch_size: B.
            rng: What draws.
            context_length: T.
            scaling: How raw numbers become what the network sees; on the CPU.
            weights: (E,), relative probability of each env step of an episode to be the last of a window.
        """
        rows, episodes = self._draw(batch_size, rng, weights)
        return gather_windows(self, rows, self._table["start"][episodes], context_length, scaling, self.asked)

    def sample_transitions(
        self,
        batch_size: int,
        rng: np.random.Generator,
        context_length: int,
        scaling: InputScaling,
        *,
        demonstration_share: float = 0.0,
    ) -> TransitionWindows:
        """Windows for temporal differences: broken-off episodes and observations after an end are among them.

        Args:
            batch_size: B.
            rng: What draws.
            context_length: T, at least 2.
            scaling: How raw numbers become what the network sees; on the CPU.
            demonstration_share: As in :meth:`sample`.
        """
        weights = self._shared_out(np.ones(self.num_episodes), demonstration_share, 1)
        rows, episodes = self._draw(batch_size, rng, weights, extra=1)
        starts = self._table["start"][episodes]
        windows = gather_windows(self, rows, starts, context_length, scaling)
        span, real = window_rows(rows, starts, context_length)
        last_step = (starts + self._table["length"][episodes] - 1)[:, None]
        return TransitionWindows(
            windows=windows,
            rewards=torch.from_numpy(self.rewards[span] * real),
            terminated=torch.from_numpy(self._table["terminated"][episodes][:, None] & (span == last_step)),
            returns=torch.from_numpy(self.discounted_returns[span] * real),
            acted=torch.from_numpy(real & (span <= last_step)),
            valid=torch.from_numpy(real[:, :-1]),
            complete=torch.from_numpy(self._table["complete"][episodes][:, None]),
        )

    def sample_n_step(
        self,
        batch_size: int,
        rng: np.random.Generator,
        scaling: InputScaling,
        *,
        n: int,
        discount: float,
        solved_value: float = 0.0,
    ) -> NStepBatch:
        """Transitions of n env steps, fewer at an episode's end; every env step alike as the first of one.

        After a termination nothing is to come; after a truncation, what its last observation is worth.

        Args:
            batch_size: B.
            rng: What draws.
            scaling: How raw numbers become what the network sees; on the CPU.
            n: Env steps of a transition at most.
            discount: gamma.
            solved_value: What follows after an episode that terminated because the task was solved, unscaled.
        """
        rows, episodes = self._draw(batch_size, rng, np.ones(self.num_episodes))
        end = (self._table["start"] + self._table["length"])[episodes]
        steps = np.minimum(n, end - rows)
        later = np.arange(n)
        between = np.where(later < steps[:, None], rows[:, None] + later, rows[:, None])
        weights = np.where(later < steps[:, None], discount**later, 0.0)
        solved, powers = self._table["solved"][episodes], discount**steps
        over = self._table["terminated"][episodes] & (rows + steps == end)
        returns = (self.rewards[between] * weights).sum(1) + powers * (over & solved) * solved_value
        return NStepBatch(
            observations=scaling.observations(torch.from_numpy(self.observations[rows])),
            actions=scaling.actions(torch.from_numpy(self.actions[rows])),
            extras=self._extras_of(rows),
            returns=torch.from_numpy(returns.astype(np.float32)),
            discounts=torch.from_numpy((powers * ~over).astype(np.float32)),
            next_observations=scaling.observations(torch.from_numpy(self.observations[rows + steps])),
            next_extras=self._extras_of(rows + steps),
            following_observations=scaling.observations(torch.from_numpy(self.observations[rows + 1])),
            solved=torch.from_numpy(solved),
        )

    def _extras_of(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array[rows]) for name, array in self.extras.items()}

    def _shared_out(self, weights: NDArray[np.float64], share: float, extra: int) -> NDArray[np.float64]:
        """Weights with which demonstrations are drawn as often as asked for, where there is both."""
        mass = (self._table["length"] + extra) * weights
        given, played = mass[self._table["demonstrated"]].sum(), mass[~self._table["demonstrated"]].sum()
        if share and given and played:
            weights = weights * np.where(self._table["demonstrated"], share / given, (1 - share) / played)
        return weights

    def imitation_weights(self, demonstrations: float, retries: float) -> NDArray[np.float64]:
        """Relative probability with which env steps of each episode (E,) are imitated, for :meth:`sample_as_asked`.

        Args:
            demonstrations: Share of the env steps drawn that are of demonstrations; solved episodes have the others.
                Where one of the two is missing, all are of the other.
            retries: How many times as often as others env steps are drawn of solved episodes that began where one had
                failed before.
        """
        weights = np.where(self._table["retried"], retries, 1.0) * self._imitated
        mass = weights * self._table["length"]
        given, played = float(mass[self._table["demonstrated"]].sum()), float(mass[~self._table["demonstrated"]].sum())
        if given and played:
            weights *= np.where(self._table["demonstrated"], demonstrations / given, (1 - demonstrations) / played)
        return weights

    def _above_worst(self) -> NDArray[np.float64]:
        """Return of each episode between the worst complete one's, 0.01, and the best one's, 1."""
        returns = self.returns_to_go[self._table["start"]].astype(np.float64)
        low, high = returns[self._table["complete"]].min(), returns[self._table["complete"]].max()
        return np.asarray(np.clip((returns - low) / max(high - low, 1e-12), 0.01, 1))

    def _draw(
        self, batch_size: int, rng: np.random.Generator, weights: NDArray[np.float64], extra: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows, and the episode of each, given the relative probability of its rows, (E,).

        ``extra`` rows after an episode's last env step may be drawn, too.
        """
        lengths = self._table["length"] + extra
        cumulative = np.cumsum(lengths * weights)
        if not len(cumulative) or cumulative[-1] <= 0:
            raise UserError("The replay holds no complete episode yet. Raise algo.steps_per_iteration.")
        episodes = np.searchsorted(cumulative, rng.random(batch_size) * cumulative[-1], side="right")
        return self._table["start"][episodes] + rng.integers(lengths[episodes]), episodes

    def tensors(self) -> dict[str, Tensor]:
        """Everything kept, for a checkpoint; rows that no episode owns are left out."""
        rows = self._rows()
        state = {name: torch.from_numpy(np.array(getattr(self, name)[rows])) for name in COLUMNS}
        state |= {_EXTRAS + name: torch.from_numpy(np.array(array[rows])) for name, array in self.extras.items()}
        if self.target_actions is not None:
            state[TARGETS] = torch.from_numpy(np.array(self.target_actions[rows]))
        episodes = np.stack([self._table[name] for name in EPISODE.names or ()]).astype(np.int64)
        return state | {_EPISODES: torch.from_numpy(episodes), "next": torch.tensor(self._next_row)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        columns = state[_EPISODES].numpy()
        self._table = np.zeros(columns.shape[1], EPISODE)
        for name, column in zip(EPISODE.names or (), columns, strict=False):  # older checkpoints lack the last ones
            self._table[name] = column
        self._next_row = int(state["next"])
        rows = self._rows()
        for name in COLUMNS:
            getattr(self, name)[rows] = state[name].numpy()
        for name, array in self.extras.items():
            array[rows] = state[_EXTRAS + name].numpy()
        if TARGETS in state:
            self._with_targets()[rows] = state[TARGETS].numpy()

    def _rows(self) -> NDArray[np.int64]:
        spans = (np.arange(s, s + n + 1) for s, n in self._table[["start", "length"]].tolist())
        return np.concatenate([np.zeros(0, np.int64), *spans])

    def episodes(self) -> Iterator[Episode]:
        """The episodes kept, oldest first, with their extras; steps of success are not kept."""
        for length, terminated, _, start, *_ in self._table.tolist():
            rows, last = slice(start, start + length), np.arange(length) == length - 1
            yield Episode(
                observations=self.observations[start : start + length + 1],
                actions=self.actions[rows],
                rewards=self.rewards[rows],
                terminations=last & terminated,
                truncations=last & ~terminated,
                extras={name: array[rows] for name, array in self.extras.items()},
            )

    def extend(self, episodes: Iterable[Episode], asked: float) -> None:
        """Keep several complete episodes that were given."""
        for episode in episodes:
            self.add(episode, asked, demonstrated=True)
