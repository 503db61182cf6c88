"""EVA for any torch model in one call: PEFT's LoRA with ranks, alphas and directions in place."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from eva_rl.adapters.extensions import ADAPTER_NAME
from eva_rl.adapters.starts import check_widths, set_directions
from eva_rl.errors import UserError
from eva_rl.eva import EvaResult, compute
from eva_rl.eva.computation import check_model
from eva_rl.eva.result import exact_pattern
from eva_rl.eva.targets import find_layers, without_wrappers


def attach_eva(
    model: nn.Module,
    lora_config: LoraConfig,
    batches: Iterable[Any] | EvaResult,
    *,
    rho: float | None = None,
    tau: float | None = None,
    adapter_name: str = ADAPTER_NAME,
    **options: Any,
) -> PeftModel:
    """Put LoRA on a model, initialised with Explained Variance Adaptation, in place of PEFT's own initialisation.

    A of each layer, (r, in), has orthonormal rows: the leading right-singular vectors of the layer's inputs (arXiv
    2410.07170), not centred unless ``center`` says so, of at most 16 batches unless ``max_batches`` says otherwise.
    The model computes what it computed before (B = 0). The adapter is plain PEFT: it is saved and loaded as any other,
    and its config says which layers it has, with patterns that match one layer each. Under torch.distributed all
    processes call this, each with batches of its own, and get the same adapter.

    Args:
        model: Any torch model; changed in place, as by ``peft.get_peft_model``.
        lora_config: ``target_modules`` by PEFT's rules, ``r`` (the mean rank), ``lora_alpha``, ``use_dora``,
            ``use_rslora``, ...; ``eva_config`` sets rho, tau, whiten and keep_scale (its ``adjust_scaling_factors``)
            unless they are given here. Which rows count is ``mask``'s to say, not its ``use_label_mask``'s.
        batches: Any iterable of batches, see :func:`eva_rl.eva.compute`; or a result of it for the same layers.
        rho: A layer may get up to r * rho directions; by default eva_config's, else 1.
        tau: How far the halves of the data have to agree; by default eva_config's, else 0.99.
        adapter_name: PEFT's name of the adapter.
        **options: Others of :func:`eva_rl.eva.compute`: max_batches, forward, mask, center, method, score, variant, ...

    Returns:
        PEFT's model. Layers that got no direction have no adapter; targets that are no Linear or Conv1D layers keep
        PEFT's own initialisation, with a warning.

    Raises:
        UserError: A config that leaves EVA no choice, a result of another rank, alpha or model, or see
            :func:`eva_rl.eva.compute`.
    """
    _check(model, lora_config)
    names = targeted_layers(model, lora_config)
    known = {layer.name: layer.width for layer in find_layers(model, "all-linear")}
    chosen, others = [n for n in names if n in known], [n for n in names if n not in known]
    if not chosen:
        raise UserError(f"EVA needs Linear or Conv1D layers; target_modules names {', '.join(names[:5])} alone.")
    if others:
        warnings.warn(
            f"{', '.join(others[:5])} ({len(others)} in all) are no Linear or Conv1D layers that EVA can initialise: "
            "they start as LoRA does.",
            stacklevel=2,
        )
    if isinstance(batches, EvaResult):
        result = _given(batches, lora_config, options | {"rho": rho, "tau": tau})
    else:
        exact = "(?:" + "|".join(re.escape(name) for name in chosen) + ")"
        # exact moments, while memory_budget lasts: sketches capture less where the spectrum is flat
        settings = {"keep_moments": True} | _settings(lora_config, rho, tau) | options
        result = compute(model, batches, targets=exact, **settings)
    if missing := [name for name in chosen if name not in result.layers]:
        raise UserError(f"The EVA result has no layer {missing[0]!r}. Compute it for the targets of lora_config.")
    ranks = {name: rank for name, rank in result.ranks.items() if name in chosen}
    directions = {name: result.layers[name].components for name in ranks}
    check_widths(known, directions)
    every = [name for name, _ in model.named_modules()]
    final = _final_config(lora_config, ranks, result, others, every)
    peft_model = get_peft_model(model, final, adapter_name=adapter_name)
    set_directions(peft_model, directions, adapter_name)
    return peft_model


def _given(result: EvaResult, config: LoraConfig, options: Mapping[str, Any]) -> EvaResult:
    if further := [name for name, value in options.items() if value is not None]:
        raise UserError(
            f"batches is an EvaResult, which was computed with options of its own: {', '.join(further)} would have no "
            "effect. Give them to eva_rl.eva.compute, or batches of data here."
        )
    for name, key, own in (("r", "rank", result.options.rank), ("lora_alpha", "alpha", result.options.alpha)):
        given = getattr(config, name)
        if own is not None and given != own:
            raise UserError(
                f"lora_config has {name}={given:g}, and the EvaResult was computed with {key}={own:g}. Set "
                f"{name}={own:g}, or give {key}={given:g} to eva_rl.eva.compute."
            )
    return result


def targeted_layers(model: nn.Module, lora_config: LoraConfig) -> list[str]:
    """Names of the modules that PEFT would adapt, by its own rules; the model is left as it was.

    Raises:
        UserError: PEFT finds none.
    """
    rules = (
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "task_type",
        "modules_to_save",
    )
    probe = LoraConfig(r=1, **{name: getattr(lora_config, name) for name in rules})
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT has to say it says again when the adapter is made
            tuner: Any = get_peft_model(model, probe).base_model
        names: list[str] = list(tuner.targeted_module_names)
    except ValueError as error:
        raise UserError(f"PEFT cannot adapt target_modules={lora_config.target_modules!r}: {error}") from error
    finally:
        _without_adapters(model)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
    return names


def _without_adapters(model: nn.Module) -> None:
    """Put the plain layers back, also where PEFT gave up half way."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):  # of modules_to_save, which task_type adds to
            model.set_submodule(name, module.original_module)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _check(model: nn.Module, config: LoraConfig) -> None:
    check_model(model)
    if type(config) is not LoraConfig:
        raise UserError(f"lora_config is a {type(config).__name__}; expected peft.LoraConfig.")
    if isinstance(model, PeftModel) or any(".lora_" in name for name, _ in model.named_parameters()):
        raise UserError("This model has an adapter already. Merge or unload it first, or give the model without it.")
    if without_wrappers(model) is not model:
        raise UserError(
            f"The model is wrapped in {type(model).__name__}, into which PEFT does not look. Give the module inside, "
            "and wrap what attach_eva returns."
        )
    if config.init_lora_weights not in (True, "eva"):
        raise UserError(
            f"lora_config has init_lora_weights={config.init_lora_weights!r}, and attach_eva initialises with EVA: "
            'leave it out, or set "eva". For another initialisation use peft.get_peft_model.'
        )
    if config.rank_pattern or config.alpha_pattern:
        raise UserError(
            "EVA chooses the ranks: leave rank_pattern and alpha_pattern out of lora_config; set r and rho."
        )


