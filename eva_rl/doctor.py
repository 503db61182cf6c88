"""``eva-rl doctor``: what is installed, what this machine offers, how fast it is, and what would make it faster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from time import perf_counter, process_time
from typing import TYPE_CHECKING

from eva_rl.cli.command import run_command
from eva_rl.cli.parsing import register
from eva_rl.options import between, option, positive

if TYPE_CHECKING:
    import torch

    from eva_rl.agents import DecisionTransformerPolicy

HELP = """
Show versions, device, renderer and threads, measure the simulator and the policy on this machine, and give advice.

Examples:
  eva-rl doctor
  eva-rl doctor threads=1 env=Hopper-v5 policy=hopper
"""
SLOW_ENV_STEPS, SLOW_POLICY_STEPS = 500, 20
"""Steps a second below which something other than the work itself is slow: another program, or a quota."""
EPISODE = 100
"""Steps after which the measured simulator and policy start an episode."""
BUSY = 0.6
"""Share of the wall time that a single thread gets at least, on a machine that is not busy."""


@dataclass
class DoctorConfig:
    """Config of ``eva-rl doctor``."""

    env: str = option("metaworld/push-v3", "task whose simulator to measure")
    policy: str = option("mt40", "policy to measure")
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    threads: int = option(0, "CPU threads; 0 uses those that this process may use")
    seconds: float = option(2.0, "seconds of each measurement")

    def __post_init__(self) -> None:
        between(0, 4096, threads=self.threads)
        positive(seconds=self.seconds)


register("doctor", DoctorConfig, {})


def doctor(config: DoctorConfig) -> None:
    """Print what was found, and advice."""
    import torch
    from rich.table import Table

    from eva_rl.cli.console import console, say
    from eva_rl.cli.machine import choose_device, versions
    from eva_rl.limits.memory import memory_limit
    from eva_rl.limits.threads import thread_limits

    device, limits = choose_device(config.device), thread_limits()
    threads = config.threads or limits.threads
    torch.set_num_threads(threads)
    speeds = measure(config, device)
    table = Table(show_header=False)
    for name, value in versions().items():
        table.add_row(name, value)
    table.add_row("device", describe(device))
    table.add_row("renderer", renderer() or "none")
    table.add_row("threads", f"{threads} ({limits})")
    table.add_row("memory", f"{memory_limit() / 2**30:.1f} GiB")
    for name, speed in speeds.items():
        table.add_row(name, f"{speed} a second ({speed.cpu_share:.0%} of the time on a CPU)")
    console.print(table)
    found = list(advice(threads, limits.cpus, speeds, has_renderer=renderer() is not None))
    for line in found or ["Nothing to improve."]:
        say(f"- {line}")


def describe(device: torch.device) -> str:
    """A device, with the name of a GPU."""
    import torch

    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def renderer() -> str | None:
    """What would render video frames here; None where nothing can."""
    from eva_rl.rollouts.video import can_render, choose_renderer

    choose_renderer()
    return os.environ.get("MUJOCO_GL", "a display") if can_render() else None


@dataclass(frozen=True)
class Speed:
    """How fast something is.

    Attributes:
        per_second: Calls a second, by the wall clock.
        cpu_share: CPU seconds of this process for each second; above 1 with several threads.
    """

    per_second: float
    cpu_share: float

    def __str__(self) -> str:
        """The calls a second, with a digit after the point below ten."""
        return f"{self.per_second:,.{int(self.per_second < 10)}f}"


def measure(config: DoctorConfig, device: torch.device) -> dict[str, Speed]:
    """The speed of the simulator, of a policy that acts in one environment, and of its gradient steps."""
    from eva_rl.adapters import load_policy
    from eva_rl.training.options import BCOptions

    policy = load_policy(config.policy, device, merge=True)
    policy.network.requires_grad_(True)  # a loaded adapter is frozen, and so is what it was merged into
    return {
        f"env steps of {config.env}": _simulator(config),
        f"policy steps of {config.policy}": _acting(policy, config.seconds),
        f"gradient steps of {config.policy} ({BCOptions.batch_size} windows)": _learning(policy, config.seconds),
    }


def _simulator(config: DoctorConfig) -> Speed:
    from eva_rl.envs import make_env

    env = make_env(config.env)
    steps = count()

    def step() -> None:
        if next(steps) % EPISODE == 0:
            env.reset(seed=0)
        if any(env.step(env.action_space.sample())[2:4]):
            env.reset(seed=0)

    try:
        return timed(step, config.seconds)
    finally:
        env.close()


def _acting(policy: DecisionTransformerPolicy, seconds: float) -> Speed:
    import numpy as np

    policy.reset([policy.env_id])
    observation, reward = np.zeros((1, policy.observation_dim), np.float32), np.zeros(1, np.float32)
    starts = (np.array([step % EPISODE == 0]) for step in count())
    return timed(lambda: policy.act(observation, reward, next(starts)), seconds)


def _learning(policy: DecisionTransformerPolicy, seconds: float) -> Speed:
    import torch

    from eva_rl.batch import WindowBatch
    from eva_rl.training.options import BCOptions

    shape, device = (BCOptions.batch_size, policy.network.config.context_length), policy.device
    batch = WindowBatch(
        observations=torch.zeros(*shape, policy.observation_dim, device=device),
        actions=torch.zeros(*shape, policy.action_dim, device=device),
        returns_to_go=torch.zeros(*shape, 1, device=device),
        timesteps=torch.zeros(shape, dtype=torch.int64, device=device),
    )

    def learn() -> None:
        policy.network(batch).square().mean().backward()
        policy.network.zero_grad()

    with torch.enable_grad():
        return timed(learn, seconds)


def timed(call: Callable[[], object], seconds: float) -> Speed:
    """Call something for a while, after once for nothing."""
    call()
    began, cpu, calls = perf_counter(), process_time(), 0
    while perf_counter() - began < seconds:
        call()
        calls += 1
    wall = perf_counter() - began
    return Speed(calls / wall, (process_time() - cpu) / wall)


def advice(threads: int, cpus: int, speeds: dict[str, Speed], *, has_renderer: bool) -> Iterator[str]:
    """What would help, one line each."""
    simulator, acting, _ = speeds.values()
    if min(simulator.cpu_share, acting.cpu_share) < BUSY:
        fewer = " Fewer threads may be faster: threads=1." if threads > 1 else ""
        yield (
            f"One thread got only {min(simulator.cpu_share, acting.cpu_share):.0%} of a CPU: other programs run "
            f"here, or a quota is used up.{fewer}"
        )
    elif simulator.per_second < SLOW_ENV_STEPS or acting.per_second < SLOW_POLICY_STEPS:
        yield "One thread is slow here: an evaluation takes minutes (eval.episodes=20 shortens it)."
    if threads < cpus:
        yield (
            f"{cpus} CPUs are available, {threads} in use (OMP_NUM_THREADS or threads=). Unset it, or type "
            f"threads={cpus}."
        )
    if cpus >= 8:
        yield f"benchmark starts several runs at once here: jobs={cpus // 2} threads=2."
    if not has_renderer:
        yield "No renderer: video=true needs Debian's libosmesa6 (apt-get install libosmesa6) or a GPU with EGL."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("doctor", doctor, HELP, argv)


if __name__ == "__main__":
    raise SystemExit(main())
