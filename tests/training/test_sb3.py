"""Stable-Baselines3's algorithms on history windows: what they see, what they keep, what they learn, how they go on."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback

from eva_rl import envs
from eva_rl.adapters import attach_adapter
from eva_rl.adapters.fused import unfuse
from eva_rl.errors import EnvironmentFailedError, UserError
from eva_rl.training.checkpoint import Checkpoints
from eva_rl.training.collector import TaskEnvs
from eva_rl.training.failures import NotFiniteError
from eva_rl.training.options import OffPolicyOptions, PPOOptions, SACOptions, SB3Options
from eva_rl.training.sb3 import make_model, train_sb3
from eva_rl.training.sb3.windows import HistoryWindows, WindowReplayBuffer
from tests.adapters.making import usual_first
from tests.conftest import make_policy
from tests.training.problems import Bandit, TwoSteps, make_learner, make_task, mean_return

ALGORITHMS = {"ppo": PPO, "sac": SAC, "td3": TD3}
SAC_FIRST = usual_first(ALGORITHMS, ("sac",))
OPTIONS: dict[str, type[SB3Options]] = {"ppo": PPOOptions, "sac": SACOptions, "td3": OffPolicyOptions}


class Counting(gym.Env[Any, Any]):
    """Observation (k, t) at step t of episode k, reward t + 1; ends at step 5, or is cut off at step 7 if k is odd."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, start: int) -> None:
        self.episode, self.t = start - 2, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.episode, self.t = self.episode + 2, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        odd = self.episode % 4 >= 2
        return np.array([self.episode, self.t], np.float32), float(self.t), self.t == 5 and not odd, self.t == 7, {}


def counting_env(context_length: int = 4) -> HistoryWindows:
    from stable_baselines3.common.vec_env import DummyVecEnv

    policy = make_learner(target=100.0, context_length=context_length)
    return HistoryWindows(DummyVecEnv([lambda: Counting(0), lambda: Counting(1)]), policy, "", 1.0)


@pytest.mark.parametrize("context_length", [4, 1])
@pytest.mark.parametrize("capacity", [400, 60])  # as much as is needed; a ring that turns several times
def test_replay_rebuilds_the_windows_that_were_shown(capacity: int, context_length: int) -> None:
    env, rng = counting_env(context_length), np.random.default_rng(0)
    assert isinstance(env.observation_space, gym.spaces.Box)
    assert isinstance(env.action_space, gym.spaces.Box)
    buffer = WindowReplayBuffer(capacity, env.observation_space, env.action_space, "cpu", n_envs=2)
    shown: dict[tuple[int, int], Any] = {}
    before = env.reset()
    for _ in range(100):
        actions = rng.uniform(-1, 1, (2, 1)).astype(np.float32)
        after, rewards, dones, infos = env.step(actions)
        following = after.copy()
        for i in np.flatnonzero(dones):
            following[i] = infos[i]["terminal_observation"]
        for i in range(2):
            cut = infos[i].get("TimeLimit.truncated", False)
            shown[buffer.pos, i] = (before[i], actions[i], following[i], float(dones[i] and not cut), rewards[i])
        buffer.add(before, following, actions, rewards, dones, infos)
        before = after
    assert {bool(value[3]) for value in shown.values()} == {True, False}
    steps = (buffer._oldest() + np.arange(buffer.size())) % buffer.buffer_size
    rows, columns = np.repeat(steps, 2), np.tile([0, 1], len(steps))
    found = buffer.samples_at(rows, columns)
    reach = 4  # windows near the oldest step are cut short there
    for k, place in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        window, action, after_window, terminal, reward = shown[place]
        if buffer.full and (place[0] - buffer._oldest()) % buffer.buffer_size < reach:
            continue
        np.testing.assert_array_equal(found.observations[k], window)
        np.testing.assert_array_equal(found.next_observations[k], after_window)
        np.testing.assert_array_equal(found.actions[k], action)
        assert (found.dones[k].item(), found.rewards[k].item()) == (terminal, reward)


