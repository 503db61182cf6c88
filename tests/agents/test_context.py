"""Cached rollouts against a recomputation of the same windows, built here from what went in and came out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from numpy.typing import NDArray

from eva_rl.agents import DecisionTransformer, DecisionTransformerConfig, DecisionTransformerPolicy
from eva_rl.agents.context import Acting, RolloutContext
from eva_rl.agents.decision_transformer import TOKEN_ORDERS
from eva_rl.agents.policy import Conditioning
from eva_rl.agents.static_cache import static_step
from eva_rl.batch import InputScaling, WindowBatch
from eva_rl.errors import UserError
from tests.adapters.making import usual_first
from tests.conftest import make_policy as small_policy

OBS, ACT, TARGET, SCALE = 5, 2, 30.0, 10.0
LENGTHS = (200, 37, 61, 5)
"""Env steps of every episode of each environment: ends fall anywhere in a cache, and one never does."""
CONTEXTS = usual_first((1, 2, 7, 8), (1, 7))


def make_policy(context_length: int, order: tuple[str, ...] = TOKEN_ORDERS[0]) -> DecisionTransformerPolicy:
    torch.manual_seed(3)
    config = DecisionTransformerConfig(
        OBS, ACT, 32, 2, 2, context_length=context_length, max_timestep=150, token_order=order
    )
    network = DecisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    scaling = InputScaling.create([0.5] * OBS, [2.0] * OBS, SCALE, [-2.0] * ACT, [1.0] * ACT)
    return DecisionTransformerPolicy(network, scaling, Conditioning(TARGET))


@dataclass
class Recording:
    """One environment's inputs and outputs, a row a step."""

    observations: NDArray[np.float32]
    rewards: NDArray[np.float32]
    actions: NDArray[np.float32]
    starts: NDArray[np.bool_]
    visible: list[int]


def play(
    policy: DecisionTransformerPolicy, num_steps: int = 200, before: Callable[[int], object] = lambda t: None
) -> list[Recording]:
    """Act on random observations and rewards in environments whose episodes have different lengths."""
    rng, n = np.random.default_rng(0), len(LENGTHS)
    observations = rng.normal(size=(num_steps, n, OBS)).astype(np.float32)
    rewards = rng.normal(size=(num_steps + 1, n)).astype(np.float32)
    starts = np.array([[t % length == 0 for length in LENGTHS] for t in range(num_steps)])
    policy.reset(["x"] * n)
    actions, visible = [], []
    for t in range(num_steps):
        before(t)
        actions.append(policy.act(observations[t], rewards[t], starts[t]))
        assert policy._context is not None
        visible.append(policy._context.num_visible_steps)
    acted = np.stack(actions)
    return [Recording(observations[:, i], rewards[:, i], acted[:, i], starts[:, i], visible) for i in range(n)]


def window_at(record: Recording, t: int, num_steps: int, policy: DecisionTransformerPolicy) -> WindowBatch:
    """The window that ends at step t, unpadded, from first principles."""
    begin = max(i for i in range(t + 1) if record.starts[i])
    first = max(begin, t - num_steps + 1)
    to_go = [(TARGET - record.rewards[begin + 1 : k + 1].sum()) / SCALE for k in range(first, t + 1)]
    actions = policy.scaling.actions(torch.from_numpy(record.actions[first : t + 1]))
    actions[-1] = 0
    rewards = np.append(record.rewards[first + 1 : t + 1], 0.0) / SCALE
    return WindowBatch(
        observations=policy.scaling.observations(torch.from_numpy(record.observations[first : t + 1]))[None],
        actions=actions[None],
        returns_to_go=torch.tensor(np.array(to_go), dtype=torch.float32)[None, :, None],
        timesteps=torch.arange(first - begin, t - begin + 1)[None],
        rewards=torch.tensor(rewards, dtype=torch.float32)[None, :, None],
    )


