"""The same rows on 1, 2 and 4 processes; processes with unequal numbers of batches; errors that reach everyone."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from eva_rl import eva
from eva_rl.errors import UserError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 3))


def batches(count: int = 8) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(30, 20, generator=g) * torch.logspace(0, -1, 20) + 1 for _ in range(count)]


TIMEOUT = timedelta(seconds=60)


def worker(rank: int, world: int, folder: str, shares: list[list[int]], options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=TIMEOUT)
    if "taus" in options:
        options = {"tau": options["taus"][rank]}
    data = batches()
    try:
        mine = [data[i] if i >= 0 else torch.full((4, 20), torch.nan) for i in shares[rank]]
        result = eva.compute(model(), mine, rank=4, rho=2.0, **options)
        outcome: Any = {"state": result.state_dict(), "stopped": result.stopped, "rows": result.rows}
        outcome["ratios"] = {name: layer.explained_variance_ratio for name, layer in result.layers.items()}
    except UserError as error:
        outcome = str(error)
    torch.save(outcome, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(folder: Path, shares: list[list[int]], **options: Any) -> list[Any]:
    folder.mkdir()
    mp.spawn(worker, (len(shares), str(folder), shares, options), nprocs=len(shares))
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(shares))]


@pytest.mark.slow
@pytest.mark.parametrize("shares", [[[0, 2, 4, 6], [1, 3, 5, 7]], [[0], [1, 2, 3], [], [4, 5, 6, 7]]], ids=["2", "4"])
def test_processes_together_find_what_one_finds(tmp_path: Path, shares: list[list[int]]) -> None:
    compare(tmp_path, shares)


def compare(folder: Path, shares: list[list[int]]) -> None:
    alone = eva.compute(model(), batches(), rank=4, rho=2.0, tau=1.0)
    together = run(folder / "together", shares, tau=1.0)
    for outcome in together:
        assert (outcome["stopped"], outcome["rows"]) == ("data exhausted", alone.rows)
        for name, layer in alone.layers.items():
            torch.testing.assert_close(outcome["state"][name], layer.components, atol=1e-5, rtol=0)
            torch.testing.assert_close(outcome["ratios"][name], layer.explained_variance_ratio, atol=1e-5, rtol=1e-5)
            assert torch.equal(outcome["state"][name], together[0]["state"][name])


@pytest.mark.slow
def test_two_processes_with_unequal_shares_find_what_one_finds(tmp_path: Path) -> None:
    compare(tmp_path, [[0, 2, 4, 6, 1], [3, 5, 7]])


@pytest.mark.slow
def test_an_early_end_is_common(tmp_path: Path) -> None:
    outcomes = run(tmp_path / "end", [[0, 1, 2, 3], [4, 5, 6, 7]], tau=0.5)
    assert [outcome["stopped"] for outcome in outcomes] == ["converged"] * 2
    assert {outcome["rows"] for outcome in outcomes} == {120}


@pytest.mark.slow
def test_one_process_alone_does_not_end(tmp_path: Path) -> None:
    """Near tau one may find the halves to agree and another not; here they do by another tau."""
    outcomes = run(tmp_path / "end", [[0, 1, 2, 3], [4, 5, 6, 7]], taus=[0.5, 0.99999])
    assert [outcome["stopped"] for outcome in outcomes] == ["data exhausted"] * 2
    assert {outcome["rows"] for outcome in outcomes} == {240}


@pytest.mark.slow
def test_an_error_reaches_everyone(tmp_path: Path) -> None:
    first, second = run(tmp_path / "error", [[0, 1, 2], [3, -1, 4]])
    assert "Another process failed" in first
    assert "NaN" in second
