"""Explained Variance Adaptation: the leading directions of a model's activations, and how many each layer adapts.

Knows torch models, nothing of policies, environments or PEFT. See docs/eva.md. For users, `eva.attach` is
:func:`eva_rl.adapters.attach_eva`, imported when first asked for, since adapters are built on this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from eva_rl.lazy import lazy_names

if TYPE_CHECKING:
    from eva_rl.eva.computation import compute, listen
    from eva_rl.eva.gram import SecondMoment, effective_rank, gain
    from eva_rl.eva.options import EvaOptions, StorageOptions
    from eva_rl.eva.result import EvaResult, LayerResult
    from eva_rl.eva.statistics import ActivationStatistics
    from eva_rl.eva.targets import find_layers

__all__ = [
    "ActivationStatistics",
    "EvaOptions",
    "EvaResult",
    "LayerResult",
    "SecondMoment",
    "StorageOptions",
    "compute",
    "effective_rank",
    "find_layers",
    "gain",
    "listen",
]

_own, __dir__ = lazy_names(
    __name__,
    {
        "ActivationStatistics": "eva_rl.eva.statistics",
        "EvaOptions": "eva_rl.eva.options",
        "EvaResult": "eva_rl.eva.result",
        "LayerResult": "eva_rl.eva.result",
        "SecondMoment": "eva_rl.eva.gram",
        "StorageOptions": "eva_rl.eva.options",
        "compute": "eva_rl.eva.computation",
        "effective_rank": "eva_rl.eva.gram",
        "find_layers": "eva_rl.eva.targets",
        "gain": "eva_rl.eva.gram",
        "listen": "eva_rl.eva.computation",
    },
)


def __getattr__(name: str) -> Any:
    return import_module("eva_rl.adapters").attach_eva if name == "attach" else _own(name)
