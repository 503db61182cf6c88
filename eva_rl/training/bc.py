"""Behaviour cloning of windows: pretraining and fine-tuning share this loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.data.prefetch import Sampler
from eva_rl.errors import UserError
from eva_rl.training.checkpoint import (
    TrainState,
    load_latest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)

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
    log_every: int = 20
    eval_every: int = 0
    checkpoint_every: int = 0


@dataclass
class Counters:
    """What a checkpoint holds besides tensors."""

    update: int = 0
    windows: int = 0
    seconds: float = 0.0


def clone_loss(network: nn.Module, batch: WindowBatch, loss: str = "mse") -> Tensor:
    """Mean distance between chosen and wanted actions over the real env steps of the windows.

    Args:
        network: Maps a batch to (B, T, act) actions.
        batch: Scaled windows.
        loss: ``mse`` or ``l1``.
    """
    wanted = batch.actions if batch.target_actions is None else batch.target_actions
    error: Tensor = (network(batch) - wanted).float()
    error = error.abs() if loss == "l1" else error.square()
    if batch.attention_mask is None:
        return torch.mean(error)
    real = batch.attention_mask.unsqueeze(-1).to(error.dtype)
    return torch.sum(error * real) / (real.sum() * error.shape[-1])


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

    Args:
        policy: Its trainable parameters are changed in place.
        sampler: Where windows come from; step n always gives the same windows.
        options: How.
        log: Takes metrics and the gradient step they belong to.
        evaluate: Called every ``eval_every`` gradient steps; what it returns is logged.
        checkpoint_dir: Where checkpoints are kept; None keeps none.
        extension: What the method adds to the loop, if anything.

    Returns:
        The counters after the last update.

    Raises:
        UserError: The loss or the gradient is not finite; the last checkpoint stays as it was.
    """
    network = policy.network
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters, options)
    counters = _resume(checkpoint_dir, parameters, optimizer, extension)
    while counters.update < options.updates:
        began = time.perf_counter()
        network.train()
        batch = sampler.sample(options.batch_size, counters.update, policy.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, counters.update)
        with autocast(policy.device, options.precision):
            loss = clone_loss(network, batch, options.loss)
        optimizer.zero_grad(set_to_none=True)
        (loss if extension is None else loss + extension.penalty()).backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters.values(), options.gradient_clip)
        _check_finite(loss, norm, counters.update)
        optimizer.step()
        counters.update += 1
        if extension is not None:
            extension.after_step(counters.update)
        counters.windows += len(batch)
        counters.seconds += time.perf_counter() - began
        update = counters.update
        last = update == options.updates
        if update % options.log_every == 0 or last or update == 1:
            log(_metrics(loss, norm, optimizer, counters), update)
        if evaluate is not None and options.eval_every and update % options.eval_every == 0 and not last:
            network.eval()
            log(evaluate(update), update)
        if checkpoint_dir and options.checkpoint_every and (update % options.checkpoint_every == 0 or last):
            save_checkpoint(checkpoint_dir, _state(counters, parameters, optimizer, extension))
    network.eval()
    return counters


def make_optimizer(parameters: Mapping[str, nn.Parameter], options: BCOptions) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.learning_rate)


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Mixed precision where ``precision`` is ``bfloat16``."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


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
