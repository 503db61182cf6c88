"""Policy folders with an ``adapter/`` inside."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError

from eva_rl.adapters.attach import AttachedAdapter, base_weights
from eva_rl.agents.checkpoint import find_policy, read_policy, write_policy_files
from eva_rl.agents.imports import ImportOptions
from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.errors import UserError
from eva_rl.files import write_folder

ADAPTER_FOLDER = "adapter"


def save_adapted_policy(
    folder: Path, policy: DecisionTransformerPolicy, adapter: AttachedAdapter, model_card: str
) -> None:
    """Write base policy, adapter and model card, completely or not at all.

    Args:
        folder: Where to; what was there is replaced.
        policy: With the adapter attached.
        adapter: What :func:`eva_rl.adapters.attach_adapter` returned.
        model_card: Text of README.md.
    """

    def write(aside: Path) -> None:
        write_policy_files(aside, policy, base_weights(policy.network), torch.float32)
        (aside / "README.md").write_text(model_card)
        if adapter.model is not None:
            adapter.model.save_pretrained(str(aside / ADAPTER_FOLDER))
            (aside / ADAPTER_FOLDER / "README.md").write_text(model_card)

    write_folder(folder, write)


def load_policy(
    name_or_path: str | Path,
    device: torch.device | str = "cpu",
    options: ImportOptions | None = None,
    *,
    merge: bool = False,
) -> DecisionTransformerPolicy:
    """Load a policy with its adapter, where it has one.

    Args:
        name_or_path: A policy folder, a run directory that holds one, a shipped name such as ``mt40``, or a Hugging
            Face Decision Transformer (folder or hub id).
        device: Where the network goes.
        options: What checkpoints of other projects do not say of themselves.
        merge: Fold the adapter into the weights, so that another one can be attached.

    Raises:
        UserError: No such policy, or its files are damaged or do not fit each other.
    """
    folder = find_policy(str(name_or_path))
    policy = read_policy(folder, options)
    if (folder / ADAPTER_FOLDER).is_dir():
        model = _load_adapter(policy, folder / ADAPTER_FOLDER)
        if merge:
            model.merge_and_unload()
    policy.network.eval()
    return policy.to(device)


def _load_adapter(policy: DecisionTransformerPolicy, folder: Path) -> PeftModel:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            return PeftModel.from_pretrained(policy.network, str(folder), torch_device="cpu")
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, UserWarning, SafetensorError) as error:
        raise UserError(
            f"The adapter in {folder} does not fit the policy beside it, or is damaged: {str(error).splitlines()[0]}"
        ) from error
