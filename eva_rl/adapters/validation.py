"""An adapter's files, found and checked before PEFT sees them: they may add to the base, and change nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from eva_rl.adapters.extensions import WEIGHTS_FILE
from eva_rl.agents.policy_folder import POLICY_FILE, find_policy
from eva_rl.agents.policy_record import SCALING, scaling_record
from eva_rl.agents.weights import listed, read_safetensors, value_problems
from eva_rl.batch import InputScaling
from eva_rl.errors import UserError
from eva_rl.files import check_files, check_seal, expanded, read_json
from eva_rl.schema import DIGEST, Boolean, Either, Integer, ListOf, MapOf, Number, OneOf, Optional, Record, Text

CONFIG_FILE = "adapter_config.json"
ORIGIN_FILE = "eva_rl.json"
"""Beside PEFT's files: the method, the base that the adapter fits and its scaling, the task and what to ask for."""
ADAPTER_FOLDER = "adapter"
"""Inside a policy folder."""
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, ORIGIN_FILE)
PREFIX = "base_model.model."
LARGEST_RANK = 2**16

_name = Text(r"\w+(\.\w+)*", "the name of a layer or the end of one, not a regular expression")
_pattern = Text(
    r"\^?\w+(\\?\.\w+)*\$?", "the name of a layer or the end of one, dots escaped or not, and no other expression"
)
_rank, _count = Integer(1, LARGEST_RANK), Integer(0)
_empty: tuple[object, ...] = (None, False, {}, [], "")
CONFIG = Record(
    {"peft_type": OneOf(("LORA", "ADALORA", "MISS")), "target_modules": ListOf(_name, least=1)},
    {
        "r": _rank,
        "lora_alpha": Number(-1e9, 1e9),
        "lora_dropout": Number(0, 1),
        "rank_pattern": Optional(MapOf(Either((_rank, ListOf(Boolean()))), _pattern)),
        "alpha_pattern": Optional(MapOf(Number(-1e9, 1e9), _pattern)),
        "bias": OneOf(("none",)),
        "init_lora_weights": OneOf((True, False, "gaussian", "eva", "orthogonal", "mica")),
        "use_dora": Boolean(),
        "use_rslora": Boolean(),
        "inference_mode": Boolean(),
        "auto_mapping": Optional(MapOf(Text())),
        **dict.fromkeys(("base_model_name_or_path", "revision", "task_type", "peft_version"), Optional(Text())),
        "init_weights": OneOf((True, False)),
        "mini_r": _rank,
        "miss_dropout": Number(0, 1),
        "megatron_core": Optional(Text()),
        "qalora_group_size": Integer(),
        "init_r": _rank,
        "target_r": _rank,
        **dict.fromkeys(("tinit", "tfinal", "deltaT"), _count),
        "total_step": Optional(_count),
        **dict.fromkeys(("beta1", "beta2", "orth_reg_weight"), Number(0, 1e9)),
    },
)
"""What LoRA, AdaLoRA and MiSS do without rewriting the network. Other keys are admitted if they ask for nothing."""
ORIGIN = Record(
    {},
    {
        "method": Text(r"\w+"),
        "base_sha256": Text(DIGEST),
        "env_id": Text(),
        "target_return": Optional(Number()),
        "scaling": SCALING,
        "files": MapOf(Text(DIGEST)),
        "sha256": Text(DIGEST),
    },
)


def find_adapter(path: str | Path) -> Path:
    """Folder of an adapter, given it, a policy folder, a run directory or a hub id.

    Raises:
        UserError: There is none.
    """
    given = expanded(path)
    if any((given / name).is_file() for name in ADAPTER_FILES):
        return given
    folder = find_policy(path)
    if not has_adapter_files(folder):
        raise UserError(f"{path} holds no adapter. Expected a run of an adapter method, or an adapter's folder.")
    return folder / ADAPTER_FOLDER


def has_adapter_files(folder: Path) -> bool:
    """Whether a policy folder has an adapter, by its files and by what it says of itself.

    Raises:
        UserError: A file of the adapter is missing or damaged.
    """
    path = folder / POLICY_FILE
    record = read_json(path) if path.exists() else {}
    if (folder / ADAPTER_FOLDER).is_dir():
        check_files(record, folder, [f"{ADAPTER_FOLDER}/{name}" for name in ADAPTER_FILES], path)
        return True
    if record.get("adapter"):
        raise UserError(f"{folder} is incomplete: its folder {ADAPTER_FOLDER}/ is missing. Save or copy it again.")
    return False


