"""Data and models at the edges: each ends, with a right answer or with an error that says what to do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eva_rl import eva
from eva_rl.batch import WindowBatch
from eva_rl.errors import UnknownNameError, UserError
from tests.conftest import make_policy
from tests.eva.reference import assert_matches, exact


def endless(width: int, rows: int = 64) -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(rows, width, generator=g)


@pytest.mark.parametrize("criterion", ["capture", "directions"])
def test_isotropic_noise_ends_at_max_batches(criterion: str) -> None:
    result = eva.compute(nn.Linear(64, 2), endless(64), rank=4, max_batches=7, criterion=criterion)
    assert (result.stopped, result.batches, result.converged) == ("max_batches", 7, False)
    assert result.layers[""].split_half_agreement < 0.5


def test_noise_is_known_in_the_end() -> None:
    """All directions of white noise capture the same: with enough rows any of them is right, and capture says so."""
    result = eva.compute(nn.Linear(8, 2), endless(8, 4000), rank=4, tau=0.97)
    assert result.stopped == "converged"
    assert result.layers[""].split_half_agreement < 0.97


def test_separated_directions_converge_early() -> None:
    batches = (x * torch.logspace(0, -12, 64) for x in endless(64))
    result = eva.compute(nn.Linear(64, 2), batches, rank=4, criterion="directions", tau=0.97)
    assert result.stopped == "converged"
    assert result.batches <= 40
    assert result.layers[""].split_half_agreement > 0.97


def test_near_tie_is_compared_as_a_subspace() -> None:
    scales = torch.tensor([3.0, 1.0, 1.0, 0.1, 0.1, 0.1])
    batches = (x * scales for x in endless(6, 400))
    result = eva.compute(nn.Linear(6, 2), batches, rank=3, criterion="directions", tau=0.99, max_batches=30)
    assert result.stopped == "converged"


def test_repeated_batch_ends() -> None:
    x = torch.randn(40, 12)
    result = eva.compute(nn.Linear(12, 2), (x for _ in range(1000)), rank=4, max_batches=9)
    assert result.batches <= 9
    assert_matches(result.layers[""], exact(x.repeat(result.batches, 1), False))


def test_fewer_rows_than_components_gives_as_many_as_there_are() -> None:
    layer = eva.compute(nn.Linear(30, 2), [torch.randn(3, 30)], rank=8).layers[""]
    assert layer.rank == 3
    assert "only 3 directions" in layer.note
    torch.testing.assert_close(layer.components @ layer.components.T, torch.eye(3), atol=1e-5, rtol=0)


def test_one_row() -> None:
    layer = eva.compute(nn.Linear(5, 2), [torch.tensor([[0.0, 3.0, 0.0, 4.0, 0.0]])], rank=2).layers[""]
    torch.testing.assert_close(layer.components, torch.tensor([[0.0, 0.6, 0.0, 0.8, 0.0]]), atol=1e-6, rtol=0)
    assert layer.singular_values[0] == pytest.approx(5.0)
    assert math.isnan(layer.split_half_agreement), "there is one half only"


def test_halves_have_no_sample_in_common_where_time_comes_first() -> None:
    """Six samples whose steps are all alike: three rows against three agree as little, whichever dimension is first."""
    torch.manual_seed(0)
    x, agreements = torch.randn(1, 6, 16).expand(10, 6, 16).contiguous(), []
    for first in (False, True):
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=first)
        given = x.transpose(0, 1).contiguous() if first else x
        result = eva.compute(layer, [given], targets=["linear1"], rank=2).layers["linear1"]
        agreements.append(result.split_half_agreement)
    assert agreements[0] == pytest.approx(agreements[1], abs=1e-4)
    assert agreements[0] < 0.5


def test_constant_activations() -> None:
    data = [torch.ones(10, 6)] * 3
    assert eva.compute(nn.Linear(6, 2), data, rank=2, center=False).layers[""].rank == 1
    with pytest.raises(UserError, match="every direction has zero variance"):
        eva.compute(nn.Linear(6, 2), data, rank=2, center=True)


def test_one_wide_layer() -> None:
    layer = eva.compute(nn.Linear(1, 4), [torch.randn(8, 1) for _ in range(2)], rank=16, rho=2.0).layers[""]
    assert layer.components.abs().tolist() == [[pytest.approx(1.0)]]
    assert layer.lora_alpha == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("method", ["moments", "sketch", "svd"])
def test_values_that_are_not_finite_are_an_error_that_names_the_layer(bad: float, method: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    data = [torch.randn(8, 4) for _ in range(3)]
    data[1][2, 1] = bad
    with pytest.raises(UserError, match=r"input of layer '0'.*by batch 2"):
        eva.compute(model, data, rank=2, method=method, tau=1.0)


def test_masked_padding_may_hold_anything() -> None:
    x = torch.randn(4, 5, 6)
    x[:, 3:] = float("nan")
    mask = torch.tensor([[1, 1, 1, 0, 0]]).expand(4, 5)
    result = eva.compute(nn.Linear(6, 2), [x], rank=3, mask=lambda batch: mask)
    assert_matches(result.layers[""], exact(x[:, :3].reshape(-1, 6), False))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.used(x))


def test_layers_never_called() -> None:
    data = [torch.randn(8, 4)] * 2
    result = eva.compute(Unused(), data, rank=2)
    assert list(result.layers) == ["used"]
    assert result.skipped == ("idle",)
    with pytest.raises(UserError, match="1 target layers were never called, the first is 'idle'"):
        eva.compute(Unused(), data, targets=["used", "idle"], rank=2)


def test_targets_as_peft_names_them() -> None:
    model = Unused()
    assert [layer.name for layer in eva.find_layers(model)] == ["used", "idle"]
    assert [layer.name for layer in eva.find_layers(model, "all-linear")] == ["used", "idle", "lm_head"]
    assert [layer.name for layer in eva.find_layers(model, r"(used|lm_.*)")] == ["used", "lm_head"]
    assert [layer.name for layer in eva.find_layers(nn.Sequential(model), ["used"])] == ["0.used"]
    with pytest.raises(UnknownNameError, match=r"'usd'\. Did you mean 'used'.*idle, lm_head"):
        eva.find_layers(model, ["used", "usd"])
    with pytest.raises(UserError, match=r"no torch\.nn\.Linear"):
        eva.find_layers(nn.ReLU())


def test_no_batches() -> None:
    with pytest.raises(UserError, match="no batch came"):
        eva.compute(nn.Linear(4, 2), [], rank=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, r"rank=2\.5: expected at least 1, and a whole number"),
        ({"rho": 0.5}, "rho=0.5"),
        ({"rho": float("inf")}, "rho=inf"),
        ({"rho": float("nan")}, "rho=nan"),
        ({"alpha": float("inf")}, "alpha=inf"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"seed": -1}, "seed=-1: expected at least 0"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"max_batches": 0}, "max_batches=0"),
        ({"score": "raito"}, "Did you mean 'ratio'"),
        ({"variant": "whitten"}, "Did you mean 'whiten'"),
        ({"method": "moment"}, "Did you mean 'moments'"),
    ],
)
def test_values_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        eva.compute(nn.Linear(4, 2), [torch.randn(8, 4)], **options)


def test_what_is_no_model_or_no_iterable_of_batches_is_refused(tmp_path: Path) -> None:
    policy: Any = make_policy()
    for call in (lambda: eva.compute(policy, []), lambda: eva.listen(policy)):
        with pytest.raises(UserError, match=r"model is a \w+Policy, expected a torch\.nn\.Module.*policy\.network"):
            call()
    one: Any = WindowBatch(*(torch.zeros(1, 2, 3) for _ in range(3)), torch.zeros(1, 2, dtype=torch.long), None)
    with pytest.raises(UserError, match=r"batches is a WindowBatch: expected an iterable.*\[batch\]"):
        eva.compute(policy.network, one)
    found = eva.compute(nn.Linear(4, 2), [torch.randn(8, 4)], rank=np.int64(2))  # type: ignore[arg-type]
    found.save(tmp_path / "eva")


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        self.batch_norm = nn.BatchNorm1d(4).eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if x.shape[0] == 1:
            raise RuntimeError("one sample")
        return self.batch_norm(self.dropout(y))


def test_everything_is_undone_when_the_forward_raises() -> None:
    model = Failing()
    model.layer.weight.requires_grad_(False)
    before = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    with pytest.raises(RuntimeError, match="one sample"):
        eva.compute(model, [torch.randn(8, 4), torch.randn(1, 4)], rank=2)
    after = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    assert after == before == [(True, 0, 0)] * 3 + [(False, 0, 0)]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", ["moments", "sketch", "svd"])
@pytest.mark.parametrize("value", [1.0, 0.1, 1234.5])
def test_centring_leaves_nothing_of_a_constant_input(method: str, value: float) -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant, self.varying = nn.Linear(60, 3), nn.Linear(60, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.varying(x) + self.constant(torch.full_like(x, value) * (1 + 1e-7 * x.sign()))

    g = torch.Generator().manual_seed(0)
    data = [torch.randn(37, 60, generator=g) for _ in range(3)]
    result = eva.compute(Beside(), data, rank=4, rho=2.0, center=True, method=method, tau=1.0)
    assert result.layers["constant"].rank == 0
    assert result.layers["constant"].explained_variance_ratio.max() == 0
    assert float(result.layers["varying"].explained_variance_ratio.sum()) <= 1 + 1e-6


@pytest.mark.parametrize("method", ["moments", "sketch", "svd"])
@pytest.mark.parametrize("center", [True, False])
def test_a_mean_far_from_zero_hides_no_variance(method: str, center: bool) -> None:
    g = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(60, 60, generator=g))[0] * torch.logspace(0, -2, 60)
    data = [torch.randn(200, 60, generator=g) @ mix.T + 3000 for _ in range(4)]
    found = eva.compute(nn.Linear(60, 2), data, rank=8, center=center, method=method, tau=1.0).layers[""]
    rows = torch.cat(data).double()
    truth = exact(torch.cat(data), center)
    spread = rows - rows.mean(0)
    captured = (spread @ found.components.double().T).square().sum()
    best = (spread @ truth.directions[:8].T).square().sum()
    assert captured > 0.98 * best


@pytest.fixture(scope="module")
def second_device() -> str:
    """PyTorch's lazy device, which computes on the CPU, and refuses to mix its tensors with the CPU's."""
    pytest.importorskip("torch._lazy.ts_backend").init()
    return "lazy"


@pytest.mark.parametrize("method", ["moments", "sketch"])
def test_a_model_spread_over_two_devices(method: Literal["moments", "sketch"], second_device: str) -> None:
    """The sums of one layer are on another device than those of the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with eva.listen(model, "all-linear", components=4, method=method) as statistics:
        for _ in range(3):
            model(torch.randn(16, 8))
    options = {"rank": 2, "rho": 2.0}
    expected = statistics.result(**options)
    for accumulator in statistics.groups[1].accumulators:
        for name, value in vars(accumulator).items():
            setattr(accumulator, name, value.to(second_device) if isinstance(value, Tensor) else value)
    assert {group.accumulators[0].linear.device.type for group in statistics.groups} == {"cpu", second_device}
    found = statistics.result(**options)
    assert found.ranks == expected.ranks
    for name, layer in expected.layers.items():
        torch.testing.assert_close(found.layers[name].components, layer.components)
    statistics.groups[1].accumulators[0].square += torch.inf
    with pytest.raises(UserError, match="layer '2'"):
        statistics.check_finite()


