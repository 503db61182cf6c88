"""Policy folders: what comes back is what went in, and what does not fit is refused before anything runs."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eva_rl import export
from eva_rl.agents import load_base_policy, save_policy
from eva_rl.agents.huggingface import ImportOptions, export_huggingface
from eva_rl.agents.onnx import OnnxPolicy
from eva_rl.agents.policy import Conditioning, DecisionTransformerPolicy
from eva_rl.errors import UserError
from eva_rl.rollouts.evaluation import evaluate_policy
from tests.conftest import make_policy, unseal

ACT_IN_A_NEW_PROCESS = """
import sys
import numpy as np
import torch
from eva_rl.agents import load_base_policy
torch.set_num_threads(1)
inputs = np.load(sys.argv[2])
policy = load_base_policy(sys.argv[1])
policy.reset(["metaworld/reach-v3"] * inputs["observations"].shape[1])
actions = [policy.act(*step) for step in zip(inputs["observations"], inputs["rewards"], inputs["starts"])]
np.save(sys.argv[3], np.stack(actions))
"""


def inputs(num_steps: int = 40, n: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(num_steps, n, 39)).astype(np.float32),
        "rewards": rng.normal(size=(num_steps, n)).astype(np.float32),
        "starts": np.array([[t % (11 + i) == 0 for i in range(n)] for t in range(num_steps)]),
    }


def act(policy: DecisionTransformerPolicy) -> np.ndarray[Any, Any]:
    given = inputs()
    policy.reset(["metaworld/reach-v3"] * 3)
    steps = zip(given["observations"], given["rewards"], given["starts"], strict=True)
    return np.stack([policy.act(*step) for step in steps])


@pytest.mark.slow
def test_a_copied_folder_acts_the_same_in_a_fresh_process(policy_folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else" / "where"
    shutil.copytree(policy_folder, elsewhere)
    expected = act(load_base_policy(policy_folder))
    shutil.rmtree(policy_folder)
    np.savez(tmp_path / "inputs.npz", **inputs())
    arguments = [str(elsewhere), str(tmp_path / "inputs.npz"), str(tmp_path / "actions.npy")]
    subprocess.run([sys.executable, "-c", ACT_IN_A_NEW_PROCESS, *arguments], check=True, cwd=tmp_path)
    assert np.array_equal(np.load(tmp_path / "actions.npy"), expected)


def test_saving_again_changes_nothing(policy_folder: Path, tmp_path: Path) -> None:
    save_policy(tmp_path / "again", load_base_policy(policy_folder))
    for name in ("policy.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (policy_folder / name).read_bytes()


def test_a_record_from_before_a_new_option_still_loads(policy_folder: Path) -> None:
    expected = act(load_base_policy(policy_folder))
    edit_json(lambda record: record["architecture"].pop("action_tanh"))(policy_folder)
    assert np.array_equal(act(load_base_policy(policy_folder)), expected)


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")
        unseal(folder / "policy.json")

    return apply


def edit_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        record = json.loads((folder / "policy.json").read_text())
        change(record)
        (folder / "policy.json").write_text(json.dumps(record))
        unseal(folder / "policy.json")

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_weights(lambda w: w.pop("final_norm.bias")), "final_norm.bias is missing"),
        (edit_weights(lambda w: w.update(extra=torch.zeros(1))), "extra is not part of the architecture"),
        (
            edit_weights(lambda w: w.update({"action_head.bias": torch.zeros(7)})),
            r"action_head.bias has shape \(7,\), expected \(4,\)",
        ),
        (edit_json(lambda r: r["architecture"].update(hidden_size=16)), r"expected \(16"),
        (edit_json(lambda r: r["architecture"].update(width=64)), "holds 'width'; expected only observation_dim"),
        (edit_json(lambda r: r["scaling"].update(observation_mean=[0.0])), "have lengths"),
        (edit_json(lambda r: r.update(version=99)), "is not an eva-rl policy of version 1"),
        (lambda folder: (folder / "policy.json").write_text("{"), "not readable JSON"),
        (lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps({})), "changed or damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is missing, and"),
    ],
)
def test_damaged_folders_are_refused(policy_folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(policy_folder)
    with pytest.raises(UserError, match=message):
        load_base_policy(policy_folder)


@pytest.mark.parametrize("name", ["model.pkl", "model.pt", "pytorch_model.bin"])
def test_pickles_are_not_opened(tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="is a pickle, which is read only on request"):
        load_base_policy(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_an_environment_of_other_dimensions_is_refused() -> None:
    with pytest.raises(UserError, match=r"Ant-v5 has 105 numbers .* the policy takes 27 and 8"):
        evaluate_policy(make_policy(27, 8), "Ant-v5", episodes=1)


def test_a_run_that_has_not_ended_is_told_from_an_unknown_policy(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="Unknown policy"):
        load_base_policy(tmp_path)
    (tmp_path / "versions.json").touch()
    with pytest.raises(UserError, match=r"is a run that has not ended.*Continue it with run_dir="):
        load_base_policy(tmp_path)


def test_a_part_of_a_policy_is_answered_with_the_whole(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PEFT's users name the adapter, and others the file of weights."""
    adapter = policy_folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").touch()
    for part in (adapter, policy_folder / "model.safetensors", policy_folder / "policy.json"):
        with pytest.raises(UserError, match=f"part of a policy. Name the whole: policy={policy_folder}$"):
            load_base_policy(part)
    with pytest.raises(UserError, match=f"holds some. Name one: policy={policy_folder}$"):
        load_base_policy(policy_folder.parent)
    (tmp_path / "hopper").mkdir()
    policy_folder.rename(tmp_path / "hopper" / "mine")
    monkeypatch.chdir(tmp_path)
    assert load_base_policy("hopper").observation_dim == 11, "the shipped one: no folder of runs is a policy"
    adapter = tmp_path / "hopper" / "mine" / "adapter"
    alone = adapter.rename(tmp_path / "alone")
    with pytest.raises(UserError, match=r"alone is an adapter alone. Name the policy it was trained on"):
        load_base_policy(alone)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(UserError, match=r"Unknown policy 'nothing-like-it'.*policy\.json"):
        load_base_policy("nothing-like-it")


