"""Launchers: what starts, what is tried again, what is stopped, what continues."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eva_rl.errors import UserError
from eva_rl.launch import processes
from eva_rl.launch.jobs import Ended, Job, LaunchOptions, Running, check_names, stop_all
from eva_rl.launch.launchers import LocalLauncher, RayLauncher, SlurmLauncher, make_launcher
from eva_rl.launch.launching import State, last_words, launch, run_all


@pytest.fixture(autouse=True, scope="module")
def no_preloading() -> Iterator[None]:
    """The code of these runs needs nothing of what the fork server imports for others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "PRELOADED", ())
        yield


def job(folder: Path, name: str, code: str) -> Job:
    """A process that runs Python code, once."""
    command = ("timeit", "-n1", "-r1", code)
    return Job(name, command, folder / f"{name}.log", folder / f"{name}.done")


def writes(folder: Path, name: str) -> Job:
    return job(folder, name, f"open({str(folder / f'{name}.done')!r}, 'a').write('x')")


def sleeps(folder: Path, name: str) -> Job:
    return job(
        folder, name, f"import os, time; open({str(folder / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )


FAILS = "raise SystemExit('no such thing')"


def quiet(_: State) -> None:
    pass


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_all_run_within_the_capacity(tmp_path: Path) -> None:
    most = []
    jobs = [writes(tmp_path, f"j{i}") for i in range(4)]
    state = run_all(jobs, LocalLauncher(LaunchOptions(jobs=2)), 0, lambda s: most.append(len(s.running)))
    assert {j.name for j in state.finished} == {"j0", "j1", "j2", "j3"}
    assert all(j.done.read_text() == "x" for j in jobs)
    assert max(most) <= 2


def test_what_fails_is_tried_again_and_listed(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    second = f"import os\nif not os.path.exists({str(marker)!r}):\n    os.mkdir({str(marker)!r})\n    {FAILS}"
    always = job(tmp_path, "always", FAILS)
    state = run_all([job(tmp_path, "once", second), always], LocalLauncher(LaunchOptions(jobs=1)), 1, quiet)
    assert [j.name for j in state.finished] == ["once"]
    assert state.failed == [always]
    assert last_words(always.log) == "SystemExit: no such thing"
    assert always.log.read_text().count("SystemExit: no such thing") == 2
    assert run_all([always], LocalLauncher(LaunchOptions(jobs=1)), 0, quiet).failed == [always]
    assert always.log.read_text().count("SystemExit: no such thing") == 3


def test_an_interruption_ends_the_runs(tmp_path: Path) -> None:
    def interrupt(state: State) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all([sleeps(tmp_path, "long")], LocalLauncher(LaunchOptions(jobs=1)), 0, interrupt)
    assert not alive(int((tmp_path / "pid").read_text()))


class Deaf:
    """A run that ends only when it is killed; it writes down what happens to it."""

    def __init__(self, told: list[str], *, raises: bool = False) -> None:
        self._told, self._raises = told, raises

    def poll(self) -> int | None:
        return None

    def interrupt(self) -> None:
        self._told.append("interrupt")

    def end(self, seconds: float) -> None:
        self._told.append("wait" if seconds else "kill")
        if seconds and self._raises:
            raise KeyboardInterrupt


def test_runs_are_interrupted_together() -> None:
    """They were interrupted one after the other, each with the whole patience, while the others went on."""
    told: list[str] = []
    stop_all([Deaf(told) for _ in range(3)], seconds=60.0)
    assert told == ["interrupt"] * 3 + ["wait"] * 3 + ["kill"] * 3


def test_a_second_interruption_kills(tmp_path: Path) -> None:
    run = started(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stop_all([Deaf([], raises=True), run], seconds=30.0)
    assert not alive(int((tmp_path / "pid").read_text()))


def started(folder: Path) -> Running:
    """A run that ignores Ctrl-C, at work."""
    folder.mkdir(exist_ok=True)
    code = f"import os, time, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); open({str(folder / 'pid')!r}, 'w')"
    run = job(folder, "deaf", f"{code}.write(str(os.getpid())); time.sleep(60)").start()
    assert run is not None
    wait_for(lambda: (folder / "pid").exists() and (folder / "pid").read_text())
    return run


def test_an_interruption_right_after_the_start_counts(tmp_path: Path) -> None:
    """It was sent to a session that the fork had not begun yet, and lost: the run went on until it was killed."""
    run = sleeps(tmp_path, "early").start(forked=True)
    assert run is not None
    run.interrupt()
    wait_for(lambda: run.poll() is not None, seconds=10)


def test_runs_whose_names_differ_by_a_slash_alone_are_refused() -> None:
    with pytest.raises(UserError, match="Two runs would share the folder policy=runs-a"):
        check_names(["policy=runs-a", "policy=runs-b", "policy=runs-a"])


def test_two_launches_never_work_on_one_run(tmp_path: Path) -> None:
    one = sleeps(tmp_path, "long")
    first = one.start()
    assert first is not None
    assert one.start() is None
    stop_all([first])
    again = one.start()
    assert again is not None
    stop_all([again])
    one.done.write_text("")
    assert isinstance(one.start(), Ended)


def test_threads_are_limited(tmp_path: Path) -> None:
    code = f"import os; open({str(tmp_path / 'x')!r}, 'w').write(os.environ['OMP_NUM_THREADS'])"
    one = Job("t", ("timeit", "-n1", "-r1", code), tmp_path / "log", tmp_path / "done", threads=3)
    assert one() == 0
    assert (tmp_path / "x").read_text() == "3"


@pytest.mark.parametrize(("launcher", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_extra_is_named(launcher: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"pip install 'eva-rl\[{package}\]'"):
        make_launcher(LaunchOptions(launcher=launcher), tmp_path)


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="Did you mean 'slurm'"):
        LaunchOptions(launcher="slrum")
    with pytest.raises(UserError, match="threads"):
        LaunchOptions(threads=0)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ({"partition": "gpu"}, r"partition=gpu: launcher=local has no use for it\. Type launcher=slurm as well"),
        ({"gpus_per_run": 1}, "gpus_per_run=1: .* Type launcher=ray or launcher=slurm as well"),
        ({"launcher": "slurm", "jobs": 3}, "jobs=3: launcher=slurm has no use for it"),
        ({"launcher": "slurm", "gpus_per_run": 0.25}, r"gpus_per_run=0\.25: Slurm gives whole GPUs"),
    ],
)
def test_options_of_another_launcher_are_refused(typed: dict[str, Any], told: str) -> None:
    """``partition=gpu`` alone started local processes on the login node; a quarter of a GPU was none."""
    with pytest.raises(UserError, match=told):
        LaunchOptions(**typed)


def test_without_slurm_there_is_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="launcher=slurm"):
        SlurmLauncher(LaunchOptions(launcher="slurm"), tmp_path)


def test_submitit_in_this_process(tmp_path: Path) -> None:
    options = LaunchOptions(launcher="slurm", cluster="debug")
    jobs = [writes(tmp_path, "a"), job(tmp_path, "b", FAILS)]
    state = run_all(jobs, SlurmLauncher(options, tmp_path / "slurm"), 0, quiet)
    assert (state.finished, state.failed) == (jobs[:1], jobs[1:])


@pytest.mark.slow
def test_submitit_in_processes(tmp_path: Path) -> None:
    options = LaunchOptions(launcher="slurm", cluster="local", retries=0)
    jobs = [writes(tmp_path, "a"), writes(tmp_path, "b"), job(tmp_path, "c", FAILS)]
    assert launch(jobs, 0, options, tmp_path / "slurm") == jobs[2:]
    assert (tmp_path / "b.done").read_text() == "x"
    launcher = SlurmLauncher(options, tmp_path / "slurm")
    running = launcher.start(sleeps(tmp_path, "long"))
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    stop_all([running])
    wait_for(lambda: running.poll() is not None)
    assert running.poll() == 1


@pytest.mark.slow
def test_ray_on_this_machine(tmp_path: Path) -> None:
    """Started and stopped here: runs queue for the CPUs, failures come back, a cancelled run ends."""
    import ray

    options = LaunchOptions(launcher="ray", retries=0, cpus_per_run=0.5)
    jobs = [writes(tmp_path, "a"), writes(tmp_path, "b"), job(tmp_path, "c", FAILS)]
    assert launch(jobs, 0, options, tmp_path) == jobs[2:]
    assert (tmp_path / "b.done").read_text() == "x"
    assert not ray.is_initialized()
    launcher = RayLauncher(options)
    try:
        running = launcher.start(sleeps(tmp_path, "long"))
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        stop_all([running])
        wait_for(lambda: not alive(int((tmp_path / "pid").read_text())))
        wait_for(lambda: running.poll() is not None)
        assert running.poll() == 1
    finally:
        launcher.close()
    assert not ray.is_initialized()
