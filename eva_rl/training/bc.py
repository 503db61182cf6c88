"""Behaviour cloning of windows: pretraining and fine-tuning share this loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.data.samplers import Sampler
from eva_rl.distributed import ProcessGroup
from eva_rl.errors import UserError
from eva_rl.seeding import random_state, restore_random_state
from eva_rl.training.averaging import WeightAverage
from eva_rl.training.checkpoint import Checkpoints, TrainState, below
from eva_rl.training.compiling import compiled
from eva_rl.training.failures import interrupts_deferred, interrupts_saved, saved_on_failure
from eva_rl.training.losses import autocast, microbatches, num_action_elements, summed_action_loss
from eva_rl.training.optimizer import (
    checked_step,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    restore_parameters,
    set_learning_rate,
    trainable_parameters,
)
from eva_rl.training.options import BCOptions, averaged_updates
from eva_rl.training.precision import choose_precision

Log: TypeAlias = Callable[[Mapping[str, float], int], None]
Evaluate: TypeAlias = Callable[[int], Mapping[str, float]]
EXTENSION, AVERAGE, LOSS = "extension/", "average/", "loss_since_point"
VALIDATION_STEPS = "validation/env_steps"
"""The metric in which a validation tells how many env steps it played."""


class Extension(Protocol):
    """What a method adds to the loop."""

    def penalty(self) -> Tensor:
        """Added to the loss."""

    def after_step(self, update: int) -> None:
        """Called after the optimiser's step ``update`` (from 1), before the gradients are cleared."""

    def learning_rate_factor(self, name: str) -> float:
        """By how much a parameter's learning rate differs from the others'."""

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what ``tensors`` gave."""


@dataclass(frozen=True)
class Continued:
    """A method's extension in one of several trainings, whose gradient steps it counts together.

    Attributes:
        extension: What the method adds.
        before: Gradient steps of the trainings before.
    """

    extension: Extension
    before: int

    def penalty(self) -> Tensor:
        """As the extension's."""
        return self.extension.penalty()

    def after_step(self, update: int) -> None:
        """Tell the extension of the step among all."""
        self.extension.after_step(self.before + update)

    def learning_rate_factor(self, name: str) -> float:
        """As the extension's."""
        return self.extension.learning_rate_factor(name)

    def tensors(self) -> dict[str, Tensor]:
        """As the extension's."""
        return self.extension.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """As the extension's."""
        self.extension.restore(tensors)


@dataclass
class Counters:
    """What a checkpoint holds besides tensors.

    Attributes:
        update: Gradient steps done.
        windows: Windows seen.
        seconds: Of the gradient steps.
        precision: What ``auto`` came to when training began.
        validation_steps: Env steps played to validate.
        validation_due: The validation after the last gradient step is yet to be played.
    """

    update: int = 0
    windows: int = 0
    seconds: float = 0.0
    precision: str = ""
    validation_steps: int = 0
    validation_due: bool = False

    def count(self, windows: int, seconds: float) -> None:
        """Count a gradient step."""
        self.update += 1
        self.windows += windows
        self.seconds += seconds


def learning_rate(options: BCOptions, update: int) -> float:
    """Learning rate of gradient step ``update`` (from 0): linear warm-up, then a cosine."""
    if update < options.warmup_steps:
        return options.learning_rate * (update + 1) / options.warmup_steps
    done = (update - options.warmup_steps) / max(1, options.updates - options.warmup_steps)
    floor = options.final_learning_rate
    return options.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2)


