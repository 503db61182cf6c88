"""Which layers share an input, and sums fed by whatever runs the model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eva_rl import eva
from eva_rl.errors import UserError
from tests.eva.reference import assert_matches, exact


class Attention(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x) + self.k(x) * self.v(x)))


class Tricky(nn.Module):
    """Views, copies, in-place changes, short-lived tensors and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.view, self.copy, self.changed, self.twice, self.once = (nn.Linear(6, 6) for _ in range(6))
        self.chain = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.view(x.view(x.shape)) + self.copy(x.clone())
        z = self.once(x) + self.twice(x) + self.twice(y)
        for layer in self.chain:  # each input may take the memory of the one before
            z = layer(torch.tanh(z))
        x = x.clone()
        w = self.changed(x)
        x.mul_(2)
        return z + w


def groups(result: eva.EvaResult) -> list[set[str]]:
    found: dict[int, set[str]] = {}
    for name, layer in result.layers.items():
        found.setdefault(layer.input_group, set()).add(name)
    return sorted(found.values(), key=sorted)


def test_shared_input_has_one_accumulator() -> None:
    model = Attention()
    with torch.no_grad(), eva.listen(model) as statistics:
        model(torch.randn(5, 8))
        model(torch.randn(5, 8))
    assert len(statistics.groups) == 2
    result = statistics.result(rank=2)
    assert groups(result) == [{"k", "q", "v"}, {"o"}]
    assert torch.equal(result.layers["q"].components, result.layers["v"].components)


def test_equal_values_are_not_an_equal_input_but_views_are() -> None:
    torch.manual_seed(0)
    model = Tricky()
    result = eva.compute(model, [torch.randn(9, 6) for _ in range(3)], rank=2, tau=1.0)
    assert {"a", "view", "once"} in groups(result)
    assert {"copy"} in groups(result)
    assert {"changed"} in groups(result)
    assert {"twice"} in groups(result)
    assert sum(len(group) == 1 for group in groups(result)) == 11


def test_layer_called_twice_counts_both_calls() -> None:
    torch.manual_seed(0)
    model = Tricky().eval()
    data = [torch.randn(9, 6) for _ in range(4)]
    rows: list[Tensor] = []
    handle = model.twice.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    with torch.no_grad():
        for x in data:
            model(x)
    handle.remove()
    result = eva.compute(model, data, targets=["twice", "once"], rank=4, tau=1.0)
    assert result.layers["twice"].rows == 2 * result.layers["once"].rows == 72
    assert_matches(result.layers["twice"], exact(torch.cat(rows), False))
    assert_matches(result.layers["once"], exact(torch.cat(data), False))


def test_listening_hears_what_compute_hears() -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    data = [torch.randn(6, 4, 8) for _ in range(4)]
    masks = [torch.rand(6, 4) > 0.3 for _ in data]
    with eva.listen(model) as statistics:
        for x, mask in zip(data[:2], masks, strict=False):
            with statistics.masked(mask), torch.inference_mode():
                model(x)
        for x, mask in zip(data[2:], masks[2:], strict=True):
            statistics.mask = mask
            model(x)  # with gradients on
            statistics.mask = None
    heard = statistics.result(rank=3)
    by_id = {id(x): mask for x, mask in zip(data, masks, strict=True)}
    computed = eva.compute(model, data, rank=3, tau=1.0, mask=lambda x: by_id[id(x)])
    assert heard.stopped == "listening ended"
    assert heard.batches == 4
    for name in heard.layers:
        torch.testing.assert_close(heard.layers[name].components, computed.layers[name].components)
        torch.testing.assert_close(heard.layers[name].singular_values, computed.layers[name].singular_values)


def test_parts_of_a_model_can_be_called_without_it() -> None:
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    data = [torch.randn(7, 4) for _ in range(3)]
    with torch.no_grad(), eva.listen(model) as statistics:
        for x in data:
            model["two"](model["one"](x))
    result = statistics.result(rank=2)
    assert result.batches == 3
    assert_matches(result.layers["one"], exact(torch.cat(data), False))


