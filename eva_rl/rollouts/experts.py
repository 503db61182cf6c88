"""Demonstrations from Meta-World's scripted experts, optionally with injected noise and clean labels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from eva_rl.data.trajectories import Episode, Trajectories
from eva_rl.envs.names import METAWORLD_PREFIX as PREFIX
from eva_rl.envs.registry import canonical_id, env_spec, make_env
from eva_rl.errors import UserError
from eva_rl.seeding import DEMONSTRATIONS, episode_seeds

ATTEMPTS_PER_EPISODE = 8
"""Give up on a task when fewer than one attempt in this many succeeds."""


@dataclass(frozen=True)
class ActionNoise:
    """Disturbance of an expert's actions; what the expert wanted is kept as ``target_actions``.

    Showing an expert from states that only a less able policy reaches, and imitating its answer rather than the
    disturbance, is DART (Laskey et al. 2017, arXiv 1703.09327).

    Attributes:
        std: Standard deviation of Gaussian noise.
        burst_probability: Chance per env step that a burst begins: 3 to 10 steps of one random constant motion.

    Both are upper limits: each episode draws a level between 0 and 1 that multiplies them.
    """

    std: float = 0.0
    burst_probability: float = 0.0

    def __bool__(self) -> bool:
        return self.std > 0 or self.burst_probability > 0


def has_script(env_id: str) -> bool:
    """Whether a task has a scripted expert."""
    return env_id.startswith(PREFIX)


def check_scripted(env_id: str, instead: str = "data=FILE, data=minari:ID or data=d4rl:FILE") -> None:
    """Raise unless a task has a scripted expert.

    Args:
        env_id: Canonical name of the task.
        instead: What to type where it has none.

    Raises:
        UserError: It has none.
    """
    if not has_script(env_id):
        raise UserError(f"No scripted expert for {env_id}; Meta-World tasks have one. Type {instead} instead.")


def collect_expert(  # noqa: PLR0913 - one call for users and for commands; all but two have defaults
    env: str,
    episodes: int,
    *,
    seed: int = 0,
    noise: ActionNoise = ActionNoise(),
    horizon: int | None = None,
    only_successes: bool = True,
    workers: int = 1,
    on_episode: Callable[[Episode], None] | None = None,
) -> Trajectories:
    """Play a scripted expert.

    The result depends on the arguments but not on ``workers``: attempt k is seeded by ``seed`` and k, and the first
    ``episodes`` attempts that count are kept.

    Args:
        env: A Meta-World task.
        episodes: Episodes to return.
        seed: Chooses the goals and the noise.
        noise: Disturbance of the executed actions.
        horizon: Env steps per episode; None takes the task's own.
        only_successes: Leave out attempts that did not solve the task.
        workers: Processes.
        on_episode: Called with each episode that counts.

    Raises:
        UserError: The task has no scripted expert, the expert fails too often, or a process ended early: in a script,
            ``workers`` above 1 need ``if __name__ == "__main__":`` around the call.
    """
    env_id = canonical_id(env)
    check_scripted(env_id)
    play = partial(_demonstrate, env_id, seed, noise, horizon or env_spec(env_id).horizon)
    attempts = range(episodes * ATTEMPTS_PER_EPISODE)
    kept: list[Episode] = []
    for episode in _in_order(play, attempts, workers, chunk=episodes):
        if episode.successes is not None and (episode.successes.any() or not only_successes):
            kept.append(episode)
            if on_episode is not None:
                on_episode(episode)
        if len(kept) == episodes:
            return Trajectories.from_episodes(kept, env_id=env_id, source=f"expert:{env_id}?episodes={episodes}")
    raise UserError(
        f"The scripted expert of {env_id} succeeded in {len(kept)} of {len(attempts)} attempts, {episodes} were asked "
        "for. Request fewer episodes or less noise, or keep failures (data.only_successes=false)."
    )


def _in_order(play: partial[Episode], attempts: range, workers: int, chunk: int) -> Iterator[Episode]:
    """Episodes in the order of their numbers; at most one chunk more is played than is taken."""
    if workers <= 1:
        yield from map(play, attempts)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, _broken_pool():
        for first in range(0, len(attempts), chunk):
            yield from pool.map(play, attempts[first : first + chunk], chunksize=max(1, chunk // (4 * workers)))


@contextmanager
def _broken_pool() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(
            "A process that collects demonstrations ended early. In a script of yours, call this under "
            '`if __name__ == "__main__":`, since each process runs the script from its top, or use data.workers=1 '
            "(collect_expert(workers=1)). Elsewhere, look whether memory ran out, and use fewer data.workers."
        ) from error


@cache
def _env(env_id: str, horizon: int) -> gym.Env[NDArray[np.float32], NDArray[np.float32]]:
    return make_env(env_id, horizon=horizon)


def _demonstrate(env_id: str, seed: int, noise: ActionNoise, horizon: int, attempt: int) -> Episode:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the experts' gains are meant to saturate
        return _demonstrate_episode(env_id, seed, noise, horizon, attempt)


def _demonstrate_episode(env_id: str, seed: int, noise: ActionNoise, horizon: int, attempt: int) -> Episode:
    from eva_rl.envs.metaworld import scripted_expert

    env, expert = _env(env_id, horizon), scripted_expert(env_id)
    rng = np.random.default_rng((seed, attempt))
    level = rng.uniform()
    std, burst_probability = level * noise.std, level * noise.burst_probability
    observation, _ = env.reset(seed=episode_seeds(DEMONSTRATIONS, seed) + attempt)
    steps, observations, burst_left, burst = [], [observation], 0, np.zeros(4, np.float32)
    truncated = False
    while not truncated:
        wanted = expert(observation)
        if burst_left == 0 and rng.random() < burst_probability:
            burst_left, burst = int(rng.integers(3, 11)), rng.uniform(-1, 1, 4).astype(np.float32)
        disturbed = burst if burst_left else wanted + std * rng.standard_normal(4).astype(np.float32)
        burst_left = max(0, burst_left - 1)
        action = np.clip(disturbed, -1, 1).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(observation)
        steps.append((action, reward, terminated, truncated, info["success"], wanted))
    actions, rewards, terminations, truncations, successes, targets = zip(*steps, strict=True)
    return Episode(
        observations=np.stack(observations),
        actions=np.stack(actions),
        rewards=np.array(rewards, np.float32),
        terminations=np.array(terminations),
        truncations=np.array(truncations),
        successes=np.array(successes),
        target_actions=np.stack(targets) if noise else None,
    )
