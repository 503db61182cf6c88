"""Recorded episodes played through a policy, to keep what it computes and proposes at each env step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from eva_rl.agents.policy import DecisionTransformerPolicy, frozen
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.data.trajectories import Episode, Floats
from eva_rl.data.windows import gather_windows

FEATURES, PROPOSALS, TARGETS = "features", "proposals", "targets"
"""Names of what is kept: hidden states, the actions read from them, and what a clone should do; all scaled."""
MOST_EPISODES = 50
"""Episodes that are played at once."""


def extra_widths(policy: DecisionTransformerPolicy) -> dict[str, int]:
    """Numbers kept beside each env step, by name."""
    act = policy.action_dim
    return {FEATURES: policy.network.config.hidden_size, PROPOSALS: act, TARGETS: act}


def played_through(policy: DecisionTransformerPolicy, env_id: str, episodes: Sequence[Episode]) -> Iterator[Episode]:
    """Episodes with what the policy computes in each of their observations, given the actions that were executed.

    Args:
        policy: One pass an env step; its histories are forgotten.
        env_id: The task, whose target return the policy is asked for.
        episodes: In any number, of any length.
    """
    for first in range(0, len(episodes), MOST_EPISODES):
        yield from _played(policy, env_id, episodes[first : first + MOST_EPISODES])


def _played(policy: DecisionTransformerPolicy, env_id: str, episodes: Sequence[Episode]) -> list[Episode]:
    n, steps = len(episodes), max(len(episode.rewards) for episode in episodes)
    observations, actions = (
        _padded([e.observations for e in episodes], steps),
        _padded([e.actions for e in episodes], steps),
    )
    rewards, starts = _padded([e.rewards for e in episodes], steps), np.zeros(n, bool)
    features: list[Tensor] = []
    policy.reset([env_id] * n)
    for t in range(steps):
        executed = policy.scaling.actions(torch.from_numpy(actions[:, t]).to(policy.device))

        def choose(hidden: Tensor, executed: Tensor = executed) -> Tensor:
            features.append(hidden)
            return executed

        policy.act_by(choose, observations[:, t], rewards[:, max(0, t - 1)], starts if t else ~starts)
    with torch.no_grad():
        hidden = torch.stack(features, 1)  # (n, T, D)
        proposals = policy.network.actions(hidden).clamp(-1, 1)
    return [
        _with_extras(policy, episode, hidden[i].cpu().numpy(), proposals[i].cpu().numpy())
        for i, episode in enumerate(episodes)
    ]


def after_end(policy: DecisionTransformerPolicy, replay: TrajectoryReplay, start: int, end: int) -> dict[str, Floats]:
    """What the policy computes and would propose in the observation after a truncated episode.

    Args:
        policy: Runs once, on the last window of the episode; its histories stay as they are.
        replay: Holds the episode and the return that it was asked for.
        start: Row of the first observation.
        end: Row of the last one.

    Returns:
        Hidden state (D,) and scaled action (act,), by name.
    """
    rows, context_length = (np.array([end]), np.array([start])), policy.network.config.context_length
    window = gather_windows(replay, *rows, context_length, policy.scaling.to("cpu"), replay.asked)
    with frozen(policy.network):
        hidden = policy.network.features(window.to(policy.device), last_only=True)[:, -1]
        proposal = policy.network.actions(hidden).clamp(-1, 1)
    return {FEATURES: hidden[0].cpu().numpy(), PROPOSALS: proposal[0].cpu().numpy()}


def _padded(arrays: Sequence[np.ndarray], steps: int) -> np.ndarray:
    """(n, T, ...), zeros after an episode's end; what follows there is looked at by nobody."""
    out = np.zeros((len(arrays), steps, *arrays[0].shape[1:]), np.float32)
    for row, array in zip(out, arrays, strict=True):
        row[: min(len(array), steps)] = array[:steps]
    return out


def _with_extras(
    policy: DecisionTransformerPolicy, episode: Episode, features: np.ndarray, proposals: np.ndarray
) -> Episode:
    length = len(episode.rewards)
    wanted = episode.actions if episode.target_actions is None else episode.target_actions
    targets = policy.scaling.to("cpu").actions(torch.from_numpy(np.array(wanted))).numpy()
    kept = {FEATURES: features[:length], PROPOSALS: proposals[:length], TARGETS: targets}
    return replace(episode, extras=kept)
