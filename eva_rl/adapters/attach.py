"""Put an adapter on a policy, through PEFT."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from eva_rl.adapters.extensions import (
    ADAPTER_PARTS,
    ORTHOGONALITY,
    AdaLoraExtension,
    FrozenFactors,
    LoraPlus,
    RewrittenBase,
    initial_rank,
)
from eva_rl.adapters.gain import LayerStart
from eva_rl.adapters.layers import capped, rank_limits
from eva_rl.adapters.methods import (
    DIRECTIONS,
    GRADIENTS,
    LEAST_UPDATES,
    MOMENTS,
    PROJECTIONS,
    Method,
    adalora_schedule,
    find_method,
)
from eva_rl.adapters.starts import (
    Backward,
    check_widths,
    prepare_corda,
    prepare_gradients,
    set_directions,
    set_start,
)
from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.errors import UserError
from eva_rl.eva import EvaOptions, EvaResult
from eva_rl.eva.result import exact_pattern

if TYPE_CHECKING:
    from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel

log = logging.getLogger(__name__)

HEAD = "action_head."
Extension = AdaLoraExtension | FrozenFactors | LoraPlus | RewrittenBase


@dataclass(frozen=True)
class AttachedAdapter:
    """What :func:`attach_adapter` did.

    Attributes:
        method: The way to fine-tune.
        model: PEFT's model around the policy's network; None for methods without an adapter.
        eva: Where its directions come from; None without EVA.
        extension: What the training loop has to do besides; None for most methods.
        start: Gain and effective rank of each layer's A before training, where they were measured.
    """

    method: Method
    model: PeftModel | None
    eva: EvaResult | None
    extension: Extension | None = None
    start: Mapping[str, LayerStart] = field(default_factory=dict)


def attach_adapter(  # noqa: PLR0913 - PEFT's names for what a user may set
    policy: DecisionTransformerPolicy,
    method: str = "eva",
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] = PROJECTIONS,
    rank_caps: Mapping[str, int] | None = None,
    eva: EvaResult | None = None,
    moments: Mapping[str, Tensor] | None = None,
    backward: Backward | None = None,
    total_updates: int = 0,
) -> AttachedAdapter:
    """Freeze a policy's network and make the method's own parameters trainable.

    At first the policy acts as it did before, except with LoRA-One, whose start is a first step. Methods that take
    their start out of the base weights leave others in their place until the policy is saved: give the extension to
    the training loop, and save with :func:`eva_rl.adapters.save_adapted_policy`. AdaLoRA begins with
    :func:`eva_rl.adapters.initial_rank` in each layer, which is the rank that EVA has to be computed with; its
    extension belongs in the training loop, too.

    Args:
        policy: Changed in place.
        method: A name in :data:`eva_rl.adapters.METHODS`, which say where each was published (``METHODS[name].paper``);
            the default needs ``eva``.
        rank: Rank of each target layer, 8 by default; EVA's result brings its own ranks. No layer gets more than its
            weight has.
        alpha: LoRA's alpha; None takes the rank, a scale of 1, with rsLoRA of sqrt(rank). EVA's result brings its own;
            MiSS has none.
        dropout: LoRA's dropout.
        targets: Names, or endings of names, of layers.
        rank_caps: Highest rank of some of them, by name or ending; the scale of the update stays that of ``rank``.
        eva: What ``eva_rl.eva.compute`` found; needed by the EVA methods, and by no other.
        moments: (in, in) by layer, what :func:`eva_rl.adapters.second_moments` found; needed by CorDA.
        backward: Called without arguments; leaves the gradient of the loss in the parameters. Needed by LoRA-GA and
            LoRA-One.
        total_updates: Gradient steps to come, for AdaLoRA's schedule; other methods do without.

    Returns:
        What was attached; its ``extension`` belongs in :func:`eva_rl.training.bc.train_bc`.

    Raises:
        UserError: Unknown method or target, a rank or layer that the method cannot do, data that it lacks, a rank or
            an alpha other than those of EVA's result, directions of another network, or a policy that has an adapter
            already; the policy is as it was.
    """
    if not isinstance(policy, DecisionTransformerPolicy):
        raise UserError(
            f"policy is a {type(policy).__name__}: expected what eva_rl.load_policy returns. Another torch model gets "
            "EVA's adapter from eva_rl.attach_eva."
        )
    chosen = find_method(method)
    network = policy.network
    if has_adapter(network):
        raise UserError("This policy has an adapter already. Merge it first, or start from the policy without it.")
    _check_data(chosen, {DIRECTIONS: eva, MOMENTS: moments, GRADIENTS: backward})
    if eva is not None and not chosen.adalora:  # AdaLoRA's own ranks are what is left of EVA's
        rank, alpha = _of_result(eva.options, rank, alpha)
    rank = EvaOptions.rank if rank is None else rank
    _check_sizes(rank, alpha, dropout)
    if not chosen.adapter:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(method == "full" or name.startswith(HEAD))
        return AttachedAdapter(chosen, None, None)
    from eva_rl.adapters.fused import fuse_where_faster

    limits = rank_limits(network, chosen, rank, targets, rank_caps)
    eva = None if eva is None else _fitting(network, capped(eva, limits), limits)
    if chosen.adalora:
        _check_directions(eva, initial_rank(rank))
        peft_config: PeftConfig = _adalora_config(list(limits), rank, alpha, dropout, total_updates)
    elif chosen.miss:
        peft_config = _miss_config(list(limits), rank, dropout)
    else:
        peft_config = _lora_config(chosen, limits, rank, alpha, dropout, eva)
    model, extension = _attached(network, chosen, peft_config, moments, backward)
    if eva is not None:
        set_directions(model, eva.state_dict())
    model.to(policy.device)
    network.train(network.training)  # PEFT's new layers begin in training mode
    fuse_where_faster(network)
    if dropout:
        log.warning("adapter.dropout=%g: the low-rank layers train as PEFT computes them, which takes longer.", dropout)
    return AttachedAdapter(chosen, model, eva, extension)


def _of_result(options: EvaOptions, rank: int | None, alpha: float | None) -> tuple[int, float]:
    """Rank and alpha that EVA was computed with, which must not be contradicted."""
    own = {"rank": options.rank, "alpha": float(options.rank) if options.alpha is None else options.alpha}
    for name, given in {"rank": rank, "alpha": alpha}.items():
        if given is not None and given != own[name]:
            raise UserError(
                f"{name}={given:g}, and eva= was computed with {name}={own[name]:g}. Give it to eva_rl.eva.compute, or "
                "leave it out here."
            )
    return options.rank, own["alpha"]


def _check_sizes(rank: int, alpha: float | None, dropout: float) -> None:
    if not isinstance(rank, int | np.integer) or rank < 1:
        raise UserError(f"rank={rank!r}: expected at least 1, and a whole number.")
    if alpha is not None and not alpha > 0:
        raise UserError(f"alpha={alpha}: expected a number above 0, or None for that of the rank.")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout={dropout}: expected a probability from 0 up to, but not including, 1.")


_WAYS = {
    DIRECTIONS: "EVA directions (eva=eva_rl.eva.compute(...))",
    MOMENTS: "second moments of its inputs (moments=eva_rl.adapters.second_moments(...))",
    GRADIENTS: "gradients of the loss (backward=, a function that runs it backward)",
}


def _check_data(method: Method, given: Mapping[str, object]) -> None:
    for kind, value in given.items():
        if (method.needs == kind) != (value is not None):
            raise UserError(f"adapter={method.name} {'needs' if method.needs == kind else 'takes no'} {_WAYS[kind]}.")


def _fitting(network: nn.Module, eva: EvaResult, limits: Mapping[str, int]) -> EvaResult:
    if missing := [name for name in limits if name not in eva.layers]:
        raise UserError(f"EVA found no directions for {', '.join(missing[:3])}. Compute it with the same targets.")
    check_widths({name: network.get_parameter(f"{name}.weight").shape[1] for name in limits}, eva.state_dict())
    return eva


def _check_directions(eva: EvaResult | None, needed: int) -> None:
    """AdaLoRA has one rank for all layers."""
    for name, layer in {} if eva is None else eva.layers.items():
        if layer.rank != needed:
            raise UserError(
                f"AdaLoRA begins with rank {needed} in every layer, and EVA found {layer.rank} directions for {name}. "
                f"Compute it with rank={needed} and rho=1; where the data have no more directions, lower adapter.rank "
                "or leave the layer out of adapter.targets."
            )


def _attached(
    network: nn.Module,
    method: Method,
    peft_config: PeftConfig,
    moments: Mapping[str, Tensor] | None,
    backward: Backward | None,
) -> tuple[PeftModel, Extension | None]:
    """PEFT's model, and what has to be kept of the weights from before."""
    from peft import LoraConfig, get_peft_model

    originals = {}
    if method.rewrites:
        layers = peft_config.target_modules
        originals = {name: network.get_parameter(f"{name}.weight").detach().clone() for name in layers}
    if moments is not None:
        prepare_corda(network, peft_config, moments)
    if backward is not None:
        prepare_gradients(network, peft_config, backward)
    model = get_peft_model(network, peft_config)
    set_start(model, method.start)
    if isinstance(peft_config, LoraConfig):
        peft_config.corda_config = peft_config.lora_ga_config = None  # done; a saved adapter needs them no more
    if method.rewrites:
        return model, RewrittenBase(model, originals)
    return model, extension_of(method, model)


