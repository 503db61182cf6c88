"""Damaged and hostile policy folders load as what they were, or are refused in words; none acts otherwise or NaN."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from eva_rl import evaluate
from eva_rl.adapters import load_policy
from eva_rl.agents import ImportOptions, save_policy, shipped_policies
from eva_rl.errors import UserError
from tests.conftest import unseal
from tests.security.making import FORMATS, acted, copied, leaves, loaded, put, reseal, small_policy

ODD = (None, True, -1, 0, 0.5, 2**31, 10**400, 1e39, -1e39, 1e-46, float("nan"), float("inf"), "", "x", [], [[]], {})
RECORDS = {"adapted": "policy.json", "plain": "policy.json", "huggingface": "eva_rl.json"}
KNOWN = {"observation_mean": [0.0] * 3, "observation_std": [1.0] * 3, "target_return": 1.0, "context_length": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("policies")
    for name, save in FORMATS.items():
        save(root / name)
    return {name: (root / name, loaded(root / name)) for name in FORMATS}


def same_or_refused(folder: Path, expected: Any) -> None:
    """The policy is what it was, or a UserError says in one line that it is not."""
    refusal = "refused"
    try:
        assert loaded(folder) == expected
    except UserError as error:
        refusal = str(error)
    assert refusal
    assert "\n" not in refusal


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_is_never_silent(folders: dict[str, Any], tmp_path: Path, data: st.DataObject) -> None:
    source, expected = folders[data.draw(st.sampled_from(sorted(folders)))]
    folder = copied(source, tmp_path / "changed")
    file = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md")))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    way = data.draw(st.sampled_from(["flip", "cut", "insert", "remove", "empty", "delete"]))
    if way == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif way == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    elif way == "remove":
        del content[at : at + data.draw(st.integers(1, 8))]
    else:
        content = content[:at] if way == "cut" else bytearray()
    file.write_bytes(content)
    if way == "delete":
        file.unlink()
    same_or_refused(folder, expected)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_record_sealed_again_acts_finite_or_is_refused(
    folders: dict[str, Any], tmp_path: Path, data: st.DataObject
) -> None:
    """Digests are no signature: whoever seals a record anew may change values, but not make it act NaN or crash."""
    name = data.draw(st.sampled_from(sorted(folders)))
    folder = copied(folders[name][0], tmp_path / "changed")
    file = folder / RECORDS[name]
    kept = {k: v for k, v in json.loads(file.read_text()).items() if k not in {"files", "sha256"}}
    path, value = data.draw(st.sampled_from(list(leaves(kept)))), data.draw(st.sampled_from(ODD))
    reseal(file, lambda record: put(record, path, value))
    refusal = "refused"
    try:
        assert np.isfinite(acted(load_policy(folder))).all()
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal


@pytest.mark.parametrize("bound", ["action_low", "action_high"])
@pytest.mark.parametrize("values", [[], [0.5], [0.5] * 7])
def test_bounds_of_different_lengths_are_refused(
    folders: dict[str, Any], tmp_path: Path, bound: str, values: list[float]
) -> None:
    folder = copied(folders["plain"][0], tmp_path / "uneven")
    reseal(folder / "policy.json", lambda record: record["scaling"].update({bound: values}))
    with pytest.raises(UserError, match=r"action_low has \d numbers and action_high \d;"):
        load_policy(folder)


@pytest.mark.parametrize("key", ["num_layers", "context_length", "hidden_size", "max_timestep", "inner_size"])
@pytest.mark.parametrize("size", [10**5, 10**7, 10**8, 10**15])
def test_declared_sizes_are_held_against_the_file(folders: dict[str, Any], tmp_path: Path, key: str, size: int) -> None:
    folder = copied(folders["plain"][0], tmp_path / "big")
    reseal(folder / "policy.json", lambda record: record["architecture"].update({key: size}))
    with pytest.raises(UserError, match=f"{key}|takes .* at least"):
        load_policy(folder)


@pytest.mark.parametrize("key", ["n_layer", "hidden_size", "max_ep_len", "n_inner", "state_dim"])
def test_sizes_of_foreign_configs_too(folders: dict[str, Any], tmp_path: Path, key: str) -> None:
    folder = copied(folders["huggingface"][0], tmp_path / "big")
    (folder / "eva_rl.json").unlink()
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: 10**7}))
    with pytest.raises(UserError, match=r"takes [\d,]+ at least"):
        load_policy(folder, options=ImportOptions(**KNOWN))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_odd_values_of_a_foreign_config(folders: dict[str, Any], tmp_path: Path, data: st.DataObject) -> None:
    folder = copied(folders["huggingface"][0], tmp_path / "odd")
    (folder / "eva_rl.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config[data.draw(st.sampled_from(sorted(config)))] = data.draw(st.sampled_from(ODD))
    (folder / "config.json").write_text(json.dumps(config))
    refusal = "refused"
    try:
        assert np.isfinite(acted(load_policy(folder, options=ImportOptions(**KNOWN)))).all()
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.int8), "is int8, expected float32"),
        (lambda t: t.to(torch.int64), "is int64, expected float32"),
        (lambda t: t.to(torch.float8_e4m3fn), "is float8_e4m3fn, expected float32"),
        (lambda t: t.bool(), "is bool, expected float32"),
        (lambda t: t * float("nan"), "not finite"),
        (lambda t: t.double() + 1e300, "not finite"),
    ],
)
@pytest.mark.parametrize("name", ["plain", "huggingface"])
def test_weights_are_finite_floats(
    folders: dict[str, Any], tmp_path: Path, name: str, change: Any, message: str
) -> None:
    folder = copied(folders[name][0], tmp_path / "weights")
    weights = load_file(folder / "model.safetensors")
    for key in sorted(weights)[:: len(weights) // 4]:
        if key.startswith(("encoder.wte", "predict_state", "predict_return")):
            continue
        save_file(weights | {key: change(weights[key])}, folder / "model.safetensors")
        unseal(folder / RECORDS[name])
        with pytest.raises(UserError, match=message):
            load_policy(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_only_regular_files_are_read(folders: dict[str, Any], tmp_path: Path, name: str) -> None:
    """A pipe in place of any file is refused, or the file was not needed; nothing waits for it."""
    source, expected = folders[name]
    for file in sorted(p for p in source.rglob("*") if p.is_file()):
        folder = copied(source, tmp_path / "piped")
        (folder / file.relative_to(source)).unlink()
        os.mkfifo(folder / file.relative_to(source))
        same_or_refused(folder, expected)


def bombs(folder: Path) -> dict[str, Path]:
    """Small files of torch's format whose tensors claim much, or that name something else than tensors."""
    small = torch.zeros(1)
    contents: dict[str, Any] = {
        "repeated": {"embed_state.weight": small.expand(10**9)},
        "stride": {"embed_state.weight": small.as_strided((10**5, 10**5), (0, 0))},
        "bytearray": {"x": bytearray(10)},
        "nested": {"x": [[[small]]]},
        "module": torch.nn.Linear(1, 1),
        "size": {"x": torch.Size([1])},
    }
    for name, value in contents.items():
        for zipped in (True, False):
            torch.save(value, folder / f"{name}{zipped}.pt", _use_new_zipfile_serialization=zipped)
    (folder / "plain.pt").write_bytes(b"cbuiltins\nbytearray\n(I10000000000\ntR.")
    return {path.stem: path for path in folder.glob("*.pt")}


