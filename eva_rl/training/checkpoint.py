"""Checkpoints of a training run: atomic, checked, the last few kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eva_rl.errors import UserError
from eva_rl.files import FILES, SEAL, check_files, check_seal, read_json, sealed, sha256, write_folder, write_json
from eva_rl.schema import DIGEST, Integer, MapOf, Record, Text

log = logging.getLogger(__name__)

TENSORS_FILE, RECORD_FILE = "state.safetensors", "state.json"
RECORD = Record(
    {"step": Integer(0), "record": Record({}, others=True), SEAL: Text(DIGEST)}, {FILES: MapOf(Text(DIGEST))}
)
KEEP = 2


@dataclass(frozen=True)
class TrainState:
    """Everything a resumed run needs.

    Attributes:
        step: Gradient steps done.
        tensors: Parameters, optimiser moments, random-number states, by name.
        record: Counters and whatever else is not a tensor, as JSON values.
    """

    step: int
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]


def save_checkpoint(folder: Path, state: TrainState, keep: int = KEEP) -> None:
    """Write ``folder/step_<n>``, completely or not at all, then remove all but the newest ``keep``.

    Raises:
        UserError: The disk is full or not writable; older checkpoints are as they were.
    """
    write_folder(folder / f"step_{state.step:09d}", lambda aside: _write(aside, state))
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _write(aside: Path, state: TrainState) -> None:
    save_file({k: v.detach().cpu().contiguous() for k, v in state.tensors.items()}, aside / TENSORS_FILE)
    record = {"step": state.step, "record": state.record}
    write_json(aside / RECORD_FILE, sealed(record, aside, [TENSORS_FILE]))


def load_latest_checkpoint(folder: Path) -> TrainState | None:
    """Read the newest whole checkpoint; a damaged one is reported and the one before it used.

    Returns:
        The state, or None where there is no checkpoint.

    Raises:
        UserError: There are checkpoints, and all are damaged.
    """
    found = _checkpoints(folder)
    for path in reversed(found):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, SafetensorError, UserError) as error:
            log.warning("%s is damaged (%s); trying the checkpoint before it.", path, error)
    if found:
        raise UserError(f"All checkpoints in {folder} are damaged. Start afresh with another run_dir.")
    return None


def _read(path: Path) -> TrainState:
    record = read_json(path / RECORD_FILE, RECORD)
    if FILES in record:
        check_seal(record, path / RECORD_FILE)
        check_files(record, path, [TENSORS_FILE], path / RECORD_FILE)
    elif sha256(path / TENSORS_FILE) != record[SEAL]:  # written before the record was under a checksum itself
        raise ValueError("its checksum does not match")
    return TrainState(record["step"], load_file(path / TENSORS_FILE), record["record"])


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Moments and step counts of an optimiser, named by parameter.

    Args:
        optimizer: The optimiser.
        names: Name of each parameter by its ``id``.
    """
    return {
        f"optimizer/{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put moments and step counts back where :func:`optimizer_tensors` took them."""
    for name, parameter in parameters.items():
        prefix = f"optimizer/{name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if state:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }
