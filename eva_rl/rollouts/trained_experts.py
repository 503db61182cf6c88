"""Demonstrations of an agent that is trained on the spot, for tasks without a scripted expert."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from eva_rl.data.trajectories import Episode, Trajectories
from eva_rl.envs import canonical_id, env_spec, make_vec_env
from eva_rl.envs.vector import TaskVecEnv
from eva_rl.errors import UserError
from eva_rl.rollouts.recorder import EpisodeRecorder
from eva_rl.seeding import DEMONSTRATIONS, episode_seeds

log = logging.getLogger(__name__)
EVALUATE_EVERY = 5_000
"""Env steps between two evaluations of the agent."""
EVALUATION_EPISODES = 10


@dataclass(frozen=True)
class TrainedExpert:
    """How an agent becomes as good as wanted.

    Attributes:
        max_steps: Env steps of training at most.
        until: Mean return over :data:`EVALUATION_EPISODES` deterministic episodes at which training ends; where it is
            not reached, a warning says so.
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
        UserError: The task's actions have no bounds, or the agent would never be evaluated.
    """
    env_id = canonical_id(env)
    spec = env_spec(env_id, expert.horizon)
    if not np.isfinite([spec.action_low, spec.action_high]).all():
        raise UserError(
            f"{env_id} has actions without bounds, and expert=sac needs some. Give its action space some, or collect "
            "the data yourself."
        )
    if np.isfinite(expert.until) and expert.max_steps < EVALUATE_EVERY:
        raise UserError(
            f"expert.steps={expert.max_steps}: the agent is evaluated every {EVALUATE_EVERY} env steps, expected as "
            "many at least with expert.until."
        )
    first = episode_seeds(DEMONSTRATIONS, seed)
    with (
        closing(make_vec_env(env_id, 1, seed=first, horizon=expert.horizon)) as vec_env,
        closing(make_vec_env(env_id, 1, horizon=expert.horizon)) as own,
    ):
        stop = StopOnReturn(own, expert)
        agent = SAC("MlpPolicy", vec_env, seed=seed, device="cpu")
        agent.learn(expert.max_steps, callback=stop)
        _warn_where_not_reached(stop, env_id, expert)
        vec_env.seed(first + 1_000)
        kept = _play(agent, vec_env, episodes, spec.reports_success)
    source = f"sac:{env_id}?steps={agent.num_timesteps}&until={expert.until:g}"
    return Trajectories.from_episodes(kept, env_id=env_id, source=source)


def _warn_where_not_reached(stop: StopOnReturn, env_id: str, expert: TrainedExpert) -> None:
    if not stop.reached and np.isfinite(expert.until):
        log.warning(
            "SAC reached a mean return of %.1f on %s in %d env steps, expert.until=%g was asked for. The episodes are "
            "those of the agent as it was at the end; give it more expert.steps for a better one.",
            stop.best,
            env_id,
            expert.max_steps,
            expert.until,
        )


class StopOnReturn(BaseCallback):
    """Ends training when the mean return of an evaluation reaches the threshold."""

    def __init__(self, vec_env: TaskVecEnv, expert: TrainedExpert) -> None:
        super().__init__()
        self._vec_env, self.expert = vec_env, expert
        self.best, self.reached = -np.inf, False

    def _on_step(self) -> bool:
        if self.num_timesteps % EVALUATE_EVERY:
            return True
        self._vec_env.seed(episode_seeds(DEMONSTRATIONS, 0) + 5_000)
        mean, _ = evaluate_policy(self.model, self._vec_env, EVALUATION_EPISODES, warn=False)
        log.info("SAC after %d env steps: mean return %.1f", self.num_timesteps, mean)
        self.best = max(self.best, float(np.mean(mean)))
        self.reached = self.best >= self.expert.until
        return not self.reached


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