def test_bombs_in_pickles_are_refused(tmp_path: Path) -> None:
    found = bombs(tmp_path)
    assert len(found) == 13
    for path in found.values():
        with pytest.raises(UserError, match=r"not a plain file of tensors|holds no state dict|repeat") as refused:
            load_policy(path, options=ImportOptions(allow_pickle=True, **KNOWN))
        assert "\x1b" not in str(refused.value)


def test_folders_from_before_digests_load(folders: dict[str, Any], tmp_path: Path) -> None:
    for name, (source, expected) in folders.items():
        folder = copied(source, tmp_path / name)
        for record in [*folder.glob("policy.json"), *folder.rglob("eva_rl.json")]:
            unseal(record)
        assert loaded(folder) == expected


@pytest.mark.parametrize("name", shipped_policies())
def test_shipped_policies_have_digests(name: str, tmp_path: Path) -> None:
    record = json.loads((shipped_policies()[name] / "policy.json").read_text())
    assert set(record["files"]) == {"model.safetensors"}
    folder = copied(shipped_policies()[name], tmp_path / name)
    (folder / "policy.json").write_text(
        (folder / "policy.json").read_text().replace('"dropout": 0.0', '"dropout": 0.5')
    )
    with pytest.raises(UserError, match="its own checksum"):
        load_policy(folder)


def test_the_small_policy_acts() -> None:
    assert np.ptp(acted(small_policy())) > 0.1


def test_a_policy_names_no_module_to_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its task is its own word: what it would import or build has to be typed."""
    (tmp_path / "payload.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    policy = small_policy()
    policy.env_id = "payload:Some-v0"
    save_policy(tmp_path / "policy", policy)
    assert evaluate.main(["policy=policy", "eval.episodes=1"]) == 2
    assert "Type env=payload:Some-v0." in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "ran").exists()
