"""Decision Transformers of other projects, in and out: Hugging Face's folders and the original state dicts."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eva_rl.agents.decision_transformer import DecisionTransformer, DecisionTransformerConfig
from eva_rl.agents.huggingface.gym_cards import card_of
from eva_rl.agents.huggingface.layout import (
    POSITIONS,
    UNUSED,
    absorb_action_units,
    absorb_quirks,
    architecture,
    complete_config,
    from_huggingface,
    huggingface_config,
    to_huggingface,
)
from eva_rl.agents.huggingface.options import ImportOptions, scaling_and_target
from eva_rl.agents.huggingface.state_dicts import StateDict, recognise
from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.agents.policy_record import policy_record, read_record
from eva_rl.agents.weights import (
    PICKLE_SUFFIXES,
    check_size,
    check_weights,
    listed,
    read_checkpoint,
    read_safetensors,
    read_state_dict,
    value_problems,
)
from eva_rl.errors import UserError
from eva_rl.files import check_files, expanded, read_json, sealed, write_folder, write_json

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
COMPANION_FILE = "eva_rl.json"
"""Written beside an exported model: everything that Hugging Face's files have no place for."""
SAFETENSORS_FILE, PICKLE_FILE = "model.safetensors", "pytorch_model.bin"


def read_huggingface(folder: Path, options: ImportOptions) -> DecisionTransformerPolicy:
    """Load a folder of Hugging Face's ``DecisionTransformerModel``; transformers is not needed.

    Args:
        folder: Holds config.json and model.safetensors (or pytorch_model.bin, of which only tensors are read).
        options: What the folder does not say.

    Raises:
        UserError: Another architecture, weights that do not fit, or an unknown normalisation or target return.
    """
    where = str(folder / CONFIG_FILE)
    full = complete_config(read_json(folder / CONFIG_FILE), where)
    _check_known(options, full, where)
    facts = options.merged_with(_companion(folder) or card_of(folder))
    config = architecture(full, int(facts["context_length"]), where)
    if (folder / SAFETENSORS_FILE).is_file() or not (folder / PICKLE_FILE).is_file():
        path = folder / SAFETENSORS_FILE
        weights = read_safetensors(path)
    else:
        path = folder / PICKLE_FILE
        weights = read_state_dict(path)
    return _build(weights, config, full, facts, path)


def _check_known(options: ImportOptions, full: Mapping[str, Any], where: str) -> None:
    """Raise where something else was given than a config says of the architecture."""
    for name, key in {"num_heads": "n_head", "activation": "activation_function"}.items():
        if (given := getattr(options, name)) not in {None, full[key]}:
            raise UserError(f"{name}={given}: {where} says {key}={full[key]}. Leave it out, or name another policy.")


def read_original(path: Path, options: ImportOptions) -> DecisionTransformerPolicy:
    """Load a state dict without a config: the original Decision Transformer's, online-dt's or CORL's.

    Args:
        path: A safetensors file, or with ``options.allow_pickle`` one of ``torch.save``.
        options: Everything but the shapes; heads and activation have their project's defaults.

    Raises:
        UserError: The file is of another kind, a pickle without permission, or does not fit.
    """
    known: Mapping[str, Any] = {}
    if path.suffix == ".safetensors":
        weights = read_safetensors(path)
    elif path.suffix == ".onnx":
        raise UserError(
            f"{path} acts without this command. In Python: eva_rl.evaluate_policy(eva_rl.agents.onnx.OnnxPolicy("
            f"{str(path)!r}), ENV); to evaluate here, name the policy that it was exported from."
        )
    elif path.suffix not in PICKLE_SUFFIXES:
        raise UserError(f"{path} is not a policy. Expected a folder, or a .safetensors file of a Decision Transformer.")
    elif options.allow_pickle:
        weights, known = read_checkpoint(path)
    else:
        raise UserError(
            f"{path} is a pickle, which is read only on request. Write its state_dict() with "
            "safetensors.torch.save_file, or read only the tensors in it: policy.allow_pickle=true, in Python "
            "options=ImportOptions(allow_pickle=True)."
        )
    found = recognise(weights, str(path))
    full = complete_config(_config_of_shapes(found, options, path), str(path))
    facts = options.merged_with({**known, "raw_actions": True} if found.raw_actions else known)
    config = architecture(full, int(facts["context_length"]), str(path))
    return _build(found.weights, config, full, facts, path, found.log_std_head)


def _config_of_shapes(found: StateDict, options: ImportOptions, path: Path) -> dict[str, Any]:
    weights = found.weights
    given = {"n_head": options.num_heads, "activation_function": options.activation}
    try:
        hidden, state = weights["embed_state.weight"].shape
        return {
            "model_type": "decision_transformer",
            "state_dim": state,
            "act_dim": weights["embed_action.weight"].shape[1],
            "hidden_size": hidden,
            "max_ep_len": weights["embed_timestep.weight"].shape[0],
            "n_layer": len([name for name in weights if re.fullmatch(r"encoder\.h\.\d+\.ln_1\.weight", name)]),
            "n_inner": weights["encoder.h.0.mlp.c_fc.weight"].shape[1],
            **found.defaults,
            **{key: value for key, value in given.items() if value is not None},
        }
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path} is not a Decision Transformer: {error} is missing or has the wrong shape.") from error


