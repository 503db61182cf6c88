"""Redistribution, scale, variants and the report."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eva_rl import eva
from eva_rl.errors import UserError
from eva_rl.eva.redistribution import distribute, scores


class Three(nn.Module):
    """One wide layer with two strong directions, one with a flat spectrum, one that is two wide."""

    def __init__(self) -> None:
        super().__init__()
        self.steep, self.flat, self.narrow = nn.Linear(20, 5), nn.Linear(20, 6), nn.Linear(2, 7)

    def forward(self, x: Tensor) -> Tensor:
        steep = x * torch.logspace(0, -4, 20)
        return self.steep(steep).sum() + self.flat(x).sum() + self.narrow(x[:, :2].clone()).sum()


def data(count: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(200, 20, generator=g) for _ in range(count)]


def test_rho_one_keeps_ranks_uniform_but_for_narrow_layers() -> None:
    result = eva.compute(Three(), data(), rank=4)
    assert result.ranks == {"steep": 4, "flat": 4, "narrow": 2}
    assert result.alphas == {"steep": 4.0, "flat": 4.0, "narrow": 2.0}
    assert result.trainable_parameters == 4 * 25 + 4 * 26 + 2 * 9


@pytest.mark.parametrize("score", ["ratio", "paper"])
def test_budget_goes_to_the_best_components(score: str) -> None:
    result = eva.compute(Three(), data(), rank=3, rho=2.0, score=score, alpha=6.0, tau=1.0)
    everything = []
    for name, layer in result.layers.items():
        variances = layer.singular_values.square()
        divisor = variances.sum() / layer.explained_variance_ratio.sum() if score == "ratio" else None
        paper = (layer.rows - 1) * layer.singular_values.sum()
        everything += [(float(v), name) for v in variances / (paper if divisor is None else divisor)]
    best = [name for _, name in sorted(everything, reverse=True)[:9]]
    assert {name: layer.rank for name, layer in result.layers.items()} == {n: best.count(n) for n in result.layers}
    assert sum(result.ranks.values()) == result.budget == 9
    assert {layer.lora_alpha / layer.rank for layer in result.layers.values() if layer.rank} == {2.0}


def test_scores_are_the_two_formulas() -> None:
    sigma = np.array([3.0, 2.0, 1.0])
    np.testing.assert_allclose(scores(sigma**2, 20.0, 11, "ratio"), [9 / 20, 4 / 20, 1 / 20])
    np.testing.assert_allclose(scores(sigma**2, 20.0, 11, "paper"), [9 / 60, 4 / 60, 1 / 60])


def test_rank_zero_drops_a_layer() -> None:
    result = eva.compute(Three(), data(), targets=["steep", "flat"], rank=1, rho=2.0, keep_scale=False, tau=1.0)
    assert result.ranks == {"steep": 2}
    assert result.alphas == {"steep": 1.0}
    assert result.layers["flat"].components.shape == (0, 20)
    assert result.state_dict("base_model.model.")["base_model.model.flat"].shape == (0, 20)


def test_layers_that_share_an_input_stand_each_for_themselves() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o = nn.Linear(20, 4), nn.Linear(20, 4), nn.Linear(20, 4)

        def forward(self, x: Tensor) -> Tensor:
            steep = x * torch.logspace(0, -4, 20)
            return self.q(steep) + self.k(steep) + self.o(x)

    result = eva.compute(Shared(), data(), rank=2, rho=2.0, tau=1.0)
    assert result.layers["q"].input_group == result.layers["k"].input_group
    assert result.ranks == {"q": 3, "k": 3}  # two copies of each steep direction, out of 3 * 2
    assert torch.equal(result.layers["q"].components, result.layers["k"].components)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text("abc", min_size=1), st.lists(st.floats(0, 1), max_size=6), max_size=6), st.integers(0, 40)
)
def test_distribution_takes_the_best(candidates: dict[str, list[float]], budget: int) -> None:
    candidates = {name: sorted(values, reverse=True) for name, values in candidates.items()}
    ranks = distribute(candidates, budget)
    everything = sorted((value for values in candidates.values() for value in values), reverse=True)
    assert sum(ranks.values()) == min(budget, len(everything))
    taken = sorted((v for name, rank in ranks.items() for v in candidates[name][:rank]), reverse=True)
    assert taken == everything[: len(taken)]


def test_variants() -> None:
    def compute(variant: str | None, seed: int = 0) -> eva.LayerResult:
        return eva.compute(Three(), data(), targets=["steep"], rank=4, variant=variant, seed=seed, tau=1.0).layers[
            "steep"
        ]

    plain, rows = compute(None).components, torch.cat(data()) * torch.logspace(0, -4, 20)
    rotated, permuted = compute("rotate").components, compute("permute").components
    span = plain.T @ plain
    torch.testing.assert_close(rotated.T @ rotated, span, atol=1e-5, rtol=0)
    assert (rotated - plain).abs().max() > 0.1
    assert not torch.equal(rotated, compute("rotate", seed=1).components)
    assert {tuple(row) for row in permuted.tolist()} == {tuple(row) for row in plain.tolist()}
    whitened = rows @ compute("whiten").components.T
    torch.testing.assert_close(whitened.square().mean(0), torch.ones(4), atol=0.01, rtol=0)
    minor = compute("minor").components
    torch.testing.assert_close((minor @ plain.T).abs().max(), torch.tensor(0.0), atol=1e-4, rtol=0)
    assert (rows @ minor.T).square().sum() < 1e-6 * rows.square().sum()
    with pytest.raises(UserError, match='Use method="moments"'):
        eva.compute(Three(), data(), targets=["steep"], rank=4, variant="minor", method="sketch")


def test_report_and_round_trip(tmp_path: Path) -> None:
    result = eva.compute(Three(), data(1), rank=3, rho=2.0)
    report = json.loads(json.dumps(result.to_report(), allow_nan=False))
    assert report["stopped"] == "data exhausted"
    assert report["layers"]["steep"]["width"] == 20
    assert len(report["layers"]["steep"]["explained_variance_ratio"]) == 6
    result.save(tmp_path / "eva")
    again = eva.EvaResult.load(tmp_path / "eva")
    assert again.options == result.options
    assert again.to_report() == result.to_report()
    assert all(torch.equal(again.layers[n].components, layer.components) for n, layer in result.layers.items())
    with pytest.raises(UserError, match="does not exist"):
        eva.EvaResult.load(tmp_path / "other")


class Names(nn.Module):
    """`proj` inside `block.proj`, and a name that fits another one's if its dot may be any letter."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.xproj = nn.Linear(20, 5), nn.Linear(20, 5)
        self.block = nn.ModuleDict({"proj": nn.Linear(20, 5), "h": nn.ModuleDict({"1": nn.Linear(20, 5)})})
        self.blockxproj = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x * torch.logspace(0, -3, 20)) + self.block["proj"](x) + self.block["h"]["1"](x * x)
        return y + self.xproj(x * torch.logspace(0, -0.5, 20)) + self.blockxproj(x * torch.logspace(0, -1, 20))


