"""Run directories that a crash, a second process or a damaged disk left in a bad state."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from eva_rl.cli.run_dir import CONFIG_FILE, LOCK_FILE, VERSIONS_FILE, changed_settings, open_run
from eva_rl.errors import UserError
from eva_rl.files import write_file, write_folder
from eva_rl.tracking.tracker import METRICS_FILE, Resume, Tracker, read_metrics


@dataclass
class Options:
    run_dir: str
    resume: str = "auto"
    env: str = "push-v3"
    learning_rate: float = 1e-5
    text: str = "${oc.env:HOME}"


HOLD = """
import sys, time
from pathlib import Path
from eva_rl.cli.run_dir import lock
from eva_rl.errors import UserError
try:
    lock(Path(sys.argv[1]))
except UserError as error:
    print(error, flush=True)
lock(Path(sys.argv[2]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    options = Options(str(tmp_path / "run"))
    open_run("finetune", options)
    other = Options(str(tmp_path / "other"))
    Path(other.run_dir).mkdir()
    command = [sys.executable, "-c", HOLD, options.run_dir, other.run_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert "is in use by another process" in holder.stdout.readline()
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by another process \(pid {holder.pid}\)"):
            open_run("finetune", other)
        holder.kill()
    assert open_run("finetune", other) == Path(other.run_dir)
    assert open_run("finetune", other) == Path(other.run_dir), "the same process may go on"


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_cut_config_is_written_anew_and_kept(cut: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(str(tmp_path / "run"))
    path = open_run("finetune", options) / CONFIG_FILE
    (path.parent / "checkpoint").mkdir()
    path.write_bytes(path.read_bytes()[:cut])
    assert open_run("finetune", options) == path.parent
    assert changed_settings(path.parent, options) == {}
    assert (path.parent / "config.yaml.damaged").stat().st_size == cut
    assert "written anew" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"5", b"[1, 2]", b"\xff\xfe", b"a: &a [1]\nb: *a", b"env: {", b"- - - {"])
def test_other_damage_of_a_config(content: bytes, tmp_path: Path) -> None:
    options = Options(str(tmp_path / "run"))
    path = open_run("finetune", options) / CONFIG_FILE
    path.write_bytes(content)
    open_run("finetune", options)
    assert changed_settings(path.parent, options) == {}


def test_other_settings_are_still_refused(tmp_path: Path) -> None:
    run_dir = open_run("finetune", Options(str(tmp_path / "run")))
    (run_dir / "checkpoint").mkdir()
    assert open_run("finetune", Options(str(run_dir))) == run_dir, "1e-5 and ${...} read back as they were"
    with pytest.raises(UserError, match=r"other settings of learning_rate .*\(learning_rate=1e-05\)"):
        open_run("finetune", Options(str(run_dir), learning_rate=1e-4))


def test_what_cut_off_writes_left_is_removed(tmp_path: Path) -> None:
    run_dir = open_run("finetune", Options(str(tmp_path / "run")))

    def crash(aside: Path) -> None:
        copy = aside.with_name(aside.name.replace(aside.name.split(".")[-2], "0123abcd"))
        copy.mkdir() if aside.is_dir() else copy.write_text("half")
        raise RuntimeError

    for write, name in ((write_file, "metrics.jsonl"), (write_folder, "policy"), (write_file, "data/a.h5")):
        with pytest.raises(RuntimeError):
            write(run_dir / name, crash)
    mine = run_dir / "mine.partial"
    mine.write_text("not ours to remove")
    assert len(list(run_dir.rglob(".*.partial"))) == 3
    open_run("finetune", Options(str(run_dir)))
    assert list(run_dir.rglob("*.partial")) == [mine]


def test_a_start_that_was_killed_while_it_marked_the_folder(tmp_path: Path) -> None:
    options = Options(str(tmp_path / "run"))
    run_dir = Path(options.run_dir)
    run_dir.mkdir()
    (run_dir / ".config.yaml.0123abcd.partial").write_text("env: pu")
    open_run("finetune", options)
    assert {path.name for path in run_dir.iterdir()} == {CONFIG_FILE, VERSIONS_FILE, LOCK_FILE}
    (run_dir / VERSIONS_FILE).unlink()  # killed between the two
    open_run("finetune", options)
    assert (run_dir / VERSIONS_FILE).exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / ".notes.txt.0123abcd.partial").write_text("of another program")
    with pytest.raises(UserError, match="not a run of eva-rl"):
        open_run("finetune", Options(str(other)))


DAMAGE = [
    b"5", b"[1]", b"null", b'"text"', b"\xff\xfe{", b"", b"{", b'{"step": "a", "wall_time": 1}', b'{"step": 2}',
    b'{"step": 2.5, "wall_time": 1.0}', b'{"step": 2, "wall_time": 1.0, "x": "high"}', b"[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_loses_no_other_row(damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Tracker(tmp_path, trackers=()) as tracker:
        for step in range(1, 5):
            tracker.log({"train/loss": step / 2}, step)
    path = tmp_path / METRICS_FILE
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3, 4]
    assert ("left out: 2" in caplog.text) == bool(damage)
    with Tracker(tmp_path, resume=Resume(4), trackers=()) as tracker:
        tracker.log({"train/loss": 0.1}, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3, 4, 5]


@pytest.mark.parametrize("name", ["a b", "ü ß", "it's", '"quoted"', "~x", "a=b", "x,y", "[z]", "{q}", "$HOME", "100%"])
def test_run_directories_of_any_name(name: str, tmp_path: Path) -> None:
    run_dir = open_run("finetune", Options(str(tmp_path / name)))
    assert (run_dir / LOCK_FILE).exists()
    assert open_run("finetune", Options(str(tmp_path / name))) == run_dir
