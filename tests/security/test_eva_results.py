"""Damaged and hostile results of EVA load as what they were, or are refused in words."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from eva_rl import eva
from eva_rl.errors import UserError
from tests.conftest import unseal
from tests.security.making import leaves, put, reseal
from tests.security.test_policies import ODD


def described(path: Path) -> str:
    found = eva.EvaResult.load(path)
    return repr((found.to_report(), [layer.components.tolist() for layer in found.layers.values()]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    folder = tmp_path_factory.mktemp("result")
    eva.compute(model, [torch.randn(20, 5) for _ in range(2)], rank=2).save(folder / "eva")
    return folder, described(folder / "eva")


def same_or_refused(folder: Path, expected: str) -> None:
    """It is what it was, or a UserError says in one line that it is not."""
    refusal = "refused"
    try:
        assert described(folder / "eva") == expected
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_is_never_silent(saved: tuple[Path, str], tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved[0], folder)
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    way = data.draw(st.sampled_from(["flip", "cut", "insert", "empty", "delete", "folder", "pipe"]))
    if way == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif way == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    else:
        content = content[:at] if way == "cut" else bytearray()
    file.write_bytes(content)
    if way in {"delete", "folder", "pipe"}:
        file.unlink()
    if way == "folder":
        file.mkdir()
    if way == "pipe":
        os.mkfifo(file)
    same_or_refused(folder, saved[1])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_report_sealed_again_is_read_or_refused(saved: tuple[Path, str], tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved[0], folder)
    kept = {k: v for k, v in json.loads((folder / "eva.json").read_text()).items() if k not in {"files", "sha256"}}
    path, value = data.draw(st.sampled_from(list(leaves(kept)))), data.draw(st.sampled_from(ODD))
    reseal(folder / "eva.json", lambda record: put(record, path, value))
    refusal = "refused"
    try:
        eva.EvaResult.load(folder / "eva")
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t * float("nan"), "is not finite"),
        (lambda t: t.double(), "is torch.float64"),
        (lambda t: t[:1], r"of shape \(1, \d\); expected torch.float32 of shape \(2, \d\)"),
        (lambda t: t[:, :1].clone(), r"of shape \(2, 1\)"),
        (None, "is missing"),
    ],
)
def test_components_are_what_the_report_says(
    saved: tuple[Path, str], tmp_path: Path, change: Any, message: str
) -> None:
    """Also where nothing has a digest, as it was written before."""
    shutil.copytree(saved[0], tmp_path / "r")
    weights = load_file(tmp_path / "r/eva.safetensors")
    name = next(iter(weights))
    value = weights.pop(name)
    save_file(weights if change is None else weights | {name: change(value)}, tmp_path / "r/eva.safetensors")
    unseal(tmp_path / "r/eva.json")
    with pytest.raises(UserError, match=message):
        eva.EvaResult.load(tmp_path / "r/eva")


def test_one_from_before_digests_loads(saved: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(saved[0], tmp_path / "r")
    unseal(tmp_path / "r/eva.json")
    assert described(tmp_path / "r/eva") == saved[1]
