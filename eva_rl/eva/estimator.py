"""From stacked sums to eigenpairs, ranks and agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eva_rl.distributed import ProcessGroup
from eva_rl.errors import UserError
from eva_rl.eva import redistribution
from eva_rl.eva.agreement import Agreement, Half, agree
from eva_rl.eva.gram import Part, Stack, gram
from eva_rl.eva.options import EvaOptions, Variant
from eva_rl.eva.result import LayerResult
from eva_rl.eva.subspace import leading, minor
from eva_rl.eva.targets import Layer

# Checks while data still comes in need fewer digits than the components that are kept.
CHECK_TOLERANCE = 1e-3


Array = NDArray[np.float64]
Spectrum: TypeAlias = tuple[Stack, Tensor, Tensor, Tensor, Tensor]
"""A stack with eigenvalues (G, K), total variance, rows and variance of rounding noise, (G,) each."""


def eigenpairs(stack: Stack, part: Part, options: EvaOptions, start: Tensor | None, tolerance: float) -> Half:
    """Leading eigenpairs of one half of the data or of all of it."""
    matrices = gram(stack.sums, part, options.center)
    count = options.components(stack.width)
    return Half(matrices, *leading(matrices, count, tolerance=tolerance, start=start))


def minor_pairs(stack: Stack, options: EvaOptions) -> Half:
    """Eigenpairs of least variance.

    Raises:
        UserError: The input is kept as a sketch, which holds only the leading directions.
    """
    if stack.sums.method != "moments":
        raise UserError(
            f'variant="minor" needs exact moments, but width {stack.width} is kept as {stack.sums.method!r}. '
            'Use method="moments".'
        )
    matrices = gram(stack.sums, "all", options.center)
    return Half(matrices, *minor(matrices, options.components(stack.width)))


def distribute_ranks(parts: Sequence[Spectrum], order: Sequence[str], options: EvaOptions) -> dict[str, int]:
    """Distribute the budget over the layers in `order`, from the spectra of each stack."""
    candidates: dict[str, list[float]] = {}
    for stack, *tensors in parts:
        values, *scalars = (tensor.cpu().numpy() for tensor in tensors)
        for names, eigenvalues, total, rows, noise in zip(stack.members, values, *scalars, strict=True):
            minor = options.variant == "minor"
            count = len(eigenvalues) if minor else redistribution.usable(eigenvalues, total, noise)
            scored = redistribution.scores(eigenvalues, total, rows, options.score)[:count].tolist()
            candidates.update(dict.fromkeys(names, scored))
    return redistribution.distribute({name: candidates[name] for name in order}, options.rank * len(order))


def compare(stack: Stack, first: Half, second: Half, by_layer: dict[str, int]) -> Agreement:
    """Agreement of the halves on as many directions as the layers of each input got."""
    wanted = [max(by_layer[name] for name in names) for names in stack.members]
    return agree(first, second, torch.tensor(wanted, device=first.values.device))


@dataclass(frozen=True)
class _InputEstimate:
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
        process_group: Those that share the answer.
    """

    def __init__(self, layers: Sequence[Layer], options: EvaOptions, process_group: ProcessGroup) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.options = options
        self.process_group = process_group
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
                first.matrices.noise + second.matrices.noise,
            )
            for stack, (first, second) in zip(stacks, halves, strict=True)
        ]
        by_layer = distribute_ranks(spectra, self._order(stacks), self.options)
        measures = [
            getattr(compare(stack, *pair, by_layer), self.options.criterion).nan_to_num(0.0).min()
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
            (stack, half.values, half.matrices.total, half.matrices.rows, half.matrices.noise)
            for stack, half in zip(stacks, every, strict=True)
        ]
        by_layer = distribute_ranks(spectra, self._order(stacks), self.options)
        if not any(by_layer.values()):
            raise UserError("No target layer's input varies at all: every direction has zero variance.")
        found: dict[str, LayerResult] = {}
        agreed, group = True, 0
        for stack, half in zip(stacks, every, strict=True):
            measures = compare(stack, *self._halves(stack), by_layer)
            agreed &= bool((getattr(measures, self.options.criterion) >= self.options.tau).all())
            for index, names in enumerate(stack.members):
                estimate = _input_estimate(half, measures, index, group)
                group += 1
                found |= {name: self._layer(name, stack, estimate, by_layer[name]) for name in names}
        return found, agreed

    def _order(self, stacks: list[Stack]) -> list[str]:
        called = {name for stack in stacks for names in stack.members for name in names}
        return [name for name in self.layers if name in called]

    def _halves(self, stack: Stack) -> tuple[Half, Half]:
        return self._pairs(stack, "first", CHECK_TOLERANCE), self._pairs(stack, "second", CHECK_TOLERANCE)

    def _all_rows(self, stack: Stack) -> Half:
        half = minor_pairs(stack, self.options) if self.options.variant == "minor" else self._pairs(stack, "all", 1e-7)
        # every process computes the same, but for rounding and signs: all take rank 0's
        values, vectors = (
            self.process_group.broadcast_tensor(half.values),
            self.process_group.broadcast_tensor(half.vectors),
        )
        return Half(half.matrices, values, _signed(vectors))

    def _pairs(self, stack: Stack, part: Part, tolerance: float) -> Half:
        key = (tuple(stack.members), part)
        start = self._starts.get(key, self._starts.get((key[0], "first")))
        half = eigenpairs(stack, part, self.options, start, tolerance)
        self._starts[key] = half.vectors
        return half

    def _layer(self, name: str, stack: Stack, estimate: _InputEstimate, rank: int) -> LayerResult:
        values = estimate.values.cpu().double()
        rng = np.random.default_rng([self.options.seed, list(self.layers).index(name)])
        rows = estimate.vectors[:, :rank].mT.cpu().double().numpy()
        components = apply_variant(rows, values[:rank].numpy(), estimate.rows, self.options.variant, rng)
        possible = self.options.components(stack.width)
        note = "" if rank or self.options.rho > 1 else "its input does not vary"
        if self.options.rho == 1 and 0 < rank < possible:
            note = f"its input has only {rank} directions with variance"
        layer = self.layers[name]
        return LayerResult(
            components=torch.from_numpy(np.ascontiguousarray(components)).float(),
            singular_values=values.sqrt(),
            explained_variance_ratio=values / estimate.total if estimate.total > 0 else torch.zeros_like(values),
            lora_alpha=self.options.lora_alpha(rank),
            width=layer.width,
            outputs=layer.outputs,
            input_group=estimate.group,
            split_half_agreement=estimate.agreement[0],
            split_half_capture=estimate.agreement[1],
            split_half_directions=estimate.agreement[2],
            method=stack.sums.method,
            rows=int(estimate.rows),
            note=note,
        )


