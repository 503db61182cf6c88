"""Imports go one way, in no circle, and keep to what each layer may know (see CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "eva_rl.agents": ROOT / "agents",
    "eva_rl.envs": ROOT / "envs",
    "eva_rl.configs": ROOT / "configs",
    "eva_rl": ROOT / "eva_rl",
}
LAYERS = [
    {"errors", "lazy", "_version"},
    {"batch", "files", "schema", "seeding", "options", "distributed", "limits"},
    {"agents", "envs", "data", "eva", "tracking"},
    {"adapters", "rollouts"},
    {"training"},
    {"configs"},
    {"cli"},
    {"launch", "report", "collect", "evaluate", "export", "datasets", "doctor"},
    {"finetune", "pretrain"},
    {"benchmark"},
    {"__main__"},
]
"""Lowest first. The package's face, ``eva_rl/__init__.py``, imports lazily and stands outside."""
STRANGERS = [LAYERS[2], LAYERS[3]]
"""Layers whose members know nothing of each other."""
COMMANDS = {"report", "collect", "evaluate", "export", "datasets", "finetune", "pretrain", "benchmark", "doctor"}
OWNERS = {"torch.distributed": {"distributed"}, "peft": {"adapters"}}
"""Libraries that one room alone may import."""
FRONT = {"hydra", "omegaconf", "rich"}
"""Libraries of the command line, which nothing below ``cli`` imports."""
LARGEST_ROOM = 0.15
LARGEST_FILE, LARGEST_FOLDER = 400, 16


@cache
def modules() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


@cache
def imports(module: str) -> tuple[str, ...]:
    """What a module imports anywhere, lazily or for type checking too: modules of ours, and other libraries."""
    return tuple(_imports(module))


def _imports(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            source = node.module or ""
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield full if full in modules() else source


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def level(name: str) -> int:
    return next(depth for depth, names in enumerate(LAYERS) if name in names)


EVERY = [module for module in modules() if module != "eva_rl"]


def test_every_module_has_a_layer() -> None:
    rooms = {room(module) for module in EVERY}
    assert rooms == set().union(*LAYERS)


@pytest.mark.parametrize("module", EVERY)
def test_imports_go_one_way(module: str) -> None:
    own = room(module)
    for imported in imports(module):
        assert imported.split(".")[0] not in {"agents", "envs", "configs"}, f"{module}: import eva_rl.{imported}"
        if not imported.startswith("eva_rl"):
            continue
        other = room(imported)
        assert other, f"{module} imports the package's face; import from the module that defines the name"
        assert level(other) <= level(own), f"{module} imports {imported} from a layer above its own"
        if own == other:
            continue
        for strangers in STRANGERS:
            assert not {own, other} <= strangers, f"{module} imports {imported}, its neighbour"
        allowed = own == "__main__" or (own == "benchmark" and other in {"finetune", "report"})
        assert not {own, other} <= COMMANDS or allowed, f"{module}: a command imports a command"


@pytest.mark.parametrize("module", EVERY)
def test_libraries_stay_in_their_rooms(module: str) -> None:
    own = room(module)
    for imported in imports(module):
        for library, rooms in OWNERS.items():
            if imported == library or imported.startswith(library + "."):
                assert own in rooms, f"{module} imports {imported}"
        if imported.split(".")[0] in FRONT:
            assert level(own) >= level("cli"), f"{module} imports {imported}"


def test_no_import_circle() -> None:
    graph = networkx.DiGraph((module, other) for module in EVERY for other in imports(module) if other in modules())
    circles = [sorted(found) for found in networkx.strongly_connected_components(graph) if len(found) > 1]
    assert circles == []


def test_no_room_is_too_large() -> None:
    lines: dict[Path, int] = {}
    for module in EVERY:
        count, folder = len(modules()[module].read_text().splitlines()), modules()[module].parent
        assert count <= LARGEST_FILE, f"{module} has {count} lines"
        lines[folder] = lines.get(folder, 0) + count
    total = sum(lines.values())
    assert {folder: count for folder, count in lines.items() if count > LARGEST_ROOM * total} == {}
    folders: dict[Path, int] = {}
    for module in EVERY:
        folders[modules()[module].parent] = folders.get(modules()[module].parent, 0) + 1
    assert {folder: count for folder, count in folders.items() if count > LARGEST_FOLDER} == {}


def test_functions_are_small() -> None:
    sizes = sorted(size for module in modules() for size in function_sizes(modules()[module]))
    median, p90, largest = sizes[len(sizes) // 2], sizes[int(0.9 * len(sizes))], sizes[-1]
    assert median <= 6, median
    assert p90 <= 16, p90
    assert largest <= 50, largest


def function_sizes(path: Path) -> Iterator[int]:
    """Lines of each function's body, without its docstring and without functions inside it counted twice."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body:
                yield (body[-1].end_lineno or 0) - body[0].lineno + 1


def test_no_broad_except() -> None:
    for module, path in modules().items():
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or "Exception" in {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            ):
                assert "#" in lines[node.lineno - 1], f"{module}:{node.lineno}: a broad except needs its reason"


def test_no_package_offers_a_name_of_its_modules() -> None:
    """An imported module takes the place of such a name: what ``eva.compute`` was depended on what came before it."""
    for package, path in modules().items():
        if path.name == "__init__.py":
            inside = {module.rpartition(".")[2] for module in modules() if module.rpartition(".")[0] == package}
            assert not inside & set(getattr(import_module(package), "__all__", [])), package
