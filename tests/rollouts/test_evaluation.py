from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from eva_rl import envs
from eva_rl.distributed import ProcessGroup
from eva_rl.envs.metaworld import MetaWorldTask
from eva_rl.errors import UserError
from eva_rl.evaluate import show
from eva_rl.rollouts.episodes import EpisodeRecord, play_episodes
from eva_rl.rollouts.evaluation import (
    EvaluationResult,
    described_return,
    evaluate_distributed,
    evaluate_policy,
    evaluation_envs,
    other_starts,
)
from tests.conftest import make_policy


class ExpertPolicy:
    """A scripted expert behind the Policy protocol."""

    observation_dim, action_dim = 39, 4

    def __init__(self, task: str) -> None:
        self.expert = envs.scripted_expert(task)

    def reset(self, env_ids: object) -> None:
        pass

    def act(self, observations, rewards, episode_starts):
        return np.stack([self.expert(o) for o in observations])


def result(successes: list[bool]) -> EvaluationResult:
    records = tuple(EpisodeRecord("x", i, 1.0, 2, s, s, 0) for i, s in enumerate(successes))
    return EvaluationResult("x", records, "", True)


def test_the_table_of_evaluate_shows_normalised_scores(capfd: pytest.CaptureFixture[str]) -> None:
    """Where a task has reference returns: Hopper's are -20.272305 and 3234.3 (D4RL)."""
    records = (EpisodeRecord("Hopper-v5", 0, 1607.013848, 900, False, False, -1, reports_success=False),)
    hopper = EvaluationResult("Hopper-v5", records, "protocol", False)
    show([hopper])
    shown = capfd.readouterr().err
    assert "normalised" in shown
    assert " 50.0 " in shown
    assert "success" not in shown, "a column of dashes"
    show([result([True, False])])
    assert "normalised" not in capfd.readouterr().err


def test_wilson_interval_by_hand() -> None:
    """Newcombe 1998, table I: 15 of 148 and 0 of 20."""
    low, high = result([True] * 15 + [False] * 133).success_interval()
    assert (round(low, 4), round(high, 4)) == (0.0624, 0.1605)
    low, high = result([False] * 20).success_interval()
    assert low == 0
    assert round(high, 4) == 0.1611


@pytest.mark.parametrize(("solved", "episodes"), [(0, 1), (1, 1), (1, 2), (7, 20), (20, 20), (49, 50), (333, 1000)])
def test_wilson_interval_is_that_of_statsmodels(solved: int, episodes: int) -> None:
    found = result([True] * solved + [False] * (episodes - solved))
    expected = proportion_confint(solved, episodes, method="wilson")
    assert found.success_interval() == pytest.approx(expected, abs=1e-7)
    assert 0 <= found.success_interval()[0] <= found.success_rate <= found.success_interval()[1] <= 1


def test_episodes_of_one_start_count_as_one() -> None:
    """One goal for all: five times the same episode says nothing about other goals."""
    own, one = (evaluate_policy(make_policy(), env, episodes=5, horizon=3) for env in ("push-v3", "push-v3?goal=3"))
    assert (own.alike, own.caveat, "alike" in own.record()) == (False, "", False)
    assert one.alike
    assert one.record()["alike"]
    assert one.success_interval() == result([False]).success_interval()
    assert "All 5 episodes of metaworld/push-v3?goal=3 began with the same observation" in one.caveat


def test_evaluations_that_began_elsewhere_are_not_compared_without_a_word() -> None:
    """An environment that ignores the seed gave unrelated episodes before and after."""
    again = [evaluate_policy(make_policy(), "push-v3", episodes=3, horizon=2) for _ in range(2)]
    assert other_starts(*again) == ""
    apart = [replace(e, start=None if e.start is None else e.start + 1) for e in again[1].episodes]
    elsewhere = replace(again[1], episodes=tuple(apart))
    assert "metaworld/push-v3 starts elsewhere when it is reset with the same seed" in other_starts(again[0], elsewhere)
    unknown = replace(elsewhere, episodes=tuple(replace(e, start=None) for e in apart))
    assert other_starts(again[0], unknown) == "", "of an earlier version's record"


@pytest.mark.parametrize("change", [{"start": 2}, {"success": True}, {"length": 3}, {"episode_return": 1.6}])
def test_episodes_that_differ_are_not_alike(change: dict[str, Any]) -> None:
    episode = EpisodeRecord("x", 3, 1.5, 4, False, False, -1, start=1)
    other = replace(episode, episode_seed=4)
    assert EvaluationResult("x", (episode, other), "", True).alike
    assert not EvaluationResult("x", (episode, other, replace(other, **change)), "", True).alike
    assert not EvaluationResult("x", (episode,), "", True).alike


def test_what_is_not_measured_is_null_in_strict_json() -> None:
    """A task without success, and one whose episodes were stopped: no NaN, which other readers refuse."""
    episode = EpisodeRecord("x", 3, 1.5, 4, False, False, -1)
    without = EvaluationResult("x", (episode,), "p", False)
    stopped = EvaluationResult("x", (episode, replace(episode, success=True, first_success=2, stopped=True)), "p", True)
    for found in (without, stopped):
        json.dumps(found.record(), allow_nan=False)
    assert without.metrics("a") == {"a/mean_reward": 1.5, "a/std_reward": 0.0, "a/mean_ep_length": 4.0}
    assert "success_interval_95" not in without.record()
    assert [described_return(found) for found in (without, stopped)] == ["1.5", "not measured"]
    whole, cut = stopped.record()["episodes"]
    assert (whole["episode_return"], whole["length"]) == (1.5, 4)
    assert (cut["episode_return"], cut["length"], cut["success_at_end"], cut["success"]) == (None, None, None, True)


