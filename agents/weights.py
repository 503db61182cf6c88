"""Files of weights: read without running anything that is in them, and held against what is expected."""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eva_rl.agents.decision_transformer import DecisionTransformerConfig
from eva_rl.errors import UserError
from eva_rl.files import regular_size

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types of weights that are read; integers and float8 hold a quantised network, whose scales are elsewhere."""
LARGEST_WEIGHT = 1e4
"""Far above what training gives, and what a few layers make of it is within float32."""
SMALLEST_FLOAT = 2
"""Bytes."""
LONGEST_CONTEXT = 4096
"""Env steps; a longer context needs a table of timesteps that is as long."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: No such file, or it is damaged.
    """
    try:
        regular_size(path)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged: {error}.") from error
    except (KeyError, ValueError) as error:  # a type of tensor that this version of torch lacks
        raise UserError(f"{path} holds tensors of a type that is not read: {error}.") from error


def check_size(config: DecisionTransformerConfig, path: Path, against: str) -> None:
    """Raise, before anything is built, if an architecture is larger than its file of weights.

    Args:
        config: The architecture.
        path: The file.
        against: Where the architecture comes from, for the message.

    Raises:
        UserError: The file is missing, or too small.
    """
    try:
        size = regular_size(path)
    except OSError as error:
        raise UserError(f"{path} is missing or damaged: {error}.") from error
    needed = SMALLEST_FLOAT * least_parameters(config)
    if needed > size:
        raise UserError(
            f"{path} has {size:,} bytes; the architecture in {against} takes {needed:,} at least. One of them is "
            "damaged, or belongs to another policy."
        )
    if config.context_length > max(LONGEST_CONTEXT, config.max_timestep):
        raise UserError(
            f"{against}: context_length={config.context_length:,}; expected at most {LONGEST_CONTEXT:,}, or as many as "
            f"there are timesteps ({config.max_timestep:,})."
        )


def least_parameters(config: DecisionTransformerConfig) -> int:
    """Numbers in the weight matrices of an architecture, a little less than all of its parameters."""
    D = config.hidden_size
    block = 4 * D * D + 2 * D * (config.inner_size or 4 * D)
    ends = D * (config.observation_dim + 2 * config.action_dim + config.max_timestep)
    return ends + config.num_layers * block


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors that were written by ``torch.save``, with the reader that takes nothing but tensors.

    Raises:
        UserError: The file holds something else, which would run code while it is read, or is damaged.
    """
    return read_checkpoint(path)[0]


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read a state dict, or the one inside a training checkpoint, with the reader that takes nothing but arrays.

    Returns:
        The weights, and the statistics of observations that lie beside them, as keys of ``ImportOptions``.

    Raises:
        UserError: The file holds something else, which would run code while it is read, or is damaged.
    """
    try:
        size = regular_size(path)
        _check_pickle(path, size)
        with torch.serialization.safe_globals(_ARRAYS):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _NOT_TENSORS as error:
        raise UserError(
            f"{path} is not a plain file of tensors ({first_line(error)}). Only state dicts are read from "
            "pickles. Load it where it came from, and write its state_dict() with safetensors.torch.save_file."
        ) from error
    around = loaded if isinstance(loaded, dict) else {}
    weights = next((around[key] for key in STATE_KEYS if isinstance(around.get(key), dict)), loaded)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds no state dict (names to tensors). Save model.state_dict() alone.")
    statistics = {ours: torch.as_tensor(around[name]) for name, ours in STATISTICS.items() if name in around}
    if sum(value.numel() * value.element_size() for value in (*weights.values(), *statistics.values())) > 2 * size:
        raise UserError(
            f"{path} has {size:,} bytes, and its tensors claim more: they repeat their numbers. Save copies."
        )
    return dict(weights), statistics


STATE_KEYS = ("model_state_dict", "model_state", "state_dict", "model")
"""Where training checkpoints keep the network."""
STATISTICS = {"state_mean": "observation_mean", "state_std": "observation_std"}
_RECONSTRUCT: Any = np.zeros(1).__reduce__()[0]
_ARRAYS: list[Any] = [
    *(_RECONSTRUCT, (_RECONSTRUCT, "numpy.core.multiarray._reconstruct")),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64, np.int32, np.uint32)),
]
"""NumPy arrays, which checkpoints keep statistics and the states of generators in."""


def _check_pickle(path: Path, size: int) -> None:
    """Raise unless the pickles in a file of ``torch.save`` name tensors and nothing else, and unpack to their size.

    Raises:
        ValueError: Saying what they name; or the file is damaged.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                _check_globals(file)
        return
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > 2 * size:
            raise ValueError("it unpacks to more than twice its size")
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        with archive.open(pickled) as file:
            _check_globals(file)


def _check_globals(file: IO[bytes]) -> None:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in {"STACK_GLOBAL", "INST"} or (
            opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument))
        ):
            raise ValueError(f"it names {argument or 'something'}")


_LEGACY_PICKLES = 4
"""Before PyTorch 1.6: a magic number, the protocol, the system and the objects."""
_GLOBALS = re.compile(
    r"collections OrderedDict|numpy(\._?core\.multiarray)? (_reconstruct|ndarray|dtype)|_codecs encode"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (Double|Float|Half|BFloat16|Bool|Byte|Long|Int|Short|Char)Storage|torch\.storage \w+Storage"
)
_NOT_TENSORS = (
    *(OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError),
    *(AttributeError, IndexError, KeyError, TypeError, AssertionError, MemoryError, OverflowError),
    *(NotImplementedError, RecursionError, zipfile.BadZipFile, zlib.error),
)
"""What torch's reader raises on a file that is damaged, or holds something else."""
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def first_line(error: Exception) -> str:
    """First line of a library's message, without the codes that colour it, or the error's kind."""
    lines = [line.strip() for line in _ESCAPES.sub("", str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str, against: str) -> None:
    """Hold weights against what an architecture takes.

    Args:
        found: By name.
        expected: By name; only the shapes matter, meta tensors will do.
        where: The file, for the message.
        against: What ``expected`` comes from, for the message.

    Raises:
        UserError: A weight is missing, is not part of the architecture, has another shape, no floating-point type, or
            numbers that are not finite.
    """
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of the architecture" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    problems += value_problems(found)
    if problems:
        raise UserError(f"{where} does not fit {against}: {listed(problems)}.")


def listed(problems: Sequence[str]) -> str:
    """The first five of them, and how many more there are."""
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


def value_problems(weights: Mapping[str, Tensor]) -> list[str]:
    """What keeps tensors from being weights: their type, or numbers that float32 does not hold; a sentence each."""
    problems = [
        f"{name} is {str(value.dtype).removeprefix('torch.')}, expected float32, float16 or bfloat16"
        for name, value in weights.items()
        if value.dtype not in FLOATS
    ]
    for name, value in weights.items():
        if value.dtype in FLOATS and value.numel():
            largest = float(value.float().abs().max())  # NaN if there is one
            if not largest <= LARGEST_WEIGHT:
                kind = f"up to {largest:.3g}, expected at most {LARGEST_WEIGHT:g}"
                problems.append(f"{name} holds numbers {kind if math.isfinite(largest) else 'that are not finite'}")
    return problems
