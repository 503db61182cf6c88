"""Initialisation of the low-rank factors: PEFT's own options, and the methods that PEFT lacks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eva_rl.adapters.extensions import ADAPTER_NAME, LowRankLayer, low_rank_layers
from eva_rl.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

Backward = Callable[[], None]
"""Runs forward and backward passes of the loss; gradients add up."""
_GRADIENT = "_peft_loraga_grad"
"""Where PEFT leaves a layer's gradient."""
STABLE_GAMMA = 128.0
"""LoRA-One's gamma: the first step is 1 / gamma long in the gradient's leading direction."""


def prepare_corda(network: nn.Module, peft_config: LoraConfig, moments: Mapping[str, Tensor]) -> None:
    """Hand PEFT the second moments, of mean diagonal 1: white inputs then give the weights' own singular triplets.

    Args:
        network: Without an adapter.
        peft_config: Names the target layers.
        moments: (in, in) by layer.

    Raises:
        UserError: A layer has none, or none that PEFT could invert: of another shape, not finite, or zero throughout.
    """
    from peft.tuners.lora.corda import preprocess_corda

    layers = sorted(peft_config.target_modules)  # PEFT's own order is another in each process

    def fill() -> None:
        for name in layers:
            layer: Any = network.get_submodule(name)
            moment = moments[name]
            layer.sample_count = 1
            layer.covariance_matrix = (moment / moment.diagonal().mean()).to(layer.weight)

    if missing := [name for name in layers if name not in moments]:
        raise UserError(f"There are no second moments of {', '.join(missing[:3])}. Compute them with the same targets.")
    for name in layers:
        _check_moment(name, moments[name], network.get_parameter(f"{name}.weight").shape[1])
    preprocess_corda(network, peft_config, run_model=fill)


def _check_moment(name: str, moment: object, width: int) -> None:
    if not isinstance(moment, Tensor) or moment.shape != (width, width):
        given = f"of shape {tuple(moment.shape)}" if isinstance(moment, Tensor) else f"a {type(moment).__name__}"
        raise UserError(
            f"The second moment of {name} is {given}; expected a tensor of shape ({width}, {width}). Compute it with "
            "eva_rl.adapters.second_moments."
        )
    mean = float(moment.diagonal().mean())
    if not 0 < mean < math.inf or not bool(moment.isfinite().all()):
        raise UserError(
            f"The second moment of {name} has a mean diagonal of {mean:g}, from which CorDA has no directions: its "
            "input is zero in all data, or not finite. Leave the layer out of adapter.targets, or use other data."
        )


def prepare_gradients(network: nn.Module, peft_config: LoraConfig, backward: Backward) -> None:
    """Leave the gradient of the loss at each target layer, where PEFT's LoRA-GA and :func:`start_lora_one` find it.

    Where the backward pass fails, the network is as it was.

    Args:
        network: Without an adapter.
        peft_config: Names the target layers.
        backward: Runs the loss backward.

    Raises:
        UserError: It left a layer without a gradient, or with one that is not finite.
    """
    from peft.tuners.lora.loraga import preprocess_loraga

    with _restored(network), warnings.catch_warnings():
        # layers that read the data themselves have no input to differentiate
        warnings.filterwarnings("ignore", message=".*no inputs require gradients.*")
        preprocess_loraga(network, peft_config, backward)
    layers = {name: network.get_submodule(name) for name in sorted(peft_config.target_modules)}
    gradients = {name: getattr(layer, _GRADIENT, None) for name, layer in layers.items()}
    if bad := [name for name, found in gradients.items() if found is None or not bool(found.isfinite().all())]:
        for layer in layers.values():
            vars(layer).pop(_GRADIENT, None)
        raise UserError(
            f"backward= left {'no' if gradients[bad[0]] is None else 'no finite'} gradient at {bad[0]} ({len(bad)} of "
            f"{len(layers)} target layers). It has to call backward() on a loss of this very network, with gradients "
            "enabled."
        )


