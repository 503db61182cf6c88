"""What a fine-tuning run works on: the task, the policy, the demonstrations, the held-out episodes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from eva_rl.adapters import GRADIENTS, find_method
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.agents.policy import Policy
from eva_rl.agents.stochastic import make_stochastic
from eva_rl.cli.console import counting_progress
from eva_rl.cli.loading import (
    AUTO,
    EXPERT,
    FROM_DEMONSTRATIONS,
    NONE,
    check_expert,
    describe_demonstrations,
    load_task_data,
    normalise_by,
    open_policy,
    resolve_policy,
)
from eva_rl.cli.machine import prepare_machine
from eva_rl.cli.origin import check_origin
from eva_rl.cli.profiling import Phases
from eva_rl.cli.run_dir import open_run
from eva_rl.cli.saving import data_references
from eva_rl.configs.algorithms import ODTAlgo, ODTTD3Algo, OnlineAlgo, SB3Algo, check_method, clonings
from eva_rl.configs.finetune import ASKED, FinetuneConfig
from eva_rl.configs.groups import DataOptions
from eva_rl.data import Trajectories, WindowSampler
from eva_rl.data.selection import asked_returns_to_go, sampling_weights, target_return
from eva_rl.data.sources import check_file
from eva_rl.distributed import ProcessGroup
from eva_rl.envs import EnvSpec, env_spec, split_options
from eva_rl.envs.names import REWARD, SPARSE
from eva_rl.envs.vector import TaskVecEnv
from eva_rl.errors import UserError
from eva_rl.files import alone
from eva_rl.finetune.adapter import activation_source, check_adapter
from eva_rl.finetune.locations import data_folder, place_key
from eva_rl.rollouts.evaluation import EvaluationResult, evaluate_distributed, evaluate_policy, shared_envs
from eva_rl.rollouts.experts import has_script
from eva_rl.rollouts.video import check_frames
from eva_rl.seeding import MAX_SEED, ONLINE, episode_seeds
from eva_rl.tracking import Resume
from eva_rl.training.bc import VALIDATION_STEPS
from eva_rl.training.checkpoint import Checkpoints, latest_step
from eva_rl.training.collector import TaskEnvs
from eva_rl.training.compiling import check_compiler
from eva_rl.training.losses import clone_loss
from eva_rl.training.odt_td3 import check_context

HELD_OUT_WINDOWS, HELD_OUT_BATCHES = 256, 4
"""Windows on which the held-out cloning loss is measured."""


@dataclass(frozen=True)
class Session:
    """Everything that the phases of a run share; a context manager that closes the environments.

    Attributes:
        config: As it was given.
        spec: The task.
        policy: What is fine-tuned.
        policy_name: Where it came from.
        run_dir: Where everything goes.
        data: Demonstrations, or None.
        sampler: Windows of the demonstrations, or None.
        vec_env: Environments of the held-out episodes.
        process_group: This process among those of the run.
        phases: Seconds spent.
        held_out: Windows of demonstrations that are not trained on, or None.
        shared: Keys of the work that was shared with other runs of a study.
        played_before: Env steps before learning in the environment: to measure activations, and to validate while the
            policy cloned.
        made_stochastic: Whether the policy was given its log-standard-deviation head by this run.
    """

    config: FinetuneConfig
    spec: EnvSpec
    policy: DecisionTransformerPolicy
    policy_name: str
    run_dir: Path
    data: Trajectories | None
    sampler: WindowSampler | None
    vec_env: TaskVecEnv
    process_group: ProcessGroup
    phases: Phases
    held_out: WindowSampler | None = None
    shared: dict[str, str] = field(default_factory=dict)
    played_before: int = 0
    made_stochastic: bool = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.vec_env.close()

    @property
    def checkpoint_dir(self) -> Path:
        """Where checkpoints go."""
        return self.run_dir / "checkpoint"

    @property
    def snapshot_file(self) -> Path:
        """The parameters in the middle of cloning, where the algorithm asks for them."""
        return self.run_dir / "snapshot.safetensors"

    @property
    def online_checkpoints(self) -> Checkpoints:
        """Where checkpoints of online learning go; the algorithm's options say how many env steps they are apart."""
        return Checkpoints(self.checkpoint_dir / "online", seconds=self.config.checkpoint.seconds)

    @cached_property
    def resumed(self) -> Resume | None:
        """The last step of the record that a continued run builds on, as the run began; None where it is new."""
        online = latest_step(self.checkpoint_dir / "online")
        if online is not None:
            return Resume(online)
        cloned = latest_step(self.checkpoint_dir)
        return None if cloned is None else Resume(cloned, cloning=isinstance(self.config.algo, OnlineAlgo))

    @property
    def references(self) -> tuple[float, float] | None:
        """Returns that score 0 and 100, where the demonstrations bring their own."""
        return None if self.data is None else data_references(self.data)

    def online_task(self, vec_env: VecEnv) -> TaskEnvs:
        """The task in environments to learn in, with the goals that belong to the run's seed."""
        spec = self.spec
        first, horizon = episode_seeds(ONLINE, self.config.seed), self.config.env.horizon or spec.horizon or 0
        return TaskEnvs(vec_env, spec.env_id, spec.reports_success, first, horizon, self.played_before)

    def play(self, policy: Policy | None = None, **arguments: Any) -> EvaluationResult:
        """Evaluate the policy, or another one, on this run's task; see :func:`evaluate_policy`."""
        config = self.config
        play = partial(
            evaluate_policy,
            policy or self.policy,
            config.env.id,
            horizon=config.env.horizon,
            seed=config.eval.seed,
            references=self.references,
            vec_env=self.vec_env,
        )
        return evaluate_distributed(self.process_group, play, **arguments)

    def evaluate(self, name: str, policy: Policy | None = None) -> tuple[EvaluationResult, NDArray[np.float32]]:
        """The held-out evaluation, behind a progress bar; and the actions (N, act) that this process took in it."""
        episodes = self.config.eval.episodes
        actions: list[NDArray[np.float32]] = []
        with counting_progress(f"{name:8s}", self.process_group.local_count(episodes)) as advance:
            result = self.play(
                policy,
                episodes=episodes,
                on_episode=advance,
                on_actions=actions.append,
                stop_at_success=bool(self.config.eval.stop_at_success),
            )
        return result, np.concatenate(actions)

    def validate(self, policy: Policy | None = None) -> dict[str, float]:
        """Metrics on validation episodes, which no report sees."""
        options = self.config.eval
        found = self.play(
            policy,
            episodes=options.quick_episodes,
            validation=True,
            stop_at_success=options.stop_at_success is not False,
        )
        steps = float(sum(episode.length for episode in found.episodes))
        return found.metrics("validation") | {VALIDATION_STEPS: steps}

    def measure(self, policy: Policy | None = None) -> dict[str, float]:
        """Metrics on the held-out episodes and demonstrations."""
        options = self.config.eval
        held_out = self.play(policy, episodes=options.episodes, stop_at_success=bool(options.stop_at_success))
        return held_out.metrics() | self.cloning_loss()

    def cloning_loss(self) -> dict[str, float]:
        """The loss on demonstrations that are not trained on; empty where there are none (``eval.demonstrations``)."""
        if self.held_out is None:
            return {}
        policy = self.policy
        with torch.no_grad():
            batches = (self.held_out.sample(HELD_OUT_WINDOWS, step, policy.device) for step in range(HELD_OUT_BATCHES))
            losses = [clone_loss(policy.network, batch).item() for batch in batches]
        return {"eval/cloning_loss": sum(losses) / len(losses)}


