"""Gradient steps a second of behaviour cloning: ours against the usual Decision Transformers, in one run.

    python -m benchmarks.speed.training --threads 2 --out runs/training.json
    python -m benchmarks.speed.training --sizes small base large --variants --device cuda

Same shape, batch, window, loss, clipping and AdamW for all: our network; the `DecisionTransformerModel` of
transformers; and one built on `nn.MultiheadAttention`, as offline-RL libraries build it. Rounds are interleaved, so
that a noisy machine disturbs all alike; the ratio of the medians is what counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DecisionTransformerConfig as HFConfig
from transformers import DecisionTransformerModel

from eva_rl.agents import SIZES, DecisionTransformer, DecisionTransformerConfig
from eva_rl.batch import WindowBatch
from eva_rl.training.losses import autocast

OBSERVATION, ACTION = 39, 4
VARIANTS = (
    ("eva-rl, torch.compile", None, "float32"),
    ("eva-rl, CUDA graphs", "reduce-overhead", "float32"),
    ("eva-rl, CUDA graphs, bfloat16", "reduce-overhead", "bfloat16"),
)


class MultiheadBlock(nn.Module):
    """A pre-norm block on PyTorch's fused-projection attention module."""

    def __init__(self, D: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = nn.MultiheadAttention(D, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x: Tensor, blocked: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        y = self.norm_1(x)
        x = x + self.attention(y, y, y, attn_mask=blocked, need_weights=False, is_causal=True)[0]
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out


class MultiheadTransformer(nn.Module):
    """The usual Decision Transformer on `nn.MultiheadAttention`."""

    def __init__(self, D: int, layers: int, heads: int) -> None:
        super().__init__()
        self.returns, self.states, self.actions = nn.Linear(1, D), nn.Linear(OBSERVATION, D), nn.Linear(ACTION, D)
        self.time, self.norm, self.final = nn.Embedding(1000, D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.blocks = nn.ModuleList(MultiheadBlock(D, heads) for _ in range(layers))
        self.head = nn.Sequential(nn.Linear(D, ACTION), nn.Tanh())

    def forward(self, batch: WindowBatch) -> Tensor:
        """(B, T, act)."""
        time_embedding = self.time(batch.timesteps)
        parts = (self.returns(batch.returns_to_go), self.states(batch.observations), self.actions(batch.actions))
        x = torch.stack([part + time_embedding for part in parts], dim=2).flatten(1, 2)
        x = self.norm(x)
        blocked = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, blocked)
        out: Tensor = self.head(self.final(x)[:, 1::3])
        return out


class HuggingFace(nn.Module):
    """transformers' model behind our batch."""

    def __init__(self, D: int, layers: int, heads: int) -> None:
        super().__init__()
        self.model = DecisionTransformerModel(
            HFConfig(
                state_dim=OBSERVATION, act_dim=ACTION, hidden_size=D, n_layer=layers, n_head=heads, max_ep_len=1000,
                activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip

    def forward(self, batch: WindowBatch) -> Tensor:
        """(B, T, act)."""
        mask = torch.ones_like(batch.timesteps)
        out = self.model(
            states=batch.observations, actions=batch.actions, rewards=None, returns_to_go=batch.returns_to_go,
            timesteps=batch.timesteps, attention_mask=mask,
        )  # fmt: skip
        actions: Tensor = out.action_preds
        return actions


def stepper(network: Callable[..., Any], batch: WindowBatch, precision: str = "float32") -> Callable[[], None]:
    """One gradient step of cloning, as a call."""
    assert isinstance(network, nn.Module)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        with autocast(batch.actions.device, precision):
            loss = (network(batch) - batch.actions).float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.25)
        optimizer.step()
        if batch.actions.is_cuda:
            torch.cuda.synchronize()

    return step


def measure(options: argparse.Namespace, shape: tuple[int, int, int, int]) -> dict[str, dict[str, float]]:
    """Median seconds a gradient step and peak memory in MiB (on a GPU), by implementation; and the FLOPs of a step."""
    torch.manual_seed(0)
    B, (width, window, layers, heads) = options.batch, shape
    batch = WindowBatch(
        observations=torch.randn(B, window, OBSERVATION),
        actions=torch.rand(B, window, ACTION) * 2 - 1,
        returns_to_go=torch.rand(B, window, 1),
        timesteps=torch.arange(window).repeat(B, 1),
    ).to(options.device)
    config = DecisionTransformerConfig(
        OBSERVATION, ACTION, width, layers, heads, context_length=window, max_timestep=1000
    )
    networks = {
        "eva-rl": DecisionTransformer(config),
        "transformers": HuggingFace(width, layers, heads),
        "nn.MultiheadAttention": MultiheadTransformer(width, layers, heads),
    }
    if options.ours_only:
        networks = {"eva-rl": networks["eva-rl"]}
    steps = {name: stepper(network.to(options.device), batch) for name, network in networks.items()}
    if options.variants:
        steps["eva-rl, bfloat16"] = stepper(DecisionTransformer(config).to(options.device), batch, "bfloat16")
        for name, mode, precision in VARIANTS[: 1 if options.device == "cpu" else 3]:
            compiled = torch.compile(DecisionTransformer(config).to(options.device), mode=mode, dynamic=False)
            steps[name] = stepper(compiled, batch, precision)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    memory = dict.fromkeys(steps, 0.0)
    for turn in range(options.rounds + 2):
        for name, step in steps.items():
            if options.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            step()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
            memory[name] = 0.0 if options.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    flops = 6 * sum(p.numel() for p in networks["eva-rl"].blocks.parameters()) * B * window * 3
    return {
        name: {"seconds": statistics.median(values), "peak_mib": memory[name], "flops": float(flops)}
        for name, values in seconds.items()
    }


def shapes(options: argparse.Namespace) -> list[tuple[int, int, int, int]]:
    """Width, window, blocks and heads of every network to measure."""
    if options.sizes:
        keys = ("hidden_size", "context_length", "num_layers", "num_heads")
        return [tuple(SIZES[name][key] for key in keys) for name in options.sizes]  # type: ignore[misc]
    return [(width, window, options.layers, width // 32) for width in options.widths for window in options.windows]


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--windows", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="shapes by name, in place of widths and windows")
    parser.add_argument("--ours-only", action="store_true", help="leave the other implementations out")
    parser.add_argument("--peak", type=float, default=0, help="TFLOP/s that the device can do, to show the fraction")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", action="store_true", help="also ours in bfloat16, and under torch.compile")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = ("width", "window", "implementation", "gradient steps/s", "ours is faster by", "GFLOP/s (6ND)", "GPU MiB")
    table = Table(*columns)
    rows = []
    for shape in shapes(options):
        found, (width, window, *_) = measure(options, shape), shape
        for name, value in found.items():
            ratio, rate = value["seconds"] / found["eva-rl"]["seconds"], value["flops"] / value["seconds"] / 1e9
            speed = f"{rate:.0f}" + (f" ({rate / options.peak / 10:.0f} % of peak)" if options.peak else "")
            cells = (
                width,
                window,
                name,
                f"{1 / value['seconds']:.2f}",
                f"{ratio:.2f}",
                speed,
                f"{value['peak_mib']:.0f}" if value["peak_mib"] else "-",
            )
            table.add_row(*map(str, cells))
            rows.append({"width": width, "window": window, "name": name, "ratio": ratio, "gflops": rate, **value})
    Console().print(table)
    if options.out:
        machine = {"threads": options.threads, "device": options.device, "processor": platform.machine()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