def test_the_return_to_go_is_a_function_of_the_history() -> None:
    env = counting_env()
    window = env.reset()
    for step in range(1, 5):
        window, *_ = env.step(np.zeros((2, 1), np.float32))
        obtained = step * (step + 1) / 2
        batch = env.layout.decode(torch.from_numpy(np.asarray(window)))
        assert batch.returns_to_go[0, -1, 0].item() == pytest.approx(100 - obtained)
        assert batch.timesteps[0, -1].item() == step


def test_steps_without_a_successor_are_not_drawn() -> None:
    env = counting_env()
    buffer = WindowReplayBuffer(400, env.observation_space, env.action_space, "cpu", n_envs=2)  # type: ignore[arg-type]
    before = env.reset()
    for step in range(12):
        after, rewards, dones, infos = env.step(np.zeros((2, 1), np.float32))
        buffer.add(np.asarray(before), np.asarray(after), np.zeros((2, 1)), rewards, dones, infos)
        before = after
        if step == 3:
            buffer.truncate_episodes()
            before = env.reset()
    drawn = buffer.sample(300).observations[:, -1]
    assert {tuple(row) for row in drawn[:, :2].int().tolist()}.isdisjoint({(0, 3), (1, 3)})


def test_the_step_that_ends_an_episode_is_drawn_where_a_stretch_ends_with_it() -> None:
    """Its last observation is known: a reward at the very end would never be learned from."""
    env = counting_env()
    buffer = WindowReplayBuffer(400, env.observation_space, env.action_space, "cpu", n_envs=2)  # type: ignore[arg-type]
    before = env.reset()
    for step in range(9):
        after, rewards, dones, infos = env.step(np.zeros((2, 1), np.float32))
        following = np.array(after)
        for index in np.flatnonzero(dones):
            following[index] = infos[index]["terminal_observation"]
        buffer.add(np.asarray(before), following, np.zeros((2, 1)), rewards, dones, infos)
        before = after
        if step == 4:
            assert dones.all()
            buffer.truncate_episodes()
            before = env.reset()
    drawn = buffer.sample(300)
    last = drawn.dones[:, 0] == 1
    assert {tuple(row) for row in drawn.observations[last][:, -1, :2].int().tolist()} == {(0, 4), (1, 4)}
    assert bool((drawn.rewards[last] == 5).all())


def test_the_newest_step_is_drawn_where_no_other_has_a_successor() -> None:
    env = counting_env()
    buffer = WindowReplayBuffer(400, env.observation_space, env.action_space, "cpu", n_envs=2)  # type: ignore[arg-type]
    for steps in range(1, 4):  # each stretch of learning is one env step long
        before = np.asarray(env.reset())
        after, rewards, dones, infos = env.step(np.full((2, 1), 0.5))
        buffer.add(before, np.asarray(after), np.full((2, 1), 0.5), rewards, dones, infos)
        drawn = buffer.sample(20)
        assert buffer.size() == steps
        shown = {tuple(window.ravel()) for window in before}
        assert {tuple(window.ravel()) for window in drawn.observations.numpy()} == shown
        assert {tuple(window.ravel()) for window in drawn.next_observations.numpy()} == {
            tuple(window.ravel()) for window in np.asarray(after)
        }
        buffer.truncate_episodes()


@pytest.mark.parametrize("eval_every", [0, 2])
def test_it_learns_from_the_very_first_step(eval_every: int) -> None:
    """With windows of one step, too; and where every stretch between two evaluations is one step."""
    chosen = SACOptions(
        env_steps=8, learning_starts=0, train_freq=1, gradient_steps=1, batch_size=4, eval_every=eval_every
    )
    task = make_task(TwoSteps, 2)
    model = make_model(make_learner(context_length=1), task, chosen)
    assert train_sb3(model, task, chosen, log=lambda *_: None)["updates"] == 4


