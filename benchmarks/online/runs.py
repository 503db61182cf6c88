"""What the benchmarks of online learning share: a record for each run, and a table of all of them."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import pages
from eva_rl.report.page import markdown_table, terminal_table
from eva_rl.report.tables import Table

Record = dict[str, Any]


def finetuned(run_dir: Path, words: Sequence[str]) -> Record:
    """Run the command in a run directory; returns its summary."""
    from eva_rl.cli.run_dir import read_summary
    from eva_rl.finetune.command import main

    if status := main([*words, f"run_dir={run_dir}"]):
        raise SystemExit(status)
    return read_summary(run_dir)


def keep_record(arguments: argparse.Namespace, name: str, make: Callable[[Path], Record]) -> None:
    """Make a run's record, unless it is there, and remove the run directory unless it is to be kept."""
    path, run_dir = arguments.out / f"{name}.json", arguments.out / name
    if path.exists():
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = make(run_dir)
    path.write_text(json.dumps(record, indent=1) + "\n")
    if not arguments.keep:
        shutil.rmtree(run_dir, ignore_errors=True)


def publish(
    arguments: argparse.Namespace, show: Callable[[Sequence[Record]], Table], marks: tuple[str, str]
) -> Sequence[Record]:
    """Show the table of a folder's records; write them to one file, and the table to a page, where asked to."""
    records = pages.json_records(arguments.folder)
    shown = show(records)
    Console(width=140).print(terminal_table(shown, 140))
    if arguments.out:
        arguments.out.write_text(json.dumps(records, indent=1) + "\n")
    if arguments.page:
        pages.write_between(arguments.page, *marks, markdown_table(shown))
    return records


def parsers(about: str, *more: str) -> list[argparse.ArgumentParser]:
    """The command, its ``run``, its ``table`` and ``more`` that show records, with the arguments that all take."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one, *tables = (commands.add_parser(name) for name in ("run", "table", *more))
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--keep", action="store_true", help="keep the run directory")
    one.add_argument("--settings", nargs="*", default=[], help="further KEY=VALUE of finetune")
    for shown in tables:
        shown.add_argument("folder", type=Path, help="of records, or a file that --out wrote")
        shown.add_argument("--out", type=Path, help="one file of all records")
        shown.add_argument("--page", type=Path, help="rewrite the table of a page")
    return [parser, one, *tables]