def train_bc(  # noqa: PLR0913 - three values, what it reports to, and what others add
    policy: DecisionTransformerPolicy,
    sampler: Sampler,
    options: BCOptions,
    *,
    log: Log,
    evaluate: Evaluate | None = None,
    eval_every: int = 0,
    measure: Evaluate | None = None,
    measure_at: Collection[int] = (),
    checkpoints: Checkpoints | None = None,
    extension: Extension | None = None,
    process_group: ProcessGroup | None = None,
    after: Mapping[int, Callable[[], object]] | None = None,
) -> Counters:
    """Clone the actions of the sampled windows, resuming from the latest checkpoint if one exists.

    In a process group, every process calls this and takes the same steps: those of one process that sees all their
    windows. Rank 0 logs and saves.

    Args:
        policy: Its trainable parameters are changed in place.
        sampler: Where windows come from, on each process its own (:class:`ShardedSampler`); step n always gives the
            same windows.
        options: Hyperparameters.
        log: Takes metrics and the gradient step they belong to.
        evaluate: Returns validation metrics, which are logged; called on every process.
        eval_every: Gradient steps between two calls of ``evaluate``; 0 disables it.
        measure: Returns metrics of held-out episodes, which are logged; called on every process.
        measure_at: Gradient steps after which it is called, but for the last.
        checkpoints: Where and when to save; None keeps no checkpoint.
        extension: What the adapter's method adds to the loop, if anything.
        process_group: This process among the others; None takes torch.distributed's default group.
        after: Further calls after some gradient steps, before anything is saved there.

    Returns:
        The counters after the last update.

    Raises:
        NotFiniteError: The loss or the gradient is not finite; the last checkpoint stays as it was.
        KeyboardInterrupt: Ctrl-C, or SIGTERM in a command; the gradient step is finished and saved. A validation that
            did not come to its end is played by the run that resumes.
        EnvironmentFailedError: One did while validating; what was learned is saved.
        UserError: Another process ended.
    """
    process_group, seed = process_group or ProcessGroup.current(), torch.initial_seed()
    run = _Run.begin(policy, options, checkpoints, extension, process_group)
    counters, log = run.counters, log if process_group.is_main else lambda metrics, step: None
    if not counters.precision:
        draw = partial(sampler.sample, options.batch_size, counters.update, policy.device)
        decide = partial(choose_precision, options.precision, policy.network, draw)
        counters.precision = process_group.broadcast_object(decide)
    step = _Step(policy, compiled(policy.network, options.compile), run, options, process_group, seed)
    saver = _Saver(run, checkpoints if process_group.is_main and checkpoints and checkpoints.enabled else None)
    validation = _Validation(policy, run, (evaluate, eval_every), (measure, measure_at), log, saver)
    validation.play_if_due()
    while counters.update < options.updates:
        with interrupts_deferred() as interrupt:
            norm = step.advance(sampler)
            if after and counters.update in after:
                after[counters.update]()
            last = counters.update == options.updates
            counters.validation_due = not last and bool(validation.after(counters.update))
            if counters.update % options.log_every == 0 or last or counters.update == 1:
                log(_metrics(run, norm), counters.update)
            if interrupt.requested:
                saver.save()
        validation.play_if_due()
        saver.save_if_due(last=last)
    policy.network.eval()
    if run.average:
        run.average.take()
    run.optimizer.zero_grad(set_to_none=True)  # what follows would record the last gradient as one of its own
    return counters


