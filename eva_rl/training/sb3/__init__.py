"""PPO, SAC and TD3 of Stable-Baselines3 on a Decision Transformer, in stretches between evaluations."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecMonitor
from torch import Tensor

from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.errors import ActionNotFiniteError, EnvironmentFailedError, UserError
from eva_rl.seeding import random_state, restore_random_state
from eva_rl.training.bc import Log
from eva_rl.training.checkpoint import Checkpoints, TrainState, below
from eva_rl.training.collector import OnlineCounters, TaskEnvs
from eva_rl.training.failures import NotFiniteError, saved_on_failure
from eva_rl.training.optimizer import optimizer_tensors, restore_optimizer
from eva_rl.training.options import (
    OffPolicyOptions,
    PPOOptions,
    SACOptions,
    SB3Options,
)
from eva_rl.training.sb3.policies import (
    DecisionTransformerPPOPolicy,
    DecisionTransformerSACPolicy,
    DecisionTransformerTD3Policy,
)
from eva_rl.training.sb3.windows import HistoryWindows, WindowReplayBuffer

log = logging.getLogger(__name__)

Model = PPO | SAC | TD3
POLICY, REPLAY, NUMPY_RANDOM = "policy/", "replay/", "random/numpy"


def check_actor(policy: DecisionTransformerPolicy, options: SB3Options) -> None:
    """Raise unless the algorithm would train the policy that is evaluated and saved.

    Raises:
        UserError: SAC's actions pass through a tanh, and the policy's do not.
    """
    if isinstance(options, SACOptions) and not policy.network.config.action_tanh:
        raise UserError(
            "algo=sac passes every action through a tanh, and this policy's do not (action_tanh=false): it would train "
            "another policy than the one that is saved. Use algo=td3 or ppo."
        )


def make_model(policy: DecisionTransformerPolicy, task: TaskEnvs, options: SB3Options, *, seed: int = 0) -> Model:
    """A Stable-Baselines3 model whose actor is the policy's own network.

    Args:
        policy: Trained in place: its trainable parameters are the actor's.
        task: Where to act.
        options: Their class chooses the algorithm: PPO, SAC, or else TD3.
        seed: Of everything random.

    Raises:
        UserError: See :func:`check_actor`.
    """
    check_actor(policy, options)
    env = HistoryWindows(VecMonitor(task.vec_env), policy, task.env_id, policy.scaling.return_scale)
    shared: dict[str, Any] = {
        "learning_rate": options.learning_rate,
        "batch_size": options.batch_size,
        "gamma": options.discount,
        "seed": seed,
        "device": policy.device,
    }
    network = {"network": policy.network, "critic_hidden_size": options.critic_hidden_size}
    noisy = network | {"initial_std": options.initial_std}
    if isinstance(options, PPOOptions):
        return PPO(
            DecisionTransformerPPOPolicy,
            env,
            policy_kwargs=noisy,
            n_steps=options.rollout_steps,
            n_epochs=options.epochs,
            clip_range=options.clip_range,
            gae_lambda=options.gae_lambda,
            ent_coef=options.entropy,
            target_kl=options.target_kl,
            **shared,
        )
    assert isinstance(options, OffPolicyOptions)
    shared |= {
        "buffer_size": options.replay_size,
        "learning_starts": options.learning_starts,
        "tau": options.tau,
        "train_freq": (options.train_freq, "step"),
        "gradient_steps": options.gradient_steps,
        "replay_buffer_class": WindowReplayBuffer,
    }
    if isinstance(options, SACOptions):
        entropy = f"auto_{options.entropy / max(1, task.horizon)}"  # rewards over return_scale: about 1 / horizon
        return SAC(DecisionTransformerSACPolicy, env, policy_kwargs=noisy, ent_coef=entropy, **shared)
    noise = NormalActionNoise(np.zeros(policy.action_dim), np.full(policy.action_dim, options.initial_std))
    return TD3(DecisionTransformerTD3Policy, env, policy_kwargs=network, action_noise=noise, **shared)


def train_sb3(
    model: Model,
    task: TaskEnvs,
    options: SB3Options,
    *,
    log: Log,
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    checkpoints: Checkpoints | None = None,
    callback: BaseCallback | None = None,
) -> dict[str, int]:
    """Let a model learn, resuming from the latest checkpoint if one exists.

    Each stretch of ``eval_every`` env steps (0 takes them all) begins with new episodes and ends with a checkpoint, so
    that a resumed run meets the same episodes as one that was never interrupted. It is longer, a multiple of
    ``eval_every``, where an episode of every environment would not fit.

    Args:
        model: What :func:`make_model` made.
        task: Where it acts.
        options: How long.
        log: Takes Stable-Baselines3's metrics, and the env step they belong to; those of validations count, too.
        evaluate: Called after each stretch but the last; what it returns is logged. Where an environment fails in it,
            the run that resumes calls it first.
        checkpoints: Where to save; None keeps no checkpoint.
        callback: Of Stable-Baselines3.

    Returns:
        ``updates``, gradient steps (of the critics where there are some), ``env_steps`` and ``env_steps_played``.

    Raises:
        NotFiniteError: A parameter is not finite after a stretch, or ended it; the checkpoint before is as it was.
        EnvironmentFailedError: An environment failed; what was learned before is saved.
    """
    played = OnlineCounters.of(task)
    _resume(model, played, checkpoints)
    model.set_logger(Logger(None, [_Forward(log, played)]))
    env = model.get_env()
    assert env is not None
    stretch = _stretch(options, env.num_envs * task.horizon)

    def save() -> None:
        assert checkpoints is not None
        checkpoints.save(_state(model, played))

    keeping = partial(saved_on_failure, save if checkpoints else None)

    def validate() -> None:
        model.policy.set_training_mode(False)
        steps = model.num_timesteps
        if evaluate is None or steps // stretch == played.validated_at // stretch or steps >= options.env_steps:
            return
        with keeping():
            metrics = evaluate(steps)
        played.validated(metrics)
        played.validated_at = steps
        log(metrics, steps + played.validation_steps)

    validate()
    if isinstance(model, PPO):
        model.policy.optimizer.register_step_post_hook(partial(_count_step, played))
    while model.num_timesteps < options.env_steps:
        env.seed(played.next_seed)
        model._last_obs = None  # so that learn() resets the environments
        todo = min(stretch - model.num_timesteps % stretch, options.env_steps - model.num_timesteps)
        counter = _Episodes(env.num_envs)
        failure = _learn(model, todo, [counter, callback] if callback else [counter])
        played.next_seed += env.num_envs * (1 + counter.most)
        if isinstance(model, OffPolicyAlgorithm):
            assert isinstance(model.replay_buffer, WindowReplayBuffer)
            model.replay_buffer.truncate_episodes()
        if failure is not None:
            with keeping():
                raise failure
        _check_finite(model)
        validate()
        if checkpoints is not None:
            checkpoints.save(_state(model, played))
    steps = int(model.num_timesteps)
    return {
        "updates": played.update if isinstance(model, PPO) else int(model._n_updates),
        "env_steps": steps,
        "env_steps_played": steps + played.validation_steps,
    }


def _stretch(options: SB3Options, whole: int) -> int:
    """Env steps between two validations: ``whole`` at least, an episode of every environment."""
    every = options.eval_every or options.env_steps
    stretch = -(-whole // every) * every if whole > every else every
    if every < stretch and every < options.env_steps:
        log.warning(
            "algo.eval_every=%d would cut off every episode: validated every %d env steps, in which each environment "
            "plays a whole one. Lower algo.num_envs for more.",
            every,
            stretch,
        )
    return stretch


def _count_step(counters: OnlineCounters, *_: Any) -> None:
    counters.update += 1


def _learn(model: Model, env_steps: int, callbacks: list[BaseCallback]) -> EnvironmentFailedError | None:
    """Let a model learn; returns the failure of an environment that ended it.

    Raises:
        NotFiniteError: A parameter is not finite, so that PyTorch refused a distribution or an environment an action.
        ActionNotFiniteError: An action is not finite though all parameters are.
    """
    try:
        model.learn(env_steps, callback=callbacks, reset_num_timesteps=False)
    except (ActionNotFiniteError, ValueError):
        _check_finite(model)
        raise
    except EnvironmentFailedError as failure:
        return failure
    return None


class _Forward(KVWriter):
    """Hands Stable-Baselines3's metrics on, with the env steps under the names that other algorithms use."""

    def __init__(self, log: Log, played: OnlineCounters) -> None:
        self._log, self._played = log, played

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Hand on the numbers."""
        played = step + self._played.validation_steps
        metrics = {key: float(value) for key, value in key_values.items() if isinstance(value, Real)}
        self._log({**metrics, "time/env_steps": step, "time/env_steps_played": played}, played)

    def close(self) -> None:
        """Nothing is open."""


class _Episodes(BaseCallback):
    """Counts the episodes of each environment."""

    def __init__(self, num_envs: int) -> None:
        super().__init__()
        self._ended = np.zeros(num_envs, dtype=int)

    @property
    def most(self) -> int:
        """Episodes that the busiest environment finished."""
        return int(self._ended.max())

    def _on_step(self) -> bool:
        self._ended += self.locals["dones"]
        return True


def _check_finite(model: Model) -> None:
    for name, parameter in model.policy.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NotFiniteError(f"the parameter {name}", model.num_timesteps)


def _optimizers(model: Model) -> dict[str, tuple[torch.optim.Optimizer, Mapping[str, torch.nn.Parameter]]]:
    policy = model.policy
    named = dict(policy.named_parameters())
    if isinstance(model, PPO):
        return {"all": (policy.optimizer, named)}
    assert isinstance(policy, DecisionTransformerSACPolicy | DecisionTransformerTD3Policy)
    found: dict[str, tuple[torch.optim.Optimizer, Mapping[str, torch.nn.Parameter]]]
    found = {"actor": (policy.actor.optimizer, named), "critic": (policy.critic.optimizer, named)}
    if isinstance(model, SAC) and model.ent_coef_optimizer is not None:
        assert isinstance(model.log_ent_coef, Tensor)
        found["entropy"] = (model.ent_coef_optimizer, {"log": model.log_ent_coef})  # type: ignore[dict-item]
    return found


def _state(model: Model, played: OnlineCounters) -> TrainState:
    tensors = {POLICY + name: value.clone() for name, value in model.policy.state_dict().items()}
    for kind, (optimizer, parameters) in _optimizers(model).items():
        names = {id(p): name for name, p in parameters.items()}
        tensors |= {f"{kind}/{name}": value for name, value in optimizer_tensors(optimizer, names).items()}
        if kind == "entropy":
            tensors["entropy/log"] = parameters["log"].detach()
    if isinstance(model, OffPolicyAlgorithm):
        assert isinstance(model.replay_buffer, WindowReplayBuffer)
        tensors |= {REPLAY + name: value for name, value in model.replay_buffer.tensors().items()}
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - SB3 draws from it
    tensors |= {**random_state(model.device), NUMPY_RANDOM: torch.from_numpy(np.array(keys, np.int64))}
    record = {
        "num_timesteps": int(model.num_timesteps),
        "updates": int(model._n_updates),
        "gradient_steps": played.update,
        "episodes": int(getattr(model, "_episode_num", 0)),  # of off-policy algorithms, which log every few of them
        "next_episode": played.next_seed,
        "validation_steps": played.validation_steps,
        "validated_at": played.validated_at,
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
        "action_space": model.action_space.np_random.bit_generator.state,  # draws the first, random actions
        "recent": [{key: float(value) for key, value in one.items()} for one in model.ep_info_buffer or ()],
        "recent_successes": [float(success) for success in model.ep_success_buffer or ()],
    }
    return TrainState(int(model.num_timesteps) + played.validation_steps, tensors, record)


def _resume(model: Model, played: OnlineCounters, checkpoints: Checkpoints | None) -> None:
    """Put a checkpoint back, and what had been played by then, where there is one."""
    state = checkpoints.load() if checkpoints else None
    if state is None:
        return
    assert checkpoints is not None
    with checkpoints.fitting():
        _restore(model, played, state)


def _restore(model: Model, played: OnlineCounters, state: TrainState) -> None:
    """Put back what :func:`_state` gave."""
    tensors, record = state.tensors, state.record
    model.policy.load_state_dict(below(tensors, POLICY))
    for kind, (optimizer, parameters) in _optimizers(model).items():
        restore_optimizer(optimizer, parameters, below(tensors, f"{kind}/"))
        if kind == "entropy":
            with torch.no_grad():
                parameters["log"].copy_(tensors["entropy/log"])
    if isinstance(model, OffPolicyAlgorithm):
        assert isinstance(model.replay_buffer, WindowReplayBuffer)
        model.replay_buffer.restore(below(tensors, REPLAY))
    kind, position, has_gauss, cached = record["numpy"]
    np.random.set_state((kind, tensors[NUMPY_RANDOM].numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    restore_random_state(tensors, model.device)
    if "action_space" in record:  # earlier versions did not keep it
        model.action_space.np_random.bit_generator.state = record["action_space"]
    model.num_timesteps, model._n_updates = record["num_timesteps"], record["updates"]
    if isinstance(model, OffPolicyAlgorithm):
        model._episode_num = record.get("episodes", 0)
    if "recent" in record:  # nor these, over which metrics of rollouts are averaged
        model.ep_info_buffer = deque(record["recent"], maxlen=model._stats_window_size)
        model.ep_success_buffer = deque(record["recent_successes"], maxlen=model._stats_window_size)
    played.next_seed, played.validation_steps = int(record["next_episode"]), int(record.get("validation_steps", 0))
    played.update = int(record.get("gradient_steps", record["updates"]))
    played.validated_at = int(record.get("validated_at", model.num_timesteps))
