"""A policy's facts, all but its weights, as JSON values and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eva_rl.agents.decision_transformer import ACTION, RETURN, REWARD, STATE, DecisionTransformerConfig
from eva_rl.agents.policy import Conditioning, DecisionTransformerPolicy
from eva_rl.agents.transformer import ACTIVATIONS
from eva_rl.agents.weights import first_line
from eva_rl.batch import InputScaling
from eva_rl.errors import UserError
from eva_rl.files import check_seal, read_json
from eva_rl.schema import DIGEST, Boolean, Integer, ListOf, MapOf, Number, OneOf, Record, Text

FORMAT = "eva-rl policy"
FORMAT_VERSION = 1
LARGEST_SIZE = 10**7
"""Largest number in an architecture; what it makes of them is held against the weights before anything is built."""
STD = Number(1e-10, 1e10)
"""A standard deviation, or a scale of returns, that can be divided by."""
LARGEST_INPUT = 1e10
"""Largest scaled mean or return: what a network makes of it, squared, is within float32."""

_size, _number = Integer(1, LARGEST_SIZE), Number()
ARCHITECTURE = Record(
    {"observation_dim": _size, "action_dim": _size},
    {
        "hidden_size": _size,
        "num_layers": _size,
        "num_heads": _size,
        "inner_size": Integer(0, LARGEST_SIZE),
        "context_length": _size,
        "max_timestep": _size,
        "activation": OneOf(tuple(ACTIVATIONS)),
        "dropout": Number(0, 1),
        "token_order": ListOf(OneOf((RETURN, STATE, ACTION, REWARD))),
        "stochastic": Boolean(),
        "action_tanh": Boolean(),
    },
)
SCALING = Record(
    {
        "observation_mean": ListOf(_number),
        "observation_std": ListOf(STD),
        "return_scale": STD,
        "action_low": ListOf(_number),
        "action_high": ListOf(_number),
    }
)
CONDITIONING = Record({"target_return": _number}, {"per_env": MapOf(_number)})
RECORD = Record(
    {
        "format": OneOf((FORMAT,)),
        "version": OneOf((FORMAT_VERSION,)),
        "architecture": ARCHITECTURE,
        "scaling": SCALING,
        "conditioning": CONDITIONING,
    },
    {
        "env_id": Text(),
        "metadata": Record({}, others=True),
        "adapter": Boolean(),
        "notes": ListOf(Text()),
        "files": MapOf(Text(DIGEST)),
        "sha256": Text(DIGEST),
    },
)
"""``policy.json``, and ``eva_rl.json`` beside a model of Hugging Face's."""


def policy_record(policy: DecisionTransformerPolicy) -> dict[str, Any]:
    """Everything of a policy but its weights, as JSON values."""
    conditioning = policy.conditioning
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "architecture": asdict(policy.network.config),
        "scaling": scaling_record(policy.scaling),
        "conditioning": {
            "target_return": float(conditioning.target_return),
            "per_env": {name: float(target) for name, target in conditioning.per_env.items()},
        },
        "env_id": policy.env_id,
        "metadata": policy.metadata,
    }


def scaling_record(scaling: InputScaling) -> dict[str, Any]:
    """What :func:`scaling_of` reads, as JSON values."""
    scaling = scaling.to("cpu")
    return {
        "observation_mean": scaling.observation_mean.tolist(),
        "observation_std": scaling.observation_std.tolist(),
        "return_scale": scaling.return_scale,
        "action_low": (scaling.action_center - scaling.action_half_range).tolist(),
        "action_high": (scaling.action_center + scaling.action_half_range).tolist(),
    }


def read_record(path: Path) -> tuple[dict[str, Any], DecisionTransformerConfig, InputScaling, Conditioning]:
    """Record of :func:`policy_record` in a file, with its architecture, scaling and conditioning.

    Args:
        path: ``policy.json``, or ``eva_rl.json`` beside a model of Hugging Face's.

    Raises:
        UserError: The record is another file's, damaged, or its parts do not fit each other.
    """
    record = read_json(path)
    if not isinstance(record, Mapping) or (record.get("format"), record.get("version")) != (FORMAT, FORMAT_VERSION):
        raise UserError(f"{path} is not an {FORMAT} of version {FORMAT_VERSION}.")
    check_seal(record, path)
    checked = RECORD.of(record, str(path))
    try:
        config = DecisionTransformerConfig(**checked["architecture"])
    except UserError as error:
        raise UserError(f"{path}: architecture: {error}") from error
    scaling = scaling_of(checked["scaling"], str(path))
    conditioning = Conditioning(**checked["conditioning"])
    check_scaling(config, scaling, str(path))
    check_inputs(scaling, conditioning, str(path))
    return checked, config, scaling, conditioning


def scaling_of(values: Mapping[str, Any], where: str) -> InputScaling:
    """The scaling that a record's ``scaling`` describes, its types checked.

    Raises:
        UserError: The action bounds have different lengths.
    """
    low, high = len(values["action_low"]), len(values["action_high"])
    if low != high:
        raise UserError(f"{where}: action_low has {low} numbers and action_high {high}; expected one an action number.")
    return InputScaling.create(**values)


def check_record(policy: DecisionTransformerPolicy, where: str) -> None:
    """Raise unless what is saved of a policy will be read again.

    Raises:
        UserError: Naming ``where`` and the number that is out of range.
    """
    try:
        written = json.dumps(policy_record(policy))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: {first_line(error)}. Expected numbers, strings, lists and dictionaries in metadata."
        ) from error
    RECORD.of(json.loads(written), where)
    check_inputs(policy.scaling.to("cpu"), policy.conditioning, where)


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
    if bool((scaling.action_half_range < 0).any()):
        index = int((scaling.action_half_range < 0).nonzero()[0])
        raise UserError(f"{where}: action_low[{index}] is above action_high[{index}]; expected low to be below high.")


def check_inputs(scaling: InputScaling, conditioning: Conditioning, where: str) -> None:
    """Raise unless scaled observations and returns are numbers that a network can compute with.

    Raises:
        UserError: Naming ``where`` and the number.
    """
    returns = [conditioning.target_return, *conditioning.per_env.values()]
    found = {
        "an observation mean over its std": float((scaling.observation_mean / scaling.observation_std).abs().max()),
        "a target return over return_scale": max(map(abs, returns)) / scaling.return_scale,
    }
    for name, value in found.items():
        if not value <= LARGEST_INPUT:
            raise UserError(f"{where}: {name} is {value:.3g}; expected at most {LARGEST_INPUT:g}.")