def test_experts_succeed_and_records_agree_with_a_plain_loop() -> None:
    task = "metaworld/reach-v3"
    found = evaluate_policy(ExpertPolicy(task), "reach-v3", episodes=3, seed=7)
    assert found.success_rate == 1
    env, expert = MetaWorldTask(task), envs.scripted_expert(task)
    for record in found.episodes:
        observation, _ = env.reset(seed=record.episode_seed)
        rewards, successes, truncated = [], [], False
        while not truncated:
            observation, reward, _, truncated, info = env.step(expert(observation))
            rewards.append(reward)
            successes.append(info["success_now"])
        assert record.length == 200
        assert record.episode_return == pytest.approx(sum(rewards), rel=1e-5)
        assert record.first_success == successes.index(True)
        assert record.success_at_end == successes[-1]


@pytest.mark.slow
def test_short_episodes_are_not_over_represented() -> None:
    """Hopper falls after different numbers of steps; every environment plays the same number of episodes."""
    policy, vec_env = make_policy(11, 3), envs.make_vec_env("Hopper-v5", 3, seed=5)
    records = play_episodes(policy, vec_env, ["Hopper-v5"] * 3, 12)
    assert [r.episode_seed for r in records] == list(range(5, 17))
    assert len({r.length for r in records}) > 1


def test_stopping_at_success_measures_success_alone() -> None:
    expert = ExpertPolicy("metaworld/reach-v3")
    whole, stopped = (
        evaluate_policy(expert, "reach-v3", episodes=3, seed=7, stop_at_success=stop) for stop in (False, True)
    )
    assert [e.first_success for e in whole.episodes] == [e.first_success for e in stopped.episodes]
    assert stopped.success_rate == whole.success_rate == 1
    assert stopped.metrics() == {"eval/success_rate": 1.0}
    assert np.isnan(stopped.mean_reward)
    assert stopped.record()["episodes"][0]["episode_return"] is None
    assert "ended at the first success" in stopped.protocol
    assert {"eval/mean_reward", "eval/success_at_end"} <= whole.metrics().keys()


def test_returns_are_measured_where_nothing_was_stopped() -> None:
    found = evaluate_policy(make_policy(), "push-v3", episodes=2, horizon=4, stop_at_success=True)
    assert found.success_rate == 0
    assert found.metrics() == evaluate_policy(make_policy(), "push-v3", episodes=2, horizon=4).metrics()


def test_processes_without_episodes_know_that_the_others_report_success() -> None:
    """Rank 0, which logs, had no episode of its own, and no success rate."""
    whole = evaluate_policy(make_policy(), "reach-v3", episodes=1, horizon=5)
    none = replace(whole, episodes=(), reports_success=False)

    class Group(ProcessGroup):
        def all_gather_object(self, value: Any) -> list[Any]:
            return [value, [replace(whole.episodes[0], reports_success=True)]]

    found = evaluate_distributed(Group(0, 2), lambda **_: none, episodes=1)
    assert found.reports_success
    assert found.metrics()["eval/success_rate"] == 0


def test_environments_can_be_used_again() -> None:
    policy, vec_env = make_policy(), evaluation_envs("push-v3", 4, 10)
    first = evaluate_policy(policy, "push-v3", episodes=4, horizon=10, vec_env=vec_env)
    again = evaluate_policy(policy, "push-v3", episodes=4, horizon=10, vec_env=vec_env)
    other = evaluate_policy(policy, "push-v3", episodes=4, horizon=10, vec_env=vec_env, seed=1)
    assert first == again
    assert first != other
    vec_env.close()


def test_d4rl_scores_are_in_the_metrics() -> None:
    records = tuple(EpisodeRecord("Hopper-v5", i, value, 9, False, False, -1) for i, value in enumerate((0.0, 1000.0)))
    metrics = EvaluationResult("Hopper-v5", records, "", False).metrics()
    low, high = -20.272305, 3234.3
    assert metrics["eval/normalized_score"] == pytest.approx(100 * (500 - low) / (high - low))
    own = EvaluationResult("Hopper-v5", records, "", False, references=(0.0, 2000.0)).metrics()
    assert own["eval/normalized_score"] == pytest.approx(25)
    assert "eval/success_rate" not in metrics
    assert np.isnan(EvaluationResult("Hopper-v5", records, "", False).success_interval()).all(), "there is no success"
    assert "eval/normalized_score" not in result([True]).metrics()


def test_a_policy_that_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"Ant-v5 has 105 .* the policy takes 27"):
        evaluate_policy(make_policy(27, 8), "mujoco/ant", episodes=1)
    with pytest.raises(UserError, match=r"^episodes=0: expected at least 1"):
        evaluate_policy(make_policy(), "push-v3", episodes=0)
    with pytest.raises(UserError, match=r"^episodes=2.5: expected at least 1, and a whole number"):
        evaluate_policy(make_policy(), "push-v3", episodes=2.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"Load it first: eva_rl.load_policy\('runs/a'\)"):
        evaluate_policy("runs/a", "push-v3")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^seed=40001: expected 0 to 40000"):
        evaluate_policy(make_policy(), "push-v3", episodes=1, seed=40_001)
    vec_env = evaluation_envs("reach-v3", 1, workers=0)
    with pytest.raises(UserError, match="holds environments of metaworld/reach-v3, expected metaworld/push-v3"):
        evaluate_policy(make_policy(), "push-v3", episodes=1, vec_env=vec_env)
    vec_env.close()
