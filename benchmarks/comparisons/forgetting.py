"""What a policy forgets: success on the 40 tasks of its pretraining after it was fine-tuned on another one.

    python -m eva_rl.benchmark study=benchmarks/studies/few_shot.yaml records=docs/results/few_shot out=runs/few_shot
    python -m benchmarks.comparisons.forgetting run runs/few_shot --out runs/forgetting
    python -m benchmarks.comparisons.forgetting table runs/forgetting \
        --out docs/results/forgetting.json --page docs/verdict.md

``run`` plays the policies that the study left in its folder, and ``mt40`` itself; it leaves one record a policy, and
goes on where it was stopped. With ``--off`` an adapter is turned off, which has to give ``mt40``'s own episodes again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import pages
from benchmarks.comparisons.few_shot import parts

Record = dict[str, Any]
BASE, ON, OFF = "mt40", "on", "off"
BEGIN, END = "<!-- forgetting: benchmarks/comparisons/forgetting.py -->", "<!-- end of forgetting -->"


def play(path: str, episodes: int, *, adapted: bool) -> dict[str, list[int]]:
    """The first success of each episode, -1 for none, by task."""
    import eva_rl
    from eva_rl.envs.registry import task_ids
    from eva_rl.rollouts.evaluation import evaluate_policy

    policy, found = eva_rl.load_policy(path), {}
    if not adapted:
        policy.adapters.use(None)
    for task in task_ids("mt40"):
        result = evaluate_policy(policy, task, episodes=episodes, stop_at_success=True)
        found[task] = [episode.first_success for episode in result.episodes]
    return found


def run(arguments: argparse.Namespace) -> None:
    """Play what has no record yet."""
    import torch

    from eva_rl.cli.machine import versions

    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for record, path in [({"method": BASE}, BASE), *policies(arguments)]:
        name = "-".join(str(record[key]) for key in ("method", "task", "seed") if key in record)
        file = arguments.out / f"{name}-{record.get('adapter', ON)}.json"
        if not file.exists():
            found = play(path, arguments.episodes, adapted=record.get("adapter", ON) == ON)
            file.write_text(json.dumps(record | {"first_success": found, "versions": versions()}) + "\n")


def policies(arguments: argparse.Namespace) -> Iterator[tuple[Record, str]]:
    """Who is played, and where its folder is."""
    for number in arguments.demonstrations:
        for path in sorted(arguments.folder.glob(f"*/*-{number}/seed_*/policy")):
            task, method, seed = path.parts[-4:-1]
            record = {"method": method, "task": task, "seed": int(seed.removeprefix("seed_"))}
            if record["seed"] not in arguments.seeds or (arguments.tasks and task not in arguments.tasks):
                continue
            if not arguments.off:
                yield record, str(path)
            elif (path / "adapter").exists():
                yield record | {"adapter": OFF}, str(path)


def success(record: Record) -> float:
    """Mean success over the tasks."""
    return float(np.mean([np.mean(np.array(tried) >= 0) for tried in record["first_success"].values()]))


def text(records: Sequence[Record]) -> str:
    """Markdown: a row a method and number of demonstrations, and what turning adapters off gave."""
    base = next(record for record in records if record["method"] == BASE)
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record["method"] != BASE and record.get("adapter", ON) == ON:
            found[record["method"]].append(success(record))
    rows = [
        [f"`{parts(m)[0]}`", str(parts(m)[1]), str(len(v)), f"{np.mean(v):.2f}", f"{np.min(v):.2f}"]
        for m, v in sorted(found.items(), key=lambda one: (parts(one[0])[1], parts(one[0])[0]))
    ]
    heads = ["method", "demonstrations", "policies", "mean success on MT40", "of the worst policy"]
    episodes = len(next(iter(base["first_success"].values())))
    lines = [
        f"`mt40` itself, {episodes} episodes a task: {success(base):.2f}. After fine-tuning, the adapter on:",
        pages.table(heads, rows),
    ]
    if off := [record for record in records if record.get("adapter") == OFF]:
        same = sum(record["first_success"] == base["first_success"] for record in off)
        lines.append(f"With the adapter off, {same} of {len(off)} policies play exactly `mt40`'s episodes.")
    return "\n\n".join(lines)


def table(arguments: argparse.Namespace) -> None:
    """Print the table; keep its records, and put it into a page, where asked to."""
    records = pages.json_records(arguments.folder)
    print(text(records))
    if arguments.out:
        arguments.out.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    if arguments.page:
        pages.write_between(arguments.page, BEGIN, END, text(records))


def main() -> None:
    """Run, or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.add_argument("folder", type=Path, help="of the study's runs")
    one.add_argument("--demonstrations", type=int, nargs="+", default=[5])
    one.add_argument("--tasks", nargs="*", default=[], help="only policies for these tasks")
    one.add_argument("--seeds", type=int, nargs="+", default=[0])
    one.add_argument("--episodes", type=int, default=10, help="of each of the 40 tasks")
    one.add_argument("--off", action="store_true", help="turn the adapters off")
    one.add_argument("--out", type=Path, default=Path("runs/forgetting"))
    one.set_defaults(call=run)
    shown = commands.add_parser("table")
    shown.add_argument("folder", type=Path, help="of records, or a file that --out wrote")
    shown.add_argument("--out", type=Path, help="one file of all records")
    shown.add_argument("--page", type=Path, help="rewrite the table of a page")
    shown.set_defaults(call=table)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