def open_session(config: FinetuneConfig) -> Session:
    """Check everything that can be checked before anything is computed, then load or collect.

    Raises:
        UserError: The policy, the task, the data, the adapter or the algorithm do not fit each other.
    """
    phases = Phases()
    device = prepare_machine(config, config.env.timeout)
    process_group = ProcessGroup.current()
    check_processes(config, process_group.world_size)
    spec = env_spec(config.env.id, config.env.horizon)
    named = resolve_policy(config.policy, spec.env_id)
    policy = open_policy(named, device, merge=True)
    policy.check_dimensions(spec.observation_dim, spec.action_dim, spec.env_id)
    policy.check_action_bounds(spec.action_low, spec.action_high, spec.env_id)
    check_adapter(policy, config.adapter)
    made_stochastic = isinstance(config.algo, ODTAlgo) and make_stochastic(policy, config.algo.initial_std)
    source = data_source(config)
    if source == NONE and config.policy.observations_from == FROM_DEMONSTRATIONS:
        raise UserError("policy.observations_from=data, but data=none. Name a source of data instead.")
    _check_algorithm(policy, config)
    _check_activations(config, source != NONE)
    check_demonstrations(config, spec)
    _check_video(config, process_group)
    run_dir = open_run("finetune", config)
    data = None
    if source != NONE:
        options = replace(config.data, source=source)
        with process_group.main_process_first():
            data = _load_data(config, options, spec.env_id, run_dir)
        policy.check_dimensions(data.observation_dim, data.action_dim, data.source)
        if config.policy.observations_from == FROM_DEMONSTRATIONS:
            normalise_by(policy, data, config.policy)
    choose_target_return(policy, config, data, spec.env_id)
    if data is not None and process_group.is_main:
        describe_demonstrations(data, policy, spec)
    sampler = None if data is None else make_sampler(policy, data, config, spec.env_id)
    process_group.broadcast_object(lambda: check_origin(run_dir, policy, data))
    with process_group.main_process_first():
        held_out = _held_out(policy, config, spec.env_id, run_dir)
    vec_env = shared_envs(process_group, spec.env_id, config.eval.episodes, config.env.horizon)  # last: it has workers
    phases.end("data")
    return Session(
        config,
        spec,
        policy,
        named.path,
        run_dir,
        data,
        sampler,
        vec_env,
        process_group,
        phases,
        held_out,
        made_stochastic=made_stochastic,
    )