@torch.no_grad()
def largest_difference(policy: DecisionTransformerPolicy, records: list[Recording], full: bool = False) -> float:
    """Between the recorded actions and the network's own on each step's window, over all steps."""
    T, by_length = policy.network.config.context_length, defaultdict[int, list[tuple[WindowBatch, torch.Tensor]]](list)
    for record in records:
        for t, action in enumerate(record.actions):
            window = window_at(record, t, T if full else record.visible[t], policy)
            by_length[window.timesteps.shape[1]].append((window, torch.from_numpy(action)))
    worst = 0.0
    for pairs in by_length.values():  # all windows of a length at once: a call each takes ten times as long
        windows, actions = zip(*pairs, strict=True)
        joined = {name: torch.cat([w.tensors()[name] for w in windows]) for name in windows[0].tensors()}
        own = policy.scaling.raw_actions(policy.network(WindowBatch(**joined))[:, -1])
        worst = max(worst, float((own - torch.stack(actions)).abs().max()))
    return worst


@pytest.mark.parametrize("order", TOKEN_ORDERS)
@pytest.mark.parametrize("context_length", CONTEXTS)
def test_cached_actions_are_the_networks_own_on_the_same_windows(context_length: int, order: tuple[str, ...]) -> None:
    policy = make_policy(context_length, order)
    records = play(policy)
    assert largest_difference(policy, records) < 1e-5
    half = max(1, context_length // 2)
    assert set(records[0].visible[context_length:]) == set(range(half, context_length + 1))


@pytest.mark.parametrize("order", TOKEN_ORDERS)
def test_full_windows_are_the_networks_own(order: tuple[str, ...]) -> None:
    policy = make_policy(6, order)
    policy.window = "full"
    records = play(policy, 80)
    assert largest_difference(policy, records, full=True) < 1e-5


@pytest.mark.parametrize("order", TOKEN_ORDERS)
@pytest.mark.parametrize("context_length", CONTEXTS)
def test_static_shapes_give_the_same_actions(context_length: int, order: tuple[str, ...]) -> None:
    """Across episode ends and different lengths; the memory is that of an earlier use, and held a NaN."""
    policy = make_policy(context_length, order)
    policy.window = "static"
    play(policy, 3)
    assert policy._context is not None
    memory = policy._context._memory
    assert memory is not None
    memory.keys[0].fill_(np.nan)
    records = play(policy)
    assert policy._context._memory is memory
    assert largest_difference(policy, records) < 1e-5
    assert set(records[0].visible[context_length:]) == set(range(max(1, context_length // 2), context_length + 1))


def test_bfloat16_acts_nearly_alike() -> None:
    exact, mixed = make_policy(8), make_policy(8)
    mixed.acting = Acting(precision="bfloat16")
    differences = [np.abs(a.actions - b.actions) for a, b in zip(play(exact, 30), play(mixed, 30), strict=True)]
    assert 0 < np.mean(differences) < 0.1


@pytest.mark.slow
def test_a_static_step_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    backend = torch._dynamo.testing.CompileCounter()
    step = torch.compile(static_step, backend=backend, dynamic=False, fullgraph=True)
    monkeypatch.setattr("eva_rl.agents.context.compiled_step", lambda mode: step)
    policy = make_policy(8)
    policy.acting = Acting(compile="default")
    records = play(policy)
    assert backend.frame_count == 1, "no shape, mask or length makes another graph"
    assert largest_difference(policy, records) < 1e-5
    play(policy, 20)
    assert backend.frame_count == 1, "nor does another evaluation"


def test_the_comparison_sees_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault that a cache can have makes the recomputation differ, so equality above means something."""
    policy = make_policy(8)

    def looks_into_the_previous_episode(self: RolloutContext, num_steps: int) -> bool:
        return True

    with monkeypatch.context() as patch:
        patch.setattr(RolloutContext, "_all_reach", looks_into_the_previous_episode)
        assert largest_difference(policy, play(policy, 60)) > 1e-2

    def stale(self: RolloutContext, actions: torch.Tensor) -> None:
        """The cache keeps the zero that stood in for the action before it was taken."""

    with monkeypatch.context() as patch:
        patch.setattr(RolloutContext, "acted", stale)
        assert largest_difference(policy, play(policy, 60)) > 1e-2

    records = play(policy, 60)
    shorter = [replace(record, visible=[max(1, v - 1) for v in record.visible]) for record in records]
    assert largest_difference(policy, shorter) > 1e-3


def test_the_return_to_go_follows_the_rewards_and_the_episode() -> None:
    policy = make_policy(4)
    policy.reset(["x"])
    context = policy._context
    assert context is not None
    seen = []
    for reward, start in ((9.0, True), (5.0, False), (1.0, False), (7.0, True), (2.0, False)):
        policy.act(np.zeros((1, OBS), np.float32), np.array([reward], np.float32), np.array([start]))
        seen.append(float(context._returns_to_go[0, context._end - 1, 0]) * SCALE)
    assert seen == pytest.approx([30, 25, 24, 30, 28])


def test_plain_tensors_act_as_the_modules_do() -> None:
    """The decoder of a CPU against the same policy through its modules, to rounding."""
    decoded, called = make_policy(8), make_policy(8)
    called.network.action_head.register_forward_hook(lambda *_: None)  # somebody listens: modules are called
    expected, found = play(called), play(decoded)
    assert called._context is not None
    assert decoded._context is not None
    assert called._context.decoder is None
    assert decoded._context.decoder is not None
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one.actions, other.actions, atol=1e-6)


@pytest.mark.parametrize("module", ["action_head", "blocks.1.mlp.up_proj"])
def test_a_hook_that_comes_while_a_policy_acts_is_called(module: str) -> None:
    """Listening after reset() heard nothing: plain tensors call no module."""
    hooked, calls = make_policy(8), list[int]()

    def listen(t: int) -> None:
        if t == 11:
            hooked.network.get_submodule(module).register_forward_hook(lambda *_: calls.append(t))

    expected, found = play(make_policy(8), 40), play(hooked, 40, listen)
    assert len(calls) == 40 - 11
    for one, other in zip(expected, found, strict=True):
        assert one.visible == other.visible
        np.testing.assert_allclose(one.actions, other.actions, atol=1e-6)


class LowRank(torch.nn.Module):
    """A linear layer with an adapter, as PEFT wraps one."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.base = base.in_features, base
        generator = torch.Generator().manual_seed(1)
        self.a = torch.nn.Parameter(torch.randn(4, base.in_features, generator=generator) * 0.2)
        self.b = torch.nn.Parameter(torch.randn(base.out_features, 4, generator=generator) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + x @ self.a.T @ self.b.T
        return out


class Curved(LowRank):
    """No matrix can stand for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.tanh(x))


def test_an_adapter_is_folded_into_a_copy_and_anything_else_is_called() -> None:
    plain, adapted, curved = make_policy(8), make_policy(8), make_policy(8)
    for policy, kind in ((adapted, LowRank), (curved, Curved)):
        for block in policy.network.blocks:
            block.attention.q_proj, block.mlp.up_proj = kind(block.attention.q_proj), kind(block.mlp.up_proj)
    before = {name: value.clone() for name, value in adapted.network.state_dict().items()}
    records = play(adapted, 60)
    assert adapted._context is not None
    assert adapted._context.decoder is not None
    assert largest_difference(adapted, records) < 1e-5
    assert np.abs(records[0].actions - play(plain, 60)[0].actions).max() > 1e-2
    assert all(torch.equal(before[name], value) for name, value in adapted.network.state_dict().items())
    assert all(parameter.requires_grad for parameter in adapted.network.parameters())
    records = play(curved, 60)
    assert curved._context is not None
    assert curved._context.decoder is None
    assert largest_difference(curved, records) < 1e-5


def another_parameter(mlp: Any) -> None:
    mlp.up_proj.weight = torch.nn.Parameter(-mlp.up_proj.weight.detach())


def another_module(mlp: Any) -> None:
    mlp.up_proj = LowRank(mlp.up_proj)


def other_numbers(mlp: Any) -> None:
    with torch.no_grad():
        mlp.up_proj.weight.neg_()


@pytest.mark.parametrize("change", [another_parameter, another_module, other_numbers])
def test_the_decoder_sees_what_changes_between_two_steps(change: Callable[[Any], None]) -> None:
    policy, unchanged = make_policy(8), make_policy(8)
    steps = [(np.full((1, OBS), 0.3 * step, np.float32), np.zeros(1, np.float32)) for step in range(3)]
    found = []
    for one in (policy, unchanged):
        one.reset(["x"])
        acted = [one.act(*step, np.array([index == 0])) for index, step in enumerate(steps[:2])]
        if one is policy:
            change(one.network.blocks[-1].mlp)
        found.append([*acted, one.act(*steps[2], np.array([False]))])
    assert policy._context is not None
    assert policy._context.decoder is not None
    np.testing.assert_array_equal(found[0][:2], found[1][:2])
    assert np.abs(found[0][2] - found[1][2]).max() > 1e-3


def test_two_groups_have_histories_of_their_own() -> None:
    policy, alone = make_policy(4), make_policy(4)
    second = policy.with_own_history()
    policy.reset(["x"])
    second.reset(["x", "x"])
    alone.reset(["x"])
    rng = np.random.default_rng(0)
    for step in range(9):
        observation, start = rng.normal(size=(1, OBS)).astype(np.float32), np.array([step == 0])
        found = policy.act(observation, np.ones(1, np.float32), start)
        second.act(np.zeros((2, OBS), np.float32), np.zeros(2, np.float32), np.full(2, step == 0))
        np.testing.assert_array_equal(found, alone.act(observation, np.ones(1, np.float32), start))
    assert policy.with_own_history() is second
    policy.set_target_return(7.0, "x")
    assert policy.with_own_history().conditioning.of("x") == 7


@pytest.mark.parametrize("window", ["cached", "full"])
def test_weights_that_change_between_steps_act_at_once(window: Literal["cached", "full"]) -> None:
    """A policy that learns online acts by what it has learned, without a reset."""
    policy = small_policy()
    policy.window = window
    policy.reset(["metaworld/reach-v3"] * 2)
    observations, rewards = np.ones((2, 39), np.float32), np.zeros(2, np.float32)
    policy.act(observations, rewards, np.ones(2, bool))
    with torch.no_grad():
        for parameter in policy.network.action_head.parameters():
            parameter.zero_()
    assert not policy.act(observations, rewards, np.zeros(2, bool)).any()


def test_an_observation_that_is_not_finite_is_refused() -> None:
    """It would stay in the history that the next actions are chosen by."""
    policy = make_policy(4)
    policy.reset(["a", "b"])
    observations = np.zeros((2, OBS), np.float32)
    policy.act(observations, np.zeros(2, np.float32), np.ones(2, bool))
    observations[1, 3] = np.nan
    with pytest.raises(UserError, match=r"given nan as number 3 of environment 1's observation.*policy\.reset"):
        policy.act(observations, np.zeros(2, np.float32), np.zeros(2, bool))


def test_unknown_ways_to_act_are_refused() -> None:
    """They acted as the default does."""
    policy = make_policy(2)
    policy.window = "ful"  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"Unknown window 'ful'\. Did you mean 'full'\?"):
        policy.reset(["x"])
    with pytest.raises(UserError, match=r"Unknown precision 'bf16'\. .*bfloat16"):
        Acting("bf16")
    with pytest.raises(UserError, match="Unknown compile mode 'fast'"):
        Acting(compile="fast")


@pytest.mark.parametrize("window", ["cached", "full"])
def test_an_action_of_a_single_value_is_remembered_as_windows_show_it(window: Literal["cached", "full"]) -> None:
    """Training windows hold 0 there, and the policy remembered what it had put out."""
    policy = make_policy(4)
    policy.window, policy.scaling = (
        window,
        InputScaling.create([0.5] * OBS, [2.0] * OBS, SCALE, [-2.0, 0.3], [1.0, 0.3]),
    )
    policy.reset(["x"])
    raw = policy.act(np.ones((1, OBS), np.float32), np.zeros(1, np.float32), np.array([True]))
    assert policy._context is not None
    remembered = policy._context._actions[:, policy._context._end - 1]
    torch.testing.assert_close(remembered, policy.scaling.actions(torch.from_numpy(raw)), atol=1e-6, rtol=0)
    assert remembered[0, 1] == 0
    assert raw[0, 1] == np.float32(0.3)