@pytest.mark.parametrize("name", ALGORITHMS)
def test_at_first_it_acts_as_the_decision_transformer_does(name: str) -> None:
    policy, same = make_policy(11, 3), make_policy(11, 3)
    same.window = "full"
    task = TaskEnvs(envs.make_vec_env("mujoco/hopper", 2, horizon=12), "Hopper-v5", False)
    model = make_model(policy, task, OPTIONS[name](env_steps=100))
    env, own = model.get_env(), envs.make_vec_env("mujoco/hopper", 2, horizon=12)
    assert env is not None
    for vec_env in (env, own):
        vec_env.seed(3)
    windows, observations = env.reset(), own.reset()
    same.reset(["Hopper-v5"] * 2)
    rewards, starts = np.zeros(2, np.float32), np.ones(2, bool)
    for _ in range(30):  # beyond ends of episodes
        expected = same.act(np.asarray(observations), rewards, starts)
        actions, _ = model.predict(windows, deterministic=True)  # type: ignore[arg-type]
        np.testing.assert_allclose(actions, expected, atol=2e-6)
        windows, *_ = env.step(actions)
        observations, rewards, starts, _ = own.step(expected)
    task.vec_env.close()
    own.close()


def test_sac_refuses_a_policy_whose_actions_pass_through_no_tanh() -> None:
    """It would execute, and improve, tanh(mu), where the policy is evaluated with clamp(mu)."""
    policy, task = make_policy(action_tanh=False), make_task(Bandit, 1)
    with pytest.raises(UserError, match=r"action_tanh=false.*Use algo=td3 or ppo\."):
        make_model(policy, task, SACOptions(env_steps=100))
    for name in ("td3", "ppo"):
        make_model(make_policy(2, 1, action_tanh=False), task, OPTIONS[name](env_steps=100))


def options(name: str, env_steps: int, **others: Any) -> SB3Options:
    fast = {"ppo": {"rollout_steps": 20, "epochs": 10, "initial_std": 0.6, "target_kl": None}}
    shared = {"initial_std": 0.7, "learning_starts": 80, "train_freq": 4, "gradient_steps": 16, "tau": 0.05}
    chosen: dict[str, Any] = {"eval_every": 0, "learning_rate": 3e-3, "critic_hidden_size": 32}
    return OPTIONS[name](env_steps=env_steps, **chosen | fast.get(name, shared) | others)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Bandit, TwoSteps])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_small_problems_are_solved(name: str, kind: type[gym.Env[Any, Any]]) -> None:
    policy = make_learner()
    before = mean_return(policy, kind)
    task = make_task(kind)
    model = make_model(policy, task, options(name, 2000))
    train_sb3(model, task, options(name, 2000), log=lambda *_: None)
    assert before < kind.solved < mean_return(policy, kind)  # type: ignore[attr-defined]


class StopError(Exception):
    """The run is over."""


def run(
    name: str,
    folder: Path | None,
    *,
    stop: bool = False,
    learning_starts: int = 20,
    callback: BaseCallback | None = None,
) -> tuple[Any, list[tuple[int, dict[str, float]]]]:
    task = TaskEnvs(envs.make_vec_env("mujoco/hopper", 2, horizon=15), "Hopper-v5", False)
    few = {"epochs": 2} if name == "ppo" else {"learning_starts": learning_starts, "gradient_steps": 2}
    chosen = options(name, 160, eval_every=80, batch_size=8, **few)
    model, record = make_model(make_policy(11, 3, hidden_size=16, num_layers=1), task, chosen, seed=2), []

    def log(metrics: Mapping[str, float], step: int) -> None:
        if stop and step > 80:
            raise StopError
        record.append((step, {k: v for k, v in metrics.items() if not k.startswith("time/")}))

    with contextlib.suppress(StopError):
        checkpoints = Checkpoints(folder) if folder else None
        more: Any = {"checkpoints": checkpoints, "callback": callback}
        train_sb3(model, task, chosen, log=log, evaluate=lambda step: {"x": step}, **more)
    task.vec_env.close()
    return model, record


