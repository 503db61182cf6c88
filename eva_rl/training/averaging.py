"""The mean of the trained parameters over the last part of training, so that a run's end is not a draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_swa_multi_avg_fn

from eva_rl.training.optimizer import copy_of, restore_parameters

COUNT = "count"
"""Beside the means in a checkpoint: the number of steps that they are of."""
_mean_with = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]  # torch leaves it untyped


class WeightAverage:
    """Mean of parameters over gradient steps (Izmailov et al. 2018, arXiv 1803.05407).

    Args:
        parameters: By name; averaged as they are after each of the steps.
        first: The gradient step, from 1, that is the first to count.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], first: int) -> None:
        self.first, self.count = first, 0
        self._parameters = parameters
        self._means = copy_of(parameters)

    def add(self, update: int) -> None:
        """Count the parameters as they are after gradient step ``update``, if it is one of those that count."""
        if update < self.first:
            return
        current: list[Tensor | nn.Parameter] = [p.detach() for p in self._parameters.values()]
        if self.count:
            _mean_with(list(self._means.values()), current, self.count)
        else:
            for mean, value in zip(self._means.values(), current, strict=True):
                mean.copy_(value)
        self.count += 1

    def take(self) -> None:
        """Give the parameters their means; nothing where no step counted."""
        if self.count:
            restore_parameters(self._parameters, self._means, "")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The means in place of the parameters, inside the ``with`` block; the parameters where no step counted."""
        current = copy_of(self._parameters)
        self.take()
        try:
            yield
        finally:
            restore_parameters(self._parameters, current, "")

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint."""
        return {**self._means, COUNT: torch.tensor(self.count)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        self.count = int(tensors[COUNT])
        for name, mean in self._means.items():
            mean.copy_(tensors[name])
