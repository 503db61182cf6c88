"""What a checkpoint of another project does not say about itself, and where such checkpoints come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from eva_rl.agents.decision_transformer import DecisionTransformerConfig
from eva_rl.agents.policy import Conditioning
from eva_rl.agents.policy_record import CONDITIONING, SCALING, check_inputs, check_scaling, scaling_of
from eva_rl.batch import InputScaling
from eva_rl.errors import UserError

DEFAULT_CONTEXT_LENGTH = 20
DEFAULT_RETURN_SCALE = 1000.0
HUB_FILES = ("config.json", "eva_rl.json", "policy.json", "*.safetensors", "pytorch_model.bin", "adapter/*")


@dataclass(frozen=True)
class ImportOptions:
    """Facts that Decision Transformer checkpoints of other projects lack. What is given here wins over everything.

    Attributes:
        context_length: Env steps that the network was trained to see at most; None says 20, as all gym checkpoints.
        observation_mean: (obs,), subtracted from observations; one number stands for all.
        observation_std: (obs,), divides them afterwards; one number stands for all.
        return_scale: Divides returns and rewards; None says 1000.
        target_return: What to ask for, unscaled.
        env_id: The task that the policy was trained for.
        action_low: (act,), or one number for all; None says -1.
        action_high: (act,), or one number for all; None says 1.
        num_heads: Attention heads, for bare state dicts; None says 1, for online-dt's 4. A config knows them.
        activation: Of the MLPs, for bare state dicts; None says relu, for CORL's gelu.
        allow_pickle: Whether a bare state dict may be read from a file of ``torch.save``; even then nothing but
            tensors is read from it.
    """

    context_length: int | None = None
    observation_mean: Sequence[float] | None = None
    observation_std: Sequence[float] | None = None
    return_scale: float | None = None
    target_return: float | None = None
    env_id: str | None = None
    action_low: Sequence[float] | None = None
    action_high: Sequence[float] | None = None
    num_heads: int | None = None
    activation: str | None = None
    allow_pickle: bool = False

    def of_a_checkpoint(self) -> list[str]:
        """What was given of that which policies of this package say themselves; their target return may be changed."""
        others = {"target_return", "allow_pickle"}
        return [f.name for f in fields(self) if f.name not in others and getattr(self, f.name) is not None]

    def merged_with(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """What was given, over what is known otherwise, over the defaults."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        defaults = {"context_length": DEFAULT_CONTEXT_LENGTH, "return_scale": DEFAULT_RETURN_SCALE, "env_id": ""}
        if self.target_return is not None:
            known = {name: value for name, value in known.items() if name != "per_env"}
        return {**defaults, **known, **given}


def scaling_and_target(
    facts: Mapping[str, Any], config: DecisionTransformerConfig, where: str
) -> tuple[InputScaling, Conditioning]:
    """Scaling and conditioning from the facts that :meth:`ImportOptions.merged_with` put together.

    Raises:
        UserError: The normalisation or the target return is not known, or has other dimensions.
    """
    wanted = ("observation_mean", "observation_std", "target_return")
    missing = [name for name in wanted if facts.get(name) is None]
    if missing:
        raise UserError(
            f"{where} does not say its {', '.join(missing)}, without which it cannot act. Give them: "
            "policy.observation_mean=[...] policy.observation_std=[...] policy.target_return=..., or take mean and std "
            "from data: policy.observations_from=SOURCE; in Python load_policy(..., options=ImportOptions("
            "observation_mean=..., observation_std=..., target_return=...)). They are the training observations'; [0] "
            "and [1] say that it was trained without normalisation."
        )
    given = {
        "observation_mean": _listed(facts["observation_mean"], 0.0, config.observation_dim),
        "observation_std": _listed(facts["observation_std"], 1.0, config.observation_dim),
        "return_scale": facts["return_scale"],
        "action_low": _listed(facts.get("action_low"), -1.0, config.action_dim),
        "action_high": _listed(facts.get("action_high"), 1.0, config.action_dim),
    }
    scaling = scaling_of(SCALING.of(given, where), where)
    check_scaling(config, scaling, where)
    wanted_returns = {"target_return": facts["target_return"], "per_env": facts.get("per_env", {})}
    conditioning = Conditioning(**CONDITIONING.of(wanted_returns, where))
    check_inputs(scaling, conditioning, where)
    return scaling, conditioning


def _listed(values: Any, default: float, count: int) -> list[float]:
    """Numbers of any array-like as a list; one number, or the default in place of none, ``count`` times."""
    array = np.asarray(default if values is None else values, np.float64).ravel()
    listed: list[float] = (np.repeat(array, count) if array.size == 1 else array).tolist()
    return listed


def download(hub_id: str) -> Path:
    """Fetch a checkpoint from the Hugging Face hub, or find it in the hub's cache.

    Raises:
        UserError: It is not in the cache, and there is no such repository or no network.
    """
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:  # the hub's errors are all either of them
        raise UserError(
            f"There is no folder {hub_id}, and as a Hugging Face hub id it could not be fetched: "
            f"{str(error).splitlines()[0]} Without a network, copy the repository's files into a folder whose name "
            f"ends in {Path(hub_id).name!r} and name that folder."
        ) from error
