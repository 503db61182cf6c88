"""Demonstrations from Meta-World's scripted experts, with injected noise and clean labels where asked for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from eva_rl.data.trajectories import Episode, Trajectories
from eva_rl.envs import canonical_id, env_spec, make_env, make_vec_env, scripted_expert
from eva_rl.envs.names import METAWORLD_PREFIX as PREFIX
from eva_rl.errors import UserError
from eva_rl.rollouts.recorder import EpisodeRecorder
from eva_rl.seeding import DEMONSTRATIONS, episode_seeds

ATTEMPTS_PER_EPISODE = 8
"""Give up on a task when fewer than one attempt in this many succeeds."""


log = logging.getLogger(__name__)
EVALUATE_EVERY = 5_000
"""Env steps between two evaluations of the agent."""
EVALUATION_EPISODES = 10


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


def collect_expert(
    env: str,
    episodes: int,
    *,
    seed: int = 0,
    noise: ActionNoise = ActionNoise(),
    horizon: int | None = None,
    only_successes: bool = True,
    workers: int = 1,
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

    Raises:
        UserError: The task has no scripted expert, or the expert fails too often.
    """
    env_id = canonical_id(env)
    if not env_id.startswith(PREFIX):
        raise UserError(
            f"No scripted expert for {env_id}; Meta-World tasks have one. Give data=FILE, data=minari:ID or "
            "data=d4rl:FILE instead."
        )
    play = partial(_demonstrate, env_id, seed, noise, horizon or env_spec(env_id).horizon)
    attempts = range(episodes * ATTEMPTS_PER_EPISODE)
    kept: list[Episode] = []
    for episode in _in_order(play, attempts, workers, chunk=episodes):
        if episode.successes is not None and (episode.successes.any() or not only_successes):
            kept.append(episode)
        if len(kept) == episodes:
            return Trajectories.from_episodes(kept, env_id=env_id, source=f"expert:{env_id}?episodes={episodes}")
    raise UserError(
        f"The scripted expert of {env_id} succeeded in {len(kept)} of {len(attempts)} attempts, {episodes} were asked "
        "for. Ask for fewer episodes, less noise, or keep failures too (data.only_successes=false)."
    )


def _in_order(play: partial[Episode], attempts: range, workers: int, chunk: int) -> Iterator[Episode]:
    """Episodes in the order of their numbers; at most one chunk more is played than is taken."""
    if workers <= 1:
        yield from map(play, attempts)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for first in range(0, len(attempts), chunk):
            yield from pool.map(play, attempts[first : first + chunk], chunksize=max(1, chunk // (4 * workers)))


@cache
def _env(env_id: str, horizon: int) -> gym.Env[NDArray[np.float32], NDArray[np.float32]]:
    return make_env(env_id, horizon=horizon)


def _demonstrate(env_id: str, seed: int, noise: ActionNoise, horizon: int, attempt: int) -> Episode:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the experts' gains are meant to saturate
        return _demonstrate_episode(env_id, seed, noise, horizon, attempt)


def _demonstrate_episode(env_id: str, seed: int, noise: ActionNoise, horizon: int, attempt: int) -> Episode:
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


@dataclass(frozen=True)
class TrainedExpert:
    """How an agent becomes as good as wanted.

    Attributes:
        max_steps: Env steps of training at most.
        until: Mean return over :data:`EVALUATION_EPISODES` deterministic episodes at which training ends.
        horizon: Env steps of an episode; None takes the task's own.
    """

    max_steps: int = 100_000
    until: float = float("inf")
    horizon: int | None = None


def collect_trained(env: str, episodes: int, expert: TrainedExpert, *, seed: int = 0) -> Trajectories:
    """Train Stable-Baselines3's SAC (its defaults) until it is good enough, then let it act with its own noise.

    Args:
        env: Any task.
        episodes: Episodes to return.
        expert: When training ends.
        seed: Of training and of the episodes.

    Raises:
        UserError: ``until`` was not reached.
    """
    env_id = canonical_id(env)
    vec_env = make_vec_env(env_id, 1, seed=episode_seeds(DEMONSTRATIONS, seed), horizon=expert.horizon)
    stop = StopOnReturn(env_id, expert)
    agent = SAC("MlpPolicy", vec_env, seed=seed, device="cpu")
    agent.learn(expert.max_steps, callback=stop)
    if not stop.reached and np.isfinite(expert.until):
        raise UserError(
            f"SAC reached a mean return of {stop.best:.1f} on {env_id} in {expert.max_steps} env steps, "
            f"expert.until={expert.until:g} was asked for. Ask for less, or give it more expert.steps."
        )
    vec_env.seed(episode_seeds(DEMONSTRATIONS, seed) + 1_000)
    kept = _play(agent, vec_env, episodes, env_spec(env_id).reports_success)
    vec_env.close()
    source = f"sac:{env_id}?steps={agent.num_timesteps}&until={expert.until:g}"
    return Trajectories.from_episodes(kept, env_id=env_id, source=source)


class StopOnReturn(BaseCallback):
    """Ends training when the mean return of an evaluation reaches the threshold."""

    def __init__(self, env_id: str, expert: TrainedExpert) -> None:
        super().__init__()
        self.env_id, self.expert = env_id, expert
        self.best, self.reached = -np.inf, False

    def _on_training_start(self) -> None:
        self._vec_env = make_vec_env(self.env_id, 1, horizon=self.expert.horizon)

    def _on_step(self) -> bool:
        if self.num_timesteps % EVALUATE_EVERY:
            return True
        self._vec_env.seed(episode_seeds(DEMONSTRATIONS, 0) + 5_000)
        mean, _ = evaluate_policy(self.model, self._vec_env, EVALUATION_EPISODES, warn=False)
        log.info("SAC after %d env steps: mean return %.1f", self.num_timesteps, mean)
        self.best = max(self.best, float(np.mean(mean)))
        self.reached = self.best >= self.expert.until
        return not self.reached

    def _on_training_end(self) -> None:
        self._vec_env.close()


def _play(agent: SAC, vec_env: VecEnv, episodes: int, reports_success: bool) -> list[Episode]:
    observations = _rows(vec_env.reset())
    recorder = EpisodeRecorder(observations, reports_success)
    kept: list[Episode] = []
    while len(kept) < episodes:
        actions, _ = agent.predict(observations)
        stepped, rewards, dones, infos = vec_env.step(actions)
        observations = _rows(stepped)
        kept += [episode for _, episode in recorder.step(actions, observations, rewards, dones, infos)]
    return kept


def _rows(observations: object) -> NDArray[np.float32]:
    assert isinstance(observations, np.ndarray)
    return observations.astype(np.float32)
