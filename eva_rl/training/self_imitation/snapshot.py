"""A copy of the parameters from the middle of cloning: another policy for the same task, at no cost.

Parameters from along one training run differ enough to be of use beside the last ones (snapshot ensembles, Huang et al.
2017, arXiv 1704.00109).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eva_rl.files import write_file
from eva_rl.training.optimizer import copy_of, restore_parameters, trainable_parameters


def save_snapshot(network: nn.Module, path: Path) -> None:
    """Write the trainable parameters as they are."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in trainable_parameters(network).items()}
    write_file(path, lambda aside: save_file(tensors, aside))


def load_snapshot(path: Path) -> dict[str, Tensor] | None:
    """What :func:`save_snapshot` wrote; None where there is no such file."""
    return load_file(path) if path.is_file() else None


@contextmanager
def acting_as(network: nn.Module, snapshot: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the network have the snapshot's parameters, and its own again afterwards.

    Raises:
        ValueError: The snapshot lacks a trainable parameter, or has it in another shape.
    """
    parameters = {name: p for name, p in network.named_parameters() if name in snapshot}
    own = copy_of(parameters)
    try:
        restore_parameters(parameters, snapshot, "")
        yield
    finally:
        restore_parameters(parameters, own, "")
