"""What an adapter holds besides its trainable parameters: for checkpoints, and to give the base weights back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

if TYPE_CHECKING:  # importing PEFT takes seconds, which a policy without an adapter does not need
    from peft import PeftModel

WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_NAME = "default"
ADAPTER_PARTS = (".lora_", ".miss_", ".ranknum.")
"""What is in the names of an adapter's tensors and in no others."""
LORA_PLUS_RATIO = 16.0
"""Learning rate of B over that of A, lambda (arXiv 2402.12354, section 5)."""
ORTHOGONALITY = 0.1
"""Weight of AdaLoRA's regulariser in PEFT's form; the paper's gamma (equation 4) weights squared distances."""
_STATISTICS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


@dataclass(frozen=True)
class LowRankLayer:
    """A layer with a low-rank adapter.

    Attributes:
        name: In the base model.
        module: PEFT's.
        A: (R, in).
        B: (out, R).
    """

    name: str
    module: Any
    A: nn.Parameter
    B: nn.Parameter


def low_rank_layers(model: PeftModel, adapter: str = ADAPTER_NAME) -> Iterator[LowRankLayer]:
    """The layers that an adapter gives an A and a B, those of lookup tables left out."""
    for name, module in model.get_base_model().named_modules():
        if adapter in getattr(module, "lora_A", {}):
            layer: Any = module
            yield LowRankLayer(name, layer, _matrix(layer.lora_A[adapter]), _matrix(layer.lora_B[adapter]))


def _matrix(entry: Any) -> nn.Parameter:
    """AdaLoRA keeps its factors as parameters, the others as layers."""
    found: nn.Parameter = entry if isinstance(entry, nn.Parameter) else entry.weight
    return found


class _Quiet:
    """An extension of the training loop that adds nothing to the loss."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def penalty(self) -> Tensor:
        """Zero, of which a gradient can be asked."""
        return torch.zeros((), device=next(self.model.parameters()).device, requires_grad=True)

    def after_step(self, update: int) -> None:
        """Nothing."""

    def learning_rate_factor(self, name: str) -> float:
        """One: all parameters learn at the same rate."""
        return 1.0


class LoraPlus(_Quiet):
    """LoRA+ (arXiv 2402.12354): B learns faster than A."""

    def learning_rate_factor(self, name: str) -> float:
        """LORA_PLUS_RATIO for B, one for A; of linear layers and of lookup tables."""
        return LORA_PLUS_RATIO if ".lora_B." in name or ".lora_embedding_B." in name else 1.0

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing."""


class FrozenFactors(_Quiet):
    """Keeps the untrained half of an adapter in checkpoints, so that a resumed run need not find it again."""

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's parameters that are not trained, by name."""
        return {name: p.data for name, p in self.model.named_parameters() if ".lora_" in name and not p.requires_grad}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        with torch.no_grad():
            for name, value in tensors.items():
                self.model.get_parameter(name).copy_(value)


