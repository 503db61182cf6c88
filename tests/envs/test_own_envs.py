"""Environments that a user brings: named by their module, with arguments, without a time limit, with success."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from eva_rl import envs, load_policy, pretrain
from eva_rl.agents.policy_folder import save_policy
from eva_rl.cli.parsing import parse
from eva_rl.configs.groups import EnvOptions
from eva_rl.data import Episode, Trajectories, write_episodes
from eva_rl.envs.checked import CheckedEnv, success_of
from eva_rl.envs.names import split_options, with_options
from eva_rl.envs.registry import DEFAULT_HORIZON, canonical_id, task_ids
from eva_rl.errors import EnvironmentFailedError, UnknownNameError, UserError
from eva_rl.evaluate import main as evaluate_main
from eva_rl.export import main as export_main
from eva_rl.finetune.command import finetune
from eva_rl.finetune.command import main as finetune_main
from eva_rl.rollouts.evaluation import evaluate_policy
from eva_rl.rollouts.video import record_clip
from tests.conftest import make_policy

OWN = "tests.envs.own_envs:Own"
ENDS = {"terminations": np.zeros(8, bool), "truncations": np.arange(8) == 7}


class Drives:
    """Goes right at full speed."""

    observation_dim, action_dim = 2, 1

    def reset(self, env_ids: object) -> None:
        pass

    def act(self, observations, rewards, episode_starts):
        return np.full((len(observations), 1), 1.0, np.float32)


def test_an_environment_without_a_limit_ends_where_the_protocol_says() -> None:
    spec, env = envs.env_spec(f"{OWN}Point-v0"), envs.make_env(f"{OWN}Point-v0")
    assert spec.horizon == DEFAULT_HORIZON
    assert f"at most {DEFAULT_HORIZON} env steps" in spec.protocol
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[3] for _ in range(DEFAULT_HORIZON)]
    assert ends == [False] * (DEFAULT_HORIZON - 1) + [True]
    assert envs.env_spec(f"{OWN}Point-v2").horizon == 30
    assert envs.env_spec(f"{OWN}Point-v2", 7).horizon == 7


def test_a_module_names_its_environment_as_in_gymnasium() -> None:
    assert envs.canonical_id(f"{OWN}Point-v0") == f"{OWN}Point-v0"
    assert envs.canonical_id(f"{OWN}Point") == f"{OWN}Point-v2", "the latest version, as gymnasium.make takes it"
    with pytest.raises(UnknownNameError, match=r"OwnPoint-v0"):
        envs.canonical_id(f"{OWN}Piont-v0")
    with pytest.raises(UserError, match=r"module nosuch could not be imported \(ModuleNotFoundError"):
        envs.canonical_id("nosuch:Env-v0")


def test_a_command_takes_a_module_arguments_and_a_goal() -> None:
    config = parse("evaluate", [f"env={OWN}Point-v0", "env.kwargs={goal:2.5,key:is_success}"])
    assert task_ids(config.env.id) == [f"{OWN}Point-v0?goal=2.5&key=is_success"]
    observation, _ = envs.make_env(config.env.id).reset(seed=0)
    assert observation[1] == 2.5
    assert finetune  # its import makes the command known
    config = parse("finetune", ["env=push-v3", "env.goal=7"])
    assert envs.canonical_id(config.env.id) == "metaworld/push-v3?goal=7"


@pytest.mark.parametrize("value", [3, 2.5, True, None, "text", "a+b&c=d", [1, 2], {"a": 1}, "3"])
def test_arguments_survive_their_name(value: object) -> None:
    assert split_options(with_options("Env-v0", {"key": value})) == ("Env-v0", {"key": value})


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_know_the_module_and_the_arguments(workers: int) -> None:
    vec_env = envs.make_vec_env(f"{OWN}Point-v0?goal=4", 3, workers=workers)
    assert np.asarray(vec_env.reset())[:, 1].tolist() == [4, 4, 4]
    vec_env.close()


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("Needy-v0", "missing 1 required positional argument: 'must'"),
        ("Point-v0?speed=3", "unexpected keyword argument 'speed'"),
        ("Missing-v0", "FileNotFoundError: no robot.xml here"),
    ],
)
def test_one_message_for_whatever_a_constructor_raises(name: str, cause: str) -> None:
    with pytest.raises(UserError, match=cause) as caught:
        envs.env_spec(OWN + name)
    assert f"{OWN}{name} could not be made" in str(caught.value)
    assert "env.kwargs=" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_keys_of_meta_world_are_named_where_an_environment_does_not_take_them() -> None:
    """Whoever types env.reward= for an environment of their own has typed no constructor's argument."""
    with pytest.raises(UserError, match=r"takes no reward: env\.reward= is Meta-World's. Leave it out"):
        envs.env_spec(f"{OWN}Point-v0?reward=sparse")