def read_origin(folder: Path) -> dict[str, Any]:
    """What :data:`ORIGIN_FILE` says of an adapter whose files are all there and as they were written.

    Raises:
        UserError: A file is missing, damaged or another one.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is incomplete: {' and '.join(missing)} is missing. Save or copy it again.")
    path = folder / ORIGIN_FILE
    if not path.exists():
        return {}
    origin = ORIGIN.of(read_json(path), str(path))
    check_seal(origin, path)
    check_files(origin, folder, [CONFIG_FILE, WEIGHTS_FILE], path)
    return origin


def check_same_scaling(origin: Mapping[str, Any], scaling: InputScaling, folder: Path) -> None:
    """Raise unless the base's inputs and actions are scaled as those were with which an adapter was trained.

    Args:
        origin: What :func:`read_origin` returned; adapters of earlier versions do not say.
        scaling: Of the base.
        folder: Of the adapter, for the message.

    Raises:
        UserError: The adapter would see other numbers.
    """
    given, own = origin.get("scaling", {}), scaling_record(scaling)
    if apart := [name for name, values in given.items() if not _close(values, own[name])]:
        raise UserError(
            f"The adapter in {folder} was trained with another {', '.join(apart)} than this policy has, so that it "
            "would see other numbers. Load the policy that it was trained on (load_policy(RUN_DIR)), or give this one "
            "the same scaling."
        )


def _close(values: Any, others: Any) -> bool:
    return np.shape(values) == np.shape(others) and np.allclose(values, others, rtol=1e-4, atol=1e-6)


def check_adapter(network: nn.Module, folder: Path) -> None:
    """Raise unless an adapter's config and weights belong to this network and to each other, name by name.

    Args:
        network: The base, with other adapters or without.
        folder: Holds what PEFT wrote.

    Raises:
        UserError: Another type of adapter, an option that rewrites the base, a layer that does not exist, a tensor too
            many, too few or of another shape, or numbers that are not finite.
    """
    config = read_config(folder / CONFIG_FILE)
    weights = read_safetensors(folder / WEIGHTS_FILE)
    layers = _targeted(network, config["target_modules"], folder)
    expected: dict[str, tuple[int, ...] | None] = {}
    for name, layer in layers.items():
        shapes = _shapes(layer, _rank_of(name, config, folder), config)
        expected |= {f"{PREFIX}{name}.{part}": shape for part, shape in shapes.items()}
    problems = [f"{key} is missing" for key in expected if key not in weights]
    problems += [f"{key} belongs to no layer that it adapts" for key in weights if key not in expected]
    problems += [
        f"{key} has shape {tuple(value.shape)}, expected {expected[key]}"
        for key, value in weights.items()
        if expected.get(key) not in {None, tuple(value.shape)}
    ]
    problems += value_problems(weights)
    if problems:
        raise UserError(f"The adapter in {folder} does not fit the policy, or is damaged: {listed(problems)}.")


def read_config(path: Path) -> dict[str, Any]:
    """An adapter's config, without the keys that ask for nothing.

    Raises:
        UserError: It is no LoRA, AdaLoRA or MiSS, or asks for what could change the base.
    """
    config = read_json(path)
    if isinstance(config, Mapping):
        config = {key: value for key, value in config.items() if key in _KNOWN or value not in _empty}
    try:
        return CONFIG.of(config, str(path))
    except UserError as error:
        raise UserError(f"The adapter does not fit the policy, or is damaged: {error}") from error


_KNOWN = {*CONFIG.required, *CONFIG.optional}


def base_layers(network: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    """The layers that can be adapted, by the name they have without an adapter."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and not any(part in name for part in (".lora_", ".miss_"))
    }


def _targeted(network: nn.Module, targets: list[str], folder: Path) -> dict[str, nn.Linear | nn.Embedding]:
    """The layers that PEFT's rule finds for these names: equal to one, or ending in a dot and one."""
    layers = base_layers(network)
    if lost := [target for target in targets if not any(_ends(name, target) for name in layers)]:
        raise UserError(
            f"The adapter in {folder} does not fit the policy, or is damaged: it adapts {', '.join(lost[:3])}, and the "
            "policy has no such layer."
        )
    return {name: layer for name, layer in layers.items() if any(_ends(name, target) for target in targets)}


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _rank_of(name: str, config: Mapping[str, Any], folder: Path) -> int:
    pattern: Mapping[str, Any] = config.get("rank_pattern") or {}
    if config["peft_type"] == "ADALORA":
        first: int = config.get("init_r", 12)
        kept = next((value for key, value in pattern.items() if key.startswith(f"{name}.lora_E")), [True] * first)
        if isinstance(kept, int) or len(kept) != first:
            raise UserError(f"The adapter in {folder} is damaged: rank_pattern of {name} is not {first} flags.")
        return sum(kept)
    found = next((value for key, value in pattern.items() if _matches(key, name)), config.get("r", 8))
    if not isinstance(found, int):
        raise UserError(f"The adapter in {folder} is damaged: rank_pattern of {name} is not a number.")
    return found


def _matches(pattern: str, name: str) -> bool:
    """PEFT's rule for keys of ``rank_pattern``: the whole name where they begin with ^, else an ending of it."""
    literal = re.sub(r"[\\^$]", "", pattern)
    return name == literal if pattern.startswith("^") else _ends(name, literal)


def _shapes(layer: nn.Linear | nn.Embedding, rank: int, config: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Shapes of a layer's tensors in an adapter's file, by the end of their name; None admits any."""
    if isinstance(layer, nn.Embedding):
        shapes: dict[str, tuple[int, ...] | None] = {
            "lora_embedding_A": (rank, layer.num_embeddings),
            "lora_embedding_B": (layer.embedding_dim, rank),
        }
    elif config["peft_type"] == "MISS":
        return {"miss_block": (rank, layer.out_features)}
    elif config["peft_type"] == "ADALORA":
        shapes = {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank), "lora_E": (rank, 1)}
    else:
        shapes = {"lora_A.weight": (rank, layer.in_features), "lora_B.weight": (layer.out_features, rank)}
    return shapes | ({"lora_magnitude_vector": None} if config.get("use_dora") else {})


def changed_weights(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Names of base weights that are not what they were."""
    names = before.keys() | after.keys()
    return sorted(
        name for name in names if name not in before or name not in after or not before[name].equal(after[name])
    )
