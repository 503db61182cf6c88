"""An exported policy beside the policy it was made from: success on the same goals, and milliseconds an action.

python -m benchmarks.speed.onnx_export policy=mt40 env=push-v3 episodes=50
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks import pages
from eva_rl import evaluate_policy, load_policy
from eva_rl.agents import Policy
from eva_rl.agents.onnx import OnnxPolicy, export_onnx
from eva_rl.envs import canonical_id

ACTIONS = 500


def milliseconds(policy: Policy, clock: Callable[[], float]) -> float:
    """Mean time of an action in one environment, after a first context."""
    policy.reset([""])
    observation, reward = np.zeros((1, policy.observation_dim), np.float32), np.zeros(1, np.float32)
    for step in range(ACTIONS + 50):
        if step == 50:
            began = clock()
        policy.act(observation, reward, np.array([step == 0]))
    return 1000 * (clock() - began) / ACTIONS


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE", help="env=push-v3 policy=mt40 episodes=50")
    options = {"env": "push-v3", "policy": "mt40", "episodes": "50"}
    options |= {key: value for key, _, value in (word.partition("=") for word in parser.parse_args().options)}
    task = canonical_id(options["env"])
    policy = load_policy(options["policy"], merge=True)
    with TemporaryDirectory() as folder:
        difference = export_onnx(policy, Path(folder) / "policy.onnx")
        exported = OnnxPolicy(Path(folder) / "policy.onnx")
    print(f"{task}: actions differ by at most {difference:.1e} of half their range")
    rows = []
    for name, one in (("torch", policy), ("onnxruntime", exported)):
        found = evaluate_policy(one, task, episodes=int(options["episodes"]))
        success = f"{found.success_rate:.2f}" if found.reports_success else "-"
        wall, used = milliseconds(one, time.perf_counter), milliseconds(one, time.process_time)
        rows.append([name, success, f"{found.mean_reward:.2f}", f"{wall:.2f}", f"{used:.2f}"])
    print(pages.table(["", "success", "mean return", "ms an action", "CPU ms an action"], rows))


if __name__ == "__main__":
    main()
