"""The formats of policies, adapters and checkpoints that ``benchmarks/fuzz/mutate.py`` mutates."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from benchmarks.fuzz.formats import FELL_BACK, Format
from eva_rl import eva
from eva_rl.adapters import attach_adapter, load_policy, save_adapted_policy
from eva_rl.agents import (
    Conditioning,
    DecisionTransformer,
    DecisionTransformerConfig,
    DecisionTransformerPolicy,
    ImportOptions,
    export_huggingface,
    save_policy,
)
from eva_rl.batch import InputScaling
from eva_rl.errors import UserError
from eva_rl.training.checkpoint import TrainState, load_latest_checkpoint, save_checkpoint

OBS, ACT = 3, 2
GIVEN = ImportOptions(
    observation_mean=[0.0], observation_std=[1.0], target_return=5.0, context_length=2, allow_pickle=True
)


def policy() -> DecisionTransformerPolicy:
    """A small policy, the same each time."""
    torch.manual_seed(0)
    config = DecisionTransformerConfig(
        OBS, ACT, hidden_size=8, num_layers=1, num_heads=1, context_length=2, max_timestep=4, activation="relu"
    )
    network = DecisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    scaling = InputScaling.create([0.1] * OBS, [1.5] * OBS, 20.0, [-1.0] * ACT, [1.0, 2.0])
    return DecisionTransformerPolicy(network, scaling, Conditioning(5.0, {"a": 7.0}), env_id="a", metadata={"b": [1]})


def _make_adapted(folder: Path) -> None:
    made = policy()
    adapter = attach_adapter(made, "lora", rank=2)
    for name, parameter in made.network.named_parameters():
        if ".lora_B" in name:
            parameter.data.fill_(0.1)
    save_adapted_policy(folder / "policy", made, adapter, "card")


def _make_adapter(folder: Path) -> None:
    """As plain PEFT leaves it: without what eva-rl writes beside."""
    _make_adapted(folder)
    for path in [folder / "policy/policy.json", folder / "policy/model.safetensors", *folder.rglob("README.md")]:
        path.unlink()
    (folder / "policy/adapter/eva_rl.json").unlink()
    (folder / "policy/adapter").rename(folder / "adapter")
    (folder / "policy").rmdir()


def _make_exported(folder: Path) -> None:
    export_huggingface(policy(), folder / "policy")


def _make_bare(folder: Path) -> None:
    export_huggingface(policy(), folder / "policy")
    (folder / "policy/eva_rl.json").unlink()


def _make_pickle(folder: Path) -> None:
    _make_bare(folder)
    from safetensors.torch import load_file

    torch.save({"model_state": load_file(folder / "policy/model.safetensors")}, folder / "policy.pt")
    for path in (folder / "policy").iterdir():
        path.unlink()
    (folder / "policy").rmdir()


def _described(path: Path, options: ImportOptions | None = None, adapter: Path | None = None) -> str:
    """What a policy does and says of itself."""
    loaded = load_policy(path, options=options, adapters=None if adapter is None else {"x": adapter})
    if adapter is not None:
        loaded.adapters.use("x")
    generator = np.random.default_rng(0)
    loaded.reset(["a", "c"])
    digest = hashlib.sha256(repr((loaded.env_id, loaded.conditioning, loaded.adapters.names)).encode())
    for step in range(4):
        observations = generator.normal(size=(2, OBS)).astype(np.float32)
        actions = loaded.act(observations, np.ones(2, np.float32), np.full(2, step == 0))
        if not np.isfinite(actions).all():
            raise FloatingPointError("the policy acts NaN")
        digest.update(actions.tobytes())
    return digest.hexdigest()


def _load_adapter(folder: Path) -> str:
    base = folder / "base-of-the-adapter"
    if not base.exists():
        save_policy(base, policy())
    return _described(base, adapter=folder / "adapter")


STATES = {step: TrainState(step, {"w": torch.full((3,), float(step))}, {"loss": step / 2}) for step in (1, 2)}


def _make_checkpoints(folder: Path) -> None:
    for state in STATES.values():
        save_checkpoint(folder / "checkpoint", state)


def _load_checkpoints(folder: Path) -> str:
    """``sound`` where what is loaded is the last checkpoint; falling back to the first is what is wanted."""
    state = load_latest_checkpoint(folder / "checkpoint")
    if state is None:
        raise UserError("none")
    known = STATES.get(state.step)
    same = known is not None and (dict(state.record), list(state.tensors)) == (dict(known.record), ["w"])
    if not same or not torch.equal(state.tensors["w"], torch.full((3,), float(state.step))):
        return repr(state)
    return "sound" if state.step == max(STATES) else FELL_BACK


def _make_eva_result(folder: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    found = eva.compute(model, [torch.randn(20, 5) for _ in range(2)], rank=2)
    found.ended("max_batches", 1.0).save(folder / "eva")


def _load_eva_result(folder: Path) -> str:
    found = eva.EvaResult.load(folder / "eva")
    return repr((found.to_report(), [layer.components.tolist() for layer in found.layers.values()]))


FORMATS: dict[str, Format] = {
    "EVA result": Format(_make_eva_result, _load_eva_result, ours=True),
    "policy": Format(
        lambda folder: save_policy(folder / "policy", policy()), lambda folder: _described(folder / "policy"), ours=True
    ),
    "adapted policy": Format(_make_adapted, lambda folder: _described(folder / "policy"), ours=True),
    "exported HF": Format(
        _make_exported,
        lambda folder: _described(folder / "policy"),
        ours=True,
    ),
    "checkpoints": Format(_make_checkpoints, _load_checkpoints, ours=True),
    "PEFT adapter": Format(_make_adapter, _load_adapter),
    "Hugging Face": Format(_make_bare, lambda folder: _described(folder / "policy", GIVEN)),
    "torch.save": Format(_make_pickle, lambda folder: _described(folder / "policy.pt", GIVEN)),
}
"""By name."""
