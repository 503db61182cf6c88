"""The code blocks of docs/policies.md run, in their order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from eva_rl.agents import PredictAdapter, shipped_policies
from tests.conftest import make_policy

DOCS = Path(__file__).parents[2] / "docs" / "policies.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif("mt40" not in shipped_policies(), reason="the shipped policy is not there")
def test_the_code_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    assert len(blocks()) == 7
    for block in blocks():
        exec(compile(block, str(DOCS), "exec"), names)


class Noting(PredictAdapter):
    """Notes which observations it was told begin an episode, and which do: Hopper begins at rest."""

    told: list[bool]
    true: list[bool]

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, **more: Any) -> Any:
        rows = np.atleast_2d(observation)
        first = state is None or (np.zeros(len(rows), bool) if episode_start is None else episode_start)
        self.told += np.broadcast_to(first, len(rows)).tolist()
        self.true += (np.abs(rows[:, 5:]).max(1) < 0.0051).tolist()
        return super().predict(observation, state, episode_start, **more)


@pytest.mark.parametrize("mode", [gym.vector.AutoresetMode.NEXT_STEP, gym.vector.AutoresetMode.SAME_STEP])
def test_the_vectorised_loop_begins_episodes_where_they_begin(mode: gym.vector.AutoresetMode) -> None:
    """As it stands for Gymnasium's default, and with the line that it names for the other kind."""
    block = next(block for block in blocks() if "starts = done  # SAME_STEP" in block)
    short = f'"Hopper-v5", num_envs=2, max_episode_steps=9, vector_kwargs={{"autoreset_mode": "{mode.value}"}}'
    block = block.replace('"Hopper-v5", num_envs=2', short)
    block = re.sub(r"eva_rl.load_policy\(.*?\)", "policy", block)
    if mode == gym.vector.AutoresetMode.SAME_STEP:
        block = block.replace("starts = done  # SAME_STEP: ", "")
    Noting.told, Noting.true = [], []
    exec(compile(block, str(DOCS), "exec"), {"np": np, "PredictAdapter": Noting, "policy": make_policy(11, 3)})
    assert sum(Noting.true) >= 10
    assert Noting.told == Noting.true


def test_the_single_loop_begins_episodes_where_they_begin() -> None:
    block = next(block for block in blocks() if "adapter.observe(reward)" in block)
    block = block.replace("range(10)", "range(50)").replace("metaworld/push-v3", "Hopper-v5")
    Noting.told, Noting.true = [], []
    env = gym.make("Hopper-v5", max_episode_steps=9)
    names = {"adapter": Noting(make_policy(11, 3), "Hopper-v5"), "env": env, "np": np}
    exec(compile(re.sub(r"(?m)^(from|env =).*", "", block), str(DOCS), "exec"), names)
    assert sum(Noting.true) >= 5
    assert Noting.told == Noting.true
