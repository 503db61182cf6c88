"""A policy under Stable-Baselines3's ``evaluate_policy`` and in a plain Gymnasium loop, on Hopper-v5."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import NormalizeReward
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from eva_rl.agents import Conditioning, DecisionTransformerPolicy, PredictAdapter
from eva_rl.agents.context import Window
from eva_rl.envs import make_vec_env
from eva_rl.errors import UserError
from eva_rl.rollouts.episodes import play_episodes
from tests.conftest import make_policy


def hopper_policy() -> DecisionTransformerPolicy:
    policy = make_policy(11, 3)
    policy.conditioning = Conditioning(400.0, {"Hopper-v5": 3600.0})
    return policy


def own_episodes(num_envs: int, episodes: int, window: Window = "cached") -> list[tuple[float, int]]:
    vec_env = make_vec_env("Hopper-v5", num_envs, seed=5)
    policy = hopper_policy()
    policy.window = window
    records = play_episodes(policy, vec_env, ["Hopper-v5"] * num_envs, episodes)
    vec_env.close()
    return [(r.episode_return, r.length) for r in records]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped")
def test_evaluate_policy_plays_the_same_episodes_as_we_do() -> None:
    policy = hopper_policy()
    policy.window = "full"  # contexts that grow depend on which episodes go on side by side
    adapter = PredictAdapter(policy, "Hopper-v5")
    vec_env = adapter.listen(make_vec_env("Hopper-v5", 3, seed=5))
    returns, lengths = evaluate_policy(adapter, vec_env, n_eval_episodes=6, return_episode_rewards=True)  # type: ignore[arg-type]
    vec_env.close()
    expected = sorted(own_episodes(3, 6, "full"))
    assert sorted(lengths) == sorted(length for _, length in expected)
    np.testing.assert_allclose(sorted(returns), [r for r, _ in expected], rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped")
def test_without_rewards_the_return_to_go_is_constant() -> None:
    policy = hopper_policy()
    adapter = PredictAdapter(policy, "Hopper-v5")
    vec_env = make_vec_env("Hopper-v5", 1, seed=5)
    evaluate_policy(adapter, vec_env, n_eval_episodes=1)  # type: ignore[arg-type]
    vec_env.close()
    context = policy._context
    assert context is not None
    to_go = context._returns_to_go[0, context._end - 4 : context._end, 0] * policy.scaling.return_scale
    assert to_go.tolist() == [3600.0] * 4


def test_a_plain_gymnasium_loop_gets_the_same_episode() -> None:
    adapter = PredictAdapter(hopper_policy(), "Hopper-v5")
    env = gym.make("Hopper-v5")
    observation, _ = env.reset(seed=5)
    state, done, total, length = None, False, 0.0, 0
    while not done:
        action, state = adapter.predict(observation, state)
        assert action.shape == (3,)
        assert env.action_space.contains(action)
        observation, reward, terminated, truncated, _ = env.step(action)
        adapter.observe(float(reward))
        done, total, length = terminated or truncated, total + float(reward), length + 1
    env.close()
    expected_return, expected_length = own_episodes(1, 1)[0]
    assert length == expected_length
    assert total == pytest.approx(expected_return, rel=1e-4)


def test_predict_rejects_what_would_go_wrong_in_silence() -> None:
    adapter = PredictAdapter(hopper_policy())
    _, first = adapter.predict(np.zeros((2, 11), np.float32))
    adapter.predict(np.zeros((2, 11), np.float32), first)
    with pytest.raises(UserError, match="not the last call's"):
        adapter.predict(np.zeros((2, 11), np.float32), first)
    with pytest.raises(UserError, match="FlattenObservation"):
        adapter.predict({"observation": np.zeros((2, 11))})


@pytest.mark.parametrize("shape", [(11, 1), (2, 5), (2, 2, 11), ()])
def test_observations_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    """(11, 1) was stretched to eleven environments with eleven equal numbers each."""
    with pytest.raises(UserError, match=r"observations of shape .* expected \(\d+, 11\)"):
        PredictAdapter(hopper_policy()).predict(np.zeros(shape))


def test_rewards_and_starts_of_other_shapes_are_refused() -> None:
    adapter = PredictAdapter(hopper_policy())
    _, state = adapter.predict(np.zeros((2, 11)))
    with pytest.raises(UserError, match=r"episode_starts of shape \(3,\), expected \(2,\)"):
        adapter.predict(np.zeros((2, 11)), state, np.ones(3, bool))
    adapter.observe(5.0)
    with pytest.raises(UserError, match=r"rewards of shape \(1,\), expected \(2,\)"):
        adapter.predict(np.zeros((2, 11)), state)


def test_one_name_alone_is_not_taken_for_many() -> None:
    with pytest.raises(UserError, match=r"env_ids='Hopper-v5' is one name, expected one for each.*\['Hopper-v5'\]"):
        hopper_policy().reset("Hopper-v5")


def test_only_stable_baselines3s_environments_can_be_listened_to() -> None:
    for env in (gym.make("Hopper-v5"), gym.make_vec("Hopper-v5", 2)):
        with pytest.raises(UserError, match=r"listen\(\) wraps .*call observe\(rewards\)"):
            PredictAdapter(hopper_policy()).listen(env)  # type: ignore[arg-type]
        env.close()


def test_observations_that_a_stack_normalises_are_refused() -> None:
    """The policy, which normalises itself, fell from 551 to 17 on Hopper, with SB3's default."""
    inner = make_vec_env("Hopper-v5", 1)
    for stack in (VecNormalize(inner), VecMonitor(VecNormalize(VecNormalize(inner, norm_obs=False)))):
        with pytest.raises(UserError, match="Make it with norm_obs=False"):
            PredictAdapter(hopper_policy()).listen(stack)
    inner.close()


