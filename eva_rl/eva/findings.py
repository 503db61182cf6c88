"""Eigenpairs, ranks, agreement and results of all stacks together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eva_rl.errors import UserError
from eva_rl.eva import estimate, variants
from eva_rl.eva.agreement import Agreement, Half
from eva_rl.eva.estimate import CHECK_TOLERANCE, Stack
from eva_rl.eva.gram import Part
from eva_rl.eva.options import EvaOptions
from eva_rl.eva.processes import Processes
from eva_rl.eva.result import LayerResult
from eva_rl.eva.targets import Layer


@dataclass(frozen=True)
class _One:
    """What one input's layers need of their stack."""

    values: Tensor
    vectors: Tensor
    total: float
    rows: float
    agreement: tuple[float, float, float]
    group: int


class Estimator:
    """Answers questions about sums; remembers directions to start the next answer from.

    Args:
        layers: Target layers in the model's order.
        options: What to compute.
        processes: Those that share the answer.
    """

    def __init__(self, layers: Sequence[Layer], options: EvaOptions, processes: Processes) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.options = options
        self.processes = processes
        self._starts: dict[tuple[tuple[tuple[str, ...], ...], Part], Tensor] = {}

    def agreement(self, stacks: list[Stack]) -> float:
        """The criterion of the input whose halves agree least, on the ranks that the halves' spectra suggest."""
        halves = [self._halves(stack) for stack in stacks]
        spectra = [
            (
                stack,
                first.values + second.values,
                first.matrices.total + second.matrices.total,
                first.matrices.rows + second.matrices.rows,
            )
            for stack, (first, second) in zip(stacks, halves, strict=True)
        ]
        by_layer = estimate.ranks(spectra, self._order(stacks), self.options)
        measures = [
            getattr(estimate.compare(stack, *pair, by_layer), self.options.criterion).nan_to_num(0.0).min()
            for stack, pair in zip(stacks, halves, strict=True)
        ]
        return min(float(measure) for measure in measures)

    def layers_found(self, stacks: list[Stack]) -> tuple[dict[str, LayerResult], bool]:
        """Results by layer, and whether all halves agree to tau.

        Raises:
            UserError: Nothing varies.
        """
        every = [self._all_rows(stack) for stack in stacks]
        spectra = [
            (stack, half.values, half.matrices.total, half.matrices.rows)
            for stack, half in zip(stacks, every, strict=True)
        ]
        by_layer = estimate.ranks(spectra, self._order(stacks), self.options)
        if not any(by_layer.values()):
            raise UserError("No target layer's input varies at all: every direction has zero variance.")
        found: dict[str, LayerResult] = {}
        agreed, group = True, 0
        for stack, half in zip(stacks, every, strict=True):
            measures = estimate.compare(stack, *self._halves(stack), by_layer)
            agreed &= bool((getattr(measures, self.options.criterion) >= self.options.tau).all())
            for index, names in enumerate(stack.members):
                one = _one(half, measures, index, group)
                group += 1
                found |= {name: self._layer(name, stack, one, by_layer[name]) for name in names}
        return found, agreed

    def _order(self, stacks: list[Stack]) -> list[str]:
        called = {name for stack in stacks for names in stack.members for name in names}
        return [name for name in self.layers if name in called]

    def _halves(self, stack: Stack) -> tuple[Half, Half]:
        return self._pairs(stack, "first", CHECK_TOLERANCE), self._pairs(stack, "second", CHECK_TOLERANCE)

    def _all_rows(self, stack: Stack) -> Half:
        half = (
            estimate.minor_pairs(stack, self.options)
            if self.options.variant == "minor"
            else self._pairs(stack, "all", 1e-7)
        )
        # every process computes the same, but for rounding and signs: all take the first one's
        values, vectors = self.processes.from_first(half.values), self.processes.from_first(half.vectors)
        return Half(half.matrices, values, _signed(vectors))

    def _pairs(self, stack: Stack, part: Part, tolerance: float) -> Half:
        key = (tuple(stack.members), part)
        start = self._starts.get(key, self._starts.get((key[0], "first")))
        half = estimate.eigenpairs(stack, part, self.options, start, tolerance)
        self._starts[key] = half.vectors
        return half

    def _layer(self, name: str, stack: Stack, one: _One, rank: int) -> LayerResult:
        values = one.values.cpu().double()
        rng = np.random.default_rng([self.options.seed, list(self.layers).index(name)])
        rows = one.vectors[:, :rank].mT.cpu().double().numpy()
        components = variants.apply(rows, values[:rank].numpy(), one.rows, self.options.variant, rng)
        possible = self.options.components(stack.width)
        note = "" if rank or self.options.rho > 1 else "its input does not vary"
        if self.options.rho == 1 and 0 < rank < possible:
            note = f"its input has only {rank} directions with variance"
        layer = self.layers[name]
        return LayerResult(
            components=torch.from_numpy(np.ascontiguousarray(components)).float(),
            singular_values=values.sqrt(),
            explained_variance_ratio=values / one.total if one.total > 0 else torch.zeros_like(values),
            lora_alpha=self.options.lora_alpha(rank),
            width=layer.width,
            outputs=layer.outputs,
            input_group=one.group,
            split_half_agreement=one.agreement[0],
            split_half_capture=one.agreement[1],
            split_half_directions=one.agreement[2],
            method=stack.sums.method,
            rows=int(one.rows),
            note=note,
        )


def _one(half: Half, measures: Agreement, index: int, group: int) -> _One:
    agreement = (measures.subspace[index], measures.capture[index], measures.directions[index])
    return _One(
        half.values[index],
        half.vectors[index],
        float(half.matrices.total[index]),
        float(half.matrices.rows[index]),
        (float(agreement[0]), float(agreement[1]), float(agreement[2])),
        group,
    )


def _signed(vectors: Tensor) -> Tensor:
    """Make each column's largest entry positive, so that equal data give equal signs."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
