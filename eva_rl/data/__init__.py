"""Trajectories, the windows that are drawn from them, and the files they live in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eva_rl.lazy import lazy_names

if TYPE_CHECKING:
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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Episode": "eva_rl.data.trajectories",
        "PrefetchingSampler": "eva_rl.data.samplers",
        "Trajectories": "eva_rl.data.trajectories",
        "WindowSampler": "eva_rl.data.windows",
        "concatenate": "eva_rl.data.trajectories",
        "load_dataset": "eva_rl.data.sources",
        "local_minari_sets": "eva_rl.data.formats.minari",
        "read_episodes": "eva_rl.data.formats.minari_file",
        "read_store": "eva_rl.data.formats.store",
        "save_minari": "eva_rl.data.formats.minari",
        "select_episodes": "eva_rl.data.selection",
        "window_weights": "eva_rl.data.selection",
        "write_episodes": "eva_rl.data.formats.minari_file",
        "write_store": "eva_rl.data.formats.store",
    },
)
