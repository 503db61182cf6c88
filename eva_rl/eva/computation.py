"""`compute`: run batches through a model until its input directions are known."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from eva_rl.distributed import TorchGroup
from eva_rl.errors import UserError
from eva_rl.eva.masks import MaskOf, is_mapping, takes_layer
from eva_rl.eva.options import MAX_BATCHES, Criterion, EvaOptions, Method, StorageOptions, Variant
from eva_rl.eva.redistribution import Score
from eva_rl.eva.result import EvaResult, Stopped
from eva_rl.eva.statistics import ActivationStatistics

Forward = Callable[[nn.Module, Any], Any]

MIN_BATCHES = 2
# Checks after 2, 3, 4, 6, 9, 14, 21, ... batches: their cost stays a fixed share of the forwards'.
CHECK_GROWTH = 1.5
_END = object()


def compute(  # noqa: PLR0913 - the one call that most users make; the names are those of EvaOptions and StorageOptions
    model: nn.Module,
    batches: Iterable[Any],
    *,
    targets: str | Sequence[str] | None = None,
    rank: int = EvaOptions.rank,
    rho: float = EvaOptions.rho,
    tau: float = EvaOptions.tau,
    max_batches: int = MAX_BATCHES,
    center: bool = EvaOptions.center,
    forward: Forward | None = None,
    mask: MaskOf | None = None,
    method: Method | Literal["auto"] = "auto",
    score: Score = EvaOptions.score,
    variant: Variant | None = EvaOptions.variant,
    alpha: float | None = EvaOptions.alpha,
    keep_scale: bool = EvaOptions.keep_scale,
    criterion: Criterion = EvaOptions.criterion,
    memory_budget: int = StorageOptions.budget,
    seed: int = 0,
    group: TorchGroup | None = None,
    keep_moments: bool = False,
) -> EvaResult:
    """Find the leading directions of the inputs of a model's layers, and how many each layer should adapt.

    Explained Variance Adaptation (arXiv 2410.07170): row r of `components` is the r-th right singular vector of the
    layer's input rows. Batches are taken until the two halves of the data agree to `tau`, at most `max_batches`, each
    once and none is kept.

    Args:
        model: Any torch model; runs in eval mode without gradients.
        batches: Any iterable of dicts, tuples, tensors or other values that `forward` takes.
        targets: Layers, see `find_layers`; None for all outside embeddings and heads.
        rank: Components per layer on average.
        rho: A layer may get up to rank * rho components.
        tau: How far the halves have to agree.
        max_batches: Bound on the batches, per process.
        center: Subtract the mean of the rows first.
        forward: Called as forward(model, batch); by default model(**batch), model(*batch) or model(batch).
        mask: Called as mask(batch), gives (B, T), masks by layer or module name, or None; or, with two parameters, as
            mask(batch, layer) while that layer is being called, and gives a mask of the layer's own leading shape or
            (B, T). By default the batch's `attention_mask`, and `decoder_attention_mask` of an encoder-decoder; where
            the batch has none, those that the model is called with.
        method: How second moments are kept.
        score: What components of different layers are compared by.
        variant: An ablation of the paper.
        alpha: LoRA's alpha of a layer that gets `rank` components; None takes the rank.
        keep_scale: Scale alpha with the rank.
        criterion: What has to agree.
        memory_budget: Bytes for exact moments; a result takes several times as much while it is computed.
        seed: Of sketches and variants.
        group: Process group, see `ActivationStatistics`.
        keep_moments: Give the result its `moments`, for `gain` and `effective_rank` of any A; exact moments then have
            precedence over speed.

    Raises:
        UserError: A value is out of range, or see `ActivationStatistics.result`.
    """
    options = EvaOptions(rank, rho, tau, center, score, variant, alpha, keep_scale, criterion, seed)
    check_model(model)
    check_batches(batches, max_batches)
    storage = StorageOptions(method, round(rank * rho), memory_budget, seed, exact=keep_moments)
    began = time.perf_counter()
    with evaluating(model), ActivationStatistics(model, targets, storage, group) as statistics:
        feed = _Feed(statistics, iter(batches), forward or default_forward, mask)
        stopped = _run(feed, max_batches, options)
        result = statistics.evaluate(options).ended(stopped, time.perf_counter() - began)
        return replace(result, moments=statistics.second_moments()) if keep_moments else result


def check_model(model: object) -> None:
    """Raise unless it is a module of torch's, as a policy's network is.

    Raises:
        UserError: Saying what it is.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model is a {type(model).__name__}, expected a torch.nn.Module. Of a policy give policy.network, or use "
            "eva_rl.attach_adapter."
        )


