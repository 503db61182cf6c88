"""The loop of online algorithms: counting, breaking off, resuming, and numbers that are not finite."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eva_rl import envs
from eva_rl.data import Episode
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.errors import ActionNotFiniteError, EnvironmentFailedError, UserError
from eva_rl.training.checkpoint import Checkpoints
from eva_rl.training.collector import OnlineCounters, TaskEnvs
from eva_rl.training.failures import FAILED_BATCH, NOT_FINITE_FILE, NotFiniteError, failures_kept
from eva_rl.training.learner import Learner
from eva_rl.training.odt import OnlineDecisionTransformer
from eva_rl.training.odt_td3 import TD3DecisionTransformer
from eva_rl.training.online import train_online
from eva_rl.training.options import ODTOptions, ResidualOptions, TD3Options
from eva_rl.training.residual.learner import ResidualLearner
from tests.conftest import make_policy
from tests.training.problems import Bandit, make_learner, make_task

Make = Callable[[], Learner]


LOOP: dict[str, Any] = {
    "batch_size": 8,
    "env_steps": 360,
    "steps_per_iteration": 60,
    "updates_per_iteration": 3,
    "eval_every": 120,
    "checkpoint_every": 120,
    "keep_best": False,
}


def td3(**others: Any) -> Learner:
    return TD3DecisionTransformer(_policy(False), TD3Options(critic_warmup=2, **LOOP | others), seed=1)


def odt(**others: Any) -> Learner:
    return OnlineDecisionTransformer(_policy(True), ODTOptions(**LOOP | others), seed=1)


def residual(**others: Any) -> Learner:
    sizes = {"critic_hidden_size": 16, "actor_hidden_size": 16, "critics": 3, "policy_delay": 2, "critic_warmup": 1}
    options = ResidualOptions(**sizes | LOOP | {"learning_starts": 60} | others)
    return ResidualLearner(_policy(False), options, seed=1, demonstrations=[hopper_episode()], env_id="Hopper-v5")


def hopper_episode() -> Episode:
    rng, last = np.random.default_rng(0), np.arange(9) == 8
    return Episode(
        observations=rng.normal(size=(10, 11)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(9, 3)).astype(np.float32),
        rewards=rng.uniform(size=9).astype(np.float32),
        terminations=last,
        truncations=np.zeros(9, bool),
    )


def replay_of(learner: Learner, capacity: int = 2000) -> TrajectoryReplay:
    return learner.new_replay(capacity) if isinstance(learner, ResidualLearner) else TrajectoryReplay(capacity, 11, 3)


def bandit(**others: Any) -> OnlineDecisionTransformer:
    return OnlineDecisionTransformer(make_learner(stochastic=True), ODTOptions(batch_size=4, **others))


def _policy(stochastic: bool) -> Any:
    return make_policy(11, 3, stochastic=stochastic, hidden_size=16, num_layers=1)


class StopError(Exception):
    """The run is over, whatever it was about to do."""


def run(
    make: Make, folder: Path | None, *, stop_at: int | None = None
) -> tuple[OnlineCounters | None, dict[str, torch.Tensor], list[tuple[int, dict[str, float]]]]:
    """Hopper, whose episodes differ in length, from the last checkpoint; stopped inside an iteration if asked to."""
    algorithm, record = make(), []
    replay = replay_of(algorithm)
    task = TaskEnvs(envs.make_vec_env("mujoco/hopper", 3, horizon=15), "Hopper-v5", False, first_seed=500)
    checkpoints = Checkpoints(folder) if folder else None

    def log(metrics: Mapping[str, float], step: int) -> None:
        if stop_at is not None and step >= stop_at:
            raise StopError
        record.append((step, {k: v for k, v in metrics.items() if k != "time/fps"}))

    counters = None
    with contextlib.suppress(StopError):
        counters = train_online(
            algorithm, replay, task, log=log, evaluate=lambda step: {"x": step}, checkpoints=checkpoints
        )
    task.vec_env.close()
    return counters, algorithm.tensors(), record


@pytest.mark.parametrize("make", [pytest.param(td3, marks=pytest.mark.slow), odt, residual])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(make: Make, tmp_path: Path) -> None:
    _, expected, record = run(make, None)
    assert run(make, tmp_path, stop_at=200)[0] is None
    counters, found, rest = run(make, tmp_path)
    assert counters is not None
    assert counters.env_steps == 360
    assert counters.update > 9
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert rest == [(step, metrics) for step, metrics in record if step > 120]
    assert any("rollout/ep_rew_mean" in metrics for _, metrics in rest)


def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    def make() -> Learner:
        learner = odt()
        for layer in learner.policy.network.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.3
        return learner

    assert any(isinstance(layer, torch.nn.Dropout) for layer in odt().policy.network.modules())
    torch.manual_seed(3)
    _, expected, _ = run(make, None)
    torch.manual_seed(3)
    run(make, tmp_path, stop_at=200)
    _, found, _ = run(make, tmp_path)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


LONG = 20


class Long(Bandit):
    """Twenty env steps an episode."""

    def reset(self, **options: Any) -> Any:
        self._steps = 0
        return super().reset()

    def step(self, action: Any) -> Any:
        self._steps += 1
        observation, reward, *_ = super().step(action)
        return observation, reward, False, self._steps == LONG, {}


def play_long(folder: Path | None = None, stop_at: int = 10**9, **others: Any) -> tuple[OnlineCounters | None, Learner]:
    learner = bandit(**{"env_steps": 400, "steps_per_iteration": 20, "updates_per_iteration": 1} | others)
    beside = learner.policy.with_own_history()

    def validate(step: int) -> dict[str, float]:
        if step >= stop_at:
            raise StopError
        beside.reset(["problem"] * 3)
        beside.act(np.ones((3, 2), np.float32), np.zeros(3, np.float32), np.ones(3, bool))
        return {"validation/mean_reward": 0.0}

    task = dataclasses.replace(make_task(Long, 4), horizon=LONG)
    checkpoints = Checkpoints(folder, every=1) if folder else None
    with contextlib.suppress(StopError):
        replay = TrajectoryReplay(2000, 2, 1)
        found = train_online(learner, replay, task, log=lambda *_: None, evaluate=validate, checkpoints=checkpoints)
        assert replay.num_complete == replay.num_episodes
        return found, learner
    return None, learner


def test_an_episode_is_played_to_its_end_however_often_the_policy_is_validated(tmp_path: Path) -> None:
    """Each of 4 environments plays 5 env steps between two validations, an episode has 20: none was ever complete,
    and nothing was learned."""
    often, learner = play_long(eval_every=20, checkpoint_every=80)
    assert often is not None
    assert often.episodes == 400 // LONG
    assert often.update > 10
    _, seldom = play_long(eval_every=80, checkpoint_every=80)
    for name, value in seldom.tensors().items():
        assert torch.equal(value, learner.tensors()[name]), name
    assert play_long(tmp_path, stop_at=200, eval_every=20, checkpoint_every=30)[0] is None
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000000080", "step_000000160"]
    _, resumed = play_long(tmp_path, eval_every=20, checkpoint_every=30)
    for name, value in learner.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name


def test_no_more_is_played_than_was_asked_for() -> None:
    learner = bandit(env_steps=50, steps_per_iteration=32, updates_per_iteration=1)
    counters = train_online(learner, TrajectoryReplay(500, 2, 1), make_task(Bandit, 4), log=lambda *_: None)
    assert counters.env_steps == 52, "the next multiple of four environments"


@pytest.mark.parametrize("learning_starts", [0, 40, 48, 49])
def test_gradient_steps_are_known_beforehand(learning_starts: int) -> None:
    """AdaLoRA prunes over them, and would not come to an end over more."""
    learner = bandit(env_steps=80, steps_per_iteration=16, updates_per_iteration=1, learning_starts=learning_starts)
    counters = train_online(learner, TrajectoryReplay(200, 2, 1), make_task(Bandit), log=lambda m, s: None)
    assert counters.update == learner.options.total_updates


def test_of_equal_success_the_quicker_is_kept() -> None:
    """Validations that end at success have no return: the first of several was kept."""
    looks = {120: 90.0, 240: 60.0, 360: 70.0}

    def evaluate(step: int) -> dict[str, float]:
        return {"validation/success_rate": 1.0, "validation/env_steps": looks.get(step, 100.0)}

    learner = td3(keep_best=True)
    task = TaskEnvs(envs.make_vec_env("mujoco/hopper", 3, horizon=15), "Hopper-v5", False)
    counters = train_online(learner, TrajectoryReplay(2000, 11, 3), task, log=lambda *_: None, evaluate=evaluate)
    task.vec_env.close()
    assert counters.best_step == 240


@pytest.mark.parametrize("interrupted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_best_parameters_are_kept(interrupted: bool, tmp_path: Path) -> None:
    """Success counts first, then the return; also where the best came before an interruption."""
    looks = {0: (0.7, 0.0), 120: (0.5, 9.0), 240: (0.8, 1.0), 360: (0.8, 2.0), 480: (0.8, 1.5)}
    chosen = {"env_steps": 480, "keep_best": True}
    algorithm, weights = td3(**chosen), {}

    def evaluate(step: int) -> dict[str, float]:
        weights[step] = [p.detach().clone() for p in algorithm.parameters.values()]
        return {"validation/success_rate": looks[step][0], "validation/mean_reward": looks[step][1]}

    for stop in [400, 480] if interrupted else [480]:
        algorithm = td3(**chosen)
        task = TaskEnvs(envs.make_vec_env("mujoco/hopper", 3, horizon=15), "Hopper-v5", False)

        def log(_: Mapping[str, float], step: int, stop: int = stop) -> None:
            if step > stop:
                raise StopError

        with contextlib.suppress(StopError):
            counters = train_online(
                algorithm,
                TrajectoryReplay(2000, 11, 3),
                task,
                log=log,
                evaluate=evaluate,
                checkpoints=Checkpoints(tmp_path),
            )
        task.vec_env.close()
    assert (counters.best_step, counters.best_score) == (360, [0.8, 2.0])
    assert all(torch.equal(a, b) for a, b in zip(algorithm.parameters.values(), weights[360], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[480], weights[360], strict=True))


def test_no_episode_is_played_twice() -> None:
    seeds: list[int] = []

    class Watched(gym.Wrapper[Any, Any, Any, Any]):
        def reset(self, **options: Any) -> Any:
            observation, info = self.env.reset(**options)
            seeds.append(info["episode_seed"])
            return observation, info

    from stable_baselines3.common.vec_env import DummyVecEnv

    from tests.envs.numbered import NumberedEpisodes

    makers = [lambda i=i: Watched(NumberedEpisodes(Bandit(), i, 3)) for i in range(3)]
    task = TaskEnvs(DummyVecEnv(makers), "problem", False, first_seed=100)
    learner = bandit(env_steps=60, steps_per_iteration=15, updates_per_iteration=1, eval_every=15)
    train_online(learner, TrajectoryReplay(500, 2, 1), task, log=lambda *_: None)
    assert len(seeds) == len(set(seeds)) > 60
    assert min(seeds) == 100


class Broken(Bandit):
    """Pays what is not a number at its fifth episode."""

    count = 0

    def step(self, action: Any) -> Any:
        type(self).count += 1
        observation, reward, *rest = super().step(action)
        return observation, float("nan") if type(self).count >= 5 else reward, *rest


def test_a_reward_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    learner = bandit(env_steps=100, steps_per_iteration=2, updates_per_iteration=1, checkpoint_every=2)
    with (
        pytest.raises(UserError, match="a reward of the environment is not finite") as failure,
        failures_kept(tmp_path),
    ):
        train_online(
            learner,
            TrajectoryReplay(500, 2, 1),
            make_task(Broken, 1),
            log=lambda *_: None,
            checkpoints=Checkpoints(tmp_path / "checkpoint"),
        )
    assert "last checkpoint" in str(failure.value)
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["step_000000002", "step_000000004"]


class Refusing(Bandit):
    """Refuses the fifth action as one that is not finite."""

    count = 0

    def step(self, action: Any) -> Any:
        type(self).count += 1
        if type(self).count >= 5:
            raise ActionNotFiniteError("bandit", "in env step 1", "the policy's action is not finite: [nan]")
        return super().step(action)


def test_a_policy_that_diverged_is_not_saved(tmp_path: Path) -> None:
    learner = bandit(env_steps=100, steps_per_iteration=3, updates_per_iteration=1, checkpoint_every=3)
    checkpoints = Checkpoints(tmp_path / "checkpoint")
    with pytest.raises(ActionNotFiniteError) as failure, failures_kept(tmp_path):
        train_online(
            learner, TrajectoryReplay(500, 2, 1), make_task(Refusing, 1), log=lambda *_: None, checkpoints=checkpoints
        )
    assert "saved" not in str(failure.value)
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["step_000000003"]
    assert "not finite" in (tmp_path / NOT_FINITE_FILE).read_text()


def test_the_batch_of_a_loss_that_is_not_finite_is_kept(tmp_path: Path) -> None:
    learner = bandit(env_steps=16, steps_per_iteration=16, learning_starts=17)
    replay = TrajectoryReplay(500, 2, 1)
    train_online(learner, replay, make_task(Bandit), log=lambda *_: None)
    before = {name: p.clone() for name, p in learner.parameters.items()}
    replay.actions[:] = np.nan
    with pytest.raises(UserError, match=r"the policy's loss \(nan\) .* is not finite"), failures_kept(tmp_path):
        learner.update(replay, 0)
    assert load_file(tmp_path / FAILED_BATCH)["actions"].isnan().any()
    for name, parameter in learner.parameters.items():
        assert torch.equal(parameter, before[name])


def test_a_residual_stops_at_what_is_not_finite(tmp_path: Path) -> None:
    learner = residual()
    assert isinstance(learner, ResidualLearner)
    learner.demonstrations.observations[:] = np.inf
    before = {name: value.clone() for name, value in learner.tensors().items() if "critics" in name or "actor" in name}
    with pytest.raises(UserError, match="the critics' loss is not finite"), failures_kept(tmp_path):
        learner.update(learner.demonstrations, 0)
    assert load_file(tmp_path / FAILED_BATCH)["observations"].isinf().any()
    after = learner.tensors()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_critics_stop_at_what_is_not_finite() -> None:
    options = TD3Options(batch_size=4, env_steps=16, steps_per_iteration=16, learning_starts=17)
    learner = TD3DecisionTransformer(make_learner(), options)
    replay = TrajectoryReplay(500, 2, 1)
    train_online(learner, replay, make_task(Bandit), log=lambda *_: None)
    before = [p.clone() for p in learner.critics.parameters()]
    replay.observations[:] = np.inf
    with pytest.raises(NotFiniteError, match="critics") as failure:
        learner.update(replay, 0)
    assert failure.value.batch is not None
    assert all(torch.equal(a, b) for a, b in zip(before, learner.critics.parameters(), strict=True))


def test_a_dead_worker_is_a_clear_end() -> None:
    vec_env = envs.make_vec_env("mujoco/hopper", 2, workers=2)
    task = TaskEnvs(vec_env, "Hopper-v5", False)
    learner, killed = td3(env_steps=400, steps_per_iteration=40, learning_starts=400), []

    def log(_: Mapping[str, float], step: int) -> None:
        if not killed:
            killed.append(step)
            vec_env.processes[0].kill()

    def train() -> None:
        try:
            train_online(learner, TrajectoryReplay(2000, 11, 3), task, log=log)
        finally:
            vec_env.close()

    with (
        pytest.raises(UserError, match=r"Hopper-v5 failed .*worker process \d+ ended by signal SIGKILL"),
        failures_kept(Path()),
    ):
        train()
    assert killed == [40]
    assert not any(process.is_alive() for process in vec_env.processes)


def test_an_environment_that_fails_in_a_validation_costs_nothing_that_was_learned(tmp_path: Path) -> None:
    def fails(step: int) -> Mapping[str, float]:
        raise EnvironmentFailedError("bandit", "in reset()", "the server is gone")

    learner = bandit(env_steps=60, steps_per_iteration=10, updates_per_iteration=1, eval_every=20, checkpoint_every=50)
    checkpoints = Checkpoints(tmp_path)
    replay, task = TrajectoryReplay(500, 2, 1), make_task(Bandit, 1)
    with pytest.raises(EnvironmentFailedError, match="what was learned before is saved"):
        train_online(learner, replay, task, log=lambda *_: None, evaluate=fails, checkpoints=checkpoints)
    state = checkpoints.load()
    assert state is not None
    assert state.record["env_steps"] == 20
    again = bandit(env_steps=60, steps_per_iteration=10, updates_per_iteration=1, eval_every=20, checkpoint_every=50)
    counters = train_online(
        again, TrajectoryReplay(500, 2, 1), task, log=lambda *_: None, evaluate=lambda _: {}, checkpoints=checkpoints
    )
    assert counters.env_steps == 60
    assert counters.update == 6


@pytest.mark.parametrize("which", ["validate", "measure"])
def test_what_an_environment_kept_from_being_evaluated_is_evaluated_after_the_resume(
    which: str, tmp_path: Path
) -> None:
    """The curves lacked a point, and the best parameters may have been those it would have found."""
    played: dict[str, list[int]] = {"validate": [], "measure": []}

    def play(kind: str, step: int, fails: bool) -> Mapping[str, float]:
        if fails and (kind, step) == (which, 20):
            raise EnvironmentFailedError("bandit", "in reset()", "the server is gone")
        played[kind].append(step)
        return {}

    def train(fails: bool) -> None:
        learner = bandit(env_steps=60, steps_per_iteration=10, updates_per_iteration=1, eval_every=20)
        train_online(
            learner,
            TrajectoryReplay(500, 2, 1),
            make_task(Bandit, 1),
            log=lambda *_: None,
            evaluate=lambda step: play("validate", step, fails),
            measure=lambda step: play("measure", step, fails),
            measure_at=[20, 30],
            checkpoints=Checkpoints(tmp_path),
        )

    with pytest.raises(EnvironmentFailedError):
        train(fails=True)
    train(fails=False)
    assert played == {"validate": [20, 40], "measure": [20, 30]}


def test_checkpoints_of_before_validations_were_remembered_are_read(tmp_path: Path) -> None:
    """Whatever they hold has been validated as far as anyone knows."""
    checkpoints, steps = Checkpoints(tmp_path), list[int]()

    def validate(step: int) -> Mapping[str, float]:
        steps.append(step)
        return {}

    once = {"steps_per_iteration": 10, "updates_per_iteration": 1, "eval_every": 20}
    for env_steps in (20, 60):
        learner = bandit(env_steps=env_steps, checkpoint_every=20, **once)
        train_online(
            learner,
            TrajectoryReplay(500, 2, 1),
            make_task(Bandit, 1),
            log=lambda *_: None,
            evaluate=validate,
            checkpoints=checkpoints,
        )
        state = checkpoints.load()
        assert state is not None
        record = {key: value for key, value in state.record.items() if key not in {"validated_at", "measured_at"}}
        checkpoints.save(dataclasses.replace(state, record=record))
    assert steps == [40]
