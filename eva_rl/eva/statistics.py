"""Accumulate activation statistics and turn them into an EvaResult."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from eva_rl.distributed import ProcessGroup, TorchGroup
from eva_rl.errors import UnknownNameError, UserError
from eva_rl.eva.estimator import Estimator
from eva_rl.eva.gram import SecondMoment, Stack, second_moments, stacks
from eva_rl.eva.hooks import Listener
from eva_rl.eva.moments import Accumulator, Moments
from eva_rl.eva.options import EvaOptions, StorageOptions, moment_bytes
from eva_rl.eva.result import EvaResult
from eva_rl.eva.sketches import Sketch, StreamingSvd, gaussian
from eva_rl.eva.targets import find_layers

_ATTENTION = (
    "It belongs to torch.nn.MultiheadAttention, which reads the weight of out_proj and keeps query, key and value in "
    "one parameter without calling a layer: EVA cannot see their inputs. Leave them out of targets=; linear1 and "
    "linear2 beside them can be adapted."
)


class ActivationStatistics(Listener):
    """Sums over the inputs of a model's layers, fed by whatever runs the model inside the `with` block.

    Several sources add up: feed the same accumulators with offline batches and with rollouts.

    Args:
        model: Any torch model with Linear or Hugging Face Conv1D layers.
        targets: Which of them, see `find_layers`.
        storage: How the sums are kept.
        group: Process group whose sums are added; by default all processes if torch.distributed is initialised.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: str | Sequence[str] | None = None,
        storage: StorageOptions | None = None,
        group: TorchGroup | None = None,
    ) -> None:
        super().__init__(model, find_layers(model, targets), self._make)
        self.storage = storage or StorageOptions()
        self.process_group = ProcessGroup.current(group)
        self.batches_taken = 0
        self._named = targets is not None
        self._used = 0
        self._sketched = False
        self._estimator: Estimator | None = None
        self._since = time.perf_counter()

    def __enter__(self) -> ActivationStatistics:
        super().__enter__()
        return self

    def check_finite(self) -> None:
        """Look once at the sums of all inputs.

        Raises:
            UserError: The input of a layer held NaN or Inf, or values whose squares overflow.
        """
        if not self.groups:
            return
        probes = [torch.stack([a.probe() for a in group.accumulators]).sum() for group in self.groups]
        finite = torch.stack([probe.to(probes[0].device) for probe in probes]).isfinite()
        if bool(finite.all()):
            return
        bad = [group.leader for group, fine in zip(self.groups, finite.tolist(), strict=True) if not fine]
        raise UserError(
            f"The input of layer {bad[0]!r} ({len(bad)} of {len(self.groups)} distinct inputs) holds NaN, Inf or "
            f"values too large to square, by batch {self.batches}. Check the batches and the model's weights; padding "
            "that holds such values has to be masked (mask=)."
        )

    def agreement(self, options: EvaOptions) -> float:
        """The criterion of the layer whose halves agree least; 0 while a half has no rows."""
        return self._estimate(options).agreement(self._stacks(options))

    def result(self, **options: Any) -> EvaResult:
        """Components and ranks from all activations so far.

        Args:
            **options: The fields of `EvaOptions`: rank, rho, tau, center, score, variant, alpha, keep_scale, criterion,
                seed.

        Raises:
            UserError: Nothing was heard, a layer asked for by name was never called, an input was not finite, or no
                direction carries any variance.
        """
        return self.evaluate(EvaOptions(**options))

    def evaluate(self, options: EvaOptions) -> EvaResult:
        """`result` with the options as one value."""
        self.finish_forward()
        self.check_finite()
        stacked = self._stacks(options)
        skipped = self._never_called(stacked)
        found, agreed = self._estimate(options).layers_found(stacked)
        ordered = {name: found[name] for name in self.layers if name not in skipped}
        seconds = time.perf_counter() - self._since
        return EvaResult(ordered, options, self.batches, "listening ended", agreed, seconds, tuple(skipped))

    def second_moments(self) -> dict[str, SecondMoment]:
        """E[x x^T] of the input x of every layer that was called, from all activations so far.

        All processes of the group have to call it.

        Raises:
            UserError: Nothing was heard, or an input was not finite.
        """
        self.finish_forward()
        self.check_finite()
        return second_moments(self._reduced())

    def second_moment(self, layer: str) -> SecondMoment:
        """`second_moments` of one layer, by its full name.

        Raises:
            UserError: The layer was not called, or see `second_moments`.
        """
        moments = self.second_moments()
        if layer not in moments:
            raise UnknownNameError("layer", layer, moments, "It is no target, or was never called.")
        return moments[layer]

    def _make(self, width: int, device: torch.device) -> Accumulator:
        method = self.storage.choose(width, self._used)
        if method == "moments":
            self._used += moment_bytes(width)
            return Moments(width, device)
        self._sketched = True
        start = gaussian(width, self.storage.columns, self.storage.seed)
        return Sketch(width, device, start) if method == "sketch" else StreamingSvd(width, device, start)

    def _estimate(self, options: EvaOptions) -> Estimator:
        """The estimator of these options, kept for its directions to start from."""
        if self._estimator is None or self._estimator.options != options:
            self._estimator = Estimator(list(self.layers.values()), options, self.process_group)
        return self._estimator

    def _stacks(self, options: EvaOptions) -> list[Stack]:
        asked = round(options.rank * options.rho)
        if self._sketched and asked > self.storage.components:
            raise UserError(
                f"rank * rho = {asked} components were asked for, but the sketches were sized for "
                f"{self.storage.components}. Call listen() with components={asked} or more."
            )
        return self._reduced()

    def _reduced(self) -> list[Stack]:
        stacked = stacks(self.groups, self.group_of, self.process_group)
        if not stacked:
            raise UserError(f"No target layer was called: {self._why_silent()}")
        return stacked

    def _never_called(self, stacked: list[Stack]) -> list[str]:
        called = {name for stack in stacked for names in stack.members for name in names}
        missing = [name for name in self.layers if name not in called]
        if missing and self._named:
            why = (
                _ATTENTION
                if self._inside_attention(missing[0])
                else "Leave them out of targets=, or give batches that reach them."
            )
            raise UserError(f"{len(missing)} target layers were never called, the first is {missing[0]!r}. {why}")
        return missing

    def _why_silent(self) -> str:
        """What to do when no target layer was called."""
        if self.model_calls and all(self._inside_attention(name) for name in self.layers):
            return _ATTENTION
        if self.model_calls:
            return (
                f"the model ran {self.model_calls} times without calling {next(iter(self.layers))!r} or another of "
                f"{len(self.layers)} targets. Name layers whose forward the model calls (targets=); functions that "
                "read a layer's weight, scripted modules and CUDA graphs call none."
            )
        if self.batches_taken:
            return (
                f"{self.batches_taken} batches were taken, but forward= ran another model than the one that was given. "
                "Give compute the model that forward= calls, not a copy of it."
            )
        return (
            "no batch came, and the model did not run while listening. Give batches, or run this very model, not a "
            "copy, inside the with block."
        )

    def _inside_attention(self, name: str) -> bool:
        """Whether a layer belongs to torch's nn.MultiheadAttention, which does not call it."""
        return type(self.layers[name].module).__name__ == "NonDynamicallyQuantizableLinear"
