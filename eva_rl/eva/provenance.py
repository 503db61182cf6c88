"""Where rows that lost their batch and time come from: the modules being called, and what passed through them.

A (B, T, D) activation that was flattened, or from which a router selected rows for an expert, reaches a layer as
(N, D). Its rows are found again by value in the tensors of the enclosing calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Source = tuple[Tensor, Tensor | None, Tensor | None]
"""A tensor (..., D) and the numbers (N,) of its rows, first and last of equal ones; None for all of them in order."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Call:
    """One module call: tensors that passed through it, and rows that were traced inside it.

    Tensors are referenced until the call ends, so that no two of them can share an address by reuse of memory.
    """

    module: nn.Module
    shaped: dict[int, Tensor] = field(default_factory=dict)
    made_from: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    traced: dict[int, list[Source]] = field(default_factory=dict)

    def keep(self, value: Any, dimensions: int = 3) -> None:
        """Remember the latest (.., .., D) tensor of each width."""
        for tensor in tensors(value):
            if not tensor.is_nested and tensor.ndim >= dimensions:
                self.shaped[tensor.shape[-1]] = tensor


class CallStack:
    """The module calls in progress, kept by hooks on every module of a model."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    def attach(self, model: nn.Module, ignored: Callable[[], bool]) -> list[RemovableHandle]:
        """Register the hooks.

        Args:
            model: Whose modules are followed.
            ignored: True while calls do not count.
        """

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not ignored():
                outermost = not self._calls  # its rows are in the order of the batch, whatever their shape
                self._calls.append(_Call(module))
                self._calls[-1].keep([*args, *kwargs.values()], 2 if outermost else 3)

        def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._calls and self._calls[-1].module is module and not ignored():
                self._calls.pop()
                self._left([*args, *kwargs.values()], output)

        handles = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(module.register_forward_hook(end, with_kwargs=True, always_call=True))
        return handles

    def clear(self) -> None:
        """Forget everything: the forward has ended."""
        self._calls.clear()

    def is_inside(self) -> bool:
        """Whether the layer being called stands inside another module's call."""
        return len(self._calls) > 1

    def source(self, x: Tensor) -> Source | None:
        """Where the rows of x (N, D) come from; None if they cannot be found.

        The innermost call is that of the layer itself.
        """
        if not self.is_inside():
            return None
        x = self._before(x)
        for call in reversed(self._calls[:-1]):
            found = _find_rows(x, call.shaped.get(x.shape[-1]))
            if found is not None:
                self._calls[-2].traced.setdefault(len(x), []).append(found)
                return found
        return self._like_siblings(x)

    def _like_siblings(self, x: Tensor) -> Source | None:
        """The source of as many rows earlier in one of the enclosing calls, unless those differ."""
        for call in reversed(self._calls[:-1]):
            sources = call.traced.get(len(x), [])
            if sources:
                return sources[0] if all(_equal(sources[0], other) for other in sources) else None
        return None

    def _before(self, x: Tensor) -> Tensor:
        """Go back through modules that took as many rows and gave x."""
        for call in reversed(self._calls[:-1]):
            for output, given in reversed(call.made_from):
                if output is x:
                    x = given
        return x

    def _left(self, given: list[Any], output: Any) -> None:
        if not self._calls:
            return
        call = self._calls[-1]
        call.keep(output)
        for x, y in zip(tensors(given)[:1], tensors(output)[:1], strict=False):
            if not x.is_nested and x.ndim == y.ndim == 2 and len(x) == len(y):
                call.made_from.append((y, x))


def tensors(value: Any) -> list[Tensor]:
    """The tensors that a module was given or returned, not deeper than one level."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [v for v in value if isinstance(v, Tensor)] if isinstance(value, list | tuple) else []


def _equal(source: Source, other: Source) -> bool:
    same = source[1] is other[1] or (
        source[1] is not None and other[1] is not None and torch.equal(source[1], other[1])
    )
    return source[0] is other[0] and same


def _find_rows(x: Tensor, candidate: Tensor | None) -> Source | None:
    if candidate is None or candidate.dtype != x.dtype or len(x) == 0:
        return None
    keys, wanted = _keys(candidate.reshape(-1, candidate.shape[-1])), _keys(x)
    if torch.equal(keys, wanted):
        return candidate, None, None
    ordered, order = keys.sort(stable=True)
    place = torch.searchsorted(ordered, wanted).clamp(max=len(ordered) - 1)
    if not bool((ordered[place] == wanted).all()):
        return None
    last = torch.searchsorted(ordered, wanted, right=True) - 1
    return candidate, order[place], order[last]


def _keys(rows: Tensor) -> Tensor:
    """A number (N,) for each row that depends on its bits alone."""
    rows = rows.detach().contiguous()
    bits = rows.view(_INTEGERS[rows.element_size()]).long()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator).to(rows.device) | 1
    return (bits * weights).sum(-1)
