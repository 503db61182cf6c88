"""EVA on robot policies of lerobot: ACT and diffusion, in small random configurations with a camera.

For each policy: attach EVA's LoRA, compare what its directions capture of the layers' inputs with the most that as many
could (float64 SVD of all rows of all batches), take a training step, save, load with plain PEFT and as lerobot does,
and compare the actions. Then what lerobot's own ``init_type=eva`` captures, beside its plain LoRA, and what PEFT says.

lerobot 0.6.1 asks for Python 3.12 and for an older torch, numpy and transformers than constraints.txt pins, so that it
gets an environment of its own; eva-rl runs in it as it is:

    python3.12 -m venv .venv-lerobot
    .venv-lerobot/bin/pip install -e . "lerobot[diffusion,peft,training]==0.6.1"
    .venv-lerobot/bin/python -m benchmarks.eva.lerobot_policies
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lerobot.configs.default import PeftConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_policy
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from eva_rl.eva import attach

Batch = dict[str, Tensor]
Forward = Callable[[nn.Module, tuple[int, Batch]], Any]

STATE, ACTIONS, SAMPLES, BATCHES, RANK = 14, 7, 16, 6, 4
LEAST = 0.99
"""What a layer's directions have to capture, of the most that as many could."""
FEATURES = {
    "input_features": {
        "observation.state": PolicyFeature(FeatureType.STATE, (STATE,)),
        "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
    },
    "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTIONS,))},
    "pretrained_backbone_weights": None,
    "device": "cpu",
    "push_to_hub": False,
}
ACT_TARGETS = r"model\.(encoder|decoder)\.layers\.\d+\.linear[12]"
"""The VAE encoder is left out: it only runs in training mode, and not while the policy acts."""
DIFFUSION_TARGETS = ["cond_encoder.1", "diffusion_step_encoder.1", "diffusion_step_encoder.3"]
"""The linear layers of the U-Net; its convolutions are none."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A policy, the shape of its data, and what is adapted."""

    policy: Callable[[Any], Any]
    config: Any
    observation_steps: tuple[int, ...]
    action_steps: int
    targets: str | list[str]


def cases() -> dict[str, Case]:
    """By lerobot's name."""
    act = ACTConfig(
        **FEATURES, chunk_size=10, n_action_steps=10, dim_model=64, n_heads=4, dim_feedforward=128, n_encoder_layers=2
    )
    diffusion = DiffusionConfig(
        **FEATURES,
        horizon=8,
        n_action_steps=4,
        down_dims=(32, 64),
        diffusion_step_embed_dim=32,
        crop_shape=(56, 56),
        use_group_norm=True,
        num_inference_steps=5,
    )
    return {
        "act": Case(ACTPolicy, act, (), 10, ACT_TARGETS),
        "diffusion": Case(DiffusionPolicy, diffusion, (2,), 8, DIFFUSION_TARGETS),
    }


def batch_of(case: Case) -> Batch:
    """Random observations and actions of one batch, in the shapes of lerobot's loader."""
    lead = (SAMPLES, *case.observation_steps)
    return {
        "observation.state": torch.randn(*lead, STATE),
        "observation.images.top": torch.rand(*lead, 3, 64, 64),
        "action": torch.rand(SAMPLES, case.action_steps, ACTIONS) * 2 - 1,
        "action_is_pad": torch.zeros(SAMPLES, case.action_steps, dtype=torch.bool),
    }


def forward(policy: nn.Module, seeded: tuple[int, Batch]) -> Any:
    """The loss, as lerobot computes it, with the noise of diffusion drawn from the batch's seed."""
    torch.manual_seed(seeded[0])
    return policy.forward(dict(seeded[1]))


def adapted_layers(model: PeftModel) -> dict[str, Any]:
    """PEFT's layers by name."""
    return {name: layer for name, layer in model.get_base_model().named_modules() if hasattr(layer, "lora_A")}


@contextmanager
def recording(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """The rows that reach each layer."""
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: rows[name].append(args[0].detach().flatten(0, -2).double())

    handles = [layer.register_forward_pre_hook(record(name)) for name, layer in layers.items()]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def captured(model: PeftModel, batches: list[tuple[int, Batch]]) -> list[float]:
    """For each layer, the share that A's row space has of the most that as many directions could capture."""
    layers, shares = adapted_layers(model), []
    model.eval()
    with torch.no_grad(), recording(layers) as rows:
        for batch in batches:
            forward(model.get_base_model(), batch)
    for name, layer in layers.items():
        x, a = torch.cat(rows[name]), layer.lora_A["default"].weight.detach().double()
        best = torch.linalg.svdvals(x)[: len(a)].square().sum()
        shares.append(float((x @ torch.linalg.qr(a.T)[0]).square().sum() / best))
    return shares


def train_step(model: PeftModel, batch: Batch) -> None:
    """One step of AdamW, on the adapter alone."""
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    loss = model(dict(batch))[0]
    loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(before, after[name]) for name, before in frozen.items()), "the base changed"
    assert all(bool(layer.lora_B["default"].weight.any()) for layer in adapted_layers(model).values()), "B is zero"


