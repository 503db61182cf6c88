"""What is answered before the heavy libraries are imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "peft", "transformers", "stable_baselines3", "mujoco", "matplotlib", "scipy")
PROGRAM = f"""
import contextlib, io, json, sys
from eva_rl.__main__ import main
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(words)
    print(json.dumps([status, said.getvalue(), [name for name in {HEAVY} if name in sys.modules]]))
"""


def test_help_and_mistakes_wait_for_no_library() -> None:
    asked = [
        (["--help"], 0, "eva-rl COMMAND"),
        (["finetune", "--help"], 0, "algo.updates"),
        (["finetune", "algo=sac", "--help"], 0, "algo.train_freq"),
        (["finetune", "algo.update=3"], 2, "Did you mean algo.updates=3"),
        (["finetune", "adapter.rank=0"], 2, "expected a number above 0"),
        (["finetune", "adapter=evva"], 2, "Unknown adapter 'evva'"),
        (["finetune", "env=puhs-v3"], 2, "push-v3"),
    ]
    command = [sys.executable, "-c", PROGRAM, json.dumps([words for words, *_ in asked])]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    for (words, status, answer), line in zip(asked, found.stdout.splitlines(), strict=True):
        ended, said, imported = json.loads(line)
        assert ended == status, words
        assert answer in said, words
        assert imported == [], words


@pytest.mark.slow
def test_peft_waits_for_an_adapter() -> None:
    """It imports transformers, which takes longer than everything else together."""
    commands = ("evaluate", "pretrain", "collect", "export", "finetune.command")
    program = f"""
import sys
import {", ".join(f"eva_rl.{name}" for name in commands)}
from eva_rl.adapters import load_policy
load_policy("mt40")
print(sorted({{"peft", "transformers"}} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("[]\n", 0), found.stderr
