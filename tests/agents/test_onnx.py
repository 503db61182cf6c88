"""Exported policies act as torch does, in onnxruntime alone."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from eva_rl.adapters import load_policy, save_adapted_policy
from eva_rl.agents import DecisionTransformerPolicy, load_base_policy, save_policy
from eva_rl.agents.context import Acting
from eva_rl.agents.decision_transformer import TOKEN_ORDERS
from eva_rl.agents.onnx import OnnxPolicy, export_onnx, largest_difference
from eva_rl.batch import InputScaling
from eva_rl.data import Trajectories
from eva_rl.envs import make_vec_env
from eva_rl.errors import UserError
from eva_rl.export import main
from eva_rl.rollouts.evaluation import evaluate_policy
from tests.adapters.making import attached, train
from tests.conftest import make_policy

EXAMPLE = Path(__file__).parents[2] / "examples" / "act_with_onnx.py"
SHAPES: dict[str, dict[str, Any]] = {
    "usual": {},
    "relu, one head, narrow MLP": {"activation": "relu", "num_heads": 1, "inner_size": 24},
    "tanh form of gelu, no tanh of actions": {"activation": "gelu_new", "action_tanh": False},
    "reward tokens": {"token_order": TOKEN_ORDERS[1]},
    "one layer, context of one": {"num_layers": 1, "context_length": 1},
    "odd context, few timesteps": {"context_length": 5, "max_timestep": 7},
    "stochastic": {"stochastic": True},
}


def scaled(policy: DecisionTransformerPolicy, dim: int, act: int) -> DecisionTransformerPolicy:
    """With a normaliser, a scale and bounds that matter."""
    generator = np.random.default_rng(0)
    low = generator.normal(size=act) - 2
    policy.scaling = InputScaling.create(
        generator.normal(size=dim),
        generator.uniform(0.1, 3, dim),
        7.0,
        low.tolist(),
        (low + np.array([1, 2, 5])).tolist(),
    )
    policy.set_target_return(30.0, "metaworld/reach-v3")
    return policy


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_actions_equal_torchs(tmp_path: Path, shape: dict[str, Any]) -> None:
    policy = scaled(make_policy(11, 3, **shape), 11, 3)
    assert export_onnx(policy, tmp_path / "policy.onnx") < 1e-5
    assert largest_difference(policy, tmp_path / "policy.onnx", steps=40, seed=1) < 1e-5
    policy.conditioning = replace(policy.conditioning, per_env={"metaworld/reach-v3": -30.0})
    assert largest_difference(policy, tmp_path / "policy.onnx", steps=5) > 1e-4, "the target return matters"


def test_a_task_with_options_asks_for_the_same_return(tmp_path: Path) -> None:
    policy = scaled(make_policy(11, 3), 11, 3)
    policy.set_target_return(-30.0, "metaworld/reach-v3")
    policy.env_id = "metaworld/reach-v3?fixed"
    assert export_onnx(policy, tmp_path / "policy.onnx") < 1e-5
    policy.set_target_return(300.0, "metaworld/reach-v3?fixed")
    assert largest_difference(policy, tmp_path / "policy.onnx", steps=5) > 1e-4, "the target return matters"


def test_an_export_does_not_depend_on_how_the_policy_acts(tmp_path: Path) -> None:
    """It was held against full windows, or bfloat16, from which it differs; and the policy lost its histories."""
    policy = scaled(make_policy(11, 3), 11, 3)
    policy.scaling = replace(policy.scaling, action_half_range=torch.tensor([1.0, 0.0, 1.0]))
    policy.window, policy.acting = "full", Acting("bfloat16")
    policy.reset(["x"] * 2)
    assert export_onnx(policy, tmp_path / "policy.onnx") < 1e-5
    numbers = np.zeros(2, np.float32)
    assert policy.act(np.zeros((2, 11), np.float32), numbers, numbers == 0).shape == (2, 3)
    assert policy.window == "full"


def test_bounds_are_held_against_the_tasks(tmp_path: Path) -> None:
    """A policy whose actions end at 1 played Pendulum, whose torque ends at 2, without a word."""
    policy = make_policy(3, 1)
    export_onnx(policy, tmp_path / "policy.onnx")
    with pytest.raises(UserError, match="Pendulum-v1 takes actions from -2 to 2, the policy acts from -1 to 1"):
        evaluate_policy(OnnxPolicy(tmp_path / "policy.onnx"), "Pendulum-v1", episodes=1, horizon=2)
    policy.set_action_bounds(-2, 2)
    export_onnx(policy, tmp_path / "policy.onnx")
    assert (
        len(evaluate_policy(OnnxPolicy(tmp_path / "policy.onnx"), "Pendulum-v1", episodes=1, horizon=2).episodes) == 1
    )


def test_a_full_window_and_steps_with_memory_give_the_same(tmp_path: Path) -> None:
    """Called by its inputs: T steps at once, and one by one with the keys and values of the call before."""
    policy = scaled(make_policy(11, 3), 11, 3)
    export_onnx(policy, tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx", providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["eva_rl"])
    B, T = 4, 6
    generator = np.random.default_rng(2)
    columns = {
        "observations": generator.normal(size=(B, T, 11)).astype(np.float32),
        "previous_actions": generator.normal(size=(B, T, 3)).astype(np.float32),
        "previous_rewards": generator.normal(size=(B, T, 1)).astype(np.float32),
        "returns_to_go": generator.normal(size=(B, T, 1)).astype(np.float32),
        "timesteps": np.tile(np.arange(T), (B, 1)),
    }
    layers, _, heads, _, width = about["empty_memory"]
    empty = np.zeros((layers, B, heads, 0, width), np.float32)
    window, keys, values = session.run(None, columns | {"keys": empty, "values": empty})
    memory = [empty, empty]
    for step in range(T):
        now = {name: column[:, step : step + 1] for name, column in columns.items()}
        action, *memory = session.run(None, now | dict(zip(("keys", "values"), memory, strict=True)))
    np.testing.assert_allclose(action, window, atol=1e-5)
    np.testing.assert_allclose(memory[0], keys, atol=1e-5)
    np.testing.assert_allclose(memory[1], values, atol=1e-5)
    assert np.abs(window[0] - window[1]).max() > 1e-3


def test_the_example_is_short_and_needs_no_torch(tmp_path: Path) -> None:
    """In a process of its own, from an empty folder: what it prints is what torch does in the policy's own task."""
    policy = scaled(make_policy(11, 3), 11, 3)
    policy.env_id = "metaworld/reach-v3?goal=7"  # asked for what reach-v3 is
    export_onnx(policy, tmp_path / "policy.onnx")
    program = EXAMPLE.read_text()
    assert len(program.splitlines()) <= 40
    guarded = program + "\nassert not {'torch', 'eva_rl', 'transformers', 'onnx'} & set(sys.modules), sys.modules"
    command = [sys.executable, "-c", guarded, str(tmp_path / "policy.onnx")]
    done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    rows = done.stdout.replace("\n ", " ").splitlines()
    printed = np.array([[float(x) for x in row.partition("[")[2].rstrip("]").split()] for row in rows])
    generator = np.random.default_rng(0)
    mean, std = policy.scaling.observation_mean.numpy(), policy.scaling.observation_std.numpy()
    policy.reset([policy.env_id])
    assert policy.conditioning.of(policy.env_id) != policy.conditioning.target_return
    for step, row in enumerate(printed):
        observation = generator.normal(mean, std)[None].astype(np.float32)
        action = policy.act(observation, np.zeros(1, np.float32), np.array([step == 0]))[0]
        np.testing.assert_allclose(row, action, atol=2e-5)
    assert len(printed) == 30


