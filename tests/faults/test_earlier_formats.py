"""What commit f38570b wrote, none of it with digests: read to the same numbers, continued to the same end, or refused.

``tests/data_files/formats_f38570b`` holds one of each format, made there on Hopper-v5 with a policy of width 8: a
policy, its export for transformers, an episode file, a store, an EVA result, and runs that were stopped at their first
checkpoint, ``end/`` of each being the policy that it ended with when it was not stopped. ``expected.json`` holds the
actions of each policy there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eva_rl import eva
from eva_rl.adapters import load_policy
from eva_rl.cli.parsing import RENAMED
from eva_rl.cli.run_dir import CONFIG_FILE
from eva_rl.data import load_dataset
from eva_rl.finetune.command import main as finetune

FILES = Path(__file__).parents[1] / "data_files/formats_f38570b"
EXPECTED = json.loads((FILES / "expected.json").read_text())
COMMON = ["policy=base", "env=Hopper-v5", "env.horizon=12", "threads=1", "tracker=[]", "eval.episodes=2"]
COMMON += ["adapter.rank=2", "data=episodes.h5"]
CLONING = ["algo.updates=12", "algo.batch_size=4", "checkpoint.every=6", "eval.every=0"]
ONLINE = ["algo.env_steps=96", "algo.num_envs=2", "algo.eval_every=0", "algo.batch_size=4", "algo.replay_size=1000"]
REPLAYED = [*ONLINE, "algo.steps_per_iteration=48", "algo.updates_per_iteration=2", "algo.checkpoint_every=48"]
REPLAYED += ["algo.keep_best=false"]
CRITICS = ["algo.critic_warmup=20", "algo.critic_hidden_size=32"]
RATE = "algo.learning_rate=0.001"
RUNS = {
    "bc_lora": ["adapter=lora", *CLONING, RATE],
    "bc_adalora": ["adapter=adalora", *CLONING, RATE],
    "bc_pissa": ["adapter=pissa", *CLONING, RATE],
    "bc_full": ["adapter=full", *CLONING, RATE],
    "odt": ["adapter=lora", "algo=odt", *REPLAYED],
    "odt_td3": [
        "adapter=lora",
        "algo=odt_td3",
        "algo.critic_warmup=20",
        "algo.critic_hidden_size=32",
        *REPLAYED,
    ],
    "sac": ["adapter=lora", "algo=sac", "algo.learning_starts=20", "algo.critic_hidden_size=32", *ONLINE],
}
"""What each run was begun with, by the names of today; the learning rate was another by default."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all files, in the working directory."""
    shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


@pytest.mark.parametrize("name", EXPECTED)
def test_policies_act_as_they_did(name: str) -> None:
    policy, rng = load_policy(FILES / name), np.random.default_rng(5)
    assert policy.adapters.names == (() if name in {"base", "exported", "bc_full/end"} else ("default",))
    policy.reset(["Hopper-v5"] * 2)
    for step, expected in enumerate(EXPECTED[name]):
        observations = rng.normal(size=(2, 11)).astype(np.float32)
        found = policy.act(observations, np.full(2, step / 4, np.float32), np.full(2, step == 0))
        np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("name", ["episodes.h5", "store"])
def test_data_are_what_they_were(name: str) -> None:
    data, rng = load_dataset(str(FILES / name)), np.random.default_rng(0)
    assert (data.env_id, data.lengths.tolist()) == ("Hopper-v5", [6, 9, 7])
    assert np.flatnonzero(data.terminations).tolist() == [14]
    for episode, steps in ((data.episode(i), n) for i, n in enumerate((6, 9, 7))):
        np.testing.assert_array_equal(episode.observations, rng.normal(size=(steps + 1, 11)).astype(np.float32))
        np.testing.assert_array_equal(episode.actions, rng.uniform(-1, 1, (steps, 3)).astype(np.float32))
        np.testing.assert_array_equal(episode.rewards, rng.normal(size=steps).astype(np.float32))


def test_a_result_of_eva_is_what_it_was() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    expected = eva.compute(model, [torch.randn(20, 5) for _ in range(3)], rank=2, alpha=1.0)  # the default then
    found = eva.EvaResult.load(FILES / "eva_result")
    assert (found.ranks, found.alphas, found.rows) == (expected.ranks, expected.alphas, expected.rows)
    for name, layer in expected.layers.items():
        np.testing.assert_allclose(found.layers[name].components.abs(), layer.components.abs(), atol=1e-5)
        assert found.layers[name].explained_variance == pytest.approx(layer.explained_variance)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter/adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


QUICK = {"bc_lora"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in RUNS if n != "odt_td3"]
)
def test_a_stopped_run_ends_as_it_would_have(name: str, files: Path) -> None:
    assert finetune([*COMMON, *RUNS[name], f"run_dir={name}"]) == 0
    found, expected = weights(files / name / "policy"), weights(files / name / "end")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)  # processors round sums differently
    begun = weights(files / "base") if name == "bc_full" else None
    assert begun is None or any(not torch.allclose(begun[key], found[key]) for key in begun)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_checkpoint_with_other_parts_is_refused(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The critics were two networks of other layers."""
    assert finetune([*COMMON, *RUNS["odt_td3"], "run_dir=odt_td3"]) == 2
    shown = said(capsys)
    assert "odt_td3/checkpoint/online does not fit (it lacks layers.0.scale" in shown
    assert "or to another version of eva-rl" in shown
    assert not (files / "odt_td3/summary.json").exists()


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("bc_lora", ["algo.learning_rate=0.002"], "algo.learning_rate=0.001"),
        ("bc_lora", ["algo.warmup_steps=7"], "algo.warmup_steps=20"),
        ("bc_lora", ["algo.ema=0.5"], "algo.ema=0.0"),
        ("bc_lora", ["eval.at=[3]"], "eval.at=[]"),
        ("sac", ["algo.train_freq=7"], "algo.train_freq=10"),
        ("odt", ["algo.demonstration_share=0.5"], "algo.demonstration_share=0.0"),
    ],
)
def test_other_settings_are_named_as_they_were(
    name: str, words: list[str], expected: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the names of today, those that came later with their default."""
    assert finetune([*COMMON, *RUNS[name], *words, f"run_dir={name}"]) == 2
    assert f"Use the same settings to continue it ({expected})" in said(capsys)


def test_every_renamed_setting_is_one_of_then() -> None:
    written = "".join((FILES / name / CONFIG_FILE).read_text() for name in RUNS)
    assert all(f"  {old}: " in written and f"  {new}: " not in written for old, new in RENAMED.items() if new != "tau")