@pytest.mark.parametrize("name", SAC_FIRST)
def test_a_resumed_run_ends_with_the_same_weights(name: str, tmp_path: Path) -> None:
    expected, rows = run(name, None)
    run(name, tmp_path, stop=True)
    found, later = run(name, tmp_path)
    assert later
    for (step, metrics), (expected_step, like) in zip(later, rows[-len(later) :], strict=True):
        assert step == expected_step
        found_means, means = (
            {key: value for key, value in row.items() if key.startswith("rollout/")} for row in (metrics, like)
        )
        assert found_means == pytest.approx(means, rel=1e-6), "over the same recent episodes"
    assert found.num_timesteps == expected.num_timesteps == 160
    assert getattr(found, "_episode_num", 0) == getattr(expected, "_episode_num", 0), "they decide when it logs"
    for key, value in expected.policy.state_dict().items():
        assert torch.equal(value, found.policy.state_dict()[key]), key


def test_td3_s_target_network_follows_where_an_adapter_is_trained() -> None:
    """Fused layers kept what they had composed first: Stable-Baselines3 averages parameters past their versions."""
    policy, task = make_learner(), make_task(TwoSteps, 2)
    attach_adapter(policy, "lora", rank=2)
    chosen = options("td3", 200, batch_size=8, learning_starts=20, learning_rate=1e-2)
    model = make_model(policy, task, chosen)
    windows = torch.rand(5, *model.observation_space.shape)  # type: ignore[misc]
    target: Any = model.policy.actor_target  # type: ignore[union-attr]
    with torch.no_grad():
        before = target(windows)
    train_sb3(model, task, chosen, log=lambda *_: None)
    with torch.no_grad():
        after, anew = target(windows), copy.deepcopy(target)
        unfuse(anew)
        assert torch.allclose(after, anew(windows), atol=1e-6)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", SAC_FIRST)