@pytest.fixture
def product_settings() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for settings in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        settings.fp32_precision = "none"


def product_precisions() -> list[str]:
    settings = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    return [each.fp32_precision for each in settings]


class Products(TorchFunctionMode):
    """Notes the precision at which float32 matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.matmul, Tensor.__matmul__, torch.matmul) and args[0].dtype is torch.float32:
            self.seen |= set(product_precisions()[1:])
        return func(*args, **kwargs or {})


WAYS: dict[str, Callable[[], object]] = {
    "old": lambda: torch.set_float32_matmul_precision("high"),
    "cuda": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "mkldnn": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("way", WAYS)
def test_products_are_float32_however_tf32_was_asked_for(way: str, product_settings: None) -> None:
    """By PyTorch's old setting, which cannot be read once a new one is set, or by a new one; each stays as it was."""
    WAYS[way]()
    before = product_precisions()
    assert set(before) & {"tf32", "bf16"}
    with Products() as products:
        eva.compute(nn.Sequential(nn.Linear(8, 8)), [torch.randn(16, 8) for _ in range(2)], targets="all-linear")
    assert products.seen
    assert products.seen <= {"ieee", "none"}
    assert product_precisions() == before
    if way == "old":
        assert torch.get_float32_matmul_precision() == "high"
    if way == "all":
        torch.backends.fp32_precision = "ieee"
        assert product_precisions() == ["ieee"] * 3, "the settings for products follow it as before"


