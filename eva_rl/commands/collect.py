"""``python -m eva_rl.collect``: demonstrations from Meta-World's scripted experts, in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eva_rl.commands.command import console, register, run_command
from eva_rl.commands.options import EnvOptions, NoiseOptions, between, group, option, positive
from eva_rl.data import write_episodes
from eva_rl.demonstrations import ActionNoise, collect_expert
from eva_rl.errors import UserError
from eva_rl.seeding import MAX_SEED

HELP = """
Collect demonstrations of a Meta-World task from its scripted expert into one HDF5 file (Minari's episode layout).
The same arguments give the same episodes, with any number of workers.

Examples:
  python -m eva_rl.collect env=push-v3 episodes=25 out=push.h5
  python -m eva_rl.collect env=push-v3 episodes=100 noise.std=0.4 seed=7 out=noisy.h5
"""


@dataclass
class CollectConfig:
    """Config of ``python -m eva_rl.collect``."""

    episodes: int = option(25, "episodes to keep")
    out: str = option("", "the file to write; empty takes data/<task>.h5")
    seed: int = option(0, "chooses the goals and the noise")
    only_successes: bool = option(True, "leave out episodes in which the expert failed")
    workers: int = option(2, "processes")
    env: EnvOptions = group(EnvOptions, "the task")
    noise: NoiseOptions = group(NoiseOptions, "action noise")

    def __post_init__(self) -> None:
        positive(episodes=self.episodes, workers=self.workers)
        between(0, MAX_SEED, seed=self.seed)


register("collect", CollectConfig, {})


def collect(config: CollectConfig) -> None:
    """Play, and write the file."""
    out = Path(config.out or f"data/{config.env.id.split('/')[-1]}.h5").expanduser()
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten. Name another file with out=, or remove it.")
    data = collect_expert(
        config.env.id,
        config.episodes,
        seed=config.seed,
        noise=ActionNoise(config.noise.std, config.noise.burst_probability),
        horizon=config.env.horizon,
        only_successes=config.only_successes,
        workers=config.workers,
    )
    write_episodes(out, data, {"seed": config.seed, **{f"noise_{k}": v for k, v in asdict(config.noise).items()}})
    solved = int(data.successes[data.offsets[1:] - 1].sum()) if data.successes is not None else 0
    console.print(
        f"{data.env_id}: {data.num_episodes} episodes, {data.num_steps} env steps, {solved} solved, mean return "
        f"{data.returns.mean():.1f}. File: {out}",
        soft_wrap=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("collect", CollectConfig, collect, HELP, argv)
