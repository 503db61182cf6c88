"""Gradient steps a second of behaviour cloning: ours against the usual Decision Transformers, in one run.

    python benchmarks/training.py --threads 2 --out runs/training.json

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

from eva_rl.agents import DecisionTransformer, DecisionTransformerConfig
from eva_rl.batch import WindowBatch
from eva_rl.training.bc import autocast

OBSERVATION, ACTION = 39, 4


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


def measure(options: argparse.Namespace, width: int, window: int) -> dict[str, float]:
    """Median seconds a gradient step, by implementation."""
    torch.manual_seed(0)
    B, heads = options.batch, width // 32
    batch = WindowBatch(
        observations=torch.randn(B, window, OBSERVATION),
        actions=torch.rand(B, window, ACTION) * 2 - 1,
        returns_to_go=torch.rand(B, window, 1),
        timesteps=torch.arange(window).repeat(B, 1),
    ).to(options.device)
    config = DecisionTransformerConfig(
        OBSERVATION, ACTION, width, options.layers, heads, context_length=window, max_timestep=1000
    )
    networks = {
        "eva-rl": DecisionTransformer(config),
        "transformers": HuggingFace(width, options.layers, heads),
        "nn.MultiheadAttention": MultiheadTransformer(width, options.layers, heads),
    }
    steps = {name: stepper(network.to(options.device), batch) for name, network in networks.items()}
    if options.variants:
        steps["eva-rl, bfloat16"] = stepper(DecisionTransformer(config).to(options.device), batch, "bfloat16")
        compiled = torch.compile(DecisionTransformer(config).to(options.device))
        steps["eva-rl, torch.compile"] = stepper(compiled, batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--windows", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", action="store_true", help="also ours in bfloat16, and under torch.compile")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("width", "window", "implementation", "gradient steps/s", "ours is faster by")
    rows = []
    for width in options.widths:
        for window in options.windows:
            seconds = measure(options, width, window)
            for name, value in seconds.items():
                ratio = value / seconds["eva-rl"]
                table.add_row(str(width), str(window), name, f"{1 / value:.2f}", f"{ratio:.2f}")
                rows.append({"width": width, "window": window, "name": name, "seconds": value, "ratio": ratio})
    Console().print(table)
    if options.out:
        machine = {"threads": options.threads, "device": options.device, "processor": platform.machine()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
