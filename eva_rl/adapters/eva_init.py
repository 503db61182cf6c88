"""EVA's directions of a policy: from trajectories, from its own rollouts, or from both."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from eva_rl.agents.policy import DecisionTransformerPolicy, frozen
from eva_rl.batch import WindowBatch
from eva_rl.errors import UserError
from eva_rl.eva import ActivationStatistics, EvaOptions, EvaResult, SecondMoment, StorageOptions, compute


@dataclass(frozen=True)
class Rollouts:
    """Where a policy acts while its activations are listened to.

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
    asked = EvaOptions(**options)
    began = time.perf_counter()
    components = round(asked.rank * asked.rho)
    storage = StorageOptions("moments" if keep_moments else "auto", components)
    with frozen(policy.network), ActivationStatistics(policy.network, list(targets), storage) as statistics:
        _accumulate(policy, statistics, islice(batches or (), max_batches), rollouts)
        result = replace(statistics.evaluate(asked), seconds=time.perf_counter() - began)
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
    storage = StorageOptions(method="moments")
    with frozen(policy.network), ActivationStatistics(policy.network, list(targets), storage) as statistics:
        _accumulate(policy, statistics, islice(batches or (), max_batches), rollouts)
        statistics.check_finite()
    if silent := [name for name in targets if name not in statistics.group_of]:
        raise UserError(f"No data reached {silent[0]}. Give batches, rollouts or both.")
    sums = {name: statistics.group_of[name].sums() for name in targets}
    return {name: one.core.sum(0) / one.count.sum() for name, one in sums.items()}


def input_moments(
    policy: DecisionTransformerPolicy,
    targets: Sequence[str],
    batches: Iterable[WindowBatch] | None,
    rollouts: Rollouts | None,
    *,
    max_batches: int,
) -> dict[str, SecondMoment]:
    """Second moments of the inputs of each target layer, for :func:`eva_rl.adapters.measure_start`.

    Args:
        policy: With no adapter attached.
        targets: Layers, by full name.
        batches: Scaled windows, or None.
        rollouts: Where to act, or None.
        max_batches: Batches taken at most.
    """
    with frozen(policy.network), ActivationStatistics(policy.network, list(targets)) as statistics:
        _accumulate(policy, statistics, islice(batches or (), max_batches), rollouts)
        return statistics.second_moments()


def _accumulate(
    policy: DecisionTransformerPolicy,
    statistics: ActivationStatistics,
    batches: Iterable[WindowBatch],
    rollouts: Rollouts | None,
) -> None:
    """Run the batches, and the rollouts where there are some."""
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
