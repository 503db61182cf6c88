"""The machine that a command runs on: its device, its threads, and the versions of what is installed."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from eva_rl._version import __version__
from eva_rl.cli.console import say
from eva_rl.configs.groups import MachineOptions
from eva_rl.distributed import init_distributed, is_torchrun, local_rank, local_world_size
from eva_rl.envs.deadline import limit_calls
from eva_rl.envs.names import TIMEOUT
from eva_rl.errors import UserError, counted
from eva_rl.limits.threads import thread_limits
from eva_rl.seeding import seed_everything


def prepare_machine(options: MachineOptions, env_timeout: float = TIMEOUT) -> torch.device:
    """Seed the global generators, set the CPU threads, choose the device, and meet the run's other processes.

    Args:
        options: What the command was given.
        env_timeout: Seconds that one call of an environment may take from here on.

    Raises:
        UserError: The device is not there, or the other processes do not come.
    """
    seed_everything(options.seed)
    limit_calls(env_timeout)
    limits = thread_limits()
    threads = options.threads or limits.of_each(local_world_size())
    torch.set_num_threads(threads)
    device = choose_device(options.device)
    init_distributed(device)
    reason = "set by threads=" if options.threads else str(limits)
    say(f"Device {device}, {counted(threads, 'CPU thread')} ({reason}).")
    return device


def choose_device(name: str) -> torch.device:
    """The device of a name; ``auto`` takes a GPU where there is one.

    Raises:
        UserError: It is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and is_torchrun():
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name}: {reason.rstrip('.')}. Use device=auto, cpu or cuda.") from error
    return device


def versions() -> dict[str, str]:
    """Versions and machine that a result depends on."""
    packages = ("torch", "numpy", "gymnasium", "metaworld", "mujoco", "stable-baselines3", "peft")
    return {
        "eva-rl": __version__,
        "git": _git_revision(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {counted(thread_limits().cpus, 'CPU')}",
        **{name: _version(name) for name in packages},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git_revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