def _build(
    weights: Mapping[str, Tensor],
    config: DecisionTransformerConfig,
    full: Mapping[str, Any],
    facts: Mapping[str, Any],
    path: Path,
    log_std_head: Mapping[str, Tensor] | None = None,
) -> DecisionTransformerPolicy:
    check_size(config, path, "its config")
    used = {name: value for name, value in weights.items() if not UNUSED.fullmatch(name)}
    if problems := value_problems(used):
        raise UserError(f"{path}: {listed(problems)}. Save the network's weights as float32.")
    positions = used.pop(POSITIONS, None)
    expected = to_huggingface(DecisionTransformer.empty(config).state_dict(), config.num_layers)
    check_weights(used, expected, str(path), "its config")
    if positions is not None and positions.shape[1:] != (config.hidden_size,):
        raise UserError(f"{path}: {POSITIONS} has shape {tuple(positions.shape)}, expected (n, {config.hidden_size}).")
    state = from_huggingface({name: value.float() for name, value in used.items()}, config.num_layers)
    absorb_quirks(state, full, None if positions is None else positions[0].float())
    if log_std_head:
        config = replace(config, stochastic=True)
        state |= {name: value.float() for name, value in log_std_head.items()}
        check_weights(state, DecisionTransformer.empty(config).state_dict(), str(path), "its config")
    scaling, conditioning = scaling_and_target(facts, config, str(path))
    if facts.get("raw_actions", not config.action_tanh):
        absorb_action_units(state, scaling, head=not config.action_tanh)
    network = DecisionTransformer.with_weights(config, state)
    metadata = facts.get("metadata") or {"imported_from": path.parent.name}
    return DecisionTransformerPolicy(network, scaling, conditioning, env_id=facts["env_id"], metadata=metadata)


def _companion(folder: Path) -> dict[str, Any]:
    """The facts that :func:`export_huggingface` wrote beside a model, as keys of ``ImportOptions`` and more."""
    path = folder / COMPANION_FILE
    if not path.exists():
        return {}
    record, config, _, conditioning = read_record(path)
    check_files(record, folder, [CONFIG_FILE, SAFETENSORS_FILE], path)
    return {
        **record["scaling"],
        "context_length": config.context_length,
        "target_return": conditioning.target_return,
        "per_env": conditioning.per_env,
        "env_id": record.get("env_id", ""),
        "metadata": record.get("metadata"),
        "raw_actions": False,
    }


def export_huggingface(
    policy: DecisionTransformerPolicy, folder: str | Path, *, weights: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Write a folder that transformers' ``DecisionTransformerModel.from_pretrained`` loads.

    Normaliser, target returns and context length are written beside the model, so that ``load_policy`` gives the same
    policy back.

    Args:
        policy: What to write.
        folder: Where to; such a folder that was there is replaced.
        weights: The base network's weights where they are not ``policy.network.state_dict()``: merged ones, say.

    Returns:
        What the model in the folder does not have or does otherwise, a sentence each.

    Raises:
        UserError: Hugging Face's model cannot represent the policy, or the folder holds something else.
    """
    config = policy.network.config
    theirs = huggingface_config(config)
    state = {k: v.detach().cpu().float() for k, v in (weights or policy.network.state_dict()).items()}
    own = {name: value for name, value in state.items() if not name.startswith("log_std_head.")}
    expected = DecisionTransformer.empty(config).state_dict()
    check_weights(
        own, {k: v for k, v in expected.items() if not k.startswith("log_std_head.")}, "weights", "the policy"
    )
    notes = _notes(config)

    def write(aside: Path) -> None:
        save_file(_exported(own, config), aside / SAFETENSORS_FILE, metadata={"format": "pt"})
        write_json(aside / CONFIG_FILE, theirs)
        record = policy_record(policy) | {"notes": notes}
        write_json(aside / COMPANION_FILE, sealed(record, aside, [CONFIG_FILE, SAFETENSORS_FILE]))

    write_folder(expanded(folder), write, (CONFIG_FILE, SAFETENSORS_FILE, COMPANION_FILE, "README.md"))
    for note in notes:
        log.info("%s: %s", folder, note)
    return notes


def _exported(state: Mapping[str, Tensor], config: DecisionTransformerConfig) -> dict[str, Tensor]:
    """All weights of Hugging Face's model; what our network has no counterpart of is zero."""
    D, positions = config.hidden_size, config.context_length * config.tokens_per_step
    return to_huggingface(state, config.num_layers) | {
        POSITIONS: torch.zeros(positions, D),
        "encoder.wte.weight": torch.zeros(1, D),
        "predict_state.weight": torch.zeros(config.observation_dim, D),
        "predict_state.bias": torch.zeros(config.observation_dim),
        "predict_return.weight": torch.zeros(1, D),
        "predict_return.bias": torch.zeros(1),
    }


def _notes(config: DecisionTransformerConfig) -> list[str]:
    notes = [
        f"Inputs are scaled, and returns too, as {COMPANION_FILE} says; at most {config.context_length} env steps.",
        f"Timesteps from {config.max_timestep} on fail in transformers; eva-rl gives them the last embedding.",
        "The heads for states and returns are zero: the policy has none.",
    ]
    if config.stochastic:
        notes.append("The log-standard-deviation head is left out; the model gives the mean action.")
    return notes
