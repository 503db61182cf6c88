"""Trajectories, the windows that are drawn from them, and the files they live in."""

from eva_rl.data.episodes_file import read_episodes, write_episodes
from eva_rl.data.trajectories import Episode, Trajectories, concatenate
from eva_rl.data.windows import WindowSampler

__all__ = [
    "Episode",
    "Trajectories",
    "WindowSampler",
    "concatenate",
    "read_episodes",
    "write_episodes",
]