def test_a_target_return_is_found_by_every_name_of_its_task() -> None:
    """The one that was set as ``reach-v3`` was never asked for where the task was called ``metaworld/reach-v3``."""
    policy = make_policy()
    policy.conditioning = Conditioning(1.0, {"metaworld/reach-v3": 2.0, "my.module:Base-v0": 3.0, "a/push-v3": 4.0})
    assert policy.conditioning.of("reach-v3") == policy.conditioning.of("metaworld/reach-v3?goal=7") == 2.0
    assert policy.conditioning.of("Base-v0") == 3.0
    assert policy.conditioning.of("b/push-v3") == policy.conditioning.of("other-v3") == 1.0
    policy.set_target_return(5, "reach-v3")
    policy.set_target_return(6, "metaworld/reach-v3?goal=7")
    assert policy.conditioning.of("metaworld/reach-v3") == 5.0
    assert policy.conditioning.of("reach-v3?goal=7") == 6.0
    assert len(policy.conditioning.per_env) == 4


def test_a_target_return_that_is_given_for_an_import_counts_for_all_tasks(tmp_path: Path) -> None:
    policy = make_policy()
    policy.conditioning = Conditioning(1.0, {"metaworld/reach-v3": 2.0})
    export_huggingface(policy, tmp_path / "hf")
    assert load_base_policy(tmp_path / "hf").conditioning.of("reach-v3") == 2.0
    given = load_base_policy(tmp_path / "hf", options=ImportOptions(target_return=7.0))
    assert given.conditioning.of("reach-v3") == 7.0


@pytest.mark.parametrize("to", ["merged", "huggingface", "onnx"])
def test_an_export_asks_for_the_return_that_is_given(to: str, policy_folder: Path, tmp_path: Path) -> None:
    """The targets of single tasks won over it."""
    policy = load_base_policy(policy_folder)
    policy.set_target_return(2.0, "metaworld/reach-v3")
    save_policy(policy_folder, policy)
    out = tmp_path / ("out.onnx" if to == "onnx" else "out")
    assert export.main([f"policy={policy_folder}", f"to={to}", f"out={out}", "policy.target_return=7"]) == 0
    if to == "onnx":
        about = OnnxPolicy(out).about
        found = Conditioning(about["target_return"], about["per_env"])
    else:
        found = load_base_policy(out).conditioning
    assert found.of("metaworld/reach-v3") == 7.0


def spoil_weights(value: float) -> Callable[[DecisionTransformerPolicy], object]:
    def spoil(policy: DecisionTransformerPolicy) -> object:
        return policy.network.action_head.weight.detach()[0].fill_(value)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weights(float("nan")), r"action_head\.weight holds numbers that are not finite"),
        (spoil_weights(1e5), r"action_head\.weight holds numbers up to 1e\+05, expected at most"),
        (lambda policy: policy.scaling.observation_std[:1].fill_(0), "observation_std"),
        (lambda policy: policy.scaling.action_half_range[:1].fill_(float("inf")), "action_low"),
        (lambda policy: policy.metadata.update(rate=np.float32(1)), "Object of type float32 is not JSON serializable"),
    ],
)
def test_a_policy_that_could_not_be_loaded_is_not_saved(
    spoil: Callable[[DecisionTransformerPolicy], object], message: str, policy_folder: Path
) -> None:
    """It took the place of one that could be."""
    policy, before = load_base_policy(policy_folder), (policy_folder / "policy.json").read_bytes()
    spoil(policy)
    with pytest.raises(UserError, match=f"The policy cannot be saved.*{message}"):
        save_policy(policy_folder, policy)
    assert (policy_folder / "policy.json").read_bytes() == before
    load_base_policy(policy_folder)


def test_target_returns_of_numpy_are_saved(tmp_path: Path) -> None:
    policy = make_policy()
    policy.conditioning = Conditioning(np.float32(2.5), {"reach-v3": np.float64(3.5)})  # type: ignore[arg-type]
    save_policy(tmp_path / "policy", policy)
    assert load_base_policy(tmp_path / "policy").conditioning == Conditioning(2.5, {"reach-v3": 3.5})
