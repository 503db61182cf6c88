"""A policy's facts, all but its weights, as JSON values and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from eva_rl.agents.decision_transformer import DecisionTransformerConfig
from eva_rl.agents.policy import Conditioning, DecisionTransformerPolicy
from eva_rl.batch import InputScaling
from eva_rl.errors import UserError

FORMAT = "eva-rl policy"
FORMAT_VERSION = 1


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


def read_record(record: Any, where: str) -> tuple[DecisionTransformerConfig, InputScaling, Conditioning]:
    """Architecture, scaling and conditioning of a record made by :func:`policy_record`.

    Args:
        record: What the JSON file holds.
        where: The file, for messages.

    Raises:
        UserError: The record is another file's, damaged, or its parts do not fit each other.
    """
    if not isinstance(record, Mapping) or (record.get("format"), record.get("version")) != (FORMAT, FORMAT_VERSION):
        raise UserError(f"{where} is not an {FORMAT} of version {FORMAT_VERSION}.")
    try:
        config = DecisionTransformerConfig(**record["architecture"])
        scaling = InputScaling.create(**record["scaling"])
        conditioning = Conditioning(**record["conditioning"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is damaged or of another version: {error}.") from error
    check_scaling(config, scaling, where)
    return config, scaling, conditioning


def check_scaling(config: DecisionTransformerConfig, scaling: InputScaling, where: str) -> None:
    """Raise unless the scaling has the architecture's dimensions.

    Raises:
        UserError: Naming ``where`` and the lengths on both sides.
    """
    found = (len(scaling.observation_mean), len(scaling.observation_std), len(scaling.action_center))
    expected = (config.observation_dim, config.observation_dim, config.action_dim)
    if found != expected:
        raise UserError(
            f"{where}: observation mean, observation std and action bounds have lengths {found}, "
            f"the architecture takes {expected}."
        )
