"""What one experiment costs, phase by phase, beside an older commit: interleaved runs of ``python -m eva_rl.finetune``.

    python -m benchmarks.speed.experiment --base f38570b --repeats 3 --threads 1
    python -m benchmarks.speed.experiment --base f38570b -- env=push-back-v3 adapter=lora algo.updates=60
    python -m benchmarks.speed.experiment --base f38570b -- device=cuda

The older commit is read from the repository's history into a temporary folder and run from there. Every run starts
with nothing computed before. CPU seconds are the process's own and its workers'; the phases are those of the run's
``summary.json``, and "start" is what comes before them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
MAPPED = ("agents", "envs", "configs")
"""Folders that are mapped into the package."""
DEFAULTS = ("env=push-v3", "adapter=eva", "algo.updates=100", "algo.batch_size=64", "eval.episodes=50", "eval.every=0")
RUN = """
import importlib, json, os, sys, time
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]  # this version alone
def spent():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
wall = time.perf_counter()
found = {}
def module(*names):
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise SystemExit(f"none of {names}")
phases = module("eva_rl.commands.timing", "eva_rl.cli.profiling").Phases
end, last = phases.end, [0.0, wall]
first = phases.__init__
def begun(self, *args, **kwargs):
    first(self, *args, **kwargs)
    note("start")
def note(name):
    now = [spent(), time.perf_counter()]
    cpu, seconds = found.get(name, (0.0, 0.0))
    found[name] = (cpu + now[0] - last[0], seconds + now[1] - last[1])
    last[:] = now
def ended(self, name):
    end(self, name)
    note(name)
phases.__init__, phases.end = begun, ended
status = module("eva_rl.commands.finetune", "eva_rl.finetune.command").main(sys.argv[2:])
note("write")
open(sys.argv[1], "w").write(json.dumps(found))
raise SystemExit(status)
"""
Times = dict[str, tuple[float, float]]
"""CPU and wall seconds by phase."""
NONE = (0.0, 0.0)


def unpack(revision: str, folder: Path) -> Path:
    """Lay a commit, or a folder with its files, out as the installed package; returns the folder for PYTHONPATH."""
    if Path(revision).is_dir():
        return lay_out(Path(revision), folder / "site")
    tree = folder / "tree"
    tree.mkdir(parents=True)
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
    return lay_out(tree, folder / "site")


def lay_out(tree: Path, site: Path) -> Path:
    """Copy a checkout's folders to where the package's mapping puts them."""
    site.mkdir(parents=True)
    subprocess.run(["cp", "-r", str(tree / "eva_rl"), str(site / "eva_rl")], check=True)
    for name in MAPPED:
        subprocess.run(["cp", "-r", str(tree / name), str(site / "eva_rl" / name)], check=True)
    return site


def run(site: Path, run_dir: Path, arguments: Sequence[str], threads: int) -> Times:
    """One experiment in a process of its own."""
    out = run_dir.with_suffix(".json")
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", RUN, str(out), *arguments, f"threads={threads}", f"run_dir={run_dir}"]
    subprocess.run(command, env=environment, cwd=run_dir.parent, check=True, capture_output=True)
    return {name: (cpu, wall) for name, (cpu, wall) in json.loads(out.read_text()).items()}


def total(times: Times, index: int) -> float:
    """Seconds of all phases."""
    return sum(pair[index] for pair in times.values())


def show(old: Sequence[Times], new: Sequence[Times], base: str) -> None:
    """The table: medians over the repeats, and the ratio of pairs."""
    table = Table("phase", f"CPU s, {base}", "now", "ratio", f"wall s, {base}", "now", "ratio")
    for name in dict.fromkeys([*new[0], *old[0]]):
        cells: list[str] = []
        for index in (0, 1):
            pairs = [
                (a.get(name, (0.0, 0.0))[index], b.get(name, (0.0, 0.0))[index]) for a, b in zip(old, new, strict=True)
            ]
            cells += row(pairs)
        table.add_row(name, *cells)
    cells = []
    for index in (0, 1):
        cells += row([(total(a, index), total(b, index)) for a, b in zip(old, new, strict=True)])
    table.add_row("all", *cells)
    Console().print(table)


def row(pairs: Sequence[tuple[float, float]]) -> list[str]:
    """Medians of both, and of their ratio."""
    before, after = median(a for a, _ in pairs), median(b for _, b in pairs)
    return [f"{before:.1f}", f"{after:.1f}", f"{median(b / max(a, 1e-9) for a, b in pairs):.2f}" if before else "-"]


def main() -> None:
    """Run both versions in turn and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="f38570b", help="the older commit, or a folder with its files")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-now", nargs="*", default=[], help="further KEY=VALUE for this version alone")
    parser.add_argument("arguments", nargs="*", help="KEY=VALUE of finetune")
    options = parser.parse_args()
    arguments = [*DEFAULTS, *options.arguments]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sites = {"old": unpack(options.base, work / "base"), "new": lay_out(ROOT, work / "now")}
        found: dict[str, list[Times]] = {"old": [], "new": []}
        for repeat in range(options.repeats):
            for name, site in sites.items():
                extra = options.only_now if name == "new" else []
                found[name].append(run(site, work / f"{name}-{repeat}", [*arguments, *extra], options.threads))
                Console(stderr=True).print(f"{name} {repeat}: {total(found[name][-1], 0):.0f} CPU s")
    show(found["old"], found["new"], options.base)


if __name__ == "__main__":
    main()
