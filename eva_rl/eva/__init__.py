"""Explained Variance Adaptation: the leading directions of a model's activations, and how many each layer adapts.

Knows torch models, nothing of policies, environments or PEFT. See docs/eva.md.
"""

from eva_rl.eva.compute import compute, listen
from eva_rl.eva.listener import Accumulators
from eva_rl.eva.options import EvaOptions, Memory
from eva_rl.eva.result import EvaResult, LayerResult
from eva_rl.eva.targets import find_layers

__all__ = [
    "Accumulators",
    "EvaOptions",
    "EvaResult",
    "LayerResult",
    "Memory",
    "compute",
    "find_layers",
    "listen",
]
