"""Files of weights: read without running anything that is in them, and held against what is expected."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eva_rl.errors import UserError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: No such file, or it is damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged: {error}.") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors that were written by ``torch.save``, with the reader that takes nothing but tensors.

    Raises:
        UserError: The file holds something else, which would run code while it is read, or is damaged.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} is not a plain file of tensors ({str(error).splitlines()[0]}). Only state dicts are read from "
            "pickles. Load it where it came from, and write its state_dict() with safetensors.torch.save_file."
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} holds no state dict (names to tensors). Save model.state_dict() alone.")
    return loaded


def check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str, against: str) -> None:
    """Hold weights against what an architecture takes.

    Args:
        found: By name.
        expected: By name; only the shapes matter, meta tensors will do.
        where: The file, for the message.
        against: What ``expected`` comes from, for the message.

    Raises:
        UserError: A weight is missing, is not part of the architecture, or has another shape.
    """
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of the architecture" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{where} does not fit {against}: {'; '.join(problems[:5])}{more}.")