@pytest.mark.parametrize("options", ["?goal=1", "?goal=1&key=is_success", "?goal=1&only_at_end=true"])
def test_success_in_the_infos_gives_a_success_rate(options: str) -> None:
    found = evaluate_policy(Drives(), f"{OWN}Point-v0{options}", episodes=2, horizon=20)
    assert found.reports_success
    assert found.metrics()["eval/success_rate"] == 1
    never = evaluate_policy(Drives(), f"{OWN}Point-v0?goal=-9", episodes=2, horizon=20)
    assert never.success_rate == 0
    silent = evaluate_policy(make_policy(11, 3), "Hopper-v5", episodes=1, horizon=5)
    assert "eval/success_rate" not in silent.metrics()


def test_the_mean_success_is_that_of_tasks_that_report_it(tmp_path: Path) -> None:
    policy = make_policy(2, 1)
    policy.set_action_bounds(-2, 2)
    save_policy(tmp_path / "policy", policy)
    tasks = f"{OWN}Point-v2?key=another+{OWN}Point-v2"
    words = [f"policy={tmp_path}/policy", f"env={tasks}", "eval.episodes=2", "threads=1", f"out={tmp_path}/out.json"]
    assert evaluate_main(words) == 0
    assert json.loads((tmp_path / "out.json").read_text())["mean_success_rate"] == 0, "NaN, or none"


def test_spaces_around_names_are_none_of_theirs() -> None:
    assert task_ids(f" {OWN}Point-v0 + mt10 ")[:2] == [f"{OWN}Point-v0", "metaworld/reach-v3"]
    assert envs.canonical_id(" push ") == "metaworld/push-v3"


@pytest.mark.parametrize("name", ["max_episode_steps", "env_id", "make", "name", "id"])
def test_arguments_of_ours_are_told_from_the_environments(name: str) -> None:
    with pytest.raises(UserError, match=r"env\.horizon=STEPS|env\.kwargs="):
        envs.make_env(f"{OWN}Point-v0?{name}=3")


def test_an_environment_that_draws_nothing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not be made|gives no frames"):
        record_clip(Drives(), f"{OWN}Point-v0")
    with pytest.raises(UserError, match=r"gives no frames: render\(\) .*raised NotImplementedError"):
        record_clip(Drives(), f"{OWN}Blind-v0")


