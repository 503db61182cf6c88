"""From a command's adapter options to an adapter on the policy, initialised from data if the method needs it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import count, islice

from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from torch import Tensor, nn

from eva_rl.adapters import (
    DIRECTIONS,
    GRADIENTS,
    MOMENTS,
    AttachedAdapter,
    Rollouts,
    attach_adapter,
    compute_eva,
    find_method,
    initial_rank,
    input_moments,
    measure_start,
    rank_limits,
    rotate,
    second_moments,
    set_gain,
    target_layers,
)
from eva_rl.adapters.layers import check_mixed
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.cli.console import counting_progress, say
from eva_rl.cli.parsing import flat
from eva_rl.configs.algorithms import PPOAlgo, clonings
from eva_rl.configs.finetune import AdapterOptions, FinetuneConfig
from eva_rl.configs.groups import AlgoOptions
from eva_rl.data import WindowSampler
from eva_rl.data.samplers import Sampler, ShardedSampler
from eva_rl.distributed import ProcessGroup
from eva_rl.envs import env_spec, make_vec_env
from eva_rl.errors import UserError, counted
from eva_rl.eva import EvaResult, SecondMoment
from eva_rl.seeding import ROLLOUTS, episode_seeds
from eva_rl.training.losses import clone_loss
from eva_rl.training.options import BCOptions

log = logging.getLogger(__name__)
MEASURED_BATCHES = 4
"""Batches from which gain and effective rank of a start are measured where nothing else depends on them."""


def warn_of_unused(options: AdapterOptions, algo: AlgoOptions | None = None) -> None:
    """Name what was typed for an adapter that does not use it; a study sets some keys for all of its methods."""
    if options.dropout and isinstance(algo, PPOAlgo) and not algo.bc.updates:
        log.warning(
            "algo=%s does not use adapter.dropout=%g: it compares the policy with itself.", algo.name, options.dropout
        )
    method, key = find_method(options.method), "adapter.method"
    now, usual = (dict(flat({"adapter": asdict(one)})) for one in (options, AdapterOptions()))
    typed = [name for name in now if now[name] != usual.get(name) and name != key]
    if unused := [f"{name}={now[name]}" for name in typed if method.ignores(name, now)]:
        log.warning("adapter=%s does not use %s.", options.method, ", ".join(unused))


def check_adapter(policy: DecisionTransformerPolicy, options: AdapterOptions) -> None:
    """Raise unless the policy can carry the adapter that the options ask for, and has the data that it needs.

    Raises:
        UserError: See :func:`eva_rl.adapters.rank_limits`; directions of a variant that would be cut; or a source of
            data that the method cannot use.
    """
    method = find_method(options.method)
    if method.adapter:
        limits = rank_limits(policy.network, method, options.rank, options.targets, options.rank_caps)
        if method.eva and options.rho == 1:  # else the data decide how many directions each layer gets
            check_mixed(options.variant, dict.fromkeys(limits, options.rank), limits)
    if method.needs == GRADIENTS and options.eva.source in {"rollouts", "mixed"}:
        raise UserError(
            f"adapter.eva.source={options.eva.source}: adapter={method.name} starts from the gradient of the loss, and "
            "the policy's own actions have no loss. Use adapter.eva.source=trajectories."
        )


def activation_source(config: FinetuneConfig, has_data: bool) -> str:
    """Where activations come from: ``adapter.eva.source`` with ``auto`` resolved.

    Raises:
        UserError: Trajectories are asked for where there are none, or there are fewer environments than processes.
    """
    source, envs, number = config.adapter.eva.source, config.adapter.eva.rollout_envs, ProcessGroup.current().world_size
    if source == "auto":
        source = "trajectories" if has_data else "rollouts"
    elif source != "rollouts" and not has_data:
        raise UserError(
            f"adapter.eva.source={source} needs demonstrations, and there are none. Name some with data=, or use "
            "adapter.eva.source=rollouts."
        )
    if source != "trajectories" and envs < number and find_method(config.adapter.method).needs != MOMENTS:
        raise UserError(
            f"adapter.eva.rollout_envs={envs}: {number} processes share these environments; expected at least "
            f"adapter.eva.rollout_envs={number}."
        )
    return source


def activation_env_steps(config: FinetuneConfig, has_data: bool) -> int:
    """Env steps that the policy plays before training to measure its activations; 0 where trajectories serve."""
    options, method = config.adapter, find_method(config.adapter.method)
    loaded = bool(config.shared) and ProcessGroup.current().world_size == 1  # without the moments of EVA's pass
    rescaled = method.adapter and options.gain != "own" and (loaded or method.needs != DIRECTIONS)
    passes = (method.needs in {DIRECTIONS, MOMENTS}) + rescaled
    if not passes or activation_source(config, has_data) == "trajectories":
        return 0
    return passes * options.eva.rollout_envs * options.eva.rollout_steps


def attach(
    policy: DecisionTransformerPolicy,
    sampler: WindowSampler | None,
    config: FinetuneConfig,
    find_eva: Callable[[Callable[[], EvaResult]], EvaResult] = lambda compute: compute(),
) -> AttachedAdapter:
    """Compute from data what the method starts from, and attach the adapter.

    Args:
        policy: What is adapted.
        sampler: Windows of the demonstrations, or None.
        config: Of the run.
        find_eva: Calls the EVA pass that it is given, or returns what another run found.
    """
    options, method = config.adapter, find_method(config.adapter.method)
    found = find_eva(lambda: _compute_eva(policy, sampler, config)) if method.needs == DIRECTIONS else None
    moments = {} if found is None else found.moments  # which a pass that another run made does not hold
    moments = moments or _input_moments(policy, sampler, config, found)
    adapter = attach_adapter(
        policy,
        options.method,
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        targets=options.targets,
        rank_caps=options.rank_caps,
        eva=found,
        moments=_moments(policy, sampler, config) if method.needs == MOMENTS else None,
        backward=_backward(policy, sampler, config) if method.needs == GRADIENTS else None,
        total_updates=config.algo.adapter_updates,
    )
    return adapter if adapter.model is None else _with_start(adapter, moments, config)


def _with_start(
    adapter: AttachedAdapter, moments: Mapping[str, SecondMoment], config: FinetuneConfig
) -> AttachedAdapter:
    """Rotate and rescale A as asked for, and measure what it makes of the inputs."""
    model = adapter.model
    assert model is not None
    if config.adapter.variant == "rotate" and adapter.eva is None:  # EVA's own is part of its result
        rotate(model, config.seed)
    set_gain(model, moments, config.adapter.gain)
    return replace(adapter, start=measure_start(model, moments))


def _input_moments(
    policy: DecisionTransformerPolicy, sampler: WindowSampler | None, config: FinetuneConfig, found: EvaResult | None
) -> dict[str, SecondMoment]:
    """Second moments of the target layers' inputs; of few batches, or none, where they only describe the start.

    Where there was an EVA pass, they are those of its batches.
    """
    options, network, process_group = config.adapter, policy.network, ProcessGroup.current()
    measured_alone = options.gain == "own"
    if not find_method(options.method).adapter or (measured_alone and sampler is None):
        return {}
    most = options.eva.max_batches
    matrices = [n for n in target_layers(network, options.targets) if isinstance(network.get_submodule(n), nn.Linear)]
    if not matrices:  # lookup tables alone
        return {}
    if measured_alone and sampler is not None:
        drawn = windows(policy, ShardedSampler(sampler, process_group), options.eva.batch_size)
        return input_moments(policy, matrices, drawn, None, max_batches=min(most, MEASURED_BATCHES))
    if found is not None and activation_source(config, sampler is not None) == "trajectories":
        most = found.batches  # which counts the forwards of rollouts, too
    with _sources(policy, sampler, config, process_group) as (batches, rollouts):
        return input_moments(policy, matrices, batches, rollouts, max_batches=most)


def _compute_eva(policy: DecisionTransformerPolicy, sampler: WindowSampler | None, config: FinetuneConfig) -> EvaResult:
    options, pruned = config.adapter, find_method(config.adapter.method).adalora
    with (
        _sources(policy, sampler, config, ProcessGroup.current()) as (batches, rollouts),
        counting_progress("EVA (batches)", _most_batches(options.eva.max_batches, batches, rollouts)) as advance,
    ):  # compute_eva() adds up all processes'
        result = compute_eva(
            policy,
            target_layers(policy.network, options.targets),
            None if batches is None else _counted(batches, advance),
            None if rollouts is None else replace(rollouts, vec_env=_CountedEnvs(rollouts.vec_env, advance)),
            max_batches=options.eva.max_batches,
            rank=initial_rank(options.rank) if pruned else options.rank,
            rho=1.0 if pruned else options.rho,
            tau=options.tau,
            center=options.center,
            score=options.score,
            variant=options.variant,
            alpha=options.alpha,
            seed=config.seed,
            keep_moments=True,
        )
    explained = sum(layer.explained_variance for layer in result.layers.values()) / len(result.layers)
    say(
        f"EVA: {counted(result.rows, 'row')} in {counted(result.batches, 'batch')}, {result.stopped}, "
        f"{result.seconds:.1f} s; {explained:.0%} of the variance explained on average"
    )
    return result


def _most_batches(most: int, batches: Iterator[WindowBatch] | None, rollouts: Rollouts | None) -> int:
    """How many batches EVA sees at most: of windows, and one for each env step that the policy takes at once."""
    return (0 if batches is None else most) + (0 if rollouts is None else rollouts.steps)


class _CountedEnvs(VecEnvWrapper):
    """Calls ``advance`` after each env step."""

    def __init__(self, vec_env: VecEnv, advance: Callable[[object], None]) -> None:
        super().__init__(vec_env)
        self._advance = advance

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        returned = self.venv.step_wait()
        self._advance(returned)
        return returned


def _counted(batches: Iterator[WindowBatch], advance: Callable[[object], None]) -> Iterator[WindowBatch]:
    for batch in batches:
        yield batch
        advance(batch)


def _moments(
    policy: DecisionTransformerPolicy, sampler: WindowSampler | None, config: FinetuneConfig
) -> dict[str, Tensor]:
    layers = target_layers(policy.network, config.adapter.targets)
    with _sources(policy, sampler, config) as (batches, rollouts):
        return second_moments(policy, layers, batches, rollouts, max_batches=config.adapter.eva.max_batches)


def _backward(
    policy: DecisionTransformerPolicy, sampler: WindowSampler | None, config: FinetuneConfig
) -> Callable[[], None]:
    """The loss of the first windows that training will see, as it will be cloned."""
    options, draw = config.adapter.eva, _trajectories(sampler, config)
    loss = next((cloning.loss for cloning, _ in clonings(config.algo)), BCOptions.loss)

    def run() -> None:
        for batch in islice(windows(policy, draw, options.batch_size), options.max_batches):
            clone_loss(policy.network, batch, loss).backward()  # type: ignore[no-untyped-call]

    return run


@contextmanager
def _sources(
    policy: DecisionTransformerPolicy,
    sampler: WindowSampler | None,
    config: FinetuneConfig,
    process_group: ProcessGroup | None = None,
) -> Iterator[tuple[Iterator[WindowBatch] | None, Rollouts | None]]:
    """Windows of the trajectories, environments to act in, or both: what ``adapter.eva.source`` names.

    With ``process_group``, this process's part of them.
    """
    process_group = process_group or ProcessGroup()
    options, source = config.adapter.eva, activation_source(config, sampler is not None)
    batches = None
    if source != "rollouts":
        draw = ShardedSampler(_trajectories(sampler, config), process_group, halves=True)
        batches = windows(policy, draw, options.batch_size)
    if source == "trajectories":
        yield batches, None
        return
    spec = env_spec(config.env.id, config.env.horizon)
    mine, own = process_group.shard(options.rollout_envs), process_group.local_count(options.rollout_envs)
    vec_env = make_vec_env(spec.env_id, own, horizon=config.env.horizon, stride=options.rollout_envs)
    vec_env.seed(episode_seeds(ROLLOUTS, config.seed) + mine.start)
    try:
        yield batches, Rollouts(vec_env, [spec.env_id] * vec_env.num_envs, options.rollout_steps)
    finally:
        vec_env.close()


def _trajectories(sampler: WindowSampler | None, config: FinetuneConfig) -> WindowSampler:
    if sampler is None:
        raise UserError(
            f"adapter={config.adapter.method} with adapter.eva.source={config.adapter.eva.source} needs trajectories, "
            "and data= names none. Name some with data=, or use adapter.eva.source=rollouts "
            "(not for lora_ga and lora_one)."
        )
    return sampler


def windows(policy: DecisionTransformerPolicy, sampler: Sampler, batch_size: int) -> Iterator[WindowBatch]:
    """The windows that training will see, in its order, without end."""
    return (sampler.sample(batch_size, step, policy.device) for step in count())
