"""A policy under Stable-Baselines3's ``evaluate_policy`` and in a plain Gymnasium loop, on Hopper-v5."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.evaluation import evaluate_policy

from eva_rl.agents import Conditioning, DecisionTransformerPolicy, PredictAdapter
from eva_rl.envs import make_vec_env
from eva_rl.errors import UserError
from eva_rl.rollouts.episodes import play_episodes
from tests.conftest import make_policy


def hopper_policy() -> DecisionTransformerPolicy:
    policy = make_policy(11, 3)
    policy.conditioning = Conditioning(400.0, {"Hopper-v5": 3600.0})
    return policy


def own_episodes(num_envs: int, episodes: int) -> list[tuple[float, int]]:
    vec_env = make_vec_env("Hopper-v5", num_envs, seed=5)
    records = play_episodes(hopper_policy(), vec_env, ["Hopper-v5"] * num_envs, episodes)
    vec_env.close()
    return [(r.episode_return, r.length) for r in records]


@pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped")
def test_evaluate_policy_plays_the_same_episodes_as_we_do() -> None:
    adapter = PredictAdapter(hopper_policy(), "Hopper-v5")
    vec_env = adapter.listen(make_vec_env("Hopper-v5", 3, seed=5))
    returns, lengths = evaluate_policy(adapter, vec_env, n_eval_episodes=6, return_episode_rewards=True)  # type: ignore[arg-type]
    vec_env.close()
    expected = sorted(own_episodes(3, 2))
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
