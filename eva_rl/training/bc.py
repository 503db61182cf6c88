"""Behaviour cloning of windows: pretraining and fine-tuning share this loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.data.samplers import Sampler
from eva_rl.distributed import ProcessGroup
from eva_rl.errors import UserError
from eva_rl.training.checkpoint import (
    TrainState,
    load_latest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from eva_rl.training.compiling import CompileMode, compiled
from eva_rl.training.losses import autocast, distance, numbers_compared, parts

Log = Callable[[Mapping[str, float], int], None]
EXTENSION = "extension/"


class Extension(Protocol):
    """What a method adds to the loop."""

    def penalty(self) -> Tensor:
        """Added to the loss."""

    def after_step(self, update: int) -> None:
        """Called after the optimiser's step ``update`` (from 1), before the gradients are cleared."""

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what ``tensors`` gave."""


@dataclass(frozen=True)
class BCOptions:
    """How to clone.

    Attributes:
        updates: Gradient steps.
        batch_size: Windows a gradient step.
        learning_rate: Peak of AdamW's learning rate, reached after ``warmup`` and followed by a cosine.
        final_learning_rate: Where the cosine ends, as a fraction of the peak.
        warmup: Gradient steps of linear warm-up.
        weight_decay: AdamW's, on matrices only.
        gradient_clip: Largest norm of the gradient.
        loss: ``mse`` or ``l1``.
        precision: ``float32`` or ``bfloat16`` (autocast; the parameters stay float32).
        accumulate: Parts that a gradient step's windows are taken in, one after the other, to save memory; the gradient
            is that of the whole.
        compile: ``none``, or torch.compile's mode: ``default`` or ``reduce-overhead`` (CUDA graphs).
        log_every: Gradient steps between two points of the record.
        eval_every: Gradient steps between two evaluations while training, 0 for none.
        checkpoint_every: Gradient steps between two checkpoints, 0 for none.
    """

    updates: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.05
    warmup: int = 20
    weight_decay: float = 1e-4
    gradient_clip: float = 0.25
    loss: str = "mse"
    precision: str = "float32"
    accumulate: int = 1
    compile: CompileMode = "none"
    log_every: int = 20
    eval_every: int = 0
    checkpoint_every: int = 0


@dataclass
class Counters:
    """What a checkpoint holds besides tensors."""

    update: int = 0
    windows: int = 0
    seconds: float = 0.0


def learning_rate(options: BCOptions, update: int) -> float:
    """Learning rate of gradient step ``update`` (from 0): linear warm-up, then a cosine."""
    if update < options.warmup:
        return options.learning_rate * (update + 1) / options.warmup
    done = (update - options.warmup) / max(1, options.updates - options.warmup)
    floor = options.final_learning_rate
    return options.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2)


def train_bc(
    policy: DecisionTransformerPolicy,
    sampler: Sampler,
    options: BCOptions,
    *,
    log: Log,
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    checkpoint_dir: Path | None = None,
    extension: Extension | None = None,
) -> Counters:
    """Clone the actions of the sampled windows, from the last checkpoint where there is one.

    Where torch.distributed is initialised, all of its processes call this and take the same steps: those of one process
    that sees all their windows. The first one writes.

    Args:
        policy: Its trainable parameters are changed in place.
        sampler: Where windows come from, on each process its own (:class:`ShardedSampler`); step n always gives the
            same windows.
        options: How.
        log: Takes metrics and the gradient step they belong to.
        evaluate: Called every ``eval_every`` gradient steps, on every process; what it returns is logged.
        checkpoint_dir: Where checkpoints are kept; None keeps none.
        extension: What the method adds to the loop, if anything.

    Returns:
        The counters after the last update.

    Raises:
        UserError: The loss or the gradient is not finite; the last checkpoint stays as it was. Or another process
            ended.
    """
    process_group, network, seed = ProcessGroup.current(), policy.network, torch.initial_seed()
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters, options)
    counters = _resume(checkpoint_dir, parameters, optimizer, extension)
    _begin_together(process_group, network, counters)
    step = _Step(
        compiled(network, options.compile),
        list(parameters.values()),
        optimizer,
        options,
        extension,
        process_group,
        seed,
    )
    while counters.update < options.updates:
        began = time.perf_counter()
        network.train()
        batch = sampler.sample(options.batch_size, counters.update, policy.device)
        loss, norm = step.take(batch, counters.update)
        counters.update += 1
        counters.windows += options.batch_size
        counters.seconds += time.perf_counter() - began
        update = counters.update
        last = update == options.updates
        if process_group.is_main and (update % options.log_every == 0 or last or update == 1):
            log(_metrics(loss, norm, optimizer, counters), update)
        if evaluate is not None and options.eval_every and update % options.eval_every == 0 and not last:
            network.eval()
            found = evaluate(update)
            if process_group.is_main:
                log(found, update)
        due = options.checkpoint_every and (update % options.checkpoint_every == 0 or last)
        if checkpoint_dir and due and process_group.is_main:
            save_checkpoint(checkpoint_dir, _state(counters, parameters, optimizer, extension))
    network.eval()
    return counters


@dataclass(frozen=True)
class _Step:
    """One gradient step, of all processes together."""

    network: Callable[..., Any]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    options: BCOptions
    extension: Extension | None
    process_group: ProcessGroup
    seed: int

    def take(self, batch: WindowBatch, update: int) -> tuple[Tensor, Tensor]:
        """Change the parameters by this process's windows and everyone else's.

        Returns:
            The loss, without an extension's part, and the norm of the gradient before clipping: those of all windows.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.options, update)
        self.optimizer.zero_grad(set_to_none=True)
        if (
            self.process_group.world_size > 1
        ):  # dropout has to differ between processes, and not to depend on what came before
            torch.manual_seed(
                (self.seed + 1 + update * self.process_group.world_size + self.process_group.rank) % 2**63
            )
        loss = self.process_group.all_reduce_gradients(self.parameters, self._backward(batch))
        norm = nn.utils.clip_grad_norm_(self.parameters, self.options.gradient_clip)
        _check_finite(loss, norm, update)
        self.optimizer.step()
        if self.extension is not None:
            self.extension.after_step(update + 1)
        return loss, norm

    def _backward(self, batch: WindowBatch) -> Tensor:
        """Leave this process's part of the gradient in the parameters, and return its part of the loss.

        Every part is divided by the real env steps of all processes, so that the sum is the mean over all of them
        however their windows are padded.
        """
        numbers = self.process_group.all_reduce_sum(numbers_compared(batch))
        total = torch.zeros((), device=batch.actions.device)
        for part in parts(batch, self.options.accumulate):
            with autocast(batch.actions.device, self.options.precision):
                loss = (distance(self.network, part, self.options.loss) / numbers).float()
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if self.extension is not None:
            (self.extension.penalty() / self.process_group.world_size).backward()  # type: ignore[no-untyped-call]
        return total


