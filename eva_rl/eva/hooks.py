"""Forward hooks that feed the sums of every distinct input while anything runs the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eva_rl.errors import UserError
from eva_rl.eva.moments import Accumulator, Sums
from eva_rl.eva.targets import Layer

AccumulatorFactory = Callable[[int, torch.device], Accumulator]


@dataclass
class InputGroup:
    """Layers that receive the same tensor: one accumulator, fed by the first of them.

    Args:
        width: D.
        leader: The layer whose calls feed the accumulator.
        accumulators: One, or several if the layer was called several times in the forward that discovered it.
        calls: Number of updates so far.
        pointers: Addresses of the leader's inputs in the forward in progress.
    """

    width: int
    leader: str
    accumulators: list[Accumulator]
    calls: int = 1
    pointers: set[int] = field(default_factory=set)

    def sums(self) -> Sums:
        """Everything seen, as raw sums."""
        first, *rest = [accumulator.sums() for accumulator in self.accumulators]
        return sum(rest, start=first)


@dataclass
class _Discovery:
    """The inputs of layers that were never called before, during one forward.

    Tensors are referenced until the forward ends, so that no two of them can share an address by reuse of memory.
    """

    inputs: list[tuple[Tensor, int, Accumulator]] = field(default_factory=list)
    calls: dict[str, list[int]] = field(default_factory=dict)


class Listener:
    """Listens to the inputs of `layers` of `model`.

    A forward begins and ends with a call of `model` itself; if only parts of it are called, it ends when a layer is
    called again.

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
        self._factory = factory
        self._mask: Mask | None = None
        self._discovery = _Discovery()
        self._called: set[str] = set()
        self._inside = False
        self._handles: list[RemovableHandle] = []

    @property
    def mask(self) -> Tensor | None:
        """(B, T): which steps of the next forwards count; None counts every row."""
        return None if self._mask is None else self._mask.steps

    @mask.setter
    def mask(self, steps: Tensor | None) -> None:
        self._mask = None if steps is None else Mask(steps)

    @contextmanager
    def masked(self, steps: Tensor | None) -> Iterator[None]:
        """Count only the True steps (B, T) of the forwards inside the block."""
        before = self._mask
        self.mask = steps
        try:
            yield
        finally:
            self._mask = before

    def __enter__(self) -> Listener:
        self._handles = [
            self.model.register_forward_pre_hook(self._begin),
            self.model.register_forward_hook(self._end, always_call=True),
        ]
        for layer in self.layers.values():
            self._handles.append(layer.module.register_forward_pre_hook(self._hook(layer), with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.finish_forward()

    def finish_forward(self) -> None:
        """Settle which layers share an input and let go of the forward's tensors."""
        self.batches += bool(self._called)
        by_calls: dict[tuple[int, ...], InputGroup] = {}
        for name, calls in self._discovery.calls.items():
            group = by_calls.get(tuple(calls))
            if group is None:
                parts = [self._discovery.inputs[i][2] for i in calls]
                group = InputGroup(self.layers[name].width, name, parts)
                by_calls[tuple(calls)] = group
                self.groups.append(group)
            self.group_of[name] = group
        self._unshare_accumulators(list(by_calls.values()))
        for group in self.groups:
            group.pointers.clear()
        self._discovery = _Discovery()
        self._called.clear()
        self._inside = False

    def _unshare_accumulators(self, groups: list[InputGroup]) -> None:
        """Layers that share some of their inputs but not all of them each need sums of their own from here on."""
        uses = Counter(id(part) for group in groups for part in group.accumulators)
        for group in groups:
            parts = group.accumulators
            if len(parts) > 1 or uses[id(parts[0])] > 1:
                parts.append(self._factory(group.width, parts[0].linear.device))

    def _begin(self, *_: object) -> None:
        if self._called:
            self.finish_forward()
        self._inside = True

    def _end(self, *_: object) -> None:
        self.finish_forward()

    def _hook(self, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def listen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            # sums made inside inference mode could not be updated outside of it
            with torch.inference_mode(False), torch.no_grad():
                self._record(layer, x.detach())

        return listen

    def _record(self, layer: Layer, x: Tensor) -> None:
        if not self._inside and layer.name in self._called:
            self.finish_forward()
        self._called.add(layer.name)
        group = self.group_of.get(layer.name)
        if group is None:
            self._discover(layer, x)
        elif group.leader == layer.name:
            group.pointers.add(x.data_ptr())
            self._feed(group.accumulators[-1], x, layer.name, group.calls)
            group.calls += 1
        elif x.data_ptr() not in group.pointers:
            raise UserError(
                f"Layers {group.leader!r} and {layer.name!r} received one tensor in the first forward and different "
                "ones later. Ask for them in separate runs (targets=)."
            )

    def _discover(self, layer: Layer, x: Tensor) -> None:
        found = self._discovery
        version = _version(x)
        calls = found.calls.setdefault(layer.name, [])
        for index, (other, seen_version, _) in enumerate(found.inputs):
            if _same(x, other) and version == seen_version:
                calls.append(index)
                return
        accumulator = self._factory(layer.width, x.device)
        calls.append(len(found.inputs))
        found.inputs.append((x, version, accumulator))
        self._feed(accumulator, x, layer.name, 0)

    def _feed(self, accumulator: Accumulator, x: Tensor, name: str, turn: int) -> None:
        flat = x.reshape(-1, x.shape[-1])
        for half, rows in _halves(x.shape, turn):
            if self._mask is None:
                accumulator.update(half, flat[rows])
            elif x.device.type == "cpu":
                # without an accelerator to keep busy, leaving rows out is cheaper than adding zeros
                indices = self._mask.indices(x.shape, name, rows)
                part = flat[rows] if indices is None else flat.index_select(0, indices)
                accumulator.update(half, part, owned=indices is not None)
            else:
                accumulator.update(half, flat[rows], self._mask.rows(x.shape, name).to(x.device)[rows])


def _halves(shape: torch.Size, turn: int) -> list[tuple[int, slice]]:
    """Cut the rows of an activation between samples; a lone sample goes to the halves by turns."""
    rows = shape[:-1].numel()
    samples = shape[0] if len(shape) > 1 else 1
    if samples < 2:
        return [(turn % 2, slice(0, rows))]
    cut = (samples + turn % 2) // 2 * (rows // samples)
    return [(0, slice(0, cut)), (1, slice(cut, rows))]


def _same(x: Tensor, other: Tensor) -> bool:
    return x is other or (
        x.data_ptr() == other.data_ptr()
        and x.shape == other.shape
        and x.stride() == other.stride()
        and x.dtype == other.dtype
    )


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def default_mask(batch: Any) -> Tensor | None:
    """The `attention_mask` key or attribute of a batch, where it has a (B, T) one."""
    mask = batch.get("attention_mask") if isinstance(batch, dict) else getattr(batch, "attention_mask", None)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


class Mask:
    """A (B, T) mask and its expansions to the row counts of the layers that saw the same forward.

    Args:
        steps: (B, T), bool or 0-1: which time steps count.
    """

    def __init__(self, steps: Tensor) -> None:
        if steps.ndim != 2:
            raise UserError(f"A mask has to be (batch, time), got the shape {tuple(steps.shape)}.")
        self.steps = steps != 0
        self._expanded: dict[tuple[int, ...], Tensor] = {}
        self._indices: dict[tuple[tuple[int, ...], int], Tensor | None] = {}

    def rows(self, shape: torch.Size, name: str) -> Tensor:
        """The mask (N,) of the rows of an activation of `shape` (..., D).

        A layer that sees c tokens per time step, as (B, c * T, D) or as (B * c * T, D), takes each step's entry c
        times in a row; (B, D) takes the samples that have any step.

        Raises:
            UserError: The shape does not belong to this mask.
        """
        key = tuple(shape[:-1])
        if key not in self._expanded:
            self._expanded[key] = self._expand(key, name)
        return self._expanded[key]

    def indices(self, shape: torch.Size, name: str, rows: slice) -> Tensor | None:
        """Numbers of the rows that count among `rows`, for `index_select`; None if all do. Waits for the device."""
        key = (tuple(shape[:-1]), rows.start)
        if key not in self._indices:
            part = self.rows(shape, name)[rows]
            self._indices[key] = None if bool(part.all()) else part.nonzero()[:, 0] + rows.start
        return self._indices[key]

    def _expand(self, shape: tuple[int, ...], name: str) -> Tensor:
        B, T = self.steps.shape
        if len(shape) >= 2 and shape[0] == B and shape[-1] % T == 0:
            tokens = self.steps.repeat_interleave(shape[-1] // T, dim=1)
            middle = tokens.view(B, *[1] * (len(shape) - 2), shape[-1])
            return middle.expand(shape).reshape(-1)
        if len(shape) == 1 and shape[0] == B:
            return self.steps.any(1)
        if len(shape) == 1 and shape[0] % (B * T) == 0:
            return self.steps.repeat_interleave(shape[0] // (B * T), dim=1).reshape(-1)
        raise UserError(
            f"Layer {name!r} sees activations of shape {(*shape, 'D')}, which do not fit a mask of {B} samples of {T} "
            f"steps: expected ({B}, c * {T}, D), ({B} * c * {T}, D) or ({B}, D). Give another mask= (a function of the "
            "batch), or mask=lambda batch: None to count every row."
        )
