"""Averaged weights: the mean over the last steps, where they are used, and that they survive a kill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eva_rl.adapters import METHODS, load_policy, save_adapted_policy
from eva_rl.configs.algorithms import (
    BCAlgo,
    BCFirst,
    DistillAlgo,
    ODTAlgo,
    OnlineAlgo,
    ResidualAlgo,
    check_method,
)
from eva_rl.data import Trajectories
from eva_rl.errors import UserError
from eva_rl.training.averaging import WeightAverage
from eva_rl.training.bc import BCOptions, train_bc
from eva_rl.training.checkpoint import Checkpoints
from tests.adapters.making import attached, sampler, usual_first

OPTIONS = BCOptions(updates=8, batch_size=8, warmup_steps=1, log_every=1)
LAST = 4
"""Steps that count with ``ema=0.5``."""


class KilledError(Exception):
    """The process died."""


def trained(
    data: Trajectories, options: BCOptions, folder: Path | None = None, die_at: int = -1, method: str = "lora"
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The trained parameters at the end, and those that each evaluation saw."""
    torch.manual_seed(0)
    policy, adapter = attached(method, data)
    own = {name: p for name, p in policy.network.named_parameters() if p.requires_grad}
    seen: list[dict[str, Tensor]] = []

    def look(update: int) -> Mapping[str, float]:
        seen.append({name: p.detach().clone() for name, p in own.items()})
        return {}

    def log(metrics: object, update: int) -> None:
        if update == die_at:
            raise KilledError

    checkpoints = None if folder is None else Checkpoints(folder, 1)
    train_bc(
        policy,
        sampler(policy, data),
        options,
        log=log,
        evaluate=look,
        eval_every=1,
        checkpoints=checkpoints,
        extension=adapter.extension,
    )
    return {name: p.detach().clone() for name, p in own.items()}, seen


def test_what_is_kept_is_the_mean_over_the_last_steps(reach_demonstrations: Trajectories) -> None:
    last, steps = trained(reach_demonstrations, OPTIONS)
    averaged, seen = trained(reach_demonstrations, replace(OPTIONS, ema=0.5))
    counted = [*steps[-(LAST - 1) :], last]
    for name, value in averaged.items():
        wanted = torch.stack([step[name] for step in counted]).double().mean(0)
        torch.testing.assert_close(value.double(), wanted, atol=1e-7, rtol=1e-5)
        assert torch.equal(seen[LAST - 1][name], steps[LAST - 1][name]), "before that, evaluation sees the parameters"
        first_two = torch.stack([step[name] for step in counted[:2]]).double().mean(0)
        torch.testing.assert_close(seen[LAST + 1][name].double(), first_two, atol=1e-7, rtol=1e-5)
    assert any(not torch.equal(averaged[name], last[name]) for name in last), "the last step is not the mean"


@pytest.mark.parametrize("die_at", usual_first((3, 6, 8), (8,)))
def test_resumed_equals_uninterrupted(die_at: int, tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    """Killed before the average begins, in its midst, and after the last step is logged."""
    options = replace(OPTIONS, ema=0.5)
    whole, _ = trained(reach_demonstrations, options, tmp_path / "whole")
    with pytest.raises(KilledError):
        trained(reach_demonstrations, options, tmp_path / "parts", die_at)
    resumed, _ = trained(reach_demonstrations, options, tmp_path / "parts")
    again, _ = trained(reach_demonstrations, options, tmp_path / "parts")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
        assert torch.equal(value, again[name]), "also where nothing is left to do"


@pytest.mark.parametrize("method", ["pissa", "adalora", "dora", "full"])
def test_saved_policies_act_as_the_mean_does(method: str, tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    policy, adapter = attached(method, reach_demonstrations)
    draw = sampler(policy, reach_demonstrations)
    train_bc(policy, draw, replace(OPTIONS, ema=0.5), log=lambda m, s: None, extension=adapter.extension)
    save_adapted_policy(tmp_path / "policy", policy, adapter, "card")
    batch = draw.sample(16, 7)
    torch.testing.assert_close(
        load_policy(tmp_path / "policy").network(batch), policy.network(batch), atol=1e-5, rtol=0
    )


def test_averaging_while_adalora_prunes_is_refused() -> None:
    check_method(BCAlgo(ema=0.5), METHODS["adalora"])
    check_method(BCAlgo(ema=1.0), METHODS["lora"])
    with pytest.raises(UserError, match=r"algo.ema=0.6.*prunes until step 50 of 100.*at most 0.5"):
        check_method(BCAlgo(ema=0.6), METHODS["adalora"])


@pytest.mark.parametrize(
    ("algo", "message"),
    [
        (ODTAlgo(bc=BCFirst(updates=20, ema=0.2)), r"algo.bc.ema=0.2 averages from gradient step 17 on.*at most 0\."),
        (
            ResidualAlgo(distill=DistillAlgo(updates=500, ema=0.5)),
            r"algo.distill.ema=0.5 .* step 251 on.*until step 1250 of 2500.*at most 0\.",
        ),
        (
            ResidualAlgo(bc=BCFirst(updates=900), distill=DistillAlgo(updates=1000, rounds=0, ema=0.96)),
            r"algo.distill.ema=0.96 averages from gradient step 941 on.*until step 950 of 1900.*at most 0.95\.",
        ),
    ],
)
def test_what_is_averaged_lies_after_all_pruning(algo: OnlineAlgo, message: str) -> None:
    """Pruning goes by the gradient steps of the whole training: the last part of a cloning may lie in its midst."""
    with pytest.raises(UserError, match=message):
        check_method(algo, METHODS["adalora"])
    check_method(algo, METHODS["lora"])
    check_method(ResidualAlgo(distill=DistillAlgo(rounds=0, ema=0.5)), METHODS["adalora"])


def test_adalora_needs_gradient_steps_to_prune_in() -> None:
    """It was found out when demonstrations were collected and the policy evaluated, in words of Python."""
    for algo, key in [
        (BCAlgo(updates=2), "algo.updates"),
        (ResidualAlgo(distill=DistillAlgo(updates=1, rounds=1)), "algo.distill.updates"),
        (ODTAlgo(env_steps=10, updates_per_iteration=2), "algo.env_steps"),
    ]:
        with pytest.raises(UserError, match=f"takes 2; expected at least 3. Raise {key}, or use adapter=lora"):
            check_method(algo, METHODS["adalora"])


def test_nothing_is_averaged_where_no_step_counts() -> None:
    parameter = nn.Parameter(torch.ones(2))
    average = WeightAverage({"w": parameter}, first=5)
    average.add(4)
    with average.applied():
        assert torch.equal(parameter, torch.ones(2))
    with torch.no_grad():
        parameter.fill_(3.0)
    average.take()
    assert torch.equal(parameter, torch.full((2,), 3.0))
