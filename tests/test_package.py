"""The package as others get it: the wheel, the configs, the README, the public names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

import eva_rl
from eva_rl.__main__ import COMMANDS, command_module
from eva_rl.cli.parsing import COMMANDS as PARSED
from eva_rl.cli.parsing import parse
from eva_rl.configs.groups import RunOptions
from eva_rl.launch.multirun import combinations

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LAZY = ("adapters", "agents", "data", "envs", "eva", "tracking", "training")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_composes(path: Path) -> None:
    command_module(path.stem)
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# python -m eva_rl.{path.stem} ")
    config = parse(path.stem, first.split()[4:])
    assert isinstance(config, PARSED[path.stem].schema)
    if isinstance(config, RunOptions):
        assert config.device == "auto"


def test_every_config_has_its_command() -> None:
    assert set(COMMANDS) == {path.stem for path in CONFIGS}
    assert all(callable(command_module(name).main) for name in COMMANDS)


def test_version_is_written_once_in_effect() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == eva_rl.__version__
    assert f"version: {eva_rl.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"version {eva_rl.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names() -> None:
    for name in eva_rl.__all__:
        assert getattr(eva_rl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        eva_rl.tran  # noqa: B018


def test_packages_are_found_without_an_import_of_their_own() -> None:
    code = "import eva_rl; print(eva_rl.eva.compute.__name__, eva_rl.agents.PredictAdapter.__name__)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["compute", "PredictAdapter"]


def test_import_is_light() -> None:
    code = "import sys, eva_rl; print([m for m in ('torch', 'peft', 'metaworld') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("package", ["", *(f".{name}" for name in LAZY)])
def test_packages_show_their_names(package: str) -> None:
    """To tab completion, before any of them is used."""
    code = f"import eva_rl{package} as p; print(set(p.__all__) - set(dir(p)), [n for n in dir(p) if not hasattr(p, n)])"
    own = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}  # which tests that render set
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=own).stdout
    assert shown.split() == ["set()", "[]"]


def test_every_package_is_in_the_wheel() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    mapped = {"agents": "eva_rl.agents", "envs": "eva_rl.envs", "configs": "eva_rl.configs"}
    found = {
        ".".join([mapped.get(init.relative_to(ROOT).parts[0], "eva_rl"), *init.parent.relative_to(ROOT).parts[1:]])
        for top in ("eva_rl", *mapped)
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert found == listed


@pytest.mark.slow
def test_the_wheel_works_from_an_empty_folder(tmp_path: Path) -> None:
    """Built, installed elsewhere (beside this environment's dependencies), and run without the repository."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True, check=True)
    tops = {line.split("/")[0] for line in names.stdout.splitlines()[1:]}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"eva_rl"}
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    sites = [path for path in sys.path if path.endswith("site-packages")]
    (next((tmp_path / "venv").glob("lib/*/site-packages")) / "deps.pth").write_text("\n".join(sites) + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    where = subprocess.run(
        [python, "-c", "import eva_rl.agents; print(eva_rl.agents.__file__)"],
        cwd=empty, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert str(tmp_path) in where.stdout
    command = [python, "-m", "eva_rl.finetune", "env=reach-v3", "algo.updates=1", "eval.episodes=1", "data.episodes=1"]
    subprocess.run([*command, "env.horizon=60"], cwd=empty, check=True, timeout=300)
    assert len(list(empty.glob("runs/*/summary.json"))) == 1


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.slow
@pytest.mark.parametrize("block", readme_blocks())
def test_readme_python_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_commands_in_the_documentation_compose(file: str) -> None:
    """Every ``python -m eva_rl...`` line names a command, keys and values that exist."""
    path = ROOT / file if (ROOT / file).exists() else ROOT / "docs" / file
    for line in re.findall(r"^\s*(?:\S+ && )*python -m eva_rl\.(.+?)$", path.read_text(), re.M):
        name, *overrides = line.split("#")[0].split()
        if name == "pretrain" or not any("--help" in o for o in overrides):
            command_module(name)
            typed = [o.strip("'\"") for o in overrides if "=" in o and not o.startswith("study=")]
            if "--multirun" in overrides:
                fixed, swept = combinations([o for o in typed if not o.startswith("multirun.")])[0]
                typed = fixed + swept
            parse(name, typed)
