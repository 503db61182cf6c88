"""Bare state dicts of Decision Transformers, by the names of their weights, under Hugging Face's names.

Known are the original (kzl/decision-transformer, Chen et al. 2021), Online Decision Transformer (facebookresearch/
online-dt, Zheng et al. 2022, arXiv 2202.05607) and CORL's (corl-team/CORL, Tarasov et al. 2022, arXiv 2210.07105).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eva_rl.errors import UserError

KNOWN = "the original (kzl/decision-transformer), online-dt, CORL's, and Hugging Face's"
CORL_NAMES = {
    "timestep_emb.": "embed_timestep.",
    "state_emb.": "embed_state.",
    "action_emb.": "embed_action.",
    "return_emb.": "embed_return.",
    "emb_norm.": "embed_ln.",
    "out_norm.": "encoder.ln_f.",
    "action_head.0.": "predict_action.0.",
}
CORL_BLOCK = {
    "norm1.": ("ln_1.", False),
    "norm2.": ("ln_2.", False),
    "attention.in_proj_": ("attn.c_attn.", True),
    "attention.out_proj.": ("attn.c_proj.", True),
    "mlp.0.": ("mlp.c_fc.", True),
    "mlp.2.": ("mlp.c_proj.", True),
}


@dataclass(frozen=True)
class StateDict:
    """Weights under Hugging Face's names, and what their project takes for granted.

    Attributes:
        weights: By name.
        defaults: Keys of Hugging Face's config.
        log_std_head: Weight and bias of a tanh-Gaussian policy's log standard deviation; empty without one.
        raw_actions: Whether the network takes actions in the environment's units, whatever their bounds.
    """

    weights: dict[str, Tensor]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    log_std_head: Mapping[str, Tensor] = field(default_factory=dict)
    raw_actions: bool = False


def recognise(weights: Mapping[str, Tensor], where: str) -> StateDict:
    """Find out whose weights they are, and rename them.

    Args:
        weights: As they were saved.
        where: The file, for the message.

    Raises:
        UserError: Nobody's that is known.
    """
    named = _without_wrappers(weights)
    if "predict_action.mu.weight" in named:
        return _online_dt(named)
    if any(name.startswith("timestep_emb.") for name in named):
        return _corl(named)
    if any(name.startswith(("transformer.h.", "encoder.h.")) for name in named):
        return StateDict(_encoder(named), {"n_head": 1, "activation_function": "relu"})
    held = ", ".join(list(weights)[:4]) or "nothing"
    raise UserError(
        f"{where} is not a Decision Transformer of a known layout: it holds {held}. Known are {KNOWN}. Rename its "
        "weights as one of them has them, or load it where it came from and save its state_dict()."
    )


def _without_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what stands before all of their names: ``module.``, ``_orig_mod.``, ``model.``, ..."""
    named = dict(weights)
    while len({name.partition(".")[0] for name in named}) == 1 and all("." in name for name in named):
        named = {name.partition(".")[2]: value for name, value in named.items()}
    return named


def _encoder(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"^transformer\.", "encoder.", name): value for name, value in named.items()}


def _online_dt(named: dict[str, Tensor]) -> StateDict:
    """Its timestep table is not used unless it was trained with ``ordering``, and then another one is."""
    found = _encoder(named)
    ordering = found.pop("embed_ordering.weight", None)
    if "embed_timestep.weight" in found:
        table = found["embed_timestep.weight"]
        found["embed_timestep.weight"] = torch.zeros_like(table) if ordering is None else ordering
    found.pop("log_temperature", None)
    log_std = {kind: found.pop(f"predict_action.log_std.{kind}") for kind in _kinds(found, "predict_action.log_std.")}
    for kind in _kinds(found, "predict_action.mu."):
        found[f"predict_action.0.{kind}"] = found.pop(f"predict_action.mu.{kind}")
    heads = {f"log_std_head.{kind}": value for kind, value in log_std.items()}
    return StateDict(found, {"n_head": 4, "activation_function": "relu"}, heads)


def _kinds(named: Mapping[str, Tensor], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in named if name.startswith(prefix)]


def _corl(named: Mapping[str, Tensor]) -> StateDict:
    """Its attention is ``nn.MultiheadAttention``'s: queries, keys and values in one matrix, (out, in).

    What its tanh gives is multiplied by ``max_action``, and its actions are embedded as they are executed.
    """
    found = {}
    for name, value in named.items():
        if not name.endswith(".causal_mask"):
            theirs, transposed = _corl_name(name)
            found[theirs] = value.T.contiguous() if transposed and value.ndim == 2 else value
    return StateDict(found, {"n_head": 1, "activation_function": "gelu"}, raw_actions=True)


def _corl_name(name: str) -> tuple[str, bool]:
    """Hugging Face's name, and whether the weight is kept as (in, out) there."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        rest = name[block.end() :]
        for old, (new, transposed) in CORL_BLOCK.items():
            if rest.startswith(old):
                return f"encoder.h.{block[1]}.{new}{rest.removeprefix(old)}", transposed
        return name, False
    for old, new in CORL_NAMES.items():
        if name.startswith(old):
            return new + name.removeprefix(old), False
    return name, False
