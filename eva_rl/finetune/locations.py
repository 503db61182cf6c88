"""Where work shared by several runs of a study is stored (``shared=FOLDER``)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.configs.finetune import FinetuneConfig
from eva_rl.configs.groups import DataOptions
from eva_rl.files import expanded


def key_of(**parts: Any) -> str:
    """A short digest of everything that decides a result, JSON values all: text of others may leave digits out."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def digest_of(array: NDArray[Any] | None) -> str:
    """SHA-256 of an array's numbers; "" of none."""
    return "" if array is None else hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def place_key(config: FinetuneConfig) -> str:
    """The setting that says where shared work goes, or else a run's own."""
    return "shared=" if config.shared else "run_dir="


def data_folder(config: FinetuneConfig, options: DataOptions, env_id: str, run_dir: Path) -> Path:
    """Where collected demonstrations lie: in the run directory, or shared by all runs with one task and data seed."""
    if not config.shared:
        return run_dir / "data"
    collected = {key: value for key, value in asdict(options).items() if key != "returns_to_go"}
    key = key_of(env=env_id, horizon=config.env.horizon, **collected)
    return expanded(config.shared) / "data" / key