def test_a_run_that_diverges_says_so_and_keeps_its_last_checkpoint(name: str, tmp_path: Path) -> None:
    """Between two checkpoints the actions become NaN, which PyTorch or the environment refuses."""

    class Diverging(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps > 100:
                for parameter in self.model.policy.parameters():
                    parameter.data.fill_(np.nan)
            return True

    run(name, tmp_path, stop=True)
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    with pytest.raises(NotFiniteError, match=r"the parameter .* is not finite"):
        run(name, tmp_path, callback=Diverging())
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


@pytest.mark.parametrize("name", ["sac", "td3"])
def test_a_resumed_run_goes_on_with_its_random_first_actions(name: str, tmp_path: Path) -> None:
    """Where it was interrupted before the first gradient step; it would act as in the stretch before."""
    expected, _ = run(name, None, learning_starts=150)
    run(name, tmp_path, stop=True, learning_starts=150)
    found, _ = run(name, tmp_path, learning_starts=150)
    np.testing.assert_array_equal(found.replay_buffer.actions, expected.replay_buffer.actions)


@pytest.mark.parametrize("name", SAC_FIRST)
def test_saved_models_callbacks_and_the_logger_are_stable_baselines3_s(name: str, tmp_path: Path) -> None:
    class Steps(BaseCallback):
        count = 0

        def _on_step(self) -> bool:
            self.count += 1
            return True

    task = TaskEnvs(envs.make_vec_env("mujoco/hopper", 2, horizon=10), "Hopper-v5", False)
    few = {"epochs": 2} if name == "ppo" else {"learning_starts": 20, "gradient_steps": 2}
    chosen, keys, steps = options(name, 160, batch_size=8, **few), set(), Steps()
    model = make_model(make_policy(11, 3, hidden_size=16, num_layers=1), task, chosen)
    train_sb3(model, task, chosen, log=lambda metrics, _: keys.update(metrics), callback=steps)
    assert steps.count == 80
    assert {"rollout/ep_rew_mean", "time/fps", "time/total_timesteps", "train/learning_rate"} <= keys
    assert {"time/env_steps", "time/env_steps_played"} <= keys, "as in the other algorithms"
    model.save(tmp_path / "model")
    loaded = ALGORITHMS[name].load(tmp_path / "model", device="cpu")
    windows: Any = model.get_env().reset()  # type: ignore[union-attr]
    np.testing.assert_array_equal(
        loaded.predict(windows, deterministic=True)[0], model.predict(windows, deterministic=True)[0]
    )
    task.vec_env.close()


def test_the_first_entropy_weight_is_of_a_reward_of_one_an_env_step() -> None:
    """Rewards are divided by the scale of returns: the bonus was twenty times a Hopper's reward."""
    task = TaskEnvs(envs.make_vec_env("mujoco/hopper", 2, horizon=500), "Hopper-v5", False, horizon=500)
    model = make_model(make_policy(11, 3, hidden_size=16, num_layers=1), task, SACOptions(env_steps=100, entropy=0.2))
    assert isinstance(model, SAC)
    assert model.log_ent_coef is not None
    assert float(model.log_ent_coef.detach().exp()) == pytest.approx(0.2 / 500)
    task.vec_env.close()


def test_ppo_compares_the_policy_with_itself_whatever_its_dropout() -> None:
    """With dropout in the update alone, the first likelihood ratios would be far from 1, and end it."""
    policy, task, rows = make_learner(), make_task(TwoSteps, 2), list[Mapping[str, float]]()
    attach_adapter(policy, "lora", rank=2, dropout=0.5)
    chosen = options("ppo", 80, learning_rate=1e-12, batch_size=10, epochs=2)
    found = train_sb3(make_model(policy, task, chosen), task, chosen, log=lambda metrics, _: rows.append(metrics))
    divergences = [row["train/approx_kl"] for row in rows if "train/approx_kl" in row]
    assert len(divergences) == 1, "Stable-Baselines3 writes those of an update with the rollout after it"
    assert max(map(abs, divergences)) < 1e-6
    assert found["updates"] == 16, "two rollouts, two epochs each of 40 env steps in batches of 10"


@pytest.mark.parametrize("name", SAC_FIRST)
def test_what_an_environment_kept_from_being_validated_is_validated_after_the_resume(name: str, tmp_path: Path) -> None:
    """The curve lacked a point."""
    few = {"rollout_steps": 10} if name == "ppo" else {"train_freq": 5, "gradient_steps": 1}
    chosen, played = options(name, 160, eval_every=40, batch_size=8, **few), list[int]()

    def train(fails_at: int) -> None:
        def evaluate(step: int) -> dict[str, float]:
            if step == fails_at:
                raise EnvironmentFailedError("two steps", "in reset()", "the server is gone")
            played.append(step)
            return {}

        task = make_task(TwoSteps, 4)
        model = make_model(make_learner(), task, chosen)
        train_sb3(model, task, chosen, log=lambda *_: None, evaluate=evaluate, checkpoints=Checkpoints(tmp_path))

    for step in (40, 120):
        with pytest.raises(EnvironmentFailedError, match="what was learned before is saved"):
            train(step)
    train(0)
    assert played == [40, 80, 120]


def test_episodes_are_longer_than_a_stretch_between_validations(caplog: pytest.LogCaptureFixture) -> None:
    task = TaskEnvs(envs.make_vec_env("mujoco/halfcheetah", 3, horizon=20), "HalfCheetah-v5", False, horizon=20)
    chosen = options("ppo", 120, eval_every=16, rollout_steps=5, epochs=1)
    model, rows, validated = make_model(make_policy(17, 6, hidden_size=16, num_layers=1), task, chosen), [], []

    def evaluate(step: int) -> dict[str, float]:
        validated.append(step)
        return {}

    with caplog.at_level("WARNING"):
        train_sb3(model, task, chosen, log=lambda metrics, _: rows.append(metrics), evaluate=evaluate)
    task.vec_env.close()
    assert validated == [75], "75 is the first whole rollout from 64 on, four times eval_every"
    assert any(row.get("rollout/ep_len_mean") == 20 for row in rows)
    assert "algo.eval_every=16 would cut off every episode: validated every 64 env steps" in caplog.text