def _begin_together(process_group: ProcessGroup, network: nn.Module, counters: Counters) -> None:
    """Begin at the same step with the same weights."""
    updates = process_group.all_gather_object(counters.update)
    if len(set(updates)) > 1:
        raise UserError(
            f"The processes found checkpoints of different gradient steps: {updates}. They all need the same run_dir: "
            "put it on a disk that all machines share."
        )
    process_group.broadcast_parameters(network)


def make_optimizer(parameters: Mapping[str, nn.Parameter], options: BCOptions) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.learning_rate)


def _metrics(loss: Tensor, norm: Tensor, optimizer: torch.optim.Optimizer, counters: Counters) -> dict[str, float]:
    return {
        "train/loss": loss.item(),
        "train/gradient_norm": norm.item(),
        "train/learning_rate": optimizer.param_groups[0]["lr"],
        "time/updates_per_second": counters.update / counters.seconds,
    }


def _check_finite(loss: Tensor, norm: Tensor, update: int) -> None:
    if not bool(torch.isfinite(loss + norm)):
        raise UserError(
            f"Gradient step {update}: the loss is {loss.item()} and the gradient norm {norm.item()}. The parameters "
            "and the last checkpoint are as they were. Lower algo.learning_rate, or look for outliers in the data."
        )


def _state(
    counters: Counters,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    extension: Extension | None,
) -> TrainState:
    names = {id(p): name for name, p in parameters.items()}
    tensors = {f"parameter/{name}": p.data for name, p in parameters.items()}
    tensors |= optimizer_tensors(optimizer, names)
    tensors["random/torch"] = torch.get_rng_state()
    if extension is not None:
        tensors |= {EXTENSION + name: value for name, value in extension.tensors().items()}
    return TrainState(counters.update, tensors, asdict(counters))


def _resume(
    folder: Path | None,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    extension: Extension | None,
) -> Counters:
    state = load_latest_checkpoint(folder) if folder else None
    if state is None:
        return Counters()
    missing = [name for name in parameters if f"parameter/{name}" not in state.tensors]
    if missing:
        raise UserError(
            f"The checkpoint in {folder} lacks {', '.join(missing[:3])}: it belongs to another adapter or policy. "
            "Use the settings it was made with, or another run_dir."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.tensors[f"parameter/{name}"])
    restore_optimizer(optimizer, parameters, state.tensors)
    if extension is not None:
        extension.restore({k.removeprefix(EXTENSION): v for k, v in state.tensors.items() if k.startswith(EXTENSION)})
    torch.set_rng_state(state.tensors["random/torch"])
    return Counters(**state.record)