def test_the_command_merges_the_adapter(
    tmp_path: Path, reach_demonstrations: Trajectories, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, adapter = attached("lora", reach_demonstrations)
    train(policy, reach_demonstrations, adapter)
    save_adapted_policy(tmp_path / "run", policy, adapter, "card")
    assert main([f"policy={tmp_path / 'run'}", "to=onnx", f"out={tmp_path / 'run.onnx'}"]) == 0
    assert "differ by at most" in capsys.readouterr().err
    loaded, base = load_policy(tmp_path / "run"), load_base_policy(tmp_path / "run")
    assert largest_difference(loaded, tmp_path / "run.onnx", steps=12) < 1e-5
    assert largest_difference(base, tmp_path / "run.onnx", steps=12) > 1e-4
    about = OnnxPolicy(tmp_path / "run.onnx").about
    assert about["base_sha256"] == json.loads((tmp_path / "run/adapter/eva_rl.json").read_text())["base_sha256"]
    assert len(about["adapter_sha256"]) == 64
    assert (about["action_low"], about["target_return"]) == ([-1.0] * 4, 1000.0)
    assert main([f"policy={tmp_path / 'run'}", "to=onnx", f"out={tmp_path / 'run.onnx'}"]) == 2, "not overwritten"


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reach_demonstrations: Trajectories
) -> None:
    with pytest.raises(UserError, match="Merge it first"):
        export_onnx(attached("lora", reach_demonstrations)[0], tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install 'eva-rl\[onnx\]'"):
        export_onnx(make_policy(), tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "policy.onnx"
    export_onnx(scaled(make_policy(11, 3), 11, 3), path)
    return path


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_changed_byte_is_found(exported: Path, tmp_path: Path, place: float) -> None:
    content = bytearray(exported.read_bytes())
    content[int(place * len(content))] ^= 1
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(UserError, match="damaged or was changed"):
        OnnxPolicy(tmp_path / "a.onnx")


def foreign() -> bytes:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    content: bytes = model.SerializeToString()
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "no ONNX model"),
        (b"not a model", "no ONNX model"),
        (foreign(), "no metadata of eva-rl"),
    ],
)
def test_files_that_are_no_exported_policies(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(UserError, match=message):
        OnnxPolicy(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format"),
        ({"observation_mean": "wide"}, "observation_mean is 'wide'"),
        ({"observation_mean": [0.0] * 5}, "its metadata describe"),
        ({"action_high": [1.0]}, "its metadata describe"),
        ({"action_low": [None] * 3}, r"action_low\[0\]"),
        ({"context_length": 0}, "context_length is 0"),
        ({"context_length": 2.5}, "context_length is 2.5"),
        ({"empty_memory": [10**9] * 5}, "empty_memory"),
        ({"empty_memory": [1, 1, 1, 0, 1]}, "its metadata describe"),
        ({"target_return": "high"}, "target_return is 'high'"),
        ({"per_env": {"x": []}}, r"per_env\.x"),
        ([1, 2], "an object with"),
    ],
)
def test_metadata_are_checked(exported: Path, tmp_path: Path, change: Any, message: str) -> None:
    """As of a file without a digest, which earlier versions wrote."""
    model = onnx.load(exported)
    about = json.loads(model.metadata_props[0].value)
    del about["sha256"]
    model.metadata_props[0].value = json.dumps(change if isinstance(change, list) else about | change)
    onnx.save_model(model, tmp_path / "a.onnx")
    with pytest.raises(UserError, match=message):
        OnnxPolicy(tmp_path / "a.onnx")
    model.metadata_props[0].value = json.dumps(about)
    onnx.save_model(model, tmp_path / "a.onnx")
    policy = OnnxPolicy(tmp_path / "a.onnx")
    policy.reset([""])
    with pytest.raises(UserError, match=r"observations of shape \(1, 4\), expected \(1, 11\)"):
        policy.act(np.zeros((1, 4), np.float32), np.zeros(1, np.float32), np.ones(1, bool))


