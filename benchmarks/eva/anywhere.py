"""EVA on other people's models: `attach_eva` beside PEFT's own `initialize_lora_eva_weights`, in one process.

Small random models of Hugging Face, the same batches for both, CPU seconds and captured variance: what the directions
capture of the layer's inputs, over the most that as many could (float64 arithmetic on all rows of all batches). PEFT
centres the rows, so that its directions are judged by the covariance, ours by the second moment.

    python -m benchmarks.eva.anywhere --width 128 --layers 4
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from eva_rl import attach_eva

Batch = dict[str, Tensor]


def models(width: int, layers: int) -> dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch], list[str]]]:
    """By name: the model, a batch of 16, and targets."""
    common = {"hidden_size": width, "intermediate_size": 4 * width}
    common |= {"num_hidden_layers": layers, "num_attention_heads": 4}
    gpt = GPT2Config(vocab_size=500, n_positions=64, n_embd=width, n_layer=layers, n_head=4)
    llama = LlamaConfig(vocab_size=500, **common)
    vit = ViTConfig(image_size=32, patch_size=4, **common)
    t5 = T5Config(vocab_size=500, d_model=width, d_kv=width // 4, d_ff=4 * width, num_layers=layers, num_heads=4)
    t5.decoder_start_token_id = 0
    return {
        "GPT-2": (lambda: GPT2LMHeadModel(gpt), text, ["c_attn", "c_proj", "c_fc"]),
        "LLaMA": (lambda: LlamaForCausalLM(llama), text, ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
        "ViT": (lambda: ViTModel(vit), images, ["q_proj", "v_proj", "fc1", "fc2"]),
        "T5": (lambda: T5ForConditionalGeneration(t5), pairs, ["q", "k", "v", "o", "wi", "wo"]),
    }


def text() -> Batch:
    """Padded at the end."""
    mask = (torch.arange(64) < torch.randint(16, 65, (16, 1))).long()
    return {"input_ids": torch.randint(0, 500, (16, 64)), "attention_mask": mask}


def images() -> Batch:
    """Without a mask."""
    return {"pixel_values": torch.randn(16, 3, 32, 32)}


def pairs() -> Batch:
    """Texts with answers of another length."""
    return text() | {"labels": torch.randint(1, 500, (16, 40))}


class Loader(list[Batch]):
    """Batches with the length that PEFT asks for."""


def kept(batch: Batch, x: Tensor) -> Tensor:
    """Rows (N, D) that are no padding."""
    mask = batch.get("attention_mask")
    if mask is None or x.shape[1] != mask.shape[1]:
        return x.flatten(0, -2)
    return x[mask.bool()]


@contextmanager
def recording(model: nn.Module, names: list[str], batches: list[Batch]) -> Iterator[dict[str, Tensor]]:
    """All rows of the named layers."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    now: list[Batch] = [{}]

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: rows[name].append(kept(now[0], args[0]))

    handles = [model.get_submodule(name).register_forward_pre_hook(record(name)) for name in names]
    with torch.no_grad():
        for batch in batches:
            now[0] = batch
            model(**batch)
    for handle in handles:
        handle.remove()
    yield {name: torch.cat(found) for name, found in rows.items()}


def captured(adapted: PeftModel, batches: list[Batch], center: bool) -> tuple[float, float]:
    """Mean and least over layers."""
    base: Any = adapted.get_base_model().eval()
    found = {n: m.lora_A["default"].weight for n, m in base.named_modules() if hasattr(m, "lora_A")}
    shares = []
    with recording(base, list(found), batches) as rows:
        for name, a in found.items():
            x = rows[name].double()
            x, directions = x - x.mean(0) * center, torch.linalg.qr(a.detach().double().T)[0]
            best = torch.linalg.eigvalsh(x.T @ x)[-len(a) :].sum()
            shares.append(float((x @ directions).square().sum() / best))
    return sum(shares) / len(shares), min(shares)


def ours(model: nn.Module, config: LoraConfig, batches: list[Batch]) -> PeftModel:
    """The product's call."""
    return attach_eva(model, config, batches)


def pefts(model: nn.Module, config: LoraConfig, batches: list[Batch]) -> PeftModel:
    """PEFT's; its mask fits neither images nor the two lengths of an encoder-decoder, there it takes all rows."""
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    options: dict[str, Any] = {"show_progress_bar": False}
    if "pixel_values" in batches[0] or "labels" in batches[0]:
        options |= {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    initialize_lora_eva_weights(adapted, Loader(batches), **options)
    return adapted


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--models", nargs="+", default=["GPT-2", "LLaMA", "ViT", "T5"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    title = (
        f"width {options.width}, {options.layers} layers, rank {options.rank}, {options.batches} batches, one thread"
    )
    table = Table("model", "by", "CPU seconds", "captured, mean", "captured, least", title=title)
    for name, (make, batch, targets) in models(options.width, options.layers).items():
        if name not in options.models:
            continue
        torch.manual_seed(0)
        weights, batches = make().state_dict(), [batch() for _ in range(options.batches)]
        for by, attach in (("attach_eva", ours), ("PEFT", pefts)):
            model = make().eval()
            model.load_state_dict(weights)
            eva_config = EvaConfig(rho=1.0, use_label_mask=False)
            config = LoraConfig(r=options.rank, target_modules=targets, init_lora_weights="eva", eva_config=eva_config)
            began = time.process_time()
            try:
                adapted = attach(model, config, batches)
            except Exception as error:  # the comparison is what fails, too
                table.add_row(name, by, f"{type(error).__name__}: {error}"[:60], "", "")
                continue
            seconds = time.process_time() - began
            mean, least = captured(adapted, batches, center=by == "PEFT")
            table.add_row(name, by, f"{seconds:.2f}", f"{mean:.4f}", f"{least:.4f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