def test_what_cannot_be_filmed_is_said_before_anything_is_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It took the demonstrations and the evaluation before, or the whole evaluation, to find out."""
    monkeypatch.chdir(tmp_path)
    policy = make_policy(2, 1)
    policy.set_action_bounds(-2, 2)
    save_policy(tmp_path / "base", policy)
    words = [f"policy={tmp_path / 'base'}", f"env={OWN}Blind-v0", "env.horizon=5", "video=true", "eval.episodes=1"]
    for main, more in ((evaluate_main, ["out=found.json"]), (finetune_main, ["run_dir=run", "algo=odt", "data=none"])):
        assert main([*words, *more]) == 2
        assert "gives no frames" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_metaworlds_groups_are_task_sets() -> None:
    assert len(task_ids("mt10")) == 10
    assert len(task_ids("mt25")) == 25
    assert (len(task_ids("ml10-train")), len(task_ids("ml10-test")), len(task_ids("ml10"))) == (10, 5, 15)
    assert (len(task_ids("ML45_train")), len(task_ids("ml45-test"))) == (45, 5)
    assert not set(task_ids("ml10-train")) & set(task_ids("ml10-test"))
    assert task_ids("mt10?goal=3")[0] == "metaworld/reach-v3?goal=3"


def test_one_goal_for_all_episodes() -> None:
    fixed, free = envs.make_env("push-v3?goal=5"), envs.make_env("push-v3")
    goals = [fixed.reset(seed=seed)[0][-3:].tolist() for seed in (1, 2, None)]
    assert goals == [free.reset(seed=5)[0][-3:].tolist()] * 3
    assert "the goal of seed 5" in envs.env_spec("push-v3?goal=5").protocol
    with pytest.raises(UserError, match=r"env\.goal=-1"):
        envs.canonical_id("push-v3?goal=-1")


def test_the_command_says_what_is_wrong(policy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main([f"policy={policy_folder}", f"env={OWN}Needy-v0"]) == 2
    shown = capsys.readouterr().err
    assert "env.kwargs=" in shown
    assert "Episodes" not in shown, "nothing has begun"


def test_sparse_rewards_are_paid_at_success_alone() -> None:
    sparse, dense = envs.make_env("drawer-close-v3?reward=sparse"), envs.make_env("drawer-close-v3")
    expert = envs.scripted_expert("metaworld/drawer-close-v3?reward=sparse")
    observation, _ = sparse.reset(seed=3)
    assert np.array_equal(dense.reset(seed=3)[0], observation)
    paid, solved = [], []
    for _ in range(100):
        action = expert(observation)
        observation, reward, _, _, info = sparse.step(action)
        assert np.array_equal(dense.step(action)[0], observation)  # the same task otherwise
        paid.append(reward)
        solved.append(float(info["success_now"]))
    assert paid == solved
    assert set(paid) == {0.0, 1.0}
    assert "rewarded at success alone" in envs.env_spec("drawer-close-v3?reward=sparse").protocol
    with pytest.raises(UserError, match=r"env\.reward.*sparce"):
        envs.env_spec("push-v3?reward=sparce")


def test_the_reward_is_part_of_the_name() -> None:
    assert EnvOptions(id="push-v3", reward="sparse").id == "push-v3?reward=sparse"
    assert EnvOptions(id="push-v3", goal=7, reward="sparse").id == "push-v3?goal=7&reward=sparse"


def test_an_episode_may_stop_at_its_first_success() -> None:
    env = envs.make_env("drawer-close-v3", stop_at_success=True)
    expert, over = envs.scripted_expert("metaworld/drawer-close-v3"), False
    observation, _ = env.reset(seed=3)
    while not over:
        observation, _, terminated, truncated, info = env.step(expert(observation))
        over = terminated or truncated
        assert terminated == info["success"]
    assert terminated


def test_pretraining_knows_success_from_returns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = {"observations": np.zeros((9, 2)), "actions": np.zeros((8, 1)), "rewards": -np.ones(8)}
    data = Trajectories.from_episodes([Episode(**steps, **ENDS)], env_id="OwnPoint-v2", source="own")  # type: ignore[arg-type]
    write_episodes(tmp_path / "own.h5", data)
    small = ["size.hidden_size=16", "size.num_layers=1", "size.num_heads=2", "size.context_length=4"]
    words = [f"env={OWN}Point-v2", f"data={tmp_path}/own.h5", "algo.updates=1", "threads=1", "tracker=[]", *small]
    assert pretrain.main([*words, f"run_dir={tmp_path}/run"]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert "validation/success_rate" in summary
    assert "validation/mean_reward" not in summary, "it was a success rate"
    assert "demonstrations of" not in caplog.text, "they are this very environment's, named without its module"


class Smooth(gym.Env[Any, Any]):
    """Pays for the change of its action, of which it keeps the last one as it was given."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,), np.float32), gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self._last = np.zeros(1, np.float32)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        change, self._last = float(np.abs(action - self._last).sum()), action
        return np.zeros(1, np.float32), -change, False, False, {}


gym.register("Smooth-v0", Smooth, max_episode_steps=9)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_environment_may_keep_its_last_action(workers: int) -> None:
    """The rows through which actions are passed are written anew at each step."""
    vec_env = envs.make_vec_env("Smooth-v0", 2, workers=workers)
    vec_env.reset()
    paid = [vec_env.step(np.full((2, 1), action, np.float32))[1].tolist() for action in (0.5, -0.5, -0.25)]
    vec_env.close()
    assert paid == [[-0.5, -0.5], [-1, -1], [-0.25, -0.25]]


@pytest.mark.parametrize("value", [torch.tensor(True), np.array([True]), 1, np.float32(1)])
def test_success_in_other_types_is_read(value: Any) -> None:
    """Simulators on PyTorch give tensors, which numpy's any() does not take."""
    assert success_of({"success": value}) is True


