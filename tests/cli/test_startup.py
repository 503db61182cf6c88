"""What is answered before the heavy libraries are imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "peft", "transformers", "stable_baselines3", "mujoco", "matplotlib", "scipy")
PROGRAM = f"""
import sys
from eva_rl.__main__ import main
status = main(sys.argv[1:])
print("imported:", *(name for name in {HEAVY} if name in sys.modules))
raise SystemExit(status)
"""


@pytest.mark.parametrize(
    ("words", "status", "answer"),
    [
        (["--help"], 0, "eva-rl COMMAND"),
        (["finetune", "--help"], 0, "algo.updates"),
        (["finetune", "algo=sac", "--help"], 0, "algo.train_freq"),
        (["finetune", "algo.update=3"], 2, "Did you mean algo.updates=3"),
        (["finetune", "adapter.rank=0"], 2, "expected a number above 0"),
        (["finetune", "adapter=evva"], 2, "Unknown adapter 'evva'"),
        (["finetune", "env=puhs-v3"], 2, "push-v3"),
    ],
)
def test_help_and_mistakes_wait_for_no_library(words: list[str], status: int, answer: str) -> None:
    found = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)
    assert found.returncode == status, found.stderr
    assert answer in found.stdout + found.stderr
    assert found.stdout.splitlines()[-1] == "imported:"


def test_peft_waits_for_an_adapter() -> None:
    """It imports transformers, which takes longer than everything else together."""
    commands = ("evaluate", "pretrain", "collect", "export", "benchmark.command", "report.command", "finetune.command")
    program = f"""
import sys
import {", ".join(f"eva_rl.{name}" for name in commands)}
from eva_rl.adapters import load_policy
load_policy("mt40")
print(sorted({{"peft", "transformers"}} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("[]\n", 0), found.stderr