def test_listening_around_vec_normalize_hears_the_original_rewards() -> None:
    plain = make_vec_env("Hopper-v5", 2, seed=5)
    inner = VecNormalize(make_vec_env("Hopper-v5", 2, seed=5), norm_obs=False)
    stack = VecMonitor(VecNormalize(inner, norm_obs=False, gamma=0.9))
    adapter = PredictAdapter(hopper_policy(), "Hopper-v5")
    around = adapter.listen(stack)
    plain.reset()
    around.reset()
    for _ in range(30):
        actions = np.zeros((2, 3), np.float32)
        _, expected, _, _ = plain.step(actions)
        _, scaled, _, _ = around.step(actions)
        np.testing.assert_allclose(adapter._rewards, expected, rtol=1e-5)
    assert np.abs(scaled - expected).max() > 0.1, "the stack's own rewards are scaled"
    plain.close()
    around.close()


def test_rewards_that_each_environment_scales_are_refused() -> None:
    for vec_env in (
        DummyVecEnv([lambda: NormalizeReward(gym.make("Hopper-v5"))]),
        make_vec_env("tests.envs.own_envs:OwnScaled-v0", 2),
    ):
        with pytest.raises(UserError, match=r"gymnasium's NormalizeReward.*VecNormalize"):
            PredictAdapter(hopper_policy()).listen(vec_env)
        vec_env.close()


def vector_episodes(mode: gym.vector.AutoresetMode, late: bool) -> list[tuple[float, int]]:
    """Episodes of the loop in docs/policies.md; with `late` starts follow an end by one step."""
    make = [lambda: gym.make("Hopper-v5", max_episode_steps=9)] * 2
    envs = gym.vector.SyncVectorEnv(make, autoreset_mode=mode)
    adapter = PredictAdapter(hopper_policy(), "Hopper-v5")
    observations, _ = envs.reset(seed=5)
    state, starts, done = None, np.ones(2, bool), np.zeros(2, bool)
    total, length, found = np.zeros(2), np.zeros(2, int), []
    for _ in range(50):
        actions, state = adapter.predict(observations, state, starts)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        adapter.observe(rewards)
        if mode == gym.vector.AutoresetMode.NEXT_STEP:  # the step after an end is none of an episode
            rewards, length = np.where(done, 0, rewards), length - done
        total, length = total + rewards, length + 1
        starts = done if late else terminated | truncated
        done = terminated | truncated
        found += [(round(float(total[i]), 3), int(length[i])) for i in np.flatnonzero(done)]
        total, length = np.where(done, 0, total), np.where(done, 0, length)
    envs.close()
    return sorted(found[:8])


def test_both_kinds_of_autoreset_play_the_same_episodes() -> None:
    next_step, same_step = gym.vector.AutoresetMode.NEXT_STEP, gym.vector.AutoresetMode.SAME_STEP
    right = vector_episodes(same_step, late=False)
    assert len(right) == 8
    assert vector_episodes(next_step, late=True) == right
    assert vector_episodes(next_step, late=False) != right, "starts that come a step too early"
