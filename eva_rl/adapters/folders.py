"""Policy folders with an ``adapter/`` inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eva_rl.adapters.attach import AttachedAdapter, base_weights, refuse_merged
from eva_rl.adapters.extensions import ADAPTER_NAME, WEIGHTS_FILE, RewrittenBase, keep_live_ranks
from eva_rl.adapters.switching import AdaptedPolicy
from eva_rl.adapters.validation import (
    ADAPTER_FILES,
    ADAPTER_FOLDER,
    CONFIG_FILE,
    ORIGIN_FILE,
    has_adapter_files,
)
from eva_rl.agents.huggingface.options import ImportOptions
from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.agents.policy_folder import REPLACED, find_policy, read_policy, weights_digest, write_policy_files
from eva_rl.agents.policy_record import scaling_record
from eva_rl.errors import UserError
from eva_rl.files import expanded, sealed, write_folder, write_json

CARD_FILE = "README.md"


def save_adapted_policy(
    folder: str | Path, policy: DecisionTransformerPolicy, adapter: AttachedAdapter, model_card: str
) -> None:
    """Write base policy, adapter and model card, completely or not at all.

    The base is written as it was before the adapter came, whatever the method did to it since: plain
    ``peft.PeftModel.from_pretrained`` puts the adapter on it.

    Args:
        folder: Where to; a policy that was there is replaced.
        policy: With the adapter attached; the target return of the task that its ``env_id`` names goes with the
            adapter.
        adapter: What :func:`eva_rl.adapters.attach_adapter` returned.
        model_card: Text of README.md.

    Raises:
        UserError: An adapter is merged into the weights: the base would hold it, too; or the folder holds something
            other than a policy.
    """
    refuse_merged(policy.network)
    folder = expanded(folder)
    weights = base_weights(policy.network, adapter)

    def write(aside: Path) -> None:
        if adapter.model is not None:
            _write_adapter(aside / ADAPTER_FOLDER, adapter, model_card)
            write_json(aside / ADAPTER_FOLDER / ORIGIN_FILE, _origin(aside / ADAPTER_FOLDER, policy, adapter, weights))
        files = () if adapter.model is None else tuple(f"{ADAPTER_FOLDER}/{name}" for name in ADAPTER_FILES)
        write_policy_files(aside, policy, weights, torch.float32, adapter_files=files)
        (aside / CARD_FILE).write_text(model_card)

    write_folder(folder, write, REPLACED)


def _write_adapter(folder: Path, adapter: AttachedAdapter, model_card: str) -> None:
    assert adapter.model is not None
    if isinstance(adapter.extension, RewrittenBase):
        adapter.extension.save(folder)
    else:
        keep_live_ranks(adapter.model)
        adapter.model.save_pretrained(str(folder))
        for name in adapter.model.peft_config:
            if name != ADAPTER_NAME:  # which PEFT writes to a folder of its own
                _move_up(folder / name, folder)
    (folder / CARD_FILE).write_text(model_card)


def _move_up(folder: Path, above: Path) -> None:
    """Move all that a folder holds to one above it, in place of those between: a task's name may be the adapter's."""
    for path in folder.iterdir():
        path.replace(above / path.name)
    while folder != above:
        folder.rmdir()
        folder = folder.parent


def _origin(
    folder: Path, policy: DecisionTransformerPolicy, adapter: AttachedAdapter, weights: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What PEFT's files do not say of an adapter, with their digests."""
    facts = {
        "method": adapter.method.name,
        "base_sha256": weights_digest(weights),
        "env_id": policy.env_id,
        "target_return": policy.conditioning.of(policy.env_id) if policy.env_id else None,
        "scaling": scaling_record(policy.scaling),
    }
    return sealed(facts, folder, [CONFIG_FILE, WEIGHTS_FILE])


def adapter_bytes(folder: Path) -> int:
    """Size of a policy folder's adapter weights on disk; 0 without an adapter."""
    path = folder / ADAPTER_FOLDER / WEIGHTS_FILE
    return path.stat().st_size if path.is_file() else 0


def load_policy(
    name_or_path: str | Path,
    device: torch.device | str = "cpu",
    options: ImportOptions | None = None,
    *,
    merge: bool = False,
    is_trainable: bool = False,
    adapters: Mapping[str, str | Path] | None = None,
) -> AdaptedPolicy:
    """Load a policy with its adapter, where it has one.

    ``policy.adapters`` switches them, turns them off, merges and unmerges.

    Args:
        name_or_path: A policy folder, a run directory that holds one, a shipped name such as ``mt40``, or a Hugging
            Face Decision Transformer (folder or hub id, which is downloaded unless it is there).
        device: Where the network goes.
        options: What checkpoints of other projects do not say of themselves: their normalisation, say.
        merge: Fold the adapter into the weights, so that another one can be attached.
        is_trainable: Whether the adapter is going to be trained further (``policy.adapters.attached()``).
        adapters: More adapters by name, each a policy folder, a run directory or an adapter's folder; with them, the
            base acts alone until ``policy.adapters.use(name)``.

    Raises:
        UserError: No such policy, its files are damaged or do not fit each other, ``merge`` with ``adapters``, or
            adapters without names.
    """
    if adapters is not None and not isinstance(adapters, Mapping):
        raise UserError(f"adapters={adapters!r}: expected names and where each is, {{NAME: PATH}}.")
    if merge and adapters:
        raise UserError(
            f"merge=True leaves open which of the adapters is merged ({', '.join(adapters)}). Leave it out, then call "
            "policy.adapters.use(NAME) and policy.adapters.merge_and_unload()."
        )
    folder = find_policy(name_or_path)
    policy = AdaptedPolicy(read_policy(folder, options))
    if not merge:  # merged weights are computed on the CPU: the same for every device
        policy.to(device)  # whose kind decides whether layers are fused
    found = policy.adapters
    if has_adapter_files(folder):
        found.add(ADAPTER_NAME, folder / ADAPTER_FOLDER, is_trainable=is_trainable)
    for name, path in (adapters or {}).items():
        found.add(name, path, is_trainable=is_trainable)
    if merge:
        found.merge_and_unload()
    elif adapters:
        found.use(None)
    policy.network.eval()
    return policy.to(device)
