"""An environment that fails while a policy learns: what was learned before is saved, and a second start goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from eva_rl.data.replay import TrajectoryReplay
from eva_rl.envs import deadline
from eva_rl.envs.checked import CheckedEnv
from eva_rl.errors import EnvironmentFailedError
from eva_rl.training.checkpoint import Checkpoints
from eva_rl.training.collector import OnlineCounters, TaskEnvs
from eva_rl.training.odt import OnlineDecisionTransformer
from eva_rl.training.online import train_online
from eva_rl.training.options import ODTOptions, SACOptions
from eva_rl.training.sb3 import make_model, train_sb3
from tests.training.problems import Bandit, make_learner

ENV_STEPS = 96


class Breaks(Bandit):
    """Loses its device at its fortieth step, or waits for it for ever."""

    count, waits = 0, False

    def step(self, action: Any) -> Any:
        type(self).count += 1
        while type(self).count == 40:
            if not self.waits:
                raise OSError("device lost")
            time.sleep(0.05)
        return super().step(action)


FAULTS = {False: "OSError: device lost", True: r"step\(\) has not returned for 0 s"}


@pytest.fixture(
    params=[
        pytest.param(False, id="raises"),
        pytest.param(True, id="hangs", marks=pytest.mark.slow),
    ]
)
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said of the failure."""
    monkeypatch.setattr(deadline, "LIMIT", 0.3)
    monkeypatch.setattr(Breaks, "waits", request.param)
    Breaks.count = 0
    return FAULTS[request.param]


def task() -> TaskEnvs:
    return TaskEnvs(DummyVecEnv([lambda: CheckedEnv(Breaks(), "bandit")]), "problem", False)


def learn_odt(folder: Path) -> OnlineCounters:
    options = ODTOptions(batch_size=4, env_steps=ENV_STEPS, steps_per_iteration=16, checkpoint_every=1000)
    learner = OnlineDecisionTransformer(make_learner(stochastic=True), options)
    replay = TrajectoryReplay(500, 2, 1)
    return train_online(learner, replay, task(), log=lambda *_: None, checkpoints=Checkpoints(folder))


@pytest.mark.slow
def test_what_was_learned_is_saved_and_continued(tmp_path: Path, fault: str) -> None:
    with pytest.raises(EnvironmentFailedError, match=rf"bandit failed in env step \d .*{fault}") as caught:
        learn_odt(tmp_path)
    assert "what was learned before is saved" in str(caught.value)
    saved = Checkpoints(tmp_path).load()
    assert saved is not None
    assert 32 <= saved.step < ENV_STEPS
    assert saved.record["update"] > 0
    assert learn_odt(tmp_path).env_steps >= ENV_STEPS
    assert Breaks.count < ENV_STEPS + 40, "the second start did not begin afresh"


def test_stable_baselines3_saves_too(tmp_path: Path, fault: str) -> None:
    options = SACOptions(env_steps=ENV_STEPS, batch_size=8, learning_starts=8, replay_size=1000)
    where = task()
    with pytest.raises(EnvironmentFailedError, match=f"{fault}.*what was learned before is saved"):
        train_sb3(
            make_model(make_learner(), where, options),
            where,
            options,
            log=lambda *_: None,
            checkpoints=Checkpoints(tmp_path),
        )
    saved = Checkpoints(tmp_path).load()
    assert saved is not None
    assert 0 < saved.step < ENV_STEPS
