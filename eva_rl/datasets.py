"""``python -m eva_rl.datasets``: list, show, check, filter and convert offline data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eva_rl.agents.policy_folder import shipped_policies
from eva_rl.cli.command import run_command
from eva_rl.cli.parsing import register
from eva_rl.cli.saving import check_output, data_references, write_output
from eva_rl.data import Trajectories, load_dataset, local_minari_sets, select_episodes
from eva_rl.data.arrays import cache_folder
from eva_rl.data.formats.d4rl_names import D4RL_FILES
from eva_rl.data.formats.minari import minari_root
from eva_rl.data.formats.store import is_store
from eva_rl.envs import score_between
from eva_rl.errors import UserError, counted, shown_number
from eva_rl.files import expanded, read_json
from eva_rl.options import between, group, one_of, option
from eva_rl.seeding import MAX_SEED

HELP = """
Offline data: what is known and local, what is in a data set, whether it is sound, and other formats of it.

Examples:
  python -m eva_rl.datasets
  python -m eva_rl.datasets action=show data=d4rl:hopper-medium-v2
  python -m eva_rl.datasets action=check data=minari:D4RL/door/human-v2
  python -m eva_rl.datasets action=filter data=d4rl:hopper-medium-replay-v2 data.top=0.1 out=best.h5
  python -m eva_rl.datasets action=convert data=d4rl:hopper-medium-v2 out=minari:mine/hopper-medium-v0