def _input_estimate(half: Half, measures: Agreement, index: int, group: int) -> _InputEstimate:
    agreement = (measures.subspace[index], measures.capture[index], measures.directions[index])
    return _InputEstimate(
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


def apply_variant(
    components: Array, eigenvalues: Array, rows: float, variant: Variant | None, rng: np.random.Generator
) -> Array:
    """Change the components (R, D) of one layer.

    Args:
        components: Orthonormal rows.
        eigenvalues: (R,) sigma^2 of each.
        rows: M, number of rows of data.
        variant: None and "minor" change nothing here; "permute" shuffles the rows of A; "rotate" multiplies A by a
            random orthogonal matrix from the left; "whiten" divides each row by its standard deviation
            sigma / sqrt(M - 1), so that every entry of A x has unit variance. (PEFT divides by sqrt(sigma), which
            depends on the number of rows.)
        rng: Source of the random matrices.
    """
    if variant == "permute":
        return components[rng.permutation(len(components))]
    if variant == "rotate":
        return _orthogonal(len(components), rng) @ components
    if variant == "whiten":
        deviations = np.sqrt(eigenvalues / max(rows - 1, 1))
        return components / np.maximum(deviations, 1e-12)[:, None]
    return components


def _orthogonal(size: int, rng: np.random.Generator) -> Array:
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diag(r)))  # uniform over the orthogonal group (Mezzadri 2007)
