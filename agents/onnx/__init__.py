"""Policies as ONNX files, for programs without torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eva_rl.agents.context import Acting
from eva_rl.agents.onnx.graph import build_graph
from eva_rl.agents.onnx.runtime import (
    FORMAT,
    FORMAT_VERSION,
    METADATA_KEY,
    UNSEALED,
    OnnxPolicy,
    onnx_module,
    sealed_content,
)
from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.agents.policy_folder import weights_digest
from eva_rl.agents.policy_record import policy_record
from eva_rl.errors import UserError
from eva_rl.files import write_file

__all__ = ["OnnxPolicy", "export_onnx", "largest_difference"]

TOLERANCE = 1e-4
"""Largest difference of an action from torch's, as a part of half its range, with which a file is written."""


def export_onnx(policy: DecisionTransformerPolicy, path: str | Path, about: Mapping[str, Any] | None = None) -> float:
    """Write a policy as one ONNX file: network, normaliser, scales and bounds in the graph, the rest in its metadata.

    Args:
        policy: Without an adapter, or with one that is merged for good.
        path: The file; what was there is replaced.
        about: More metadata, as JSON values.

    Returns:
        Largest difference from torch's actions over three contexts of random observations, as a part of half the
        action's range.

    Raises:
        UserError: onnx or onnxruntime is missing, an adapter is attached, or the file would act otherwise.
    """
    onnx_module("onnx")
    onnx_module("onnxruntime")
    weights = policy.network.state_dict()
    if any(".base_layer." in name for name in weights):
        raise UserError("The policy has an adapter. Merge it first: policy.adapters.merge_and_unload().")
    facts = _facts(policy) | dict(about or {}) | {"sha256": UNSEALED}
    scaling = policy.scaling.to("cpu")
    model = build_graph(policy.network.config, weights, scaling, {METADATA_KEY: json.dumps(facts)})
    found = 0.0

    def write(aside: Path) -> None:
        nonlocal found
        aside.write_bytes(sealed_content(model.SerializeToString()))
        found = largest_difference(policy, aside, steps=3 * policy.network.config.context_length)
        if not found <= TOLERANCE:
            raise UserError(f"{path} differs from torch's actions by {found:.2g}. It is not written.")

    write_file(Path(path), write)
    return found


def _facts(policy: DecisionTransformerPolicy) -> dict[str, Any]:
    config, record, conditioning = policy.network.config, policy_record(policy), policy.conditioning
    if policy.env_id:  # by the very name, which a program without this package looks up
        conditioning = conditioning.with_target(conditioning.of(policy.env_id), policy.env_id)
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **record["scaling"],
        "target_return": conditioning.target_return,
        "per_env": dict(conditioning.per_env),
        "env_id": policy.env_id,
        "context_length": config.context_length,
        "token_order": list(config.token_order),
        "empty_memory": [config.num_layers, 1, config.num_heads, 0, config.hidden_size // config.num_heads],
        "weights_sha256": weights_digest(policy.network.state_dict()),
    }


def largest_difference(policy: DecisionTransformerPolicy, path: Path, steps: int, seed: int = 0) -> float:
    """Largest difference of a file's actions from a policy's, on observations drawn from its normaliser.

    Args:
        policy: On the CPU; it keeps its own histories, and acts in float32 with a cache, as the file does.
        path: The file.
        steps: Env steps, one after the other.
        seed: Of the observations.

    Returns:
        As a part of half the action's range.
    """
    generator, scaling = np.random.default_rng(seed), policy.scaling.to("cpu")
    mean, std = scaling.observation_mean.numpy(), scaling.observation_std.numpy()
    half = scaling.action_half_range.numpy()
    alike = copy.copy(policy)
    alike.forget_histories()
    alike.window, alike.on_window, alike.acting = "cached", None, Acting()
    both = (alike, OnnxPolicy(path))
    for one in both:
        one.reset([policy.env_id])
    largest = 0.0
    for step in range(steps):
        observation = generator.normal(mean, std)[None].astype(np.float32)
        reward, start = generator.normal(size=1).astype(np.float32), np.array([step == 0])
        torchs, onnxs = (one.act(observation, reward, start) for one in both)
        largest = max(largest, float((np.abs(torchs - onnxs) / np.maximum(half, 1e-12)).max()))
    return largest
