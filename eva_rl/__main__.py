"""``eva-rl NAME`` and ``python -m eva_rl NAME``: the commands under one name."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from eva_rl._version import __version__
from eva_rl.errors import UnknownNameError

COMMANDS = {
    "finetune": "fine-tune a pretrained policy on a task",
    "evaluate": "evaluate a policy on held-out episodes",
    "pretrain": "train a Decision Transformer from demonstrations",
    "collect": "collect demonstrations",
    "datasets": "list, convert and inspect data sets",
    "export": "write a policy in another format",
    "benchmark": "compare methods over tasks and seeds",
    "report": "compare finished runs",
    "doctor": "check this machine: versions, device, renderer, threads, speed",
}
"""What each command does, the main one first."""
PACKAGES = ("benchmark", "finetune", "report")
"""Commands that are packages of their own; the others are one module."""
USAGE = """eva-rl COMMAND [KEY=VALUE ...]

{rows}

eva-rl COMMAND --help         the keys of a command
eva-rl --version
eva-rl --completion SHELL     completion for bash, zsh or fish
"""


def command_module(name: str) -> ModuleType:
    """The module of a command, which holds its ``main(argv)`` and ``HELP``."""
    return import_module(f"eva_rl.{name}.command" if name in PACKAGES else f"eva_rl.{name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by the first argument on the others."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        sys.path.append(os.getcwd())  # where a module of env=module:Env-v0 may lie, as with python -m
        status: int = command_module(name).main(rest)
        return status
    if name in ("--version", "-V", "version"):
        sys.stdout.write(f"eva-rl {__version__}\n")
    elif name in ("--help", "-h", "help"):
        rows = "\n".join(f"  {command:10} {text}" for command, text in COMMANDS.items())
        sys.stdout.write(USAGE.format(rows=rows))
    elif name == "--completion":
        return print_completion(rest)
    else:
        sys.stderr.write(f"Error: {UnknownNameError('command', name, COMMANDS, 'Type `eva-rl --help`.')}\n")
        return 2
    return 0


def print_completion(words: Sequence[str]) -> int:
    """Write a shell's completion script."""
    from eva_rl.adapters.methods import METHODS
    from eva_rl.cli.completion import SHELLS, completion
    from eva_rl.cli.help import shipped
    from eva_rl.cli.parsing import COMMANDS as REGISTERED
    from eva_rl.envs.names import METAWORLD_TASKS, TASK_SETS, task_list

    if len(words) != 1 or words[0] not in SHELLS:
        sys.stderr.write(f"Error: --completion takes one of {', '.join(SHELLS)}.\n")
        return 2
    for name in COMMANDS:
        command_module(name)
    tasks = [*(task.removeprefix("metaworld/") for task in METAWORLD_TASKS), *task_list()[len(METAWORLD_TASKS) :]]
    values = {
        "env": [*tasks, *TASK_SETS],
        "tasks": [*tasks, *TASK_SETS],
        "adapter": list(METHODS),
        "algo": list(REGISTERED["finetune"].choices["algo"]),
        "policy": list(shipped()),
        "device": ["auto", "cpu", "cuda"],
    }
    sys.stdout.write(completion(words[0], values))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
