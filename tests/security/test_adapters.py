"""Adapters add to the base and change nothing else: keys, layers, types and options that would are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftType
from safetensors.torch import load_file, save_file

from eva_rl.adapters import AdaptedPolicy, load_policy
from eva_rl.errors import UserError
from tests.security.making import Actions, acted, copied, leaves, put, reseal, save_adapted, save_plain, small_policy

METHODS = ("lora", "dora", "adalora")
BASE = sorted(small_policy().network.state_dict())
ODD = (
    None,
    True,
    0,
    -1,
    3,
    10**7,
    1e39,
    float("nan"),
    "",
    "x",
    ".*",
    "(a+)+$",
    [],
    ["x"],
    ["action_head"],
    {},
    {"x": 1},
)
HARMLESS = (None, False, [], {}, "")
HOSTILE: dict[str, Any] = {
    "modules_to_save": ["action_head"],
    "bias": "all",
    "lora_bias": True,
    "target_modules": "(.*)*q_proj",
    "exclude_modules": "(.*)*",
    "layers_pattern": "(.*)*",
    "layers_to_transform": [0],
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 9]],
    "trainable_token_indices": [0],
    "target_parameters": ["action_head.weight"],
    "fan_in_fan_out": True,
    "rank_pattern": {"(.*)*q_proj": 2},
    "alpha_pattern": {"(.*)*q_proj": 100.0},
    "loftq_config": {"loftq_bits": 4},
    "use_qalora": True,
    "r": 10**7,
    "lora_alpha": float("inf"),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters as plain PEFT leaves them: without what eva-rl writes beside."""
    root = tmp_path_factory.mktemp("adapters")
    save_plain(root / "base")
    for method in METHODS:
        save_adapted(root / method, method=method)
        (root / method / "adapter/eva_rl.json").unlink()
    return {method: root / method / "adapter" for method in METHODS} | {"base": root / "base"}


