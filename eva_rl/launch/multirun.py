"""``--multirun``: one run for each combination of values, by Hydra's grammar, through our launchers."""

from __future__ import annotations

import hashlib
import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eva_rl.cli.command import new_run_dir, typed_run_dir
from eva_rl.cli.console import say
from eva_rl.cli.parsing import parse, without_dashes
from eva_rl.cli.run_dir import SUMMARY_FILE, changed_settings, check_no_run
from eva_rl.cli.values import quoted
from eva_rl.errors import UserError, counted
from eva_rl.files import check_folder, expanded
from eva_rl.launch.jobs import Job, LaunchOptions, check_names
from eva_rl.launch.launching import launch, list_failed

OPTIONS = "multirun."
LONGEST_LABEL = 255 - len(".log.lock")
"""Bytes; file systems take names of 255."""


def multirun(name: str, typed: Sequence[str]) -> None:
    """Run a command once for each combination.

    Args:
        name: The command.
        typed: Overrides, some with several values: ``env=push-v3,reach-v3``, ``seed=range(0,3)``; ``run_dir=`` names
            the folder of all, ``multirun.KEY=`` the launcher's options: ``multirun.launcher=ray``, ``multirun.jobs=2``.
            ``--env push-v3,reach-v3`` works, too.

    Raises:
        UserError: A combination that the command does not take, before any has started; or some failed.
    """
    typed = without_dashes(name, typed)
    options = launch_options([word.removeprefix(OPTIONS) for word in typed if word.startswith(OPTIONS)])
    words = [word for word in typed if not word.startswith((OPTIONS, "run_dir="))]
    root = expanded(_common_folder(typed_run_dir(typed)) or new_run_dir("multirun")).resolve()
    jobs = [_job(name, fixed, swept, root, options.threads) for fixed, swept in combinations(words)]
    check_names([job.name for job, _ in jobs])
    check_folder(root, "run_dir=")
    check_no_run(root, "run_dir=")
    options = replace(options, threads=max(job.threads for job, _ in jobs))
    left = [job for job, config in jobs if not _is_finished(job, config)]
    say(f"{counted(len(jobs), 'run')}, {len(jobs) - len(left)} of them finished before. {root}")
    failed = launch(left, len(jobs) - len(left), options, root / "logs" / "launcher")
    list_failed(failed)
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed. Continue with run_dir={root}.")
    say(f"Compare them: python -m eva_rl.report {shlex.quote(str(root))}")


def _common_folder(typed: str) -> str:
    if "${" in typed:
        raise UserError(
            f"run_dir={typed}: a sweep has one folder, in which each run gets its own by what differs. Name it without "
            "${...}."
        )
    return typed


def _is_finished(job: Job, config: Any) -> bool:
    """Whether a run was finished before, with these settings.

    Raises:
        UserError: It was, with other settings.
    """
    if not job.done.exists():
        return False
    if changed := changed_settings(job.done.parent, config):
        raise UserError(
            f"{job.done.parent} holds a finished run with other settings of {', '.join(changed)}. Use the same "
            "settings to continue, or name another run_dir=."
        )
    return True


def launch_options(typed: Sequence[str]) -> LaunchOptions:
    """Options of the launcher.

    Raises:
        UserError: An unknown key or value.
    """
    try:
        options = OmegaConf.merge(OmegaConf.structured(LaunchOptions), OmegaConf.from_dotlist(list(typed)))
        found = OmegaConf.to_object(options)
    except OmegaConfBaseException as error:
        raise UserError(f"multirun: {str(error).splitlines()[0]}. Keys: {', '.join(vars(LaunchOptions()))}.") from error
    assert isinstance(found, LaunchOptions)
    return found


def combinations(words: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """Overrides with one value each, and one value of each that has several, for each combination.

    Raises:
        UserError: A kind of sweep that does not list its values.
    """
    parsed = [(word, _parsed(word)) for word in words]
    sweeps = [override for _, override in parsed if override is not None and override.is_sweep_override()]
    fixed = [word for word, override in parsed if override is None or not override.is_sweep_override()]
    values: dict[str, list[str]] = {}
    for override in sweeps:
        if not override.is_discrete_sweep() or override.value_type is ValueType.GLOB_CHOICE_SWEEP:
            raise UserError(
                f"--multirun: {override.input_line} is no list. List the values: seed=0,1,2 or seed=range(0,3)."
            )
        key = override.get_key_element()
        values[key] = [_without_escapes(f"{key}={value}") for value in override.sweep_string_iterator()]
    return [(fixed, list(swept)) for swept in itertools.product(*values.values())]


def _without_escapes(word: str) -> str:
    """An override as a user types it, ``env=module:Env-v0``; Hydra puts a backslash before the colon."""
    return re.sub(r"\\([:=])", r"\1", word) if re.fullmatch(r"[\w.]+=[\w\\:=./@%+-]*", word) else word


def _parsed(word: str) -> Override | None:
    """An override, or None where Hydra's grammar does not take it: a value of ours, such as a path."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:  # the grammar's listener raises the base class
        return None


def label_of(swept: Sequence[str]) -> str:
    """The name of a combination's folder and log; the end of one that is too long is its digest."""
    label = ",".join(swept).replace("/", "-") or "run"
    encoded = label.encode()
    if len(encoded) <= LONGEST_LABEL:
        return label
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return f"{encoded[: LONGEST_LABEL - len(digest) - 1].decode(errors='ignore')}-{digest}"


def _job(name: str, fixed: Sequence[str], swept: Sequence[str], root: Path, threads: int) -> tuple[Job, Any]:
    """The job of one combination, and its config; ``threads`` are its own unless it says how many."""
    label = label_of(swept)
    typed = any(word.startswith("threads=") for word in (*fixed, *swept))
    own = [] if typed else [f"threads={threads}"]
    overrides = [*fixed, *swept, *own, f"run_dir={quoted(str(root / label))}"]
    config = parse(name, overrides)
    log = root / "logs" / f"{label}.log"
    command = (f"eva_rl.{name}", *overrides)
    return Job(label, command, log, root / label / SUMMARY_FILE, config.threads or threads), config
