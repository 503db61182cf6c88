"""``python -m eva_rl.export``: a policy as a folder or file for others, and on the Hugging Face hub."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from eva_rl.adapters import load_policy
from eva_rl.adapters.extensions import WEIGHTS_FILE as ADAPTER_WEIGHTS
from eva_rl.adapters.model_card import NEEDED, model_card, pretrained_card
from eva_rl.adapters.switching import AdaptedPolicy
from eva_rl.adapters.validation import ADAPTER_FILES, ADAPTER_FOLDER
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.agents.huggingface import COMPANION_FILE, CONFIG_FILE, PICKLE_FILE, export_huggingface
from eva_rl.agents.policy import Conditioning
from eva_rl.agents.policy_folder import HUB_ID, POLICY_FILE, WEIGHTS_FILE, find_policy, write_policy_files
from eva_rl.cli.command import run_command
from eva_rl.cli.console import say
from eva_rl.cli.loading import check_has_no_demonstrations, open_policy
from eva_rl.cli.parsing import register
from eva_rl.configs.groups import PolicyOptions
from eva_rl.errors import UserError
from eva_rl.files import check_new, copy_files, expanded, sha256, write_folder
from eva_rl.options import group, one_of, option

HELP = """
Write a policy as a folder, with its adapter or merged, for eva-rl or for transformers, or as one ONNX file; push it to
the hub.

Examples:
  python -m eva_rl.export policy=runs/push to=merged out=exported/push
  python -m eva_rl.export policy=runs/push to=huggingface out=exported/push-hf
  python -m eva_rl.export policy=runs/push to=onnx
  python -m eva_rl.export policy=runs/push to=adapter push=USER/push

A pushed policy is used by its name: policy=USER/push.
"""
TARGETS = ("adapter", "merged", "huggingface", "onnx")
CARD_FILE, ONNX_SUFFIX, ONNX_FILE = "README.md", ".onnx", "policy.onnx"
FOLDER_FILES = (
    *(POLICY_FILE, WEIGHTS_FILE, CONFIG_FILE, COMPANION_FILE, PICKLE_FILE, CARD_FILE),
    *(f"{ADAPTER_FOLDER}/{name}" for name in (*ADAPTER_FILES, CARD_FILE)),
)
"""All that is copied of a policy folder."""


@dataclass
class ExportConfig:
    """Config of ``python -m eva_rl.export``."""

    to: str = option(
        "merged", "adapter (as it is), merged (one set of weights), huggingface (for transformers), or onnx"
    )
    out: str = option(
        "", "new folder, or FILE.onnx; empty writes none where the policy is pushed, and NAME.onnx for onnx"
    )
    push: str = option("", "USER/NAME of a repository on the Hugging Face hub; created if missing")
    private: bool = option(False, "make the repository private")
    policy: PolicyOptions = group(PolicyOptions, "what to export")

    def __post_init__(self) -> None:
        one_of(TARGETS, to=self.to)
        if not (self.out or self.push or self.to == "onnx"):
            raise UserError("No output given: name a folder with out=, or a hub repository with push=USER/NAME.")
        if self.push and not HUB_ID.fullmatch(self.push):
            raise UserError(f"push={self.push}: expected USER/NAME.")


register("export", ExportConfig, {})


def export(config: ExportConfig) -> None:
    """Write the folder, and push it where asked to."""
    check_has_no_demonstrations(config.policy)
    with TemporaryDirectory() as temporary:
        named = config.out or ("" if config.push else expanded(config.policy.path).absolute().name + ONNX_SUFFIX)
        out = expanded(named) if named else Path(temporary) / "policy"
        check_new(out)
        pushed = out
        if config.to == "onnx":
            pushed = Path(temporary) / "pushed"
            out = write_onnx(out, pushed, config)
        else:
            write_exported(out, config)
        if named:
            say(f"Policy: {out}")
        if config.push:
            say(f"Pushed: {push_folder(pushed, config.push, config.private)}")


def write_exported(out: Path, config: ExportConfig) -> None:
    """Write the policy in the form that ``to`` names, with its model card."""
    if config.to == "adapter":
        others = [f.name for f in fields(PolicyOptions) if f.name != "path"]
        if changed := [name for name in others if getattr(config.policy, name) != getattr(PolicyOptions, name)]:
            given = ", ".join(f"policy.{name}" for name in changed)
            raise UserError(f"to=adapter copies a policy as it is: leave out {given}, or use to=merged.")
        copy_policy(config.policy.path, out)
        return
    policy = open_exported(config.policy, merge=True)
    card = card_of(policy, config.policy.path, config.to)
    if config.to == "huggingface":
        export_huggingface(policy, out)
        (out / CARD_FILE).write_text(card)
        return

    def write(aside: Path) -> None:
        write_policy_files(aside, policy, None, torch.float32)
        (aside / CARD_FILE).write_text(card)

    write_folder(out, write)


def open_exported(options: PolicyOptions, *, merge: bool) -> AdaptedPolicy:
    """The policy; a target return that is given is that of all tasks."""
    policy = open_policy(options, torch.device("cpu"), merge=merge)
    if options.target_return is not None:
        policy.conditioning = Conditioning(options.target_return)
    return policy


def copy_policy(name_or_path: str, out: Path) -> None:
    """Copy a policy folder with its adapter, after reading all of it.

    Raises:
        UserError: It is damaged, or no folder.
    """
    folder = find_policy(name_or_path)
    if not folder.is_dir():
        raise UserError(f"{name_or_path} is a file of weights. Use to=merged or to=huggingface.")
    policy = load_policy(folder)

    def write(aside: Path) -> None:
        copy_files(folder, aside, FOLDER_FILES, _hub_store(folder))
        if not (aside / CARD_FILE).exists():
            (aside / CARD_FILE).write_text(card_of(policy, name_or_path, "adapter"))

    write_folder(out, write)


def _hub_store(folder: Path) -> Path | None:
    """Where the hub's cache keeps the files that a downloaded folder links to."""
    repository = folder.absolute().parent.parent
    return repository / "blobs" if folder.parent.name == "snapshots" else None


