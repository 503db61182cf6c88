"""``eva-rl NAME`` and ``python -m eva_rl NAME``: the commands under one name."""

from __future__ import annotations

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
}
"""What each command does, the main one first."""
PACKAGES = ("benchmark", "finetune", "report")
"""Commands that are packages of their own; the others are one module."""


def command_module(name: str) -> ModuleType:
    """The module of a command, which holds its ``main(argv)`` and ``HELP``."""
    return import_module(f"eva_rl.{name}.command" if name in PACKAGES else f"eva_rl.{name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by the first argument on the others."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--version", "-V", "version"):
        sys.stdout.write(f"eva-rl {__version__}\n")
        return 0
    if name in ("--help", "-h", "help"):
        rows = "\n".join(f"  {command:10} {text}" for command, text in COMMANDS.items())
        sys.stdout.write(f"eva-rl COMMAND [KEY=VALUE ...]\n\n{rows}\n\neva-rl COMMAND --help shows its keys.\n")
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"Error: {UnknownNameError('command', name, COMMANDS, 'Type `eva-rl --help`.')}\n")
        return 2
    status: int = command_module(name).main(rest)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