def _settings(config: LoraConfig, rho: float | None, tau: float | None) -> dict[str, Any]:
    """The options of `compute` that PEFT's config holds."""
    own = config.eva_config
    settings: dict[str, Any] = {"rank": config.r, "alpha": float(config.lora_alpha)}
    settings["rho"] = rho if rho is not None else own.rho if own is not None else 1.0
    settings["tau"] = tau if tau is not None else own.tau if own is not None else 0.99
    if own is not None:
        settings["keep_scale"] = own.adjust_scaling_factors
        settings["variant"] = "whiten" if own.whiten else None
    return settings


def _final_config(
    config: LoraConfig, ranks: Mapping[str, int], result: EvaResult, others: Sequence[str], every: Sequence[str]
) -> LoraConfig:
    final = copy.deepcopy(config)
    root = 0.5 if config.use_rslora else 1.0  # rsLoRA divides by the root of the rank
    scaled = {n: config.lora_alpha * (rank / config.r) ** root for n, rank in ranks.items()}
    alphas = scaled if result.options.keep_scale else {}
    final.target_modules = _exactly([*ranks, *others], every)
    # the names say it all, and PEFT refuses others beside a pattern
    final.layers_to_transform = final.layers_pattern = final.exclude_modules = None
    final.rank_pattern = {exact_pattern(name): rank for name, rank in ranks.items() if rank != config.r}
    final.alpha_pattern = {exact_pattern(n): a for n, a in alphas.items() if ranks[n] != config.r}
    final.init_lora_weights, final.eva_config = True, None
    return final


def _exactly(names: Sequence[str], every: Sequence[str]) -> list[str] | str:
    """The names, or a pattern where PEFT, which takes names for endings, would find more than them."""
    endings = tuple("." + name for name in names)
    if any(name.endswith(endings) for name in every):
        return "|".join(re.escape(name) for name in names)
    return list(names)
