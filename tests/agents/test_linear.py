"""Products of linear layers on the faster library of the processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from eva_rl.agents import linear as products
from eva_rl.agents.linear import Linear, linear, product

ROWS, INPUTS, OUTPUTS = 512, 64, 96
assert ROWS * INPUTS * OUTPUTS > products.SMALLEST


@pytest.fixture(autouse=True)
def on_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where oneDNN is the faster library, whichever this one is."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(products, "_is_faster", lambda: True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def strided(rows: int, columns: int) -> Tensor:
    """Every other column, so that neither the matrix nor its transpose lies in memory without gaps."""
    return draw(rows, 2 * columns)[:, ::2]


@pytest.mark.parametrize("rows", [1, 3, ROWS])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_pytorchs(rows: int, bias: bool) -> None:
    x, weight = draw(rows, 2, INPUTS), draw(OUTPUTS, INPUTS, seed=1)
    b = draw(OUTPUTS, seed=2) if bias else None
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    torch.testing.assert_close(linear(x, weight, b).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("first", [draw(ROWS, INPUTS), draw(INPUTS, ROWS).mT, strided(ROWS, INPUTS)])
@pytest.mark.parametrize("second", [draw(INPUTS, OUTPUTS), draw(OUTPUTS, INPUTS).mT, strided(INPUTS, OUTPUTS)])
def test_any_layout_gives_the_same_product(first: Tensor, second: Tensor) -> None:
    expected = first.double() @ second.double()
    torch.testing.assert_close(product(first, second).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("frozen", ["nothing", "weight", "input"])
def test_gradients_are_those_of_pytorchs_layer(frozen: str) -> None:
    ours = Linear(INPUTS, OUTPUTS)
    theirs = nn.Linear(INPUTS, OUTPUTS)
    theirs.load_state_dict(ours.state_dict())
    gradients = []
    for layer in (ours, theirs):
        layer.weight.requires_grad_(frozen != "weight")
        x = draw(8, ROWS // 8, INPUTS).requires_grad_(frozen != "input")
        y = layer(x[:, 1:])  # the inputs of a decision transformer's last block are a part of its tokens
        (y * draw(*y.shape, seed=3)).sum().backward()
        gradients.append((y, x.grad, layer.weight.grad, layer.bias.grad))
    for mine, expected in zip(*gradients, strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-3)


def test_gradients_of_gradients_are_pytorchs() -> None:
    layer, x = Linear(INPUTS, OUTPUTS), draw(ROWS, INPUTS)
    found = []
    for apply in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        (first,) = torch.autograd.grad(apply(x).tanh().sum(), layer.weight, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), layer.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-2)


def test_a_product_of_parameters_keeps_its_gradient() -> None:
    weight = draw(OUTPUTS, INPUTS).requires_grad_()
    assert linear(draw(ROWS, INPUTS), weight).requires_grad
    assert product(draw(ROWS, OUTPUTS), weight).requires_grad


def test_torch_func_can_map_over_the_layer() -> None:
    layer, x = Linear(INPUTS, OUTPUTS), draw(3, ROWS, INPUTS)
    mapped = torch.func.vmap(lambda one: torch.func.functional_call(layer, dict(layer.named_parameters()), one))(x)
    torch.testing.assert_close(mapped, layer(x), rtol=1e-4, atol=1e-4)


def test_other_precisions_are_left_to_pytorch() -> None:
    layer, x = Linear(INPUTS, OUTPUTS), draw(ROWS, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert layer.double()(x.double()).dtype is torch.float64


def test_onednn_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError("oneDNN was called")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", fail)
    x, weight = draw(ROWS, INPUTS), draw(OUTPUTS, INPUTS)
    with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[no-untyped-call]
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    with pytest.raises(AssertionError, match="oneDNN was called"):
        linear(x, weight)


@pytest.mark.parametrize(("capability", "vendor", "expected"), [
    ("AVX512", "AuthenticAMD", True),
    ("AVX512", "GenuineIntel", False),
    ("AVX2", "AuthenticAMD", False),
])  # fmt: skip
def test_only_where_mkl_leaves_avx512_unused(
    capability: str, vendor: str, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nvendor_id : {vendor}\n")
    monkeypatch.setattr(products, "CPU_INFO", info)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    products._is_faster.cache_clear()
    assert products._is_faster() is expected
    products._is_faster.cache_clear()