@contextmanager
def _restored(network: nn.Module) -> Iterator[None]:
    """Take back what PEFT changes to see gradients and leaves so where the backward pass fails."""
    asking = [(parameter, parameter.requires_grad, parameter.grad) for parameter in network.parameters()]
    modules = [(module, module.training, set(module._backward_hooks)) for module in network.modules()]
    try:
        yield
    finally:
        for parameter, requires_grad, gradient in asking:
            parameter.requires_grad_(requires_grad)
            if gradient is None:
                parameter.grad = None
        for module, training, hooks in modules:
            module.training = training
            for hook in set(module._backward_hooks) - hooks:
                del module._backward_hooks[hook]
            vars(module).pop("_peft_loraga_grad_count", None)


def start_milora(layer: LowRankLayer) -> None:
    """MiLoRA: the weight's minor singular triplets (arXiv 2406.09044, equation 4); the base gives them up.

    Args:
        layer: Whose A and B are set.
    """
    rank, module = layer.A.shape[0], layer.module
    U, S, Vh = torch.linalg.svd(module.base_layer.weight.detach().float(), full_matrices=False)
    root = (S[-rank:] / module.scaling[ADAPTER_NAME]).sqrt()
    _set(layer, root.unsqueeze(1) * Vh[-rank:], U[:, -rank:] * root)


def start_lora_one(layer: LowRankLayer) -> None:
    """LoRA-One: a step against the gradient G's leading directions (arXiv 2502.01235, algorithm 1).

    The update s B A is -s / (gamma sigma_1) times the best approximation of G of rank R. The base stays as it is.

    Args:
        layer: Whose A and B are set, with the gradient that :func:`prepare_gradients` left.
    """
    rank, base = layer.A.shape[0], layer.module.base_layer
    gradient = getattr(base, _GRADIENT)
    delattr(base, _GRADIENT)
    U, S, Vh = torch.linalg.svd(-gradient.float(), full_matrices=False)
    root = (S[:rank] / S[0].clamp(min=torch.finfo(S.dtype).tiny) / STABLE_GAMMA).sqrt()
    _set(layer, root.unsqueeze(1) * Vh[:rank], U[:, :rank] * root)


_STARTS: Mapping[str, Callable[[LowRankLayer], None]] = {"milora": start_milora, "lora_one": start_lora_one}


def set_start(model: PeftModel, start: str) -> None:
    """Give every low-rank layer the factors of a start that PEFT lacks; none for ``""``.

    Args:
        model: PEFT's, just made.
        start: ``milora``, ``lora_one`` or ``""``.
    """
    if start:
        for layer in low_rank_layers(model):
            _STARTS[start](layer)


def _set(layer: LowRankLayer, a: Tensor, b: Tensor) -> None:
    with torch.no_grad():
        layer.A.copy_(a)
        layer.B.copy_(b)


def check_widths(widths: Mapping[str, int], directions: Mapping[str, Tensor]) -> None:
    """Raise unless directions are of the inputs of the layers that they are for.

    Args:
        widths: Input features by layer.
        directions: (R, in) by layer; layers without a width are passed over.

    Raises:
        UserError: They were found in a model of another size.
    """
    for name, rows in directions.items():
        if widths.get(name, rows.shape[1]) != rows.shape[1]:
            raise UserError(
                f"EVA directions of {name} have {rows.shape[1]} features, and its input has {widths[name]}. Compute "
                "them with this model."
            )


def set_directions(model: PeftModel, directions: Mapping[str, Tensor], adapter: str = ADAPTER_NAME) -> None:
    """Set A to directions of the inputs, in the layers that have some; B stays as it is.

    Args:
        model: PEFT's, just made.
        directions: (R, in) by layer.
        adapter: PEFT's name of the adapter.

    Raises:
        UserError: Their shape is another than that of A.
    """
    for layer in (found for found in low_rank_layers(model, adapter) if found.name in directions):
        rows = directions[layer.name]
        if rows.shape != layer.A.shape:
            raise UserError(
                f"EVA directions of {layer.name} have shape {tuple(rows.shape)}, the adapter needs "
                f"{tuple(layer.A.shape)}."
            )
        with torch.no_grad():
            layer.A.copy_(rows)