def _check_video(config: FinetuneConfig, process_group: ProcessGroup) -> None:
    if config.video:
        process_group.broadcast_object(lambda: check_frames(config.env.id, config.env.horizon))


def _check_algorithm(policy: DecisionTransformerPolicy, config: FinetuneConfig) -> None:
    check_method(config.algo, find_method(config.adapter.method), config.adapter.variant)
    for options, _ in clonings(config.algo):
        check_compiler(options.compile, policy.device, f"{options.PREFIX}compile")
    if isinstance(config.algo, ODTTD3Algo):
        check_context(policy)
    if isinstance(config.algo, SB3Algo):
        from eva_rl.training.sb3 import check_actor

        check_actor(policy, config.algo)


def check_processes(config: FinetuneConfig, number: int) -> None:
    """Raise unless so many processes can share the run.

    Raises:
        UserError: Online learning takes one; cloning takes no more than there are held-out episodes.
    """
    if number > 1 and isinstance(config.algo, OnlineAlgo):
        raise UserError(
            f"algo={config.algo.name} runs in a single process; this run has {number}. Start it without torchrun, or "
            "use algo=bc."
        )
    if config.eval.episodes < number:
        raise UserError(
            f"eval.episodes={config.eval.episodes}: {number} processes share the held-out episodes; expected at least "
            f"eval.episodes={number}."
        )


def _load_data(config: FinetuneConfig, options: DataOptions, env_id: str, run_dir: Path) -> Trajectories:
    """Demonstrations; collected ones lie where other runs of a study find them, too."""
    folder = data_folder(config, options, env_id, run_dir)
    with alone(folder, place_key(config)):
        return load_task_data(env_id, options, folder, config.env.horizon)


