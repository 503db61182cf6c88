"""Directions from rollouts: the accumulators hear exactly what the policy saw while it acted."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv

from eva_rl import envs, eva
from eva_rl.adapters import Rollouts, compute_eva, second_moments, target_layers
from eva_rl.batch import WindowBatch
from eva_rl.data import Trajectories, WindowSampler
from eva_rl.errors import UserError
from eva_rl.eva import ActivationStatistics
from eva_rl.eva.options import StorageOptions
from tests.conftest import make_policy
from tests.envs.numbered import NumberedEpisodes

STEPS, NUM_ENVS, LAYER = 30, 3, "blocks.1.mlp.up_proj"


def rollouts() -> Rollouts:
    """Episodes of different lengths, so that some windows are padded while others are whole."""
    makers = [
        lambda i=i: NumberedEpisodes(envs.make_env("reach-v3", horizon=7 + 3 * i), 77 + i, NUM_ENVS)
        for i in range(NUM_ENVS)
    ]
    return Rollouts(DummyVecEnv(makers), ["metaworld/reach-v3"] * NUM_ENVS, STEPS)


def replayed(rows_of_padding: bool = False) -> torch.Tensor:
    """Second moment of a layer's input over the same windows, from a second pass with hooks of its own."""
    policy = make_policy()
    seen: list[WindowBatch] = []
    policy.window, policy.on_window = "full", seen.append
    acting = rollouts()
    policy.reset(acting.env_ids)
    observations, rewards, starts = acting.vec_env.reset(), np.zeros(NUM_ENVS, np.float32), np.ones(NUM_ENVS, bool)
    inputs: list[torch.Tensor] = []
    for _ in range(STEPS):
        actions = policy.act(observations, rewards, starts)
        observations, rewards, starts, _ = acting.vec_env.step(actions)
    policy.on_window = lambda windows: None  # whole windows again
    handle = policy.network.get_submodule(LAYER).register_forward_pre_hook(lambda m, x: inputs.append(x[0].detach()))
    fresh = rollouts()
    policy.reset(fresh.env_ids)
    observations, rewards, starts = fresh.vec_env.reset(), np.zeros(NUM_ENVS, np.float32), np.ones(NUM_ENVS, bool)
    for _ in range(STEPS):
        actions = policy.act(observations, rewards, starts)
        observations, rewards, starts, _ = fresh.vec_env.step(actions)
    handle.remove()
    rows = []
    for batch, x in zip(seen, inputs, strict=True):
        real = torch.ones(x.shape[:2], dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask
        rows.append(x.flatten(0, 1) if rows_of_padding else x[real])
    return torch.cat(rows).double()


def test_what_is_heard_is_what_the_policy_saw() -> None:
    policy = make_policy()
    result = compute_eva(policy, [LAYER], None, rollouts(), max_batches=4, keep_moments=True, rank=5, alpha=5.0)
    layer, rows = result.layers[LAYER], replayed()
    assert result.stopped == "data exhausted"
    assert layer.rows == len(rows)
    assert len(rows) < STEPS * NUM_ENVS * 6, "windows after a reset are shorter"
    values, vectors = torch.linalg.svd(rows, full_matrices=False)[1:]
    torch.testing.assert_close(
        layer.explained_variance_ratio[:5].double(), (values**2 / (values**2).sum())[:5], rtol=1e-3, atol=1e-6
    )
    captured = (layer.components.double() @ vectors[:5].T).square().sum() / 5
    assert captured > 0.999
    gain = (rows @ layer.components.double().T).square().sum(1).mean()
    assert eva.gain(layer.components, result.moments[LAYER]) == pytest.approx(float(gain), rel=1e-3)
    wrong = torch.linalg.svd(replayed(rows_of_padding=True))[1]
    assert abs(float((wrong**2 / (wrong**2).sum())[0]) / float(layer.explained_variance_ratio[0]) - 1) > 1e-3
    assert policy.window == "cached"
    assert policy.on_window is None
    assert all(p.requires_grad for p in policy.network.parameters())


def test_mixed_adds_both(reach_demonstrations: Trajectories) -> None:
    policy = make_policy()
    sampler = WindowSampler(reach_demonstrations, 6, policy.scaling)
    batches = lambda: (sampler.sample(8, step) for step in count())  # noqa: E731
    targets = target_layers(policy.network)
    acted = compute_eva(policy, targets, None, rollouts(), max_batches=3, rank=3)
    both = compute_eva(policy, targets, batches(), rollouts(), max_batches=3, rank=3)
    offline = sum(int(sampler.sample(8, step).timesteps.new_ones(8, 6).sum()) for step in range(3))
    real = sum(48 if (m := sampler.sample(8, s).attention_mask) is None else int(m.sum()) for s in range(3))
    assert real <= offline
    assert both.layers[LAYER].rows == acted.layers[LAYER].rows + real


def test_what_is_measured_is_measured_without_dropout(reach_demonstrations: Trajectories) -> None:
    """A network in training mode had its dropout in the second moments, and those of two passes differed."""
    trained, policy = make_policy(dropout=0.5), make_policy(dropout=0.5)
    trained.network.train()
    sampler = WindowSampler(reach_demonstrations, 6, policy.scaling)
    found = [
        [
            second_moments(one, [LAYER], [sampler.sample(8, 0)], None, max_batches=1)[LAYER],
            compute_eva(one, [LAYER], None, rollouts(), max_batches=1, rank=3).layers[LAYER].singular_values,
        ]
        for one in (trained, policy)
    ]
    for noisy, plain in zip(*found, strict=True):
        torch.testing.assert_close(noisy, plain)
    assert all(module.training for module in trained.network.modules())


@pytest.mark.slow
def test_rollouts_are_kept_as_batches_are() -> None:
    """With rollouts sketches had seed 0 whatever was asked for, and exact moments no limit."""
    made: list[StorageOptions] = []

    class Listening(ActivationStatistics):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            made.append(arguments[2])
            super().__init__(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eva_rl.adapters.eva_init.ActivationStatistics", Listening)
        compute_eva(make_policy(), [LAYER], None, rollouts(), max_batches=1, rank=3, seed=7, keep_moments=True)
    (storage,) = made
    assert (storage.method, storage.seed, storage.exact, storage.components) == ("auto", 7, True, 3)
    with pytest.raises(UserError, match="max_batches=0"):
        compute_eva(make_policy(), [LAYER], None, rollouts(), max_batches=0, rank=3)


@pytest.mark.parametrize("source", ["rollouts", "mixed"])
def test_sources_are_reachable_by_the_command(source: str, policy_folder, tmp_path) -> None:
    from eva_rl.finetune import command as finetune

    small = ["env=reach-v3", "data.episodes=2", "data.workers=1", "algo.updates=2", "eval.episodes=1", "threads=1"]
    small += ["env.horizon=20", "data.only_successes=false", f"adapter.eva.source={source}"]
    small += ["adapter.eva.rollout_envs=2", "adapter.eva.rollout_steps=25"]
    assert finetune.main([f"policy={policy_folder}", f"run_dir={tmp_path / 'run'}", *small]) == 0
    report = (tmp_path / "run" / "eva_report.json").read_text()
    assert f'"activation_source": "{source}"' in report
    assert {p.name for p in (tmp_path / "run" / "figures").iterdir()} >= {"eva_spectrum.png", "eva_ranks.png"}
