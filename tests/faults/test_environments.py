"""Environments that fail: one message with the environment, the env step and the cause, in every loop."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from eva_rl import collect, envs
from eva_rl.envs import deadline, worker
from eva_rl.errors import ActionNotFiniteError, EnvironmentFailedError
from eva_rl.rollouts.evaluation import evaluate_policy
from tests.conftest import make_policy

GOOD = np.zeros(3, np.float32)


class Faulty(gym.Env[Any, Any]):
    """Does something that no environment may do, at its start or at env step 3."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, fault: str) -> None:
        self._fault, self._step = fault, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self._step = 0
        result: Any = (GOOD, {})
        if self._fault.startswith("reset_"):
            result = RESETS[self._fault]()
        return result

    def step(self, action: Any) -> Any:
        self._step += 1
        if self._step < 3 or self._fault not in STEPS:
            return GOOD, 0.0, False, False, {}
        return STEPS[self._fault]()


def raises(error: BaseException) -> Any:
    def act() -> Any:
        raise error

    return act


def forever() -> Any:
    while True:
        time.sleep(0.05)


def spins() -> Any:
    while True:
        pass


def swallows() -> Any:
    while True:
        with contextlib.suppress(Exception):
            forever()


def deadlock() -> Any:
    """A call of compiled code that no signal interrupts."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


HANGS = {"hangs": forever, "spins": spins, "swallows": swallows, "deadlocks": deadlock}
RESETS = {
    "reset_hangs": forever,
    "reset_spins": spins,
    "reset_raises": raises(RuntimeError("no licence")),
    "reset_quits": raises(SystemExit("no display")),
    "reset_old_interface": lambda: GOOD,
    "reset_nan": lambda: (np.full(3, np.nan), {}),
}
STEPS: dict[str, Any] = {
    **HANGS,
    "raises": raises(ZeroDivisionError("by zero")),
    "exits": raises(OSError("device lost")),
    "asserts": raises(AssertionError("torque")),
    "quits": raises(SystemExit(3)),
    "old_interface": lambda: (GOOD, 0.0, False, {}),
    "wrong_shape": lambda: (np.zeros(4), 0.0, False, False, {}),
    "texts": lambda: (np.array(["a", "b", "c"]), 0.0, False, False, {}),
    "ragged": lambda: ([1.0, None, 2.0], 0.0, False, False, {}),
    "nan_observation": lambda: (np.array([0, np.nan, 0]), 0.0, False, False, {}),
    "too_large": lambda: (np.array([0, 1e300, 0]), 0.0, False, False, {}),
    "nan_reward": lambda: (GOOD, float("nan"), False, False, {}),
    "infinite_reward": lambda: (GOOD, -np.inf, False, False, {}),
    "no_reward": lambda: (GOOD, None, False, False, {}),
    "two_rewards": lambda: (GOOD, np.zeros(2), False, False, {}),
    "flag_none": lambda: (GOOD, 0.0, None, False, {}),
    "slow": lambda: time.sleep(0.2) or (GOOD, 0.0, False, False, {}),
    "info_none": lambda: (GOOD, 0.0, False, False, None),
}
ENDLESS = {*HANGS, "reset_hangs", "reset_spins", "slow"}
CAUSES = {
    "raises": "ZeroDivisionError: by zero",
    "exits": "OSError: device lost",
    "asserts": "AssertionError: torque",
    "quits": "SystemExit: 3",
    "old_interface": "expected 5, got 4",
    "wrong_shape": r"shape \(4,\)",
    "reset_raises": "RuntimeError: no licence",
    "reset_quits": "SystemExit: no display",
    "two_rewards": r"shape \(2,\)",
}


class Stuck(Faulty):
    """Its constructor waits for ever."""

    def __init__(self) -> None:
        forever()


class Unclosing(Faulty):
    """Cannot be closed."""

    def close(self) -> None:
        raise OSError("device lost")


for cls in (Faulty, Stuck, Unclosing):
    gym.register(f"{cls.__name__}-v0", entry_point=cls)


def play(vec_env: envs.TaskVecEnv, steps: int) -> None:
    vec_env.reset()
    for _ in range(steps):
        vec_env.step(np.zeros((vec_env.num_envs, *vec_env.action_space.shape), np.float32))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", [fault for fault in (*STEPS, *RESETS) if fault in CAUSES or fault not in ENDLESS])
def test_a_failing_environment_is_one_message(fault: str, workers: int) -> None:
    vec_env = envs.make_vec_env(f"Faulty-v0?fault={fault}", 2, seed=5, workers=workers)
    with pytest.raises(EnvironmentFailedError, match=CAUSES.get(fault, ".")) as caught:
        play(vec_env, 3)
    vec_env.close()
    where = "at the start" if fault.startswith("reset_") else "in env step 3"
    assert f"Faulty-v0?fault={fault} failed {where} of the episode seeded 5: " in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "where"), [("hangs", r"in env step 3 .* step\(\)"), ("reset_hangs", r"at the start .* reset\(\)")]
)
def test_an_environment_that_never_returns_is_ended(fault: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "LIMIT", 0.3)
    monkeypatch.setattr(worker, "CLOSING", 0.1)
    vec_env = envs.make_vec_env(f"Faulty-v0?fault={fault}", 3, seed=5, workers=2)
    with pytest.raises(EnvironmentFailedError, match=rf"failed {where} has not returned for 0 s") as caught:
        play(vec_env, 3)
    assert f"fault={fault} failed" in str(caught.value)
    assert "of the episode seeded 5" in str(caught.value)
    vec_env.close()
    assert not any(process.is_alive() for process in vec_env.processes)


@pytest.mark.parametrize("fault", ["hangs", "spins", "swallows", "reset_hangs", "reset_spins"])
def test_one_in_this_process_is_interrupted(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "LIMIT", 0.2)
    vec_env = envs.make_vec_env(f"Faulty-v0?fault={fault}", 1, seed=5)
    where = r"at the start .* reset\(\)" if fault.startswith("reset_") else r"in env step 3 .* step\(\)"
    with pytest.raises(EnvironmentFailedError, match=rf"fault={fault} failed {where} has not returned for 0 s"):
        play(vec_env, 3)
    vec_env.close()


def test_a_key_sets_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deadline, "LIMIT", deadline.LIMIT)  # puts it back
    out = f"out={tmp_path / 'a.h5'}"
    assert collect.main(["env=Stuck-v0", "env.timeout=1", "expert=sac", out]) == 2
    assert "its constructor has not returned for 1 s (env.timeout=)" in " ".join(capsys.readouterr().err.split())
    assert collect.main(["env=Stuck-v0", "env.timeout=0", out]) == 2


def test_a_constructor_that_never_returns_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "LIMIT", 0.2)
    with pytest.raises(EnvironmentFailedError, match=r"Stuck-v0 failed while it was made: its constructor has not"):
        envs.env_spec("Stuck-v0")


def test_a_call_that_cannot_be_interrupted_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "LIMIT", 0.2)
    monkeypatch.setattr(deadline, "GRACE", 0.1)

    def run() -> None:
        sys.stderr = (tmp_path / "said").open("w")
        play(envs.make_vec_env("Faulty-v0?fault=deadlocks", 1, seed=5), 3)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == 2
    said = (tmp_path / "said").read_text()
    assert said.count("\n") == 1
    assert "fault=deadlocks failed in env step 3 of the episode seeded 5: step() has not returned for 0 s" in said
    assert "could not be interrupted" in said
    assert "by the same command with its run_dir=" in said


def test_the_signals_of_others_pass() -> None:
    """One that somebody handles arrives in the middle of an env step, as it would without us."""

    def run() -> None:
        got: list[int] = []
        signal.signal(deadline.SIGNAL, lambda number, _: got.append(number))
        vec_env = envs.make_vec_env("Faulty-v0?fault=slow", 1)
        threading.Timer(0.1, lambda: os.kill(os.getpid(), deadline.SIGNAL)).start()
        play(vec_env, 3)
        os._exit(len(got))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_suspended_process_is_not_late(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock it is, when it goes on."""
    monkeypatch.setattr(deadline, "LIMIT", 0.4)

    def run() -> None:
        os.setpgrp()
        vec_env = envs.make_vec_env("Faulty-v0?fault=slow", 1, workers=workers)
        play(vec_env, 2)
        (tmp_path / "begun").touch()
        vec_env.step(np.zeros((1, 2), np.float32))  # takes 0.2 s
        vec_env.close()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    assert process.pid
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(0.6)
    os.killpg(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_what_fails_at_the_close_spoils_nothing(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    vec_env = envs.make_vec_env("Unclosing-v0?fault=none", 2, workers=workers)
    caplog.clear()  # of the environment that was looked at for its spaces
    play(vec_env, 2)
    vec_env.close()
    assert caplog.text.count("device lost") == (0 if workers else 2)


def test_slow_environments_of_one_worker_are_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four that take 0.2 s each: the worker is silent for longer than one of them may be."""
    monkeypatch.setattr(deadline, "LIMIT", 0.5)
    vec_env = envs.make_vec_env("Faulty-v0?fault=slow", 4, workers=1)
    play(vec_env, 3)
    vec_env.close()


def test_a_healthy_one_passes() -> None:
    vec_env = envs.make_vec_env("Faulty-v0?fault=none", 1, horizon=4)
    vec_env.reset()
    dones = [bool(vec_env.step(np.zeros((1, 2), np.float32))[2][0]) for _ in range(4)]
    assert dones == [False, False, False, True]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("env", ["push-v3", "Hopper-v5"])
def test_an_action_that_is_not_finite_is_the_policys_fault(env: str, bad: float) -> None:
    """Meta-World clips a NaN action away without a word, so that a broken policy would be given a success rate."""
    spec = envs.env_spec(env)
    policy = make_policy(spec.observation_dim, spec.action_dim)
    policy.network.action_head.bias.data[0] = bad
    policy.network.action_head.weight.data[0] = bad
    with pytest.raises(ActionNotFiniteError, match=r"the policy's action is not finite") as caught:
        evaluate_policy(policy, env, episodes=2, horizon=3)
    assert spec.env_id in str(caught.value)
    assert isinstance(caught.value.saved(), ActionNotFiniteError)
    vec_env = envs.make_vec_env(env, 2, horizon=3, workers=1)  # also where it comes from another process
    vec_env.reset()
    with pytest.raises(ActionNotFiniteError, match=r"the policy's action is not finite"):
        vec_env.step(np.full((2, spec.action_dim), bad, np.float32))
    vec_env.close()


def test_a_worker_that_is_killed_is_one_message() -> None:
    vec_env = envs.make_vec_env("Hopper-v5", 3, workers=2)
    vec_env.reset()
    os.kill(vec_env.processes[1].pid, signal.SIGKILL)
    with pytest.raises(EnvironmentFailedError, match=r"Hopper-v5 .*worker process \d+ ended by signal SIGKILL"):
        play(vec_env, 3)
    vec_env.close()
    assert not any(process.is_alive() for process in vec_env.processes)


def test_workers_end_with_their_parent_and_with_the_environments() -> None:
    vec_env = envs.make_vec_env("Hopper-v5", 2, workers=2)
    vec_env.reset()
    processes = vec_env.processes
    vec_env.close()
    assert [process.exitcode for process in processes] == [0, 0]


def test_messages_are_short_and_name_the_environment_first() -> None:
    error = EnvironmentFailedError("X-v0", "in env step 3 of the episode seeded 1", "a reward is not finite: nan")
    expected = "The environment X-v0 failed in env step 3 of the episode seeded 1: a reward is not finite: nan."
    assert re.fullmatch(re.escape(expected), str(error))
