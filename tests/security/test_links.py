"""What is exported and pushed: known files, and never what a link leads to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from eva_rl.adapters import load_policy
from eva_rl.export import FOLDER_FILES, main
from tests.security.making import everything, loaded, save_adapted

OWN_FILES = [name for name in FOLDER_FILES if not name.startswith(("config", "eva_rl", "pytorch"))]
SECRET = "-----BEGIN PRIVATE KEY-----"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_adapted(tmp_path / "run")
    (tmp_path / "id_rsa").write_text(SECRET)
    return tmp_path / "run"


def export(run: Path) -> tuple[int, Path]:
    out = run.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    return main([f"policy={run}", "to=adapter", f"out={out}"]), out


def nothing_leaks(folder: Path) -> bool:
    return all(SECRET not in p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())


def test_strange_files_stay_behind(run: Path) -> None:
    for name in ("id_rsa", "notes.txt", "adapter/.env", ".git/config", "adapter/more/x.safetensors", "optimizer.pt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(SECRET)
    for name in ("linked", "adapter/linked.json", "more"):
        (run / name).symlink_to(run.parent / "id_rsa")
    status, out = export(run)
    assert status == 0
    assert nothing_leaks(out)
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} <= set(FOLDER_FILES)
    assert loaded(out) == loaded(run)


@pytest.mark.parametrize(
    "name", [name for name in FOLDER_FILES if not name.startswith(("config", "eva_rl", "pytorch"))]
)
def test_a_link_in_place_of_a_known_file_is_refused(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where what it leads to would load: a link proves nothing about who may read it."""
    for content in (SECRET.encode(), (run / name).read_bytes()):
        (run.parent / "elsewhere").write_bytes(content)
        (run / name).unlink()
        (run / name).symlink_to(run.parent / "elsewhere")
        status, out = export(run)
        assert status == 2
        assert not out.exists()
    assert "is a link to" in capsys.readouterr().err


def test_a_linked_folder_is_refused(run: Path) -> None:
    shutil.move(run / "adapter", run.parent / "adapter")
    (run / "adapter").symlink_to(run.parent / "adapter")
    status, out = export(run)
    assert status == 2
    assert not out.exists()


def test_the_hubs_cache_links_into_its_own_store(run: Path) -> None:
    """Its files are links to blobs/, which is where they may lead, and nowhere else."""
    repository = run.parent / "models--somebody--run"
    snapshot, blobs = repository / "snapshots/0123abc", repository / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in run.rglob("*") if p.is_file())):
        shutil.copy(file, blobs / str(number))
        link = snapshot / file.relative_to(run)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    expected: Any = loaded(run)
    status, out = export(snapshot)
    assert status == 0
    assert everything(load_policy(out)) == expected
    assert not any(p.is_symlink() for p in out.rglob("*"))
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to(run.parent / "id_rsa")
    assert export(snapshot)[0] == 2
