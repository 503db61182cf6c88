"""``python -m eva_rl.collect``: demonstrations from scripted experts, or from an agent trained on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from eva_rl.cli.collecting import collect_shown
from eva_rl.cli.command import run_command
from eva_rl.cli.console import say
from eva_rl.cli.parsing import register
from eva_rl.cli.saving import MINARI, check_output, write_output
from eva_rl.configs.groups import EnvOptions, NoiseOptions
from eva_rl.data import Trajectories
from eva_rl.envs import canonical_id
from eva_rl.envs.deadline import limit_calls
from eva_rl.errors import UserError
from eva_rl.options import between, group, one_of, option, positive
from eva_rl.rollouts.experts import check_scripted
from eva_rl.rollouts.trained_experts import TrainedExpert, collect_trained
from eva_rl.seeding import MAX_SEED

HELP = """
Collect demonstrations of a Meta-World task from its scripted expert into one HDF5 file (Minari's episode layout),
a Minari data set, or a folder of arrays that are mapped into memory.
The same arguments give the same episodes, with any number of workers.
Tasks without a scripted expert (MuJoCo) take expert=sac: Stable-Baselines3's SAC is trained until its mean return
reaches expert.until, and the episodes are its own, with its exploration.

Examples:
  python -m eva_rl.collect env=push-v3 episodes=25 out=push.h5
  python -m eva_rl.collect env=push-v3 episodes=100 noise.std=0.4 seed=7 out=noisy.h5
  python -m eva_rl.collect env=push-v3 episodes=25 out=minari:mine/push-v0
  python -m eva_rl.collect env=Hopper-v5 expert=sac expert.until=1200 episodes=200 out=hopper-medium.h5
"""


@dataclass
class ExpertOptions:
    """Who demonstrates."""

    name: str = option("scripted", "scripted (Meta-World's own), or sac (trained on the spot); same as expert=")
    steps: int = option(100_000, "sac: maximum env steps of training")
    until: float | None = option(None, "sac: mean return at which training ends; null trains for all steps")

    def __post_init__(self) -> None:
        one_of(("scripted", "sac"), expert=self.name)
        positive(expert__steps=self.steps)
        given = [f"expert.{key}={getattr(self, key)}" for key in ("steps", "until") if self._changed(key)]
        if self.name == "scripted" and given:
            raise UserError(f"{', '.join(given)}: expert=scripted is not trained. Leave it out, or use expert=sac.")

    def _changed(self, key: str) -> bool:
        return bool(getattr(self, key) != getattr(ExpertOptions, key))


@dataclass
class ExpertNoise(NoiseOptions):
    """Disturbance of the scripted experts' actions; the undisturbed action is what is imitated."""

    PREFIX: ClassVar[str] = "noise."


@dataclass
class CollectConfig:
    """Config of ``python -m eva_rl.collect``."""

    episodes: int = option(25, "episodes to keep")
    out: str = option("", "FILE.h5, minari:NAMESPACE/NAME-v0 or a folder; empty uses data/<task>.h5")
    seed: int = option(0, "seed of the goals and the noise")
    only_successes: bool = option(True, "scripted: leave out episodes in which the expert failed")
    workers: int = option(2, "processes")
    env: EnvOptions = group(EnvOptions, "the task")
    expert: ExpertOptions = group(ExpertOptions, "who demonstrates")
    noise: ExpertNoise = group(ExpertNoise, "action noise of a scripted expert")

    def __post_init__(self) -> None:
        given = [f"noise.{key}={value:g}" for key, value in asdict(self.noise).items() if value]
        if self.expert.name == "sac" and given:
            raise UserError(
                f"{', '.join(given)}: expert=sac explores with noise of its own. Leave it out, or use expert=scripted."
            )
        positive(episodes=self.episodes, workers=self.workers)
        between(0, MAX_SEED, seed=self.seed)


register("collect", CollectConfig, {})


def collect(config: CollectConfig) -> None:
    """Play, and write the file."""
    out = config.out or f"data/{config.env.id.split('/')[-1]}.h5"
    check_output(out)
    limit_calls(config.env.timeout)
    data = _episodes(config)
    scripted = config.expert.name == "scripted"
    noise = {f"noise_{key}": value for key, value in asdict(config.noise).items()} if scripted else {}
    name = "scripted expert" if scripted else "SAC"
    about = {"algorithm_name": name} if out.startswith(MINARI) else {"seed": config.seed, **noise}
    source = write_output(out, data, about)
    solved = int(data.successes[data.offsets[1:] - 1].sum()) if data.successes is not None else 0
    say(
        f"{data.env_id}: {data.amount}, {solved} solved, mean return {data.returns.mean():.1f}. "
        f"To use them: data={source}",
    )


def _episodes(config: CollectConfig) -> Trajectories:
    if config.expert.name == "sac":
        until = float("inf") if config.expert.until is None else config.expert.until
        expert = TrainedExpert(config.expert.steps, until, config.env.horizon)
        return collect_trained(config.env.id, config.episodes, expert, seed=config.seed)
    check_scripted(canonical_id(config.env.id), "expert=sac (an agent trained on the spot)")
    return collect_shown(config.env.id, config.episodes, config, config.env.horizon)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("collect", collect, HELP, argv)


if __name__ == "__main__":
    raise SystemExit(main())
