"""Initialisation of the low-rank factors: PEFT's own options, and the methods that PEFT lacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eva_rl.adapters.extensions import ADAPTER_NAME
from eva_rl.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

Backward = Callable[[], None]
"""Runs forward and backward passes of the loss; gradients add up."""
STABLE_GAMMA = 128.0
"""LoRA-One's gamma: the first step is 1 / gamma long in the gradient's leading direction."""


def prepare_corda(network: nn.Module, peft_config: LoraConfig, moments: Mapping[str, Tensor]) -> None:
    """Hand PEFT the second moments, of mean diagonal 1: white inputs then give the weights' own singular triplets.

    Args:
        network: Without an adapter.
        peft_config: Names the target layers.
        moments: (in, in) by layer.

    Raises:
        UserError: A layer has none.
    """
    from peft.tuners.lora.corda import preprocess_corda

    def fill() -> None:
        for name in peft_config.target_modules:
            layer: Any = network.get_submodule(name)
            moment = moments[name]
            layer.sample_count = 1
            layer.covariance_matrix = (moment / moment.diagonal().mean()).to(layer.weight)

    if missing := [name for name in peft_config.target_modules if name not in moments]:
        raise UserError(f"There are no second moments of {', '.join(missing[:3])}. Compute them with the same targets.")
    preprocess_corda(network, peft_config, run_model=fill)


def prepare_gradients(network: nn.Module, peft_config: LoraConfig, backward: Backward) -> None:
    """Leave the gradient of the loss at each target layer, where PEFT's LoRA-GA and :func:`start_lora_one` find it.

    Args:
        network: Without an adapter.
        peft_config: Names the target layers.
        backward: Runs the loss backward.
    """
    from peft.tuners.lora.loraga import preprocess_loraga

    with warnings.catch_warnings():  # layers that read the data themselves have no input to differentiate
        warnings.filterwarnings("ignore", message=".*no inputs require gradients.*")
        preprocess_loraga(network, peft_config, backward)


def start_milora(layer: Any) -> None:
    """MiLoRA: the weight's minor singular triplets (arXiv 2406.09044, equation 4); the base gives them up.

    Args:
        layer: PEFT's, with its A (R, in) and B (out, R).
    """
    A, B = _factors(layer)
    rank = A.shape[0]
    U, S, Vh = torch.linalg.svd(layer.base_layer.weight.detach().float(), full_matrices=False)
    root = (S[-rank:] / layer.scaling[ADAPTER_NAME]).sqrt()
    _set(A, B, root.unsqueeze(1) * Vh[-rank:], U[:, -rank:] * root)


def start_lora_one(layer: Any) -> None:
    """LoRA-One: a step against the gradient G's leading directions (arXiv 2502.01235, algorithm 1).

    The update s B A is -s / (gamma sigma_1) times the best approximation of G of rank R. The base stays as it is.

    Args:
        layer: PEFT's, with the gradient that :func:`prepare_gradients` left.
    """
    gradient = layer.base_layer._peft_loraga_grad
    del layer.base_layer._peft_loraga_grad
    A, B = _factors(layer)
    rank = A.shape[0]
    U, S, Vh = torch.linalg.svd(-gradient.float(), full_matrices=False)
    root = (S[:rank] / S[0].clamp(min=torch.finfo(S.dtype).tiny) / STABLE_GAMMA).sqrt()
    _set(A, B, root.unsqueeze(1) * Vh[:rank], U[:, :rank] * root)


_STARTS: Mapping[str, Callable[[Any], None]] = {"milora": start_milora, "lora_one": start_lora_one}


def set_start(model: PeftModel, start: str) -> None:
    """Give every low-rank layer the factors of a start that PEFT lacks; none for ``""``.

    Args:
        model: PEFT's, just made.
        start: ``milora``, ``lora_one`` or ``""``.
    """
    if start:
        for module in model.modules():
            if ADAPTER_NAME in getattr(module, "lora_A", {}):
                _STARTS[start](module)


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight


def _set(A: nn.Parameter, B: nn.Parameter, a: Tensor, b: Tensor) -> None:
    with torch.no_grad():
        A.copy_(a)
        B.copy_(b)
