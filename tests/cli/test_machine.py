"""The machine: its device, what it is recorded as, and what a run costs on it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from eva_rl.cli.machine import choose_device, versions
from eva_rl.cli.profiling import Phases, peak_memory
from eva_rl.distributed import ProcessGroup, is_torchrun, local_rank, local_world_size
from eva_rl.errors import UserError
from eva_rl.files import read_json, write_json


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_a_device_that_is_there(name: str) -> None:
    assert choose_device(name).type == ("cuda" if name == "auto" and torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_device(name)
    assert str(caught.value).startswith(f"device={name}: ")
    assert str(caught.value).endswith("Use device=auto, cpu or cuda.")
    assert "\n" not in str(caught.value)


def test_versions_name_what_a_result_depends_on() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__
    assert re.fullmatch(r"3\.\d+\.\d+.*", found["python"])
    assert re.search(r"\d+ CPUs?$", found["machine"])
    assert all(found.values())


def test_memory_counts_what_a_block_adds() -> None:
    with peak_memory(torch.device("cpu")) as small:
        pass
    with peak_memory(torch.device("cpu")) as large:
        array = np.ones(20_000_000)
        del array
    if "peak_memory_bytes" not in large:
        pytest.skip("the system does not say")
    assert 150e6 < large["peak_memory_bytes"] < 400e6, "the peak, although it is free again"
    assert small["peak_memory_bytes"] < 50e6


def test_phases_add_up() -> None:
    began, phases = time.perf_counter(), Phases()
    for name in ("data", "train", "data"):
        time.sleep(0.01)
        phases.end(name)
    assert list(phases.seconds) == ["data", "train"]
    assert phases.seconds["data"] >= 0.02
    assert sum(phases.seconds.values()) <= time.perf_counter() - began


def test_phases_of_several_processes_add_up(tmp_path: Path) -> None:
    """A run that goes on counts what it builds on; one that starts afresh, or after damage, counts from nothing."""
    file = tmp_path / "phases.json"
    write_json(file, {"seconds": {"data": 10.0, "clone": 20.0}, "wall_time": 1000.0})
    phases = Phases({"data": 1.0})
    phases.keep(file, "train", 1007.0)
    assert phases.seconds == {"data": 11.0, "clone": 20.0, "train": 7.0}
    again = Phases()
    again.keep(file, "train", 1007.0)
    assert again.seconds == phases.seconds, "nothing of the process in between was built on"
    again.end("train")
    assert read_json(file)["seconds"] == again.seconds
    for text, interrupted in (("{", "train"), (file.read_text(), "")):
        file.write_text(text)
        afresh = Phases()
        afresh.keep(file, interrupted)
        assert afresh.seconds == {}


@pytest.mark.parametrize("total", [0, 1, 5, 100])
@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_shards_are_whole_and_even(total: int, world_size: int) -> None:
    groups = [ProcessGroup(rank, world_size) for rank in range(world_size)]
    items = [item for group in groups for item in range(total)[group.shard(total)]]
    counts = [group.local_count(total) for group in groups]
    assert items == list(range(total))
    assert sum(counts) == total
    assert max(counts) - min(counts) <= 1
    assert [group.is_main for group in groups] == [True] + [False] * (world_size - 1)


def test_a_single_process_is_a_group_of_its_own() -> None:
    group, tensor = ProcessGroup.current(), torch.arange(3.0)
    assert (group.rank, group.world_size) == (0, 1)
    assert group.all_reduce_sum(tensor) is tensor
    assert group.broadcast_tensor(tensor) is tensor
    assert group.any(True, False) == [True, False]
    assert group.all_gather_object("x") == ["x"]
    assert group.broadcast_object(lambda: 5) == 5
    assert group.all_reduce_gradients([], tensor[1]) == 1
    with group.main_process_first():
        pass


def test_torchruns_variables_decide_who_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_RANK": "1"}
    for name, value in reversed(values.items()):
        assert (is_torchrun(), local_rank(), local_world_size()) == (False, 0, 1)
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (is_torchrun(), local_rank(), local_world_size()) == (True, 1, 2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert (is_torchrun(), local_rank(), local_world_size()) == (False, 0, 1)