@pytest.mark.parametrize("compiled", [False, True])
def test_patterns_match_one_layer_each_in_plain_peft(compiled: bool) -> None:
    model = Names()
    seen = torch.compile(model, backend="eager") if compiled else model
    result = eva.compute(seen, data(), rank=4, rho=4.0, alpha=8.0, tau=1.0)
    assert len(set(result.ranks.values())) > 2
    for targets in (result.target_modules, list(result.ranks)):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
        config.rank_pattern, config.alpha_pattern = result.rank_pattern, result.alpha_pattern
        peft = get_peft_model(copy.deepcopy(model), config)
        found = {n: m for n, m in peft.get_base_model().named_modules() if hasattr(m, "lora_A") and n in result.ranks}
        assert {name: module.r["default"] for name, module in found.items()} == result.ranks
        assert {name: module.scaling["default"] for name, module in found.items()} == dict.fromkeys(result.ranks, 2.0)
    only = eva.compute(seen, data(), targets=["proj"], rank=4)
    alone = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="proj"))
    assert [name for name, module in alone.named_modules() if hasattr(module, "lora_A")] == ["base_model.model.proj"]
    assert set(only.ranks) == {"proj", "block.proj"}


def test_results_whose_names_differ_after_a_dot_are_two_files(tmp_path: Path) -> None:
    first, second = (eva.compute(Three(), data(1), rank=3, rho=rho) for rho in (1.5, 1.25))
    first.save(tmp_path / "push_rho1.5")
    second.save(str(tmp_path / "push_rho1.25"))
    assert {path.name for path in tmp_path.iterdir()} == {
        f"push_rho{rho}.{ending}" for rho in ("1.5", "1.25") for ending in ("json", "safetensors")
    }
    assert eva.EvaResult.load(tmp_path / "push_rho1.5").options.rho == 1.5
    assert eva.EvaResult.load(tmp_path / "push_rho1.25.safetensors").options.rho == 1.25


@pytest.mark.parametrize("method", ["moments", "sketch", "svd"])
def test_no_direction_is_found_that_the_data_lack(method: Literal["moments", "sketch", "svd"]) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 600, generator=generator)
    data = [torch.randn(256, 3, generator=generator) @ mixing for _ in range(4)]
    few = [torch.randn(2, 600, generator=generator) for _ in range(2)]
    model = nn.Sequential(nn.Linear(600, 8))
    for batches, expected in ((data, 3), (few, 4)):
        found = eva.compute(model, batches, targets=["0"], rank=8, method=method, variant="whiten", tau=1)
        assert found.layers["0"].rank == expected
