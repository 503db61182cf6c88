"""Which rows of a layer's input count: masks by batch, by layer, and for the two halves of an encoder-decoder."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from eva_rl.errors import UserError
from eva_rl.eva.provenance import CallStack
from eva_rl.eva.targets import Layer, without_wrappers

LayerMask: TypeAlias = Callable[[str], Tensor | None]
Halves: TypeAlias = tuple[Tensor | None, Tensor | None]
Mask: TypeAlias = Tensor | Mapping[str, Tensor | None] | LayerMask | Halves | None
"""(B, T); by layer, a mapping (see `by_name`) or a function of its name; an encoder's and a decoder's; or no mask."""
MaskOf: TypeAlias = Callable[..., Any]
"""Called as mask(batch), or as mask(batch, layer) while that layer is being called."""

# Hugging Face models whose inner layers see (time, batch, features), by config.model_type.
_SEQUENCE_FIRST = {"fsmt", "led", "longformer", "xlnet"}
# Layers of a decoder that may see the encoder's states, changed on the way, instead of the decoder's own.
_CROSS_ATTENTION_KEYS = re.compile(r"(?i)(cross|enc_?dec|encoder_?att).*\b(k|v|kv|key|value|k_proj|v_proj|kv_proj)$")
_HOW = (
    "Pass mask=lambda batch, layer: ... that gives a mask of the layer's own leading shape, or a dictionary of masks "
    "by layer name (None counts every row)."
)


class RowMask(Protocol):
    """Decides which rows count in one forward."""

    def rows(self, layer: Layer, x: Tensor) -> Tensor | None:
        """(N,) bool for the N rows of x (..., D), or None if all of them count."""


class StepMask:
    """A (B, T) mask, and its expansion to what the layers see of the same forward.

    A layer that sees c tokens a time step, as (B, c * T, D), takes each step's entry c times in a row; (T, B, D) takes
    the transpose. Rows that lost their shape, (N, D), are traced to where they came from (`CallStack.source`); (B, D)
    from elsewhere takes the samples that have any step.

    Args:
        steps: (B, T), bool or 0-1: which time steps count.
        layouts: What earlier forwards showed, by layer; added to.
        stack: Of the forward in progress.
        batch_first: What the model documents about layers that see (B, B, D); None if nothing is known.
    """

    def __init__(
        self,
        steps: Tensor,
        layouts: dict[str, str] | None = None,
        stack: CallStack | None = None,
        batch_first: bool | None = None,
    ) -> None:
        if steps.ndim != 2:
            raise UserError(
                f"A mask has to be (batch, time), got the shape {tuple(steps.shape)}. Masks of other shapes are given "
                f"by layer. {_HOW}"
            )
        self.steps = steps != 0
        self.complete = bool(self.steps.all())
        self._layouts = {} if layouts is None else layouts
        self._stack = stack or CallStack()
        self._batch_first = batch_first
        self._expanded: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def rows(self, layer: Layer, x: Tensor) -> Tensor | None:
        """See `RowMask`.

        Raises:
            UserError: The shape does not belong to this mask, or it fits in more than one way.
        """
        if self.complete:
            return None
        if x.is_nested:
            self._check_nested(layer.name, x)
            return None
        shape = tuple(x.shape[:-1])
        return self._flat(layer, x) if len(shape) == 1 else self._shaped(layer, shape)

    def _shaped(self, layer: Layer, shape: tuple[int, ...]) -> Tensor:
        if shape not in self._expanded:
            self._expanded[shape] = _expansions(self.steps, shape)
        found = self._expanded[shape]
        if not found:
            raise self._misfit(layer.name, shape)
        if len(found) == 1:
            self._layouts[layer.name] = next(iter(found))
            return next(iter(found.values()))
        first, *others = found.values()
        if all(torch.equal(first, other) for other in others):
            return first
        return found[self._known_layout(layer, shape, found)]

    def _known_layout(self, layer: Layer, shape: tuple[int, ...], found: Mapping[str, Tensor]) -> str:
        layout = self._layouts.get(layer.name)
        if layout is None and self._batch_first is not None:
            layout = "batch first" if self._batch_first else "time first"
        if layout is None or layout not in found:
            raise UserError(
                f"Layer {layer.name!r} sees activations of shape {(*shape, 'D')}, which fit a mask of "
                f"{len(self.steps)} samples of {self.steps.shape[1]} steps in more than one way ({', '.join(found)}). "
                "Pass mask=lambda batch, layer: m, or m.T where the first dimension is time, with m the mask of shape "
                "(batch, time); or batches whose size is not their length."
            )
        return layout

    def _flat(self, layer: Layer, x: Tensor) -> Tensor:
        B, T = self.steps.shape
        source = self._stack.source(x)
        if source is not None and source[0].ndim > 2:
            origin, first, last = source
            whole = self._shaped(layer, tuple(origin.shape[:-1])).to(x.device)
            if first is None or last is None:
                return whole
            if torch.equal(whole[first], whole[last]):
                return whole[first]
            source = None  # equal rows, of which some count and some do not
        if source is None and self._stack.is_inside() and (len(x) % (B * T) == 0 or "expert" in layer.name.lower()):
            raise UserError(
                f"Layer {layer.name!r} sees {len(x)} rows without batch and time, which cannot be traced to the "
                f"{B} x {T} steps of the mask: they may be a selection, as for an expert of a mixture. {_HOW} The "
                "function is called while the layer is, so that it can use what a router has just decided."
            )
        if len(x) == B:
            return self.steps.any(1)
        if len(x) % (B * T) == 0:
            return self.steps.repeat_interleave(len(x) // (B * T), dim=1).reshape(-1)
        raise self._misfit(layer.name, tuple(x.shape[:-1]))

    def _check_nested(self, name: str, x: Tensor) -> None:
        lengths = [len(part) for part in x.unbind()]
        if lengths != self.steps.sum(1).tolist():
            raise UserError(
                f"Layer {name!r} sees a nested tensor of {len(lengths)} samples of {lengths[:8]} steps, the mask "
                f"has {self.steps.sum(1).tolist()[:8]}. Build the encoder with enable_nested_tensor=False, or give the "
                "mask that the model itself uses."
            )

    def _misfit(self, name: str, shape: tuple[int, ...]) -> UserError:
        B, T = self.steps.shape
        return UserError(
            f"Layer {name!r} sees activations of shape {(*shape, 'D')}, which do not fit a mask of {B} samples of {T} "
            f"steps: expected ({B}, c * {T}, D), ({T}, {B}, D), ({B} * c * {T}, D) or ({B}, D). {_HOW}"
        )


def _expansions(steps: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The mask as (N,) for a leading shape of two or more dimensions, by every layout that fits."""
    B, T = steps.shape
    found = {}
    if shape[0] == B and shape[-1] % T == 0:
        tokens = steps.repeat_interleave(shape[-1] // T, dim=1)
        found["batch first"] = tokens.view(B, *[1] * (len(shape) - 2), shape[-1]).expand(shape).reshape(-1)
    if len(shape) > 2 and shape[0] == B and shape[1] % T == 0:
        tokens = steps.repeat_interleave(shape[1] // T, dim=1)
        found["time in the second dimension"] = tokens.view(B, -1, *[1] * (len(shape) - 2)).expand(shape).reshape(-1)
    if shape[:2] == (T, B):
        found["time first"] = steps.T.reshape(T, B, *[1] * (len(shape) - 2)).expand(shape).reshape(-1)
    return found


class MasksByLayer:
    """A mask for each layer: taken as it is where it has the leading shape of the layer's input, else expanded.

    Args:
        masks: By name (see `by_name`), or a function of the layer's name.
        expand: Makes a `StepMask` of a (B, T) mask.
    """

    def __init__(self, masks: Mapping[str, Tensor | None] | LayerMask, expand: Callable[[Tensor], StepMask]) -> None:
        self._mask = masks if callable(masks) else by_name(masks)
        self._expand = expand
        self._made: dict[int, tuple[Tensor, Tensor, StepMask | None]] = {}

    def rows(self, layer: Layer, x: Tensor) -> Tensor | None:
        """See `RowMask`."""
        mask = self._mask(layer.name)
        if mask is None:
            return None
        if id(mask) not in self._made:
            expanded = self._expand(mask) if mask.ndim == 2 else None
            self._made[id(mask)] = mask, (mask != 0).reshape(-1), expanded
        _, flat, steps = self._made[id(mask)]
        if not x.is_nested and mask.shape == x.shape[:-1]:
            return flat
        if steps is None:
            raise UserError(
                f"Layer {layer.name!r} sees activations of shape {(*x.shape[:-1], 'D')}; mask= gave it a mask of shape "
                f"{tuple(mask.shape)}. Expected {tuple(x.shape[:-1])} or (batch, time)."
            )
        return steps.rows(layer, x)


def by_name(masks: Mapping[str, Tensor | None]) -> LayerMask:
    """A function of a layer's name: the entry of the layer, else of the innermost module around it; "" fits all.

    Raises:
        UserError: No entry fits; raised when the function is called.
    """

    def find(layer: str) -> Tensor | None:
        parts = layer.split(".")
        inner = [".".join(parts[:stop]) for stop in range(len(parts), 0, -1)]
        for name in [*inner, *parts, ""]:
            if name in masks:
                return masks[name]
        raise UserError(
            f"mask= gives no mask for layer {layer!r}, only for {', '.join(map(repr, masks))}. Add it, or a module "
            'around it, or "" for all others; None counts every row.'
        )

    return find


class EncoderDecoderMask:
    """The two masks of an encoder-decoder; cross-attention's keys and values take the encoder's.

    Args:
        encoder: What expands (B, T) of the encoder's steps; None counts all rows.
        decoder: The same of the decoder's.
        inside: Which modules belong to the encoder and to the decoder.
        states: The encoder's outputs in the forward in progress.
    """

    def __init__(
        self,
        encoder: StepMask | None,
        decoder: StepMask | None,
        inside: tuple[set[int], set[int]],
        states: Callable[[], list[Tensor]],
    ) -> None:
        self._encoder, self._decoder, self._inside, self._states = encoder, decoder, inside, states

    def rows(self, layer: Layer, x: Tensor) -> Tensor | None:
        """See `RowMask`."""
        mask = self._side(layer, x)
        return None if mask is None else mask.rows(layer, x)

    def _side(self, layer: Layer, x: Tensor) -> StepMask | None:
        encoder, decoder = self._inside
        if id(layer.module) in encoder or any(_same_memory(x, state) for state in self._states()):
            return self._encoder
        if id(layer.module) in decoder and self._states() and not _CROSS_ATTENTION_KEYS.search(layer.name):
            return self._decoder
        masks = (self._encoder, self._decoder)
        fits = [mask for mask in masks if mask is not None and mask.steps.shape[1] in x.shape[:-1]]
        if self._encoder is not None and self._decoder is not None and len(fits) == 1:
            return fits[0]
        raise UserError(
            f"Layer {layer.name!r} of an encoder-decoder may see the rows of the encoder or of the decoder. " + _HOW
        )


def _same_memory(x: Tensor, other: Tensor) -> bool:
    return x.data_ptr() == other.data_ptr() and x.shape == other.shape


def encoder_and_decoder(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The two halves of an encoder-decoder, by Hugging Face's methods or by the names ``encoder`` and ``decoder``."""
    base: Any = without_wrappers(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False) and hasattr(base, "get_encoder"):
        return base.get_encoder(), base.get_decoder()
    for module in model.modules():
        halves = getattr(module, "encoder", None), getattr(module, "decoder", None)
        if isinstance(halves[0], nn.Module) and isinstance(halves[1], nn.Module):
            return halves[0], halves[1]
    return None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a Hugging Face model says so."""
    return bool(getattr(getattr(without_wrappers(model), "config", None), "is_encoder_decoder", False))


def batch_first(model: nn.Module) -> bool | None:
    """Whether layers see (batch, time, features), where the model documents it; None where it does not.

    torch's own attention and recurrent modules say so; Hugging Face's models take the batch first, but for few that
    turn it around inside.
    """
    base: Any = without_wrappers(model)
    if hasattr(base, "main_input_name"):
        return True if getattr(base.config, "model_type", "") not in _SEQUENCE_FIRST else None
    said = {bool(module.batch_first) for module in model.modules() if hasattr(module, "batch_first")}
    return said.pop() if len(said) == 1 else None


_PADDING = {
    "attention_mask": "src_key_padding_mask",
    "decoder_attention_mask": "tgt_key_padding_mask",
    "encoder_attention_mask": "memory_key_padding_mask",
}
"""Masks of torch's own Transformers that say the same of the steps that do not count, true or -inf there."""


def default_mask(batch: Any) -> Tensor | Halves | None:
    """The (B, T) `attention_mask` of a batch, or with a decoder's inputs the encoder's mask and the decoder's.

    The decoder's is `decoder_attention_mask`, else the labels that count (not -100). torch's own key padding masks are
    read as well. Where the encoder's outputs are given, `attention_mask` is the decoder's.

    Args:
        batch: Named fields: a batch, or the arguments of a call by name.

    Raises:
        UserError: A mask of another shape.
    """
    names = _names(batch)
    if "encoder_hidden_states" in names or "memory" in names:
        own = _steps(batch, "attention_mask")
        return _steps(batch, "encoder_attention_mask"), _steps(batch, "decoder_attention_mask") if own is None else own
    encoder = _steps(batch, "attention_mask")
    if any(name.startswith("decoder_") or name == "tgt" for name in names):
        return encoder, _decoder_steps(batch)
    return encoder


def _decoder_steps(batch: Any) -> Tensor | None:
    mask, labels = _steps(batch, "decoder_attention_mask"), _field(batch, "labels")
    if mask is not None or labels is None or labels.ndim != 2:
        return mask
    return labels != -100


def masks_of_halves(batch: Any) -> Halves:
    """`default_mask` of a batch for a model that is known to be an encoder-decoder."""
    return _steps(batch, "attention_mask"), _decoder_steps(batch)


def _steps(batch: Any, name: str) -> Tensor | None:
    """(B, T), true where a step counts; None where nothing is said."""
    mask = _field(batch, name)
    if mask is None:
        padding = _field(batch, _PADDING[name])
        mask = None if padding is None else padding == 0
    elif mask.is_floating_point() and not bool((mask > 0).any()):
        mask = mask == 0  # added to attention's scores; without padding, all zero
    if mask is None or mask.ndim == 2:
        return mask
    if mask.ndim > 2 and mask.shape[1:-1].numel() == 1:
        return mask.reshape(len(mask), -1)  # (B, 1, 1, T), the same for every query
    if bool((mask != 0).all()):
        return None
    raise UserError(
        f"{name} has the shape {tuple(mask.shape)}, from which the steps that count cannot be told; expected (batch, "
        "time). Pass mask=lambda batch: m with a mask of that shape, or mask=lambda batch: None to count every row."
    )


def _field(batch: Any, name: str) -> Tensor | None:
    value = batch[name] if name in _names(batch) and is_mapping(batch) else getattr(batch, name, None)
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    return value if isinstance(value, Tensor) else None


def _names(batch: Any) -> list[str]:
    if is_mapping(batch):
        names = batch.keys()
    elif is_dataclass(batch):
        names = [field.name for field in fields(batch)]
    else:
        names = getattr(batch, "_fields", None) or getattr(batch, "__dict__", ())
    return [name for name in names if isinstance(name, str)]


def is_mapping(batch: Any) -> bool:
    """Whether a batch has named fields: dict, BatchEncoding, UserDict, MappingProxyType, TensorDict, ..."""
    return isinstance(batch, Mapping) or (hasattr(batch, "keys") and hasattr(batch, "__getitem__"))


def takes_layer(mask: MaskOf) -> bool:
    """Whether a function of the user is to be called as mask(batch, layer)."""
    try:
        parameters = inspect.signature(mask).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [
        p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return len(required) == 2
