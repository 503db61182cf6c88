"""Policy folders: ``policy.json`` and ``model.safetensors``; and the policies that come with the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eva_rl.agents.decision_transformer import DecisionTransformer, DecisionTransformerConfig
from eva_rl.agents.policy import Conditioning, DecisionTransformerPolicy
from eva_rl.batch import InputScaling
from eva_rl.errors import UnknownNameError, UserError
from eva_rl.files import read_json, write_folder, write_json

FORMAT = "eva-rl policy"
FORMAT_VERSION = 1
POLICY_FILE = "policy.json"
WEIGHTS_FILE = "model.safetensors"


def shipped_policies() -> dict[str, Path]:
    """Folders of the policies that come with the package, by name."""
    folder = Path(str(resources.files("eva_rl.agents"))) / "pretrained"
    return {path.name: path for path in sorted(folder.glob("*")) if (path / POLICY_FILE).is_file()}


def find_policy(name_or_path: str) -> Path:
    """Folder of a policy, given its path or a shipped name.

    Raises:
        UnknownNameError: Neither a policy folder nor a shipped name.
    """
    path = Path(name_or_path).expanduser()
    for folder in (path, path / "policy"):
        if (folder / POLICY_FILE).is_file():
            return folder
    shipped = shipped_policies()
    if name_or_path in shipped:
        return shipped[name_or_path]
    raise UnknownNameError(
        "policy", name_or_path, shipped, f"Expected one of them, or a folder that holds {POLICY_FILE}."
    )


def load_policy(name_or_path: str | Path, device: torch.device | str = "cpu") -> DecisionTransformerPolicy:
    """Load the base policy of a folder, or a policy that comes with the package.

    Args:
        name_or_path: A policy folder, a run directory that holds one, or a shipped name.
        device: Where the network goes.

    Raises:
        UserError: No such policy, or its files are damaged or do not fit each other.
    """
    return read_policy(find_policy(str(name_or_path))).to(device)


def read_policy(folder: Path) -> DecisionTransformerPolicy:
    """Load the base policy from a folder made by :func:`save_policy`, without its adapter."""
    record = read_json(folder / POLICY_FILE)
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != FORMAT_VERSION:
        raise UserError(f"{folder / POLICY_FILE} is not an {FORMAT} of version {FORMAT_VERSION}.")
    try:
        config = DecisionTransformerConfig(**record["architecture"])
        scaling = InputScaling.create(**record["scaling"])
        conditioning = Conditioning(**record["conditioning"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / POLICY_FILE} is damaged or of another version: {error}.") from error
    _check_scaling(folder, config, scaling)
    with torch.device("meta"):
        network = DecisionTransformer(config)
    weights = _read_weights(folder / WEIGHTS_FILE, network.state_dict())
    network.load_state_dict(weights, assign=True)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    return DecisionTransformerPolicy(
        network.eval(), scaling, conditioning, env_id=record.get("env_id", ""), metadata=record.get("metadata")
    )


def _check_scaling(folder: Path, config: DecisionTransformerConfig, scaling: InputScaling) -> None:
    found = (len(scaling.observation_mean), len(scaling.observation_std), len(scaling.action_center))
    expected = (config.observation_dim, config.observation_dim, config.action_dim)
    if found != expected:
        raise UserError(f"{folder / POLICY_FILE}: the scaling has lengths {found}, the architecture {expected}.")


def _read_weights(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged: {error}.") from error
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not part of the architecture" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        raise UserError(f"{path} does not fit {POLICY_FILE}: {'; '.join(problems[:5])}.")
    return {name: value.float() for name, value in weights.items()}


def save_policy(
    folder: Path,
    policy: DecisionTransformerPolicy,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a policy folder, completely or not at all.

    Args:
        folder: Where to; what was there is replaced.
        policy: What to write.
        weights: The base network's weights where they are not ``policy.network.state_dict()`` (an adapter is
            injected, say).
        dtype: Precision of the weights on disk; they are loaded as float32.
    """
    write_folder(folder, lambda aside: write_policy_files(aside, policy, weights, dtype))


def write_policy_files(
    folder: Path, policy: DecisionTransformerPolicy, weights: Mapping[str, Tensor] | None, dtype: torch.dtype
) -> None:
    """Write ``policy.json`` and ``model.safetensors`` into an existing folder."""
    state = policy.network.state_dict() if weights is None else weights
    save_file({k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}, folder / WEIGHTS_FILE)
    write_json(folder / POLICY_FILE, policy_record(policy))


def policy_record(policy: DecisionTransformerPolicy) -> dict[str, Any]:
    """Everything of a policy but its weights, as JSON values."""
    scaling = policy.scaling.to("cpu")
    conditioning = policy.conditioning
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "architecture": asdict(policy.network.config),
        "scaling": {
            "observation_mean": scaling.observation_mean.tolist(),
            "observation_std": scaling.observation_std.tolist(),
            "return_scale": scaling.return_scale,
            "action_low": (scaling.action_center - scaling.action_half_range).tolist(),
            "action_high": (scaling.action_center + scaling.action_half_range).tolist(),
        },
        "conditioning": {"target_return": conditioning.target_return, "per_env": dict(conditioning.per_env)},
        "env_id": policy.env_id,
        "metadata": policy.metadata,
    }