def actions(policy: Any, batch: Batch) -> Tensor:
    """A chunk of actions, with the same noise each time."""
    torch.manual_seed(0)
    policy.eval()
    observations = {name: value for name, value in batch.items() if name.startswith("observation")}
    result: Tensor = policy.predict_action_chunk(observations)
    return result


def lerobots_own(
    policy: Any, base: Path, targets: str | list[str], init_type: str | None
) -> tuple[PeftModel, list[str]]:
    """The model that ``lerobot-train --peft.init_type=...`` trains, and all that was said while it was made."""
    said: list[str] = []
    policy.config.pretrained_path = base
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    options = dataclasses.asdict(PeftConfig(target_modules=targets, r=RANK, init_type=init_type))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = policy.wrap_with_peft(peft_cli_overrides=options)
    logging.getLogger().removeHandler(handler)
    return model, said + [str(warning.message) for warning in caught]


def through_lerobot(adapted: PeftModel, folder: Path) -> PeftModel:
    """Write the adapter as a checkpoint that ``lerobot-train --policy.path`` continues, and load it as that does."""
    config = adapted.get_base_model().config
    config.use_peft = True
    adapted.save_pretrained(folder)
    config.save_pretrained(folder)
    config.pretrained_path = folder
    features = {**config.input_features, **config.output_features}
    return make_policy(config, env_cfg=EnvOf(features))


@dataclasses.dataclass
class EnvOf:
    """What make_policy reads of an environment's config."""

    features: dict[str, PolicyFeature]

    @property
    def features_map(self) -> dict[str, str]:
        """Names stay."""
        return {name: name for name in self.features}


def ours(case: Case, folder: Path, batches: list[tuple[int, Batch]]) -> tuple[list[float], float]:
    """Attach, train and save; gives what is captured, and how far the actions are after loading by PEFT and lerobot."""
    first = batches[0][1]
    policy = case.policy.from_pretrained(folder / "base")
    policy.name_or_path = str(folder / "base")  # the base that adapter_config.json names
    before = actions(policy, first)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=case.targets)
    adapted = attach(policy, config, batches, forward=forward, max_batches=BATCHES)
    assert torch.equal(actions(policy, first), before), "attaching changed the policy"
    shares = captured(adapted, batches)
    assert min(shares) >= LEAST, shares
    train_step(adapted, first)
    trained = actions(policy, first)
    assert not torch.allclose(trained, before), "training changed nothing"

    adapted.save_pretrained(folder / "adapter")
    by_peft = PeftModel.from_pretrained(case.policy.from_pretrained(folder / "base"), folder / "adapter")
    by_lerobot = through_lerobot(adapted, folder / "checkpoint")
    assert any(p.requires_grad for p in by_lerobot.parameters()), "lerobot would train nothing"
    apart = [float((actions(one.get_base_model(), first) - trained).abs().max()) for one in (by_peft, by_lerobot)]
    assert max(apart) < 1e-6, apart
    return shares, max(apart)


def check(name: str, case: Case, table: Table) -> None:
    """A row for each way to start, and PEFT's messages below."""
    torch.manual_seed(0)
    with TemporaryDirectory() as made:
        folder = Path(made)
        case.policy(case.config).save_pretrained(folder / "base")
        batches = [(seed, batch_of(case)) for seed in range(BATCHES)]
        add_row(table, f"{name}, attach", *ours(case, folder, batches))
        for init_type in ("eva", None):
            policy = case.policy.from_pretrained(folder / "base")
            model, said = lerobots_own(policy, folder / "base", case.targets, init_type)
            add_row(table, f"{name}, lerobot's init_type={init_type}", captured(model, batches), None)
            sys.stdout.writelines(f"{name}, init_type={init_type}: {message}\n" for message in said)


def add_row(table: Table, label: str, shares: list[float], apart: float | None) -> None:
    """Mean and least over layers."""
    mean = f"{sum(shares) / len(shares):.4f}"
    table.add_row(label, str(len(shares)), mean, f"{min(shares):.4f}", "" if apart is None else f"{apart:g}")


def main() -> None:
    """Check both, print what was found."""
    torch.set_num_threads(1)
    names = ("lerobot", "torch", "peft", "numpy", "transformers", "diffusers")
    title = f"Python {sys.version.split()[0]}, " + ", ".join(f"{name} {version(name)}" for name in names)
    table = Table("policy", "layers", "captured, mean", "captured, least", "apart after loading", title=title)
    for name, case in cases().items():
        check(name, case, table)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
