"""The ways to fine-tune a policy, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eva_rl.errors import UnknownNameError, UserError

DIRECTIONS, MOMENTS, GRADIENTS = "directions", "second moments", "gradients"
SOURCES = ("trajectories", "rollouts", "mixed")
"""Where activations come from."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
"""Every weight matrix of the blocks: the default targets."""
OWN_GAIN, LORA_GAIN, EVA_GAIN = GAINS = ("own", "lora", "eva")
"""References of a start's gain by name, besides a number."""
LEAST_UPDATES = 3
"""Gradient steps in which AdaLoRA can prune."""
EVA_KEYS = ("adapter.rho", "adapter.tau", "adapter.center", "adapter.score")
"""Settings of EVA alone."""


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        name: What a user types.
        summary: One line on what it does.
        paper: Where it was proposed.
        adapter: Whether it trains a PEFT adapter, rather than weights of the policy itself.
        eva: Whether its directions come from EVA.
        dora: Whether PEFT splits magnitude from direction.
        rslora: Whether the scale is alpha over the square root of the rank.
        adalora: Whether ranks are pruned while training.
        init: PEFT's ``init_lora_weights``.
        start: Our own start, on top of PEFT's, where PEFT has none (:func:`eva_rl.adapters.starts.set_start`).
        plus: Whether B learns at a higher rate than A.
        miss: Whether it is PEFT's MiSS, which shares a matrix between shards of the inputs.
        learning_rate: Peak learning rate of cloning where none is given, measured in docs/learning_rates.md.
    """

    name: str
    summary: str
    paper: str
    adapter: bool = True
    eva: bool = False
    dora: bool = False
    rslora: bool = False
    adalora: bool = False
    init: bool | str = True
    start: str = ""
    plus: bool = False
    miss: bool = False
    learning_rate: float = 5e-3

    def ignores(self, key: str, settings: Mapping[str, Any]) -> bool:
        """Whether a setting of the adapter changes nothing.

        Args:
            key: Which, such as ``adapter.rho``.
            settings: All of them, by such keys.
        """
        if not self.adapter or (self.miss and key == "adapter.alpha") or (self.adalora and key == "adapter.rho"):
            return True  # MiSS has no scale, and AdaLoRA begins with one rank in every layer
        if key == "adapter.variant":  # rotate is every method's
            return not self.eva and settings[key] is None
        if key.startswith("adapter.eva."):  # a gain is measured on it
            return not self.needs and settings.get("adapter.gain", OWN_GAIN) == OWN_GAIN
        return not self.eva and key in EVA_KEYS

    @property
    def needs(self) -> str:
        """What it computes from data before it starts: DIRECTIONS, MOMENTS, GRADIENTS or nothing."""
        if self.eva:
            return DIRECTIONS
        return {"corda": MOMENTS, "lora_ga": GRADIENTS, "lora_one": GRADIENTS}.get(self.start or str(self.init), "")

    @property
    def rewrites(self) -> bool:
        """Whether it takes its start out of the base weights, which are then others than before."""
        return self.init in {"pissa", "olora", "corda", "lora_ga"} or self.start == "milora"

    @property
    def freezes(self) -> bool:
        """Whether a part of the adapter itself stays as it is."""
        return self.init == "mica"

    @property
    def zero_b(self) -> bool:
        """Whether B starts at zero, so that A can be rescaled or rotated without changing what the policy does."""
        return self.adapter and self.init is True and not (self.adalora or self.start or self.miss)

    @property
    def embeds(self) -> bool:
        """Whether it can adapt lookup tables, besides matrices."""
        return self.init == "mica" or (self.zero_b and not self.eva)

    def largest_rank(self, inputs: int, outputs: int) -> int:
        """The highest rank that a layer of this shape can have: that of its weight, or less."""
        largest = min(inputs, outputs)
        return largest // 2 if self.init == "lora_ga" else largest  # it takes 2 R singular vectors of the gradient


LORA, DORA = "Hu et al. 2021, arXiv 2106.09685", "Liu et al. 2024, arXiv 2402.09353"
EVA, RSLORA = "Paischer et al. 2024, arXiv 2410.07170", "Kalajdzievski 2023, arXiv 2312.03732"
ADALORA = "Zhang et al. 2023, arXiv 2303.10512"
PISSA, OLORA = "Meng et al. 2024, arXiv 2404.02948", "Büyükakyüz 2024, arXiv 2406.01775"
CORDA, LORA_GA = "Yang et al. 2024, arXiv 2406.05223", "Wang et al. 2024, arXiv 2407.05000"
LORA_ONE, LORA_PLUS = "Zhang et al. 2025, arXiv 2502.01235", "Hayou et al. 2024, arXiv 2402.12354"
MILORA, MISS = "Wang et al. 2024, arXiv 2406.09044", "Kang and Yin 2024, arXiv 2409.15371"
ORTHOGONAL, MICA = "datta0.github.io/posts/rethink-lora-init", "arXiv 2604.01694"

METHODS = {
    method.name: method
    for method in (
        Method("eva", "LoRA along the principal directions of the policy's own activations", EVA, eva=True),
        Method("lora", "low-rank updates from a random start", LORA),
        Method("dora", "LoRA with a trained magnitude per output", DORA, dora=True),
        Method("rslora", "LoRA scaled by the square root of the rank", RSLORA, rslora=True, learning_rate=3e-3),
        Method("eva_dora", "DoRA along EVA's directions", f"{EVA}; {DORA}", eva=True, dora=True, learning_rate=1e-2),
        Method(
            "eva_rslora", "rsLoRA along EVA's directions", f"{EVA}; {RSLORA}", eva=True, rslora=True, learning_rate=3e-3
        ),
        Method(
            "adalora",
            "singular triplets, the least important pruned while training",
            ADALORA,
            adalora=True,
            learning_rate=3e-2,
        ),
        Method(
            "eva_adalora",
            "AdaLoRA along EVA's directions",
            f"{EVA}; {ADALORA}",
            eva=True,
            adalora=True,
            learning_rate=3e-2,
        ),
        Method(
            "pissa",
            "the weights' own leading singular triplets, taken out and trained",
            PISSA,
            init="pissa",
            learning_rate=1e-3,
        ),
        Method(
            "olora",
            "the leading part of the weights' QR decomposition, taken out and trained",
            OLORA,
            init="olora",
            learning_rate=2e-3,
        ),
        Method(
            "orthogonal", "A and B from orthogonal halves of one basis, so that B A = 0", ORTHOGONAL, init="orthogonal"
        ),
        Method(
            "corda",
            "the part of the weights that acts most on the task's inputs, taken out and trained",
            CORDA,
            init="corda",
            learning_rate=3e-3,
        ),
        Method(
            "lora_ga",
            "the leading directions of the loss's gradient, taken out and trained",
            LORA_GA,
            init="lora_ga",
            learning_rate=3e-3,
        ),
        Method(
            "mica",
            "A alone, read out along the weights' minor left singular vectors",
            MICA,
            init="mica",
            learning_rate=3e-2,
        ),
        Method("lora_plus", "LoRA whose B learns 16 times as fast as its A", LORA_PLUS, plus=True, learning_rate=1e-3),
        Method("milora", "the weights' own minor singular triplets, taken out and trained", MILORA, start="milora"),
        Method("lora_one", "LoRA from a first step along the loss's gradient", LORA_ONE, start="lora_one"),
        Method("miss", "one small matrix for all shards of a layer's inputs", MISS, miss=True, learning_rate=3e-3),
        Method("full", "every weight of the policy", "", adapter=False, learning_rate=1e-3),
        Method("head", "the action head alone", "", adapter=False, learning_rate=1e-2),
    )
}


def adalora_schedule(total_updates: int) -> dict[str, int]:
    """AdaLoRA's phases, in PEFT's words: a tenth to warm up, pruning, and the last half with fixed ranks.

    Args:
        total_updates: Gradient steps of the whole training.
    """
    total = max(total_updates, LEAST_UPDATES)
    return {"total_step": total, "tinit": total // 10, "tfinal": total // 2, "deltaT": max(1, total // 100)}


def find_method(name: str) -> Method:
    """Look a method up.

    Raises:
        UnknownNameError: There is none of that name.
        UserError: The installed PEFT is too old for it.
    """
    if name not in METHODS and "," in name and set(map(str.strip, name.split(","))) <= METHODS.keys():
        raise UserError(f"adapter={name} names several, and a run has one. To run each: --multirun adapter={name}")
    if name not in METHODS:
        without = "adapter=full trains every weight, without one." if name.lower() in {"none", "null", "false"} else ""
        raise UnknownNameError("adapter", name, METHODS, without)
    if not _in_peft(METHODS[name]):
        raise UserError(f"The installed peft has no {name}. Install a newer one: pip install -U 'peft>=0.21.2'.")
    return METHODS[name]


def _in_peft(method: Method) -> bool:
    init = "lora_ga" if method.needs == GRADIENTS else method.init
    if init is True and not method.miss:
        return True
    import peft  # takes seconds, and what PEFT always had needs no look

    if method.miss:
        return hasattr(peft, "MissConfig")
    fields = peft.LoraConfig.__dataclass_fields__
    return f"{init}_config" in fields or repr(init) in str(fields["init_lora_weights"].type)


def check_gain(value: str) -> None:
    """Raise unless ``value`` is a reference by name or a number above zero.

    Raises:
        UserError: It is neither.
    """
    if value not in GAINS and not _number(value) > 0:
        raise UserError(f"adapter.gain={value}: expected own, lora, eva, or a number above 0.")


def _number(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0
