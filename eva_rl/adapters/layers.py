"""Which layers of a policy get an adapter, and of which rank at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from eva_rl.adapters.extensions import initial_rank
from eva_rl.adapters.methods import PROJECTIONS, Method
from eva_rl.errors import UserError
from eva_rl.eva import EvaResult, LayerResult


def target_layers(network: nn.Module, targets: Sequence[str] = PROJECTIONS) -> list[str]:
    """Names of the Linear and Embedding layers whose name is, or ends with, one of the targets, or the only one.

    Raises:
        UserError: A target matches nothing, or there is none; the message lists what exists.
    """
    known = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    if not targets:
        raise UserError(f"adapter.targets=[] names no layer. Expected some of {_endings(known)}.")
    several = [targets] if isinstance(targets, str) else targets
    chosen = {name for target in several for name in _matching(target, known, "adapter.targets")}
    return [name for name in known if name in chosen]


def _matching(target: str, known: Sequence[str], key: str) -> list[str]:
    found = [name for name in known if name == target or name.endswith("." + target)]
    if not found:
        raise UserError(f"{key}: {target!r} matches no layer. Expected some of {_endings(known)}.")
    return found


def _endings(names: Sequence[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def rank_limits(
    network: nn.Module,
    method: Method,
    rank: int,
    targets: Sequence[str] = PROJECTIONS,
    caps: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The highest rank of each target layer: that of its weight, and no more than its cap.

    Args:
        network: Of a policy, without an adapter.
        method: The way to fine-tune.
        rank: Rank that is asked for.
        targets: As :func:`target_layers` takes them.
        caps: Highest rank by (ending of) name.

    Raises:
        UserError: A target or a cap matches nothing, or the method cannot adapt one of the layers.
    """
    layers = target_layers(network, targets)
    limits = {name: method.largest_rank(*_shape(network.get_submodule(name))) for name in layers}
    for target, cap in (caps or {}).items():
        if cap < 1:
            raise UserError(f"adapter.rank_caps: {target}={cap}; expected at least 1. Leave it out of adapter.targets.")
        for name in _matching(target, layers, "adapter.rank_caps"):
            limits[name] = min(limits[name], cap)
    _check_kinds(network, method, layers)
    return _checked(method, rank, limits)


def _shape(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def _check_kinds(network: nn.Module, method: Method, layers: Sequence[str]) -> None:
    tables = [name for name in layers if isinstance(network.get_submodule(name), nn.Embedding)]
    if tables and not method.embeds:
        raise UserError(
            f"adapter={method.name} adapts matrices, {tables[0]} is a lookup table. Leave it out of adapter.targets, "
            "or use adapter=lora, rslora, dora, lora_plus or mica."
        )


def _checked(method: Method, rank: int, limits: dict[str, int]) -> dict[str, int]:
    if method.init == "orthogonal":
        if rank % 2:
            raise UserError(f"adapter=orthogonal pairs directions: adapter.rank={rank} has to be even.")
        limits = {name: limit - limit % 2 for name, limit in limits.items()}
    if method.adalora:
        needed = initial_rank(rank)
        if narrow := [name for name, limit in limits.items() if limit < needed]:
            raise UserError(
                f"adapter={method.name} begins with rank {needed} in every layer and prunes from there; {narrow[0]} "
                f"takes {limits[narrow[0]]} at most. Leave it out of adapter.targets, or lower adapter.rank."
            )
    if method.miss and (narrow := [name for name, limit in limits.items() if limit < rank]):
        raise UserError(
            f"adapter=miss has one rank for all layers, adapter.rank={rank}; {narrow[0]} takes {limits[narrow[0]]} at "
            "most. Leave it out of adapter.targets, or lower adapter.rank."
        )
    if none := [name for name, limit in limits.items() if limit < 1]:
        raise UserError(f"adapter={method.name} finds no direction in {none[0]}. Leave it out of adapter.targets.")
    return limits


def check_mixed(variant: str | None, ranks: Mapping[str, int], limits: Mapping[str, int]) -> None:
    """Raise where a layer has too many directions and they are mixed: none of them can go.

    Args:
        variant: Of EVA's directions.
        ranks: Directions of each layer.
        limits: The highest rank of each layer.

    Raises:
        UserError: A layer's directions would be cut.
    """
    if variant not in {"rotate", "permute"}:
        return
    if cut := [name for name, limit in limits.items() if ranks.get(name, 0) > limit]:
        raise UserError(
            f"adapter.variant={variant} mixes all {ranks[cut[0]]} directions of {cut[0]}, which takes {limits[cut[0]]} "
            "at most. Leave it out of adapter.targets or adapter.rank_caps, or lower adapter.rank."
        )


def capped(eva: EvaResult, limits: Mapping[str, int]) -> EvaResult:
    """EVA's result with no layer above its limit; what is cut off goes to no other layer.

    Raises:
        UserError: See :func:`check_mixed`.
    """
    check_mixed(eva.options.variant, eva.ranks, limits)
    return replace(eva, layers={name: _cut(eva, layer, limits.get(name, 0)) for name, layer in eva.layers.items()})


def _cut(eva: EvaResult, layer: LayerResult, limit: int) -> LayerResult:
    if layer.rank <= limit:
        return layer
    return replace(layer, components=layer.components[:limit], lora_alpha=eva.options.lora_alpha(limit))