def changed_files(source: Path, target: Path, weights: Any = None, config: Any = None) -> Path:
    folder = copied(source, target)
    if weights is not None:
        found = load_file(folder / "adapter_model.safetensors")
        weights(found)
        save_file({k: v.contiguous() for k, v in found.items()}, folder / "adapter_model.safetensors")
    if config is not None:
        values = json.loads((folder / "adapter_config.json").read_text())
        config(values)
        (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def two(adapters: dict[str, Path]) -> AdaptedPolicy:
    return load_policy(adapters["base"], adapters={"good": adapters["lora"]})


def refused_and_harmless(adapters: dict[str, Path], folder: Path, message: str = ".") -> None:
    """A live policy refuses the adapter; its base and its other adapter act as before."""
    policy = two(adapters)
    base = acted(policy)
    policy.adapters.use("good")
    good = acted(policy)
    with pytest.raises(UserError, match=message) as refused:
        policy.adapters.add("bad", folder)
    assert "\n" not in str(refused.value)
    assert Actions(acted(policy)) == Actions(good)
    policy.adapters.use(None)
    assert Actions(acted(policy)) == Actions(base)
    assert policy.adapters.names == ("good",)


def test_adapters_of_plain_peft_load(adapters: dict[str, Path]) -> None:
    base = acted(small_policy())
    for method in METHODS:
        policy = load_policy(adapters["base"], adapters={"a": adapters[method]})
        assert Actions(acted(policy)) == Actions(base)
        policy.adapters.use("a")
        assert np.abs(acted(policy) - base).max() > 1e-3, method


@pytest.mark.parametrize(
    ("first", "key"),
    [(0, "base_model.model.{}"), (1, "base_model.model.{}.base_layer"), (2, "{}"), (0, "base_model.{}")],
)
def test_no_key_reaches_a_weight_of_the_base(adapters: dict[str, Path], tmp_path: Path, first: int, key: str) -> None:
    """A third of the weights each, all of them together."""
    values = small_policy(seed=3).network.state_dict()
    for number, name in enumerate(BASE[first::3]):
        layer, _, kind = name.rpartition(".")
        full = key.format(f"{layer}.base_layer.{kind}") if "base_layer" in key else key.format(name)
        folder = changed_files(
            adapters["lora"], tmp_path / "bad", lambda w, full=full, name=name: w.update({full: values[name]})
        )
        if number % 4 == 0:  # on a live policy
            refused_and_harmless(adapters, folder, "belongs to no layer that it adapts")
        with pytest.raises(UserError, match="belongs to no layer that it adapts"):
            load_policy(adapters["base"], adapters={"bad": folder})


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_has_to_be_there_and_fit(adapters: dict[str, Path], tmp_path: Path, method: str) -> None:
    names = sorted(load_file(adapters[method] / "adapter_model.safetensors"))
    changes: list[tuple[Callable[[Any, str], Any], str]] = [
        (lambda w, name: w.pop(name), "is missing"),
        (lambda w, name: w.update({name.replace("blocks.0", "blocks.1"): w.pop(name)}), "is missing"),
        (lambda w, name: w.update({name: w[name] * float("nan")}), "not finite"),
        (lambda w, name: w.update({name: w[name].to(torch.int32)}), "is int32"),
    ]
    for name in names[::3]:
        for change, message in changes:
            folder = changed_files(adapters[method], tmp_path / "bad", lambda w, c=change, n=name: c(w, n))
            with pytest.raises(UserError, match=message):
                load_policy(adapters["base"], adapters={"bad": folder})


def test_no_layer_is_dropped_or_added_by_its_name(adapters: dict[str, Path], tmp_path: Path) -> None:
    targets = json.loads((adapters["lora"] / "adapter_config.json").read_text())["target_modules"]
    for target in targets:
        others = [name for name in targets if name != target]
        for changed in (others, [*others, target + "x"], [*others, "action_head"], [*targets, "action_head"]):
            folder = changed_files(
                adapters["lora"], tmp_path / "bad", config=lambda c, t=changed: c.update(target_modules=t)
            )
            with pytest.raises(UserError, match="does not fit"):
                load_policy(adapters["base"], adapters={"bad": folder})


@pytest.mark.parametrize("kind", [*sorted(set(PeftType) - {"LORA", "ADALORA", "MISS"}), "", None, 3, "lora"])
def test_other_types_of_adapters_are_refused(adapters: dict[str, Path], tmp_path: Path, kind: Any) -> None:
    folder = changed_files(adapters["lora"], tmp_path / "bad", config=lambda c: c.update(peft_type=kind))
    with pytest.raises(UserError, match=r"peft_type is .*expected 'LORA' or 'ADALORA'"):
        load_policy(adapters["base"], adapters={"bad": folder})


@pytest.mark.parametrize("key", HOSTILE)
def test_options_that_rewrite_or_run_are_refused(adapters: dict[str, Path], tmp_path: Path, key: str) -> None:
    folder = changed_files(adapters["lora"], tmp_path / "bad", config=lambda c: c.update({key: HOSTILE[key]}))
    refused_and_harmless(adapters, folder)


def test_every_other_option_of_peft_is_refused(adapters: dict[str, Path], tmp_path: Path) -> None:
    """Whatever PEFT offers besides what is known, now or later."""
    known = set(json.loads((adapters["lora"] / "adapter_config.json").read_text()))
    for key in [*(set(LoraConfig.__dataclass_fields__) - known - {"peft_type", "runtime_config"}), "from_the_future"]:
        folder = changed_files(adapters["lora"], tmp_path / "bad", config=lambda c, k=key: c.update({k: {"on": 1}}))
        with pytest.raises(UserError, match=key):
            load_policy(adapters["base"], adapters={"bad": folder})
    folder = changed_files(adapters["lora"], tmp_path / "fine", config=lambda c: c.update(from_the_future=None))
    load_policy(adapters["base"], adapters={"fine": folder})


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_odd_values_anywhere_in_a_config(adapters: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    """Refused in words, or the adapter acts finite and leaves the base alone."""
    source = adapters[data.draw(st.sampled_from(METHODS))]
    config = json.loads((source / "adapter_config.json").read_text())
    path, value = data.draw(st.sampled_from(list(leaves(config)))), data.draw(st.sampled_from(ODD))
    folder = changed_files(source, tmp_path / "odd", config=lambda c: put(c, path, value))
    refusal = "refused"
    try:
        policy = load_policy(adapters["base"], adapters={"odd": folder})
        assert Actions(acted(policy)) == Actions(acted(small_policy()))
        policy.adapters.use("odd")
        assert np.isfinite(acted(policy)).all()
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal


def test_an_origin_sealed_again_is_held_against_its_table(tmp_path: Path) -> None:
    save_adapted(tmp_path / "run")
    for key in ("method", "base_sha256", "env_id", "target_return", "scaling"):
        for value in (3.5, True, [], {}, float("nan"), "0" * 64):
            folder = copied(tmp_path / "run/adapter", tmp_path / "odd")
            reseal(folder / "eva_rl.json", lambda record, k=key, v=value: record.update({k: v}))
            refusal = "refused"
            try:
                acted(load_policy(tmp_path / "run", adapters={"odd": folder}))
            except UserError as error:
                refusal = str(error)
            assert "\n" not in refusal