def extension_of(method: Method, model: PeftModel) -> Extension | None:
    """What a method adds to the training loop, where it leaves the base weights alone.

    Args:
        method: The way to fine-tune.
        model: PEFT's model, new or loaded.
    """
    if method.freezes:
        return FrozenFactors(model)
    if method.plus:
        return LoraPlus(model)
    return AdaLoraExtension(model) if method.adalora else None


def _lora_config(
    method: Method,
    limits: Mapping[str, int],
    rank: int,
    alpha: float | None,
    dropout: float,
    eva: EvaResult | None,
) -> LoraConfig:
    from peft import LoraConfig

    scale = (rank if alpha is None else alpha) / rank
    ranks: Mapping[str, int] = {name: min(rank, limit) for name, limit in limits.items()}
    if eva is not None:
        ranks = {name: r for name, r in eva.ranks.items() if name in limits}
    alphas: Mapping[str, float] = {name: scale * r for name, r in ranks.items()}
    if eva is not None:
        alphas = {name: eva.alphas[name] for name in ranks}
    if method.rslora and (eva is None or eva.options.keep_scale):
        # divides by the root of a layer's rank: the same scale everywhere needs a root here, too
        alphas = {name: value * (rank / ranks[name]) ** 0.5 for name, value in alphas.items()}
    own = [name for name in ranks if eva is not None or ranks[name] != rank]
    return LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        lora_dropout=dropout,
        target_modules=list(ranks),
        rank_pattern={exact_pattern(name): ranks[name] for name in own},
        alpha_pattern={exact_pattern(name): alphas[name] for name in own},
        use_dora=method.dora,
        use_rslora=method.rslora,
        init_lora_weights=method.init,
        **_start_config(method),
    )


