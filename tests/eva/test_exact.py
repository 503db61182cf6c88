"""Components against the SVD of all rows in float64, and proof that the comparison sees the usual mistakes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from eva_rl import eva
from eva_rl.errors import UserError
from tests.eva.reference import Exact, all_rows, assert_matches, exact, flat, matches

Masked = dict[str, Tensor]


class Steps(nn.Module):
    """Two layers over c tokens per step; `attention_mask` is there to be read by the engine."""

    def __init__(self, width: int = 24, tokens: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, 40)
        self.second = nn.Linear(40, 7)
        self.tokens = tokens

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = x.repeat_interleave(self.tokens, dim=1) * torch.arange(1.0, self.tokens + 1).repeat(x.shape[1])[:, None]
        return self.second(torch.tanh(self.first(x)))


def batches(count: int = 4, mean: float = 2.0, seed: int = 0) -> list[Masked]:
    g = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1.5, 24)
    made = []
    for _ in range(count):
        mask = (torch.rand(9, 5, generator=g) > 0.3).long()
        x = torch.randn(9, 5, 24, generator=g) * scales + mean * torch.linspace(0, 1, 24)
        made.append({"x": torch.where(mask[..., None] > 0, x, 50.0), "attention_mask": mask})
    return made


def kept(batch: Masked, x: Tensor) -> Tensor:
    return x[batch["attention_mask"].bool().repeat_interleave(x.shape[1] // batch["attention_mask"].shape[1], dim=1)]


@pytest.fixture
def model() -> Steps:
    torch.manual_seed(0)
    return Steps()


def truth(model: nn.Module, data: list[Masked], center: bool) -> dict[str, Exact]:
    rows = all_rows(model, ["first", "second"], data, lambda b: model(**b), kept)
    return {name: exact(x, center) for name, x in rows.items()}


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("mean", [0.0, 2.0, 30.0])
def test_moments_match_the_svd_of_all_rows(model: Steps, center: bool, mean: float) -> None:
    data = batches(mean=mean)
    result = eva.compute(model, data, targets=["first", "second"], rank=8, center=center, method="moments", tau=1.0)
    for name, expected in truth(model, data, center).items():
        assert_matches(result.layers[name], expected)


@pytest.mark.parametrize("center", [False, True])
def test_wrong_variants_do_not_match(model: Steps, center: bool) -> None:
    data = batches()
    expected = truth(model, data, center)["first"]

    def compute(mask: object = None, centre: bool = center) -> eva.LayerResult:
        options = {"targets": ["first"], "rank": 8, "tau": 1.0, "center": centre}
        return eva.compute(model, data, mask=mask, **options).layers["first"]

    right = compute()
    assert matches(right, expected)
    assert not matches(compute(mask=lambda batch: None), expected), "mask ignored"
    assert not matches(compute(mask=lambda batch: batch["attention_mask"].roll(1, 1)), expected), "mask shifted"
    assert not matches(compute(centre=not center), expected), "centring swapped"
    squared = replace(right, singular_values=right.singular_values.square())
    assert not matches(squared, expected), "scale squared"
    first_tokens = torch.linspace(0, 1, 8).flip(0)
    assert not matches(replace(right, explained_variance_ratio=first_tokens), expected), "ratios made up"


def test_tokens_of_a_step_follow_each_other(model: Steps) -> None:
    """Expanding (B, T) as T tokens of each kind, instead of c tokens per step, gives other rows."""
    data = batches()
    right = eva.compute(model, data, targets=["first"], rank=4, tau=1.0)
    wrong = eva.compute(
        model, data, targets=["first"], rank=4, tau=1.0, mask=lambda b: b["attention_mask"].repeat(1, 3)
    )
    expected = truth(model, data, False)["first"]
    assert matches(right.layers["first"], expected)
    assert not matches(wrong.layers["first"], expected)


@pytest.mark.parametrize("method", ["sketch", "svd"])
@pytest.mark.parametrize("center", [False, True])
def test_sketches_are_close_to_the_best(method: str, center: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(200, 3)
    g = torch.Generator().manual_seed(1)
    mix = torch.linalg.qr(torch.randn(200, 200, generator=g))[0] * torch.logspace(0, -2, 200)
    data = [torch.randn(300, 200, generator=g) @ mix.T + 0.3 for _ in range(6)]
    result = eva.compute(layer, data, rank=12, method=method, center=center, tau=1.0).layers[""]
    expected = exact(torch.cat(data), center)
    rows = torch.cat(data).double()
    rows = rows - rows.mean(0) if center else rows
    captured = (rows @ result.components.double().T).square().sum() / expected.sigma[:12].square().sum()
    assert captured > 0.995
    torch.testing.assert_close(result.explained_variance_ratio[:4], expected.ratios[:4], rtol=0.02, atol=0)


def test_iteration_equals_full_decomposition() -> None:
    g = torch.Generator().manual_seed(1)
    layer = nn.Linear(320, 3)
    mix = torch.randn(320, 320, generator=g) * torch.logspace(0, -2, 320)
    data = [torch.randn(500, 320, generator=g) @ mix.T for _ in range(2)]
    result = eva.compute(layer, data, rank=12, method="moments", tau=1.0).layers[""]
    assert_matches(result, exact(torch.cat(data), False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_activations_are_summed_in_high_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 3, dtype=dtype)
    data = [(torch.randn(400, 16) * torch.logspace(0, -1.5, 16)).to(dtype) for _ in range(3)]
    result = eva.compute(layer, data, rank=8, tau=1.0).layers[""]
    assert_matches(result, exact(torch.cat(data), False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = eva.compute(nn.Linear(16, 3), [x.float() for x in data], rank=8, tau=1.0).layers[""]
    assert_matches(again, exact(torch.cat(data), False))


def test_any_batch_form_and_any_iterable() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    x = [torch.randn(8, 6) for _ in range(3)]
    forms = [x, [(b,) for b in x], [{"input": b} for b in x], (b for b in x)]
    results = [eva.compute(model, form, rank=2, tau=1.0) for form in forms]
    assert all(torch.equal(r.layers["0"].components, results[0].layers["0"].components) for r in results)
    own = eva.compute(model, x, rank=2, tau=1.0, forward=lambda model, batch: model(batch * 2))
    torch.testing.assert_close(own.layers["0"].singular_values, 2 * results[0].layers["0"].singular_values)


def test_order_does_not_matter(model: Steps) -> None:
    data = batches(6)
    one = eva.compute(model, data, rank=4, tau=1.0)
    other = eva.compute(model, data[::-1], rank=4, tau=1.0)
    for name in one.layers:
        torch.testing.assert_close(one.layers[name].components, other.layers[name].components, atol=1e-4, rtol=0)


def test_mask_that_does_not_fit_is_refused(model: Steps) -> None:
    with pytest.raises(UserError, match=r"first.*do not fit a mask of 9 samples of 4 steps"):
        eva.compute(model, batches(), mask=lambda batch: batch["attention_mask"][:, :4], rank=2)


def test_flat_rows_are_counted_exactly(model: Steps) -> None:
    result = eva.compute(model, batches(3), targets=["first"], rank=2, tau=1.0)
    assert result.rows == 3 * int(sum(b["attention_mask"].sum() for b in batches(3)))
    unmasked = eva.compute(model, batches(3), targets=["first"], rank=2, tau=1.0, mask=lambda batch: None)
    assert unmasked.rows == len(torch.cat([flat(None, b["x"]) for b in batches(3)])) * 3
