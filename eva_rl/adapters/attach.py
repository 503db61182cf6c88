"""Put an adapter on a policy, through PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from eva_rl.adapters.adalora import ADAPTER_NAME, ORTHOGONALITY, AdaLoraExtension, initial_rank, schedule
from eva_rl.adapters.methods import METHODS, Method
from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.errors import UnknownNameError, UserError
from eva_rl.eva import EvaResult

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
"""Every weight matrix of the blocks: the default targets."""
HEAD = "action_head."


@dataclass(frozen=True)
class AttachedAdapter:
    """What :func:`attach_adapter` did.

    Attributes:
        method: The way to fine-tune.
        model: PEFT's model around the policy's network; None for methods without an adapter.
        eva: Where its directions come from; None without EVA.
        extension: What the training loop has to do besides; None for most methods.
    """

    method: Method
    model: PeftModel | None
    eva: EvaResult | None
    extension: AdaLoraExtension | None = None


def find_method(name: str) -> Method:
    """Look a method up.

    Raises:
        UnknownNameError: There is none of that name.
    """
    if name not in METHODS:
        raise UnknownNameError("adapter", name, METHODS)
    return METHODS[name]


def target_layers(network: nn.Module, targets: Sequence[str] = PROJECTIONS) -> list[str]:
    """Names of the Linear layers whose name is, or ends with, one of the targets.

    Raises:
        UserError: A target matches nothing; the message lists what exists.
    """
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    matches = {t: [name for name in linear if name == t or name.endswith("." + t)] for t in targets}
    for target, found in matches.items():
        if not found:
            endings = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(f"adapter.targets: {target!r} matches no layer. Expected some of {', '.join(endings)}.")
    chosen = {name for found in matches.values() for name in found}
    return [name for name in linear if name in chosen]


def attach_adapter(  # noqa: PLR0913 - PEFT's names for what a user may set
    policy: DecisionTransformerPolicy,
    method: str = "eva",
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] = PROJECTIONS,
    eva: EvaResult | None = None,
    total_updates: int = 0,
) -> AttachedAdapter:
    """Freeze a policy's network and make the method's own parameters trainable.

    At first the policy acts as it did before: all methods here start from a zero update. AdaLoRA begins with
    :func:`eva_rl.adapters.initial_rank` in each layer, which is the rank that EVA has to be computed with, and its
    extension has to be given to the training loop.

    Args:
        policy: Changed in place.
        method: A name in :data:`eva_rl.adapters.METHODS`.
        rank: Rank of each target layer; EVA's result brings its own ranks.
        alpha: LoRA's alpha; None takes the rank, so that the update is not scaled. Ignored for EVA, whose result
            brings its own.
        dropout: LoRA's dropout.
        targets: Names, or endings of names, of Linear layers.
        eva: What ``eva_rl.eva.compute`` found; needed by the EVA methods, and by no other.
        total_updates: Gradient steps to come, for AdaLoRA's schedule; other methods do without.

    Raises:
        UserError: Unknown method or target, EVA without its result, or a policy that has an adapter already.
    """
    chosen = find_method(method)
    network = policy.network
    if any("lora_" in name for name, _ in network.named_parameters()):
        raise UserError("This policy has an adapter already. Merge it first, or start from the policy without it.")
    if chosen.eva != (eva is not None):
        needed = "needs" if chosen.eva else "takes no"
        raise UserError(f"adapter={method} {needed} EVA directions (eva=eva_rl.eva.compute(...)).")
    if not chosen.adapter:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(method == "full" or name.startswith(HEAD))
        return AttachedAdapter(chosen, None, None)
    layers = target_layers(network, targets)
    if chosen.adalora:
        peft_config = _adalora_config(layers, rank, alpha, dropout, total_updates)
    else:
        peft_config = _lora_config(chosen, layers, rank, alpha, dropout, eva)
    model = get_peft_model(network, peft_config)
    if eva is not None:
        _aim(model, eva.state_dict())
    model.to(policy.device)
    return AttachedAdapter(chosen, model, eva, AdaLoraExtension(model) if chosen.adalora else None)


def _lora_config(
    method: Method, layers: list[str], rank: int, alpha: float | None, dropout: float, eva: EvaResult | None
) -> LoraConfig:
    ranks: Mapping[str, int] = {} if eva is None else eva.rank_pattern
    alphas: Mapping[str, float] = {} if eva is None else eva.alpha_pattern
    if eva is not None:
        if missing := [name for name in layers if name not in eva.layers]:
            raise UserError(f"EVA found no directions for {', '.join(missing[:3])}. Compute it with the same targets.")
        layers = [name for name in layers if name in ranks]
        if method.rslora:  # divides by the root of a layer's rank: the same scale everywhere needs a root here, too
            alphas = {name: value * (eva.options.rank / ranks[name]) ** 0.5 for name, value in alphas.items()}
    return LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=layers,
        rank_pattern={_exactly(name): value for name, value in ranks.items() if name in layers},
        alpha_pattern={_exactly(name): value for name, value in alphas.items() if name in layers},
        use_dora=method.dora,
        use_rslora=method.rslora,
    )


def _adalora_config(
    layers: list[str], rank: int, alpha: float | None, dropout: float, total_updates: int
) -> AdaLoraConfig:
    if total_updates < 3:
        raise UserError(f"AdaLoRA needs total_updates= of at least 3 for its schedule, {total_updates} were given.")
    first = initial_rank(rank)
    return AdaLoraConfig(
        init_r=first,
        target_r=rank,
        lora_alpha=first if alpha is None else alpha * first / rank,
        lora_dropout=dropout,
        target_modules=layers,
        orth_reg_weight=ORTHOGONALITY,
        **schedule(total_updates),
    )


def _exactly(name: str) -> str:
    """A pattern of PEFT that matches one layer and no other that ends like it."""
    return "^" + name.replace(".", r"\.")


def _aim(model: PeftModel, components: Mapping[str, Tensor]) -> None:
    """Point each layer's A matrix (rank, in) along its components; B is zero already."""
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and ADAPTER_NAME in module.lora_A:
            entry = module.lora_A[ADAPTER_NAME]
            weight = entry if isinstance(entry, nn.Parameter) else entry.weight
            directions = components[name]
            if directions.shape != weight.shape:
                raise UserError(
                    f"EVA directions of {name} have shape {tuple(directions.shape)}, the adapter needs "
                    f"{tuple(weight.shape)}."
                )
            with torch.no_grad():
                weight.copy_(directions)


def base_weights(network: nn.Module) -> dict[str, Tensor]:
    """Weights of the policy without its adapter, under the names they had before it was attached."""
    return {
        name.replace(".base_layer.", "."): value
        for name, value in network.state_dict().items()
        if ".lora_" not in name and ".ranknum." not in name
    }


def count_parameters(network: nn.Module) -> dict[str, int]:
    """Trainable and total numbers of parameters."""
    return {
        "trainable_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in network.parameters()),
    }


@contextmanager
def without_adapter(model: PeftModel | None) -> Iterator[None]:
    """The policy as it was before its adapter."""
    if model is None:
        yield
        return
    with model.disable_adapter():
        yield
