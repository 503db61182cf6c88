"""Small policy folders, and every way to damage them that the tests share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eva_rl.adapters import AdaptedPolicy, attach_adapter, load_policy, save_adapted_policy
from eva_rl.agents import DecisionTransformerPolicy, export_huggingface, save_policy
from eva_rl.files import sealed
from tests.conftest import make_policy

OBS, ACT = 3, 2


def small_policy(seed: int = 0) -> DecisionTransformerPolicy:
    policy = make_policy(OBS, ACT, seed, hidden_size=8, num_layers=1, num_heads=1, context_length=2, max_timestep=4)
    policy.set_target_return(7.0, "metaworld/reach-v3")
    return policy


def save_adapted(folder: Path, seed: int = 1, method: str = "lora") -> None:
    """A policy with a trained-looking adapter."""
    policy = small_policy()
    adapter = attach_adapter(policy, method, rank=2, total_updates=8)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.network.named_parameters():
        if ".lora_B" in name or ".lora_E" in name:
            parameter.data.normal_(generator=generator)
    save_adapted_policy(folder, policy, adapter, "card")


def save_plain(folder: Path) -> None:
    save_policy(folder, small_policy())


def save_huggingface(folder: Path) -> None:
    export_huggingface(small_policy(), folder)


FORMATS = {"adapted": save_adapted, "plain": save_plain, "huggingface": save_huggingface}


def acted(policy: DecisionTransformerPolicy) -> NDArray[np.float32]:
    """Actions of a few env steps, of tasks with and without a target return of their own."""
    generator = np.random.default_rng(0)
    policy.reset(["metaworld/reach-v3", "other"])
    steps = [
        policy.act(generator.normal(size=(2, OBS)).astype(np.float32), np.ones(2, np.float32), np.full(2, step == 0))
        for step in range(4)
    ]
    return np.stack(steps)


class Actions:
    """Actions, equal to others but for the last bits, which depend on where a tensor lies in memory."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Actions) and np.allclose(self.values, other.values, rtol=0, atol=1e-6)

    __hash__ = None  # type: ignore[assignment] # nothing that is only nearly equal has one


def everything(policy: AdaptedPolicy) -> tuple[Any, ...]:
    """What a policy is, for comparison: its actions and its facts."""
    actions = acted(policy)
    assert np.isfinite(actions).all()
    facts = {key: value for key, value in policy.metadata.items() if key != "imported_from"}  # the folder's name
    return (Actions(actions), policy.env_id, str(policy.conditioning), str(facts), policy.adapters.names)


def loaded(folder: Path) -> tuple[Any, ...]:
    return everything(load_policy(folder))


def reseal(record_file: Path, change: Any) -> None:
    """Change a record as somebody does who knows how it is sealed."""
    record = json.loads(record_file.read_text())
    names = list(record.pop("files"))
    record.pop("sha256")
    change(record)
    record_file.write_text(json.dumps(sealed(record, record_file.parent, names)))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every value inside a JSON value, the containers included."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target
