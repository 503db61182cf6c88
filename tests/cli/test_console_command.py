"""``eva-rl``: the commands under one name, completion, doctor."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import eva_rl
from eva_rl.__main__ import COMMANDS, main
from eva_rl.adapters import save_adapted_policy
from eva_rl.data import Trajectories
from eva_rl.doctor import Speed, advice
from tests.adapters.making import attached


def test_version_help_and_misspelt_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"eva-rl {eva_rl.__version__}\n"
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main(["finetun", "env=push-v3"]) == 2
    assert "Did you mean 'finetune'" in capsys.readouterr().err
    assert main(["--completion", "csh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err


def test_the_console_command_is_this_function() -> None:
    (found,) = entry_points(group="console_scripts", name="eva-rl") or pytest.skip("installed before it was there")
    assert found.load() is main


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["eva-rl", "fine"], {"finetune"}),
        (["eva-rl", "finetune", "algo.up"], {"algo.updates="}),
        (["eva-rl", "finetune", "env", "=", "push-"], {"push-v3", "push-back-v3", "push-wall-v3"}),
        (["eva-rl", "finetune", "adapter", "=", "eva_d"], {"eva_dora"}),
        (["eva-rl", "evaluate", "policy", "=", "mt"], {"mt40", "mt40-small"}),
        (["eva-rl", "benchmark", "tas"], {"tasks="}),
        (["eva-rl", "finetune", "data", "=", "demo"], {"demos.h5"}),
    ],
)
def test_bash_completes(
    words: list[str], expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--completion", "bash"]) == 0
    (tmp_path / "demos.h5").touch()
    quoted = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _eva_rl; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    script = capsys.readouterr().out + ask
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", shell]) == 0
    script = capsys.readouterr().out
    assert "finetune" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n", "-c", script], check=True)


def test_doctor_measures_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "seconds=0.05", "threads=1", "policy=hopper", "env=Hopper-v5"]) == 0
    shown = capsys.readouterr().err
    for part in (
        "eva-rl",
        "torch",
        "device",
        "renderer",
        "threads",
        "env steps of Hopper-v5",
        "gradient steps of hopper",
    ):
        assert part in shown
    assert "\n- " in shown


def test_a_module_in_the_current_folder_is_found(tmp_path: Path) -> None:
    """As by ``python -m``, which puts the folder on the path itself."""
    (tmp_path / "here.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('Here-v0', entry_point='gymnasium.envs.classic_control:PendulumEnv', max_episode_steps=5)\n"
    )
    program = [str(Path(sys.executable).parent / "eva-rl"), "evaluate", "env=here:Here-v0", "policy=hopper"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "here:Here-v0 has 3 numbers in an observation" in " ".join(done.stderr.split())


def test_doctor_measures_a_fine_tuned_policy(
    tmp_path: Path, reach_demonstrations: Trajectories, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are frozen, which ended in a traceback."""
    policy, adapter = attached("lora", reach_demonstrations)
    save_adapted_policy(tmp_path / "run", policy, adapter, "card")
    words = ["seconds=0.01", "threads=1", f"policy={tmp_path / 'run'}", "env=reach-v3"]
    assert main(["doctor", *words]) == 0
    assert "gradient steps of" in capsys.readouterr().err


def test_advice_names_what_to_type() -> None:
    def said(threads: int, cpus: int, share: float = 1.0, rate: float = 1000.0, *, renders: bool = True) -> str:
        speeds = dict.fromkeys("abc", Speed(rate, share))
        return "\n".join(advice(threads, cpus, speeds, has_renderer=renders))

    assert said(4, 4) == ""
    assert "threads=4" in said(1, 4)
    assert "threads=1" in said(4, 4, share=0.3)
    assert "eval.episodes=20" in said(4, 4, rate=5)
    assert "libosmesa6" in said(4, 4, renders=False)
    assert "jobs=8 threads=2" in said(16, 16)
