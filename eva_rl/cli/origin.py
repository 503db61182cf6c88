"""What a run was made from, so that one that goes on does so with the same policy and data."""

from __future__ import annotations

from pathlib import Path

from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.agents.policy_folder import weights_digest
from eva_rl.data import Trajectories
from eva_rl.errors import UserError
from eva_rl.files import read_json, write_json
from eva_rl.schema import Optional, Record, Text

ORIGIN_FILE = "origin.json"
"""Digests of the policy's weights and of the data."""
ORIGIN = Record({"policy": Text(), "data": Optional(Text())})


def check_origin(run_dir: Path, policy: DecisionTransformerPolicy | None, data: Trajectories | None) -> None:
    """Note what a run is made from as it begins, and compare where it goes on from a checkpoint.

    Args:
        run_dir: Its folder.
        policy: As it is before fine-tuning; None where it begins with random weights.
        data: Demonstrations, or None.

    Raises:
        UserError: A policy or a data set is another one than when the run began.
    """
    weights = "" if policy is None else weights_digest(policy.network.state_dict())
    found = {"policy": weights, "data": None if data is None else data.content_hash}
    path = run_dir / ORIGIN_FILE
    if not path.exists() or not (run_dir / "checkpoint").exists():
        write_json(path, found)
        return
    before = read_json(path, ORIGIN)
    if changed := [f"{name}=" for name, digest in found.items() if digest != before[name]]:
        raise UserError(
            f"{run_dir} holds an unfinished run, and what {' and '.join(changed)} names has changed since it began. "
            "Put back what it began with to continue it, or name another run_dir=."
        )
