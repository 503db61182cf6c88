"""Gain and effective rank against float64 arithmetic on all rows, and proof that a root would be seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eva_rl import eva
from eva_rl.errors import UnknownNameError, UserError

WIDTH, RANK = 200, 8


def rows(batches: int = 6) -> list[Tensor]:
    """Decaying spectrum, correlated columns, a mean: like the inputs of a transformer's layers."""
    g = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g))[0] * torch.logspace(0, -1.5, WIDTH)
    return [torch.randn(5, 60, WIDTH, generator=g) @ mix.T + 0.1 for _ in range(batches)]


def starts(result: eva.EvaResult) -> dict[str, Tensor]:
    """A of LoRA, of EVA, and of EVA whitened."""
    torch.manual_seed(1)
    lora = nn.Linear(WIDTH, RANK, bias=False)
    nn.init.kaiming_uniform_(lora.weight, a=5**0.5)
    components = result.layers[""].components
    deviations = result.layers[""].singular_values[:RANK] / result.layers[""].rows ** 0.5
    return {"lora": lora.weight, "eva": components, "whiten": components / deviations[:, None].float()}


def by_hand(a: Tensor, data: list[Tensor]) -> tuple[float, float]:
    """E|A x|^2, and the effective rank from the spectrum of A x, row by row."""
    y = torch.cat([x.reshape(-1, WIDTH) for x in data]).double() @ a.detach().double().T
    variances = torch.linalg.svdvals(y).square() / len(y)
    return float(y.square().sum(1).mean()), float(variances.sum() ** 2 / variances.square().sum())


@pytest.mark.parametrize("method", ["moments", "sketch", "svd"])
@pytest.mark.parametrize("start", ["lora", "eva", "whiten"])
def test_gain_and_effective_rank_are_those_of_all_rows(method: str, start: str) -> None:
    data = rows()
    result = eva.compute(nn.Linear(WIDTH, 3), data, rank=RANK, method=method, tau=1.0, keep_moments=True)
    a, moment = starts(result)[start], result.moments[""]
    expected, rank = by_hand(a, data)
    exact = method == "moments"  # factors know the leading directions and the trace
    tolerance = 1e-3 if exact else 5e-2
    assert eva.gain(a, moment) == pytest.approx(expected, rel=tolerance)
    assert eva.effective_rank(a, moment) == pytest.approx(rank, rel=1e-3 if exact else 0.1)
    assert eva.gain(2 * a, moment) == pytest.approx(4 * expected, rel=tolerance), "the gain, not its root"
    assert eva.effective_rank(2 * a, moment) == pytest.approx(eva.effective_rank(a, moment)), "free of scale"
    if start == "whiten":
        assert rank == pytest.approx(RANK, rel=1e-2)


@pytest.mark.parametrize("method", ["moments", "sketch"])
def test_a_second_moment_is_an_operator(method: str) -> None:
    data = rows()
    layer = nn.Linear(WIDTH, 3)
    with torch.no_grad(), eva.listen(layer, components=60, method=method) as statistics:
        for x in data:
            layer(x)
    moment = statistics.second_moment("")
    x = torch.cat([x.reshape(-1, WIDTH) for x in data]).double()
    s = x.T @ x / len(x)
    assert moment.rows == len(x)
    assert moment.trace == pytest.approx(float(s.trace()), rel=1e-5)
    found = moment @ torch.eye(WIDTH)
    assert (found - s).norm() < (1e-4 if method == "moments" else 2e-2) * s.norm()
    assert (found.diagonal().sum() - s.trace()).abs() < 1e-3 * s.trace()
    with pytest.raises(UserError, match=r"\(200, 200\); it was multiplied by \(3, 200\)"):
        _ = moment @ torch.ones(3, WIDTH)
    with pytest.raises(UnknownNameError, match="layer"):
        statistics.second_moment("other")


def test_moments_that_are_kept_are_exact_where_speed_would_sketch() -> None:
    data, layer = rows(2), nn.Linear(WIDTH, 3)
    quick = eva.compute(layer, data, rank=4, tau=1.0)
    kept = eva.compute(layer, data, rank=4, tau=1.0, keep_moments=True)
    assert (quick.layers[""].method, kept.layers[""].method) == ("sketch", "moments")
    assert not quick.moments


def test_masked_rows_do_not_count_and_shared_inputs_share_the_moment() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x)

    x, mask = torch.randn(7, 5, 6), torch.rand(7, 5) > 0.4
    result = eva.compute(Two(), [x], rank=2, mask=lambda batch: mask, keep_moments=True)
    assert result.moments["q"] is result.moments["k"]
    a = torch.randn(3, 6)
    expected = (x[mask].double() @ a.double().T).square().sum(1).mean()
    assert eva.gain(a, result.moments["q"]) == pytest.approx(float(expected), rel=1e-5)