def test_an_environment_in_place_of_its_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"env is a TimeLimit, expected the name of a task\. Register yours"):
        canonical_id(gym.make("Pendulum-v1"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="env is a list, expected the name of a task"):
        envs.env_spec(["Pendulum-v1"])  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_environments_are_closed_in_workers_too(workers: int, tmp_path: Path) -> None:
    """A simulator that an environment had started ran on after every evaluation in workers."""
    name = with_options(f"{OWN}Recorded-v0", {"file": str(tmp_path / "closed")})
    vec_env = envs.make_vec_env(name, 3, workers=workers)
    vec_env.reset()
    vec_env.close()
    found = (tmp_path / "closed").read_text()
    assert found.count("made") == found.count("closed") >= 3


@pytest.mark.parametrize(
    ("acts", "told"),
    [
        (lambda n: np.zeros(1, np.float32), r"actions of shape \(1,\), expected \(n, act\) = \(2, 1\)"),
        (lambda n: np.zeros((n, 3), np.float32), r"actions of shape \(2, 3\), expected"),
        (lambda n: torch.zeros(n, 1, requires_grad=True), "actions are no numpy array: Can't call numpy"),
    ],
)
def test_actions_of_another_shape_are_refused(acts: Any, told: str) -> None:
    """One action was played in all environments, one number in all joints."""

    class Wrong(Drives):
        def act(self, observations, rewards, episode_starts):
            return acts(len(observations))

    with pytest.raises(UserError, match=told):
        evaluate_policy(Wrong(), f"{OWN}Point-v2", episodes=2)


def test_what_is_no_policy_is_told_what_one_has() -> None:
    with pytest.raises(UserError, match=r"A Linear is no policy: it has no observation_dim, action_dim, reset, act"):
        evaluate_policy(torch.nn.Linear(2, 1), f"{OWN}Point-v2", episodes=1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"loaded by its name or path, got a Linear.*save_pretrained"):
        load_policy(torch.nn.Linear(2, 1))  # type: ignore[arg-type]


def test_a_task_s_options_reach_the_task_of_the_policy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without env= they were ignored: a sparse reward was dense."""
    policy = make_policy()
    policy.env_id = "metaworld/reach-v3"
    save_policy(tmp_path / "policy", policy)
    typed = [f"policy={tmp_path / 'policy'}", "env.reward=sparse", "env.horizon=10", "eval.episodes=1"]
    assert evaluate_main(typed) == 0
    assert "rewarded at success alone" in " ".join(capfd.readouterr().err.split())


def test_evaluations_that_are_finished_are_shown_where_a_later_one_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An hour of mt50 was lost where its last task failed; a task that does not fit was noticed after the others."""
    save_policy(tmp_path / "policy", make_policy(2, 1))
    policy = [f"policy={tmp_path / 'policy'}", "policy.action_bounds=[-2,2]", "eval.episodes=1"]
    fails = f"{OWN}Fails-v0"
    assert evaluate_main([*policy, f"env={OWN}Point-v2+{fails}", f"out={tmp_path / 'found.json'}"]) == 2
    assert list(json.loads((tmp_path / "found.json").read_text())["tasks"]) == [f"{OWN}Point-v2"]
    said = " ".join(capfd.readouterr().err.split())
    assert f"Not played to the end: {fails}." in said
    assert "step() raised RuntimeError: the cable is off" in said
    assert evaluate_main([*policy, f"env={OWN}Point-v2+Hopper-v5"]) == 2
    said = capfd.readouterr()
    assert "the policy takes" in said.err
    assert "mean return" not in said.out


def test_normalisation_by_demonstrations_needs_some(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The policy acted on raw observations with a target return of 0, and was exported so."""
    for main in (evaluate_main, export_main):
        assert main([f"policy={tmp_path}", "policy.observations_from=data", f"out={tmp_path / 'out'}"]) == 2
        assert "Name the data: policy.observations_from=minari:ID" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("observation", "info", "told"),
    [
        ([np.zeros(3), 1.0], {}, "reading an observation raised ValueError"),
        (torch.zeros(2, requires_grad=True), {}, "reading an observation raised RuntimeError"),
        (np.zeros(2), {"success": [[1], [1, 2]]}, None),
    ],
)
def test_what_numpy_cannot_read_is_an_error_of_the_environment(observation: Any, info: Any, told: str | None) -> None:
    class Odd(gym.Env[Any, Any]):
        observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            return observation, info

    assert success_of(info) is None
    if told is not None:
        with pytest.raises(EnvironmentFailedError, match=told):
            CheckedEnv(Odd(), "Odd-v0").reset(seed=0)
