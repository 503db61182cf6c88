"""Paths with spaces, umlauts, quotes and signs of every grammar, in every key, with a user's environment."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest

from eva_rl import collect, evaluate, export, pretrain
from eva_rl.agents import save_policy
from eva_rl.data import Episode, Trajectories, write_episodes
from eva_rl.finetune.command import main as finetune
from eva_rl.report.command import main as report
from tests.conftest import make_policy

ENV = "tests.envs.own_envs:OwnPoint-v2"
NAMES = ["ü ß", 'x=y, [z] {q} $H 50% ~t it\'s "q" a&b #1', "r[abc]x :x:"]


def episodes() -> Trajectories:
    rng, ends = np.random.default_rng(0), np.arange(6) == 5
    steps = {"rewards": -np.ones(6, np.float32), "terminations": ends & False, "truncations": ends}
    return Trajectories.from_episodes(
        [
            Episode(
                observations=rng.normal(size=(7, 2)).astype(np.float32),
                actions=rng.uniform(-2, 2, (6, 1)).astype(np.float32),
                **steps,
            )
            for _ in range(3)
        ],
        env_id="OwnPoint-v2",
        source="own",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_key_that_takes_a_path(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / name
    folder.mkdir()
    policy = make_policy(2, 1, hidden_size=16, num_layers=1, context_length=4, max_timestep=40)
    policy.set_action_bounds([-2.0], [2.0])
    save_policy(folder / f"base {name}", policy)
    write_episodes(folder / f"own {name}.h5", episodes())
    data, run = f"data={folder}/own {name}.h5", f"{folder}/run {name}"
    small = ["size.hidden_size=16", "size.num_layers=1", "size.num_heads=1", "size.context_length=4"]
    learn = ["algo.updates=2", "algo.batch_size=2", "threads=1", f"env={ENV}", data, "tracker=[]"]
    tune = ["adapter=lora", "adapter.rank=2", "eval.episodes=2", "eval.every=0", f"run_dir={run}"]
    assert finetune([*learn, *tune, f"policy={folder}/base {name}"]) == 0
    assert evaluate.main([f"policy={run}", f"env={ENV}", "eval.episodes=2", f"out={folder}/found {name}.json"]) == 0
    assert export.main([f"policy={run}", f"out={folder}/exported {name}"]) == 0
    assert report([run, f"out={folder}/report {name}"]) == 0
    assert pretrain.main([*learn, *small, "eval.episodes=1", f"run_dir={folder}/pretrained {name}"]) == 0
    made = {path.name for path in folder.iterdir()}
    assert made == {f"{kind} {name}" for kind in ("base", "run", "exported", "report", "pretrained")} | {
        f"own {name}.h5",
        f"found {name}.json",
    }
    said = capsys.readouterr().err
    for shown in (
        f"{run}/policy",
        shlex.quote(f"{run}/tb"),
        f"{folder}/exported {name}",
        f"{folder}/pretrained {name}/policy",
    ):
        assert shown in said
    assert f"Report: {folder}/report {name}/" in said


def test_square_brackets_and_colons_in_a_path_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither markup nor names of emoji."""
    out = tmp_path / "e[/b]" / "r[abc]x :x:.h5"
    small = ["env=reach-v3", "episodes=1", "env.horizon=20", "only_successes=false", "workers=1"]
    assert collect.main([*small, f"out={out}"]) == 0
    assert out.exists()
    assert f"data={out}" in capsys.readouterr().err
