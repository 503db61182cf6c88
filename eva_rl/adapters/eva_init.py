"""EVA's directions of a policy: from trajectories, from its own rollouts, or from both."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, linalg

from eva_rl.adapters.extensions import low_rank_layers
from eva_rl.agents.policy import DecisionTransformerPolicy, frozen
from eva_rl.batch import WindowBatch
from eva_rl.data.trajectories import Trajectories
from eva_rl.data.windows import WindowSampler
from eva_rl.envs import make_vec_env
from eva_rl.errors import UserError
from eva_rl.eva import ActivationStatistics, EvaOptions, EvaResult, SecondMoment, StorageOptions, compute
from eva_rl.eva.computation import check_batches, evaluating
from eva_rl.eva.options import Method
from eva_rl.options import positive
from eva_rl.seeding import ROLLOUTS, episode_seeds

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Rollouts:
    """Where a policy acts while its activations are recorded.

    Attributes:
        vec_env: n environments, seeded already.
        env_ids: The task of each, (n,).
        steps: Env steps in each.
    """

    vec_env: VecEnv
    env_ids: Sequence[str]
    steps: int


def compute_eva(
    policy: DecisionTransformerPolicy,
    targets: Sequence[str],
    batches: Iterable[WindowBatch] | None,
    rollouts: Rollouts | None,
    *,
    max_batches: int,
    keep_moments: bool = False,
    **options: Any,
) -> EvaResult:
    """Find the principal directions of a policy's activations.

    With batches alone, they are taken until the two halves of the data agree, at most ``max_batches``. With rollouts,
    the sums grow while the policy acts, without a second forward pass; batches given besides are all added. Where
    torch.distributed is initialised, all its processes call this, each with its own share of the data, and get the
    directions of the whole.

    Args:
        policy: With no adapter attached.
        targets: Layers, by full name.
        batches: Scaled windows, or None.
        rollouts: Where to act, or None.
        max_batches: Batches taken at most.
        keep_moments: Give the result its ``moments``, for :func:`eva_rl.eva.gain` of any A.
        **options: Fields of :class:`eva_rl.eva.EvaOptions`.

    Raises:
        UserError: See :func:`eva_rl.eva.compute`.
    """
    if rollouts is None:
        assert batches is not None, "batches, rollouts or both"
        options |= {"keep_moments": keep_moments, "max_batches": max_batches, "mask": _mask}
        return compute(policy.network, batches, targets=list(targets), **options)
    check_batches(batches, max_batches)
    asked = EvaOptions(**options)
    began = time.perf_counter()
    storage = StorageOptions("auto", round(asked.rank * asked.rho), seed=asked.seed, exact=keep_moments)
    with _listening(policy, targets, storage) as statistics:
        _accumulate(policy, statistics, islice(batches or (), max_batches), rollouts)
        result = statistics.evaluate(asked).ended("data exhausted", time.perf_counter() - began)
        return replace(result, moments=statistics.second_moments()) if keep_moments else result


def second_moments(
    policy: DecisionTransformerPolicy,
    targets: Sequence[str],
    batches: Iterable[WindowBatch] | None,
    rollouts: Rollouts | None,
    *,
    max_batches: int,
) -> dict[str, Tensor]:
    """Mean of x x^T over the inputs x of each target layer, (in, in), exactly; padding does not count.

    Args:
        policy: With no adapter attached.
        targets: Layers, by full name.
        batches: Scaled windows, or None.
        rollouts: Where to act, or None.
        max_batches: Batches taken at most.

    Raises:
        UserError: No data reached a layer, or they were not finite.
    """
    moments = input_moments(policy, targets, batches, rollouts, max_batches=max_batches, method="moments")
    if silent := [name for name in targets if name not in moments]:
        raise UserError(f"No data reached {silent[0]}. Give batches, rollouts or both.")
    found = {name: moments[name].dense for name in targets}
    return {name: cast(Tensor, dense) for name, dense in found.items()}  # kept exactly, so that it is there


def input_moments(
    policy: DecisionTransformerPolicy,
    targets: Sequence[str],
    batches: Iterable[WindowBatch] | None,
    rollouts: Rollouts | None,
    *,
    max_batches: int,
    method: Method | Literal["auto"] = "auto",
) -> dict[str, SecondMoment]:
    """Second moments of the inputs of each target layer, for :func:`eva_rl.adapters.measure_start`.

    Args:
        policy: With no adapter attached.
        targets: Layers, by full name.
        batches: Scaled windows, or None.
        rollouts: Where to act, or None.
        max_batches: Batches taken at most.
        method: ``moments`` keeps them exactly in layers of any width.
    """
    with _listening(policy, targets, StorageOptions(method)) as statistics:
        _accumulate(policy, statistics, islice(batches or (), max_batches), rollouts)
        return statistics.second_moments()


@contextmanager
def _listening(
    policy: DecisionTransformerPolicy, targets: Sequence[str], storage: StorageOptions
) -> Iterator[ActivationStatistics]:
    """Statistics of what layers see of a policy that does not learn, without dropout."""
    network = policy.network
    with evaluating(network), frozen(network), ActivationStatistics(network, list(targets), storage) as statistics:
        yield statistics


def _accumulate(
    policy: DecisionTransformerPolicy,
    statistics: ActivationStatistics,
    batches: Iterable[WindowBatch],
    rollouts: Rollouts | None,
) -> None:
    """Run the batches, and the rollouts if any."""
    for batch in batches:
        with statistics.masked(partial(_mask, batch)):
            policy.network(batch)
        statistics.finish_forward()
    if rollouts is not None:
        with _record_full_windows(policy, statistics):
            _act(policy, rollouts, statistics)


def _mask(batch: WindowBatch, layer: str) -> Tensor | None:
    """Given by layer, as it is for all: the network's layers see the batch first, also where B = T."""
    return batch.attention_mask