def test_sources_add_up() -> None:
    torch.manual_seed(0)
    model = Attention()
    offline, online = [torch.randn(6, 8) for _ in range(2)], [torch.randn(1, 8) * 3 for _ in range(20)]
    with torch.no_grad(), eva.listen(model, ["q"]) as statistics:
        for x in offline + online:
            model(x)
    assert_matches(statistics.result(rank=4).layers["q"], exact(torch.cat(offline + online), False))


def test_few_rows_at_a_time_refine_the_sketch_as_well() -> None:
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(300, 2)
    mix = torch.randn(300, 300, generator=g) * torch.logspace(0, -2, 300)
    data = [torch.randn(2, 300, generator=g) @ mix.T for _ in range(500)]
    with torch.no_grad(), eva.listen(layer, components=8, method="sketch") as statistics:
        for x in data:
            layer(x)
    found = statistics.result(rank=8).layers[""].components.double()
    truth = exact(torch.cat(data), False)
    captured = (torch.cat(data).double() @ found.T).square().sum() / truth.sigma[:8].square().sum()
    assert captured > 0.99


def test_layers_that_stop_sharing_are_refused() -> None:
    class Splits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, split: bool) -> Tensor:
            return self.a(x) + self.b(x.clone() if split else x)

    with pytest.raises(
        UserError, match="'a' and 'b' received one tensor in the first forward and different ones later"
    ):
        eva.compute(Splits(), [(torch.randn(4, 4), False), (torch.randn(4, 4), True)], rank=2)


def test_more_components_than_the_sketch_holds_are_refused() -> None:
    layer = nn.Linear(40, 2)
    with torch.no_grad(), eva.listen(layer, components=4, method="sketch") as statistics:
        layer(torch.randn(50, 40))
    with pytest.raises(UserError, match="components=8 or more"):
        statistics.result(rank=8)


