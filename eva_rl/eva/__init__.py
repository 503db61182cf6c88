"""Explained Variance Adaptation: the leading directions of a model's activations, and how many each layer adapts.

Knows torch models, nothing of policies, environments or PEFT. See docs/eva.md. For users, `eva.attach` is
:func:`eva_rl.adapters.attach_eva`, imported when first asked for, since adapters are built on this package.
"""

from importlib import import_module
from typing import Any

from eva_rl.eva.compute import compute, listen
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


def __getattr__(name: str) -> Any:
    if name != "attach":
        raise AttributeError(f"module 'eva_rl.eva' has no attribute {name!r}")
    return import_module("eva_rl.adapters").attach_eva
