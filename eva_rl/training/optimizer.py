"""The actor's optimiser: its options, one checked step, and its part of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eva_rl.errors import UserError
from eva_rl.training.checkpoint import below
from eva_rl.training.failures import Batch, NotFiniteError
from eva_rl.training.options import OptimizerOptions

FACTOR = "learning_rate_factor"


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    options: OptimizerOptions,
    learning_rate_factor: Callable[[str], float] | None = None,
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; on a GPU in PyTorch's fused form, one kernel for all parameters.

    Args:
        parameters: By name.
        options: Hyperparameters.
        learning_rate_factor: By how much the learning rate of a parameter of this name differs from the others';
            None gives all the same.

    Raises:
        UserError: There are none.
    """
    if not parameters:
        raise UserError(
            "There is nothing to train: no parameter of the policy asks for gradients. Load an adapter with "
            "is_trainable=True, and let it act (policy.adapters.use(NAME))."
        )
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        factor = learning_rate_factor(name) if learning_rate_factor else 1.0
        groups.setdefault((factor, parameter.ndim > 1), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))  # matrices first
    optimizer = torch.optim.AdamW(
        [
            {"params": members, "weight_decay": options.weight_decay * decays, FACTOR: factor}
            for (factor, decays), members in ordered
        ],
        lr=options.learning_rate,
        fused=True if all(p.is_cuda for p in parameters.values()) else None,
    )
    optimizer.register_step_post_hook(_note_changes)
    return optimizer


def _note_changes(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Count a fused step in the version of each parameter, by which what is computed from weights knows its age.

    PyTorch's other implementations do so themselves.
    """
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                torch.autograd.graph.increment_version(parameter)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use a learning rate from the next step on; groups with a factor multiply it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(FACTOR, 1.0)


def checked_step(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    loss: Tensor,
    max_norm: float,
    *,
    update: int,
    batch: Batch,
) -> Tensor:
    """Clip the gradient and take one step, if loss and gradient are finite.

    Args:
        optimizer: Takes the step.
        parameters: With their gradients.
        loss: (), what the gradients are of.
        max_norm: Largest norm of the gradient.
        update: Gradient step, for the message.
        batch: What the loss was computed from; kept by :func:`eva_rl.training.failures.failures_kept`.

    Returns:
        The gradient's norm before clipping, ().

    Raises:
        NotFiniteError: The loss or the gradient is not finite; the parameters are as they were.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    if not bool(torch.isfinite(loss + norm)):
        raise NotFiniteError(f"the policy's loss ({loss.item():g}) or gradient norm ({norm.item():g})", update, batch)
    optimizer.step()
    return norm


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Moments and step counts of an optimiser, named by parameter.

    Args:
        optimizer: The optimiser.
        names: Name of each parameter by its ``id``.
    """
    return {
        f"optimizer/{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put moments and step counts back where :func:`optimizer_tensors` took them."""
    fused = bool(optimizer.defaults.get("fused"))  # then the count of steps lies where the parameters do
    for name, parameter in parameters.items():
        if state := below(tensors, f"optimizer/{name}/"):
            optimizer.state[parameter] = {
                key: value if key == "step" and not fused else value.to(parameter.device)
                for key, value in state.items()
            }


def trainable_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def copy_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values as they are now, by name."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def restore_parameters(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Put parameters back from a checkpoint.

    Args:
        parameters: By name.
        tensors: Of the checkpoint, under ``prefix`` and the same names.
        prefix: For instance ``parameter/``.

    Raises:
        ValueError: One is missing, or has another shape.
    """
    missing = [name for name in parameters if prefix + name not in tensors]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing[:3])}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = tensors[prefix + name]
            if value.shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)} there, {tuple(parameter.shape)} here")
            parameter.copy_(value)