class Residual(nn.Module):
    """`h += f(h)`, as models do that save memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = x.clone()
        h += self.a(h)
        h += self.b(h)
        return self.c(h) + self.c(h)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_that_changed_in_place_is_another_input(mode: Callable[[], AbstractContextManager[None]]) -> None:
    torch.manual_seed(0)
    model, data = Residual(), [torch.randn(9, 6) for _ in range(3)]
    rows: list[Tensor] = []
    handle = model.b.register_forward_pre_hook(lambda _, args: rows.append(args[0].clone()))
    with mode(), eva.listen(model) as statistics:
        for x in data:
            model(x)
    handle.remove()
    result = statistics.result(rank=3)
    assert groups(result) == [{"a"}, {"b"}, {"c"}]
    assert result.layers["c"].rows == 2 * 27
    assert_matches(result.layers["b"], exact(torch.cat(rows), False))


@pytest.mark.parametrize("change", [lambda h: h.data.add_(1), lambda h: h.numpy().__iadd__(1)])
def test_changes_that_torch_does_not_count_are_seen(change: Callable[[Tensor], object]) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            change(x)
            return self.b(x) + y

    assert groups(eva.compute(Hidden(), [torch.randn(9, 6) for _ in range(2)], rank=2)) == [{"a"}, {"b"}]


def test_transforms_of_torch_func_are_refused() -> None:
    layer = nn.Linear(6, 6)
    with eva.listen(layer), pytest.raises(UserError, match=r"torch\.func \(vmap, grad"):
        torch.func.vmap(layer)(torch.randn(7, 6))


def test_inputs_stay_shared_in_inference_mode_until_one_changes() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, change: bool) -> Tensor:
            h = x.clone()
            y = self.a(h)
            if change:
                h += y
            return self.b(h) + y

    with torch.inference_mode(), eva.listen(Late()) as statistics:
        statistics.model(torch.randn(5, 6), False)
        statistics.model(torch.randn(5, 6), False)
        assert groups(statistics.result(rank=2)) == [{"a", "b"}]
        with pytest.raises(UserError, match="'a' and 'b' received one tensor in the first forward"):
            statistics.model(torch.randn(5, 6), True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_forwards_count_once_and_with_their_mask(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.twice = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda h: self.twice(torch.tanh(self.inner(h))), x, use_reentrant=reentrant)

    torch.manual_seed(0)
    model, mask = Checkpointed(), torch.arange(5) < torch.arange(1, 5)[:, None]
    data = [torch.randn(4, 5, 6, requires_grad=True) for _ in range(3)]
    with eva.listen(model) as statistics:
        for x in data:
            with statistics.masked(mask):
                loss = model(x).square().sum()
            loss.backward()
    assert all(p.grad is not None for p in model.parameters()), "the layers were run again for their gradients"
    result = statistics.result(rank=3)
    assert statistics.batches == 3
    assert [layer.rows for layer in result.layers.values()] == [30, 30]
    assert_matches(result.layers["inner"], exact(torch.cat([x.detach()[mask] for x in data]), False))


@pytest.mark.parametrize("given", [True, False])
def test_nested_tensors_of_torchs_encoder_hold_the_rows_that_count(given: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model, plain = nn.TransformerEncoder(layer, 2).eval(), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    plain.load_state_dict(model.state_dict())
    x, mask = torch.randn(5, 7, 8), torch.arange(7) < torch.tensor([7, 3, 5, 1, 4])[:, None]
    run = lambda model, batch: model(batch, src_key_padding_mask=~mask)  # noqa: E731
    masks = {"mask": lambda batch: mask} if given else {}
    nested = eva.compute(model, [x], forward=run, targets=["linear1", "linear2"], rank=4, **masks)
    padded = eva.compute(plain, [x], forward=run, targets=["linear1", "linear2"], rank=4, mask=lambda batch: mask)
    for name, found in nested.layers.items():
        assert found.rows == padded.layers[name].rows == 20
        torch.testing.assert_close(found.singular_values, padded.layers[name].singular_values, rtol=1e-4, atol=1e-4)
    if given:
        with pytest.raises(UserError, match=r"nested tensor of 5 samples.*enable_nested_tensor=False"):
            eva.compute(model, [x], forward=run, targets=["linear1"], mask=lambda batch: ~mask)


def compiled(model: nn.Module) -> nn.Module:
    whole = torch.compile(model, backend="eager")
    whole(torch.randn(4, 6))  # hooks registered from here on are ignored by the compiled code
    return whole


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    model(torch.randn(4, 6))
    return model


def compiled_inside(model: nn.Module) -> nn.Module:
    return nn.Sequential(compiled(model))


def parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


@pytest.mark.parametrize("wrap", [compiled, compiled_in_place, compiled_inside, parallel])
def test_wrapped_models_are_heard_under_the_names_of_the_model_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    plain, data = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), [torch.randn(8, 6) for _ in range(2)]
    expected = eva.compute(plain, data, rank=2)
    result = eva.compute(wrap(plain), data, targets=["0.0" if wrap is compiled_inside else "0", "2"], rank=2)
    prefix = "0." if wrap is compiled_inside else ""
    assert list(result.layers) == [prefix + "0", prefix + "2"]
    for name, layer in expected.layers.items():
        torch.testing.assert_close(result.layers[prefix + name].components, layer.components)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (nn.Linear(8, 2), "text", "given a str, expected a tensor"),
        (nn.Linear(8, 2, device="meta"), torch.zeros(5, 8), "given a meta tensor"),
        (nn.Linear(8, 2, dtype=torch.complex64), torch.zeros(5, 8, dtype=torch.complex64), "given a complex tensor"),
        (nn.Linear(8, 2), torch.eye(8).to_sparse(), "given a sparse tensor"),
    ],
)
def test_inputs_that_are_no_numbers_in_memory_are_refused(model: nn.Module, batch: object, message: str) -> None:
    """A complex input lost its imaginary part; the others ended in tracebacks."""
    with pytest.raises(UserError, match=message):
        eva.compute(model, [batch, batch], rank=2)


def test_models_whose_layers_are_hidden_are_told_from_models_without() -> None:
    layer = nn.Sequential(nn.Linear(8, 2))
    quantised = torch.ao.quantization.quantize_dynamic(layer)
    for model, message in [
        (torch.jit.script(layer), r"torch\.jit"),
        (quantised, "quantised"),
        (nn.ReLU(), "no torch.nn"),
    ]:
        with pytest.raises(UserError, match=message):
            eva.compute(model, [torch.zeros(5, 8)], rank=2)
