"""Policies with an adapter of any method, and a short training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import count, islice
from typing import Any

import pytest

from eva_rl import eva
from eva_rl.adapters import (
    GRADIENTS,
    METHODS,
    MOMENTS,
    PROJECTIONS,
    AttachedAdapter,
    attach_adapter,
    initial_rank,
    second_moments,
    target_layers,
)
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.data import Trajectories, WindowSampler
from eva_rl.training.bc import train_bc
from eva_rl.training.losses import clone_loss
from eva_rl.training.options import BCOptions
from tests.conftest import make_policy

UPDATES, RANK = 8, 4
USUAL = ("lora", "eva_dora", "adalora", "pissa", "lora_one", "miss", "full")
"""One method of each make: the rest are slow tests where one test goes through all of them."""


def usual_first(values: Iterable[Any], usual: Collection[Any] = USUAL) -> list[Any]:
    """The values as parameters of a test, all but the usual ones marked slow."""
    return [value if value in usual else pytest.param(value, marks=pytest.mark.slow) for value in values]


PEFT_METHODS = [name for name, method in METHODS.items() if method.adapter]
REWRITING = [name for name, method in METHODS.items() if method.rewrites]


def sampler(policy: DecisionTransformerPolicy, data: Trajectories) -> WindowSampler:
    return WindowSampler(data, policy.network.config.context_length, policy.scaling)


def batches(policy: DecisionTransformerPolicy, data: Trajectories, size: int = 32) -> Iterator[WindowBatch]:
    draw = sampler(policy, data)
    return (draw.sample(size, step, policy.device) for step in count())


def measure(policy: DecisionTransformerPolicy, data: Trajectories, **options: Any) -> eva.EvaResult:
    targets = target_layers(policy.network, options.pop("targets", PROJECTIONS))
    options = {"rank": RANK, "alpha": RANK, "max_batches": 4} | options
    return eva.compute(policy.network, batches(policy, data), targets=targets, **options)


def backward(policy: DecisionTransformerPolicy, data: Trajectories) -> Callable[[], None]:
    def run() -> None:
        for batch in islice(batches(policy, data), 2):
            clone_loss(policy.network, batch).backward()

    return run


def attached(
    method: str,
    data: Trajectories,
    *,
    rho: float = 1.0,
    policy: DecisionTransformerPolicy | None = None,
    **options: Any,
) -> tuple[DecisionTransformerPolicy, AttachedAdapter]:
    policy = policy or make_policy()
    kind, targets = METHODS[method], options.get("targets", PROJECTIONS)
    found: dict[str, Any] = {}
    if kind.eva:
        ranks = {"rank": initial_rank(RANK)} if kind.adalora else {"rho": rho}
        found["eva"] = measure(policy, data, targets=targets, **ranks)
    elif kind.needs == MOMENTS:
        layers = target_layers(policy.network, targets)
        found["moments"] = second_moments(policy, layers, batches(policy, data), None, max_batches=4)
    elif kind.needs == GRADIENTS:
        found["backward"] = backward(policy, data)
    return policy, attach_adapter(policy, method, **{"rank": RANK, "total_updates": UPDATES} | found | options)


def train(
    policy: DecisionTransformerPolicy, data: Trajectories, adapter: AttachedAdapter, updates: int = UPDATES
) -> None:
    options = BCOptions(updates=updates, batch_size=8, warmup_steps=1)
    train_bc(policy, sampler(policy, data), options, log=lambda m, s: None, extension=adapter.extension)
