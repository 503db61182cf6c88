"""History windows as Stable-Baselines3 sees them: observations, and a replay that keeps each env step once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from torch import Tensor

from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch

Floats = NDArray[np.float32]
EXTRAS = 4
"""Columns of a row after observation and action: return-to-go, reward, timestep, and 1 where the step is real."""


@dataclass(frozen=True)
class WindowLayout:
    """Windows of T rows of (observation, action, return-to-go, reward, timestep, real), everything scaled.

    The action and the reward of the newest row are zero: they are not known yet.

    Attributes:
        context_length: T.
        observation_dim: Numbers in one observation.
        action_dim: Numbers in one action.
    """

    context_length: int
    observation_dim: int
    action_dim: int

    @property
    def width(self) -> int:
        """Numbers in one row, F."""
        return self.observation_dim + self.action_dim + EXTRAS

    @property
    def space(self) -> spaces.Box:
        """What a window looks like to Stable-Baselines3."""
        return spaces.Box(-np.inf, np.inf, (self.context_length, self.width), np.float32)

    @property
    def action_columns(self) -> slice:
        """Where the action stands in a row."""
        return slice(self.observation_dim, self.observation_dim + self.action_dim)

    def decode(self, windows: Tensor) -> WindowBatch:
        """Windows (B, T, F) as the network takes them."""
        to_go, reward, timestep, real = range(self.width - EXTRAS, self.width)
        return WindowBatch(
            observations=windows[..., : self.observation_dim],
            actions=windows[..., self.action_columns],
            returns_to_go=windows[..., to_go : to_go + 1],
            timesteps=windows[..., timestep].long(),
            attention_mask=windows[..., real] > 0.5,
            rewards=windows[..., reward : reward + 1],
        )


class HistoryWindows(VecEnvWrapper):
    """Shows the last T env steps of each environment, with actions scaled to [-1, 1].

    The return-to-go is the target minus what was obtained so far: a function of the history alone. It is never
    relabelled, so that likelihood ratios compare actions in one and the same situation.

    Args:
        vec_env: n environments.
        policy: Its scaling and its target return are used.
        env_id: The task.
        reward_scale: Divides the rewards that the learner sees.
    """

    def __init__(self, vec_env: VecEnv, policy: DecisionTransformerPolicy, env_id: str, reward_scale: float) -> None:
        self.layout = WindowLayout(policy.network.config.context_length, policy.observation_dim, policy.action_dim)
        actions = spaces.Box(-1.0, 1.0, (policy.action_dim,), np.float32)
        super().__init__(vec_env, self.layout.space, actions)
        self._scaling = policy.scaling.to("cpu")
        self._target = policy.conditioning.of(env_id) / self._scaling.return_scale
        self._reward_scale = reward_scale
        self._windows = np.zeros((vec_env.num_envs, *self.layout.space.shape), np.float32)
        self._taken = np.zeros((vec_env.num_envs, policy.action_dim), np.float32)

    def reset(self) -> VecEnvObs:
        """Begin with windows of one step each."""
        observations = self.venv.reset()
        for index, row in enumerate(np.asarray(observations)):
            self._begin(index, row)
        return self._windows.copy()

    def step_async(self, actions: NDArray[Any]) -> None:
        """Send the unscaled actions."""
        self._taken = np.clip(actions, -1, 1).astype(np.float32)
        self.venv.step_async(self._scaling.raw_actions(torch.from_numpy(self._taken)).numpy())

    def step_wait(self) -> VecEnvStepReturn:
        """Add one row; at an end, ``terminal_observation`` is the window that ends with the last observation."""
        stepped, rewards, dones, infos = self.venv.step_wait()
        observations = np.asarray(stepped)
        for index, info in enumerate(infos):
            last = info["terminal_observation"] if dones[index] else observations[index]
            self._extend(index, np.asarray(last), float(rewards[index]))
            if dones[index]:
                info["terminal_observation"] = self._windows[index].copy()
                self._begin(index, observations[index])
        return self._windows.copy(), rewards / self._reward_scale, dones, infos

    def _begin(self, index: int, observation: NDArray[Any]) -> None:
        self._windows[index] = 0
        self._windows[index, -1] = self._row(observation, self._target, 0)

    def _extend(self, index: int, observation: NDArray[Any], reward: float) -> None:
        window, scaled = self._windows[index], reward / self._scaling.return_scale
        to_go, reward_column, timestep = (self.layout.width - EXTRAS + k for k in range(3))
        window[-1, self.layout.action_columns] = self._taken[index]
        window[-1, reward_column] = scaled
        row = self._row(observation, window[-1, to_go] - scaled, int(window[-1, timestep]) + 1)
        window[:-1] = window[1:]
        window[-1] = row

    def _row(self, observation: NDArray[Any], to_go: float, timestep: int) -> Floats:
        row = np.zeros(self.layout.width, np.float32)
        scaled = self._scaling.observations(torch.as_tensor(observation, dtype=torch.float32))
        row[: self.layout.observation_dim] = scaled.numpy()
        row[-EXTRAS:] = to_go, 0, timestep, 1
        return row


class WindowReplayBuffer(ReplayBuffer):
    """Keeps the newest row of each window and rebuilds windows when they are drawn.

    The arguments are Stable-Baselines3's. Observations have the shape (T, F) of :class:`WindowLayout`; one row of F
    numbers an env step is kept instead of two windows. The last observation of an episode is kept beside it. The
    newest step of an environment, whose successor is not there yet, is drawn only where there is no other.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        **options: Any,
    ) -> None:
        T, F = observation_space.shape
        one = spaces.Box(-np.inf, np.inf, (F,), np.float32)
        super().__init__(1, one, action_space, device, n_envs, **options)
        size = max(buffer_size // n_envs, 2)
        self.buffer_size, self._T, self._F = size, T, F
        self._action_columns = slice(F - EXTRAS - action_space.shape[0], F - EXTRAS)
        self.rows = np.zeros((size, n_envs, F), np.float32)
        self.actions = np.zeros((size, n_envs, action_space.shape[0]), np.float32)
        self.rewards, self.dones = np.zeros((size, n_envs), np.float32), np.zeros((size, n_envs), np.float32)
        self.timeouts = np.zeros((size, n_envs), np.float32)
        self.broken = np.zeros((size, n_envs), bool)
        """Where an episode was truncated: the next row belongs to another one, and its last observation is unknown."""
        self.ends: dict[tuple[int, int], Floats] = {}
        self._latest = np.zeros((n_envs, F), np.float32)
        """The row that follows the newest step."""

    def add(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        action: NDArray[Any],
        reward: NDArray[Any],
        done: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """Keep one env step of every environment; ``obs`` and ``next_obs`` are windows (n, T, F)."""
        now = self.pos
        self.rows[now] = obs[:, -1]
        self.actions[now], self.rewards[now], self.dones[now] = action, reward, done
        self.timeouts[now] = [info.get("TimeLimit.truncated", False) for info in infos]
        self.broken[now] = False
        # what the row before could not know yet: its own reward stands in the window of this step
        for index in range(self.n_envs):
            self.ends.pop((now, index), None)
            if done[index]:
                self.ends[now, index] = next_obs[index, -1].copy()
        self._latest = next_obs[:, -1].copy()
        self._scaled_rewards(now, next_obs)
        self.pos = (now + 1) % self.buffer_size
        self.full = self.full or self.pos == 0

    def _scaled_rewards(self, now: int, next_obs: NDArray[Any]) -> None:
        if self._T > 1:  # in windows of one step nobody sees it
            self.rows[now, :, self._F - EXTRAS + 1] = next_obs[:, -2, self._F - EXTRAS + 1]

    def truncate_episodes(self) -> None:
        """The environments will be reset: the newest steps have no successor, but for those that ended an episode."""
        if self.size():
            newest = self._newest()
            self.broken[newest] = self.dones[newest] == 0

    def size(self) -> int:
        """Steps kept of each environment."""
        return self.buffer_size if self.full else self.pos

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        """Draw env steps that have a successor, with their windows (B, T, F)."""
        picks = np.zeros((0, 2), np.int64)
        while len(picks) < batch_size:  # hardly ever more than twice: few steps have no successor
            ages = np.random.randint(0, max(1, self.size() - 1), size=batch_size)  # noqa: NPY002 - SB3 seeds that one
            columns = np.random.randint(0, self.n_envs, size=batch_size)  # noqa: NPY002
            rows = (self._oldest() + ages) % self.buffer_size
            usable = ~self.broken[rows, columns]
            if not usable.any() and self._all_broken():
                rows, usable = np.full_like(rows, self._newest()), ~usable
            picks = np.concatenate([picks, np.stack([rows, columns], 1)[usable]])
        return self.samples_at(picks[:batch_size, 0], picks[:batch_size, 1])

    def samples_at(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> ReplayBufferSamples:
        """The env steps at the given positions (B,) and environments (B,)."""
        following = (rows + 1) % self.buffer_size
        ended = self.dones[rows, columns] > 0
        newest = np.where((rows == self._newest())[:, None], self._latest[columns], self.rows[following, columns])
        for k in np.flatnonzero(ended):
            newest[k] = self.ends[int(rows[k]), int(columns[k])]
        before = self.windows(rows, columns)
        after = np.zeros_like(before)
        after[:, :-1] = before[:, 1:]
        reward_column = self._F - EXTRAS + 1
        if self._T > 1:
            after[:, -2, self._action_columns] = self.actions[rows, columns]
            after[:, -2, reward_column] = self.rows[rows, columns, reward_column]
        newest[:, self._action_columns], newest[:, reward_column] = 0, 0
        after[:, -1] = newest
        terminal = self.dones[rows, columns] * (1 - self.timeouts[rows, columns])
        data = (before, self.actions[rows, columns], after, terminal[:, None], self.rewards[rows, columns][:, None])
        return ReplayBufferSamples(*map(self.to_torch, data))

    def windows(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Floats:
        """Windows (B, T, F) that end in the given steps, as the policy saw them; lost steps are padding."""
        back = np.arange(self._T - 1, -1, -1)
        timesteps = self.rows[rows, columns, self._F - 2].astype(np.int64)
        kept = (rows - self._oldest()) % self.buffer_size
        real = back <= np.minimum(timesteps, kept)[:, None]
        span = (rows[:, None] - back) % self.buffer_size
        windows: Floats = self.rows[span, columns[:, None]]
        windows[..., self._action_columns] = self.actions[span, columns[:, None]]
        windows[:, -1, self._action_columns] = 0
        windows[:, -1, self._F - EXTRAS + 1] = 0
        windows *= real[..., None]
        return windows

    def _oldest(self) -> int:
        return self.pos if self.full else 0

    def _newest(self) -> int:
        return (self.pos - 1) % self.buffer_size

    def _all_broken(self) -> bool:
        """Whether no step but the newest has a successor: each stretch of learning was of one step."""
        older = np.arange(self.size()) != self._newest()
        return bool(self.broken[: self.size()][older].all())

    def tensors(self) -> dict[str, Tensor]:
        """Everything kept, for a checkpoint."""
        size = self.size()
        state = {name: torch.from_numpy(getattr(self, name)[:size].copy()) for name in _REPLAY_ARRAYS}
        places = sorted(self.ends)
        ends = np.stack([self.ends[place] for place in places]) if places else np.zeros((0, self._F), np.float32)
        state["end_places"] = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)
        return state | {"ends": torch.from_numpy(ends), "position": torch.tensor([self.pos, int(self.full)])}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        for name in _REPLAY_ARRAYS:
            getattr(self, name)[: len(state[name])] = state[name].numpy()
        places = [(int(row), int(column)) for row, column in state["end_places"]]
        self.ends = {place: row.numpy().copy() for place, row in zip(places, state["ends"], strict=True)}
        self.pos, self.full = int(state["position"][0]), bool(state["position"][1])


_REPLAY_ARRAYS = ("rows", "actions", "rewards", "dones", "timeouts", "broken")