def write_onnx(out: Path, folder: Path, config: ExportConfig) -> Path:
    """Write the policy as one ONNX file, after acting with it beside torch.

    Args:
        out: The file; its suffix may be left out.
        folder: A new folder, for what is pushed: the file and its model card.
        config: What to export.

    Returns:
        The file.

    Raises:
        UserError: See :func:`eva_rl.agents.onnx.export_onnx`.
    """
    from eva_rl.agents.onnx import export_onnx  # needs an extra

    path = out if out.suffix == ONNX_SUFFIX else out.with_name(out.name + ONNX_SUFFIX)
    check_new(path)
    policy = open_exported(config.policy, merge=False)
    hashes = {"base_sha256": policy.adapters.base_sha256, "adapter_sha256": _adapter_digest(config.policy.path)}
    policy.adapters.merge_and_unload()
    facts = finetuning_of(policy) or {}
    difference = export_onnx(policy, path, {"policy": config.policy.path, **hashes, "protocol": facts.get("protocol")})
    say(f"Checked against torch: actions differ by at most {difference:.1e} of half their range.")
    folder.mkdir()
    shutil.copyfile(path, folder / ONNX_FILE)
    (folder / CARD_FILE).write_text(card_of(policy, config.policy.path, "onnx"))
    return path


def _adapter_digest(name_or_path: str) -> str:
    """SHA-256 of the adapter's weights; "" without one."""
    weights = find_policy(name_or_path) / ADAPTER_FOLDER / ADAPTER_WEIGHTS
    return sha256(weights) if weights.exists() else ""


def finetuning_of(policy: DecisionTransformerPolicy) -> Mapping[str, Any] | None:
    """What the policy remembers of the run that made it; None where nothing is a model card's."""
    facts = policy.metadata.get("finetuning")
    return facts if isinstance(facts, Mapping) and facts.keys() >= NEEDED else None


def card_of(policy: DecisionTransformerPolicy, name: str, form: str) -> str:
    """Model card from what the policy remembers of its making."""
    facts = finetuning_of(policy)
    return pretrained_card(name, policy.metadata, form) if facts is None else model_card(facts, form)


def push_folder(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder to the Hugging Face hub, as whom ``hf auth login`` or HF_TOKEN says.

    Returns:
        Address of the repository.

    Raises:
        UserError: No network, no leave, or no such user.
    """
    from huggingface_hub import HfApi  # slow to import, and rarely needed
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A policy of eva-rl")
        return str(url)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"push={repository}: {lines[0] if lines else type(error).__name__} Without a network or a login (`hf auth "
            "login`, or HF_TOKEN), write it with out= and upload the folder from elsewhere."
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("export", export, HELP, argv)


if __name__ == "__main__":
    raise SystemExit(main())
