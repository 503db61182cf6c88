from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eva_rl import collect
from eva_rl.data import Trajectories, read_episodes, write_episodes
from eva_rl.data.trajectories import Episode
from eva_rl.errors import UserError
from eva_rl.rollouts.experts import ActionNoise, _in_order, collect_expert
from eva_rl.rollouts.trained_experts import TrainedExpert, collect_trained


def same(one: Trajectories, two: Trajectories) -> bool:
    return one.content_hash == two.content_hash


def test_experts_solve_their_task(reach_demonstrations: Trajectories) -> None:
    data = reach_demonstrations
    assert data.num_episodes == 4
    assert (data.lengths == 200).all()
    assert data.successes is not None
    assert data.successes[data.offsets[1:] - 1].all()
    assert data.truncations.sum() == 4
    assert not data.terminations.any()
    assert (data.returns > 1500).all()
    assert len(np.unique(data.observations[data.offsets[:-1], 36:39], axis=0)) == 4, "each episode has its own goal"


@pytest.mark.slow
def test_same_seed_same_episodes_with_any_number_of_workers(reach_demonstrations: Trajectories) -> None:
    assert same(collect_expert("reach-v3", 4, seed=3, workers=2), reach_demonstrations)
    assert not same(collect_expert("reach-v3", 4, seed=4), reach_demonstrations)


def test_noise_disturbs_what_is_executed_but_not_what_is_imitated() -> None:
    data = collect_expert("reach-v3", 2, seed=0, noise=ActionNoise(std=0.5, burst_probability=0.1))
    assert data.target_actions is not None
    assert np.abs(data.actions - data.target_actions).mean() > 0.05
    assert np.abs(data.actions).max() <= 1
    from eva_rl import envs

    expert = envs.scripted_expert("metaworld/reach-v3")
    np.testing.assert_array_equal(data.target_actions[37], expert(data.observations[37]))


def test_failures_are_left_out_unless_asked_for() -> None:
    noise = ActionNoise(std=1.0, burst_probability=0.3)
    told: list[Episode] = []
    kept = collect_expert("hand-insert-v3", 3, seed=1, noise=noise, on_episode=told.append)
    assert [len(episode.rewards) for episode in told] == kept.lengths.tolist()
    assert kept.successes is not None
    assert all(kept.episode(i).successes.any() for i in range(3))  # type: ignore[union-attr]
    every = collect_expert("hand-insert-v3", 3, seed=1, noise=noise, only_successes=False)
    assert not same(kept, every)


def test_tasks_without_a_script_say_so() -> None:
    with pytest.raises(UserError, match=r"No scripted expert for Hopper-v5; .* Type data=FILE"):
        collect_expert("mujoco/hopper", 1)


def test_collecting_names_the_expert_that_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It advised data=, which is no key of it."""
    assert collect.main(["env=Hopper-v5", f"out={tmp_path / 'hopper.h5'}"]) == 2
    assert "Type expert=sac" in " ".join(capsys.readouterr().err.split())


def test_an_agent_explores_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The noise was passed over, and noted in the file."""
    for noise in ("noise.std=0.4", "noise.burst_probability=0.5"):
        assert collect.main(["env=Hopper-v5", "expert=sac", noise, f"out={tmp_path / 'hopper.h5'}"]) == 2
        assert f"{noise}: expert=sac explores with noise of its own" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match=r"expert\.steps=100: the agent is evaluated every 5000 env steps"):
        collect_trained("Hopper-v5", 1, TrainedExpert(max_steps=100, until=1000.0))


def test_a_process_that_ends_early_is_explained() -> None:
    """As one does that is killed for its memory, or whose script has no main guard."""
    ends: Any = partial(os._exit)
    with pytest.raises(UserError, match=r"ended early.*__main__.*data\.workers=1 \(collect_expert\(workers=1\)\)"):
        list(_in_order(ends, range(1, 3), workers=2, chunk=2))


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "from eva_rl.errors import UserError\n"
        "from eva_rl.rollouts.experts import collect_expert\n"
        "try:\n"
        "    collect_expert('reach-v3', 2, workers=2, horizon=5, only_successes=False)\n"
        "except UserError as error:\n"
        "    print('said:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"], check=True, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert "said: A process that collects demonstrations ended early. In a script of yours, call" in done.stdout


def test_file_round_trip(tmp_path, reach_demonstrations: Trajectories) -> None:
    path = tmp_path / "reach.h5"
    write_episodes(path, reach_demonstrations, {"seed": 3})
    back = read_episodes(path)
    assert same(back, reach_demonstrations)
    np.testing.assert_array_equal(back.final_observations, reach_demonstrations.final_observations)
    np.testing.assert_array_equal(back.successes, reach_demonstrations.successes)
    assert back.env_id == "metaworld/reach-v3"
    with pytest.raises(UserError, match="not overwritten"):
        write_episodes(path, reach_demonstrations)
    assert list(tmp_path.iterdir()) == [path], "no partial file is left behind"
