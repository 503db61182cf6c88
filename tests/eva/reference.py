"""An independent answer: every row is kept, and numpy-like float64 algebra does the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Exact:
    """SVD of all rows of one layer: sigma (D,), directions (D, D) as rows, and the share of the total of each."""

    sigma: Tensor
    directions: Tensor

    @property
    def ratios(self) -> Tensor:
        return self.sigma.square() / self.sigma.square().sum()


def exact(rows: Tensor, center: bool) -> Exact:
    rows = rows.double()
    rows = rows - rows.mean(0) if center else rows
    _, sigma, directions = torch.linalg.svd(rows, full_matrices=False)
    return Exact(sigma, directions)


def all_rows(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    keep: Callable[[Any, Tensor], Tensor],
) -> dict[str, Tensor]:
    """The inputs of the named layers over all batches, with `keep(batch, x)` picking rows (N, D) from x."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    now: list[Any] = [None]

    def record(name: str) -> Callable[..., None]:
        return lambda _, args: rows[name].append(keep(now[0], args[0].detach()))

    handles = [model.get_submodule(name).register_forward_pre_hook(record(name)) for name in rows]
    model.eval()
    with torch.no_grad():
        for batch in batches:
            now[0] = batch
            run(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in rows.items()}


def flat(_: Any, x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def assert_matches(layer: Any, truth: Exact) -> None:
    """Ratios within 1e-4 relative where above 1e-4, separated directions within 1e-3, subspaces between wide gaps."""
    K = len(layer.explained_variance_ratio)
    ratios = truth.ratios[:K]
    big = ratios > 1e-4
    torch.testing.assert_close(layer.explained_variance_ratio[big], ratios[big], rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.singular_values[big], truth.sigma[:K][big], rtol=1e-4, atol=0)
    variances = truth.sigma.square()
    gaps = (variances[:-1] - variances[1:]) / variances[:-1]
    ours = layer.components.double()
    for j in range(layer.rank):
        before = gaps[j - 1] if j else 1.0
        after = gaps[j] if j < len(gaps) else 1.0
        if min(before, after) > 0.01 and ratios[j] > 1e-4:
            distance = min((ours[j] - truth.directions[j]).norm(), (ours[j] + truth.directions[j]).norm())
            assert distance < 1e-3, (j, float(distance))
        if after > 0.01 and ratios[j] > 1e-4:
            cosines = torch.linalg.svdvals(ours[: j + 1] @ truth.directions[: j + 1].T)
            assert cosines.min() > 1 - 1e-5, (j, float(cosines.min()))


def matches(layer: Any, truth: Exact) -> bool:
    try:
        assert_matches(layer, truth)
    except AssertionError:
        return False
    return True