def test_an_episode_begins_without_being_said(exported: Path) -> None:
    """After ``reset`` torch's policy acts, too, where nobody says that an episode starts."""
    actions = []
    for starts in (np.ones(1, bool), np.zeros(1, bool)):
        policy = OnnxPolicy(exported)
        policy.reset([""])
        actions.append(policy.act(np.zeros((1, 11), np.float32), np.zeros(1, np.float32), starts))
    np.testing.assert_array_equal(*actions)


def test_a_run_s_own_folder_gives_the_file_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a hidden ``.onnx.onnx``."""
    save_policy(tmp_path / "mine", make_policy())
    monkeypatch.chdir(tmp_path / "mine")
    assert main(["policy=.", "to=onnx"]) == 0
    assert [path.name for path in (tmp_path / "mine").glob("*.onnx")] == ["mine.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), [("mt40", "metaworld/push-v3"), ("hopper", "Hopper-v5")])
@torch.no_grad()
def test_a_thousand_env_steps(tmp_path: Path, name: str, task: str) -> None:
    policy = load_base_policy(name)
    export_onnx(policy, tmp_path / "policy.onnx")
    exported, env = OnnxPolicy(tmp_path / "policy.onnx"), make_vec_env(task, 1, seed=0)
    observations, rewards, starts = env.reset(), np.zeros(1, np.float32), np.ones(1, bool)
    for one in (policy, exported):
        one.reset([task])
    differences = []
    for _ in range(1000):
        actions, others = (one.act(observations, rewards, starts) for one in (policy, exported))
        differences.append(float(np.abs(actions - others).max()))
        exported.executed(actions)
        observations, rewards, starts, _ = env.step(actions)
    env.close()
    assert max(differences) <= 1e-5
