"""Which layers of a model can have an adapter, and which of them are targets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eva_rl.errors import UnknownNameError, UserError

# The paper adapts "all pre-trained weight matrices except for the embedding layer" (arXiv 2410.07170, section 4);
# heads are left out as well because a new task usually brings a new one.
_EMBEDDING_OR_HEAD = re.compile(
    r"(embed|embedding|embeddings|wte|wpe|embed_out|score|classifier|predict|predictions|pooler"
    r"|((action|classification|cls|lm|policy|prediction|q|return|reward|state|value)_)?heads?)(_.*)?"
)
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""By class, the attribute under which torch's wrappers keep the module."""
_ADAPTER_PARTS = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.", ".modules_to_save.")


@dataclass(frozen=True)
class Layer:
    """A Linear or Hugging Face Conv1D layer.

    Args:
        name: Its name in `model.named_modules()`, without what wrappers (torch.compile, DistributedDataParallel,
            ...) and PEFT (`.base_layer`) add.
        module: The layer itself.
        width: Number of input features, D.
        outputs: Number of output features.
    """

    name: str
    module: nn.Module
    width: int
    outputs: int


def find_layers(model: nn.Module, targets: str | Sequence[str] | None = None) -> list[Layer]:
    """Find the layers that `targets` names, in the model's own order.

    Args:
        model: Any torch model.
        targets: None for every Linear and Conv1D outside embeddings and heads, "all-linear" for every one, a regular
            expression that has to match whole names, or a list of names, name endings (as in PEFT's
            `target_modules`) and regular expressions.

    Raises:
        UnknownNameError: A pattern matches no layer.
        UserError: The model has no layer to choose from.
    """
    known = list(_linear_layers(model))
    if not known:
        raise UserError(_nothing_to_adapt(model))
    if targets == "all-linear":
        return known
    if targets is None:
        return _without_embeddings_and_heads(model, known)
    patterns = [targets] if isinstance(targets, str) else list(targets)
    chosen = {layer.name for pattern in patterns for layer in _matching(pattern, known)}
    if not chosen:
        raise UserError(f"targets={targets!r} names no layer. Layers of this model: {_listed(known)}.")
    return [layer for layer in known if layer.name in chosen]


def _nothing_to_adapt(model: nn.Module) -> str:
    kinds = {type(module) for module in model.modules()}
    if any(issubclass(kind, torch.jit.ScriptModule) for kind in kinds):
        return (
            "The model is scripted or traced by torch.jit, where no layer can be listened to or replaced. Give the "
            "module that it was made of."
        )
    if any("quantized" in kind.__module__ for kind in kinds):
        return (
            "The model's linear layers are quantised. Give the model before torch.ao.quantization, in floating point."
        )
    return "The model has no torch.nn.Linear and no Conv1D layer, so there is nothing to adapt."


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel and their like, and inside PEFT's."""
    while (attribute := _WRAPPERS.get(type(model).__name__)) is not None:
        model = getattr(model, attribute)
    peft: Any = model
    return peft.get_base_model() if hasattr(model, "get_base_model") else model


def _wrapped(model: nn.Module) -> list[str]:
    """Names of modules that a wrapper holds, innermost first."""
    found = [
        f"{name}.{_WRAPPERS[type(module).__name__]}" if name else _WRAPPERS[type(module).__name__]
        for name, module in model.named_modules()
        if type(module).__name__ in _WRAPPERS
    ]
    return found[::-1]


def _clean(name: str, wrapped: list[str]) -> str:
    """A layer's name in the model without wrappers."""
    for inner in wrapped:
        if name == inner or name.startswith(inner + "."):
            name = inner.rpartition(".")[0] + name.removeprefix(inner)
    return name.removeprefix(".")


def _linear_layers(model: nn.Module) -> Iterable[Layer]:
    wrapped = _wrapped(model)
    for name, module in model.named_modules():
        if any(part in f".{name}." for part in _ADAPTER_PARTS):
            continue
        shape = _shape(module)
        if shape is not None:
            yield Layer(_clean(name, wrapped).removesuffix(".base_layer"), module, *shape)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs), or None for another kind of layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    # Hugging Face's Conv1D is a Linear with a transposed weight; known by name, so that transformers stays optional.
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(module.weight, Tensor):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def _without_embeddings_and_heads(model: nn.Module, known: list[Layer]) -> list[Layer]:
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    inner = [
        layer
        for layer in known
        if not any(_EMBEDDING_OR_HEAD.fullmatch(part) for part in layer.name.split("."))
        and id(layer.module.weight) not in tied
        # nn.MultiheadAttention reads this layer's weight without calling it
        and type(layer.module).__name__ != "NonDynamicallyQuantizableLinear"
    ]
    return inner or known


def _matching(pattern: str, known: list[Layer]) -> list[Layer]:
    by_name = [layer for layer in known if layer.name == pattern or layer.name.endswith("." + pattern)]
    if by_name:
        return by_name
    try:
        found = [layer for layer in known if re.fullmatch(pattern, layer.name)]
    except re.error:
        found = []
    if not found:
        endings = sorted({layer.name.rpartition(".")[2] for layer in known})
        raise UnknownNameError("target layer", pattern, endings, f"Layers of this model: {_listed(known)}.")
    return found


def _listed(known: list[Layer]) -> str:
    return ", ".join(layer.name for layer in known[:200]) + (", ..." if len(known) > 200 else "")