data= takes d4rl:NAME, d4rl:FILE, minari:ID, trajectories:PATH or a path; ?actions=clip and ?horizon=1000 may follow.
out= takes FILE.h5, minari:NAMESPACE/NAME-v0, or a folder, which is mapped into memory instead of read.
"""

BARS, BAR_WIDTH = 10, 40
HASH_ROWS = 1 << 18


@dataclass
class SelectedData:
    """The data set and which of its episodes."""

    source: str = option("", "d4rl:NAME, d4rl:FILE, minari:ID, trajectories:PATH or a path; same as data=")
    top: float = option(1.0, "keep this fraction of the episodes, with the highest returns")
    first: int = option(0, "keep the first N episodes; 0 keeps all")
    sample: int = option(0, "keep N episodes, drawn at random by data.seed; 0 keeps all")
    seed: int = option(0, "seed of data.sample")
    min_return: float | None = option(None, "lowest return that is kept; null for any")
    allow_pickle: bool = option(False, "open pickles, admitting numpy arrays and builtin containers alone")
    skip_damaged: bool = option(False, "leave out damaged episodes, with a count, instead of refusing the data")

    def __post_init__(self) -> None:
        between(1e-9, 1, data__top=self.top)
        between(0, 10**9, data__first=self.first, data__sample=self.sample)
        between(0, MAX_SEED, data__seed=self.seed)

    @property
    def selects(self) -> bool:
        """Whether some episodes may be left out."""
        return self.top < 1 or self.first > 0 or self.sample > 0 or self.min_return is not None


@dataclass
class DatasetsConfig:
    """Config of ``python -m eva_rl.datasets``."""

    action: str = option(
        "", "list, show, check, filter or convert; empty shows what data= names, and lists where it names nothing"
    )
    out: str = option("", "where filter and convert write: FILE.h5, minari:ID or a folder")
    data: SelectedData = group(SelectedData, "the data set")

    def __post_init__(self) -> None:
        self.action = self.action or ("show" if self.data.source else "list")
        one_of(tuple(ACTIONS), action=self.action)


def list_datasets(config: DatasetsConfig) -> None:
    """Print the data sets that can be named and those that are on this machine."""
    table = Table("data=", "episodes", "env steps", "where")
    for name, said in local_minari_sets().items():
        table.add_row(escape(f"minari:{name}"), str(said.get("total_episodes")), str(said.get("total_steps")), "local")
    cache = cache_folder() / "d4rl"
    for name, file in D4RL_FILES.items():
        path = cache / Path(file).name
        table.add_row(f"d4rl:{name}", "", "", escape(str(path)) if path.exists() else "download")
    _print(table)
    _print(
        f"Minari's sets lie below {minari_root()} (MINARI_DATASETS_PATH), D4RL's files in {cache} (EVA_RL_CACHE). "
        "More of Minari's: `minari list remote`."
    )


def show(config: DatasetsConfig) -> None:
    """Print what is in a data set."""
    data = _load(config)
    references = data_references(data)
    table = Table("", "", show_header=False, title=escape(data.source))
    for key, value in _facts(data).items():
        table.add_row(key, escape(value))
    if references:
        scores = score_between(references, data.returns)
        table.add_row("normalised score (0-100)", _spread(scores))
    table.add_row("fitting policies", ", ".join(_fitting_policies(data)) or "none of the shipped ones")
    _print(table)
    _print(_histogram(data))


def check(config: DatasetsConfig) -> None:
    """Read everything, and say that it is sound; what is not raises."""
    data = _load(config)
    _check_store(data, expanded(config.data.source.removeprefix("trajectories:")))
    _print(f"{escape(data.source)} is sound: {data.amount}, all numbers finite. Content {data.content_hash}.")


def convert(config: DatasetsConfig) -> None:
    """Write a data set in another format."""
    check_output(config.out)
    data = _load(config)
    source = write_output(config.out, data)
    _print(f"{data.amount}. To use them: data={escape(source)}")


def filter_episodes(config: DatasetsConfig) -> None:
    """Write some episodes of a data set."""
    if not config.data.selects:
        raise UserError(
            "No filter given. Type for instance data.top=0.1, data.first=100, data.sample=5 or data.min_return=9."
        )
    convert(config)


ACTIONS: dict[str, Callable[[DatasetsConfig], None]] = {
    "list": list_datasets,
    "show": show,
    "check": check,
    "filter": filter_episodes,
    "convert": convert,
}

register("datasets", DatasetsConfig, {})


def _load(config: DatasetsConfig) -> Trajectories:
    chosen = config.data
    if not chosen.source:
        raise UserError(f"action={config.action} needs data=, for instance data=d4rl:hopper-medium-v2.")
    data = load_dataset(chosen.source, allow_pickle=chosen.allow_pickle, skip_damaged=chosen.skip_damaged)
    return select_episodes(
        data,
        top=chosen.top,
        first=chosen.first,
        min_return=chosen.min_return,
        sample=chosen.sample,
        seed=chosen.seed,
    )


def _check_store(data: Trajectories, folder: Path) -> None:
    """Read a store as other formats are when they are opened."""
    if not is_store(folder):
        return
    for name in ("observations", "actions", "rewards", "final_observations"):
        array = data.column(name)
        for begin in range(0, len(array), HASH_ROWS):
            rows = array[begin : begin + HASH_ROWS]
            wrong = np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(1))
            if len(wrong):
                raise UserError(f"{folder / name}.npy, row {begin + wrong[0]}: not a finite number. Convert it again.")


def _facts(data: Trajectories) -> dict[str, str]:
    facts = {
        "env": data.env_id or "unknown",
        "episodes": str(data.num_episodes),
        "env steps": str(data.num_steps),
        "episode length": _spread(data.lengths),
        "observation, action": f"{data.observation_dim}, {data.action_dim} numbers",
        "action range": f"{data.actions.min():.3g} to {data.actions.max():.3g}",
        "return": _spread(data.returns),
        "terminated, truncated": f"{int(data.terminations.sum())}, {int(data.truncations.sum())} episodes",
        "content": data.content_hash,
    }
    if data.successes is not None:
        solved = np.logical_or.reduceat(data.successes, data.offsets[:-1])
        facts["solved"] = f"{int(solved.sum())} of {counted(data.num_episodes, 'episode')}"
    return facts


def _spread(values: NDArray[Any]) -> str:
    return f"mean {shown_number(values.mean())}, {shown_number(values.min())} to {shown_number(values.max())}"


def _fitting_policies(data: Trajectories) -> list[str]:
    """Shipped policies with the dimensions of the data."""
    fitting = []
    for name, folder in shipped_policies().items():
        shape = read_json(folder / "policy.json").get("architecture", {})
        if (shape.get("observation_dim"), shape.get("action_dim")) == (data.observation_dim, data.action_dim):
            fitting.append(name)
    return fitting


def _histogram(data: Trajectories) -> Table:
    counts, edges = np.histogram(data.returns, BARS)
    table = Table("return", "episodes", "", title="Returns")
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * round(BAR_WIDTH * count / counts.max()) or ("▏" if count else "")
        table.add_row(f"{shown_number(low)} to {shown_number(high)}", str(count), bar)
    return table


def _print(what: str | Table) -> None:
    Console(highlight=False, emoji=False).print(what, soft_wrap=isinstance(what, str))


def run(config: DatasetsConfig) -> None:
    """Do what ``action`` names."""
    ACTIONS[config.action](config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("datasets", run, HELP, argv)


if __name__ == "__main__":
    raise SystemExit(main())
