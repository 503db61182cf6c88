"""From stacked sums to eigenpairs, ranks and agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eva_rl.errors import UserError
from eva_rl.eva import redistribution
from eva_rl.eva.agreement import Agreement, Half, agree
from eva_rl.eva.gram import Part, gram
from eva_rl.eva.listening import InputGroup
from eva_rl.eva.options import EvaOptions
from eva_rl.eva.processes import Processes
from eva_rl.eva.subspace import leading, minor
from eva_rl.eva.sums import Method, Sums

# Checks while data still comes in need fewer digits than the components that are kept.
CHECK_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Stack:
    """Inputs of equal width, kept by the same method.

    Args:
        members: Per input, the layers that receive it.
        width: D.
        sums: Over all processes, with a leading dimension of inputs.
    """

    members: list[tuple[str, ...]]
    width: int
    sums: Sums


@dataclass(frozen=True)
class Structure:
    """What all processes have to share to add their sums: the layers of an input, its width, method and columns."""

    members: tuple[str, ...]
    width: int
    method: Method
    columns: int


def stacks(groups: Sequence[InputGroup], group_of: dict[str, InputGroup], processes: Processes) -> list[Stack]:
    """Stack equal widths and add up all processes.

    Raises:
        UserError: Processes found different layers sharing inputs.
    """
    sums = {_members(group, group_of): group.sums() for group in groups}
    structure = _common([_structure(names, one) for names, one in sums.items()], processes)
    stacked = []
    for key in sorted({(s.width, s.method, s.columns) for s in structure}):
        members = [s.members for s in structure if (s.width, s.method, s.columns) == key]
        width, method, columns = key
        local = [sums.get(names) or _nothing(method, width, columns, processes.device) for names in members]
        reduced = _reduce(Sums.stack(local), processes)
        stacked.append(Stack(members, width, reduced))
    return stacked


def eigenpairs(stack: Stack, part: Part, options: EvaOptions, start: Tensor | None, tolerance: float) -> Half:
    """Leading eigenpairs of one half of the data or of all of it."""
    matrices = gram(stack.sums, part, options.center)
    count = options.components(stack.width)
    return Half(matrices, *leading(matrices, count, tolerance=tolerance, start=start))


def minor_pairs(stack: Stack, options: EvaOptions) -> Half:
    """Eigenpairs of least variance.

    Raises:
        UserError: Only sketches are there, which hold the leading directions alone.
    """
    if stack.sums.method != "moments":
        raise UserError(
            f'variant="minor" needs exact moments, but width {stack.width} is kept as {stack.sums.method!r}. '
            'Use method="moments".'
        )
    matrices = gram(stack.sums, "all", options.center)
    return Half(matrices, *minor(matrices, options.components(stack.width)))


def ranks(
    parts: Sequence[tuple[Stack, Tensor, Tensor, Tensor]], order: Sequence[str], options: EvaOptions
) -> dict[str, int]:
    """Distribute the budget over the layers in `order`, from each stack's eigenvalues (G, K), total (G,), rows (G,)."""
    candidates: dict[str, list[float]] = {}
    for stack, values, totals, counts in parts:
        numbers = zip(stack.members, values.cpu().numpy(), totals.tolist(), counts.tolist(), strict=True)
        for names, eigenvalues, total, rows in numbers:
            count = len(eigenvalues) if options.variant == "minor" else redistribution.usable(eigenvalues, total)
            scored = redistribution.scores(eigenvalues, total, rows, options.score)[:count].tolist()
            candidates.update(dict.fromkeys(names, scored))
    return redistribution.distribute({name: candidates[name] for name in order}, options.rank * len(order))


def compare(stack: Stack, first: Half, second: Half, by_layer: dict[str, int]) -> Agreement:
    """Agreement of the halves on as many directions as the layers of each input got."""
    wanted = [max(by_layer[name] for name in names) for names in stack.members]
    return agree(first, second, torch.tensor(wanted, device=first.values.device))


def _members(group: InputGroup, group_of: dict[str, InputGroup]) -> tuple[str, ...]:
    return tuple(name for name, other in group_of.items() if other is group)


def _structure(names: tuple[str, ...], sums: Sums) -> Structure:
    return Structure(names, sums.linear.shape[-1], sums.method, sums.core.shape[-1])


def _common(mine: list[Structure], processes: Processes) -> list[Structure]:
    heard = [structure for structure in processes.everyones(mine) if structure]
    if not heard:
        return []
    if any(set(other) != set(heard[0]) for other in heard):
        raise UserError(
            "The processes saw different layers being called or sharing their inputs, so their sums cannot be added. "
            "Give each process batches of the same kind, or targets= that every batch reaches."
        )
    return heard[0]


def _nothing(method: Method, width: int, columns: int, device: torch.device) -> Sums:
    """The sums of a process that has seen no row."""
    zeros = torch.zeros(2, width, columns, dtype=torch.float64, device=device)
    return Sums(method, zeros, zeros[..., 0].clone(), zeros[:, 0, 0].clone(), zeros[:, 0, 0].clone())


def _reduce(sums: Sums, processes: Processes) -> Sums:
    core = processes.total(sums.core) if sums.method == "moments" else processes.side_by_side(sums.core)
    return Sums(sums.method, core, *(processes.total(part) for part in sums.tensors()[1:]))