def _held_out(
    policy: DecisionTransformerPolicy, config: FinetuneConfig, env_id: str, run_dir: Path
) -> WindowSampler | None:
    """Windows of demonstrations of a seed that no run trains on, the same for all runs of a task.

    Raises:
        UserError: The runs train on that seed.
    """
    if not config.eval.demonstrations:
        return None
    if config.data.seed == MAX_SEED:
        raise UserError(f"data.seed={MAX_SEED} is the seed of the held-out demonstrations. Use another one.")
    options = replace(config.data, source=EXPERT, episodes=config.eval.demonstrations, seed=MAX_SEED)
    options = replace(options, top=1.0, first=0, max_return=None, sample=0)
    folder = data_folder(config, options, env_id, run_dir / "held_out")
    with alone(folder, place_key(config)):
        data = load_task_data(env_id, options, folder, config.env.horizon)
    return make_sampler(policy, data, replace(config, seed=0), env_id)


def _check_activations(config: FinetuneConfig, has_data: bool) -> None:
    method = find_method(config.adapter.method)
    if method.needs:
        activation_source(config, has_data)
    if method.needs == GRADIENTS and not has_data:
        raise UserError(
            f"adapter={method.name} starts from the gradient of cloning, and there is nothing to clone. Name "
            "demonstrations with data=, or use adapter=eva."
        )


def data_source(config: FinetuneConfig) -> str:
    """The source of demonstrations, with ``auto`` resolved.

    Raises:
        UserError: The algorithm clones, and there is nothing to clone.
    """
    clones = not isinstance(config.algo, OnlineAlgo) or config.algo.bc.updates > 0
    if config.data.source == AUTO:
        return EXPERT if clones else NONE
    if config.data.source == NONE and clones:
        raise UserError(
            f"algo={config.algo.name} clones demonstrations, data=none gives it none. Name some with data=, or use an "
            "algorithm that does without: algo=odt_td3."
        )
    return config.data.source


def check_demonstrations(config: FinetuneConfig, spec: EnvSpec) -> None:
    """Raise unless a run's demonstrations can be had: experts, also those of its held-out cloning loss, and files.

    Raises:
        UserError: The task has no such expert, or there is no such file.
    """
    source, held_out = data_source(config), config.eval.demonstrations
    if held_out and not has_script(spec.env_id):
        raise UserError(
            f"eval.demonstrations={held_out}: they are collected from a scripted expert, and {spec.env_id} has none. "
            "Leave the key out."
        )
    if source.partition(":")[0] == EXPERT:
        check_expert(source, spec)
    elif source != NONE:
        check_file(source)


def choose_target_return(
    policy: DecisionTransformerPolicy, config: FinetuneConfig, data: Trajectories | None, env_id: str
) -> None:
    """Set the target return: the user's, the demonstrations', or the policy's own."""
    target = config.policy.target_return
    if target is None and data is not None:
        target = target_return(data)
    own = policy.conditioning.of(env_id)
    if data is not None and config.policy.target_return is None and split_options(env_id)[1].get(REWARD) == SPARSE:
        _keep_scaled_target(policy, own, target_return(data))
    policy.set_target_return(own if target is None else target, env_id)


def _keep_scaled_target(policy: DecisionTransformerPolicy, own: float, target: float) -> None:
    """Change the unit of returns so that the network goes on seeing the number it is used to, where there is one."""
    unit = policy.scaling.return_scale * target / own if own else 0.0
    if unit > 0:
        policy.scaling = replace(policy.scaling, return_scale=unit)


def make_sampler(
    policy: DecisionTransformerPolicy, data: Trajectories, config: FinetuneConfig, env_id: str
) -> WindowSampler:
    """Windows as the policy sees them, in an order that the seed decides."""
    asked = config.data.returns_to_go == ASKED
    return WindowSampler(
        data,
        policy.network.config.context_length,
        policy.scaling,
        seed=config.seed,
        weights=sampling_weights(data, config.data.after_success, config.data.weight_by),
        returns_to_go=asked_returns_to_go(data, policy.conditioning.of(env_id)) if asked else None,
    )