def check_batches(batches: object, max_batches: int) -> None:
    """Raise where none may be taken, or what should be batches is one, whose rows or names would be taken for them.

    Raises:
        UserError: Saying what was expected.
    """
    if max_batches < 1:
        raise UserError(f"max_batches={max_batches}: expected at least 1.")
    if isinstance(batches, Tensor | np.ndarray) or is_mapping(batches) or is_dataclass(batches):
        kind = type(batches).__name__
        raise UserError(f"batches is a {kind}: expected an iterable of batches. Give [batch], or x.split(64).")


def listen(
    model: nn.Module,
    targets: str | Sequence[str] | None = None,
    *,
    components: int = 64,
    method: Method | Literal["auto"] = "auto",
    memory_budget: int = StorageOptions.budget,
    seed: int = 0,
    group: TorchGroup | None = None,
) -> ActivationStatistics:
    """Listen to a model's inputs while something else runs it, for instance a policy in an environment.

    ```python
    with eva.listen(model, ["c_attn", "c_fc"], components=32) as statistics:
        for step in rollout:
            with statistics.masked(step.attention_mask):
                policy.act(step)
    result = statistics.result(rank=16, rho=2.0)
    ```

    Args:
        model: Any torch model; its mode is left alone.
        targets: Layers, see `find_layers`.
        components: The largest rank * rho that will be asked for; sizes the sketches of wide inputs.
        method: How second moments are kept; "moments" is exact, as `second_moments` is best asked for.
        memory_budget: Bytes for exact moments; a result takes several times as much while it is computed.
        seed: Of the sketches.
        group: Process group whose sums are added when a result is asked for, which all of its processes then must do.

    Raises:
        UserError: It is no model, or has no such layers.
    """
    check_model(model)
    return ActivationStatistics(model, targets, StorageOptions(method, components, memory_budget, seed), group)


@dataclass
class _Feed:
    """One process's side of the rounds: takes a batch, feeds it, and keeps an error until the others know of it."""

    statistics: ActivationStatistics
    source: Iterator[Any]
    forward: Forward
    mask: MaskOf | None
    error: Exception | None = None

    def take(self) -> bool:
        """Feed the next batch; false if there is none."""
        try:
            batch = next(self.source, _END)
            if batch is _END:
                return False
            self.statistics.batches_taken += 1
            with self._masked(batch):
                self.forward(self.statistics.model, batch)
            self.statistics.finish_forward()
            self.statistics.check_finite()
        except Exception as error:  # of the model or the data, any kind: the other processes have to hear of it
            if self.statistics.process_group.world_size == 1:
                raise
            self.error = error
        return True

    def _masked(self, batch: Any) -> AbstractContextManager[None]:
        given = self.mask
        if given is None:
            return self.statistics.masked_as(batch)
        if takes_layer(given):
            return self.statistics.masked(functools.partial(given, batch))
        mask = given(batch)
        return self.statistics.masked(torch.as_tensor(mask) if isinstance(mask, np.ndarray | list) else mask)


def _run(feed: _Feed, max_batches: int, options: EvaOptions) -> Stopped:
    """Feed batches until the end.

    Processes go through the rounds together, with a batch or without one, and end together.
    """
    due = MIN_BATCHES  # tau = 1 asks for all batches, since two halves never agree to the last digit
    for turn in range(1, max_batches + 1):
        taken = feed.take()
        anyone, failed = feed.statistics.process_group.any(taken, feed.error is not None)
        if failed:
            raise feed.error or UserError("Another process failed; see its own message.")
        if not anyone:
            return "data exhausted"
        if turn >= due:
            due = max(turn + 1, round(turn * CHECK_GROWTH))
            if options.tau < 1 and turn < max_batches and _agreed(feed.statistics, options):
                return "converged"
    return "max_batches"


def _agreed(statistics: ActivationStatistics, options: EvaOptions) -> bool:
    """Whether the halves agree to tau on every process: near tau, rounding may tell them different things."""
    [apart] = statistics.process_group.any(not statistics.agreement(options) >= options.tau)
    return not apart


def default_forward(model: nn.Module, batch: Any) -> Any:
    """model(**batch) for a mapping, model(*batch) for a tuple or list, else model(batch).

    Raises:
        UserError: The model does not take it.
    """
    try:
        return _called(model, batch)
    except TypeError as error:
        raise UserError(
            f"The model did not take a batch, a {type(batch).__name__}: {error}. Say how it is called with forward=, "
            "for instance forward=lambda model, batch: model(batch[0])."
        ) from error


def _called(model: nn.Module, batch: Any) -> Any:
    device = next((parameter.device for parameter in model.parameters()), None)
    if is_mapping(batch):
        return model(**{name: _moved(batch[name], device) for name in batch.keys()})  # noqa: SIM118 - not every batch iterates over names
    if isinstance(batch, tuple | list):
        return model(*(_moved(value, device) for value in batch))
    return model(_moved(batch, device))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode comes back, also when the block raises."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _moved(value: Any, device: torch.device | None) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) and device is not None else value
