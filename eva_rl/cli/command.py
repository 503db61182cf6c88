"""Run a command: help, sweeps, and one clear message for a user's mistake."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from rich.logging import RichHandler
from rich.markup import escape

from eva_rl._version import __version__
from eva_rl.cli.console import console, say
from eva_rl.cli.help import print_help
from eva_rl.cli.parsing import Config, parse, without_dashes
from eva_rl.cli.values import unquoted
from eva_rl.errors import TerminatedError, UserError

MULTIRUN = {"--multirun", "-m"}
"""Flags that start one run for each combination of values, as with Hydra."""


def run_command(
    name: str,
    main: Callable[[Config], None],
    help_text: str,
    argv: Sequence[str] | None = None,
    *,
    multirun: str = "",
    continues: bool = False,
) -> int:
    """Run a command; a user's mistake ends it with one message and status 2.

    Args:
        name: The command.
        main: What to do with the config.
        help_text: What the command does, with examples.
        argv: Overrides; None takes the command line's.
        multirun: The module whose function ``multirun`` runs a sweep of the command, where it can be swept.
        continues: Whether the command continues what it began in ``run_dir=`` or ``out=``.

    Returns:
        Exit status.
    """
    overrides = list(sys.argv[1:] if argv is None else argv)
    process = os.environ.get("RANK", "0") if "WORLD_SIZE" in os.environ else "0"
    console.quiet = process != "0"  # of the processes of one run, the first alone speaks
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False, show_time=False)],
    )
    for name_of_logger in ("httpx", "OpenGL"):  # they would tell of each request to the hub, and of optional modules
        logging.getLogger(name_of_logger).setLevel(logging.WARNING)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it would warn of each attempt, twice; the last one raises
    if any(flag in overrides for flag in ("--help", "-h")):
        print_help(name, help_text, overrides)
        return 0
    if "--version" in overrides:
        sys.stdout.write(f"eva-rl {__version__}\n")
        return 0
    named = ""
    try:
        named = _new_folder(name, overrides) if multirun else ""
        _run(name, main, [*overrides, f"run_dir={named}"] if named else overrides, multirun)
    except UserError as error:
        where = f" (process {process})" if console.quiet else ""
        console.quiet = False
        say(f"[bold red]Error{where}:[/] {escape(str(error))}", markup=True)
        return 2
    except KeyboardInterrupt as interruption:
        say(f"Interrupted.{_how_to_continue(named) if continues else ''}")
        if isinstance(interruption, TerminatedError):
            raise SystemExit(128 + signal.SIGTERM) from interruption  # also ends a program that called the command
        return 130
    return 0


def _run(name: str, main: Callable[[Config], None], overrides: Sequence[str], multirun: str) -> None:
    """Run the command once, or a sweep of it."""
    if MULTIRUN & set(overrides):
        if not multirun:
            raise UserError(f"--multirun sweeps finetune and pretrain, not {name}.")
        import_module(multirun).multirun(name, [word for word in overrides if word not in MULTIRUN])
        return
    config = parse(name, overrides)
    from eva_rl.training.failures import sigterm_like_ctrl_c  # takes seconds, which a mistake does not wait for

    with sigterm_like_ctrl_c():
        main(config)


def new_run_dir(name: str) -> str:
    """The run directory of a command, or of a sweep, that was given none."""
    return f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def typed_run_dir(typed: Sequence[str]) -> str:
    """The last value of ``run_dir=``; empty where there is none."""
    given = [unquoted(word.removeprefix("run_dir=")) for word in typed if word.startswith("run_dir=")]
    return given[-1] if given else ""


def _new_folder(name: str, overrides: Sequence[str]) -> str:
    """A new run directory; empty where one was typed."""
    typed = without_dashes(name, [word for word in overrides if word not in MULTIRUN])
    if typed_run_dir(typed):
        return ""
    return new_run_dir("multirun" if MULTIRUN & set(overrides) else name)


def _how_to_continue(named: str) -> str:
    """What to type after an interruption.

    Args:
        named: The run directory that the command was given here; empty where the user gave one.
    """
    if named and not Path(named).exists():
        return ""
    same = f"the same command with run_dir={named}" if named else "the same command again"
    return f" Type {same} to continue from the last checkpoint, or from the start where there is none yet."
