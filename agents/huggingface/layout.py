"""Hugging Face's ``DecisionTransformerModel`` and this package's network, name by name, in both directions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eva_rl.agents.decision_transformer import TOKEN_ORDERS, DecisionTransformerConfig
from eva_rl.agents.policy_record import LARGEST_SIZE
from eva_rl.batch import InputScaling
from eva_rl.errors import UserError
from eva_rl.schema import Boolean, Integer, Number, OneOf, Optional, Record

MODEL_TYPE = "decision_transformer"
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
}
LAYER_NORM_EPSILON = 1e-5
DEFAULTS: Mapping[str, Any] = {
    "state_dim": 17,
    "act_dim": 4,
    "hidden_size": 128,
    "max_ep_len": 4096,
    "action_tanh": True,
    "n_layer": 3,
    "n_head": 1,
    "n_inner": None,
    "activation_function": "relu",
    "resid_pdrop": 0.1,
    "layer_norm_epsilon": LAYER_NORM_EPSILON,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""Hugging Face's own; a config.json leaves out what equals them."""
ALIASES = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
"""Names that transformers takes for its own, as in a config.json that is written by hand."""

_size, _flag = Integer(1, LARGEST_SIZE), Boolean()
CONFIG = Record(
    {"model_type": OneOf((MODEL_TYPE,))},
    {
        **dict.fromkeys(("state_dim", "act_dim", "hidden_size", "max_ep_len", "n_layer", "n_head"), _size),
        **dict.fromkeys(("action_tanh", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"), _flag),
        "add_cross_attention": _flag,
        "n_inner": Optional(Integer(0, LARGEST_SIZE)),
        "activation_function": OneOf(tuple(ACTIVATIONS)),
        "resid_pdrop": Number(0, 1),
        "layer_norm_epsilon": Number(0, 1),
    },
    others=True,
)
"""What is read of a config.json; the rest belongs to GPT-2's other uses."""

POSITIONS = "encoder.wpe.weight"
UNUSED = re.compile(r"(encoder\.wte\..*|predict_(state|return)\..*|.*\.attn\.(bias|masked_bias))")
"""Token embedding, auxiliary heads and the causal masks that old versions kept among the weights."""

Entry = tuple[str, tuple[str, ...], bool]


def layout(num_layers: int) -> list[Entry]:
    """Hugging Face's name, our names in the order in which they are fused, and whether the weight is transposed.

    Its ``Conv1D`` keeps weights as (in, out), and ``c_attn`` holds queries, keys and values side by side.
    """
    linear = {
        "embed_return": "embed_return",
        "embed_state": "embed_state",
        "embed_action": "embed_action",
        "embed_ln": "embed_norm",
        "encoder.ln_f": "final_norm",
        "predict_action.0": "action_head",
    }
    entries = [_entry(theirs, [ours], kind) for theirs, ours in linear.items() for kind in ("weight", "bias")]
    entries.append(("embed_timestep.weight", ("embed_timestep.weight",), False))
    for i in range(num_layers):
        ours, theirs = f"blocks.{i}", f"encoder.h.{i}"
        for kind in ("weight", "bias"):
            entries.append(_entry(f"{theirs}.ln_1", [f"{ours}.attention_norm"], kind))
            entries.append(_entry(f"{theirs}.ln_2", [f"{ours}.mlp_norm"], kind))
            qkv = [f"{ours}.attention.{x}_proj" for x in "qkv"]
            entries.append(_entry(f"{theirs}.attn.c_attn", qkv, kind, conv1d=True))
            entries.append(_entry(f"{theirs}.attn.c_proj", [f"{ours}.attention.o_proj"], kind, conv1d=True))
            entries.append(_entry(f"{theirs}.mlp.c_fc", [f"{ours}.mlp.up_proj"], kind, conv1d=True))
            entries.append(_entry(f"{theirs}.mlp.c_proj", [f"{ours}.mlp.down_proj"], kind, conv1d=True))
    return entries


def _entry(theirs: str, ours: Sequence[str], kind: str, conv1d: bool = False) -> Entry:
    return f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours), conv1d and kind == "weight"


def to_huggingface(state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names; meta tensors give the expected shapes."""
    weights = {}
    for theirs, ours, transposed in layout(num_layers):
        fused = torch.cat([state[name] for name in ours])
        weights[theirs] = fused.T.contiguous() if transposed else fused
    return weights


def from_huggingface(weights: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Hugging Face's weights under our names."""
    state: dict[str, Tensor] = {}
    for theirs, ours, transposed in layout(num_layers):
        weight = weights[theirs].T if transposed else weights[theirs]
        state |= dict(zip(ours, weight.chunk(len(ours)), strict=True))
    return state


def absorb_quirks(state: dict[str, Tensor], config: Mapping[str, Any], position: Tensor | None) -> None:
    """Fold what our network does not have into weights that act at the same place, exactly.

    Args:
        state: Weights under our names; changed.
        config: Hugging Face's, complete.
        position: (D,), row 0 of the position embedding. All position ids are zero, so it is added to every token,
            right after the embedding's LayerNorm.
    """
    if position is not None:
        state["embed_norm.bias"] = state["embed_norm.bias"] + position
    for i in range(config["n_layer"]):
        scale = 1.0 if config["scale_attn_weights"] else math.sqrt(config["hidden_size"] // config["n_head"])
        scale /= i + 1 if config["scale_attn_by_inverse_layer_idx"] else 1
        for kind in ("weight", "bias") if scale != 1.0 else ():
            name = f"blocks.{i}.attention.q_proj.{kind}"
            state[name] = state[name] * scale


def absorb_action_units(state: dict[str, Tensor], scaling: InputScaling, *, head: bool) -> None:
    """Let a network that takes actions in the environment's units take them scaled to [-1, 1], exactly.

    Args:
        state: Weights under our names; changed.
        scaling: Where the bounds of the actions are.
        head: Whether it gives them in the environment's units as well.
    """
    center, divisor, embed = scaling.action_center, scaling.action_divisor, state["embed_action.weight"]
    state["embed_action.bias"] = state["embed_action.bias"] + embed @ center
    state["embed_action.weight"] = embed * divisor
    if head:
        state["action_head.bias"] = (state["action_head.bias"] - center) / divisor
        state["action_head.weight"] = state["action_head.weight"] / divisor[:, None]


def complete_config(config: Any, where: str) -> dict[str, Any]:
    """A config.json with Hugging Face's defaults filled in.

    Raises:
        UserError: It is another architecture's, or asks for something that our network cannot do.
    """
    model_type = config.get("model_type") if isinstance(config, Mapping) else None
    if model_type != MODEL_TYPE:
        raise UserError(
            f"{where} describes model_type {model_type!r}; expected {MODEL_TYPE!r}. Name the folder of a Decision "
            "Transformer."
        )
    named = {ALIASES[name]: value for name, value in config.items() if name in ALIASES}
    full = {**DEFAULTS, **CONFIG.of({**config, **named}, where)}
    if full["add_cross_attention"] or full["layer_norm_epsilon"] != LAYER_NORM_EPSILON:
        raise UserError(
            f"{where}: add_cross_attention={full['add_cross_attention']} and layer_norm_epsilon="
            f"{full['layer_norm_epsilon']}; expected False and {LAYER_NORM_EPSILON}. Other forms are not supported."
        )
    return full


def architecture(full: Mapping[str, Any], context_length: int, where: str) -> DecisionTransformerConfig:
    """Our config for a complete one of Hugging Face's.

    Raises:
        UserError: Its values do not make an architecture.
    """
    try:
        return DecisionTransformerConfig(
            observation_dim=full["state_dim"],
            action_dim=full["act_dim"],
            hidden_size=full["hidden_size"],
            num_layers=full["n_layer"],
            num_heads=full["n_head"],
            inner_size=full["n_inner"] or 0,
            context_length=context_length,
            max_timestep=full["max_ep_len"],
            activation=ACTIVATIONS[full["activation_function"]],
            dropout=full["resid_pdrop"],
            action_tanh=full["action_tanh"],
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def huggingface_config(config: DecisionTransformerConfig) -> dict[str, Any]:
    """The config.json of one of our networks.

    Raises:
        UserError: Hugging Face's model cannot represent it.
    """
    if config.token_order != TOKEN_ORDERS[0]:
        raise UserError(
            f"Hugging Face's Decision Transformer takes the tokens {TOKEN_ORDERS[0]} of a step; this policy takes "
            f"{config.token_order}. It can only be kept as a folder of eva-rl: save_policy(folder, policy)."
        )
    dropout = config.dropout
    return {
        "architectures": ["DecisionTransformerModel"],
        "model_type": MODEL_TYPE,
        "state_dim": config.observation_dim,
        "act_dim": config.action_dim,
        "hidden_size": config.hidden_size,
        "max_ep_len": config.max_timestep,
        "action_tanh": config.action_tanh,
        "vocab_size": 1,
        "n_positions": config.context_length * config.tokens_per_step,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.inner_size or None,
        "activation_function": config.activation,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
    }
