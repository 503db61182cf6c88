"""Imports go one way (see CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"eva_rl.errors", "eva_rl._version"},
    {"eva_rl.batch", "eva_rl.files", "eva_rl.seeding"},
    {"eva_rl.agents", "eva_rl.envs", "eva_rl.data", "eva_rl.eva", "eva_rl.tracking", "eva_rl.stats"},
    {"eva_rl.adapters", "eva_rl.demonstrations", "eva_rl.recording", "eva_rl.rollouts"},
    {"eva_rl.evaluation", "eva_rl.trained_experts", "eva_rl.video"},
    {"eva_rl.training"},
    {"eva_rl.commands"},
]
INDEPENDENT = {"eva_rl.agents", "eva_rl.envs", "eva_rl.data", "eva_rl.eva", "eva_rl.tracking", "eva_rl.stats"}
FOLDERS = {"eva_rl.agents": ROOT / "agents", "eva_rl.envs": ROOT / "envs", "eva_rl.configs": ROOT / "configs"}


def level(module: str) -> int | None:
    for depth, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return depth
    return None


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module or ""
            if node.module == "eva_rl":
                yield from (f"eva_rl.{alias.name}" for alias in node.names)


def module_files() -> Iterator[tuple[str, Path]]:
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            yield f"{name}.{path.relative_to(folder).with_suffix('').as_posix().replace('/', '.')}", path
    for path in (ROOT / "eva_rl").rglob("*.py"):
        yield path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."), path


def package(module: str) -> str:
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize(("module", "path"), list(module_files()), ids=lambda value: str(value).rpartition("/")[2])
def test_imports_go_one_way(module: str, path: Path) -> None:
    own = level(module)
    for imported in imports(path):
        assert imported.split(".")[0] not in {"agents", "envs", "configs"}, f"{path}: import eva_rl.{imported} instead"
        other = level(imported)
        if own is None or other is None or package(imported) == package(module):
            continue
        assert other <= own, f"{path} imports {imported} from a layer above its own"
        if package(module) in INDEPENDENT:
            assert package(imported) not in INDEPENDENT, f"{path} imports {imported}, its neighbour"


def test_every_module_has_a_layer() -> None:
    front = {"eva_rl.__init__", "eva_rl.configs.__init__"}
    shims = {f"eva_rl.{p.stem}" for p in (ROOT / "eva_rl").glob("*.py") if "__main__" in p.read_text()}
    unplaced = {module for module, _ in module_files() if level(module) is None} - front - shims
    assert not unplaced