@contextmanager
def _record_full_windows(policy: DecisionTransformerPolicy, statistics: ActivationStatistics) -> Iterator[None]:
    """Full windows, whose padding does not count."""

    def mask(windows: WindowBatch) -> None:
        statistics.mask = partial(_mask, windows)

    window, policy.window, policy.on_window = policy.window, "full", mask
    try:
        yield
    finally:
        policy.window, policy.on_window = window, None
        statistics.mask = None


def _act(policy: DecisionTransformerPolicy, rollouts: Rollouts, statistics: ActivationStatistics) -> None:
    n = rollouts.vec_env.num_envs
    policy.reset(rollouts.env_ids)
    observations: Any = rollouts.vec_env.reset()
    rewards, starts = np.zeros(n, np.float32), np.ones(n, dtype=bool)
    for _ in range(rollouts.steps):
        actions = policy.act(observations, rewards, starts)
        statistics.finish_forward()
        observations, rewards, starts, _ = rollouts.vec_env.step(actions)


def start_moments(
    policy: DecisionTransformerPolicy,
    layers: Sequence[str],
    where: str | Trajectories,
    *,
    steps: int,
    episodes: int,
    seed: int,
) -> dict[str, SecondMoment]:
    """Second moments of layers' inputs over the first steps of a task, the adapters being off.

    Args:
        policy: Acts, asked for its default target return: which task this is, is what has to be found out.
        layers: By full name.
        where: A task to act in, or demonstrations to read.
        steps: Env steps from the start of an episode.
        episodes: Episodes.
        seed: Of the episodes that are played.

    Raises:
        UserError: No steps, or no episodes.
    """
    positive(steps=steps, episodes=episodes)
    if isinstance(where, Trajectories):
        sampler = WindowSampler(where, policy.network.config.context_length, policy.scaling)
        last = np.minimum(where.offsets[:-1] + steps, where.offsets[1:])[:episodes] - 1
        return input_moments(policy, layers, [sampler.windows(last, policy.device)], None, max_batches=1)
    vec_env = make_vec_env(where, episodes, seed=episode_seeds(ROLLOUTS, seed))
    try:
        return input_moments(policy, layers, None, Rollouts(vec_env, [""] * episodes, steps), max_batches=0)
    finally:
        vec_env.close()


def comparable_directions(model: PeftModel, adapters: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Orthonormal input directions (R, in) of the layers that all adapters have, as many as all have there.

    Args:
        model: With the adapters.
        adapters: Their names.

    Returns:
        By adapter and layer.

    Raises:
        UserError: They have no low-rank layer in common.
    """
    factors = {adapter: {layer.name: layer.A.data for layer in low_rank_layers(model, adapter)} for adapter in adapters}
    common = set.intersection(*(set(found) for found in factors.values()))
    if not common:
        raise UserError(
            f"The adapters {', '.join(adapters)} have no low-rank layer in common whose directions could be compared. "
            "Choose among LoRA or EVA adapters, or name one: policy.adapters.use(NAME)."
        )
    ranks = {layer: min(len(found[layer]) for found in factors.values()) for layer in common}
    return {
        adapter: {layer: linalg.qr(found[layer][:rank].double().T)[0].T for layer, rank in ranks.items()}
        for adapter, found in factors.items()
    }


def captured_variance(directions: Mapping[str, Tensor], moments: Mapping[str, SecondMoment]) -> float:
    """Share of the inputs' variance along some directions, the mean over layers that saw more than zeros.

    Args:
        directions: Orthonormal rows (R, in) by layer.
        moments: Second moments of the same layers' inputs.
    """
    seen = {name: rows for name, rows in directions.items() if moments[name].trace > 0}  # no action before the first
    shares = [float(moments[name].projected(rows).trace()) / moments[name].trace for name, rows in seen.items()]
    return float(np.mean(shares)) if shares else 0.0
