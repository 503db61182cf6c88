"""Where work shared by several runs of a study is stored (``shared=FOLDER``)."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eva_rl.configs.finetune import FinetuneConfig
from eva_rl.configs.groups import DataOptions
from eva_rl.errors import UserError
from eva_rl.files import expanded


def key_of(**parts: Any) -> str:
    """A short digest of everything that decides a result, JSON values all: text of others may leave digits out."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Let one process at a time make what belongs at ``path``.

    Raises:
        UserError: The folder is not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("ab")
    except OSError as error:
        raise UserError(f"shared={path.parent}: {error}. Name a folder that can be written.") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def data_folder(config: FinetuneConfig, options: DataOptions, env_id: str, run_dir: Path) -> Path:
    """Where collected demonstrations lie: in the run directory, or shared by all runs with one task and data seed."""
    if not config.shared:
        return run_dir / "data"
    key = key_of(env=env_id, horizon=config.env.horizon, **asdict(options))
    return expanded(config.shared) / "data" / key