def test_reasons_for_silence() -> None:
    attention, x = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), torch.randn(3, 4, 8)
    with pytest.raises(UserError, match=r"out_proj'\. It belongs to torch\.nn\.MultiheadAttention.*linear1"):
        eva.compute(attention, [x], targets=["out_proj", "linear1"], rank=2)
    with pytest.raises(UserError, match=r"MultiheadAttention, which reads the weight"):
        eva.compute(attention, [x], targets=["out_proj"], rank=2)
    model = Unused()
    with pytest.raises(UserError, match=r"the model ran 2 times without calling 'idle'"):
        eva.compute(model, [torch.randn(8, 4)] * 2, targets=["idle"], rank=2)
    copied = copy.deepcopy(model)
    with pytest.raises(UserError, match=r"2 batches were taken, but forward= ran another model.*not a copy of it"):
        eva.compute(model, [torch.randn(8, 4)] * 2, forward=lambda _, batch: copied(batch), rank=2)
    with eva.listen(model) as statistics:
        copied(torch.randn(8, 4))
    with pytest.raises(UserError, match="run this very model, not a copy"):
        statistics.result(rank=2)


@pytest.mark.parametrize("batches", [torch.randn(8, 4), np.zeros((8, 4), np.float32), {"x": torch.randn(8, 4)}])
def test_one_batch_is_not_taken_for_many(batches: Any) -> None:
    """Its rows were: directions came from sixteen of them."""
    with pytest.raises(UserError, match=r"expected an iterable of batches. Give \[batch\]"):
        eva.compute(nn.Linear(4, 3), batches, targets="all-linear", rank=2)


def test_a_batch_that_the_model_does_not_take_needs_a_forward() -> None:
    batches = [(torch.randn(8, 4), torch.zeros(8))]
    with pytest.raises(
        UserError, match=r"did not take a batch, a tuple: .*forward=lambda model, batch: model\(batch\[0\]\)"
    ):
        eva.compute(nn.Linear(4, 3), batches, targets="all-linear", rank=2)
    found = eva.compute(
        nn.Linear(4, 3), batches, targets="all-linear", rank=2, forward=lambda model, batch: model(batch[0])
    )
    assert found.layers[""].rows == 8
