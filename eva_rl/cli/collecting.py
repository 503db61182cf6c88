"""Collecting demonstrations, with a progress bar."""

from __future__ import annotations

from typing import Protocol

from eva_rl.cli.console import counting_progress
from eva_rl.configs.groups import NoiseOptions
from eva_rl.data import Trajectories
from eva_rl.rollouts.experts import ActionNoise, collect_expert


class Collecting(Protocol):
    """The options of whoever has episodes of the scripted expert collected."""

    seed: int
    only_successes: bool
    workers: int

    @property
    def noise(self) -> NoiseOptions:
        """Of the expert's actions."""


def collect_shown(env_id: str, episodes: int, options: Collecting, horizon: int | None) -> Trajectories:
    """Collect the scripted expert's episodes, and show how far that is."""
    with counting_progress(f"Collecting {env_id.rsplit('/', maxsplit=1)[-1]} (episodes)", episodes) as advance:
        return collect_expert(
            env_id,
            episodes,
            seed=options.seed,
            noise=ActionNoise(options.noise.std, options.noise.burst_probability),
            horizon=horizon,
            only_successes=options.only_successes,
            workers=options.workers,
            on_episode=advance,
        )
