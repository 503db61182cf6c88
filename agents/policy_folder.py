"""Policy folders: ``policy.json`` and ``model.safetensors``; and the policies that come with the package."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from eva_rl.agents.decision_transformer import DecisionTransformer, DecisionTransformerConfig
from eva_rl.agents.huggingface import COMPANION_FILE, CONFIG_FILE, read_huggingface, read_original
from eva_rl.agents.huggingface.options import ImportOptions, download
from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.agents.policy_record import FORMAT, FORMAT_VERSION, check_record, policy_record, read_record
from eva_rl.agents.weights import check_size, check_weights, listed, read_safetensors, value_problems
from eva_rl.errors import UnknownNameError, UserError
from eva_rl.files import check_files, expanded, sealed, write_folder, write_json

__all__ = ["FORMAT", "FORMAT_VERSION", "find_policy", "load_base_policy", "policy_record", "read_policy", "save_policy"]

POLICY_FILE = "policy.json"
WEIGHTS_FILE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's, in the folder of an adapter."""
REPLACED = (POLICY_FILE, WEIGHTS_FILE, "adapter", "README.md")
"""What a policy that is written may replace."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def shipped_policies() -> dict[str, Path]:
    """Folders of the policies that come with the package, by name."""
    folder = Path(str(resources.files("eva_rl.agents"))) / "pretrained"
    return {path.name: path for path in sorted(folder.glob("*")) if (path / POLICY_FILE).is_file()}


def find_policy(name_or_path: str | Path) -> Path:
    """Folder (or file of weights) of a policy, given its path, a shipped name or a Hugging Face hub id.

    Raises:
        UnknownNameError: None of them.
        UserError: The hub id could not be fetched, a part of a policy was named, or something other than a name given.
    """
    if not isinstance(name_or_path, str | Path):
        raise UserError(
            f"A policy is loaded by its name or path, got a {type(name_or_path).__name__}. For a model of transformers "
            "name the folder that its save_pretrained() wrote."
        )
    name_or_path = str(name_or_path)
    path, begun, instead = expanded(name_or_path), False, ""
    with suppress(OSError):  # too long a name is no path
        for folder in (path, path / "policy"):
            if (folder / POLICY_FILE).is_file() or (folder / CONFIG_FILE).is_file():
                return folder
        instead = _named_instead(path)
        if path.is_file() and not instead:
            return path
        begun = (path / "config.yaml").is_file() and (path / "versions.json").is_file()
    shipped = shipped_policies()
    if name_or_path in shipped:
        return shipped[name_or_path]
    if instead:
        raise UserError(instead)
    if HUB_ID.fullmatch(name_or_path) and not path.parent.exists():
        return download(name_or_path)
    if begun:
        raise UserError(
            f"{path} is a run that has not ended: it holds no policy yet. Continue it with run_dir={path}, then name "
            "it again."
        )
    raise UnknownNameError(
        "policy",
        name_or_path,
        shipped,
        f"Expected one of them, a Hugging Face hub id, or a folder that holds {POLICY_FILE} or {CONFIG_FILE}.",
    )


def _named_instead(path: Path) -> str:
    """What to name in place of a part of a policy, or of a folder that holds some; empty where it is neither."""
    if (path / ADAPTER_CONFIG).is_file() and not (path.parent / POLICY_FILE).is_file():
        return (
            f"{path} is an adapter alone. Name the policy it was trained on, and the adapter beside it: "
            f"adapters={{TASK:{path}}} of evaluate, eva_rl.load_policy(POLICY, adapters={{NAME: {str(path)!r}}})."
        )
    if (path / ADAPTER_CONFIG).is_file() or (
        path.name in {WEIGHTS_FILE, POLICY_FILE} and (path.parent / POLICY_FILE).is_file()
    ):
        return f"{path} is a part of a policy. Name the whole: policy={path.parent}"
    inside = [
        one for one in path.glob("*") if (one / POLICY_FILE).is_file() or (one / "policy" / POLICY_FILE).is_file()
    ]
    named = ", ".join(f"policy={one}" for one in sorted(inside)[:5]) + (", ..." if len(inside) > 5 else "")
    return f"{path} is no policy, and holds some. Name one: {named}" if inside else ""


def says_its_bounds(path: Path) -> bool:
    """Whether what :func:`find_policy` returned was written here, with its action bounds beside the weights."""
    return (path / POLICY_FILE).is_file() or (path / COMPANION_FILE).is_file()


def load_base_policy(
    name_or_path: str | Path, device: torch.device | str = "cpu", options: ImportOptions | None = None
) -> DecisionTransformerPolicy:
    """Load the base policy of a folder, or a policy that comes with the package.

    Args:
        name_or_path: A policy folder, a run directory that holds one, a shipped name, the folder or hub id of a
            Hugging Face ``DecisionTransformerModel``, or a file of original Decision Transformer weights.
        device: Where the network goes.
        options: What a checkpoint of another project does not say about itself.

    Raises:
        UserError: No such policy, or its files are damaged or do not fit each other.
    """
    return read_policy(find_policy(name_or_path), options).to(device)


def read_policy(path: Path, options: ImportOptions | None = None) -> DecisionTransformerPolicy:
    """Load the base policy, without its adapter, from what :func:`find_policy` returned."""
    if path.is_file():
        return read_original(path, options or ImportOptions())
    if not (path / POLICY_FILE).is_file() and (path / CONFIG_FILE).is_file():
        return read_huggingface(path, options or ImportOptions())
    if options is not None and (given := options.of_a_checkpoint()):
        raise UserError(
            f"{path} says its {', '.join(given)} itself: such options are for policies of other projects. Leave out."
        )
    record, config, scaling, conditioning = read_record(path / POLICY_FILE)
    check_files(record, path, [WEIGHTS_FILE], path / POLICY_FILE)
    return DecisionTransformerPolicy(
        _load_network(config, path / WEIGHTS_FILE),
        scaling,
        conditioning,
        env_id=record.get("env_id", ""),
        metadata=record.get("metadata"),
    )


def _load_network(config: DecisionTransformerConfig, path: Path) -> DecisionTransformer:
    check_size(config, path, POLICY_FILE)
    weights = read_safetensors(path)
    check_weights(weights, DecisionTransformer.empty(config).state_dict(), str(path), POLICY_FILE)
    return DecisionTransformer.with_weights(config, weights)


def save_policy(
    folder: str | Path,
    policy: DecisionTransformerPolicy,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a policy folder, completely or not at all.

    Args:
        folder: Where to; a policy that was there is replaced.
        policy: What to write.
        weights: The base network's weights where they are not ``policy.network.state_dict()`` (an adapter is
            injected, say).
        dtype: Precision of the weights on disk; they are loaded as float32.

    Raises:
        UserError: The policy has an adapter, and the base network's weights are not given; it could not be loaded
            again, as with weights that are not finite; or the folder holds something other than a policy.
    """
    if weights is None and any(".base_layer." in name for name in policy.network.state_dict()):
        raise UserError(
            "save_policy writes a policy without adapters, and this one has some. Use "
            "eva_rl.adapters.save_adapted_policy, or PEFT's merge_and_unload() first."
        )
    write_folder(expanded(folder), lambda aside: write_policy_files(aside, policy, weights, dtype), REPLACED)


def write_policy_files(
    folder: Path,
    policy: DecisionTransformerPolicy,
    weights: Mapping[str, Tensor] | None,
    dtype: torch.dtype,
    *,
    adapter_files: Sequence[str] | None = None,
) -> None:
    """Write ``model.safetensors`` and ``policy.json``, with digests, into an existing folder.

    Args:
        folder: Where to.
        policy: What to write.
        weights: As :func:`save_policy` takes them.
        dtype: Precision of the weights on disk.
        adapter_files: The files of its adapter, relative to the folder, already there; None does not say whether it
            has one.
    """
    state = policy.network.state_dict() if weights is None else weights
    check_record(policy, "The policy cannot be saved")
    if problems := value_problems(state):
        raise UserError(f"The policy cannot be saved: {listed(problems)}.")
    save_file({k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}, folder / WEIGHTS_FILE)
    record = policy_record(policy) | ({} if adapter_files is None else {"adapter": bool(adapter_files)})
    write_json(folder / POLICY_FILE, sealed(record, folder, [WEIGHTS_FILE, *(adapter_files or ())]))


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights as float32, by name: two policies have the same one if they are the same."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
