"""Cost and quality of EVA's initialisation: plain forwards, this engine and PEFT's, side by side in one run.

    python -m benchmarks.eva.initialisation --widths 128 256 --contexts 20 --out results/eva_init

Everyone sees the same Decision Transformer, batches and target layers. Quality is measured on batches that nobody saw:
the variance of each layer's held-out inputs inside the found directions, over the most that as many directions could
capture of those same rows; 1 is the optimum. Seconds are CPU seconds of this process (wall seconds on CUDA). A row per
method and number of batches gives a curve of quality for cost.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.eva import get_eva_state_dict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from eva_rl import eva

TARGETS = ["c_attn", "c_proj", "c_fc"]
STATES, ACTIONS = 39, 4
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One point of a curve; quality is None for plain forwards and for runs that were cut off."""

    width: int
    context: int
    method: str
    batches: int
    seconds: float
    quality: float | None = None
    worst_layer: float | None = None
    note: str = ""


def make_model(width: int, layers: int, device: str) -> nn.Module:
    """A randomly initialised Decision Transformer of `transformers`."""
    torch.manual_seed(0)
    config = DecisionTransformerConfig(
        state_dim=STATES,
        act_dim=ACTIONS,
        hidden_size=width,
        n_layer=layers,
        n_head=max(2, width // 64),
        max_ep_len=1000,
        bos_token_id=0,
        eos_token_id=0,
    )
    return DecisionTransformerModel(config).to(device).eval()


def make_batches(count: int, size: int, context: int, seed: int, device: str) -> list[Batch]:
    """Windows of smooth trajectories: a few latent walks seen through a fixed nonlinear map, padded on the left."""
    shared = torch.Generator().manual_seed(1234)
    to_states = torch.randn(10, STATES, generator=shared)
    to_actions = torch.randn(10, ACTIONS, generator=shared)
    g = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        steps = 0.3 * torch.randn(size, context, 10, generator=g)
        latent = torch.randn(size, 1, 10, generator=g) + steps.cumsum(1)
        first = torch.randint(0, context // 2, (size, 1), generator=g)
        start = torch.randint(0, 1000 - context, (size, 1), generator=g)
        noise = 0.05 * torch.randn(size, context, STATES, generator=g)
        batch = {
            "states": torch.tanh(latent @ to_states / 3) + noise,
            "actions": torch.tanh(latent @ to_actions),
            "rewards": latent[..., :1],
            "returns_to_go": latent[..., 1:2].abs() * 5,
            "timesteps": start + torch.arange(context),
            "attention_mask": (torch.arange(context) >= first).long(),
        }
        batches.append({name: value.to(device) for name, value in batch.items()})
    return batches


class Judge:
    """Held-out second moments of every target layer, in float64."""

    def __init__(self, model: nn.Module, batches: list[Batch], center: bool) -> None:
        with torch.no_grad(), eva.listen(model, TARGETS, method="moments", memory_budget=2**40) as heard:
            for batch in batches:
                with heard.masked(batch["attention_mask"]):
                    model(**batch)
        self.moments: dict[str, Tensor] = {}
        for name, group in heard.group_of.items():
            sums = group.sums()
            mean = sums.linear.sum(0) / sums.count.sum()
            scatter = sums.core.sum(0) - (sums.count.sum() * torch.outer(mean, mean) if center else 0)
            self.moments[name] = scatter
        self.spectra = {
            id(moment): torch.linalg.eigvalsh(moment).flip(0).cumsum(0) for moment in set(self.moments.values())
        }

    def qualities(self, found: dict[str, Tensor]) -> list[float]:
        """Captured over best possible, for each layer that got directions."""
        scores = []
        for name, components in found.items():
            if len(components):
                moment = self.moments[name]
                captured = (components.to(moment) @ moment * components.to(moment)).sum()
                scores.append(float(captured / self.spectra[id(moment)][len(components) - 1]))
        return scores


def clock(device: str) -> float:
    """CPU seconds, or wall seconds around synchronised CUDA work."""
    if device != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Setting:
    """What everyone is given."""

    model: nn.Module
    batches: list[Batch]
    judge: Judge
    width: int
    context: int
    options: argparse.Namespace

    def now(self) -> float:
        """Seconds on the clock of the device."""
        return clock(self.options.device)

    def row(self, method: str, batches: int, seconds: float, found: dict[str, Tensor] | None, note: str = "") -> Row:
        """Judge what was found."""
        scores = self.judge.qualities(found) if found else []
        mean, worst = (sum(scores) / len(scores), min(scores)) if scores else (None, None)
        return Row(self.width, self.context, method, batches, seconds, mean, worst, note)


def forwards(setting: Setting) -> Iterator[Row]:
    """The passes alone."""
    for count in counts(len(setting.batches)):
        began = setting.now()
        with torch.no_grad():
            for batch in setting.batches[:count]:
                setting.model(**batch)
        yield setting.row("forwards alone", count, setting.now() - began, None)


def ours(setting: Setting, method: str) -> Iterator[Row]:
    """This engine, stopped after 1, 2, 4, ... batches."""
    for count in counts(len(setting.batches)):
        yield _ours(setting, f"ours, {method}", setting.batches[:count], method=method, tau=1.0)


def ours_stopping(setting: Setting) -> Iterator[Row]:
    """This engine as users call it: it chooses how to keep moments and when to stop."""
    for tau in (0.9, 0.95, 0.99):
        yield _ours(setting, f"ours, stops at tau={tau:g}", setting.batches, method="auto", tau=tau)


def _ours(setting: Setting, name: str, batches: list[Batch], **options: Any) -> Row:
    rank, rho, center = setting.options.rank, setting.options.rho, setting.options.center
    began = setting.now()
    result = eva.compute(setting.model, batches, targets=TARGETS, rank=rank, rho=rho, center=center, **options)
    seconds = setting.now() - began
    note = "+".join(sorted({layer.method for layer in result.layers.values()})) + f", {result.stopped}"
    return setting.row(name, result.batches, seconds, result.state_dict(), note)


class OutOfTime(Exception):  # noqa: N818 - not an error
    """Raised inside PEFT's loop, which has no bound of its own."""


def peft(setting: Setting) -> Iterator[Row]:
    """PEFT's get_eva_state_dict with the functions that a Decision Transformer needs, for several tau."""
    for tau in setting.options.peft_tau:
        yield _peft(setting, tau)


def _peft(setting: Setting, tau: float) -> Row:
    config = LoraConfig(
        r=setting.options.rank,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=setting.options.rho, tau=tau),
    )
    calls = 0
    began = setting.now()

    def forward(model: nn.Module, batch: Batch) -> Any:
        nonlocal calls
        if setting.now() - began > setting.options.peft_seconds:
            raise OutOfTime
        calls += 1
        return model(**batch)

    def rows_kept(batch: Batch, _: Any) -> Tensor:
        return batch["attention_mask"].repeat_interleave(3, dim=1).bool()

    def layer_rows(x: Any, keep: Tensor, _: str) -> Tensor:
        return (x[0] if isinstance(x, tuple) else x)[keep]

    try:
        found = get_eva_state_dict(
            setting.model,
            setting.batches,
            config,
            forward_fn=forward,
            prepare_model_inputs_fn=rows_kept,
            prepare_layer_inputs_fn=layer_rows,
            show_progress_bar=False,
        )
    except OutOfTime:
        found = None
        for module in setting.model.modules():  # its hooks stay behind when the forward raises
            module._forward_hooks.clear()
    note = f"cut off after {setting.options.peft_seconds:g} s" if found is None else ""
    return setting.row(f"PEFT, tau={tau:g}", calls, setting.now() - began, found, note)


def counts(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**k for k in range(most.bit_length()) if 2**k <= most]


def measure(width: int, context: int, options: argparse.Namespace) -> Iterator[Row]:
    """All methods at one width and context length."""
    model = make_model(width, options.layers, options.device)
    made = make_batches(options.batches, options.batch_size, context, 0, options.device)
    held_out = make_batches(8, options.batch_size, context, 1, options.device)
    judge = Judge(model, held_out, options.center)
    setting = Setting(model, made, judge, width, context, options)
    with torch.no_grad():
        model(**made[0])  # warm up
    methods: list[Callable[[Setting], Iterator[Row]]] = [forwards]
    methods += [lambda s, m=method: ours(s, m) for method in options.methods]
    methods += [ours_stopping, *([peft] if options.peft_seconds > 0 else [])]
    for method in methods:
        yield from method(setting)


def show(rows: list[Row], console: Console) -> None:
    """Print one table."""
    table = Table("width", "K", "method", "batches", "seconds", "quality", "worst layer", "note")
    for row in rows:
        shares = ["" if share is None else f"{share:.4f}" for share in (row.quality, row.worst_layer)]
        columns = (
            str(row.width),
            str(row.context),
            row.method,
            str(row.batches),
            f"{row.seconds:.2f}",
            *shares,
            row.note,
        )
        table.add_row(*columns)
    console.print(table)


def save(rows: list[Row], options: argparse.Namespace) -> None:
    """Write eva_init.csv and eva_init.json, the latter with what it was measured on."""
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "eva_init.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    machine = {
        "processor": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    report = {"options": vars(options), "machine": machine, "rows": [asdict(row) for row in rows]}
    (folder / "eva_init.json").write_text(json.dumps(report, indent=1))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[20])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rho", type=float, default=1.0)
    parser.add_argument("--center", action=argparse.BooleanOptionalAction, default=True, help="PEFT's always does")
    parser.add_argument("--batches", type=int, default=16, help="that exist; PEFT cycles through them")
    parser.add_argument("--batch-size", type=int, default=64, help="windows per batch")
    parser.add_argument("--methods", nargs="+", default=["moments", "auto", "sketch", "svd"])
    parser.add_argument("--peft-seconds", type=float, default=120, help="bound per run of PEFT; 0 leaves it out")
    parser.add_argument("--peft-tau", type=float, nargs="+", default=[0.5, 0.9, 0.99])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", default="results/eva_init")
    return parser.parse_args()


def main() -> None:
    """Measure, print, save."""
    options = parse()
    torch.set_num_threads(options.threads)
    console = Console()
    rows: list[Row] = []
    for width in options.widths:
        for context in options.contexts:
            rows += measure(width, context, options)
            show([row for row in rows if (row.width, row.context) == (width, context)], console)
    save(rows, options)


if __name__ == "__main__":
    main()