def _start_config(method: Method) -> dict[str, object]:
    """PEFT's options of methods whose start has some; CorDA's is the paper's mode for a new task."""
    from peft.tuners.lora import config  # old versions lack one or the other

    if method.needs == MOMENTS:
        return {"corda_config": config.CordaConfig(corda_method="ipm", verbose=False)}
    return {"lora_ga_config": config.LoraGAConfig()} if method.needs == GRADIENTS else {}


def _miss_config(layers: list[str], rank: int, dropout: float) -> PeftConfig:
    from peft import MissConfig

    return MissConfig(r=rank, miss_dropout=dropout, target_modules=layers)


def _adalora_config(
    layers: list[str], rank: int, alpha: float | None, dropout: float, total_updates: int
) -> AdaLoraConfig:
    from peft import AdaLoraConfig

    if total_updates < LEAST_UPDATES:
        raise UserError(
            f"AdaLoRA needs total_updates= of at least {LEAST_UPDATES} for its schedule, {total_updates} were given."
        )
    first = initial_rank(rank)
    return AdaLoraConfig(
        init_r=first,
        target_r=rank,
        lora_alpha=first if alpha is None else alpha * first / rank,
        lora_dropout=dropout,
        target_modules=layers,
        orth_reg_weight=ORTHOGONALITY,
        **adalora_schedule(total_updates),
    )


def has_adapter(network: nn.Module) -> bool:
    """Whether an adapter of PEFT's sits in the network."""
    return any(part in name for name, _ in network.named_parameters() for part in ADAPTER_PARTS)


def is_merged(network: nn.Module) -> bool:
    """Whether an adapter of PEFT's is merged into the network's weights."""
    return any(getattr(module, "merged_adapters", None) for module in network.modules())


def refuse_merged(network: nn.Module, name: str = "") -> None:
    """Raise if an adapter of the network is merged into its weights, which are then not the base's.

    Args:
        network: With adapters or without.
        name: Of the adapter, for the message.

    Raises:
        UserError: One is merged.
    """
    if is_merged(network):
        which = f"The adapter {name!r}" if name else "An adapter"
        raise UserError(f"{which} is merged into the weights. Call unmerge() first.")


def base_weights(network: nn.Module, adapter: AttachedAdapter | None = None) -> dict[str, Tensor]:
    """Weights of the policy without its adapter, under the names they had before it was attached.

    Args:
        network: With the adapter injected.
        adapter: What :func:`attach_adapter` returned; needed where its method rewrites the base weights.
    """
    weights = {
        name.replace(".base_layer.", "."): value
        for name, value in network.state_dict().items()
        if not any(part in name for part in ADAPTER_PARTS)
    }
    extension = None if adapter is None else adapter.extension
    return weights | extension.original_weights() if isinstance(extension, RewrittenBase) else weights


def count_parameters(network: nn.Module) -> dict[str, int]:
    """Trainable and total numbers of parameters."""
    return {
        "trainable_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in network.parameters()),
    }