@dataclass(frozen=True)
class _Run:
    """What is trained, and how far it has come: exactly what a checkpoint holds.

    Attributes:
        loss_since_point: (2,), sum and number of the losses since the last point of the curves.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    extension: Extension | None
    counters: Counters
    average: WeightAverage | None
    loss_since_point: Tensor

    @classmethod
    def begin(
        cls,
        policy: DecisionTransformerPolicy,
        options: BCOptions,
        checkpoints: Checkpoints | None,
        extension: Extension | None,
        process_group: ProcessGroup,
    ) -> _Run:
        """Begin, or resume from the latest checkpoint, at the same step with the same weights on every process."""
        parameters = trainable_parameters(policy.network)
        factor = extension.learning_rate_factor if extension else None
        averaged = averaged_updates(options.ema, options.updates)
        average = WeightAverage(parameters, options.updates - averaged + 1) if averaged else None
        losses, optimizer = torch.zeros(2, device=policy.device), make_optimizer(parameters, options, factor)
        run = cls(parameters, optimizer, extension, Counters(), average, losses)
        if checkpoints and (state := checkpoints.load()) is not None:
            with checkpoints.fitting():
                run.restore(state)
        updates = process_group.all_gather_object(run.counters.update)
        if len(set(updates)) > 1:
            raise UserError(
                f"The processes found checkpoints of different gradient steps: {updates}. They all need the same "
                "run_dir: put it on a disk that all machines share."
            )
        process_group.broadcast_parameters(policy.network)
        return run

    def state(self) -> TrainState:
        """Everything that a resumed run needs."""
        names = {id(p): name for name, p in self.parameters.items()}
        tensors = {f"parameter/{name}": p.data for name, p in self.parameters.items()}
        tensors |= optimizer_tensors(self.optimizer, names)
        tensors |= random_state(self.loss_since_point.device)
        tensors[LOSS] = self.loss_since_point
        if self.extension is not None:
            tensors |= {EXTENSION + name: value for name, value in self.extension.tensors().items()}
        if self.average is not None:
            tensors |= {AVERAGE + name: value for name, value in self.average.tensors().items()}
        return TrainState(self.counters.update, tensors, asdict(self.counters))

    def restore(self, state: TrainState) -> None:
        """Put back what :meth:`state` gave."""
        restore_parameters(self.parameters, state.tensors, "parameter/")
        restore_optimizer(self.optimizer, self.parameters, state.tensors)
        if self.extension is not None:
            self.extension.restore(below(state.tensors, EXTENSION))
        if self.average is not None and (means := below(state.tensors, AVERAGE)):
            self.average.restore(means)
        restore_random_state(state.tensors, self.loss_since_point.device)
        if LOSS in state.tensors:  # not in older checkpoints
            self.loss_since_point.copy_(state.tensors[LOSS])
        for name, value in asdict(Counters(**state.record)).items():
            setattr(self.counters, name, value)


@dataclass(frozen=True)
class _Saver:
    """Saves a run where checkpoints are kept."""

    run: _Run
    checkpoints: Checkpoints | None

    def save(self) -> None:
        if self.checkpoints:
            self.checkpoints.save(self.run.state())

    def save_if_due(self, *, last: bool) -> None:
        if self.checkpoints and self.checkpoints.due(self.run.counters.update, last):
            self.save()


@dataclass(frozen=True)
class _Validation:
    """The evaluations of a run: what is called after which gradient steps, and where their metrics go."""

    policy: DecisionTransformerPolicy
    run: _Run
    validated: tuple[Evaluate | None, int]
    measured: tuple[Evaluate | None, Collection[int]]
    log: Log
    saver: _Saver

    def after(self, update: int) -> list[Evaluate]:
        """What is called after that gradient step."""
        (evaluate, every), (measure, at) = self.validated, self.measured
        due = (measure if update in at else None, evaluate if every and update % every == 0 else None)
        return [one for one in due if one is not None]

    def play_if_due(self) -> None:
        """Play them, with averaged parameters where there are some; save what was learned where they are stopped."""
        run, counters = self.run, self.run.counters
        due = self.after(counters.update) if counters.validation_due else []
        if not due:
            return
        self.policy.network.eval()
        saves = self.saver.save if self.saver.checkpoints else None
        with interrupts_saved(self.saver.save), saved_on_failure(saves):
            with run.average.applied() if run.average else nullcontext():
                found = [one(counters.update) for one in due]
            metrics = {key: value for one in found for key, value in one.items()}
            counters.validation_steps += int(metrics.get(VALIDATION_STEPS, 0))
            counters.validation_due = False
        self.log(metrics, counters.update)


@dataclass(frozen=True)
class _Step:
    """One gradient step, of all processes together."""

    policy: DecisionTransformerPolicy
    network: Callable[..., Any]
    run: _Run
    options: BCOptions
    process_group: ProcessGroup
    seed: int

    def advance(self, sampler: Sampler) -> Tensor:
        """Draw windows, take the step and count it; returns the norm of the gradient before clipping."""
        run, began = self.run, time.perf_counter()
        self.policy.network.train()
        batch = sampler.sample(self.options.batch_size, run.counters.update, self.policy.device)
        loss, norm = self.take(batch, run.counters.update)
        run.counters.count(self.options.batch_size, time.perf_counter() - began)
        run.loss_since_point.add_(torch.stack([loss, torch.ones_like(loss)]))
        return norm

    def take(self, batch: WindowBatch, update: int) -> tuple[Tensor, Tensor]:
        """Change the parameters by this process's windows and everyone else's.

        Returns:
            The loss, without an extension's part, and the norm of the gradient before clipping: those of all windows.
        """
        parameters, group = list(self.run.parameters.values()), self.process_group
        set_learning_rate(self.run.optimizer, learning_rate(self.options, update))
        self.run.optimizer.zero_grad(set_to_none=True)
        if group.world_size > 1:  # dropout has to differ between processes, and not to depend on what came before
            torch.manual_seed((self.seed + 1 + update * group.world_size + group.rank) % 2**63)
        loss = group.all_reduce_gradients(parameters, self._backward(batch))
        norm = checked_step(
            self.run.optimizer, parameters, loss, self.options.gradient_clip, update=update, batch=batch
        )
        if self.run.extension is not None:
            self.run.extension.after_step(update + 1)
        if self.run.average is not None:
            self.run.average.add(update + 1)
        return loss, norm

    def _backward(self, batch: WindowBatch) -> Tensor:
        """Leave this process's part of the gradient in the parameters, and return its part of the loss.

        Every microbatch's sum is divided by the real action elements of all processes, so that the total is the mean
        over all of them however their windows are padded.
        """
        elements = self.process_group.all_reduce_sum(num_action_elements(batch))
        total = torch.zeros((), device=batch.actions.device)
        for part in microbatches(batch, self.options.accumulate):
            with autocast(batch.actions.device, self.run.counters.precision):
                loss = (summed_action_loss(self.network, part, self.options.loss) / elements).float()
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if self.run.extension is not None:
            (self.run.extension.penalty() / self.process_group.world_size).backward()  # type: ignore[no-untyped-call]
        return total


def _metrics(run: _Run, norm: Tensor) -> dict[str, float]:
    """A point of the curves; the mean of the loss begins anew."""
    total, count = run.loss_since_point.tolist()
    run.loss_since_point.zero_()
    return {
        "train/loss": total / count,
        "train/gradient_norm": norm.item(),
        "train/learning_rate": run.optimizer.param_groups[0]["lr"],
        "time/updates_per_second": run.counters.update / run.counters.seconds,
    }
