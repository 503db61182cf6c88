"""``torch.compile``, with an error that says what it lacks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from eva_rl.errors import UserError


def compiled(network: nn.Module, mode: str) -> Callable[..., Any]:
    """The network as a call that is compiled at its first use; its parameters stay where they are.

    Args:
        network: What to compile.
        mode: ``none`` gives the network itself; else torch.compile's ``default`` or ``reduce-overhead`` (CUDA graphs).

    Raises:
        UserError: There is no C++ compiler, which torch.compile needs on a CPU.
    """
    if mode == "none":
        return network
    check_compiler(mode, next(network.parameters()).device)
    call: Callable[..., Any] = torch.compile(network, mode=None if mode == "default" else mode, dynamic=False)
    return call


def check_compiler(mode: str, device: torch.device, key: str = "compile") -> None:
    """Raise unless torch.compile can do what is asked on the device.

    Args:
        mode: See :func:`compiled`.
        device: Of the network.
        key: What a user types to choose the mode.

    Raises:
        UserError: There is no C++ compiler.
    """
    if mode != "none" and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UserError(
            f"{key}={mode}: torch.compile needs a C++ compiler on a CPU, and there is none. Install g++, or use "
            f"{key}=none."
        )
