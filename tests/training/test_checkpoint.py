"""Checkpoints: when they are made, what they survive, and how a run is interrupted."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from eva_rl.data import Trajectories, WindowSampler
from eva_rl.errors import UserError
from eva_rl.files import remove_leftovers, write_folder
from eva_rl.training import checkpoint
from eva_rl.training.bc import train_bc
from eva_rl.training.checkpoint import Checkpoints, TrainState, latest_step, load_latest_checkpoint, save_checkpoint
from eva_rl.training.failures import interrupts_deferred, sigterm_like_ctrl_c
from eva_rl.training.options import BCOptions
from tests.conftest import make_policy

OPTIONS = BCOptions(updates=12, batch_size=4, warmup_steps=2, log_every=1)
Log = Callable[[Mapping[str, float], int], None]


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def clone(data: Trajectories, checkpoints: Checkpoints | None, log: Log = lambda *_: None) -> dict[str, torch.Tensor]:
    """Train, from the latest checkpoint if there is one, and give the weights at the end."""
    torch.manual_seed(5)
    policy = make_policy(hidden_size=16, num_layers=1)
    policy.network.dropout.p = 0.1  # so that the random states matter
    sampler = WindowSampler(data, 6, policy.scaling, seed=1)
    train_bc(policy, sampler, OPTIONS, log=log, checkpoints=checkpoints)
    return {name: value.clone() for name, value in policy.network.state_dict().items()}


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def assert_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_checkpoints_by_time_resume_to_the_bit(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    """Four seconds a step and a checkpoint every ten: one after steps 3, 6, ...; killed at step 8, it resumes at 6."""
    clock = Clock()

    def tick(_: object, step: int) -> None:
        clock.now += 4
        if step == 8:
            raise ConnectionError

    expected = clone(reach_demonstrations, None)
    with pytest.raises(ConnectionError):
        clone(reach_demonstrations, Checkpoints(tmp_path, seconds=10, clock=clock), tick)
    assert steps(tmp_path) == [3, 6]
    logged: list[int] = []
    found = clone(reach_demonstrations, Checkpoints(tmp_path, 500), lambda _, step: logged.append(step))
    assert logged == list(range(7, 13))
    assert_equal(found, expected)


def test_large_checkpoints_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    checkpoints = Checkpoints(tmp_path, seconds=10, clock=clock)
    clock.now = 10
    assert checkpoints.due_by_time()

    def slow(*_: object) -> None:
        clock.now += 3

    monkeypatch.setattr("eva_rl.training.checkpoint.save_checkpoint", slow)
    checkpoints.save(TrainState(1, {}, {}))
    for later, due in ((10, False), (59, False), (60, True)):
        clock.now = 13 + later
        assert checkpoints.due_by_time() == due


@pytest.mark.parametrize(("every", "seconds"), [(0, 0.0), (5, 0.0), (0, 60.0)])
def test_zero_makes_none(every: int, seconds: float, tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    clone(reach_demonstrations, Checkpoints(tmp_path, every, seconds))
    assert steps(tmp_path) == ([] if not every and not seconds else [10, 12] if every else [12])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_finishes_and_saves_the_gradient_step(
    number: signal.Signals, tmp_path: Path, reach_demonstrations: Trajectories
) -> None:
    expected = clone(reach_demonstrations, None)

    def interrupt(_: object, step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt), sigterm_like_ctrl_c():
        clone(reach_demonstrations, Checkpoints(tmp_path, 500), interrupt)
    assert steps(tmp_path) == [5]
    assert_equal(clone(reach_demonstrations, Checkpoints(tmp_path, 500)), expected)


def test_a_second_signal_interrupts_at_once_and_handlers_come_back() -> None:
    before, reached = signal.getsignal(signal.SIGINT), []

    def interrupted() -> None:
        with interrupts_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("after the first")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("after the second")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert reached == ["after the first"]
    assert signal.getsignal(signal.SIGINT) is before


def damage(path: Path, random_: random.Random) -> str:
    """Damage one file in one of several ways; returns which."""
    content = bytearray(path.read_bytes())
    kind = random_.choice(["flip", "cut", "grow", "empty", "missing", "garbage"])
    if kind == "flip":
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    elif kind == "cut":
        del content[random_.randrange(1, len(content)) :]
    elif kind == "grow":
        content += b"\0"
    elif kind == "empty":
        content.clear()
    elif kind == "garbage":
        content[:] = random_.randbytes(len(content))
    path.unlink() if kind == "missing" else path.write_bytes(content)
    return f"{kind} of {path.name}"


@pytest.mark.parametrize("seed", range(40))
def test_every_damage_falls_back_to_the_checkpoint_before(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {"parameter/a": torch.arange(6.0), "random/torch": torch.get_rng_state()}
    for step in (1, 2):
        save_checkpoint(tmp_path, TrainState(step, tensors, {"update": step, "windows": 8 * step, "seconds": 0.5}))
    random_ = random.Random(seed)
    file = random_.choice(sorted((tmp_path / "step_000000002").iterdir()))
    done = damage(file, random_)
    state = load_latest_checkpoint(tmp_path)
    assert state is not None
    assert (state.step, state.record["update"]) == (1, 1), done
    assert latest_step(tmp_path) == 1
    assert "trying the checkpoint before it" in caplog.text
    damage(tmp_path / "step_000000001" / file.name, random.Random(seed))
    for read in (load_latest_checkpoint, latest_step):
        with pytest.raises(UserError, match="All checkpoints"):
            read(tmp_path)


def test_the_step_is_known_without_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert latest_step(tmp_path) is None
    save_checkpoint(tmp_path, TrainState(7, {"a": torch.zeros(2)}, {}))
    monkeypatch.setattr(checkpoint, "load_file", None)
    assert latest_step(tmp_path) == 7


def test_leftovers_of_a_killed_process_are_removed_and_what_it_replaced_comes_back(tmp_path: Path) -> None:
    def fill(text: str) -> Any:
        return lambda aside: (aside / "a").write_text(text)

    write_folder(tmp_path / "policy", fill("first"))
    (tmp_path / ".policy.0a1b2c3d.partial").mkdir()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/.state.json.0a1b2c3d.partial").write_text("{")
    (tmp_path / "policy").rename(tmp_path / ".policy.old")  # killed between the two renames
    remove_leftovers(tmp_path)
    assert (tmp_path / "policy/a").read_text() == "first"
    assert {path.name for path in tmp_path.rglob("*")} == {"policy", "a", "checkpoint"}
