"""Trajectories, the windows that are drawn from them, and the files they live in."""

from eva_rl.data.formats.minari import local_minari_sets, save_minari
from eva_rl.data.formats.minari_file import read_episodes, write_episodes
from eva_rl.data.formats.store import read_store, write_store
from eva_rl.data.samplers import PrefetchingSampler
from eva_rl.data.selection import select_episodes, window_weights
from eva_rl.data.sources import load_dataset
from eva_rl.data.trajectories import Episode, Trajectories, concatenate
from eva_rl.data.windows import WindowSampler

__all__ = [
    "Episode",
    "PrefetchingSampler",
    "Trajectories",
    "WindowSampler",
    "concatenate",
    "load_dataset",
    "local_minari_sets",
    "read_episodes",
    "read_store",
    "save_minari",
    "select_episodes",
    "window_weights",
    "write_episodes",
    "write_store",
]
