"""Run directories: made, recognised, continued, and never overwritten."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from eva_rl._version import __version__
from eva_rl.configs.groups import RunOptions
from eva_rl.distributed import ProcessGroup, init_distributed, is_torchrun, local_rank, local_world_size
from eva_rl.errors import UserError
from eva_rl.files import read_json, write_file, write_json
from eva_rl.seeding import seed_everything

if TYPE_CHECKING:
    pass


CONFIG_FILE, SUMMARY_FILE = "config.yaml", "summary.json"
FREE_BYTES = 200 * 2**20
"""A run that would start with less room on its disk is refused."""
FREE_TO_CHANGE = {"run_dir", "resume", "threads", "device", "checkpoint", "tracker", "video"}
"""Keys in which a continued run may differ from its first part."""
FREE_IN_GROUPS = {"accumulate", "compile"}
"""The same, within groups: what fits a machine and changes no result."""


NOT_SHOWN = {"run_dir", "resume", "threads", "device", "tracker", "video", "checkpoint"}
"""Settings that say nothing about a result."""
SHORT = {"adapter": "adapter.method", "algo": "algo.name", "env": "env.id", "rank": "adapter.rank", "seed": "seed"}
"""Settings by which runs are told apart most often."""


def open_run(name: str, options: Any) -> Path:
    """Make or recognise the run directory of a command and note its config.

    Args:
        name: The command, for the name of a new folder.
        options: The whole config; a :class:`RunOptions` dataclass.

    Raises:
        UserError: The folder holds a finished run, an unfinished one with other settings, or something else.
    """
    return ProcessGroup.current().broadcast_object(lambda: _open(name, options))


def _open(name: str, options: Any) -> Path:
    run_dir = Path(options.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}").expanduser()
    config = asdict(options)
    if (run_dir / SUMMARY_FILE).exists():
        raise UserError(f"{run_dir} holds a finished run, which is not overwritten. Name another run_dir=.")
    if (run_dir / CONFIG_FILE).exists():
        _continue(run_dir, config, options.resume)
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir} is not empty and holds no run of eva-rl. Name another run_dir=.")
    _make(run_dir)
    if not (run_dir / CONFIG_FILE).exists():
        text = f"# python -m eva_rl.{name}\n{OmegaConf.to_yaml(OmegaConf.create(config))}"
        write_file(run_dir / CONFIG_FILE, lambda aside: aside.write_text(text))
        write_json(run_dir / "versions.json", versions())
    return run_dir


def _continue(run_dir: Path, config: Mapping[str, Any], resume: str) -> None:
    """Accept the settings that a run began with, or any where it ended before its first checkpoint."""
    if resume == "never":
        raise UserError(f"{run_dir} holds an unfinished run. Continue it with resume=auto, or name another run_dir=.")
    changed = changed_settings(run_dir, config)
    if changed and not (run_dir / "checkpoint").exists():
        (run_dir / CONFIG_FILE).unlink()
        if {"env", "data"} & set(changed):
            shutil.rmtree(run_dir / "data", ignore_errors=True)
    elif changed:
        raise UserError(
            f"{run_dir} holds an unfinished run with other settings of {', '.join(changed)} (see {CONFIG_FILE} there). "
            "Use the same settings to continue it, or name another run_dir=."
        )


def changed_settings(run_dir: Path, config: Mapping[str, Any]) -> list[str]:
    """Keys in which a run's config differs from another, of those that decide its result."""
    before = OmegaConf.to_container(OmegaConf.load(run_dir / CONFIG_FILE))
    assert isinstance(before, dict)
    return [key for key in config if key not in FREE_TO_CHANGE and _kept(before.get(key)) != _kept(config[key])]


def _kept(value: Any) -> Any:
    """A setting, or a group of settings without those that may change."""
    return {k: v for k, v in value.items() if k not in FREE_IN_GROUPS} if isinstance(value, dict) else value


def _make(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        raise UserError(f"{run_dir} cannot be made: {error}. Name another run_dir=.") from error
    if free < FREE_BYTES:
        raise UserError(
            f"{run_dir}: {free / 2**20:.0f} MiB are free on its disk, a run needs {FREE_BYTES / 2**20:.0f} MiB. "
            "Free some room, or name a run_dir= on another disk."
        )


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``, which marks a run as finished."""
    write_json(run_dir / SUMMARY_FILE, summary)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Read ``summary.json``."""
    summary: dict[str, Any] = read_json(run_dir / SUMMARY_FILE)
    return summary


def prepare_machine(options: RunOptions) -> torch.device:
    """Seed the global generators, set the CPU threads, choose the device, and meet the run's other processes.

    Raises:
        UserError: The device is not there, or the other processes do not come.
    """
    seed_everything(options.seed)
    torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) // local_world_size()))
    device = _device(options)
    init_distributed(device)
    return device


def _device(options: RunOptions) -> torch.device:
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and is_torchrun():
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name}: {reason} Use device=auto, cpu or cuda.") from error
    return device


def versions() -> dict[str, str]:
    """Versions and machine that a result depends on."""
    packages = ("torch", "numpy", "gymnasium", "metaworld", "mujoco", "stable-baselines3", "peft")
    return {
        "eva-rl": __version__,
        "git": _git_revision(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
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


def shown(config: Any) -> dict[str, Any]:
    """The settings of a run, flat; TensorBoard's table of runs shows the first five, in alphabetical order."""
    settings = {key: value for key, value in _flat(asdict(config)) if key.partition(".")[0] not in NOT_SHOWN}
    short = {name: settings.pop(key) for name, key in SHORT.items() if key in settings}
    return short | {f"settings/{key}": value for key, value in settings.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | dict):
            yield prefix + key, ", ".join(map(str, value))
        else:
            yield prefix + key, value
