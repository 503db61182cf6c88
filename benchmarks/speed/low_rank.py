"""CPU time of a gradient step: full fine-tuning, PEFT's low-rank layers, and the fused ones, interleaved in one run.

    python -m benchmarks.speed.low_rank --threads 1

Every row trains the same policy (the shipped ``mt40``, or random weights of another size) on the same random windows.
The ratio is the median over rounds of a step's time over the full step's time of the same round, which other work on
the machine disturbs least.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

import eva_rl
from eva_rl.adapters import attach_adapter
from eva_rl.adapters.fused import fuse, unfuse
from eva_rl.agents import SIZES, DecisionTransformer, DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.training.compiling import compiled
from eva_rl.training.losses import clone_loss

Step = Callable[[], None]
GRADIENT_CLIP = 0.25
WARMUP = 3  # rounds; CUDA graphs are recorded in the second and replayed from the third on


def make_windows(batch_size: int, steps: int, device: str) -> WindowBatch:
    """Random windows without padding."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(batch_size, steps, *shape, generator=generator).to(device)

    return WindowBatch(
        observations=draw(39),
        actions=2 * draw(4) - 1,
        returns_to_go=draw(1),
        timesteps=torch.arange(steps, device=device).repeat(batch_size, 1),
        attention_mask=torch.ones(batch_size, steps, dtype=torch.bool, device=device),
        rewards=draw(1),
    )


def make_policy(options: argparse.Namespace) -> DecisionTransformerPolicy:
    """The shipped policy, or its like of another size with random weights."""
    policy = eva_rl.load_policy("mt40", options.device)
    if options.size:
        torch.manual_seed(0)
        network = DecisionTransformer(replace(policy.network.config, **SIZES[options.size])).to(options.device)
        policy = DecisionTransformerPolicy(network, policy.scaling, policy.conditioning, env_id=policy.env_id)
    return policy


def make_step(method: str, batch: WindowBatch, options: argparse.Namespace, *, fused: bool) -> Step:
    """A whole gradient step, as the training loop takes it."""
    policy = make_policy(options)
    attach_adapter(policy, method, rank=options.rank)
    (fuse if fused else unfuse)(policy.network)
    parameters = [p for p in policy.network.train().parameters() if p.requires_grad]
    network = compiled(policy.network, options.compile)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bfloat16"):
            loss = clone_loss(network, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
        optimizer.step()

    return step


def make_forward(batch: WindowBatch, options: argparse.Namespace) -> Step:
    """The forward pass alone."""
    network = compiled(make_policy(options).network, options.compile)

    def forward() -> None:
        with torch.no_grad(), torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bfloat16"):
            clone_loss(network, batch)

    return forward


def seconds(step: Step, device: str) -> float:
    """CPU seconds of a step; on a GPU wall seconds."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - began


def main() -> None:
    """Time everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="env steps a window")
    parser.add_argument("--size", choices=SIZES, help="random weights of this size, in place of mt40")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", default="none", help="none, default, or reduce-overhead (CUDA graphs)")
    parser.add_argument("--mkl", action="store_true", help="leave float32 products of policies to PyTorch's MKL")
    options = parser.parse_args()
    torch.backends.mkldnn.enabled = not options.mkl
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # one for each row
    batch = make_windows(options.batch_size, options.steps, options.device)
    rows: dict[str, Step] = {"full": make_step("full", batch, options, fused=True)}
    for method in ("lora", "dora"):
        if method == "lora" or options.compile == "none":  # torch.compile cannot trace PEFT's DoRA as one graph
            rows[f"{method}, PEFT's layers"] = make_step(method, batch, options, fused=False)
        rows[f"{method}, fused"] = make_step(method, batch, options, fused=True)
    rows["forward alone"] = make_forward(batch, options)
    times: dict[str, list[float]] = {name: [] for name in rows}
    for round_ in range(options.rounds + WARMUP):
        for name, step in rows.items():
            taken = seconds(step, options.device)
            if round_ >= WARMUP:
                times[name].append(taken)
    compile_ = "" if options.compile == "none" else f", compiled ({options.compile})"
    shape = f"{options.batch_size} windows of {options.steps} env steps"
    table = Table(
        "step", "ms, median", "over full", title=f"{options.size or 'mt40'}, {options.precision}{compile_}: {shape}"
    )
    for name, taken_ in times.items():
        ratio = median(one / full for one, full in zip(taken_, times["full"], strict=True))
        table.add_row(name, f"{1e3 * median(taken_):.1f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
