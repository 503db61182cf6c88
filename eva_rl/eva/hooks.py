"""Forward hooks that feed the sums of every distinct input while anything runs the model."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eva_rl.errors import UserError
from eva_rl.eva.masks import (
    EncoderDecoderMask,
    Mask,
    MasksByLayer,
    RowMask,
    StepMask,
    batch_first,
    default_mask,
    encoder_and_decoder,
    is_encoder_decoder,
    masks_of_halves,
)
from eva_rl.eva.moments import Accumulator, Sums
from eva_rl.eva.provenance import CallStack, tensors
from eva_rl.eva.targets import Layer, without_wrappers

AccumulatorFactory = Callable[[int, torch.device], Accumulator]
Version = tuple[float, ...]
_GIVEN_STATES = ("encoder_hidden_states", "encoder_outputs", "memory")
"""Arguments that bring a decoder the outputs of an encoder that is not called."""


@dataclass(frozen=True)
class _Input:
    """A tensor as a layer received it, perhaps (T, B, D): later changes in place make another version of it."""

    tensor: Tensor
    address: int
    version: Version
    keep: Tensor | None
    time_first: bool = False

    def same(self, other: _Input) -> bool:
        """Whether both are the same rows of the same values."""
        x, y = self.tensor, other.tensor
        here = x is y or (
            self.address == other.address
            and not x.is_nested
            and not y.is_nested
            and (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
        )
        return here and self.version == other.version and _same_rows(self.keep, other.keep)


@dataclass
class InputGroup:
    """Layers that receive the same tensor: one accumulator, fed by the first of them.

    Args:
        width: D.
        leader: The layer whose calls feed the accumulator.
        accumulators: One, or several if the layer was called several times in the forward that discovered it.
        calls: Number of updates so far.
        received: The leader's inputs in the forward in progress: address, version and rows that count.
    """

    width: int
    leader: str
    accumulators: list[Accumulator]
    calls: int = 1
    received: list[tuple[int, Version, Tensor | None]] = field(default_factory=list)

    def sums(self) -> Sums:
        """Everything seen, as raw sums."""
        first, *rest = [accumulator.sums() for accumulator in self.accumulators]
        return sum(rest, start=first)

    def has_received(self, given: _Input) -> bool:
        """Whether the leader was given the same in this forward."""
        return any(
            (address, version) == (given.address, given.version) and _same_rows(keep, given.keep)
            for address, version, keep in self.received
        )


@dataclass
class _Discovery:
    """The inputs of layers that were never called before, during one forward.

    Tensors are referenced until the forward ends, so that no two of them can share an address by reuse of memory.
    """

    inputs: list[tuple[_Input, Accumulator]] = field(default_factory=list)
    calls: dict[str, list[int]] = field(default_factory=dict)


class Listener:
    """Listens to the inputs of `layers` of `model`.

    A forward begins and ends with a call of `model` itself; if only parts of it are called, it ends when a layer is
    called again. Calls inside a backward pass repeat an earlier forward (activation checkpointing) and do not count.
    Compiled modules run eagerly meanwhile, because compiled code calls no hooks that were registered later.

    Args:
        model: The model whose calls delimit a forward.
        layers: The layers to listen to.
        factory: Makes the accumulator of a distinct input of a width, on a device.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], factory: AccumulatorFactory) -> None:
        self.model = model
        self.layers = {layer.name: layer for layer in layers}
        self.groups: list[InputGroup] = []
        self.group_of: dict[str, InputGroup] = {}
        self.batches = 0
        self.model_calls = 0
        self._factory = factory
        self._given: Mask = None
        self._mask: RowMask | None = None
        self._layouts: dict[str, str] = {}
        self._stack = CallStack()
        self._states: list[Tensor] = []
        self._discovery = _Discovery()
        self._called: set[str] = set()
        self._inside = False
        self._asks_calls = False
        self._undo = ExitStack()
        self._time_first = batch_first(model) is False

    @property
    def mask(self) -> Mask:
        """Which rows of the next forwards count: (B, T) of time steps, or by layer; None counts every row.

        By layer it is a dictionary (see `masks.by_name`) or a function that is called with a layer's name while the
        layer is being called; its masks have the leading shape of the layer's input, or (B, T).
        """
        return self._given

    @mask.setter
    def mask(self, mask: Mask) -> None:
        self._given, self._mask = mask, self._row_mask(mask)

    @contextmanager
    def masked(self, mask: Mask) -> Iterator[None]:
        """Count only some rows of the forwards inside the block; see `mask`."""
        before = self._given, self._mask
        self.mask = mask
        try:
            yield
        finally:
            self._given, self._mask = before

    @contextmanager
    def masked_as(self, batch: Any) -> Iterator[None]:
        """Count the rows that a batch's own mask says, or where it has none, the mask that the model is called with."""
        with self.masked(self.default_mask(batch)):
            self._asks_calls = self._mask is None
            try:
                yield
            finally:
                self._asks_calls = False

    def default_mask(self, batch: Any) -> Mask:
        """The mask that a batch brings: `attention_mask`, and a decoder's where there is one."""
        return masks_of_halves(batch) if is_encoder_decoder(self.model) else default_mask(batch)

    def __enter__(self) -> Listener:
        halves = encoder_and_decoder(self.model)
        handles = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        handles += self._stack.attach(self.model, lambda: self._mask is None or _in_backward())
        projection = getattr(without_wrappers(self.model), "enc_to_dec_proj", None)
        for module in () if halves is None else (halves[0], projection):
            if module is not None:
                handles.append(module.register_forward_hook(self._keep_states))
        for layer in self.layers.values():
            handles.append(layer.module.register_forward_pre_hook(self._hook(layer), with_kwargs=True))
        handles.append(self.model.register_forward_hook(self._end, always_call=True))
        for handle in handles:
            self._undo.callback(RemovableHandle.remove, handle)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
            self._undo.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()
        self.finish_forward()

    def finish_forward(self) -> None:
        """Settle which layers share an input and let go of the forward's tensors."""
        self.batches += bool(self._called)
        by_calls: dict[tuple[int, ...], InputGroup] = {}
        for name, calls in self._discovery.calls.items():
            group = by_calls.get(tuple(calls))
            if group is None:
                parts = [self._discovery.inputs[i][1] for i in calls]
                group = InputGroup(self.layers[name].width, name, parts)
                by_calls[tuple(calls)] = group
                self.groups.append(group)
            self.group_of[name] = group
        with torch.inference_mode(False):
            self._unshare_accumulators(list(by_calls.values()))
        for group in self.groups:
            group.received.clear()
        self._discovery = _Discovery()
        self._called.clear()
        self._states.clear()
        self._stack.clear()
        self._inside = False

    def _unshare_accumulators(self, groups: list[InputGroup]) -> None:
        """Layers that share some of their inputs but not all of them each need sums of their own from here on."""
        uses = Counter(id(part) for group in groups for part in group.accumulators)
        for group in groups:
            parts = group.accumulators
            if len(parts) > 1 or uses[id(parts[0])] > 1:
                parts.append(self._factory(group.width, parts[0].linear.device))

    def _row_mask(self, mask: Mask) -> RowMask | None:
        if mask is None or isinstance(mask, Tensor):
            steps = None if mask is None else self._steps(mask)
            return None if steps is None or steps.complete else steps
        if not isinstance(mask, tuple):
            return MasksByLayer(mask, self._steps)
        encoder, decoder = (None if steps is None else self._steps(steps) for steps in mask)
        if all(steps is None or steps.complete for steps in (encoder, decoder)):
            return None
        halves = encoder_and_decoder(self.model) or (nn.Module(), self.model)  # a decoder alone is given its states
        inside = {id(module) for module in halves[0].modules()}, {id(module) for module in halves[1].modules()}
        return EncoderDecoderMask(encoder, decoder, inside, lambda: self._states)

    def _steps(self, mask: Tensor) -> StepMask:
        return StepMask(mask, self._layouts, self._stack, batch_first(self.model))

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _in_backward():
            return
        if self._called:
            self.finish_forward()
        self.model_calls += 1
        self._inside = True
        if self._asks_calls or isinstance(self._mask, EncoderDecoderMask):
            given = _arguments(self.model, args, kwargs)
            self._states += _given_states(given)
            if self._asks_calls:
                self._mask = self._row_mask(self.default_mask(given))

    def _end(self, *_: object) -> None:
        if not _in_backward():
            self.finish_forward()

    def _keep_states(self, _: nn.Module, args: object, output: Any) -> None:
        if not _in_backward():
            self._states += tensors(output)

    def _hook(self, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def listen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _in_backward():
                return
            x = args[0] if args else next(iter(kwargs.values()))
            # sums made inside inference mode could not be updated outside of it
            with torch.inference_mode(False), torch.no_grad():
                self._record(layer, x)

        return listen

    def _record(self, layer: Layer, x: Tensor) -> None:
        _check_readable(layer.name, x)
        if not self._inside and layer.name in self._called:
            self.finish_forward()
        self._called.add(layer.name)
        keep = None if self._mask is None else self._mask.rows(layer, x)
        given = _Input(x, _address(x), _version(x), keep, self._time_first and x.dim() == 3 and not x.is_nested)
        group = self.group_of.get(layer.name)
        if group is None:
            self._discover(layer, given)
        elif group.leader == layer.name:
            group.received.append((given.address, given.version, keep))
            _feed(group.accumulators[-1], given, group.calls)
            group.calls += 1
        elif not group.has_received(given):
            raise UserError(
                f"Layers {group.leader!r} and {layer.name!r} received one tensor in the first forward and different "
                "ones later. Ask for them in separate runs (targets=)."
            )

    def _discover(self, layer: Layer, given: _Input) -> None:
        if not given.tensor.is_inference():  # changes through .data or numpy are not counted: looked at once
            given = replace(given, version=(*given.version, *_content(given.tensor)))
        found = self._discovery
        calls = found.calls.setdefault(layer.name, [])
        for index, (other, _) in enumerate(found.inputs):
            if given.same(other):
                calls.append(index)
                return
        accumulator = self._factory(layer.width, given.tensor.device)
        calls.append(len(found.inputs))
        found.inputs.append((given, accumulator))
        _feed(accumulator, given, 0)


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a model by their names; those without one are left out."""
    try:
        bound = inspect.signature(without_wrappers(model).forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # a forward without a signature, or a call that fails by itself
        bound = {}
    return {**bound, **kwargs}


def _given_states(fields: Mapping[str, Any]) -> list[Tensor]:
    """The encoder's outputs among the arguments of a call."""
    return [tensor for name in _GIVEN_STATES for tensor in tensors(fields.get(name))]


def _feed(accumulator: Accumulator, given: _Input, turn: int) -> None:
    x = given.tensor.detach()
    flat = torch.cat(x.unbind()) if x.is_nested else x.reshape(-1, x.shape[-1])
    for half, rows in _halves(x, turn, given.time_first):
        if given.keep is None:
            accumulator.update(half, flat[rows])
        elif x.device.type == "cpu":
            # without an accelerator to keep busy, leaving rows out is cheaper than adding zeros
            kept = given.keep[rows].to(x.device)
            complete = bool(kept.all())
            accumulator.update(half, flat[rows] if complete else flat[rows][kept], owned=not complete)
        else:
            accumulator.update(half, flat[rows], given.keep.to(x.device)[rows])


def _halves(x: Tensor, turn: int, time_first: bool) -> list[tuple[int, slice | Tensor]]:
    """Cut the rows of an activation between samples; a lone sample goes to the halves by turns."""
    if time_first:
        if x.shape[1] == 1:
            return [(turn % 2, slice(0, len(x)))]
        first = torch.arange(x.shape[1], device=x.device).repeat(len(x)) < (x.shape[1] + turn % 2) // 2
        return [(0, first), (1, ~first)]
    if x.is_nested:
        lengths = [len(part) for part in x.unbind()]
        rows, samples = sum(lengths), len(lengths)
        cut = sum(lengths[: (samples + turn % 2) // 2])
    else:
        rows, samples = x.shape[:-1].numel(), x.shape[0] if x.ndim > 1 else 1
        cut = (samples + turn % 2) // 2 * (rows // max(samples, 1))
    if samples < 2:
        return [(turn % 2, slice(0, rows))]
    return [(0, slice(0, cut)), (1, slice(cut, rows))]


def _same_rows(keep: Tensor | None, other: Tensor | None) -> bool:
    return keep is other or (keep is not None and other is not None and torch.equal(keep, other))


def _check_readable(name: str, x: Any) -> None:
    """Raise unless a layer's input is a tensor of real numbers that are there."""
    if not isinstance(x, Tensor):
        raise UserError(
            f"Layer {name!r} was given a {type(x).__name__}, expected a tensor. Check batches and forward=."
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise UserError(
            "The model runs inside a transform of torch.func (vmap, grad, jvp, ...), where a layer's inputs cannot be "
            "read. Listen to plain calls of the model, or use torch.autograd."
        )
    kind = "meta" if x.is_meta else "complex" if x.is_complex() else "sparse" if _is_sparse(x) else ""
    if kind:
        raise UserError(
            f"Layer {name!r} was given a {kind} tensor; expected real numbers in memory. Move the model off the meta "
            "device, or give batches of dense real tensors."
        )


def _is_sparse(x: Tensor) -> bool:
    return not x.is_nested and x.layout is not torch.strided


def _address(x: Tensor) -> int:
    return int((x.values() if x.is_nested else x).data_ptr())


def _version(x: Tensor) -> Version:
    """Tells a tensor from itself after a change in place; by its content where changes are not counted."""
    return _content(x) if x.is_inference() else (float(x._version),)


def _content(x: Tensor) -> Version:
    flat = (x.values() if x.is_nested else x).reshape(-1).double()
    ramp = torch.linspace(1, 2, len(flat), device=flat.device, dtype=flat.dtype)
    return float(flat.nan_to_num().sum()), float(flat.nan_to_num() @ ramp)


def _in_backward() -> bool:
    """Whether autograd is at work, which runs forwards again that were checkpointed."""
    return torch._C._current_graph_task_id() != -1