class RewrittenBase(_Quiet):
    """The policy of a method that takes its start out of the base weights.

    Such a method replaces W by W - s B0 A0 and trains from (A0, B0). This keeps W and (A0, B0): a resumed run goes on
    with the residual that it began with, however the factors would come out the second time, and the adapter is saved
    as the LoRA update B A - B0 A0 of twice the rank, which fits W itself.

    Args:
        model: PEFT's model, just made.
        originals: W by layer, (out, in), from before.
    """

    def __init__(self, model: PeftModel, originals: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        self._originals = dict(originals)
        own = [layer for layer in low_rank_layers(model) if layer.name in self._originals]
        self._initial = {layer.name: (layer.A.data.clone(), layer.B.data.clone()) for layer in own}
        self._rewrite()

    def original_weights(self) -> dict[str, Tensor]:
        """W of each layer, under the name of its weight."""
        return {f"{name}.weight": weight for name, weight in self._originals.items()}

    def tensors(self) -> dict[str, Tensor]:
        """A0 and B0 of each layer."""
        return {f"{half}/{name}": pair[i] for name, pair in self._initial.items() for i, half in enumerate("AB")}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave, and take it out of the base weights."""
        self._initial = {
            name: (tensors[f"A/{name}"].to(A0.device), tensors[f"B/{name}"].to(A0.device))
            for name, (A0, _) in self._initial.items()
        }
        self._rewrite()

    def save(self, folder: Path) -> None:
        """Write the adapter as PEFT writes it for the original weights (its "weight conversion")."""
        with TemporaryDirectory() as temporary:
            start = Path(temporary) / "start"
            start.mkdir()
            save_file(self._start(), start / WEIGHTS_FILE)
            with warnings.catch_warnings():  # that it should be converted, which is done here
                warnings.filterwarnings("ignore", message=".*changes the base weights of the model.*")
                self.model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(start))

    def _start(self) -> dict[str, Tensor]:
        """A0 and B0 under the names of an adapter's file."""
        return {
            f"base_model.model.{name}.lora_{half}.weight": pair[i].cpu().contiguous()
            for name, pair in self._initial.items()
            for i, half in enumerate("AB")
        }

    def _rewrite(self) -> None:
        for name, layer in self._layers():
            A0, B0 = self._initial[name]
            weight = self._originals[name].to(A0.device)
            with torch.no_grad():
                layer.base_layer.weight.copy_(weight - layer.scaling[ADAPTER_NAME] * (B0 @ A0))

    def _layers(self) -> Iterator[tuple[str, Any]]:
        network = self.model.get_base_model()
        return ((name, network.get_submodule(name)) for name in self._originals)


def initial_rank(rank: int) -> int:
    """Rank that each layer begins with, for AdaLoRA to prune to ``rank`` on average: half as much again."""
    return rank + (rank + 1) // 2


def keep_live_ranks(model: PeftModel) -> None:
    """Count every direction that acts among those that AdaLoRA keeps, which are all that PEFT saves.

    Parameters can be of another step than the last pruning: the best of a run, or those of a step between two prunings.
    """
    network = model.get_base_model()
    for name, config in model.peft_config.items():
        if config.peft_type != "ADALORA":
            continue
        for key, kept in (config.rank_pattern or {}).items():
            scales = network.get_parameter(key if key.endswith(f".{name}") else f"{key}.{name}")
            live = (scales.detach().flatten() != 0).tolist()
            if len(live) == len(kept):  # not where it was loaded, cut already
                config.rank_pattern[key] = [a or b for a, b in zip(kept, live, strict=True)]


class AdaLoraExtension:
    """Prunes after each gradient step, and keeps its directions orthogonal.

    PEFT adds the regulariser only to models that compute their own loss; ours do not, so it is added here.

    Args:
        model: PEFT's model with an AdaLoRA adapter.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def penalty(self) -> Tensor:
        """ORTHOGONALITY times the mean distance of A A^T and B^T B from the identity, as PEFT has it (AdaLoraModel).

        The paper has squared distances and their sum (arXiv 2303.10512, equation 4).
        """
        distances = []
        for name, parameter in self._model.named_parameters():
            if f"lora_A.{ADAPTER_NAME}" in name or f"lora_B.{ADAPTER_NAME}" in name:
                gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
                distances.append((gram - torch.eye(len(gram), device=gram.device)).norm())
        return ORTHOGONALITY * torch.stack(distances).mean()

    def after_step(self, update: int) -> None:
        """Prune according to AdaLoRA's schedule; the gradients of gradient step ``update`` are still there."""
        self._model.base_model.update_and_allocate(update)

    def learning_rate_factor(self, name: str) -> float:
        """One: all parameters learn at the same rate."""
        return 1.0

    def tensors(self) -> dict[str, Tensor]:
        """Importance statistics, and which ranks are kept, for a checkpoint."""
        allocator = self._model.base_model.rankallocator
        state = {f"{kind}/{name}": value for kind in _STATISTICS for name, value in getattr(allocator, kind).items()}
        kept: Mapping[str, Any] = self._config.rank_pattern or {}
        return state | {f"kept/{name}": torch.tensor(value) for name, value in kept.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave, beside the parameters: a checkpoint is read on the CPU."""
        allocator, network = self._model.base_model.rankallocator, self._model.get_base_model()
        groups: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*_STATISTICS, "kept")}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            groups[kind][name] = value
        for kind in _STATISTICS:
            found = {name: value.to(network.get_parameter(name).device) for name, value in groups[kind].items()}
            setattr(allocator, kind, found)
        self._config.rank_pattern = {name: value.tolist() for name, value in groups["kept"].items()} or None

    @property
    def _config(self) -> Any:
        return self._model.peft_config[ADAPTER_NAME]
